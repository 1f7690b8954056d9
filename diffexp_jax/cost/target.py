"""Devices that are not there: programs are compiled for them on any machine, by their own compilers.

The compiler of TPUs is the package libtpu; that of NVIDIA GPUs is jax's CUDA plugin. Neither needs a device: jax makes
the devices of a topology, which programs can be compiled for, and which nothing can run on.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from diffexp_jax import backend
from diffexp_jax.errors import InputError
from diffexp_jax.limits import one_of

GIB = 2**30
_TPU_HOST = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
# what compiles alone holds no TPU: two may plan at once, and beside a run
_TPU_HOST |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Chips along the axes of a TPU's slices, from the smallest: a host has four chips
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
# Kernels are chosen by trying them on a card; without one XLA takes its own, and Triton's products cannot be tiled
_WITHOUT_CARD = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class TPU(NamedTuple):
    """A kind of TPU, by the name of its topologies."""

    slices: tuple[str, ...]
    memory: int  # bytes of a chip's HBM that a program may take


class GPU(NamedTuple):
    """An NVIDIA GPU as XLA's compiler asks for it: of the data sheets and of CUDA's device properties."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a core
    memory: int  # bytes
    bandwidth: int  # bytes a second
    l2: int  # bytes
    shared: int  # bytes of shared memory of a core
    shared_of_block: int  # bytes that a block may ask for
    clock: float  # GHz


_HOPPER = {"capability": (9, 0), "cores": 132, "fpus": 128, "l2": 52428800, "shared": 233472, "clock": 1.98}
_HOPPER |= {"shared_of_block": 232448}
_AMPERE = {"capability": (8, 0), "cores": 108, "fpus": 64, "l2": 41943040, "shared": 167936, "clock": 1.41}
_AMPERE |= {"shared_of_block": 166912}
KINDS: dict[str, TPU | GPU] = {
    "v5e": TPU(_FLAT, int(15.75 * GIB)),
    "v6e": TPU(_FLAT, int(31.25 * GIB)),
    "v5p": TPU(_CUBES, int(95.74 * GIB)),
    "a100": GPU("NVIDIA A100-SXM4-80GB", memory=85_098_233_856, bandwidth=2_039_000_000_000, **_AMPERE),
    "h100": GPU("NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000, **_HOPPER),
    "h200": GPU("NVIDIA H200", memory=150_754_820_096, bandwidth=4_800_000_000_000, **_HOPPER),
}
FORMS = f"{', '.join(KINDS)}, and a number of devices: v5e:4"


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[backend.Absent]:
    """Compiles programs for devices that are not there, for as long as the context lasts; arrays are shapes.

    Args:
      target: KIND or KIND:DEVICES, of `KINDS`.

    Raises:
      InputError: no such kind, not so many devices, or its compiler is not installed.
    """
    name, n = parsed(target)
    kind = KINDS[name]
    # the devices that there are have no part in it: a compiler that is installed must not look for its own
    jax.config.update("jax_platforms", "cpu")
    absent = _tpus(name, kind, n) if isinstance(kind, TPU) else _gpus(name, kind, n)
    with backend.absent(absent), _cudnn_of(absent.cuda_capability):
        yield absent


def parsed(target: str) -> tuple[str, int]:
    """(kind, devices) of "v5e:4" or "h100", which is one device.

    Raises:
      InputError: it is written otherwise.
    """
    name, colon, number = target.partition(":")
    one_of("--target", name, [*KINDS])
    if colon and not (number.isascii() and number.isdigit() and int(number)):
        raise InputError(f"--target {target}: wants {FORMS}")
    return name, int(number or 1)


def _tpus(name: str, kind: TPU, n: int) -> backend.Absent:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--target {name}: wants the TPUs' compiler, pip install libtpu (no TPU is needed)")
    for key, value in _TPU_HOST.items():
        os.environ.setdefault(key, value)
    topology = _topology(name, platform="tpu", topology_name=f"{name}:{slice_of(name, n)}")
    devices = tuple(topology.devices[:n])
    return backend.Absent("tpu", None, devices, kind.memory, {}, _versions(devices, "libtpu"))


def slice_of(name: str, n: int) -> str:
    """The smallest slice of a kind of TPU that has so many chips.

    Raises:
      InputError: there is none.
    """
    chips = {slice_: math.prod(map(int, slice_.split("x"))) for slice_ in KINDS[name].slices}
    if n > max(chips.values()):
        raise InputError(f"--target {name}:{n}: wants at most {max(chips.values())} devices")
    return next(slice_ for slice_, size in chips.items() if size >= n)


def _gpus(name: str, kind: GPU, n: int) -> backend.Absent:
    plugins = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)]
    if not plugins:
        wanted = "pip install 'jax[cuda13]' (no GPU is needed)"
        raise InputError(f"--target {name}: wants the compiler for NVIDIA GPUs, {wanted}")
    topology = _topology(name, platform="cuda", target_config=description(kind), topology=f"1x1x{n}")
    devices = tuple(topology.devices)
    versions = _versions(devices, plugins[0].replace("_", "-"))
    return backend.Absent("gpu", kind.capability, devices, kind.memory, _WITHOUT_CARD, versions)


def _topology(name: str, **options: Any) -> Any:
    try:
        return topologies.get_topology_desc(options.pop("topology_name", name), **options)
    except Exception as error:  # of another version of the compiler than jax's, say; of no common type
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"--target {name}: its compiler does not start ({reason})") from None


def _versions(devices: tuple[Any, ...], compiler: str) -> str:
    return f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {compiler} {metadata.version(compiler)}"


def description(gpu: GPU) -> str:
    """What XLA's compiler asks of a GPU, in the text form of its GpuTargetConfigProto."""
    major, minor = gpu.capability
    capability = f"major: {major}" + (f" minor: {minor}" if minor else "")
    values = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.shared_of_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
    }
    words = {"name": gpu.name, "device_vendor": "NVIDIA Corporation", "dnn_version": "9.19.0"}
    words |= dict.fromkeys(("driver_version", "runtime_version", "compile_time_toolkit_version"), "13.0.0")
    info = [f"{key}: {value}" for key, value in values.items()] + [f'{key}: "{word}"' for key, word in words.items()]
    info += [f"cuda_compute_capability {{ {capability} }}"]
    rest = ['platform_name: "CUDA"', "dnn_version_info { major: 9 minor: 19 }", f'device_description_str: "{gpu.name}"']
    return "\n".join(["gpu_device_info {", *info, "}", *rest])


@contextlib.contextmanager
def _cudnn_of(capability: tuple[int, int] | None) -> Iterator[None]:
    """jax asks the GPU at hand, before it takes cuDNN's attention, what it is: here it is told."""
    if capability is None:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # no public way to say it

    def known(text):
        return tuple(int(part) for part in text.split("."))

    told = {
        "check_cudnn_version": lambda: 91900,
        "check_compute_capability": lambda wanted: capability >= known(wanted),
        "is_cuda_compute_capability_equal": lambda other: capability == known(other),
    }
    before = {name: getattr(cudnn, name) for name in told}
    vars(cudnn).update(told)
    try:
        yield
    finally:
        vars(cudnn).update(before)
