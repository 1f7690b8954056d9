"""The hosts of a run meet before jax joins them: where one cannot take part, all end with a line that says why.

The first host listens at the coordinator's port, which jax's own service takes afterwards. The others connect, say who
they are, and hear "go", or what is wrong. Left to jax, a port that is taken is a segmentation fault, two processes with
one index wait for each other, and hosts that were told other numbers of hosts begin.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Mapping

from diffexp_jax.errors import HostError, InputError
from diffexp_jax.formats.json_text import parse_json

_HELLO = b"diffexp_jax\n"
_PATIENCE = 10.0  # seconds for a line of who is there, and for hosts that are yet to hear that all is off
_LONGEST = 2000  # bytes of a line


Place = tuple[str, int, int]  # HOST:PORT of the first host, the number of hosts, the index of this one


def place(asked: tuple[str | None, int | None, int | None], cluster: str | None, timeout: int) -> Place | None:
    """What the user says, completed by what jax finds out in a cluster of this kind; None where only jax can know."""
    if cluster:
        from jax._src.clusters import ClusterEnv  # no public name

        with contextlib.suppress(Exception):  # jax says it in its own words
            find = ClusterEnv.auto_detect_unset_distributed_params
            asked = find(*asked, None, cluster, timeout)[:3]
    return None if None in asked else asked


def meet(coordinator: str, number: int, index: int, timeout: float) -> None:
    """Returns, on each of `number` hosts, once all of them are there.

    Args:
      coordinator: HOST:PORT of the first.
      timeout: seconds within which all have to be there.

    Raises:
      InputError: the port is taken, two hosts have the same index, or one was told another number of hosts.
      HostError: not all were there in time.
    """
    if index == 0:
        _receive(coordinator, number, timeout)
    else:
        _report(coordinator, number, index, timeout)


# ------------------------------------------------------------------------------------------------------- the first host


def _receive(coordinator: str, number: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    with _listening(coordinator, number) as listener, contextlib.ExitStack() as stack:
        hosts: dict[int, socket.socket] = {}
        wrong: Exception | None = None
        while wrong is None and len(hosts) < number - 1:
            if time.monotonic() > end:
                missing = ", ".join(str(i) for i in range(1, number) if i not in hosts)
                wrong = HostError(f"{_late(timeout)}; hosts that were not: {missing}")
            elif found := _next(listener, end):
                connection, index, theirs = found
                stack.callback(connection.close)
                if theirs != number:
                    wrong = InputError(f"hosts.number={theirs}: host 0 has hosts.number={number}; wants the same")
                elif index in hosts or not 0 < index < number:
                    each = f"wants each of 0 to {number - 1} once"
                    wrong = InputError(f"hosts.index={index}: two processes have it; {each}")
                if wrong:
                    _say(connection, wrong)
                else:
                    hosts[index] = connection
        for connection in hosts.values():
            _say(connection, wrong)
        if wrong:
            if isinstance(wrong, InputError):
                _turn_away(listener, wrong, number - 2 - len(hosts))
            raise wrong
        for connection in hosts.values():  # they hang up first: the port is free at once
            with contextlib.suppress(OSError):
                connection.recv(1)


def _listening(coordinator: str, number: int) -> socket.socket:
    port = int(coordinator.rpartition(":")[2])
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise InputError(
                f"hosts.coordinator={coordinator}: port {port} cannot be used ({error.strerror})"
            ) from None
    with contextlib.suppress(HostError, _Stranger):
        _report(coordinator, number, 0, _PATIENCE)  # another first host says so to both
    raise InputError(f"hosts.coordinator={coordinator}: port {port} is taken on this machine by another program")


class _Stranger(InputError):
    """Another program is at the coordinator's port."""


def _next(listener: socket.socket, end: float) -> tuple[socket.socket, int, int] | None:
    """(connection, index, number of hosts that it was told) of the next host; None: nobody, or no host."""
    listener.settimeout(max(min(end - time.monotonic(), 1.0), 0.01))
    try:
        connection, _ = listener.accept()
    except OSError:
        return None
    try:
        connection.settimeout(_PATIENCE)
        connection.sendall(_HELLO)
        match parse_json(_line(connection).decode("utf-8", "replace")):
            case [int(index), int(number)]:
                return connection, index, number
    except (OSError, ValueError):  # somebody who looks which ports are open
        pass
    connection.close()
    return None


def _say(connection: socket.socket, wrong: Exception | None) -> None:
    with contextlib.suppress(OSError):
        line = f"{type(wrong).__name__} {wrong}" if wrong else "go"
        connection.sendall(f"{line[: _LONGEST // 4]}\n".encode())


def _turn_away(listener: socket.socket, wrong: Exception, left: int) -> None:
    """Tells those that have yet to come, for a while."""
    end = time.monotonic() + _PATIENCE
    while left > 0 and time.monotonic() < end:
        if found := _next(listener, end):
            with found[0]:
                _say(found[0], wrong)
            left -= 1


# ----------------------------------------------------------------------------------------------------------- the others


def _report(coordinator: str, number: int, index: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    with _connected(coordinator, end, timeout) as connection:
        try:
            connection.sendall(f"{json.dumps([index, number])}\n".encode())
            connection.settimeout(max(end - time.monotonic(), 0.0) + 2 * _PATIENCE)  # it says first who is missing
            answer = _line(connection).decode("utf-8", "replace")
        except OSError:
            answer = ""
    if answer == "go":
        return
    kinds: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in (InputError, HostError)}
    kind, _, line = answer.partition(" ")
    raise kinds.get(kind, HostError)(line if kind in kinds else "host 0 has gone before all hosts were there")


def _connected(coordinator: str, end: float, timeout: float) -> socket.socket:
    """A connection to the first host, once it is there."""
    name, _, port = coordinator.rpartition(":")
    reason = "it never listened"
    while time.monotonic() < end:
        try:
            connection = socket.create_connection((name.strip("[]"), int(port)), _PATIENCE)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            time.sleep(0.2)
            continue
        if connection.getsockname() == connection.getpeername():  # with itself, where nobody listens
            connection.close()
            time.sleep(0.2)
            continue
        try:
            said: bytes | None = _line(connection) + b"\n"
        except TimeoutError:
            said = None
        except OSError:
            said = b"\n"
        if said == _HELLO:
            return connection
        connection.close()
        if said != b"\n":
            raise _Stranger(
                f"hosts.coordinator={coordinator}: another program listens there, or a run whose hosts have met"
            )
        time.sleep(0.2)  # hung up without a word: it is ending
    raise HostError(f"{_late(timeout)}: no word from host 0 at {coordinator} ({reason})")


def _late(timeout: float) -> str:
    return f"not all hosts of the run were there within {timeout:g} s (hosts.initialization_timeout)"


def _line(connection: socket.socket) -> bytes:
    """What is said up to the end of a line, or of the connection."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST:
        if not (more := connection.recv(1)):
            break
        line += more
    return line.removesuffix(b"\n")
