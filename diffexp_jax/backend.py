"""What kind of device the programs are compiled for: the one place that asks.

Tests replace these functions to trace and lower for devices that are not there.
"""

import contextlib
import os

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the NVIDIA GPUs, (9, 0) for an H100; None on anything else."""
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


def set_cpu_devices(n: int) -> None:
    """Makes the CPU n devices. Call it before anything uses a device; later, or where XLA_FLAGS says how many, it is
    without effect.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # a device is in use
            jax.config.update("jax_num_cpu_devices", n)


def ask_for_determinism() -> None:
    """Makes XLA choose GPU kernels that give the same bits each time; call it before anything uses a device."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
