"""What benchmark.py times: the cases' work by a run's own programs, in a process that answers line by line."""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffexp_jax import backend, parallel
from diffexp_jax.algorithms import Inputs, alignprop
from diffexp_jax.cost import flops
from diffexp_jax.cost.random_weights import peak_memory, random_weights
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.programs import make_programs
from diffexp_jax.rewards import load_reward
from diffexp_jax.settings import Settings, changed, checked, cpu_devices

HERE = Path(__file__).resolve().parent


class Size(NamedTuple):
    """How much work a repetition is, on all devices of a CPU or on each accelerator."""

    samples: int
    steps: int
    per_forward: int  # samples at once
    remat: str = "step"  # see configs/base.py
    live: int = 0  # K of AlignProp; 0: the case's own


SIZES = {"emoji": Size(64, 20, 32), "mid": Size(4, 5, 4), "mid_sd3": Size(4, 5, 4)}
SIZES |= {"sd15": Size(16, 50, 8), "sdxl": Size(4, 20, 4, "block"), "sd35m": Size(4, 10, 4, "block")}
PUBLISHED = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35m": "stabilityai/stable-diffusion-3.5-medium",
}
FLOW = ("mid_sd3", "sd35m")  # models of flow matching

T_THRESH = 600  # of DiffExp's schedule: guidance is 1 in four steps of ten

# name: (method, what it changes, whether exploration's schedule is on)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "sampling": ("alignprop", {}, False),
    "DDPO, two updates": ("ddpo", {"ddpo.updates": 2}, False),
    "DDPO, one update": ("ddpo", {"ddpo.updates": 1}, False),
    "DDPO, one update, DiffExp's schedule": ("ddpo", {"ddpo.updates": 1, "exploration.t_thresh": T_THRESH}, True),
    "AlignProp, K = T": ("alignprop", {"alignprop.truncation": "fixed"}, False),
    "AlignProp, K = T/4": ("alignprop", {"alignprop.truncation": "fixed"}, False),
    "AlignProp, uniform K": ("alignprop", {"alignprop.truncation": "uniform"}, False),
}
SCORING = ("scoring", "scoring, with its gradient")  # by the emoji world's CLIP, of images of its size
N_SCORED, SCORED_PROMPT = 256, "a dog riding a bike"  # images, and what each is scored with


def brightness(images):
    """The reward, [B,H,W,3] -> [B]."""
    return images.mean((1, 2, 3))


def update_key(repetition: int) -> jax.Array:
    """What an update draws K from."""
    return jax.random.fold_in(jax.random.key(0), repetition)


def most_live_steps(case: str, n_steps: int) -> int:
    """K of the case, or the largest that it draws."""
    return n_steps // 4 if case.endswith("T/4") else n_steps


def live_steps(case: str, n_steps: int, repetition: int = 0) -> int:
    """K of the case; "uniform K" draws one for each repetition, the same on both sides. Uses a device."""
    if case.endswith("uniform K"):
        return int(alignprop.live_steps(update_key(repetition), n_steps, truncation="uniform", k=1).sum())
    return most_live_steps(case, n_steps)


# ---------------------------------------------------------------------------------------------------------------- ours


def eta_of(model: str, method: str) -> float:
    """The noise of the steps: DDPM's, Flow-GRPO's, or none."""
    if method != "ddpo":
        return 0.0
    return 0.7 if model in FLOW else 1.0


def configure(model: str, folder: str, case: str, size: Size) -> Settings:
    """A run's settings that do the case's work, on this machine's devices, which it sets up."""
    method, changes, explore = CASES[case]
    path = "emoji" if model == "emoji" else PUBLISHED.get(model, folder)
    settings = changed(
        Settings(),
        {
            "algorithm": method,
            "prompts": str(Path(folder, "prompts.txt")),
            "reward": "jax:benchmark_work:brightness",
            "model.path": path,
            "model.remat": size.remat,
            "model.vae_slice": 32 if model not in PUBLISHED else size.per_forward,
            "batch.samples": size.samples,
            "batch.samples_per_forward": size.per_forward,
            "sampling.steps": size.steps,
            "sampling.eta": eta_of(model, method),
            "exploration.enabled": explore,
            "eval.every": 0,
            "log.images_every": 0,
            "alignprop.truncation_k": size.live or most_live_steps(case, size.steps),
        }
        | changes,
    )
    backend.set_cpu_devices(cpu_devices(settings))
    if backend.platform() == "cpu":  # its devices share the work; each accelerator does all of it
        settings = changed(settings, {"batch.samples_per_forward": size.per_forward // jax.device_count()})
    else:
        settings = changed(settings, {"batch.samples": size.samples * jax.device_count()})
    return checked(settings)


def our_work(model: str, folder: str, case: str, size: Size) -> tuple[Callable[[int], Any], float]:
    """A function that does a repetition of the case by a run's own programs, and its floating-point operations."""
    if case in SCORING:
        return our_scoring(case)
    sys.path.insert(0, str(HERE))  # of the reward
    experiment = Experiment.build(configure(model, folder, case, size), weights=model not in PUBLISHED)
    programs, n = make_programs(experiment), jax.device_count()
    if model in PUBLISHED:
        frozen = random_weights(experiment.frozen)
        lora = init_lora(jax.random.key(0), experiment.sampler.pipeline.base, rank=experiment.settings.lora.rank)
    else:
        frozen, lora = parallel.share(experiment.frozen), experiment.initial_lora()
    steps = experiment.sampler.steps(explore=CASES[case][2])
    generate, steps = programs.generate(np.asarray(steps.w_t)), parallel.replicate(steps)
    batch = experiment.draw_batch(0, None)
    if case.startswith("sampling"):
        args = frozen.model, parallel.replicate(lora), batch.context, batch.key, steps
        return lambda repetition: generate(*args), n * flops.of(generate, *args)
    state = [parallel.replicate(jax.device_get(programs.algorithm.init(lora)))]

    def iterate(repetition):
        samples = programs.sample(state[0], frozen, batch, steps) if programs.sample else None
        key = parallel.replicate(update_key(repetition))
        state[0], metrics = programs.update(state[0], frozen, Inputs(batch, steps, key, samples))
        return metrics

    samples = jax.eval_shape(programs.sample, state[0], frozen, batch, steps) if programs.sample else None
    work = flops.of(programs.update, state[0], frozen, Inputs(batch, steps, parallel.replicate(update_key(0)), samples))
    if programs.sample:
        work += flops.of(programs.sample, state[0], frozen, batch, steps)
    return iterate, n * work


def our_scoring(case: str) -> tuple[Callable[[int], Any], float]:
    """Scoring by a reward in the program: scores, or their sum's gradient by the images; and its FLOPs."""
    backend.set_cpu_devices(len(os.sched_getaffinity(0)) if backend.platform() == "cpu" else 1)
    reward, n = load_reward("emoji_pickscore"), N_SCORED // jax.device_count()
    images, texts = scored_images(), [SCORED_PROMPT] * N_SCORED
    images, tokens = parallel.shard((images, reward.tokenize(texts)), n * jax.device_count())

    def scores(params, images, tokens):
        return reward.score(params, images, tokens)[0]

    def gradient(params, images, tokens):
        return jax.grad(lambda images: scores(params, images, tokens).sum())(images)

    program = parallel.pmap(gradient if "gradient" in case else scores)
    args = parallel.share(reward.params), images, tokens
    return lambda repetition: program(*args), jax.device_count() * flops.of(program, *args)


def scored_images() -> np.ndarray:
    """[N,64,64,3] in [0,1]."""
    return np.random.default_rng(0).random((N_SCORED, 64, 64, 3), np.float32)


def matrix_peak() -> float:
    """FLOP/s of a matrix product, the best of some: float32 with all cores of a CPU, bfloat16 on an accelerator."""
    n, dtype, best = (2048, jnp.float32, 0.0) if backend.platform() == "cpu" else (8192, jnp.bfloat16, 0.0)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


# -------------------------------------------------------------------------------------------------------------- worker


def peak_of_process() -> int:
    """Bytes that this program has held. getrusage's figure is at least what its parent had held when it began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


def worker(side: str, model: str, folder: str, case: str, size: Size) -> None:
    """Does the case once for each line on stdin, and answers with the seconds; at the end, with its peak memory.

    A line that names a folder: jax's profile of that repetition is written there.
    """
    if side == "ours":
        work, operations = our_work(model, folder, case, size)
        run, device_peak = (lambda repetition: jax.block_until_ready(work(repetition))), peak_memory
    elif side == "trl":
        import trl_peer

        run, operations = trl_peer.make_work(model, folder, case, size, live_steps), 0.0
        device_peak = trl_peer.peak_memory
    else:
        import torch_peer

        if case in SCORING:
            run = torch_peer.make_scoring(scored_images(), SCORED_PROMPT, gradient="gradient" in case)
        else:
            method, _, explore = CASES[case]
            numbers = {"eta": eta_of(model, method), "t_thresh": T_THRESH if explore else 1000}
            run = torch_peer.make_work(model, folder, case, size, live_steps, PUBLISHED, **numbers)
        operations, device_peak = 0.0, torch_peer.peak_memory
    print(json.dumps({"ready": True, "flops": operations}), flush=True)
    for repetition, line in enumerate(sys.stdin):
        with jax.profiler.trace(line.strip()) if line.strip() else contextlib.nullcontext():
            start = time.perf_counter()
            run(repetition)
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds}), flush=True)
    peak = device_peak() or peak_of_process()
    print(json.dumps({"peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("side", "model", "folder", "case"):
        parser.add_argument(name)
    numbers = ("samples", "steps", "live", "per_forward")  # of Size
    for name in numbers:
        parser.add_argument(f"--{name}", type=int)
    args = vars(parser.parse_args())
    changes = {name: x for name in numbers if (x := args.pop(name)) is not None}
    size = SIZES[args["model"]]._replace(**changes)
    worker(**args, size=size._replace(per_forward=min(size.per_forward, size.samples)))
