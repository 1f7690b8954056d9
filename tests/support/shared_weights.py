"""What devices compute with weights that they share out, beside what they compute with copies: run as a program.

python shared_weights.py layers OUT.json
python shared_weights.py networks OUT.json     (FLUX's and SD 3.5's)
python shared_weights.py encode OUT.json       (prompts, by emoji_flow's encoders)
python shared_weights.py lower OUT.json        (FLUX.1-dev's programs, for TPUs and GPUs)
python shared_weights.py train ARGUMENTS      (of diffexp_jax.train; also small kernels are shared out)
"""

import json
import runpy
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import draft
from diffexp_jax import parallel
from diffexp_jax.cost.dry_run import programs_of
from diffexp_jax.experiment import Experiment
from diffexp_jax.models import layers
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS, in_turn, stacked
from diffexp_jax.parallel import weights
from diffexp_jax.pipelines import encode_prompts, load_pipeline
from diffexp_jax.sampler import program
from diffexp_jax.settings import checked
from tests.support import absent
from tests.support.networks import BLOCKS, of_flux, of_sd35, random_lora, random_params

WIDTH, DEPTH = 256, 12


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(layers.Dense(WIDTH, name="dense")(x))


class Deep(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        return in_turn(self, Block, [()] * DEPTH, (x,), name=TRANSFORMER_BLOCKS, remat=self.remat)[0]


def of_layers() -> dict[str, dict[str, float]]:
    """Differences of value and gradient, and bytes of a device, of a deep network with sharing and without.

    With it block after block, as a loop, and as a loop whose activations are computed again.
    """
    kernels = np.random.default_rng(0).standard_normal((DEPTH, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    names = [f"{TRANSFORMER_BLOCKS}.{i}" for i in range(DEPTH)]
    dense = [{"dense": {"kernel": kernel, "bias": np.zeros(WIDTH, np.float32)}} for kernel in kernels]
    tree = dict(zip(names, dense, strict=True))
    pair = {"A": np.full((WIDTH, 2), 0.01, np.float32), "B": np.full((2, WIDTH), 0.01, np.float32)}
    x = parallel.shard(np.random.default_rng(1).standard_normal((8, WIDTH)).astype(np.float32), 8)

    def outcome(params, *, remat=False):
        def value_and_gradient(params, pair, x):
            def network(pair):
                lora = dict.fromkeys(names, {"dense": pair})
                return Deep(remat).apply({"params": params, "lora": lora}, x)

            out, pull_back = jax.vjp(network, pair)
            return out, pull_back(jnp.ones_like(out))[0]

        args, program = (parallel.share(params), parallel.replicate(pair), x), parallel.pmap(value_and_gradient)
        memory = program.lower(*args).compile().memory_analysis()
        return jax.device_get(program(*args)), memory.argument_size_in_bytes, memory.temp_size_in_bytes

    parts = parallel.shared_out(tree, jax.device_count())
    loop = stacked(parts, [TRANSFORMER_BLOCKS], at_least=2)
    copies, *of_copies = outcome(tree)
    found = {"parts": outcome(parts), "loop": outcome(loop), "loop, again": outcome(loop, remat=True)}

    def compared(numbers, arguments, temporaries):
        pairs = zip(jax.tree.leaves(copies), jax.tree.leaves(numbers), strict=True)
        return {
            "difference": float(max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)),
            "arguments": arguments / of_copies[0],
            "more temporaries": (temporaries - of_copies[1]) / kernels.nbytes,
        }

    return {name: compared(*outcome) for name, outcome in found.items()}


def of_network(make) -> dict[str, float]:
    """Differences of output and LoRA's gradient of a tiny network by parts: blocks one by one, and as loops."""
    (network, args, groups), rng = make(), np.random.default_rng(0)
    params = random_params(network, args, rng)
    start = random_lora(params, groups, rng)

    def outcome(params, *, remat=False):
        def value_and_gradient(params, start, args):
            def output(start):
                return network.clone(remat=remat).apply({"params": params, "lora": start}, *args)

            out, pull_back = jax.vjp(output, start)
            return out, pull_back(jnp.ones_like(out))[0]

        held = parallel.share(params), parallel.replicate(start), parallel.replicate(args)
        return parallel.first(parallel.pmap(value_and_gradient)(*held))

    def apart(found, copies):
        """The largest difference of two trees, relative to the largest number."""
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(copies), strict=True)
        largest = max(np.abs(x).max() for x in jax.tree.leaves(copies))
        return float(max(np.abs(a - b).max() for a, b in pairs) / largest)

    copies, parts = outcome(params), parallel.shared_out(params, jax.device_count())
    loop = stacked(parts, BLOCKS, at_least=2)
    ways = {"parts": outcome(parts), "again": outcome(parts, remat=True), "loop": outcome(loop, remat=True)}
    return {"shared": n_parts(parts)} | {way: max(map(apart, found, copies)) for way, found in ways.items()}


def n_parts(tree) -> int:
    """How many of the tree's kernels are shared out."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, parallel.Part))
    return sum(isinstance(x, parallel.Part) for x in leaves)


def of_networks() -> dict[str, dict[str, float]]:
    return {"flux": of_network(of_flux), "sd3.5": of_network(of_sd35)}


def of_encoders() -> dict[str, float]:
    """The largest difference of prompts' embeddings, also with the encoders' blocks as loops; and how many of their
    kernels are shared out."""
    pipeline = load_pipeline("emoji_flow")
    texts = ["a dog riding a bike", "an ant", ""]
    ways = [(False, None), (True, None), (False, 2), (True, 2)]
    programs = [program(shards=shards, equal_blocks=blocks) for shards, blocks in ways]
    copies, *others = (encode_prompts(pipeline, texts, program=program)[0] for program in programs)
    pairs = [pair for other in others for pair in zip(jax.tree.leaves(copies), jax.tree.leaves(other), strict=True)]
    tree = parallel.shared_out({part: pipeline.params[part] for part in pipeline.text_parts}, jax.device_count())
    return {
        "difference": float(max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)),
        "parts": n_parts(tree),
    }


def of_programs() -> dict[str, dict[str, float]]:
    """Of FLUX.1-dev by DRaFT-1, at its real size: what of the network a device holds, and how often a program gathers.

    Programs are lowered for devices that are not there.
    """
    found = {}
    for device in absent.PLATFORMS:
        with pytest.MonkeyPatch.context() as patch:
            absent.believe(patch, device)
            config = draft.get_config("model=flux,reward=aesthetic,prompts=animals,explore=false")
            settings = {"batch.samples": 8, "batch.samples_per_forward": 1, "model.image_size": 512}
            settings |= {"parallel.shard_weights": "true", "model.scan_layers": "true", "sampling.steps": 4}
            config.update_from_flattened_dict(settings | {"eval.every": 0, "log.images_every": 0})
            experiment = Experiment.build(checked(config), weights=False)
            ((_, function, args, _),) = programs_of(experiment)
            whole, on_all = (
                sum(x.size for x in jax.tree.leaves(frozen.model["transformer"]))
                for frozen in (experiment.frozen, args[1])
            )
            text = absent.lower(device, function, *args)
            held = on_all / jax.device_count() / whole
            found[device] = {"held": held, "gathers": text.count("stablehlo.all_gather")}
    return found


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what != "lower":  # at a real size what is large is so without
        weights.LARGE = 64 if what in ("train", "networks") else 1024
    if what != "train":
        found = {"layers": of_layers, "networks": of_networks, "encode": of_encoders, "lower": of_programs}[what]()
        Path(arguments[0]).write_text(json.dumps(found))
    else:
        sys.argv = ["train", *arguments]
        runpy.run_module("diffexp_jax.train", run_name="__main__")
