"""What there is to choose from, as `--list` prints it."""

import pytest

from diffexp_jax.algorithms import METHODS
from diffexp_jax.cli.listing import LISTS, listing
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.rewards import BUILTINS


def test_everything_is_listed_and_described():
    text = listing("all")
    for name in ("sd15", "emoji_hard", *METHODS, *BUILTINS, *PROMPTS):
        assert f"  {name}" in text
    for entries in LISTS.values():
        assert all(entries().values())
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", LISTS)
def test_one_list(name):
    assert listing(name) in listing("all")
