"""`--dry_run`: the size and the cost of a run, from shapes alone: no weights, no files of the model, no workdir.

It compiles the very programs that the run would (`programs.make_programs`) for this machine's devices. On CPU the
last stage of it (XLA's ExecutionGraph) seems quadratic in the kernels of a loop's body: seconds for SD 1.5, minutes for
the gradient of SDXL, several times that on a busy machine. So rows are printed as they are ready.
"""

import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from diffexp_jax import backend, parallel
from diffexp_jax.algorithms import Inputs, Method
from diffexp_jax.command import is_out_of_memory
from diffexp_jax.cost import flops
from diffexp_jax.cost.evaluations import evaluations_of
from diffexp_jax.experiment import Experiment
from diffexp_jax.programs import make_programs
from diffexp_jax.settings import Settings, check

GIB = 2**30
# XLA:CPU's default schedule goes for speed and holds everything: as XLA schedules for accelerators, it is for memory.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_backend_optimization_level": 0}


class Cost(NamedTuple):
    """What one program needs on one device; bytes by XLA's memory analysis."""

    name: str
    flops: float  # of an iteration
    arguments: int
    temporaries: int
    outputs: int  # less those that are written over arguments
    seconds: float  # to compile

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def dry_run(settings: Settings) -> None:
    """Prints what `train.run` would need for these settings.

    Raises:
      InputError: a setting that cannot work, or a model of unknown size.
    """
    check(settings)
    experiment = Experiment.build(settings, weights=False)
    print("\n".join(describe(experiment)), flush=True)
    costs = []
    print(
        f"{'program':10}{'arguments':>12}{'temporaries':>12}{'outputs':>10}{'together':>10}   GiB a device", flush=True
    )
    for program in programs_of(experiment):
        try:
            cost = cost_of(*program)
        except jax.errors.JaxRuntimeError as error:  # of a compiler that knows the device's memory
            print(f"{program.name:10}does not fit: {too_much(error)}", flush=True)
            continue
        columns = (cost.arguments, cost.temporaries, cost.outputs, cost.peak)
        numbers = "".join(f"{x / GIB:{width}.2f}" for x, width in zip(columns, (12, 12, 10, 10), strict=True))
        print(f"{cost.name:10}{numbers}   {cost.flops:.3g} FLOPs, compiled in {cost.seconds:.0f} s", flush=True)
        costs.append(cost)
    if costs:
        print("\n".join(conclude(settings.method, costs)))


# ------------------------------------------------------------------------------------------------------------ programs


class Program(NamedTuple):
    """One of a run's programs, mapped over the devices, and what it is called with: arrays, or shapes of them."""

    name: str
    function: Any
    args: tuple[Any, ...]
    calls: int = 1  # an iteration; where the host scores, it samples chunk by chunk


def programs_of(experiment: Experiment) -> Iterable[Program]:
    """The programs of a run: of an iteration, and of the images between them."""
    programs = make_programs(experiment)
    steps, key = parallel.replicate((experiment.sampler.steps(explore=False), jax.random.key(0)))
    frozen, lora = parallel.shapes_on_devices(experiment.frozen), experiment.lora_shapes()
    state = parallel.shapes_on_devices(jax.eval_shape(programs.algorithm.init, lora))
    batch, samples = experiment.draw_batch(0, None), None
    if programs.sample_chunk:
        n = experiment.split.per_forward
        chunk = jax.eval_shape(lambda batch: jax.tree.map(lambda x: x[:, :n], batch), batch)
        yield Program("sample", programs.sample_chunk, (state, frozen, chunk, steps), experiment.split.chunks)
        samples = jax.eval_shape(parallel.pmap(programs.algorithm.sample), state, frozen, batch, steps)
        samples = samples._replace(images=None)
    elif programs.sample:
        yield Program("sample", programs.sample, (state, frozen, batch, steps))
        samples = jax.eval_shape(programs.sample, state, frozen, batch, steps)
    yield Program("update", programs.update, (state, frozen, Inputs(batch, steps, key, samples)))
    log = experiment.settings.log
    if experiment.settings.eval.every or (log.images and log.images_every):
        sampler = experiment.sampler.evaluating(experiment.settings)
        steps = parallel.replicate(sampler.steps(explore=False))
        args = (frozen.model, parallel.shapes_on_devices(lora), batch.context, batch.key, steps)
        generate = programs.generate(sampler.guidance_scales(explore=False))
        yield Program("evaluate", generate, args)


def cost_of(name: str, function: Any, args: tuple[Any, ...], calls: int = 1) -> Cost:
    """Traces and compiles a program for these arguments or shapes of them."""
    start = time.perf_counter()
    work = calls * flops.of(function, *args)
    absent = backend.absent_devices()
    options = absent.compiler_options if absent else _CPU_OPTIONS if backend.platform() == "cpu" else {}
    memory = function.lower(*args).compile(compiler_options=options).memory_analysis()
    return Cost(
        name,
        work,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def too_much(error: jax.errors.JaxRuntimeError) -> str:
    """What a compiler says of a program that takes more memory than the device has.

    Raises:
      JaxRuntimeError: it says something else.
    """
    if not is_out_of_memory(error):
        raise error
    used = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", str(error))
    return f"{used[1]}iB of {used[2]}iB a device" if used else str(error).splitlines()[0][:200]


# -------------------------------------------------------------------------------------------------------------- report


def describe(experiment: Experiment) -> list[str]:
    """Lines that need no compilation."""
    settings, pipeline, split = experiment.settings, experiment.sampler.pipeline, experiment.split
    method, model = settings.method, settings.model
    height, width, channels = pipeline.latent_shape
    parts = {part: count(tree) for part, tree in pipeline.params.items()}
    parts |= {f"reward {name}": count(reward.params) for name, reward in experiment.rewards.items()}
    evaluated = split.samples * experiment.sampler.evaluations(explore=False)
    exploring = split.samples * experiment.sampler.evaluations(explore=experiment.sampler.exploration.enabled)
    passes = evaluations_of(settings, experiment.sampler.evaluations(explore=False))
    return [
        f"dry run of {method.name} on {model.path}: shapes and programs, no weights; nothing is written",
        f"latents     {height} x {width} x {channels}, networks in {settings.dtype}, "
        f"remat {model.remat}, VAE slices of {model.vae_slice}",
        *(f"parameters  {n:>15,}  {part}" for part, n in parts.items()),
        *(
            ["weights     shared out: each device holds a part of the network's large kernels"]
            * experiment.sampler.shards
        ),
        f"LoRA        {count(experiment.lora_shapes()):>15,}  float32, rank {settings.lora.rank}, and twice it in AdamW"
        + (", once as its moving average" if settings.optim.ema else ""),
        f"batch       {experiment.batch_in_words()}",
        f"iteration   {split.samples} reward queries, network evaluations: "
        + ", ".join(f"{round(split.samples * n):,} {why}" for why, n in passes.items())
        + (f"; {1 - exploring / evaluated:.0%} fewer while it explores" if exploring < evaluated else ""),
    ]


def count(params: Any) -> int:
    """Number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def conclude(method: Method, costs: list[Cost]) -> list[str]:
    work = sum(cost.flops for cost in costs if cost.name != "evaluate") * backend.device_count()
    peak, platform = max(costs, key=lambda cost: cost.peak), backend.platform()
    size = f"{peak.peak / GIB:.2f} GiB a device"
    lines = [
        f"FLOPs an iteration (all devices): {work:.4g}: matrix products and convolutions of the traced programs, two a "
        "multiply-add, loops by their length, of branches the dearer one"
        + (" (all steps live)" if method.needs.reward_gradient else ""),
        f"largest: {size} in {peak.name}, by XLA's memory analysis for the backend {platform!r}",
    ]
    if absent := backend.absent_devices():
        fits = "fits" if peak.peak <= absent.memory else "does not fit"
        lines.append(f"{fits}: {peak.peak / GIB:.2f} of {absent.memory / GIB:.2f} GiB; {absent.versions}")
    elif platform == "cpu":
        lines.append("a GPU or a TPU fuses and pads otherwise, and attends by other kernels: this is CPU's number")
    return lines
