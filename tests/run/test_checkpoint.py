"""Checkpoints: written beside the iterations, whole or not at all; flipped bits are noticed; the best one is kept."""

import contextlib
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.errors import InputError
from diffexp_jax.run import checkpoint, lease, orbax_errors
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.run.checksums import read_contents
from tests.support.runs import run_program


def state(n: int, size: int = 64) -> TrainState:
    """Of a LoRA of `size` x 256 random numbers, with Adam's."""
    rng = np.random.default_rng(n)
    lora = {"down.0": {"to_q": {"A": rng.standard_normal((size, 256), np.float32), "B": np.zeros((2, 3), np.float32)}}}
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(lora)
    return jax.device_get(TrainState(np.array(n, np.int32), lora, opt_state, None))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def saved(folder, *, n=3, keep=3, scores=None):
    """A folder with checkpoints of the iterations 1..n."""
    with Checkpoints(folder, keep=keep) as checkpoints:
        for it in range(1, n + 1):
            checkpoints.save(it, state(it), rows=[{"iteration": it}], score=None if scores is None else scores[it - 1])
    return folder / "checkpoints"


def steps(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_what_is_saved_is_what_there_was(tmp_path):
    """The update reuses the memory of the state that it is given, while that is still being written."""
    update = parallel.pmap(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    before = state(0, size=4096)
    now = parallel.replicate(before)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        host, after = jax.tree.map(np.array, parallel.first(now)), before
        checkpoints.save(0, host)
        jax.tree.map(lambda x: x.fill(-1), host)  # nor does it depend on the caller's copy
        for _ in range(5):
            now, after = update(now), jax.tree.map(lambda x: x + np.ones((), x.dtype), after)
        checkpoints.save(1, parallel.first(now))
        assert_equal(checkpoints.restore_newest(before)[1], after)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_equal(checkpoints.restore_newest(before)[1], before)


def test_a_write_that_a_kill_ended_is_cleared(tmp_path):
    """When a run goes on, also where it saves no checkpoint of that iteration again."""
    left = saved(tmp_path, n=1) / "7.orbax-checkpoint-tmp"
    (left / "default").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(8, state(8))
    assert steps(tmp_path / "checkpoints") == [1, 8]


def test_a_state_that_is_held_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save_held()  # there is none
        checkpoints.hold(3, state(3), rows=[{"iteration": 3}])
        assert steps(tmp_path / "checkpoints") == []
        checkpoints.save_held()
        assert steps(tmp_path / "checkpoints") == [3]
        checkpoints.save(3, state(9))
        checkpoints.hold(2, state(2))
        checkpoints.save_held()  # an older one than there is
        assert checkpoints.restore_newest(state(0))[0] == 3 and checkpoints.rows_of(3) == [{"iteration": 3}]
        assert_equal(checkpoints.restore_newest(state(0))[1], state(3))


# ----------------------------------------------------------------------------------------------------------- checksums


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's reader, when it fails
def test_every_flipped_bit_is_noticed(tmp_path, caplog):
    """In each file of a checkpoint, one bit at a time: the arrays that are read are those that were written, or the
    older checkpoint's. In the largest file, which holds the numbers, nearly every bit counts."""
    rng, folder = np.random.default_rng(0), saved(tmp_path, n=2)
    newest = folder / "2"
    whole = shutil.copytree(newest, tmp_path / "whole")
    noticed = {}
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    largest = max(files, key=lambda path: path.stat().st_size)
    for path in [*files, *[largest] * 10]:
        content = bytearray(path.read_bytes())
        bit = int(rng.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        iteration, lora = checkpoint.read_lora(tmp_path)
        assert_equal(lora, state(iteration).lora)
        noticed.setdefault(path, []).append(iteration == 1)
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert sum(noticed[largest]) >= 10, noticed
    assert "of its arrays are not what was written: lora/down.0/to_q/A" in caplog.text


def test_checksums_do_not_depend_on_how_it_was_read(tmp_path):
    """A tuple is read as a dict where nobody says that it was one."""
    saved(tmp_path, n=1)
    written = json.loads((tmp_path / "checkpoints" / "1" / "contents" / "metadata").read_text())["crc32"]
    assert written == checkpoint.checksums(state(1)) and len(written) == 8
    x = np.arange(6, dtype=np.float32)
    sums = [checkpoint.checksums(y)[""] for y in (x, x.reshape(2, 3), x.view(np.int32), x[::-1], jnp.asarray(x))]
    assert len(set(sums)) == 4 and sums[0] == sums[4]


@pytest.mark.parametrize("change", [{"score": 3.0}, {"rows": []}, {"rows": [{"iteration": 3}]}, {"crc32": {}}])
def test_changed_rows_and_scores_are_noticed(tmp_path, caplog, change):
    """They are json still: only their own checksum says so. The older checkpoint is taken, and is the best one."""
    folder = saved(tmp_path, n=2, scores=[1.0, 2.0])
    file = folder / "2" / "contents" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert checkpoint.read_lora(tmp_path)[0] == 1 == checkpoint.read_lora(tmp_path, "best")[0]
    assert "checkpoint 2 is broken (its rows, score or checksums are not what was written)" in caplog.text
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.is_best(1.5) and checkpoints.restore_newest(state(0))[0] == 1
        assert checkpoints.rows_of(1) == [{"iteration": 1}]


def test_every_flipped_bit_of_rows_and_score_is_noticed(tmp_path):
    """What is read of the contents is what was written, or an error."""
    folder = saved(tmp_path, n=1, scores=[0.1])
    file = folder / "1" / "contents" / "metadata"
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    wanted = json.loads(whole)
    for bit in rng.choice(8 * len(whole), 400, replace=False):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with contextlib.suppress(ValueError):
            found = read_contents(folder / "1")
            assert {key: found.get(key) for key in ("crc32", "score", "rows")} == {
                key: wanted[key] for key in ("crc32", "score", "rows")
            }


def test_contents_without_their_checksum(tmp_path):
    """Of a version that had only the arrays' checksums: read as before. A score that is no number ranks nothing."""
    folder = saved(tmp_path, n=2, scores=[1.0, 2.0])
    for step, score in ((1, 5.0), (2, float("nan"))):
        file = folder / str(step) / "contents" / "metadata"
        file.write_text(
            json.dumps({key: json.loads(file.read_text())[key] for key in ("crc32", "rows")} | {"score": score})
        )
    assert checkpoint.read_lora(tmp_path)[0] == 2 and checkpoint.read_lora(tmp_path, "best")[0] == 1
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.rows_of(2) == [{"iteration": 2}]


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    (saved(tmp_path, n=1) / "²").mkdir()
    assert checkpoint.read_lora(tmp_path)[0] == 1


def test_a_checkpoint_of_an_older_version(tmp_path, caplog):
    """It has no checksums: it is read, and that is said."""
    folder = saved(tmp_path, n=1)
    shutil.rmtree(folder / "1" / "contents")
    assert checkpoint.read_lora(tmp_path)[0] == 1
    assert "checkpoint 1: has no checksums, of an older version; not checked" in caplog.text
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert_equal(checkpoints.restore_newest(state(0))[1], state(1))
        assert checkpoints.rows_of(1) == [] == checkpoints.rows_of(None)


# --------------------------------------------------------------------------------------------------- which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    """The best across a restart, too; it may be among the newest."""
    folder = saved(tmp_path, n=4, keep=1, scores=[0.0, 3.0, 1.0, 2.0])
    assert steps(folder) == [2, 4]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert not checkpoints.is_best(3.0) and checkpoints.is_best(3.5) and not checkpoints.is_best(None)
        checkpoints.save(5, state(5), score=-1.0)
    assert steps(folder) == [2, 5]
    assert [checkpoint.read_lora(tmp_path, which)[0] for which in ("newest", "best", "2")] == [5, 2, 2]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(6, state(6), score=4.0)
    assert steps(folder) == [6]
    with pytest.raises(InputError, match="no checkpoint '2'; accepted: newest, best, 6$"):
        checkpoint.read_lora(tmp_path, "2")


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_none(tmp_path, first):
    """Neither the best of the run, nor in the way of one that is."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for it, score in enumerate((first, 1.0, math.nan, 0.5), 1):
            assert checkpoints.is_best(score) == (it == 2)
            checkpoints.save(it, state(it), rows=[{"iteration": it}], score=score)
    assert checkpoint.read_lora(tmp_path, "best")[0] == 2


def test_a_broken_best_one_is_passed_over(tmp_path, caplog):
    folder = saved(tmp_path, n=3, scores=[1.0, 3.0, 2.0])
    shutil.rmtree(folder / "2" / "default")
    assert checkpoint.read_lora(tmp_path, "best")[0] == 3 and "checkpoint 2 is broken" in caplog.text
    (folder / "3" / "contents" / "metadata").write_text("{")  # its score is lost with it
    assert checkpoint.read_lora(tmp_path, "best")[0] == 1
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore_newest(state(0))[0] == 1


def test_without_scores_there_is_no_best(tmp_path):
    saved(tmp_path, n=1)
    with pytest.raises(InputError, match="no checkpoint has a score; wants a run with checkpoint.best"):
        checkpoint.read_lora(tmp_path, "best")


# -------------------------------------------------------------------------------------------------------------- errors

FULL = """
import resource, sys, time
from pathlib import Path
import numpy as np
from diffexp_jax.run import checkpoint
from diffexp_jax import command

def main():
    numbers = np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)
    with checkpoint.Checkpoints(Path(sys.argv[1]), keep=3) as checkpoints:
        checkpoints.save(1, {"lora": numbers})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be longer than that from now on
        checkpoints.save(2, {"lora": numbers + 1})
        for _ in range(600):  # iterations
            time.sleep(0.1)
            checkpoints.check()
        print("not noticed")

command.guarded(main)
"""


def test_a_workdir_that_is_renamed_during_a_write_is_not_made_anew(tmp_path, monkeypatch):
    """orbax makes the folders that it misses; the next run of that name would go on with what it wrote there."""
    workdir, usual = tmp_path / "run", orbax_errors.in_daemon_threads

    def late(work):
        workdir.rename(tmp_path / "moved")
        return usual(work)

    workdir.mkdir()
    with lease.hold(workdir), Checkpoints(workdir, keep=3) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.wait()
        monkeypatch.setattr(orbax_errors, "in_daemon_threads", late)
        checkpoints.save(2, state(2))
        with pytest.raises(
            OSError, match=r"the checkpoint of iteration 2 could not be written \(the workdir is gone\)"
        ):
            checkpoints.wait()
        with pytest.raises(OSError, match="is gone; nothing was saved of iteration 3"):
            checkpoints.save(3, state(3))
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert checkpoint.read_lora(tmp_path / "moved")[0] == 1


LATE = """
import asyncio
from diffexp_jax import command
from diffexp_jax.run import orbax_errors

loop = asyncio.new_event_loop()

class Reporter:
    def __del__(self):
        loop.call_soon_threadsafe(print)

def main():
    orbax_errors.quiet()
    loop.close()
    raise OSError("no space left")

late = Reporter()
try:
    command.guarded(main)
finally:
    del late
"""


def test_what_tensorstore_says_after_the_end_is_not_shown(tmp_path):
    """Its threads report to a loop that is closed by then, also once `guarded` has said the error."""
    done = run_program("-c", LATE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: no space left\n")


def test_a_write_that_fails_is_said_at_the_next_iteration(tmp_path):
    """One line, the older one untouched, nothing left of the new one."""
    done = run_program("-c", FULL, tmp_path, cwd=tmp_path)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(said) == 1 and not done.stdout, done.stderr
    assert "error: " in said[0] and "the checkpoint of iteration 2 could not be written (File too large)" in said[0]
    assert checkpoint.read_lora(tmp_path)[0] == 1
    assert steps(tmp_path / "checkpoints") == [1]
