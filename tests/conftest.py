"""What the tests share: shape checks of the whole package, fixtures, and the order of the files."""

import dataclasses
import gc
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the references run there, in float32
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other by spinning
# Compiling is most of the time: so it takes a quarter of it. The passes that are left out only make loops faster, and
# are run again after each other. The last two flags are asked for where XLA is known to have them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 --xla_disable_hlo_passes="
    "simplify-while-loops,while-loop-constant-sinking,while-loop-invariant-code-motion"
    + " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
    * version("jaxlib").startswith("0.10."),
)

import jax
import jaxtyping
import numpy as np
import pytest
from jax.typing import ArrayLike

from tests.support import ROOT, annotations

# Checks the package's annotations, shapes above all, at every call. Tests may pass numpy where jax takes it. Not those
# of state.py: its dataclasses are trees, whose leaves gain a device axis and are other things than arrays for a while.
# Nor settings and limits, which have no arrays and check their values themselves, thousands of them in a test.
# A folder's name stands for all of its files, so those of algorithms/ are named one by one.
jaxtyping.Array = ArrayLike
named = [*(ROOT / "diffexp_jax").glob("[a-z]*"), *(ROOT / "diffexp_jax" / "algorithms").glob("[a-z]*.py")]
modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in named]
unchecked = {"diffexp_jax.algorithms", "diffexp_jax.algorithms.state", "diffexp_jax.limits", "diffexp_jax.settings"}
modules = [name for name in modules if name not in unchecked]
jaxtyping.install_import_hook(modules, f"{annotations.__name__}.checked")
gc.disable()  # until all tests are collected: nearly all that imports make stays

from diffexp_jax.formats import convert  # noqa: E402
from diffexp_jax.models.lora import init_lora  # noqa: E402
from diffexp_jax.pipelines import load_pipeline, stable_diffusion  # noqa: E402
from diffexp_jax.run import checkpoint  # noqa: E402
from diffexp_jax.run import workdir as workdirs  # noqa: E402
from diffexp_jax.settings import parsed  # noqa: E402
from tests.support import tiny  # noqa: E402

TRACED: dict[str, dict] = {}


def traced_once(module, *args, original=convert.abstract_params, **kwargs):
    """As convert.abstract_params: most tests load the same tiny model, and tracing it took half of their time."""
    shapes = jax.tree.map(lambda x: (getattr(x, "shape", ()), getattr(x, "dtype", type(x))), args)
    key = repr((module, shapes, kwargs))
    if key not in TRACED or " at 0x" in key:  # the address of a function, which another one may have later
        TRACED[key] = original(module, *args, **kwargs)
    return jax.tree.map(lambda shape: shape, TRACED[key])


convert.abstract_params = traced_once

ENCODERS: dict[str, Callable] = {}


def with_one_encoder(*args, original=stable_diffusion.build, **kwargs):
    """As stable_diffusion.build: models of one config encode prompts by one function, which is compiled once."""
    pipeline, key = original(*args, **kwargs), repr((args, kwargs))
    if " at 0x" in key:
        return pipeline
    return pipeline._replace(encode=ENCODERS.setdefault(key, pipeline.encode))


stable_diffusion.build = with_one_encoder


def pytest_configure(config):
    """Programs that several tests (and their subprocesses) run are compiled once, and not again the next time."""
    if hasattr(config, "cache"):
        folder, seconds = str(config.cache.mkdir("jax")), "0.3"
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = seconds
    jax.devices()  # one, and so it stays
    config.option.loadscopereorder = False  # or pytest-xdist begins with the files that have most tests


def pytest_collection_finish():
    """Traces are millions of small objects: searching them for cycles took a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a file are of little use to the next ones, and would add up to gigabytes.

    Those of single operations are of much use, so they are kept while the workers together take half the memory.
    """
    yield
    statm, workers = Path("/proc/self/statm"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if not statm.exists() or int(statm.read_text().split()[1]) * workers * 2 > os.sysconf("SC_PHYS_PAGES"):
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """The files that take longest come first: begun last, one of them would run on beside idle workers."""
    longest = ("test_train", "test_hosts", "test_lowering", "test_families", "test_additions", "test_ddpo")
    longest += ("test_alignprop", "test_sample", "test_dry_run", "test_attention", "test_stopping", "test_launch")
    rank = {name: i for i, name in enumerate(longest)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# --------------------------------------------------------------------------------------------------------- tiny models


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return tiny.write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    return tiny.write_tiny_clip(tmp_path_factory.mktemp("tiny_clip"))


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory, tiny_model, tiny_clip) -> dict:
    return tiny.write_tiny_settings(tmp_path_factory.mktemp("prompts"), tiny_model, tiny_clip)


@pytest.fixture(scope="session")
def make_config(tiny_settings):
    """make_config("ddpo", {"seed": 1}): the algorithm's config with the tiny numbers, and the given ones."""

    def make(algorithm, changes=()):
        config = importlib.import_module(f"configs.{algorithm}").get_config()
        config.update_from_flattened_dict(tiny_settings | dict(changes))
        return config.lock()

    return make


@pytest.fixture(scope="module")
def _programs() -> dict:
    """Of the runs of a file, by their settings."""
    return {}


@pytest.fixture
def programs_once(monkeypatch, _programs):
    """Runs of one config, however long, share the first one's programs: tracing them is most of a tiny run's time."""
    from diffexp_jax import train

    def make_programs(experiment, original=train.make_programs):
        config = repr(dataclasses.replace(experiment.settings, iterations=0))
        if config not in _programs:
            _programs[config] = original(experiment)
        return _programs[config]

    monkeypatch.setattr(train, "make_programs", make_programs)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs write no report: the second longest part of a tiny one."""
    from diffexp_jax.report import run

    monkeypatch.setattr(run, "save", lambda workdir, out=None: None)


@pytest.fixture
def script(monkeypatch):
    """script(name, *arguments) does what python scripts/NAME.py, or python -m NAME, does with them."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        if "." in name:
            return runpy.run_module(name, run_name="__main__")
        return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def compiles():
    with tiny.CompileCounter() as counter:
        yield counter


@pytest.fixture
def fails(capsys):
    """fails(code, function, *args): runs it and returns the one line of error that it ends with."""

    def run(code, function, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == code, said
        assert len(said) == 1 and said[0].startswith("error: "), said
        return said[0]

    return run


@pytest.fixture(scope="module")
def lora(tiny_model):
    """Of the tiny model; it does something."""
    shapes = load_pipeline(tiny_model).params["unet"]
    return tiny.nonzero_lora(init_lora(jax.random.key(0), shapes, rank=4), size=0.3)


@pytest.fixture
def workdir(make_config, lora, tmp_path) -> Path:
    """What a run that was stopped after its seventh iteration left."""
    folder = tmp_path / "run"
    planned, _ = workdirs.plan(folder, parsed(make_config("alignprop", {"lora.alpha": 8.0})))
    with workdirs.claim(folder, planned, {}), checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(7, {"lora": lora, "iteration": np.array(7)})
    return folder


@pytest.fixture(scope="module")
def base(tiny_model):
    """The shapes of the tiny model's layers that a LoRA may be added to."""
    return load_pipeline(tiny_model).base
