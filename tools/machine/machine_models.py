"""What scripts/check_machine.py asks of models: the stored results of float32, a run's programs, the real sizes."""

import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from machine_checks import GIB, HALF, IN_FULL, ON_THIS_CPU, Outcome, draw, relative_error

from diffexp_jax import backend, parallel
from diffexp_jax.algorithms import Batch, Inputs
from diffexp_jax.cost.random_weights import peak_memory, random_weights
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.pipelines import make_context
from diffexp_jax.programs import Programs, make_generate, make_programs
from diffexp_jax.settings import checked, parsed

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------- stored results of float32

# The largest errors of images and latents (relative to their spread), and of AlignProp's gradient (to its length). On a
# CPU they are 0.034 and 0.02 to 0.12 in bfloat16, 0.0043 and 0.003 in float16: a third of these or less.
TOLERANCES = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.35), "float16": (0.015, 0.05)}
ON_A_CPU = (1e-4, 1e-4)  # float32's there


def tolerances(dtype: str) -> tuple[float, float]:
    return ON_A_CPU if dtype == "float32" and backend.platform() == "cpu" else TOLERANCES[dtype]


def advice_for(dtype: str) -> str:
    """What to do where a model's results in this type are wrong."""
    if dtype != "float32":
        return HALF.format(dtype)
    return ON_THIS_CPU if backend.platform() == "cpu" else IN_FULL


def check_parity(compute: Callable[[], dict[str, np.ndarray]], reference: dict[str, np.ndarray], dtype: str) -> Outcome:
    """Images and latents against the stored ones of the same names."""
    errors = {name: relative_error(x, reference[name], centred=True) for name, x in compute().items()}
    error, most = max(errors.values()), tolerances(dtype)[0]
    return Outcome(f"error {error:.1e}", f"at most {most:g}", error <= most, advice_for(dtype), errors)


def check_gradient(reference: dict[str, np.ndarray], dtype: str) -> Outcome:
    ours, exact = (np.asarray(x, np.float64) for x in (emoji_results(dtype)[1], reference["emoji/gradient"]))
    error, most = relative_error(ours, exact), tolerances(dtype)[1]
    cosine = float(ours @ exact / max(np.linalg.norm(ours) * np.linalg.norm(exact), 1e-30))
    numbers, found = {"error": error, "cosine": cosine}, f"error {error:.1e}, cosine {cosine:.4f}"
    return Outcome(found, f"error at most {most:g}", error <= most, advice_for(dtype), numbers)


# ------------------------------------------------------------------------------ the emoji model: a run's own programs

SAMPLES, STEPS = 16, 8  # of an iteration, on each device: the same samples on each, so that sums are one device's
SETTINGS = {
    "eval.every": 0,
    "log.images_every": 0,
    "reward": f"jax:{Path(__file__).stem}:brightness",
    "batch.samples_per_forward": SAMPLES // 2,
    "sampling.steps": STEPS,
    "optim.grad_clip": 1e6,  # so that Adam's first mean is the gradient
}
# AlignProp's gradient is that of the last two steps: by the network's weights, and by its input. Through all 8 a few
# samples' gradients blow up, and how far depends on rounding: rounding the weights to bfloat16 moves it by 0.04 to
# 3.5 of its length, from batch to batch; that of two steps by 0.02 to 0.08.
LIVE_STEPS = 2
METHODS = {
    "alignprop": {"prompts": "animals_unseen_with_article", "optim.lr": 1e-2, "optim.weight_decay": 0.0}
    | {"alignprop.truncation": "fixed", "alignprop.truncation_k": LIVE_STEPS, "alignprop.input_gradient": True},
    "ddpo": {"prompts": "prompt:a cat", "optim.lr": 5e-3, "optim.schedule": "constant", "optim.weight_decay": 0.0}
    | {"ddpo.clip": 0.1, "ddpo.timestep_fraction": 1.0},
}
# Iterations, and batches of noise that are not trained on. On a CPU they raise brightness by 0.063 +- 0.007 and 0.013
# +- 0.001; in bfloat16, as an accelerator runs them, by 0.063 +- 0.007 and 0.018 +- 0.001.
LEARNING = {"alignprop": (4, 1), "ddpo": (12, 4)}


def brightness(images):
    """The reward, [B,H,W,3] -> [B]."""
    return images.mean((1, 2, 3))


def settings(method: str, argument: str, changes: dict[str, Any]):
    """A config of configs/, with changes."""
    for folder in (HERE.parents[1], HERE):  # where configs/ is, and the reward above
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    config = importlib.import_module(f"configs.{method}").get_config(argument)
    config.update_from_flattened_dict(changes)
    return config


# Sections and settings that the stored results depend on; the others are about files, devices and what is reported.
DECISIVE = ("algorithm", "model", "prompts", "reward", "reward_dtype", "sampling", "lora", "alignprop")


def decisive_settings() -> dict[str, Any]:
    """The settings of AlignProp's stored results, by key: stored beside the results, and compared by a test."""
    config = settings("alignprop", "model=emoji,explore=false", SETTINGS | METHODS["alignprop"])
    flat = flatten_dict(config.to_dict(), sep=".")
    return {key: value for key, value in flat.items() if key.partition(".")[0] in DECISIVE}


class Run(NamedTuple):
    """A run's programs, and what they are called with; see `train.run`."""

    experiment: Experiment
    programs: Programs
    frozen: Any
    steps: Any
    generate: Any = None

    def start(self, lora: Any = None) -> Any:
        """The first state, on the devices."""
        rank = self.experiment.settings.lora.rank
        fresh = init_lora(jax.random.key(0), self.experiment.sampler.pipeline.base, rank=rank)
        return parallel.replicate(jax.device_get(self.programs.algorithm.init(fresh if lora is None else lora)))

    def random_lora(self) -> Any:
        """One that changes something, and every part of which has a gradient."""
        base, rank = self.experiment.sampler.pipeline.base, self.experiment.settings.lora.rank
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: init_lora(jax.random.key(0), base, rank=rank)))
        return structure.unflatten([0.1 * draw(i, leaf.shape) for i, leaf in enumerate(leaves)])

    def batch(self, it: int) -> Batch:
        """SAMPLES samples, the same on each device."""
        rows = np.arange(self.experiment.settings.batch.samples) % SAMPLES
        task = self.experiment.train
        ids = rows % len(task.texts)
        cond, tokens = jax.tree.map(lambda x: x[ids], (task.cond, task.tokens[self.experiment.reward]))
        keys = parallel.sample_keys(parallel.stream(0, "noise", it), SAMPLES)[rows]
        return parallel.shard(Batch(ids, make_context(cond, self.experiment.sampler.uncond), tokens, keys), len(rows))

    def sample(self, state: Any, batch: Batch) -> Any:
        return self.programs.sample(state, self.frozen, batch, self.steps) if self.programs.sample else None

    def update(self, state: Any, batch: Batch, samples: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The next state, and metrics."""
        key = parallel.replicate(jax.random.key(0))
        state, metrics = self.programs.update(state, self.frozen, Inputs(batch, self.steps, key, samples))
        return state, parallel.first(metrics)

    def iterate(self, state: Any, batch: Batch) -> tuple[Any, dict[str, np.ndarray]]:
        return self.update(state, batch, self.sample(state, batch))

    def images(self, state: Any, batch: Batch) -> np.ndarray:
        """The images of the batch's prompts and noise, [SAMPLES,H,W,3] in [0,1]."""
        images = self.generate(self.frozen.model, state.lora, batch.context, batch.key, self.steps)
        return parallel.unshard(images)[:SAMPLES]

    def brightness(self, state: Any, n_batches: int) -> np.ndarray:
        """The brightness of the images of noise that is not trained on."""
        images = [self.images(state, self.batch(it)) for it in range(1000, 1000 + n_batches)]
        return brightness(np.concatenate(images).astype(np.float64))


@functools.cache
def emoji_run(method: str, dtype: str, old_log_prob: str) -> Run:
    changes = SETTINGS | METHODS[method] | {"model.dtype": dtype, "ddpo.old_log_prob": old_log_prob}
    config = settings(method, "model=emoji,explore=false", changes | {"batch.samples": SAMPLES * jax.device_count()})
    experiment = Experiment.build(checked(config))
    frozen = parallel.share(experiment.frozen)
    sampler, options = experiment.sampler, {"n_chunks": 1, "lora_scale": experiment.lora_scale}
    generate = make_generate(sampler.pipeline, form=lambda images: images.clip(0.0, 1.0), **options)
    steps = parallel.replicate(sampler.steps(explore=False))
    return Run(experiment, make_programs(experiment), frozen, steps, generate(sampler.guidance_scales(explore=False)))


@functools.cache
def emoji_results(dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Results of AlignProp's update from a LoRA of random numbers: some pixels of its images, and its gradient."""
    run = emoji_run("alignprop", dtype, "recomputed")
    state, batch = run.start(run.random_lora()), run.batch(0)
    images = run.images(state, batch)
    state, _ = run.iterate(state, batch)
    adams_mean = optax.tree.get(parallel.first(state.opt_state), "mu")
    mean = np.concatenate([np.ravel(x) for x in jax.tree.leaves(adams_mean)])
    gradient = mean / (1.0 - run.experiment.settings.optim.b1)
    return {"emoji/images": images[:, ::4, ::4]}, gradient


def emoji_images(dtype: str) -> dict[str, np.ndarray]:
    return emoji_results(dtype)[0]


def check_ratio(dtype: str) -> Outcome:
    """Two updates by samples of equal rewards: the LoRA stays as it is, so the ratios must be 1."""
    run = emoji_run("ddpo", dtype, "recomputed")
    state, batch = run.start(run.random_lora()), run.batch(0)
    samples = run.sample(state, batch)
    _, metrics = run.update(state, batch, samples._replace(rewards=jnp.zeros_like(samples.rewards)))
    largest = float(metrics["ratio/max_abs_log"])
    advice = "XLA compiles one loop in two ways here: set --config.ddpo.old_log_prob=current, and report it"
    return Outcome(f"largest |log ratio| {largest:g}", "exactly 0", largest == 0.0, advice, largest)


def check_learning(method: str, iterations: int, n_batches: int) -> Outcome:
    """Brightness of the same prompts and noise before and after, in the type that runs have here."""
    dtype = str(parsed(settings(method, "model=emoji", {})).dtype)
    run = emoji_run(
        method, dtype, "recomputed" if dtype == "float32" else "auto"
    )  # of the programs above, if it can be
    state = run.start()
    before = run.brightness(state, n_batches)
    for it in range(iterations):
        state, _ = run.iterate(state, run.batch(it))
    after = run.brightness(state, n_batches)
    rise, error = (after - before).mean(), (after - before).std() / len(before) ** 0.5
    found = f"{before.mean():.4f} -> {after.mean():.4f}, +- {error:.4f}"
    advice = "training does not learn here: look at the rows above; if all are ok, report it with the JSON file"
    return Outcome(found, "up by 3 standard errors", bool(rise > 3 * error), advice, {"rise": rise, "error": error})


# ----------------------------------------------------------------------------------------------------------- full size


def check_full_size(model: str, method: str) -> Outcome:
    """The model as it is configured, but for 4 samples a device; with LAION's aesthetic reward."""
    if backend.platform() == "cpu":
        return Outcome("needs an accelerator", ok=None)
    changes = {"eval.every": 0, "log.images_every": 0, "batch.samples": 4 * jax.device_count()}
    return full_size(settings(method, f"model={model},reward=aesthetic,prompts=animals", changes))


def full_size(config: Any) -> Outcome:
    """Two iterations of a run's programs on random weights: seconds of the second, memory beside the dry run's."""
    before, experiment, plans = peak_memory(), Experiment.build(checked(config), weights=False), []
    programs = make_programs(experiment)
    sample = programs.sample and compiled_once(programs.sample, plans)
    programs = programs._replace(sample=sample, update=compiled_once(programs.update, plans))
    steps = parallel.replicate(experiment.sampler.steps(explore=False))
    run = Run(experiment, programs, random_weights(experiment.frozen), steps)
    state, batch = run.start(), experiment.draw_batch(0, None)
    for _ in range(2):
        start = time.perf_counter()
        state, metrics = run.iterate(state, batch)
        seconds = time.perf_counter() - start
    peak, planned, compiling = peak_memory(), max(plan.bytes for plan in plans), sum(plan.seconds for plan in plans)
    loss, gradient = float(metrics["loss"]), float(metrics["grad_norm"])
    used = "" if peak is None else f"{'' if peak > before else 'under '}{peak / GIB:.1f} of "
    found = f"{seconds:.1f} s, {used}{planned / GIB:.1f} GiB planned, compiled in {compiling:.0f} s"
    advice = f"the loss is {loss}, the gradient's norm {gradient}: in float16, set --config.model.dtype=bfloat16"
    numbers = {"seconds": seconds, "compiling": compiling, "planned_bytes": planned, "peak_bytes": peak}
    numbers |= {"loss": loss, "grad_norm": gradient}
    return Outcome(found, "finite loss and gradient", bool(np.isfinite(loss + gradient)), advice, numbers)


class Plan(NamedTuple):
    """What it took to compile a program, and what it will take to run, by XLA's memory analysis (`dry_run.Cost`)."""

    seconds: float
    bytes: int


def compiled_once(function: Any, plans: list[Plan]) -> Callable:
    """The mapped program, compiled at its first call, which adds to `plans`."""
    compiled = []

    def call(*args):
        if not compiled:
            start = time.perf_counter()
            compiled.append(function.lower(*args).compile())
            seconds, memory = time.perf_counter() - start, compiled[0].memory_analysis()
            size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            plans.append(Plan(seconds, size + memory.output_size_in_bytes - memory.alias_size_in_bytes))
        return compiled[0](*args)

    return call
