"""What kind of device the programs are compiled for: the one place that asks.

Tests replace these functions to trace and lower for devices that are not there.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform as system
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Absent(NamedTuple):
    """Devices that are not there: programs can be compiled for them, and nothing can run (`cost.target`)."""

    platform: str
    cuda_capability: tuple[int, int] | None
    devices: tuple[Any, ...]
    memory: int  # bytes of each that programs may take
    compiler_options: Mapping[str, Any]
    versions: str  # of the device and its compiler, in words


_absent: Absent | None = None


@contextlib.contextmanager
def absent(devices: Absent) -> Iterator[None]:
    """Makes every question here be about these devices, for as long as the context lasts."""
    global _absent
    before, _absent = _absent, devices
    try:
        yield
    finally:
        _absent = before


def absent_devices() -> Absent | None:
    """The devices that programs are compiled for where these are not there; None: the ones that are."""
    return _absent


def device_count() -> int:
    """The number of devices of all hosts."""
    return len(_absent.devices) if _absent else jax.device_count()


def local_device_count() -> int:
    """The number of devices of this host."""
    return len(_absent.devices) if _absent else jax.local_device_count()


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return _absent.platform if _absent else jax.default_backend()


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPUs, (9, 0) for an H100; None on anything else."""
    if _absent:
        return _absent.cuda_capability
    if platform() != "gpu":
        return None
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    major, _, minor = device.compute_capability.partition(".")
    return int(major), int(minor or 0)


def host_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory() -> int | None:
    """Bytes of a device's own memory that programs may take; None: a CPU's devices share the machine's."""
    if _absent:
        return _absent.memory if _absent.platform != "cpu" else None
    limits = jax.local_devices()[0].memory_stats() or {}
    return limits.get("bytes_limit")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: all


def processor() -> str:
    """The CPU's name, and the widest vectors that it has."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return system.processor() or system.machine()
    name = re.search(r"model name\s*: (.*)", info)
    widest = next((isa for isa in ("avx512f", "avx2") if isa in info), system.machine())
    return f"{name[1] if name else system.machine()} ({widest})"


def machine() -> dict[str, str]:
    """What results are reported with: the devices in words, and the versions of what computes."""
    kind = processor() if platform() == "cpu" else jax.local_devices()[0].device_kind
    on = f", {cores()} cores" if platform() == "cpu" else ""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"devices": f"{jax.device_count()} x {kind}{on}", "python": system.python_version()} | versions


def set_cpu_devices(n: int) -> None:
    """Makes the CPU n devices. Call it before anything uses a device; later, or where XLA_FLAGS says how many, it is
    without effect.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # a device is in use
            jax.config.update("jax_num_cpu_devices", n)


def give_back_memory() -> None:
    """Gives the system what is free in the heaps, where the C library is glibc: after compiling that is much."""
    with contextlib.suppress(OSError, AttributeError):  # no such library, no such function
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def ask_for_determinism() -> None:
    """Makes XLA choose GPU kernels that give the same bits each time; call it before anything uses a device."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
