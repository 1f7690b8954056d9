"""`--dry_run`: the size and the cost of a run, from shapes alone: no weights, no files of the model, no workdir.

It compiles the very programs that the run would (`programs.make_programs`) for this machine's devices. On CPU the
last stage of it (XLA's ExecutionGraph) seems quadratic in the kernels of a loop's body: seconds for SD 1.5, minutes for
the gradient of SDXL, several times that on a busy machine. So rows are printed as they are ready.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffexp_jax import InputError, backend, check, evaluation, flops, parallel
from diffexp_jax.algorithms import METHODS
from diffexp_jax.models import families, lora, sizes, stable_diffusion
from diffexp_jax.models.precision import is_full_float32
from diffexp_jax.problem import (
    Problem,
    draw_batch,
    frozen_params,
    load_rewards,
    model_options,
    sampling_steps,
)
from diffexp_jax.programs import make_programs
from diffexp_jax.prompts import load_prompts

GIB = 2**30
# XLA:CPU's default schedule goes for speed and holds everything: as XLA schedules for accelerators, it is for memory.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_backend_optimization_level": 0}


class Cost(NamedTuple):
    """Of one program on one device; bytes by XLA's memory analysis."""

    name: str
    flops: float
    arguments: int
    temporaries: int
    outputs: int  # less those that are written over arguments
    seconds: float  # to compile

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def dry_run(config: ConfigDict) -> None:
    """Prints what `train.run` would need for `config`.

    Raises:
      InputError: a setting that cannot work, or a model of unknown size.
    """
    check.check_config(config)
    problem = abstract_problem(config)
    print("\n".join(describe(config, problem)), flush=True)
    costs = []
    print(
        f"{'program':10}{'arguments':>12}{'temporaries':>12}{'outputs':>10}{'together':>10}   GiB a device", flush=True
    )
    for cost in (cost_of(*program) for program in programs_of(config, problem)):
        columns = (cost.arguments, cost.temporaries, cost.outputs, cost.peak)
        numbers = "".join(f"{x / GIB:{width}.2f}" for x, width in zip(columns, (12, 12, 10, 10), strict=True))
        print(f"{cost.name:10}{numbers}   {cost.flops:.3g} FLOPs, compiled in {cost.seconds:.0f} s", flush=True)
        costs.append(cost)
    print("\n".join(conclude(config, costs)))


# -------------------------------------------------------------------------------------------------------------- shapes


def abstract_problem(config: ConfigDict) -> Problem:
    """The run's problem with shapes for weights, and zeros for embeddings and tokens; without evaluation sets."""
    model, (name, trained, loaded) = abstract_model(config), load_rewards(config, shapes_only=True)
    trained = trained._replace(params=shapes_of(trained.params))
    rewards = {key: reward._replace(params=shapes_of(reward.params)) for key, reward in loaded.items()}
    prompts = load_prompts(config.prompts)
    cond = zero_embedding(config, model, len(prompts.texts))
    empty = jax.tree.map(lambda x: x[0], cond)
    uncond = evaluation.unconditional(model, empty)
    tokens = {name: reward.tokenize(prompts.texts) for name, reward in rewards.items()}
    units = np.zeros(cond.embedding.shape[:2], np.int32)
    task = evaluation.Task(prompts.name, prompts.texts, cond, tokens)
    return Problem(model, name, trained, rewards, units, task, [], empty, uncond)


def model_config(path: str) -> families.ModelConfig:
    """Of a folder's json files, or of a published model that is not there.

    Raises:
      InputError: no such folder, and no such model is known.
    """
    folder = stable_diffusion.EMOJI if path == "emoji" else Path(path).expanduser()
    if folder.is_dir():
        return families.read_config(folder)
    if path not in sizes.PIPELINES:
        raise InputError(
            f"model {path!r}: no such folder, and its sizes are not known; accepted: emoji, a folder, or one of "
            f"{', '.join(sizes.PIPELINES)}"
        )
    return families.model_config(*sizes.PIPELINES[path], where=path)


def abstract_model(config: ConfigDict) -> stable_diffusion.StableDiffusion:
    """The model with shapes for weights, in the types that they would have."""
    pipeline, options = model_config(config.model.path), model_options(config)
    dtypes = {"vae": pipeline.vae_dtype(options["dtype"])}
    params = {
        part: shapes_of(tree, dtypes.get(part, options["dtype"]))
        for part, tree in stable_diffusion.abstract_params(pipeline).items()
    }
    return stable_diffusion.build(pipeline, **options)._replace(params=params)


def zero_embedding(
    config: ConfigDict, model: stable_diffusion.StableDiffusion, n: int
) -> stable_diffusion.TextEmbedding:
    """Zeros of the shape of n prompts' embeddings."""
    text = model_config(config.model.path).text
    ids = jax.ShapeDtypeStruct((len(text), n, text[0].max_position_embeddings), jnp.int32)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(model.encode, model.params, ids))


def shapes_of(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def on_devices(tree: Any) -> Any:
    """Shapes with the leading axis of local devices."""
    n = jax.local_device_count()
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((n, *s.shape), s.dtype), tree)


def abstract_lora(config: ConfigDict, problem: Problem) -> Any:
    unet = problem.model.params["unet"]
    return jax.eval_shape(lambda: lora.init_lora(jax.random.key(0), unet, rank=config.lora.rank))


# ------------------------------------------------------------------------------------------------------------ programs


class Program(NamedTuple):
    """One of a run's programs, mapped over the devices, and what it is called with: arrays, or shapes of them."""

    name: str
    function: Any
    args: tuple[Any, ...]


def programs_of(config: ConfigDict, problem: Problem) -> Iterable[Program]:
    """The programs of a run: of an iteration, and of the images between them."""
    steps = sampling_steps(config, problem.model.process, explore=False)
    check.check_noise(config, steps)
    programs = make_programs(config, problem)
    frozen, trained = on_devices(frozen_params(problem)), abstract_lora(config, problem)
    state = on_devices(jax.eval_shape(programs.algorithm.init, trained))
    batch, key = draw_batch(config, problem, 0, None), parallel.replicate(jax.random.key(0))
    samples = None
    if programs.sample:
        yield Program("sample", programs.sample, (state, frozen, batch, steps))
        samples = jax.eval_shape(programs.sample, state, frozen, batch, steps)
    yield Program("update", programs.update, (state, frozen, batch, steps, key, samples))
    if config.eval.every or (config.log.images and config.log.images_every):
        yield Program("evaluate", programs.generate, (frozen, on_devices(trained), batch.context, batch.key, steps))


def cost_of(name: str, function: Any, args: tuple[Any, ...]) -> Cost:
    """Traces and compiles a program for these arguments or shapes of them."""
    start = time.perf_counter()
    work = flops.of(function, *args)
    options = _CPU_OPTIONS if backend.platform() == "cpu" else {}
    memory = function.lower(*args).compile(compiler_options=options).memory_analysis()
    return Cost(
        name,
        work,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


# -------------------------------------------------------------------------------------------------------------- report


def describe(config: ConfigDict, problem: Problem) -> list[str]:
    """Lines that need no compilation."""
    model, options = problem.model, model_options(config)
    chunks, per_forward = check.batch_split(config)
    method, settings = METHODS[config.algorithm], check.method_settings(config)
    updates = method.updates(settings)
    devices, samples = jax.device_count(), config.batch.samples
    height, width, channels = model.latent_shape
    parts = {part: stable_diffusion.count(tree) for part, tree in model.params.items()}
    parts |= {f"reward {name}": stable_diffusion.count(reward.params) for name, reward in problem.rewards.items()}
    trained = stable_diffusion.count(abstract_lora(config, problem))
    evaluations = samples * config.sampling.steps * 2
    passes = method.passes(settings, is_full_float32(config.model.matmul_precision, options["dtype"]))
    return [
        f"dry run of {config.algorithm} on {config.model.path}: shapes and programs, no weights; nothing is written",
        f"latents     {height} x {width} x {channels}, networks in {options['dtype']}, "
        f"remat {config.model.remat}, VAE slices of {config.model.vae_slice}",
        *(f"parameters  {n:>15,}  {part}" for part, n in parts.items()),
        f"LoRA        {trained:>15,}  float32, rank {config.lora.rank}, and twice that in AdamW",
        f"batch       {samples} samples = {devices} devices x {chunks} chunks x {per_forward} samples per forward pass"
        f" ({chunks // updates} chunks to each of {updates} updates)",
        f"iteration   {samples} reward queries, UNet evaluations: "
        + ", ".join(f"{evaluations:,} {why}" for why in passes),
    ]


def conclude(config: ConfigDict, costs: list[Cost]) -> list[str]:
    work = sum(cost.flops for cost in costs if cost.name != "evaluate") * jax.device_count()
    peak, platform = max(costs, key=lambda cost: cost.peak), backend.platform()
    size = f"{peak.peak / GIB:.2f} GiB a device"
    lines = [
        f"FLOPs an iteration (all devices): {work:.4g}: matrix products and convolutions of the traced programs, two a "
        "multiply-add, loops by their length, of branches the dearer one"
        + (" (all steps live)" if METHODS[config.algorithm].needs.reward_gradient else ""),
        f"largest: {size} in {peak.name}, by XLA's memory analysis for the backend {platform!r}",
    ]
    if platform == "cpu":
        lines.append("a GPU or a TPU fuses and pads otherwise, and attends by other kernels: this is CPU's number")
    return lines
