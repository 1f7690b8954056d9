"""Which steps does DDPO learn from? The size of every step's policy gradient.

python tools/studies/step_gradients.py --model emoji_hard --out docs/evidence/results/steps/emoji_hard.json \\
    --document docs/evidence/results/steps.md
python tools/studies/step_gradients.py --experiment fig4_ddpo_aesthetic --prompts 8 --out steps.json

Nothing is trained. Images of some prompts are sampled and scored, and of each step of their chains the gradient is made
as in the first update, which adds them up: a step whose gradient is many times the others' decides where it goes.
`ddpo.timestep_fraction` leaves out the last steps.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from diffexp_jax import backend, parallel
from diffexp_jax.algorithms import Batch, Policy, policy_gradient
from diffexp_jax.algorithms.state import PromptStats, TrainState, advantages
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats.files import write_whole
from diffexp_jax.limits import check_number, whole
from diffexp_jax.pipelines import make_context
from diffexp_jax.report import Table, document_parts
from diffexp_jax.sampling import Trajectory, step_log_prob
from diffexp_jax.settings import as_dict, checked
from diffexp_jax.sweeps import plan


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    check_number("--prompts ", args.prompts, whole(1, 2**16))
    check_number("--samples_per_prompt ", args.samples_per_prompt, whole(2, 2**16))
    command.check_writable(args.out.parent, "--out")
    if args.document:
        document_parts.check(args.document, markers(args.out.stem))
    argument = f"paper.py:{args.experiment},explore=false" + (f",model={args.model}" if args.model else "")
    config, _ = plan.changed_config(argument, {}, dict(map(plan.parse_override, rest)))
    backend.set_cpu_devices(1)
    settings = checked(config)
    if not settings.method.needs.step_noise:
        raise InputError(
            f"--experiment {args.experiment}: {settings.algorithm} has no log-probs of steps; wants one of DDPO"
        )
    experiment = Experiment.build(settings)
    total = gradients(experiment, args.prompts, args.samples_per_prompt, seed=args.seed)
    found = {"argument": argument, "sampling": as_dict(settings.sampling), "reward": experiment.reward}
    found |= {"prompts": min(args.prompts, len(experiment.train.texts)), "samples_per_prompt": args.samples_per_prompt}
    found |= {"t": np.asarray(experiment.sampler.steps(explore=False).t).tolist(), "machine": backend.machine()}
    found["size"] = [float(f"{x:.4g}") for x in np.linalg.norm(total, axis=1)]
    write_whole(args.out, json.dumps(found) + "\n")
    print("\n".join(section(found)))
    if args.document:
        document_parts.write_between(args.document, markers(args.out.stem), section(found))


# ----------------------------------------------------------------------------------------------------------- measuring


def gradients(experiment: Experiment, n_prompts: int, n: int, *, seed: int) -> Float[np.ndarray, "T D"]:
    """The policy gradient of each step, the mean over all images.

    Args:
      n_prompts: evenly spaced ones of the training prompts, or all.
      n: images of each; their rewards are standardised among them.
    """
    texts, size = experiment.train.texts, experiment.split.per_forward
    chosen = np.linspace(0, len(texts) - 1, min(n_prompts, len(texts))).round().astype(int)
    ids = np.repeat(chosen, n)
    keys = parallel.sample_keys(parallel.stream(seed, "noise"), len(ids))
    sample, gradient = jax.jit(make_sample(experiment)), jax.jit(make_gradient(experiment.policy))
    frozen, lora, total = jax.device_put(experiment.frozen), experiment.initial_lora(), 0.0
    with tqdm(total=2 * len(ids), desc="samples, then gradients", unit="image") as bar:
        sampled = []
        for start in range(0, len(ids), size):
            rows = np.arange(start, start + size) % len(ids)  # the last batch is filled up: one compile
            sampled.append(sample(lora, frozen, ids[rows], keys[rows]))
            bar.update(min(size, len(ids) - start))
        rewards = np.concatenate([np.asarray(rewards) for _, rewards in sampled])[: len(ids)]
        adv = standardised(rewards.reshape(-1, n)).reshape(-1)
        for i, (trajectory, _) in enumerate(sampled):
            mine = adv[i * size : (i + 1) * size]
            weight = np.pad(mine / len(ids), (0, size - len(mine))).astype(np.float32)
            total = total + np.asarray(gradient(lora, frozen, trajectory, weight), np.float64)
            bar.update(len(mine))
    return total


def standardised(rewards: Float[np.ndarray, "P n"]) -> Float[np.ndarray, "P n"]:
    """DDPO's advantages among each prompt's images, without their clip; zeros where all are the same."""
    n_prompts, n = rewards.shape
    stats, ids = PromptStats(jnp.asarray(rewards), jnp.full(n_prompts, n)), np.arange(n_prompts).repeat(n)
    return np.asarray(advantages(stats, ids, rewards.reshape(-1), min_count=1, clip=np.inf)).reshape(rewards.shape)


def make_sample(experiment: Experiment) -> Any:
    """A function (lora, frozen, prompt ids, keys) -> (the sampled chains, their rewards)."""
    policy, sampler, task = experiment.policy, experiment.sampler, experiment.train
    everything = jax.tree.map(jnp.asarray, (task.cond, task.tokens[experiment.reward]))

    def sample(lora, frozen, ids, keys):
        cond, tokens = jax.tree.map(lambda x: x[ids], everything)
        batch = Batch(ids, make_context(cond, sampler.uncond), tokens, keys)
        state = TrainState(jnp.zeros((), jnp.int32), lora, None, None)
        samples = policy_gradient.sample(policy, state, frozen, batch, sampler.steps(explore=False), n_chunks=1)
        return jax.tree.map(lambda x: x[0], samples.trajectory), samples.rewards

    return sample


def make_gradient(policy: Policy) -> Any:
    """A function (lora, frozen, chains, weights) -> [T, D]: the gradient of each step's weighted log-probs."""

    def gradient(lora, frozen, chain: Trajectory, weight: Float[Array, "B"]):
        def one(xs):
            i, x_tm1, step = xs

            def log_prob(lora):
                denoise = partial(policy.network.guided, frozen, lora)  # plain steps
                return step_log_prob(policy.process, denoise, chain.x_t(i), x_tm1, step, chain.context)

            (found,) = jax.vjp(log_prob, lora)[1](weight)
            return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(found)])

        return jax.lax.map(one, (jnp.arange(len(chain.x_tm1)), chain.x_tm1, chain.steps))

    return gradient


# ------------------------------------------------------------------------------------------------------------ document


markers = partial(document_parts.markers, kind="steps")


def section(found: Mapping[str, Any]) -> list[str]:
    """The lines of Markdown: a column for each step, its size relative to the smallest."""
    s, least = found["sampling"], min(found["size"])
    said = (
        f"{found['prompts']} prompts, {found['samples_per_prompt']} images each; {s['steps']} steps, eta {s['eta']:g}, "
        f"guidance {s['guidance']:g}, {found['reward']}, the first update's gradient. {found['machine']['devices']}, "
        f"jax {found['machine']['jax']}."
    )
    sizes = [f"{size / least:.1f}" for size in found["size"]]
    return [said, "", *document_parts.markdown(Table(["t", *map(str, found["t"])], [["size", *sizes]]))]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is left: settings of the experiment."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--experiment", default="fig4_ddpo_pickscore", help="of configs/paper.py: prompts, reward, sampling")
    add("--model", help="of configs/models.py (default: the experiment's)")
    add("--prompts", type=int, default=16, help="how many of the training prompts")
    add("--samples_per_prompt", type=int, default=16)
    add("--seed", type=int, default=0, help="of the noise")
    add("--out", type=Path, required=True, help="the .json file to write")
    add("--document", type=Path, help="a document with the lines <!-- steps: NAME --> and <!-- /steps: NAME -->")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    command.guarded(main, *parse())
