"""What is asked of the machine."""

import os
import platform
import subprocess
import sys

import pytest

from diffexp_jax import backend

# 200 MB in blocks that a heap keeps, freed but for the last one
FREED_IN_A_HEAP = """
import ctypes
from diffexp_jax import backend
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000))) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(block)
def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
before = resident()
backend.give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_free_memory_of_the_heaps_goes_back():
    found = subprocess.run([sys.executable, "-c", FREED_IN_A_HEAP], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 150e6


def test_cores_where_a_process_cannot_ask_for_its_own(monkeypatch):
    """As on macOS."""
    assert backend.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert backend.cores() == os.cpu_count()
