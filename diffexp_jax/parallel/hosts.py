"""Hosts: the processes of one run, each with its own devices, and what they say to each other.

A host here is a process: one a machine, unless several share it. Arrays go between hosts by the devices' collectives
(`devices.py`). What is said in this file (who failed and why, which settings hold) goes by jax's coordination service,
which runs inside the first host: it carries text, waits for as long as the slowest host takes, and has no part in the
devices' programs, so that a host that failed can still say so to others which wait for it.

Every function here is called by all hosts, in the same order; on one host it costs nothing.
"""

import base64
import contextlib
import dataclasses
import itertools
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging

from diffexp_jax.errors import BadRewardError, HostError, InputError, RewardError, Stopped
from diffexp_jax.parallel import devices, meeting
from diffexp_jax.parallel.host_settings import HostSettings
from diffexp_jax.parallel.watch import Watch

T = TypeVar("T")
_ERRORS = {
    kind.__name__: kind for kind in (InputError, RewardError, BadRewardError, HostError, FloatingPointError, OSError)
}
_LONG = 7 * 24 * 3600 * 1000  # ms: a host that is alive is waited for; one that is not ends the wait (`watch.py`)


class Group(NamedTuple):
    """The hosts of this run, where there are several."""

    index: int
    number: int
    client: Any  # of jax's coordination service
    watch: Watch
    calls: Iterator[int]


_group: Group | None = None


def number_of_hosts() -> int:
    return _group.number if _group else 1


def is_first() -> bool:
    """Whether this host is the one that writes: files, pictures, lines on the screen."""
    return _group is None or _group.index == 0


# ---------------------------------------------------------------------------------------------------------- agreement


def exchange(text: str) -> list[str]:
    """What every host says, in their order."""
    if _group is None:
        return [text]
    call, client = next(_group.calls), _group.client
    here, before = f"diffexp/said/{call}", f"diffexp/said/{call - 1}"
    client.key_value_set(f"{here}/{_group.index}", f"={text}")
    client.wait_at_barrier(here, _LONG)
    said = dict(client.key_value_dir_get(f"{here}/"))
    if call:
        client.key_value_delete(f"{before}/{_group.index}")  # everyone has read it
    return [said[f"{here}/{i}"][1:] for i in range(_group.number)]


def agree(value: int) -> int:
    """The largest of the hosts' values, on all of them: whether any was asked to stop, say."""
    return max(map(int, exchange(str(value))))


def together(work: Callable[[], T]) -> T:
    """work() on every host. Where it raises on one, all raise: none continues alone or waits for one that stopped.

    Raises:
      What work raised here; elsewhere an error of the same kind (HostError for an unexpected one) that names the host.
    """
    if _group is None:
        return work()
    error, result = None, None
    try:
        result = work()
    except Exception as raised:
        if lost := _group.watch.explained(raised):  # there is nobody to tell
            raise lost from None
        error = raised
    said = exchange("" if error is None else _told(error))
    failed = {i: text for i, text in enumerate(said) if text}
    if not failed:
        return result
    _group.watch.stop()  # all know, and end by themselves
    if error is not None and (len(set(said)) == 1 or not isinstance(error, tuple(_ERRORS.values()))):
        raise error  # of all hosts, or a surprise: with its traceback
    index = min(failed) if error is None else _group.index
    kind, _, text = failed[index].partition(" ")
    raise _ERRORS.get(kind, HostError)(f"host {index}: {text}") from error


def _told(error: BaseException) -> str:
    """An error's kind and first line, from which the other hosts make theirs."""
    name, line = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError):
        name = "OSError"  # whatever kind of it
    return f"{name} {line}" if name in _ERRORS else f"HostError {name}: {line}"


def from_first(make: Callable[[], T]) -> T:
    """What make() gives on the first host, the only one that calls it; an error of it is raised on all.

    What it makes goes to the others as a pickle, arrays as numpy.
    """
    made = together(lambda: make() if is_first() else None)
    if _group is None:
        return made
    data = np.frombuffer(pickle.dumps(jax.device_get(made)), np.uint8) if is_first() else None
    return pickle.loads(devices.sum_of_bytes(data, agree(0 if data is None else len(data))))


def from_each(make: Callable[[], T]) -> list[T]:
    """What make() gives on every host, in their order, on all; an error of one is raised on all. For what is small."""
    if _group is None:
        return [make()]
    made = base64.b64encode(pickle.dumps(together(make))).decode()
    return [pickle.loads(base64.b64decode(text)) for text in exchange(made)]


@contextlib.contextmanager
def on_first(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T | None]:
    """A context that the first host alone enters, None elsewhere; where it cannot, all raise its error."""
    with contextlib.ExitStack() as stack:
        yield together(lambda: stack.enter_context(make()) if is_first() else None)


def check_same(what: str, text: str) -> None:
    """Checks that all hosts have the same.

    Raises:
      InputError: one has another than the first host.
    """
    said = exchange(f"{zlib.crc32(text.encode()):08x}")
    for index, theirs in enumerate(said):
        if theirs != said[0]:
            raise InputError(f"host {index} has other {what} than host 0 ({theirs} and {said[0]}); wants the same")


def own_share(n: int) -> slice:
    """The rows that are this host's where n rows are shared out in order."""
    index = _group.index if _group else 0
    return slice(n * index // number_of_hosts(), n * (index + 1) // number_of_hosts())


# -------------------------------------------------------------------------------------------------------------- joining


@contextlib.contextmanager
def joined(settings: HostSettings) -> Iterator[None]:
    """Makes this process one of the hosts of a run for as long as the context lasts; enter it before using a device.

    On TPU pods, under SLURM and under Open MPI all is found out; elsewhere the settings say who is who, or the
    environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. If nothing does, or there is one host,
    nothing happens.

    Raises:
      InputError: a part is missing or makes no sense, or the hosts were told different things (`meeting.py`).
      HostError: not all were there in time.
    """
    global _group
    with Watch(settings.heartbeat_timeout) as watch:
        if not _initialize(_completed(settings), watch):
            yield
            return
        state = _jax_state()
        _group = Group(state.process_id, state.num_processes, state.client, watch, itertools.count())
        watch.start(state.client, state.process_id, state.num_processes)
        try:
            with contextlib.ExitStack() as stack:
                if not is_first():  # one of them is enough to look at
                    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                    logging.set_verbosity(logging.ERROR)
                yield
        except (SystemExit, Stopped) as ended:  # all were asked to stop
            if not watch.finish(settings.heartbeat_timeout):
                code = ended.exit_code if isinstance(ended, Stopped) else ended.code
                watch.leave(code if isinstance(code, int) else 1, "ended")
            raise
        except BaseException as error:
            if lost := watch.explained(error):
                watch.leave(1, str(lost))
                raise lost from None
            code = {InputError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
            watch.leave(code, _told(error).partition(" ")[2])
            raise
        else:
            watch.finish(_LONG // 1000)


def _completed(settings: HostSettings) -> HostSettings:
    """The settings, completed by what the environment says."""

    def from_environment(name: str) -> int | None:
        text = os.environ.get(name)
        if text and not text.isdigit():
            raise InputError(f"{name}={text}: wants a whole number")
        return int(text) if text else None

    number, index = settings.number, settings.index
    asked = dataclasses.replace(
        settings,
        coordinator=settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
        number=from_environment("JAX_NUM_PROCESSES") if number is None else number,
        index=from_environment("JAX_PROCESS_ID") if index is None else index,
    )
    if asked.number == 1 or asked.place == (None, None, None) or _cluster():
        return asked
    if None in asked.place:
        names = ("coordinator", "number", "index")
        missing = ", ".join(f"hosts.{name}" for name in names if getattr(asked, name) is None)
        raise InputError(f"{missing}: missing; several hosts want hosts.coordinator, hosts.number and hosts.index")
    _, _, port = asked.coordinator.rpartition(":")
    if not re.fullmatch(r".+:\d{1,5}", asked.coordinator) or not 0 < int(port) < 2**16:
        raise InputError(f"hosts.coordinator={asked.coordinator!r}: wants HOST:PORT of the first host")
    if not 0 <= asked.index < asked.number:
        raise InputError(f"hosts.index={asked.index}: wants 0 to {asked.number - 1}, as hosts.number={asked.number}")
    return asked


def _cluster() -> str | None:
    """What jax knows this process to be started by, by jax's name; TPUs are asked by `jax.distributed` itself."""
    environment = os.environ
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    return None


def _jax_state() -> Any:
    """jax's own record of the hosts: the coordination service has no public name."""
    from jax._src import distributed

    return distributed.global_state


def _initialize(asked: HostSettings, watch: Watch) -> bool:
    """Whether there are several hosts; if so they are all there."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    cluster, found_out = _cluster(), not asked.coordinator
    if asked.number == 1 or (found_out and not cluster and not running_in_cloud_tpu_vm):
        return False
    with contextlib.suppress(AttributeError):  # signals are the run's own business
        jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _wait_long_on_a_cpu()
    timeout = asked.initialization_timeout
    if place := meeting.place(asked.place, cluster, timeout):
        meeting.meet(*place, timeout)
    watch.say_when_aborted(f"not all hosts of the run were there within {timeout} s (hosts.initialization_timeout)")
    try:
        jax.distributed.initialize(
            asked.coordinator,
            asked.number,
            asked.index,
            cluster_detection_method=cluster or (None if found_out else "deactivate"),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=2 * watch.timeout + 10,  # `watch` says it in a clear line, and first
            shutdown_timeout_seconds=watch.timeout,
        )
    except ValueError:
        if found_out and not cluster:  # a TPU that is no part of a pod
            return False
        raise
    return _jax_state().num_processes > 1


def _wait_long_on_a_cpu() -> None:
    """XLA ends a CPU's program when one of its devices waits for 40 s, also where a host only takes longer."""
    for name in ("call_warn_stuck", "call_terminate"):
        flag = f"xla_cpu_collective_{name}_timeout_seconds"
        if flag not in (flags := os.environ.get("XLA_FLAGS", "")):
            os.environ["XLA_FLAGS"] = f"{flags} --{flag}={_LONG // 1000}".strip()
