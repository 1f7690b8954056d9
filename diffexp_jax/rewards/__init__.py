"""Rewards: what fine-tuning maximises, and what evaluation reports. Built in by name (`REWARDS`).

To add a reward, write a file beside this one whose `load(folder, dtype=...)` returns a `Reward`, and enter it
in `REWARDS`.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import InputError
from diffexp_jax.rewards import aesthetic, judge, pickscore
from diffexp_jax.rewards.preprocess import check_images
from diffexp_jax.rewards.reward import Reward

__all__ = ["REWARDS", "Reward", "check_images", "load_reward"]

# Loaders: of the folder of a reward's weights, and dtype=.
REWARDS: dict[str, Callable[..., Reward]] = {
    "pickscore": pickscore.load,
    "aesthetic": aesthetic.load,
    "emoji_pickscore": pickscore.load,
    "emoji_aesthetic": lambda folder, **kwargs: aesthetic.load(folder, clip=folder.parent / "reward_clip", **kwargs),
    "emoji_judge": judge.load,
}

# Weights that the package ships: these rewards need no path.
_ASSETS = Path(__file__).parents[1] / "emoji" / "assets"
_SHIPPED = {
    "emoji_pickscore": _ASSETS / "reward_clip",
    "emoji_aesthetic": _ASSETS / "aesthetic",
    "emoji_judge": _ASSETS / "judge",
}


def load_reward(spec: str, *, dtype: DTypeLike = jnp.float32) -> Reward:
    """Loads a reward by "name" or "name:path".

    Args:
      spec: a name in `REWARDS`, and where its weights are unless the package ships them.
      dtype: of the weights and of the networks' arithmetic; rewards are float32 all the same.

    Raises:
      InputError: an unknown name, no path where one is needed, or files that are missing or do not fit.
    """
    name, _, path = spec.partition(":")
    if name not in REWARDS:
        raise InputError(f"unknown reward {name!r}; accepted: {', '.join(REWARDS)}, each also as NAME:FOLDER")
    if not path and name not in _SHIPPED:
        raise InputError(f"reward {name!r} needs the folder of its weights: {name}:FOLDER")
    folder = Path(path) if path else _SHIPPED[name]
    if not folder.is_dir():
        raise InputError(f"reward {name!r}: {folder}: the folder is missing")
    return REWARDS[name](folder, dtype=dtype)
