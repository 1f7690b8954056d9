"""What scripts/check_machine.py asks of a machine itself: its devices and versions, products, attention's kernels."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffexp_jax import backend
from diffexp_jax.cost import dry_run
from diffexp_jax.models import attention
from diffexp_jax.models.precision import in_precision

GIB = dry_run.GIB


class Outcome(NamedTuple):
    """What a check found, and what is wanted. `ok` None: there was nothing to check here."""

    found: str
    wanted: str = ""
    ok: bool | None = True
    advice: str = ""  # what to do where it is not ok
    numbers: Any = None  # what was found, for the JSON file


CUDNN = "cuDNN: reinstall jax's CUDA build, which brings its own, and unset LD_LIBRARY_PATH"
IN_FULL = "float32 products are not in full: set --config.model.matmul_precision=float32; unset NVIDIA_TF32_OVERRIDE"
ON_THIS_CPU = (
    "if the rows of float32 products are ok, a CPU's float32 is exact: report it with the JSON file, which names the "
    "processor and the versions"
)
HALF = "{} goes wrong here: if float32 is ok, set --config.model.dtype=float32, and report it with the JSON file"


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
