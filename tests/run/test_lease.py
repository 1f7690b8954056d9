"""The lock of several machines: of those that contend for a folder one gets it, whatever lies there already.

The machines are threads or processes here, without the system's lock, as where it is not known to the file system.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import types
from contextlib import ExitStack

import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.run import lease, lease_files
from tests.support import ROOT

THEIRS = {"host": "elsewhere", "boot": "another", "pid": 7, "id": "theirs"}


@pytest.fixture(autouse=True)
def without_flock(monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)


def left(folder, content=None, *, ago=3600.0):
    """A lease of another machine, last written so many seconds ago by the file system's clock."""
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
    path = folder / "lease.json"
    path.write_text(json.dumps(THEIRS) if content is None else content)
    os.utime(path, (path.stat().st_mtime - ago,) * 2)


def owner_of(folder):
    return json.loads((folder / "lease.json").read_text())


class Clock:
    """In place of the module's time: sleeping is what makes it pass; an hour is too much."""

    def __init__(self, monkeypatch, each=lambda: None):
        self.now, self._each = 1000.0, each
        monkeypatch.setattr(lease, "time", types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds):
        self.now += seconds
        self._each()
        assert self.now < 4600, "waits for too long"


# ---------------------------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("begins", ["fresh", "take-over"])
def test_of_two_that_found_the_folder_free_one_has_it(tmp_path, monkeypatch, begins):
    """The second is as late as can be: the first has it already."""
    monkeypatch.setattr(lease, "RENEW", 0.01)
    if begins == "take-over":
        left(tmp_path)
    both, original = threading.Barrier(2), lease._wait_until_free
    first_has_it, had, refused = threading.Event(), [], []

    def wait_until_free(*args):
        found = original(*args)
        if both.wait() == 0:
            first_has_it.wait()
        return found

    monkeypatch.setattr(lease, "_wait_until_free", wait_until_free)
    all_tried = threading.Barrier(3)

    def contend():
        with ExitStack() as stack:
            try:
                held = stack.enter_context(lease.hold(tmp_path))
                had.append(held)
            except InputError as error:
                refused.append(str(error))
            first_has_it.set()
            all_tried.wait()
            if had:
                had[0].check()

    threads = [threading.Thread(target=contend) for _ in range(2)]
    for thread in threads:
        thread.start()
    all_tried.wait()
    for thread in threads:
        thread.join()
    assert len(had) == 1 and refused == [
        f"workdir {tmp_path}: in use by process {os.getpid()} on {os.uname().nodename}"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]  # nothing is left


CONTENDS = """
import fcntl, sys, time
from pathlib import Path
from diffexp_jax.errors import InputError
from diffexp_jax.run import lease
lease.RENEW, lease._flock = 0.02, lambda *args: False
for line in sys.stdin:
    folder, go = map(Path, line.split())
    while not go.exists():
        pass
    try:
        with lease.hold(folder) as held:
            print("has it", flush=True)
            sys.stdin.readline()
            held.check()
    except InputError as error:
        print("refused" if "in use by process" in str(error) else error, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("begins", ["fresh", "take-over"])
def test_of_many_contests_none_has_two_winners(tmp_path, begins):
    """25 folders, for each of which three processes contend."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    contenders = [subprocess.Popen([sys.executable, "-c", CONTENDS], env=environment, **pipes) for _ in range(3)]

    def tell(line):
        for contender in contenders:
            contender.stdin.write(f"{line}\n")
            contender.stdin.flush()

    try:
        for n in range(25):
            folder, go = tmp_path / str(n), tmp_path / f"go{n}"
            left(folder) if begins == "take-over" else folder.mkdir()
            tell(f"{folder} {go}")
            go.touch()
            said = sorted(contender.stdout.readline() for contender in contenders)
            assert said == ["has it\n", "refused\n", "refused\n"], n
            tell("")
    finally:
        for contender in contenders:
            contender.kill()
            contender.communicate()


def test_a_program_that_died_in_a_take_over_is_replaced_too(tmp_path, monkeypatch):
    """It had made its claim to the dead one's lease, and another its claim to that claim."""
    left(tmp_path)
    for key, name in (("theirs", "second"), ("second", "third")):
        lease_files.claim(tmp_path, key).write_text(json.dumps(THEIRS | {"id": name, "host": name}))
    clock = Clock(monkeypatch)
    with lease.hold(tmp_path) as held:
        held.check()
        assert owner_of(tmp_path)["pid"] == os.getpid() and clock.now == pytest.approx(1120.0)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    left(tmp_path)
    Clock(monkeypatch)
    with lease.hold(tmp_path) as held:
        held.check()
        with pytest.raises(InputError, match="in use by process"):
            lease.Lease(tmp_path).begin()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


# --------------------------------------------------------------------------------------------------- whether it is ours


def test_a_foreign_lease_is_noticed_at_once(tmp_path):
    """Not only when this program's own is due to be written anew."""
    with lease.hold(tmp_path) as held:
        held.check()
        left(tmp_path)
        with pytest.raises(OSError, match="process 7 on elsewhere has taken it over"):
            held.check()
    assert owner_of(tmp_path) == THEIRS


def test_one_that_wakes_up_late_leaves_the_others_lease_alone(tmp_path, monkeypatch):
    """It had looked, and was silent before it wrote."""
    with lease.hold(tmp_path) as late:
        (tmp_path / "theirs").write_text(json.dumps(THEIRS))
        (tmp_path / "theirs").replace(tmp_path / "lease.json")
        lease_files.write(late._file, late._owner)
        assert owner_of(tmp_path) == THEIRS
    assert owner_of(tmp_path) == THEIRS


@pytest.mark.parametrize("harm", ["removed", "damaged"])
def test_a_lease_that_somebody_removed_is_made_again(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(lease, "RENEW", 0.01)
    with lease.hold(tmp_path) as held:
        path = tmp_path / "lease.json"
        if harm == "damaged":
            (tmp_path / "other").write_text("{")
            (tmp_path / "other").replace(path)
        else:
            path.unlink()
        while not path.exists() or path.read_text() == "{":
            held.check()
        held.check()
        assert owner_of(tmp_path)["pid"] == os.getpid()


# ------------------------------------------------------------------------------------------------------------- its date


@pytest.mark.parametrize(
    "ago, seconds",
    [
        (-3600.0, 120.0),  # the file server's clock was set back
        (0.0, 120.0),
        (100.0, 20.0),
        (1e6, 20.0),  # two renewals could be seen
    ],
)
def test_how_long_a_dead_machine_is_waited_for(tmp_path, monkeypatch, ago, seconds):
    left(tmp_path, ago=ago)
    clock = Clock(monkeypatch)
    written = (tmp_path / "lease.json").stat().st_mtime
    monkeypatch.setattr(lease_files, "now", lambda folder: written + ago + clock.now - 1000)
    with lease.hold(tmp_path, create=False):
        assert clock.now - 1000 == pytest.approx(seconds)
    with lease.hold(tmp_path):
        assert clock.now - 1000 == pytest.approx(seconds)  # it was watched already


@pytest.mark.parametrize("ago", [-3600.0, 3600.0])
def test_who_renews_is_alive_whatever_the_date(tmp_path, monkeypatch, ago):
    left(tmp_path, ago=ago)

    def renew():
        if clock.now >= 1010:
            left(tmp_path, json.dumps(THEIRS | {"renewed": clock.now}), ago=ago)

    clock = Clock(monkeypatch, renew)
    with pytest.raises(InputError, match="in use by process 7 on elsewhere$"), lease.hold(tmp_path):
        pass
    assert clock.now == 1010


# ------------------------------------------------------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"id": "a", "pid": ' + "9" * 5000 + "}",
        '{"id": "../../x", "host": ["h"], "pid": {}}',
        '{"id": 7}',
        '{"id": "' + "x" * 500 + '"}',
        "\udcff\x00",
        "x" * 10**7,
    ],
)
def test_damaged_leases_are_taken_over(tmp_path, monkeypatch, caplog, content):
    left(tmp_path, "")
    (tmp_path / "lease.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    Clock(monkeypatch)
    with lease.hold(tmp_path) as held:
        held.check()
    assert "process ? on another machine left it without a word" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused(tmp_path, make):
    (tmp_path / "lock").touch()
    make(tmp_path / "lease.json")
    with pytest.raises(InputError, match=r"lease.json: wants a file, as a run writes it; remove it$"):
        lease.hold(tmp_path).__enter__()
