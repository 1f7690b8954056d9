"""The hosts of a run meet: who cannot take part is told to all, at once, in the same line."""

import contextlib
import socket
import threading
import time

import pytest

from diffexp_jax.errors import HostError, InputError
from diffexp_jax.parallel import meeting
from tests.support.runs import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "_PATIENCE", 1.0)


def meet(*hosts, port=None, timeout=60.0, before=lambda port: None):
    """What each of the hosts (index, number it was told) ends in: None or an error, in their order."""
    port, ends = port or free_port(), [None] * len(hosts)

    def host(n, index, number):
        try:
            meeting.meet(f"127.0.0.1:{port}", number, index, timeout)
        except Exception as error:
            ends[n] = error

    threads = [threading.Thread(target=host, args=(n, *one)) for n, one in enumerate(hosts)]
    for thread in threads:
        thread.start()
    before(port)
    for thread in threads:
        thread.join()
    return ends


def all_say(ends, kind, text):
    assert [type(end) for end in ends] == [kind] * len(ends) and {str(end) for end in ends} == {text}


def test_hosts_that_are_all_there():
    """In any order; the port is free at once for jax's service, and again for the next run."""
    port = free_port()
    for order in (((0, 3), (1, 3), (2, 3)), ((2, 3), (1, 3), (0, 3))):
        assert meet(*order, port=port) == [None] * 3
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    "hosts, said",
    [
        (((0, 3), (1, 3), (1, 3)), "hosts.index=1: two processes have it; wants each of 0 to 2 once"),
        (((0, 2), (0, 2)), "hosts.index=0: two processes have it; wants each of 0 to 1 once"),
        (((0, 2), (1, 3)), "hosts.number=3: host 0 has hosts.number=2; wants the same"),
        (((0, 3), (1, 2)), "hosts.number=2: host 0 has hosts.number=3; wants the same"),
    ],
)
def test_hosts_that_were_told_different_things(hosts, said):
    all_say(meet(*hosts), InputError, said)


def test_hosts_that_are_missing():
    late = "not all hosts of the run were there within 1 s (hosts.initialization_timeout)"
    all_say(meet((0, 4), (2, 4), timeout=1.0), HostError, f"{late}; hosts that were not: 1, 3")
    (error,) = meet((1, 2), timeout=1.0)
    assert isinstance(error, HostError) and str(error).startswith(f"{late}: no word from host 0 at 127.0.0.1:")


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"x" * 5000], ids=["nothing", "http", "much"]
)
def test_a_port_that_is_taken(says):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    connection.sendall(says)

        connections = []
        threading.Thread(target=serve, daemon=True).start()
        first, other = meet((0, 2), (1, 2), port=port)
    where = f"hosts.coordinator=127.0.0.1:{port}"
    assert isinstance(first, InputError) and isinstance(other, InputError)
    assert str(first) == f"{where}: port {port} is taken on this machine by another program"
    assert str(other) == f"{where}: another program listens there, or a run whose hosts have met"


def test_who_looks_which_ports_are_open_is_no_host():
    def look(port):
        for says in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"[" * 1999 + b"\n"):
            for _ in range(600):  # until the first host listens
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
                    connection.sendall(says)
                    break
                time.sleep(0.1)
        threads.append(threading.Thread(target=lambda: ends.extend(meet((1, 2), port=port))))
        threads[0].start()

    threads, ends = [], []
    assert meet((0, 2), before=look) == [None]
    threads[0].join()
    assert ends == [None]


def test_a_first_host_that_goes_before_all_are_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"diffexp_jax\n")
                connection.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        (error,) = meet((1, 2), port=listener.getsockname()[1])
        thread.join()
    assert isinstance(error, HostError) and str(error) == "host 0 has gone before all hosts were there"
