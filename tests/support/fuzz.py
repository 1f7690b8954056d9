"""Mutations of good input, and the check that what is made of them is valid or refused in one line."""

import resource
import signal
import warnings
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffexp_jax import command
from diffexp_jax.errors import InputError

EXAMPLES = pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
MOST_GROWTH = 512 * 2**20  # bytes of memory, over all examples of a test
PATIENCE = 60  # seconds after which an example hangs


def fuzz(strategy: st.SearchStrategy, check: Callable, examples: int) -> None:
    """check(example) returns, or raises an InputError of one line, for so many examples: the same ones each time."""

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def run(example):
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(PATIENCE)
        try:
            check(example)
        except InputError as error:
            line = command.one_line(error)
            assert line != "InputError" and line.isprintable(), error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are very large
        run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < MOST_GROWTH / 1024


def hangs(number, frame):
    raise AssertionError("an example hangs")


def changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after some changes; a place is a fraction of the length."""
    for kind, place, other in changes:
        at = int(place * len(content))
        span = max(len(other), 1)
        content = {
            "cut": lambda c, at, other, span: c[:at],
            "drop": lambda c, at, other, span: c[:at] + c[at + span :],
            "insert": lambda c, at, other, span: c[:at] + other + c[at:],
            "replace": lambda c, at, other, span: c[:at] + other + c[at + span :],
            "repeat": lambda c, at, other, span: c[: at + 8 * span] + c[at:],
            "flip": lambda c, at, other, span: c[:at] + bytes([c[at] ^ (1 << span % 8)]) + c[at + 1 :] if c else c,
        }[kind](content, min(at, max(len(content) - 1, 0)), other, span)
    return content


PIECES = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\r", b"\n\n", b"\t", b",", b"[", b"{", b"-1", b"1e999"]
PIECES += [b"99999999999999999999", b"NaN", b"null", b"true", b"\xf0\x9f\x98\x80", b"a" * 5000, b"[" * 3000]
KINDS = st.sampled_from(["cut", "drop", "insert", "replace", "repeat", "flip"])


# Places near the beginning, where headers are, as often as elsewhere
PLACES = st.floats(0.0, 1.0) | st.floats(0.0, 0.02)


CHANGES = st.lists(st.tuples(KINDS, PLACES, st.sampled_from(PIECES) | st.binary(max_size=9)), min_size=1, max_size=4)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
