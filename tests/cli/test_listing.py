"""What there is to choose from, as `--list` prints it."""

import pytest

from diffexp_jax.algorithms import METHODS
from diffexp_jax.cli.listing import LISTS, listing
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.rewards import BUILTINS
from diffexp_jax.settings import Settings, flat


def test_everything_is_listed_and_described():
    text = listing("all")
    for name in ("sd15", "emoji_hard", *METHODS, *BUILTINS, *PROMPTS):
        assert f"  {name}" in text
    for entries in LISTS.values():
        assert all(entries().values())
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", [name for name in LISTS if name != "settings"])
def test_one_list(name):
    assert listing(name) in listing("all")


def test_settings():
    """Those of configs/base.py, with what each means."""
    lines = listing("settings").splitlines()
    keys = flat(Settings()).keys()
    assert {line.split()[0] for line in lines[1:] if line[2] != " "} == keys
    assert "  optim.lr " in listing("settings") and "[0.0003; more than 0, at most 1]" in listing("settings")
