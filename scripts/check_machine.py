"""Says whether this machine is ready: what it has, whether it computes what it should, whether training learns on it.

    python scripts/check_machine.py --out check_machine.json     # minutes, on a CPU, a GPU or a TPU
    python scripts/check_machine.py --full                       # and SD 1.5 and SDXL at real size, random weights

It prints a row for each check, with what to do below one that failed, and writes all of it as JSON. The exit code is 1
if any failed. Results are compared with those of a CPU in float32, which are stored beside this file; they are made
anew by `JAX_PLATFORMS=cpu python scripts/check_machine.py --write_reference`. Random numbers come from numpy's
RandomState, whose streams numpy has frozen (those of its newer generators it has not), and from jax.random, which is
the same on every device.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from random_weights import peak_memory, random_weights
from tqdm import tqdm

from diffexp_jax import InputError, backend, command, dry_run, parallel
from diffexp_jax.algorithms import Batch, Inputs
from diffexp_jax.experiment import Experiment
from diffexp_jax.models import attention
from diffexp_jax.models.lora import init_lora
from diffexp_jax.models.precision import in_precision
from diffexp_jax.pipelines import Pipeline, families, make_context, sizes, stable_diffusion
from diffexp_jax.programs import Programs, make_programs
from diffexp_jax.sampler import model_dtype
from diffexp_jax.sampling import initial_latents, rollout

GIB = dry_run.GIB
ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).with_suffix(".npz")


class Outcome(NamedTuple):
    """What a check found, and what is wanted. `ok` None: there was nothing to check here."""

    found: str
    wanted: str = ""
    ok: bool | None = True
    advice: str = ""  # what to do where it is not ok
    numbers: Any = None  # what was found, for the JSON file


class Check(NamedTuple):
    name: str
    run: Callable[[], Outcome]


CUDNN = "cuDNN: reinstall jax's CUDA build, which brings its own, and unset LD_LIBRARY_PATH"
# What to do about an exception: of the first pattern that its text has.
ADVICE = {
    "RESOURCE_EXHAUSTED|[Oo]ut of memory": "out of memory: lower batch.samples_per_forward or set model.remat=block; "
    "nvidia-smi says whether another program holds the device's memory",
    "(?i)cudnn": CUDNN,
    "(?i)ptxas|nvlink|cuda|nccl": "CUDA: jax[cuda13] wants NVIDIA driver 580 or newer, jax[cuda12] 525; see nvidia-smi",
    "No module named": "run it from a checkout with requirements.txt installed, configs/ beside scripts/",
}
IN_FULL = "float32 products are not in full: set --config.model.matmul_precision=float32; unset NVIDIA_TF32_OVERRIDE"
HALF = "{} goes wrong here: if float32 is ok, set --config.model.dtype=float32, and report it with the JSON file"


def run_check(chosen: Check) -> dict[str, Any]:
    """The check's row. Whatever it raises is a finding too, so that the other checks still run."""
    start, error = time.perf_counter(), {}
    try:
        outcome = chosen.run()
    except Exception as raised:
        first = (str(raised).strip().splitlines() or [""])[0][:200]
        unknown = "not a known problem: report it with the JSON file, which holds the whole error"
        advice = next((what for pattern, what in ADVICE.items() if re.search(pattern, str(raised))), unknown)
        outcome, error = Outcome(f"{type(raised).__name__}: {first}", "no error", False, advice), traceback.format_exc()
        error = {"error": error}
    status = {True: "ok", False: "FAILED", None: "skipped"}[outcome.ok]
    return {"check": chosen.name, **outcome._asdict(), "status": status, "seconds": time.perf_counter() - start} | error


def table_row(name: str, found: str, wanted: str, status: str, seconds: str) -> str:
    return f"{name:42}  {found:38}  {wanted:28}  {status:7} {seconds:>7}"


def show(row: dict[str, Any]) -> None:
    line = table_row(row["check"], row["found"], row["wanted"], row["status"], f"{row['seconds']:.1f} s")
    advice = f"\n    what to do: {row['advice']}" if row["status"] == "FAILED" else ""
    tqdm.write(line + advice, file=sys.stdout)
    sys.stdout.flush()


def relative_error(ours: Any, exact: Any, *, centred: bool = False) -> float:
    """|ours - exact| / |exact|, or / |exact - its mean|. A NaN is infinitely far away."""
    ours, exact = (np.asarray(x).astype(np.float64) for x in (ours, exact))
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact - (exact.mean() if centred else 0.0))
    return float(error) if np.isfinite(error) else float("inf")


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- the machine

PLUGINS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt")


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cudnn_version() -> int | None:
    """91002 for 9.10.2; None where there is none."""
    try:
        from jax._src.lib import cuda_versions  # there is no public name

        return cuda_versions.cudnn_get_version()
    except Exception:  # no CUDA build
        return None


def machine() -> dict[str, Any]:
    device, packages = jax.local_devices()[0], ("jax", "jaxlib", *PLUGINS, "libtpu", "flax", "optax", "numpy")
    return {
        "platform": backend.platform(),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "compute_capability": backend.cuda_capability(),
        "cudnn": cudnn_version(),
        "platform_version": " ".join(device.client.platform_version.split()),  # with CUDA's and the driver's
        "memory": device.memory_stats(),
        "cpu_cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": {name: found for name in packages if (found := version_of(name))},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "environment": {name: x for name, x in os.environ.items() if name.startswith(("JAX_", "XLA_", "NVIDIA_TF32"))},
    }


def check_devices() -> Outcome:
    """Fails where there is an accelerator that jax does not use, though nobody asked it not to."""
    here = machine()
    found, memory = f"{here['devices']} x {here['device_kind']}", (here["memory"] or {}).get("bytes_limit")
    if here["platform"] == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for place, name, build in (("/dev/nvidia0", "the NVIDIA GPU", "cuda13"), ("/dev/accel0", "the TPU", "tpu")):
            if Path(place).exists():
                advice = (
                    f'install jax\'s {build} build of the same version: pip install "jax[{build}]=={jax.__version__}"'
                )
                return Outcome(found, f"{name} ({place})", False, advice)
    return Outcome(found + (f", {memory / GIB:.0f} GiB each" if memory else ""), "all that are there")


def check_versions() -> Outcome:
    """jaxlib and the plugins are made for one version of jax."""
    versions = machine()["versions"]
    others = {name: x for name, x in versions.items() if name in ("jaxlib", *PLUGINS) and x != versions["jax"]}
    shown = {name: versions[name] for name in ("jax", "flax", "optax")} | others
    advice = "install " + " ".join(f"{name}=={versions['jax']}" for name in others)
    found = ", ".join(f"{name} {x}" for name, x in shown.items())
    return Outcome(found, "jaxlib and plugins as jax", not others, advice)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def float32_error(setting: str) -> float:
    """The larger of the errors of a matrix product and of a 3x3 convolution, from float64's."""
    a, b, x, kernel = draw(0, (512, 512)), draw(1, (512, 512)), draw(2, (1, 34, 34, 32)), draw(3, (3, 3, 32, 32))

    def both(kernel, a, b, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return a @ b, jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)

    product, convolved = jax.jit(in_precision(both, "float32", setting))(kernel, a, b, x)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), (1, 2))  # [B, H, W, C, 3, 3]
    exact = np.einsum("bhwcij,ijcd->bhwd", windows, kernel)
    return max(relative_error(product, a.astype(np.float64) @ b), relative_error(convolved, exact))


def check_full_products() -> Outcome:
    error = float32_error("auto")
    return Outcome(f"error {error:.1e}", "at most 1e-6", error <= 1e-6, IN_FULL, error)


def check_default_products() -> Outcome:
    error = float32_error("default")
    kind = "in full" if error <= 1e-6 else "TF32, or passes of bfloat16"
    return Outcome(f"error {error:.1e}: {kind}", "(to know)", numbers=error)


ATTENTIONS = {  # queries, keys, heads, width of a head
    "SD 1.5, 4096 to 4096": (4096, 4096, 8, 40),
    "SD 1.5, 1024 to 1024": (1024, 1024, 8, 80),
    "SD 1.5, 4096 to 77": (4096, 77, 8, 40),
    "SDXL, 4096 to 4096": (4096, 4096, 10, 64),
    "SDXL, 1024 to 1024": (1024, 1024, 20, 64),
    "SDXL, 4096 to 77": (4096, 77, 10, 64),
    "VAE, 4096 to 4096": (4096, 4096, 1, 512),
    "CLIP, 257 to 257": (257, 257, 16, 64),
}
ATTENTION_ERROR = 0.015  # in bfloat16; that of jax's plain product is 0.0024 for each of these shapes


def check_attention(n_queries: int, n_keys: int, heads: int, width: int) -> Outcome:
    """Which way `attention.attention` goes here in bfloat16; where that is cuDNN's kernel, what comes of it."""
    logits = n_queries * n_keys
    if not (logits >= attention.MIN_FUSED_LOGITS and attention.has_fused_attention(jnp.bfloat16, width)):
        path = "blocks of queries" if logits > attention.MAX_LOGITS else "plain product"
        why = "meant for this shape" if attention.has_fused_attention(jnp.bfloat16, 64) else "no cuDNN here"
        return Outcome(f"{path}: {why}", ok=None)
    error, program = attention_error(partial(attention.attention, heads=heads), n_queries, n_keys, heads, width)
    fused = "fmhaSoftmaxBackward" in program
    found = f"{'cuDNN' if fused else 'no cuDNN in the program'}, error {error:.1e}"
    wanted = f"cuDNN, error at most {ATTENTION_ERROR}"
    return Outcome(found, wanted, fused and error <= ATTENTION_ERROR, CUDNN, error)


def attention_error(attend: Callable, n_queries: int, n_keys: int, heads: int, width: int) -> tuple[float, str]:
    """The largest of the errors of attend(q, k, v) in bfloat16 and of its three gradients; the compiled program's text.

    From jax's plain attention in float32, in full, on this device.
    """
    # queries and keys lean apart: a key of zeros that fills up an odd length would weigh a lot if it were not masked
    lengths_and_means = ((n_queries, 0.0), (n_queries, 0.6), (n_keys, -0.6), (n_keys, 0.0))
    draws = [mean + draw(i, (1, n, heads * width)) for i, (n, mean) in enumerate(lengths_and_means)]
    args = [jnp.asarray(x, jnp.bfloat16) for x in draws]  # the output's gradient, then queries, keys, values

    def plain(*qkv):
        with jax.default_matmul_precision("float32"):
            out = jax.nn.dot_product_attention(*(x.reshape(*x.shape[:2], heads, width) for x in qkv))
        return out.reshape(1, n_queries, -1)

    def with_gradients(function, slope, *qkv):
        out, pull_back = jax.vjp(function, *qkv)
        return out, *pull_back(slope)

    program = jax.jit(partial(with_gradients, attend)).lower(*args).compile()
    exact = jax.jit(partial(with_gradients, plain))(*(x.astype(jnp.float32) for x in args))
    return max(map(relative_error, program(*args), exact)), program.as_text()


# ------------------------------------------------------------------------------------------- stored results of float32

# The largest errors of images and latents (relative to their spread), and of AlignProp's gradient (to its length). On a
# CPU they are 0.034 and 0.12 to 0.35 in bfloat16, 0.0043 and 0.048 in float16: a half to a third of these. A gradient
# of attention that is rounded on its way is 1 to 2 away.
TOLERANCES = {"float32": (1e-3, 1e-3), "bfloat16": (0.1, 0.7), "float16": (0.015, 0.15)}
ON_A_CPU = (1e-4, 1e-4)  # float32's there


def tolerances(dtype: str) -> tuple[float, float]:
    return ON_A_CPU if dtype == "float32" and backend.platform() == "cpu" else TOLERANCES[dtype]


def check_parity(compute: Callable[[], dict[str, np.ndarray]], reference: dict[str, np.ndarray], dtype: str) -> Outcome:
    """Images and latents against the stored ones of the same names."""
    errors = {name: relative_error(x, reference[name], centred=True) for name, x in compute().items()}
    error, most = max(errors.values()), tolerances(dtype)[0]
    advice = IN_FULL if dtype == "float32" else HALF.format(dtype)
    return Outcome(f"error {error:.1e}", f"at most {most:g}", error <= most, advice, errors)


def check_gradient(reference: dict[str, np.ndarray], dtype: str) -> Outcome:
    ours, exact = (np.asarray(x, np.float64) for x in (emoji_results(dtype)[1], reference["emoji/gradient"]))
    error, most = relative_error(ours, exact), tolerances(dtype)[1]
    cosine = float(ours @ exact / max(np.linalg.norm(ours) * np.linalg.norm(exact), 1e-30))
    found, advice = f"error {error:.1e}, cosine {cosine:.4f}", IN_FULL if dtype == "float32" else HALF.format(dtype)
    return Outcome(found, f"error at most {most:g}", error <= most, advice, {"error": error, "cosine": cosine})


# As published, but narrow and of fewer layers. Lengths (4096 pixels, 77 tokens) and kinds of blocks are real, so
# that 16 bits go the real way on a GPU.
SD15, _, SDXL = sizes.PIPELINES
UNET = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
TINY = {
    "SD 1.5": (
        SD15,
        UNET | {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 16},
    ),
    "SDXL": (
        SDXL,
        UNET
        | {"block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4], "cross_attention_dim": 32}
        | {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8},
    ),
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 1000, "projection_dim": 16}
PARTS = {"vae": {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}}
PARTS |= {"text_encoder": TEXT, "text_encoder_2": TEXT}


def tiny_model(name: str, dtype: str) -> tuple[Pipeline, int]:
    """A small pipeline of the family, of random weights that keep activations in size; its number of text encoders."""
    path, unet = TINY[name]
    index, parts = sizes.PIPELINES[path]
    changes = PARTS | {"unet": unet}
    config = families.model_config(index, {part: own | changes.get(part, {}) for part, own in parts.items()})
    numbers = np.random.RandomState(0)

    def weights(path, leaf):
        x, kind = numbers.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if kind == "kernel":
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            x = {"scale": 1 + 0.1 * x, "bias": 0.1 * x}.get(kind, 0.5 * x)
        return x.astype(config.dtype(path[0].key, dtype))

    params = jax.tree_util.tree_map_with_path(weights, stable_diffusion.abstract_params(config))
    return stable_diffusion.build(config, dtype=dtype)._replace(params=params), len(config.text)


def tiny_results(name: str, dtype: str, n_steps: int = 2) -> dict[str, np.ndarray]:
    """Some of the latents and pixels of one prompt's image; the whole pipeline, from token ids on."""
    model, n_encoders = tiny_model(name, dtype)
    ids = np.random.RandomState(1).randint(0, TEXT["vocab_size"], (n_encoders, 2, 77)).astype(np.int32)
    t = model.process.timesteps(n_steps)
    steps = model.process.make_steps(t, np.full(n_steps, 5.0, np.float32), eta=0.0)

    @jax.jit
    def sample(params, x_T, context, steps, keys):
        x_0, _ = rollout(model.process, model.denoiser(params, None), x_T, context, steps, keys)
        return {f"{name}/latents": x_0[:, ::2, ::2], f"{name}/images": model.decode(params, x_0)[:, ::16, ::16]}

    rows = jax.device_get(jax.jit(model.encode)(model.params, ids))
    cond, empty = jax.tree.map(lambda x: x[:1], rows), jax.tree.map(lambda x: x[1], rows)
    context = make_context(cond, model.unconditional(empty))
    keys = parallel.sample_keys(jax.random.key(0), 1)  # of no noise, as eta is 0
    return jax.device_get(sample(model.params, draw(2, (1, *model.latent_shape)), context, steps, keys))


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
METHODS = {
    "alignprop": {"prompts": "animals_unseen_with_article", "optim.lr": 1e-2, "optim.weight_decay": 0.0}
    | {"alignprop.truncation": "fixed", "alignprop.truncation_k": STEPS},
    "ddpo": {"prompts": "prompt:a cat", "optim.lr": 5e-3, "optim.weight_decay": 0.0, "ddpo.clip": 0.1},
}
# Iterations, and batches of noise that are not trained on. On a CPU they raise brightness by 0.05 +- 0.006 and 0.013 +-
# 0.001; in bfloat16, as an accelerator runs them, by 0.02 +- 0.002 and 0.018 +- 0.001.
LEARNING = {"alignprop": (4, 1), "ddpo": (12, 4)}


def brightness(images):
    """The reward, [B,H,W,3] -> [B]."""
    return images.mean((1, 2, 3))


def settings(method: str, argument: str, changes: dict[str, Any]):
    """A config of configs/, with changes."""
    for folder in (ROOT, REFERENCE.parent):  # where configs/ is, and the reward above
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    config = importlib.import_module(f"configs.{method}").get_config(argument)
    config.update_from_flattened_dict(changes)
    return config


class Run(NamedTuple):
    """A run's programs, and what they are called with; see `train.run`."""

    config: Any
    experiment: Experiment
    programs: Programs
    frozen: Any
    steps: Any
    generate: Any = None

    def start(self, lora: Any = None) -> Any:
        """The first state, on the devices."""
        fresh = init_lora(jax.random.key(0), self.experiment.sampler.pipeline.base, rank=self.config.lora.rank)
        return parallel.replicate(jax.device_get(self.programs.algorithm.init(fresh if lora is None else lora)))

    def random_lora(self) -> Any:
        """One that changes something, and every part of which has a gradient."""
        base, rank = self.experiment.sampler.pipeline.base, self.config.lora.rank
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: init_lora(jax.random.key(0), base, rank=rank)))
        return structure.unflatten([0.1 * draw(i, leaf.shape) for i, leaf in enumerate(leaves)])

    def batch(self, it: int) -> Batch:
        """SAMPLES samples, the same on each device."""
        rows = np.arange(self.config.batch.samples) % SAMPLES
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
        """Of the batch's prompts and noise, [SAMPLES,H,W,3] in [0,1]."""
        images = self.generate(self.frozen["model"], state.lora, batch.context, batch.key, self.steps)
        return parallel.unshard(images)[:SAMPLES]

    def brightness(self, state: Any, n_batches: int) -> np.ndarray:
        """Of the images of noise that is not trained on."""
        images = [self.images(state, self.batch(it)) for it in range(1000, 1000 + n_batches)]
        return brightness(np.concatenate(images).astype(np.float64))


def make_float_images(experiment: Experiment) -> Callable[..., jax.Array]:
    """`Programs.generate` without rounding to bytes."""
    pipeline, scale = experiment.sampler.pipeline, experiment.lora_scale

    def generate(params, lora, context, keys, steps):
        x_T, denoise = initial_latents(keys, pipeline.latent_shape), pipeline.denoiser(params, lora, lora_scale=scale)
        x_0, _ = rollout(pipeline.process, denoise, x_T, context, steps, keys)
        return pipeline.decode(params, x_0).clip(0.0, 1.0)

    return parallel.pmap(generate)


@functools.cache
def emoji_run(method: str, dtype: str, old_log_prob: str) -> Run:
    changes = SETTINGS | METHODS[method] | {"model.dtype": dtype, "ddpo.old_log_prob": old_log_prob}
    config = settings(method, "model=emoji,explore=false", changes | {"batch.samples": SAMPLES * jax.device_count()})
    experiment = Experiment.build(config)
    frozen = parallel.share(experiment.frozen)
    steps = parallel.replicate(experiment.sampler.steps(explore=False))
    return Run(config, experiment, make_programs(experiment), frozen, steps, make_float_images(experiment))


@functools.cache
def emoji_results(dtype: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of AlignProp's update, from a LoRA of random numbers: some pixels of its images, and its gradient."""
    run = emoji_run("alignprop", dtype, "recomputed")
    state, batch = run.start(run.random_lora()), run.batch(0)
    images = run.images(state, batch)
    state, _ = run.iterate(state, batch)
    adams_mean = optax.tree.get(parallel.first(state.opt_state), "mu")
    gradient = np.concatenate([np.ravel(x) for x in jax.tree.leaves(adams_mean)]) / (1.0 - run.config.optim.b1)
    return {"emoji/images": images[:, ::4, ::4]}, gradient


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
    dtype = str(model_dtype(settings(method, "model=emoji", {})))
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
    before, experiment, plans = peak_memory(), Experiment.build(config, weights=False), []
    programs = make_programs(experiment)
    sample = programs.sample and compiled_once(programs.sample, plans)
    programs = programs._replace(sample=sample, update=compiled_once(programs.update, plans))
    steps = parallel.replicate(experiment.sampler.steps(explore=False))
    run = Run(config, experiment, programs, random_weights(experiment.frozen), steps)
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


# -------------------------------------------------------------------------------------------------------- command line


def all_checks(reference: dict[str, np.ndarray], *, full: bool) -> list[Check]:
    half = ("bfloat16", "float16") if backend.platform() == "gpu" else ("bfloat16",)
    tiny = ("float32",) if backend.platform() == "cpu" else ("float32", *half)
    checks = [Check("devices", check_devices), Check("versions", check_versions)]
    checks.append(Check("float32 products, as the package asks", check_full_products))
    checks.append(Check("float32 products, by default", check_default_products))
    for name, shape in ATTENTIONS.items():
        checks.append(Check(f"attention, {name}", partial(check_attention, *shape)))
    for name in TINY:
        for dtype in tiny:
            compute = partial(tiny_results, name, dtype)
            checks.append(Check(f"tiny {name}, {dtype}", partial(check_parity, compute, reference, dtype)))
    for dtype in ("float32", *half):
        compute = lambda dtype=dtype: emoji_results(dtype)[0]  # noqa: E731
        checks.append(Check(f"emoji model's images, {dtype}", partial(check_parity, compute, reference, dtype)))
        checks.append(Check(f"AlignProp's gradient, {dtype}", partial(check_gradient, reference, dtype)))
    for dtype in ("float32", "bfloat16"):
        checks.append(Check(f"DDPO's ratio before an update, {dtype}", partial(check_ratio, dtype)))
    for method, numbers in LEARNING.items():
        name = f"{numbers[0]} iterations of {method} raise brightness"
        checks.append(Check(name, partial(check_learning, method, *numbers)))
    for model in ("sd15", "sdxl") if full else ():
        for method in LEARNING:
            checks.append(Check(f"{model} by {method} at real size", partial(check_full_size, model, method)))
    return checks


def write_reference() -> None:
    if backend.platform() != "cpu":
        raise InputError("--write_reference: wants a CPU, whose float32 is the reference: JAX_PLATFORMS=cpu")
    images, gradient = emoji_results("float32")
    arrays = images | {"emoji/gradient": gradient} | tiny_results("SD 1.5", "float32") | tiny_results("SDXL", "float32")
    np.savez_compressed(REFERENCE, **{name: np.asarray(x, np.float32) for name, x in arrays.items()})
    print(f"written: {REFERENCE}, {REFERENCE.stat().st_size / 1000:.0f} kB")


def main(args: argparse.Namespace) -> None:
    if args.write_reference:
        return write_reference()
    command.check_writable(args.out.parent, "--out")
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: wants a regular expression ({error})") from None
    if not REFERENCE.is_file():
        raise InputError(f"{REFERENCE}: the file is missing; it belongs beside the script")
    start, rows = time.perf_counter(), []
    print(table_row("check", "found", "wanted", "", "seconds"), flush=True)
    with np.load(REFERENCE) as stored:
        checks = [each for each in all_checks(dict(stored), full=args.full) if re.search(args.only, each.name)]
        bar = tqdm(checks, unit="check", leave=False)
    for chosen in bar:
        bar.set_description(chosen.name)
        rows.append(run_check(chosen))
        show(rows[-1])
    if not rows:
        raise InputError(f"--only {args.only}: no check has such a name")
    failed, seconds = sum(row["status"] == "FAILED" for row in rows), time.perf_counter() - start
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"ready": not failed, "date": date, "command": " ".join(sys.argv), "seconds": seconds}
    report |= {"machine": machine(), "checks": rows}
    args.out.write_text(json.dumps(report, indent=2, default=float) + "\n")
    said = (
        f"not ready: {failed} of {len(rows)} checks failed" if failed else f"ready: none of {len(rows)} checks failed"
    )
    print(f"{said}; {seconds:.0f} s; all of it is in {args.out}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("check_machine.json"), help="the .json file to write")
    add("--full", action="store_true", help="also run SD 1.5 and SDXL at real size, on an accelerator")
    add("--only", default="", metavar="REGEX", help="run the checks alone whose names have such a part")
    add("--write_reference", action="store_true", help="make the stored float32 results anew, on a CPU")
    command.guarded(main, parser.parse_args())
