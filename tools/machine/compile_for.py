"""Compiles programs of a run for a device that is not there, and writes what its compiler makes of them.

python tools/machine/compile_for.py h100 ddpo:model=sd15,reward=aesthetic network gradient update --out hlo \\
    --set batch.samples=16 batch.samples_per_forward=8 eval.every=0 log.images_every=0

A program is one of the run's ("sample", "update", "evaluate"), or of its networks alone, at the run's batch of a
forward pass and steps: "network" evaluates the one that is trained at each step under guidance, "gradient" makes its
gradient in LoRA too, "reward" scores images, with the gradient in them, "end" decodes latents and scores the images,
with the gradient in the latents. A text of XLA's optimized HLO is written for each: its kernels, with the shapes of
what they read and write.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import ast
import importlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from diffexp_jax import backend, parallel
from diffexp_jax.algorithms.algorithm import rewarded
from diffexp_jax.cost.dry_run import GIB, Program, programs_of
from diffexp_jax.cost.target import FORMS, compiling_for
from diffexp_jax.experiment import Experiment
from diffexp_jax.sampling import initial_latents
from diffexp_jax.settings import Settings, checked

OF_NETWORK, OF_RUN = ("network", "gradient", "reward", "end"), ("sample", "update", "evaluate")


def network_programs(experiment: Experiment) -> Iterable[Program]:
    """Those of OF_NETWORK, as large as a forward pass of the run; both halves of the guidance at every step."""
    policy, per_forward = experiment.policy, experiment.split.per_forward
    batch = experiment.draw_batch(0, None)
    whole = batch.context, batch.key, batch.tokens
    context, keys, tokens = jax.eval_shape(lambda *x: jax.tree.map(lambda x: x[:, :per_forward], x), *whole)
    steps = parallel.replicate(experiment.sampler.steps(explore=False))
    args = (
        parallel.shapes_on_devices(experiment.frozen),
        parallel.shapes_on_devices(experiment.lora_shapes()),
        context,
        keys,
        steps,
    )

    def network(frozen, lora, context, keys, steps):
        def one(x, step):
            return x + policy.network.guided(frozen, lora, x, step, context), None

        return jax.lax.scan(one, initial_latents(keys, policy.latent_shape), steps)[0]

    def gradient(frozen, lora, context, keys, steps):
        def one(carry, step):
            x, total = carry
            out, pull_back = jax.vjp(lambda lora: policy.network.guided(frozen, lora, x, step, context), lora)
            return (x + out, jax.tree.map(jnp.add, total, pull_back(out)[0])), None

        x_T = initial_latents(keys, policy.latent_shape)
        return jax.lax.scan(one, (x_T, jax.tree.map(jnp.zeros_like, lora)), steps)[0]

    def reward(frozen, images, tokens):
        scores, pull_back = jax.vjp(lambda images: policy.score(frozen, images, tokens)[0], images)
        return scores, pull_back(jnp.ones_like(scores))[0]

    def end(frozen, x_0, tokens):
        scores, pull_back = jax.vjp(lambda x_0: rewarded(policy, frozen, x_0, tokens)[0], x_0)
        return scores, pull_back(jnp.ones_like(scores))[0]

    frozen, latents = args[0], jax.ShapeDtypeStruct((*keys.shape[:2], *policy.latent_shape), jnp.float32)
    images = jax.eval_shape(jax.vmap(policy.decode), frozen, latents)
    yield Program("network", parallel.pmap(network), args)
    yield Program("gradient", parallel.pmap(gradient), args)
    yield Program("reward", parallel.pmap(reward), (frozen, images, tokens))
    yield Program("end", parallel.pmap(end), (frozen, latents, tokens))


def compile_and_write(program: Program, out: Path) -> str:
    """Compiles a program for the devices that are not there and writes its text; what it takes, in words."""
    start, busy = time.perf_counter(), time.process_time()
    options = backend.absent_devices().compiler_options
    compiled = program.function.lower(*program.args).compile(compiler_options=options)
    out.write_text(compiled.as_text())
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()  # no cost of a GPU's programs
    arguments, temporaries = (x / GIB for x in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    moved = f"{cost['bytes accessed'] / 1e9:.1f} GB moved if each loop ran once, " if cost else ""
    took = f"compiled in {time.perf_counter() - start:.0f} s, {time.process_time() - busy:.0f} s of a core"
    return f"{out}: arguments {arguments:.2f} GiB, temporaries {temporaries:.2f} GiB, {moved}{took}"


def settings_of(config: str, changes: Sequence[str]) -> Settings:
    """Of NAME:ARGUMENTS of configs/, and KEY=VALUE with the values as Python writes them."""
    name, _, arguments = config.partition(":")
    found = importlib.import_module(f"configs.{name}").get_config(arguments)
    pairs = (change.partition("=")[::2] for change in changes)
    found.update_from_flattened_dict({key: _value(text) for key, text in pairs})
    return checked(found)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    with compiling_for(args.target) as absent:
        print(absent.versions)
        experiment = Experiment.build(settings_of(args.config, args.set), weights=False)
        for programs in (network_programs, programs_of):
            for program in programs(experiment):
                if program.name in args.programs:
                    print(compile_and_write(program, args.out / f"{program.name}.txt"), flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("target", help=FORMS)
    parser.add_argument("config", help="of configs/: NAME or NAME:ARGUMENTS")
    parser.add_argument("programs", nargs="+", choices=(*OF_NETWORK, *OF_RUN))
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="settings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.guarded(main, parse())
