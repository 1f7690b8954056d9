"""The launchers: what they start, as far as a machine without GPUs, SLURM and TPUs can tell."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.runs import LORA, PROCESS, ended, free_port, rows_of
from tests.support.tiny import as_flags

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.*") if path.suffix in (".sh", ".sbatch"))


def written(folder: Path, name: str, text: str) -> Path:
    """A program of that name in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This one, in which the programs of a folder come first."""
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable} | more


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_the_scripts(script):
    """And shellcheck, which lies beside Python."""
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install -r requirements-test.txt brings it"
    subprocess.run([shellcheck, "-x", f"scripts/{script}"], cwd=ROOT, check=True)


ALL = sorted([*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "tools").rglob("*.sh")])


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_the_bash_of_macos_reads_the_scripts(path):
    """3.2: without mapfile, |&, ${x,,} and associative arrays; an empty array is unset to it."""
    text = path.read_text()
    assert not re.search(r"mapfile|readarray|declare -A|\|&|\$\{\w+(,,|\^\^)|(local|=)[ \w]*-n ", text)
    for array in re.findall(r"(\w+)=\(\)", text):
        used = re.findall(rf'(\S*)"\$\{{{array}\[@\]\}}"', text)
        assert array == "pids" or all(before.endswith(f"{array}[@]+") for before in used), array


@pytest.mark.parametrize("there, old", [(False, True), (True, True), (False, False)])
def test_the_quickstart_wants_a_new_python(tmp_path, there, old):
    """It says so in a line and makes nothing; an environment of an old one, or a venv that fails, is said too."""
    for name in ("scripts/quickstart.sh", "tools/machine/venv.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    says = f'[ "$1" = --version ] && echo Python 3.9.6; [ "$1" = -c ] && exit {int(old)}\n[ "$1" != -m ]'
    path = written(tmp_path / (".venv/bin" if there else "bin"), "python", says)
    env = os.environ | {"PYTHON": str(path)}
    line = ["bash", "scripts/quickstart.sh"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    wanted = "wants Python 3.11 or newer" if old else "on Debian and Ubuntu: apt install python3-venv"
    assert wanted in done.stderr and (tmp_path / ".venv").exists() == there


# A TPU that is ready, taken away, ready again; its run ends with an error, then well.
GCLOUD = """
echo "$@" >> "$NOTES"
next() { head -1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*) next "$STATES" ;;
  *exit.txt\\ 2*) next "$RESULTS" ;;
esac
"""


def test_a_tpu_is_kept(tmp_path):
    written(tmp_path / "bin", "gcloud", GCLOUD)
    notes, states, results = (tmp_path / name for name in ("notes", "states", "results"))
    states.write_text("READY\nREADY\nPREEMPTED\nREADY\nREADY\n")
    results.write_text("running\n1\n0\n")
    tpu = {"TPU": "t", "ZONE": "z", "ACCELERATOR": "v5litepod-64", "VERSION": "v", "SPOT": "1", "BUCKET": "b"}
    tpu |= {"NOTES": str(notes), "STATES": str(states), "RESULTS": str(results), "EVERY": "0", "REPOSITORY": "r"}
    line = [
        "bash",
        ROOT / "scripts" / "launch" / "tpu.sh",
        "keep",
        "--config",
        "c.py:model=a b",
        "--workdir",
        "/mnt/runs/x",
    ]
    done = subprocess.run(line, env=environment(tmp_path / "bin", **tpu), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "t was taken away: a new one\nended with 1: started again\nthe run has come to its end\n"
    said = notes.read_text()
    assert (
        said.count("setsid nohup") == 3 and said.count("tpu-vm create t --zone z --accelerator-type v5litepod-64") == 1
    )
    assert "--version v --spot" in said and "tpu-vm delete t --zone z --quiet" in said
    assert "--worker 0 --command gcsfuse --implicit-dirs b /mnt/runs" in said and "--worker all" in said


def test_the_tpus_command_starts_a_program_that_goes_on_alone(tmp_path):
    """What `start` has a worker do, done here by a shell."""
    written(tmp_path / "bin", "gcloud", 'bash -c "${@: -1}"')
    python = tmp_path / "diffexp_jax" / ".venv" / "bin"
    python.mkdir(parents=True)
    written(python, "python", 'printf "%s|" "$@"; exit 3')
    env = environment(tmp_path / "bin", TPU="t", ZONE="z")
    script = ROOT / "scripts" / "launch" / "tpu.sh"
    flags = ["--config", "c.py:prompts=a dog's life", "--workdir", "x"]
    subprocess.run(["bash", script, "start", *flags], cwd=tmp_path, env=env, check=True)
    said = "running"
    while said in ("running", "gone"):
        said = subprocess.run(
            ["bash", script, "status"], cwd=tmp_path, env=env, capture_output=True, text=True
        ).stdout.strip()
    assert said == "3"
    assert (tmp_path / "diffexp_jax" / "run.log").read_text() == "|".join(["-u", "-m", "diffexp_jax.train", *flags, ""])


@pytest.mark.parametrize("workdir", [["--workdir={}"], ["--workdir", "{}"], []])
def test_a_gpus_run_has_the_flags_of_any_other(tmp_path, workdir):
    """Its log lies in the workdir, which is among the flags."""
    program = written(tmp_path / "bin", "program", 'printf "%s|" "$@"')
    flags = ["--config", "c.py:prompts=a dog", *(word.format(tmp_path / "run") for word in workdir), "--config.seed=1"]
    script = ROOT / "scripts" / "launch" / "gpu.sh"
    env = environment(tmp_path / "bin", FOREGROUND="1") | {"PYTHON": str(program)}
    done = subprocess.run(["bash", script, *flags], env=env, capture_output=True, text=True)
    if not workdir:
        assert done.returncode == 2 and "gpu.sh --config" in done.stderr
        return
    log = tmp_path / "run" / "host-0.log"
    assert done.returncode == 0 and log.read_text() == "|".join(["-u", "-m", "diffexp_jax.train", *flags, ""])


# -------------------------------------------------------------------------------------------------- with real processes


def found_out(variables: list[dict[str, str]]) -> None:
    """Processes of these variables find each other and agree, see host_process.py."""
    shared = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, PROCESS, "host", "normal"]
    for host in ended([subprocess.Popen(line, env=shared | own, **pipes) for own in variables], seconds=120):
        assert host.code == 0, host.err


@pytest.mark.slow
def test_hosts_find_each_other_by_slurms_variables():
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    found_out([shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)])


@pytest.mark.slow
def test_hosts_find_each_other_by_a_tpus_variables():
    """As on GKE; JAX_FORCE_TPU_INIT makes jax believe in the TPU."""
    shared = {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_SKIP_MDS_QUERY": "1"}
    shared |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    found_out([shared | {"TPU_WORKER_ID": str(i)} for i in range(2)])


SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "${code:-0}"
"""


@pytest.mark.slow
def test_the_scripts_run_a_training(tiny_settings, tmp_path):
    """slurm.sbatch over an imitated srun, then gpu.sh goes on with the same workdir, by two processes."""
    settings = tiny_settings | {"eval.every": 0, "log.images": 0, "iterations": 2}
    written(tmp_path / "bin", "srun", SRUN)
    env = environment(tmp_path / "bin", SLURM_JOB_ID="11", SLURM_SUBMIT_DIR=str(ROOT), FOREGROUND="1", PROCESSES="2")
    env |= {"JAX_COORDINATOR_PORT": str(free_port()), "PORT": str(free_port())}
    run, config = tmp_path / "run", "--config=configs/alignprop.py"
    slurm = ["bash", ROOT / "scripts" / "launch" / "slurm.sbatch", config, f"--workdir={run}", *as_flags(settings)]
    done = subprocess.run(slurm, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (run / LORA).exists(), done.stderr
    settings["iterations"] = 3
    gpu = ["bash", ROOT / "scripts" / "launch" / "gpu.sh", f"--workdir={run}", config, *as_flags(settings)]
    done = subprocess.run(gpu, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (run / "host-0.log").read_text()
    assert "continuing from iteration 2" in (run / "host-0.log").read_text()
    assert "continuing" not in (run / "host-1.log").read_text()
    assert [row["iteration"] for row in rows_of(run)] == [0, 1, 2, 3]
