"""Rewards: what fine-tuning maximises, and what evaluation reports. Built in by name (`BUILTINS`), one file a kind.

To add a reward, write a file beside this one with a table `BUILTINS` of its names, and enter that in the table below.
Users' own need no entry: jax:MODULE:FUNCTION and python:MODULE:FUNCTION (see `functions.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import paths
from diffexp_jax.errors import InputError, did_you_mean
from diffexp_jax.formats import files
from diffexp_jax.models.precision import in_precision
from diffexp_jax.rewards import aesthetic, clip_similarity, functions, hpsv2, imagereward, jpeg, judge, pickscore, spec
from diffexp_jax.rewards.ensemble import ensemble
from diffexp_jax.rewards.host import host_reward
from diffexp_jax.rewards.reward import Builtin, Cutting, Reward, flattened
from diffexp_jax.rewards.spec import Spec
from diffexp_jax.rewards.textnorm import from_file, swapped, textnorm

__all__ = ["BUILTINS", "Builtin", "Reward", "Spec", "check_reward", "check_trusted", "load_reward"]
__all__ += ["parsed_spec"]

BUILTINS: dict[str, Builtin] = {
    **pickscore.BUILTINS,
    **hpsv2.BUILTINS,
    **aesthetic.BUILTINS,
    **imagereward.BUILTINS,
    **clip_similarity.BUILTINS,
    **judge.BUILTINS,
    **jpeg.BUILTINS,
}


def parsed_spec(text: str | Spec) -> Spec:
    """What a user wrote for a reward, in parts (see `spec.py`); of one that is parsed, that one."""
    return text if isinstance(text, Spec) else spec.parse(text, BUILTINS)


def load_reward(
    text: str | Spec,
    *,
    dtype: DTypeLike = jnp.float32,
    weights: Sequence[float] = (),
    temperature: float = 1.0,
    contrast: str | Path | None = None,
    uncertainty: float = 0.0,
    timeout: float = 600.0,
    workers: int = 4,
    shapes_only: bool = False,
) -> Reward:
    """Loads what a spec asks for (see `spec.py`).

    Args:
      text: names in `BUILTINS`, and where their weights are unless the package ships them: a path, or
        hub:ORGANISATION/NAME.
      dtype: of the weights and of the networks' arithmetic; rewards are always float32. Networks in float32
        multiply in full float32 on any device.
      weights: of the parts of a sum, in its order; none: those of `BUILTINS`, and 1 for a function.
      temperature: of textnorm, in the wrapped reward's units.
      contrast: a json file of textnorm's contrastive prompts; None: made by swapping animals and activities.
      uncertainty: of a sum of textnorm(...) alone: factor of their variance, which is subtracted from their mean.
      timeout, workers: seconds and threads of a reward that is plain Python, see `host_reward`.
      shapes_only: where the weights are not there, shapes of the published ones do: for a dry run.

    Raises:
      InputError: an unknown name, no path where one is needed, or files that are missing or do not fit.
    """
    text, parts = parsed_spec(text)
    names = [part.reported for part in parts]
    if len(set(names)) < len(names):
        raise InputError(f"reward {text!r}: names a reward twice")
    if weights and len(parts) == 1:
        raise InputError(f"reward {text!r}: {len(weights)} weights for one reward; wants none")

    def load(part: spec.Part) -> Reward:
        reward = _load_one(part, dtype=dtype, timeout=timeout, workers=workers, shapes_only=shapes_only)
        on_white, prepare = part.name in BUILTINS and BUILTINS[part.name].on_white, reward.prepare
        reward = reward._replace(prepare=lambda image: prepare(flattened(image, on_white=on_white)))
        if part.normed:
            others = swapped if contrast is None else from_file(paths.local("contrast", contrast))
            return textnorm(reward, others, temperature=temperature)
        return reward

    rewards = {part.reported: load(part) for part in parts}
    if len(parts) == 1:
        return rewards[names[0]]
    # textnorm's share of 0 to 1 is another unit than its reward's
    usual = [BUILTINS[part.name].weight if part.name in BUILTINS and not part.normed else 1.0 for part in parts]
    if uncertainty and all(part.normed for part in parts):
        return ensemble(rewards, tuple(weights) or [1.0 / len(parts)] * len(parts), uncertainty=uncertainty)
    return ensemble(rewards, tuple(weights) or usual)


def check_reward(text: str | Spec, *, shapes_only: bool = False) -> None:
    """Checks a spec's names and that its files are there, without reading any; arguments as of `load_reward`.

    Raises:
      InputError: an unknown name, no path where one is needed, or nothing at the path.
    """
    for part in parsed_spec(text).parts:
        if part.name not in spec.FUNCTIONS:
            check_part(part, shapes_only=shapes_only)


def check_trusted(texts: Sequence[str | Spec], path: Path, *, trusted: bool) -> None:
    """Checks that specs which a file holds, and nobody typed, import no code.

    Args:
      path: of the file, a run's config.json.
      trusted: whether the user has said that its code may run.

    Raises:
      InputError: a spec names a function, and is not trusted.
    """
    named = [part.bare for text in texts for part in parsed_spec(text).parts if part.name in spec.FUNCTIONS]
    if named and not trusted:
        raise InputError(
            f"{path}: names {', '.join(dict.fromkeys(named))}, code that would be run; add --trust_code if you trust it"
        )


def check_part(part: spec.Part, *, shapes_only: bool) -> None:
    """Checks one part that is no function, before anything is loaded: its name, and that its path is there.

    Raises:
      InputError: an unknown name, no path where one is needed, or nothing at the path.
    """
    if part.name not in BUILTINS:
        raise InputError(
            f"unknown reward {part.name!r}; accepted: {', '.join(BUILTINS)}, each also as NAME:PATH or "
            "textnorm(NAME:PATH), several joined by +; jax:MODULE:FUNCTION, python:MODULE:FUNCTION"
            f"{did_you_mean(part.name, BUILTINS)}"
        )
    builtin = BUILTINS[part.name]
    if builtin.function or _only_shapes(part, shapes_only):
        return
    if not part.location and not builtin.path:
        raise InputError(f"reward {part.name!r} needs its weights: {part.name}:PATH")
    if part.location:
        files.check_location(part.location, what=f"reward {part.bare!r}")


def _only_shapes(part: spec.Part, shapes_only: bool) -> bool:
    """Whether shapes do, and are known, for weights that are not there."""
    there = part.location and paths.local(f"reward {part.bare!r}", part.location).exists()
    return bool(shapes_only and BUILTINS[part.name].shapes and not there)


def _load_one(part: spec.Part, *, dtype: DTypeLike, timeout: float, workers: int, shapes_only: bool) -> Reward:
    if part.name == "jax":
        return functions.from_jax(part.location)
    if part.name == "python":
        return functions.from_python(part.location, timeout=timeout, workers=workers)
    check_part(part, shapes_only=shapes_only)
    builtin = BUILTINS[part.name]
    if builtin.function:
        return host_reward(builtin.function, part.name, timeout=timeout, workers=workers)
    if _only_shapes(part, shapes_only):
        reward = builtin.shapes(dtype)
    else:
        path = files.file_or_folder(part.location, what=f"reward {part.bare!r}") if part.location else builtin.path
        reward = builtin.load(path, dtype=dtype)
    if isinstance(reward.tokenize, Cutting):
        reward = reward._replace(tokenize=reward.tokenize.named(part.bare))
    return reward._replace(
        score=in_precision(reward.score, dtype),
        score_prepared=in_precision(reward.score_prepared, dtype),
        embed=reward.embed and in_precision(reward.embed, dtype),
        features=reward.features and in_precision(reward.features, dtype),
        text_features=reward.text_features and in_precision(reward.text_features, dtype),
        target=builtin.target,
    )
