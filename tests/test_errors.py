"""What an error says in part of a line."""

import pytest

from diffexp_jax.errors import first_line, printable


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("  one\ntwo"), "one"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("no such key"), "no such key"),
        (KeyError(), "KeyError"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("a\tb\x00"), "a\\tb\\x00"),
        (ValueError("a word " * 9), "a word a..."),  # of 12 characters at most, and no half of a word
        (ValueError("x" * 99), "x" * 12),
    ],
)
def test_first_line(error, said):
    most = 12 if len(str(error)) > 60 else 200
    assert first_line(error, most) == said


def test_printable():
    assert printable("Bär\n\udcff🐶") == "Bär\\n\\udcff🐶"
