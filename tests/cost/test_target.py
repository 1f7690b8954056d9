"""`--dry_run --target`: programs for devices that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import backend, parallel
from diffexp_jax.cost import target
from diffexp_jax.cost.dry_run import programs_of, too_much
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.settings import checked


@pytest.fixture
def no_compilers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax.config, "update", lambda key, value: None)


@pytest.mark.parametrize(
    "given, said",
    [
        ("v7x", "^--target='v7x': accepted: v5e, v6e, v5p, a100, h100, h200$"),
        ("v5e:", "^--target v5e:: wants v5e, .*, and a number of devices: v5e:4$"),
        ("v5e:none", "^--target v5e:none: wants v5e, "),
        ("h100:0", "^--target h100:0: wants v5e, "),
        ("v5e:4", "^--target v5e: wants the TPUs' compiler, pip install libtpu .no TPU is needed.$"),
        ("h200", "^--target h200: wants the compiler for NVIDIA GPUs, pip install 'jax.cuda13.' .no GPU is needed.$"),
    ],
)
def test_mistakes(no_compilers, given, said):
    with pytest.raises(InputError, match=said), target.compiling_for(given):
        pass


@pytest.mark.parametrize("n, slice_", [(1, "2x2"), (4, "2x2"), (5, "2x4"), (16, "4x4"), (256, "16x16")])
def test_the_smallest_slice_with_so_many_chips(n, slice_):
    assert target.slice_of("v5e", n) == slice_


def test_more_chips_than_there_are_slices_of():
    with pytest.raises(InputError, match="^--target v5p:257: wants at most 256 devices$"):
        target.slice_of("v5p", 257)


def test_a_gpus_description():
    text = target.description(target.KINDS["a100"])
    assert "core_count: 108" in text and "cuda_compute_capability { major: 8 }" in text
    assert text.count("{") == text.count("}") == 3 and 'name: "NVIDIA A100-SXM4-80GB"' in text


def test_arrays_are_shapes_and_nothing_runs(make_config):
    """A run's programs and their arguments are made, of as many devices as the target has."""
    kind = jax.devices()[0]
    there = backend.Absent("tpu", None, (kind,) * 4, 2**34, {}, "4 x none")
    with backend.absent(there):
        assert (backend.platform(), backend.device_count(), backend.local_device_count()) == ("tpu", 4, 4)
        keys, rows = parallel.shard((jax.random.split(jax.random.key(0), 8), np.zeros((8, 3), np.float32)), 8)
        assert keys.shape == (4, 2) and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and rows.shape == (4, 2, 3)
        shape = parallel.replicate(np.zeros(5, np.int32))
        assert isinstance(shape, jax.ShapeDtypeStruct) and (shape.shape, shape.dtype) == ((4, 5), np.int32)
    assert backend.platform() == "cpu" and backend.absent_devices() is None


def test_too_much():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.63G of 15.75G hbm. Exceeded")
    assert too_much(error) == "17.63GiB of 15.75GiB a device"
    with pytest.raises(jax.errors.JaxRuntimeError):
        too_much(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such kernel"))


@pytest.mark.slow  # minutes: the real compilers, where they are installed
@pytest.mark.parametrize("given", ["v5e:2", "h100:2"])
def test_a_real_compiler(given, make_config):
    wanted = "libtpu" if given.startswith("v") else "jax_cuda13_plugin"
    if importlib.util.find_spec(wanted) is None:
        pytest.skip(f"{wanted} is not installed")
    with target.compiling_for(given) as there:
        settings = checked(make_config("ddpo", {"batch.samples": 4, "batch.samples_per_forward": 1}))
        experiment = Experiment.build(settings, weights=False)
        for program in programs_of(experiment):
            compiled = program.function.lower(*program.args).compile(compiler_options=dict(there.compiler_options))
            assert 0 < compiled.memory_analysis().argument_size_in_bytes < there.memory
