"""Rewards: what fine-tuning maximises, and what evaluation reports. Built in by name (`REWARDS`).

To add a reward, write a file beside this one whose `load(path, dtype=...)` returns a `Reward`, and enter it
in `REWARDS`. A spec says which are wanted: NAME, NAME:PATH, textnorm(NAME:PATH), and several joined by "+"; or the
user's own, jax:MODULE:FUNCTION and python:MODULE:FUNCTION (see `functions.py`).
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import InputError
from diffexp_jax.models import files
from diffexp_jax.models.precision import in_precision
from diffexp_jax.rewards import aesthetic, functions, hpsv2, imagereward, judge, pickscore
from diffexp_jax.rewards.ensemble import ensemble
from diffexp_jax.rewards.preprocess import check_images
from diffexp_jax.rewards.reward import Reward
from diffexp_jax.rewards.shapes import SHAPES
from diffexp_jax.rewards.textnorm import from_file, swapped, textnorm

__all__ = ["REWARDS", "Reward", "check_images", "load_reward", "reward_name"]


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

# Plain Python that the package ships.
_PYTHON = {
    "jpeg_compressibility": "diffexp_jax.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "diffexp_jax.rewards.jpeg:incompressibility",
}

_WRAPPED = re.compile(r"textnorm\((.*)\)")
_NAMES = (*REWARDS, *_PYTHON, "jax", "python")
# between two parts: a "+" may belong to a path (LAION's file is called sac+logos+ava1-l14-linearMSE.pth)
_BETWEEN = re.compile(rf"\+(?=textnorm\(|(?:{'|'.join(_NAMES)})(?:[:+]|$))")


def load_reward(
    spec: str,
    *,
    dtype: DTypeLike = jnp.float32,
    weights: Sequence[float] = (),
    temperature: float = 1.0,
    contrast: str | Path | None = None,
    timeout: float = 600.0,
    workers: int = 4,
    shapes_only: bool = False,
) -> Reward:
    """Loads a reward by "name", "name:path", "textnorm(name:path)", or several of these joined by "+".

    Args:
      spec: names in `REWARDS`, and where their weights are unless the package ships them: a path, or a hub id.
      dtype: of the weights and of the networks' arithmetic; rewards are float32 all the same. Networks in float32
        multiply in full float32 on any device.
      weights: of the parts of an ensemble, in its order; none: `ensemble.WEIGHTS`.
      temperature: of textnorm, in the wrapped reward's units.
      contrast: a json file of textnorm's contrastive prompts; None: made by swapping animals and activities.
      timeout, workers: seconds and threads of a reward that is plain Python, see `host_reward`.
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
        match = _WRAPPED.fullmatch(part)
        bare = match[1] if match else part
        reward = _load_one(bare, dtype=dtype, timeout=timeout, workers=workers, shapes_only=shapes_only)
        if reward.start and spec != bare:
            raise InputError(f"reward {spec!r}: {bare} is plain Python, which wants to be alone: no textnorm(), no sum")
        if match:
            others = swapped if contrast is None else from_file(Path(contrast))
            return textnorm(reward, others, temperature=temperature)
        return reward

    rewards = {name: load(part) for name, part in zip(names, specs, strict=True)}
    return rewards[names[0]] if len(specs) == 1 else ensemble(rewards, weights)


def reward_name(spec: str) -> str:
    """What a spec's scores are reported under: "hpsv2:a.pt+textnorm(pickscore:b)" -> "hpsv2+textnorm_pickscore".

    A function is reported under its own name.
    """

    def name(part):
        match = _WRAPPED.fullmatch(part)
        bare, _, place = (match[1] if match else part).partition(":")
        return ("textnorm_" if match else "") + (place.rpartition(":")[2] if bare in ("jax", "python") else bare)

    return "+".join(map(name, _BETWEEN.split(spec)))


def _load_one(spec: str, *, dtype: DTypeLike, timeout: float, workers: int, shapes_only: bool) -> Reward:
    """The reward of "name", "name:path" or "jax:module:function"."""
    name, _, place = spec.partition(":")
    if name == "jax":
        return functions.from_jax(place)
    if name == "python" or name in _PYTHON:
        return functions.from_python(_PYTHON.get(name, place), timeout=timeout, workers=workers)
    if name not in REWARDS:
        raise InputError(
            f"unknown reward {name!r}; accepted: {', '.join(_NAMES[:-2])}, each also as NAME:PATH or "
            "textnorm(NAME:PATH), several joined by +; jax:MODULE:FUNCTION, python:MODULE:FUNCTION"
        )
    if shapes_only and name in SHAPES and not (place and Path(place).exists()):
        reward = SHAPES[name](dtype)
    elif not place and name not in _SHIPPED:
        raise InputError(f"reward {name!r} needs its weights: {name}:PATH")
    else:
        path = files.file_or_folder(place, what=f"reward {spec!r}") if place else _SHIPPED[name]
        reward = REWARDS[name](path, dtype=dtype)
    return reward._replace(score=in_precision(reward.score, dtype), rate=in_precision(reward.rate, dtype))
