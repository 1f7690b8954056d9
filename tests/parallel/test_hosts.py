"""Several hosts as real processes on this machine: the same results as one, and no host that waits for ever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffexp_jax import parallel, train
from diffexp_jax.algorithms import METHODS
from diffexp_jax.errors import HostError, InputError
from diffexp_jax.parallel import hosts as hosts_module
from diffexp_jax.run.checkpoint import read_lora
from tests.support import ROOT, flux, sd3
from tests.support.host_process import keep
from tests.support.runs import LORA, PROCESS, ended, free_port, program, rows_of


def start(line: list[str], *, hosts: int, devices: int = 1, environment=()) -> list[subprocess.Popen]:
    """The same command as so many hosts of a run, which learn of each other by the environment."""
    shared = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'users'}", "JAX_NUM_PROCESSES": str(hosts)}
    shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"} | dict(environment)
    shared["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(line, cwd=ROOT, env=shared | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(hosts)]


# ----------------------------------------------------------------------------------------------- the same on any layout

# Three iterations of two chunks and two updates; an evaluation of five images a prompt
SETTINGS = {"iterations": 3, "exploration.iterations": 2, "eval.samples_per_prompt": 5, "eval.every": 3}
SETTINGS |= {"batch.samples_per_forward": 2, "checkpoint.every": 1, "checkpoint.keep": 9}


def settings_for(algorithm: str, tiny_settings: dict) -> dict:
    """With a reward in plain Python too, where the method takes one; groups are such that four devices share them."""
    settings = tiny_settings | SETTINGS
    if METHODS[algorithm]().compares_groups:
        settings |= {"batch.group": 2, f"{algorithm}.updates": 1}
    if algorithm in ("ddpo", "nft"):
        settings |= {"reward": f"{tiny_settings['reward']}+python:sample_rewards:bright_and_long"}
    return settings


def run_on(folder: Path, algorithm: str, settings: dict, *, hosts: int, devices: int, rest: float = 0.5) -> Path:
    """A run on so many hosts with so many devices each; its workdir is FOLDER/run."""
    folder.mkdir(exist_ok=True)
    line = program(algorithm, folder / "run", settings | {"cpu_devices": devices})
    line[1:3] = [PROCESS, "train", str(folder)]
    first, *others = ended(start(line, hosts=hosts, devices=devices))
    assert first.code == 0, first.err
    for other in others:
        assert other.code == 0, other.err
        assert "reward" not in other.out and "it/s" not in other.err and "look at" not in other.out
    assert "look at" in first.out
    assert_frozen_once(folder, hosts=hosts, devices=devices, rest=rest)
    return folder


def assert_frozen_once(folder: Path, *, hosts: int, devices: int, rest: float) -> None:
    """The frozen arrays are on each device once: LoRA, optimizer and samples are less than that share of a network."""
    for index in range(hosts):
        found = json.loads((folder / f"memory-{index}.json").read_text())
        assert len(found["live"]) == devices
        for there in found["live"].values():
            assert found["frozen"] <= there < found["frozen"] + rest * found["network"], found


def relative(ours, theirs) -> float:
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_results(ours: Path, theirs: Path, *, rounded: float = 1e-5) -> None:
    """Prompts, noise, images or latents, rewards, metrics, evaluations, pictures, LoRA: all but the last bits."""
    for path in sorted(theirs.glob("*.npz")):
        here, there = np.load(ours / path.name), np.load(path)
        assert here.files == there.files
        np.testing.assert_array_equal(here["prompts"], there["prompts"])
        np.testing.assert_array_equal(here["noise"], there["noise"])
        assert relative(here["conditioning"], there["conditioning"]) < rounded
        if "images" in here:
            difference = abs(here["images"].astype(int) - there["images"].astype(int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # a byte may be rounded the other way
        else:
            assert relative(here["x_0"], there["x_0"]) < 10 * rounded  # of a chain of steps
            np.testing.assert_allclose(here["rewards"], there["rewards"], rtol=1e-4, atol=1e-4)
    loras = [load_file(folder / "run" / LORA) for folder in (ours, theirs)]
    joined = [np.concatenate([lora[name].ravel() for name in sorted(lora)]) for lora in loras]
    assert relative(*joined) < rounded
    for row, expected in zip(rows_of(ours / "run"), rows_of(theirs / "run"), strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if name.startswith(("eval/", "reward/")):
                assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    names = sorted(path.name for path in (theirs / "run" / "images").iterdir())
    assert names == sorted(path.name for path in (ours / "run" / "images").iterdir())
    for name in names:
        pictures = [np.asarray(Image.open(folder / "run" / "images" / name)).astype(int) for folder in (ours, theirs)]
        assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.fixture(scope="module")
def on_one(request, tiny_settings, make_config, tmp_path_factory) -> Path:
    """A run in this process, on one device."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, folder)
        train.run(make_config(request.param, settings_for(request.param, tiny_settings)), folder / "run")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("on_one", ["ddpo"], indirect=True)
def test_two_hosts_do_what_one_does(on_one, tiny_settings, tmp_path):
    """Also which files there are, and that no host but the first writes or says anything."""
    ours = run_on(tmp_path, "ddpo", settings_for("ddpo", tiny_settings), hosts=2, devices=1)
    assert_same_results(ours, on_one)
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
        for folder in (ours / "run", on_one / "run")
    ]
    assert files[0] == files[1]
    assert json.loads((ours / "run" / "about.json").read_text())["devices"]["devices"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 4), (2, 2), (4, 1)], ids=lambda layout: "{} x {}".format(*layout))
@pytest.mark.parametrize(
    "on_one, algorithm", [(name, name) for name in ("ddpo", "alignprop", "nft")], indirect=["on_one"]
)
def test_any_layout_does_what_one_device_does(on_one, algorithm, layout, tiny_settings, tmp_path):
    hosts, devices = layout
    settings = settings_for(algorithm, tiny_settings)
    assert_same_results(run_on(tmp_path, algorithm, settings, hosts=hosts, devices=devices), on_one)


@pytest.mark.slow
@pytest.mark.parametrize("on_one", ["ddpo"], indirect=True)
def test_a_run_goes_on_under_another_layout(on_one, tiny_settings, tmp_path):
    """An iteration on one host with four devices, one on two hosts with two, one on four hosts."""
    settings = settings_for("ddpo", tiny_settings)
    for iterations, hosts, devices in ((1, 1, 4), (2, 2, 2), (3, 4, 1)):
        part = settings | {"iterations": iterations, "eval.every": 0, "log.images": 0}
        run_on(tmp_path, "ddpo", part, hosts=hosts, devices=devices)
    loras = [read_lora(folder / "run") for folder in (tmp_path, on_one)]
    assert [iteration for iteration, _ in loras] == [3, 3]
    ours, theirs = (np.concatenate([x.ravel() for x in jax.tree.leaves(lora)]) for _, lora in loras)
    assert relative(ours, theirs) < 1e-5
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("family, algorithm", [("flux", "ddpo"), ("sd3", "nft")])
def test_transformers_on_two_hosts(family, algorithm, make_config, tiny_settings, tmp_path):
    """FLUX and SD 3.5, of weights that diffusers saved, on two devices of two hosts each: as on one device."""
    pytest.importorskip("diffusers")
    made = {
        "flux": lambda to: flux.pipeline("dev", to),
        "sd3": lambda to: sd3.pipeline("sd3.5-medium", to, with_t5=True),
    }
    made[family](tmp_path / "tokens").save_pretrained(tmp_path / "model")
    settings = settings_for(algorithm, tiny_settings) | {"model.path": str(tmp_path / "model"), "model.t5_tokens": 16}
    settings |= {"reward": tiny_settings["reward"], "sampling.steps": 3, "exploration.threshold_of": "steps"}
    settings |= {"iterations": 2, "eval.every": 2}
    settings |= {"model.image_size": 64, "sampling.guidance": 3.5} if family == "flux" else {}
    settings |= {"sampling.eta": 0.7, "sampling.noise_steps": (0, 2)} if algorithm == "ddpo" else {}
    theirs = tmp_path / "one"
    theirs.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        keep(patch, theirs)
        train.run(make_config(algorithm, settings), theirs / "run")
    # the prompts' tokens are large beside so small a network
    ours = run_on(tmp_path / "four", algorithm, settings, hosts=2, devices=2, rest=0.8)
    assert_same_results(ours, theirs)


# ------------------------------------------------------------------------------------------------------------ agreement


# What host 0 and host 1 end with: exit code and line; None: it was killed or stopped
GONE = "nothing was heard of it for 4 s (hosts.heartbeat_timeout), it was killed, stopped or cut off"
ENDS = {
    "normal": [(0, ""), (0, "")],
    "same": [
        (2, "error: host 1 has other prompts than host 0 ("),
        (2, "error: host 1 has other prompts than host 0 ("),
    ],
    "first": [(2, "error: host 0: workdir x: in use")] * 2,
    "reward": [(1, "error: host 1: reward r: is down")] * 2,
    "unexpected": [(1, "error: host 1: KeyError: 'k'"), (1, "KeyError: 'k'")],
    "alone": [(1, "error: disk full"), (1, "error: host 0: disk full")],
    "1 killed": [(1, f"error: host 1: {GONE}"), None],
    "1 stopped": [(1, f"error: host 1: {GONE}"), None],
    "0 killed": [None, (1, "error: the first host has gone, or jax failed (it says above why)")],
    "0 stopped": [None, (1, f"error: host 0: {GONE}")],
}


@pytest.mark.parametrize(
    "cases",
    [
        ("normal", "reward", "alone", "1 killed", "0 killed"),
        pytest.param(("same", "first", "unexpected", "1 stopped", "0 stopped"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_host_ends_and_says_why(cases):
    """Several cases at once, as they mostly wait."""
    running = {case: start([sys.executable, PROCESS, "host", case], hosts=2) for case in cases}
    for case, processes in running.items():
        victim, _, how = case.partition(" ")
        if how:
            for process in processes:
                while process.stderr.readline() not in ("ready\n", ""):
                    pass
            processes[int(victim)].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    for case, processes in running.items():
        victim, _, how = case.partition(" ")
        watched = [process for i, process in enumerate(processes) if not (how and i == int(victim))]
        results = ended(watched, seconds=60)
        for process in processes:
            process.kill()
        for result, (code, said) in zip(results, filter(None, ENDS[case]), strict=True):
            assert result.code == code and result.said.startswith(said), (case, result)


# ------------------------------------------------------------------------------------------------- faults of whole runs


def wait_for_rows(workdir: Path, rows: int, processes: list[subprocess.Popen]) -> None:
    while len(rows_of(workdir)) < rows and all(process.poll() is None for process in processes):
        time.sleep(0.05)


@pytest.mark.slow
def test_a_reward_that_fails_on_one_host_stops_all_and_the_state_is_saved(tiny_settings, tmp_path):
    """In its second call there, which is of the first iteration's second chunk; then the same command goes on."""
    settings = settings_for("ddpo", tiny_settings) | {
        "eval.every": 0,
        "reward": "python:sample_rewards:fails_on_a_host",
    }
    line = program("ddpo", tmp_path / "run", settings)
    one, other = ended(start(line, hosts=2, environment={"FAILING_HOST": "1", "FAILING_CALL": "4"}))
    reason = "error: host 1: reward python:sample_rewards:fails_on_a_host: ConnectionError: the server has gone"
    for ended_host in (one, other):
        said, _, place = ended_host.said.rpartition(" (")
        assert (ended_host.code, said) == (1, reason) and place.startswith("sample_rewards.py:"), ended_host.err
    assert read_lora(tmp_path / "run")[0] == 1
    one, other = ended(start(line, hosts=2))
    assert one.code == other.code == 0, (one.err, other.err)
    assert "continuing from iteration 1" in one.out and "continuing" not in other.out
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_goes_while_training_ends_the_others_and_the_run_goes_on(victim, how, tiny_settings, tmp_path):
    settings = tiny_settings | {"eval.every": 0, "log.images": 0, "iterations": 200, "hosts.heartbeat_timeout": 10}
    line = program("alignprop", tmp_path / "run", settings)
    processes = start(line, hosts=2)
    wait_for_rows(tmp_path / "run", 3, processes)
    began = time.monotonic()
    processes[victim].send_signal(how)
    (left,) = ended([processes[1 - victim]], seconds=60)
    processes[victim].kill()
    processes[victim].communicate()
    assert left.code == 1 and left.said.startswith("error: ") and "Traceback" not in left.err, left.err
    assert time.monotonic() - began < 30  # three times the timeout, on a busy machine
    saved = read_lora(tmp_path / "run")[0]
    line = program("alignprop", tmp_path / "run", settings | {"iterations": saved + 2})
    one, other = ended(start(line, hosts=2))
    assert one.code == other.code == 0, (one.err, other.err)
    assert f"continuing from iteration {saved}" in one.out
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == list(range(saved + 3))


def test_a_host_that_goes_within_common_work_is_told_in_a_line(monkeypatch):
    """Another one's part was done when it was killed; here the collective fails, and nobody is left to tell."""
    watch = hosts_module.Watch(5)
    monkeypatch.setattr(watch, "_gone", lambda now: (1, "host 1: was killed"))
    monkeypatch.setattr(hosts_module, "_group", hosts_module.Group(0, 2, None, watch, iter(())))

    def work():
        raise jax.errors.JaxRuntimeError("INTERNAL: Gloo AllGather failed: Connection closed by peer")

    with pytest.raises(HostError, match="^host 1: was killed$"):
        parallel.together(work)


@pytest.mark.parametrize(
    "asked, said",
    [
        ((None, 2, None), "hosts.coordinator, hosts.index: missing; several hosts want"),
        (("a:1", 2, 2), "hosts.index=2: wants 0 to 1, as hosts.number=2"),
        (("a", 2, 0), "hosts.coordinator='a': wants HOST:PORT"),
    ],
)
def test_hosts_that_are_asked_for_wrongly(asked, said):
    with pytest.raises(InputError, match=said), parallel.joined(parallel.HostSettings(*asked, 1, 1)):
        pass
    assert parallel.number_of_hosts() == 1 and parallel.is_first()


def test_the_environment_says_who_is_who(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(InputError, match="JAX_PROCESS_ID=first: wants a whole number"):
        parallel.joined(parallel.HostSettings("a:1", 2, None, 1, 1)).__enter__()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    with parallel.joined(parallel.HostSettings("a:1", None, 0, 1, 1)):  # one host: nothing is waited for
        assert parallel.agree(7) == 7 and parallel.from_each(lambda: 3) == [3]
