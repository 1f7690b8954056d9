"""Rewards: what fine-tuning maximises, and what evaluation reports. Built in by name (`REWARDS`).

To add a reward, write a file beside this one whose `load(path, dtype=...)` returns a `Reward`, and enter it
in `REWARDS`. A spec says which are wanted: NAME, NAME:PATH, textnorm(NAME:PATH), and several joined by "+".
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import InputError
from diffexp_jax.rewards import aesthetic, hpsv2, imagereward, judge, pickscore
from diffexp_jax.rewards.ensemble import ensemble
from diffexp_jax.rewards.official import make_official_scorer
from diffexp_jax.rewards.preprocess import check_images
from diffexp_jax.rewards.reward import Reward
from diffexp_jax.rewards.shapes import SHAPES
from diffexp_jax.rewards.textnorm import from_file, swapped, textnorm

__all__ = ["REWARDS", "Reward", "check_images", "load_reward", "make_official_scorer", "reward_name"]


def _emoji_aesthetic(folder: Path, *, dtype: DTypeLike = jnp.float32) -> Reward:
    return aesthetic.load(folder, clip_folder=folder.parent / "reward_clip", dtype=dtype)


# Loaders: of the file or folder of a reward's weights, and dtype=.
REWARDS: dict[str, Callable[..., Reward]] = {
    "pickscore": pickscore.load,
    "pickscore_26": partial(pickscore.load, scale="logit/26"),
    "pickscore_cosine": partial(pickscore.load, scale="cosine"),
    "hpsv2": hpsv2.load,
    "aesthetic": aesthetic.load,
    "imagereward": imagereward.load,
    "emoji_pickscore": pickscore.load,
    "emoji_aesthetic": _emoji_aesthetic,
    "emoji_judge": judge.load,
}

# Weights that the package ships: these rewards need no path.
_ASSETS = Path(__file__).parents[1] / "emoji" / "assets"
_SHIPPED = {
    "emoji_pickscore": _ASSETS / "reward_clip",
    "emoji_aesthetic": _ASSETS / "aesthetic",
    "emoji_judge": _ASSETS / "judge",
}

_WRAPPED = re.compile(r"textnorm\((.*)\)")
# between two parts: a "+" may belong to a path (LAION's file is called sac+logos+ava1-l14-linearMSE.pth)
_BETWEEN = re.compile(rf"\+(?=textnorm\(|(?:{'|'.join(REWARDS)})(?:[:+]|$))")


def load_reward(
    spec: str,
    *,
    dtype: DTypeLike = jnp.float32,
    weights: Sequence[float] = (),
    temperature: float = 1.0,
    contrast: str | Path | None = None,
    shapes_only: bool = False,
) -> Reward:
    """Loads a reward by "name", "name:path", "textnorm(name:path)", or several of these joined by "+".

    Args:
      spec: names in `REWARDS`, and where their weights are unless the package ships them.
      dtype: of the weights and of the networks' arithmetic; rewards are float32 all the same.
      weights: of the parts of an ensemble, in its order; none: `ensemble.WEIGHTS`.
      temperature: of textnorm, in the wrapped reward's units.
      contrast: a json file of textnorm's contrastive prompts; None: made by swapping animals and activities.
      shapes_only: where the weights are not there, shapes of the published ones do (`shapes.py`): for a dry run.

    Raises:
      InputError: an unknown name, no path where one is needed, or files that are missing or do not fit.
    """
    specs = _BETWEEN.split(spec)
    names = [reward_name(part) for part in specs]
    if len(set(names)) < len(names):
        raise InputError(f"reward {spec!r}: names a reward twice")
    if weights and len(specs) == 1:
        raise InputError(f"reward {spec!r}: {len(weights)} weights for one reward; wants none")

    def load(part: str) -> Reward:
        if match := _WRAPPED.fullmatch(part):
            others = swapped if contrast is None else from_file(Path(contrast))
            return textnorm(_load_one(match[1], dtype=dtype, shapes_only=shapes_only), others, temperature=temperature)
        return _load_one(part, dtype=dtype, shapes_only=shapes_only)

    rewards = {name: load(part) for name, part in zip(names, specs, strict=True)}
    return rewards[names[0]] if len(specs) == 1 else ensemble(rewards, weights)


def reward_name(spec: str) -> str:
    """What a spec's scores are reported under: "hpsv2:a.pt+textnorm(pickscore:b)" -> "hpsv2+textnorm_pickscore"."""

    def name(part):
        match = _WRAPPED.fullmatch(part)
        return (match[1] if match else part).partition(":")[0], "textnorm_" if match else ""

    return "+".join(prefix + bare for bare, prefix in map(name, _BETWEEN.split(spec)))


def _load_one(spec: str, *, dtype: DTypeLike, shapes_only: bool) -> Reward:
    """The reward of "name" or "name:path"."""
    name, _, place = spec.partition(":")
    if name not in REWARDS:
        raise InputError(
            f"unknown reward {name!r}; accepted: {', '.join(REWARDS)}, each also as NAME:PATH or textnorm(NAME:PATH), "
            "several joined by +"
        )
    if shapes_only and name in SHAPES and not (place and Path(place).exists()):
        return SHAPES[name](dtype)
    if not place and name not in _SHIPPED:
        raise InputError(f"reward {name!r} needs its weights: {name}:PATH")
    path = Path(place) if place else _SHIPPED[name]
    if not path.exists():
        raise InputError(f"reward {name!r}: {path}: no such file or folder")
    return REWARDS[name](path, dtype=dtype)
