"""What the processes of test_hosts.py run; they import nothing that uses a device before the hosts have met."""

import gc
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import app

from diffexp_jax import command, parallel, train
from diffexp_jax.algorithms.denoising import Latents
from diffexp_jax.cli import train as cli_train
from diffexp_jax.errors import InputError, RewardError


def keep(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes a run keep each iteration's prompts, noise, rewards and latents of all hosts as FOLDER/N.npz; images where
    the method does not keep its latents.
    """

    def make_programs(experiment, original=train.make_programs):
        programs = original(experiment)
        count = iter(range(1, 100))

        def update(state, frozen, inputs):
            network = next(name for name in ("unet", "transformer") if name in frozen.model)
            note_memory(folder / f"memory-{jax.process_index()}.json", frozen, frozen.model[network])
            batch = inputs.batch
            found = {"prompts": batch.prompt_id, "noise": jax.vmap(jax.random.key_data)(batch.key)}
            found |= {"conditioning": batch.context.cond}
            if inputs.samples:
                kept = inputs.samples.trajectory  # of each chunk: all steps, or the images alone
                last = kept.x_0 if isinstance(kept, Latents) else parallel.pmap(lambda x_tm1: x_tm1[:, -1])(kept.x_tm1)
                joined = parallel.pmap(lambda x: x.reshape(-1, *x.shape[2:]))(last)
                found |= {"rewards": inputs.samples.rewards, "x_0": joined}
            else:
                generate = programs.generate(experiment.sampler.guidance_scales(explore=True))
                found["images"] = generate(frozen.model, state.lora, batch.context, batch.key, inputs.steps)
            found = parallel.unshard(found, group=experiment.settings.batch.group)
            of_prompts = [x.reshape(len(x), -1) for x in jax.tree.leaves(found["conditioning"])]
            found["conditioning"] = np.concatenate(of_prompts, axis=-1)
            if parallel.is_first():
                np.savez(folder / f"{next(count)}.npz", **found)
            return programs.update(state, frozen, inputs)

        return programs._replace(update=update)

    patch.setattr(train, "make_programs", make_programs)


def note_memory(path: Path, frozen: Any, network: Any) -> None:
    """Writes down what the frozen arrays and the network take once, and what is on each of this host's devices."""
    gc.collect()
    live = Counter()
    for x in jax.live_arrays():
        for device in x.sharding.addressable_devices:  # to look at x's shards would make arrays of them, that live too
            live[str(device)] += x.nbytes // len(x.sharding.device_set)
    copies, of_network = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) // jax.local_device_count() for tree in (frozen, network)
    )
    path.write_text(json.dumps({"frozen": copies, "network": of_network, "live": live}))


def recorded(folder: str) -> None:
    """A training run of the command line that keeps what it does: FOLDER and the flags are its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, Path(folder))
        app.run(lambda argv: command.guarded(cli_train.main, argv), flags_parser=cli_train.parse_flags)


def as_host(case: str) -> None:
    """What the processes of the next test do: no training, only what hosts say to each other."""

    def work() -> None:
        with parallel.joined(parallel.HostSettings(None, None, None, 60, 4)):
            index = jax.process_index()
            if case == "normal":
                assert parallel.agree(3 - index) == 3
                assert parallel.from_first(lambda: {"x": np.arange(3.0), "host": index})["host"] == 0
                assert parallel.from_each(lambda: index) == [0, 1]
                index_of_samples = parallel.sample_index(8)
                assert parallel.unshard(index_of_samples).tolist() == list(range(8))
                assert parallel.unshard_local(parallel.shard(np.arange(8), 8)).tolist() == list(range(index, 8, 2))
                return
            if case == "same":
                parallel.check_same("prompts", f"prompts of host {index}")
            if case == "first":
                parallel.from_first(lambda: fail(InputError("workdir x: in use")))
            if case in ("reward", "unexpected"):
                error = {"reward": RewardError("reward r: is down"), "unexpected": KeyError("k")}[case]
                parallel.together(lambda: fail(error) if index == 1 else None)
            parallel.exchange("")
            print("ready", flush=True)
            print("ready", file=sys.stderr, flush=True)
            if case == "alone" and index == 0:
                raise OSError("disk full")
            parallel.unshard(np.zeros((1, 1))) if case == "alone" else time.sleep(600)

    command.guarded(work)


def fail(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    what, argument = sys.argv[1:3]
    del sys.argv[1:3]
    {"train": recorded, "host": as_host}[what](argument)
