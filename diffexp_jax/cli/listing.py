"""What there is to choose from: `python -m diffexp_jax.train --list`."""

import textwrap

from diffexp_jax import config_files
from diffexp_jax.algorithms import METHODS
from diffexp_jax.limits import Number, Setting
from diffexp_jax.pipelines import SHIPPED
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.prompts.files import FORMATS
from diffexp_jax.rewards import BUILTINS
from diffexp_jax.settings import Settings, by_key


def methods() -> dict[str, str]:
    """{name: what the method is}."""
    return {name: (method.__doc__ or "").partition("\n")[0] for name, method in METHODS.items()}


def rewards() -> dict[str, str]:
    """{what a user writes for a reward: what it is}."""
    own = {
        "textnorm(REWARD)": "a reward as the softmax over contrastive prompts (Kim et al. 2024)",
        "jax:MODULE:FUNCTION": "your own function in JAX, with a gradient",
        "python:MODULE:FUNCTION": "your own function in plain Python, for methods that need no gradient",
        "REWARD+REWARD": "the weighted sum of several",
    }
    shipped = {name: name if builtin.path or builtin.function else f"{name}:PATH" for name, builtin in BUILTINS.items()}
    return {shipped[name]: builtin.about for name, builtin in BUILTINS.items()} | own


def models() -> dict[str, str]:
    """{NAME of a config's argument model=NAME: what the model is}."""
    places = {name: settings["model.path"] for name, settings in config_files.module("models").MODELS.items()}
    return {name: "shipped with the package" if path in SHIPPED else path for name, path in places.items()} | {
        "(--config.model.path=)": "a folder in diffusers' format, a .safetensors file, or hub:ORGANISATION/NAME",
    }


def prompts() -> dict[str, str]:
    """{name: how many prompts the set has, and the first}."""
    sets = {name: f"{len(prompts)} prompts, such as {prompts.texts[0]!r}" for name, prompts in PROMPTS.items()}
    return sets | {"prompt:TEXT": "a single prompt", "FILE": FORMATS}


def configs() -> dict[str, str]:
    """{name of a config file: what it says of itself}."""
    return {name: (config_files.module(name).__doc__ or "").partition("\n")[0] for name in config_files.names()}


def settings() -> dict[str, str]:
    """{dotted key: what the setting means, its default and the numbers that it may be}."""

    def described(known: Setting) -> str:
        accepted = f"; {known.accepted}" if isinstance(known.accepted, Number) else ""
        return f"{known.meaning} [{known.default!r}{accepted}]"

    return {key: described(known) for key, known, _ in by_key(Settings())}


LISTS = {"configs": configs, "methods": methods, "models": models, "rewards": rewards, "prompts": prompts}
LISTS |= {"settings": settings}


def listing(name: str) -> str:
    """One of LISTS, or "all" but the settings, which are many; for a terminal of 120 columns."""
    names = [key for key in LISTS if key != "settings"] if name == "all" else [name]
    return "\n\n".join(_section(key, LISTS[key]()) for key in names)


def _section(title: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries)) + 4
    lines = [f"  {name:{width - 2}}{text}" for name, text in entries.items()]
    lines = [textwrap.fill(line, 120, subsequent_indent=" " * width, break_on_hyphens=False) for line in lines]
    return "\n".join([f"{title}:", *lines])
