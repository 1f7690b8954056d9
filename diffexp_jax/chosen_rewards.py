"""The rewards that settings choose: what a run trains on, what it reports, whose features its method reads."""

from typing import Any

import jax
import numpy as np

from diffexp_jax import paths
from diffexp_jax.algorithms import METHODS
from diffexp_jax.errors import InputError
from diffexp_jax.rewards import Reward, Spec, check_reward, load_reward
from diffexp_jax.rewards.reward import Tokens
from diffexp_jax.settings import Settings

_PROMPTS_AT_A_TIME = 64  # that a text encoder reads


def check_files(settings: Settings, *, weights: bool) -> None:
    """Checks, before anything is loaded, that the files of rewards and of the LoRA to start from are there.

    Raises:
      InputError: one is not, or a reward is unknown.
    """
    for spec in settings.reported_rewards:
        check_reward(spec, shapes_only=not weights)
    path = settings.lora.path
    if path is not None and not paths.local("lora.path=", path).exists():
        raise InputError(f"lora.path={path}: no such file or folder")


def load_rewards(settings: Settings, *, weights: bool = True) -> tuple[str, Reward, dict[str, Reward]]:
    """The trained reward's name, that reward, and what evaluation reports by name.

    Where both have the same type, the trained one is also the one that is reported, and loaded once.
    """
    specs, usual, reported = settings.reported_rewards, settings.reward_dtype, settings.eval.reward_dtype
    norm, host = settings.textnorm, settings.host_reward
    options = {
        "shapes_only": not weights,
        "temperature": norm.temperature,
        "contrast": norm.contrast,
        "uncertainty": norm.uncertainty,
    }
    options |= {"timeout": host.timeout, "workers": host.workers}
    if len({spec.name for spec in specs}) < len(specs):
        texts = ", ".join(spec.text for spec in specs)
        raise InputError(f"reward and eval.rewards: two of {texts} have the same name")

    def load(spec: Spec, dtype: str) -> Reward:
        part_weights = settings.reward_weights if spec == settings.trained_reward else ()
        reward = load_reward(spec, weights=part_weights, dtype=dtype, **options)
        return reward if weights else reward._replace(params=_shapes_of(reward.params))

    parts = settings.trained_reward.parts
    if norm.uncertainty and (len(parts) < 2 or not all(part.normed for part in parts)):
        raise InputError(
            f"textnorm.uncertainty={norm.uncertainty}: the reward {settings.reward!r} has no variance among models; "
            "wants several joined by +, each in textnorm(...)"
        )
    trained = load(settings.trained_reward, usual)
    if settings.method.needs.reward_gradient and trained.start:
        others = ", ".join(name for name, method in METHODS.items() if not method.needs.reward_gradient)
        raise InputError(
            f"reward={settings.reward!r}: {settings.algorithm} needs the reward's gradient, and plain Python has none; "
            f"wants algorithm {others}, or a function of JAX: jax:MODULE:FUNCTION"
        )
    once = usual == reported or not settings.eval.every
    rewards = {
        spec.name: trained if once and spec == settings.trained_reward else load(spec, reported) for spec in specs
    }
    return settings.trained_reward.name, trained, rewards


def load_features(settings: Settings, trained: Reward, *, weights: bool = True) -> Reward | None:
    """The reward whose image features the method reads: the trained one, or another; None where it reads none.

    Raises:
      InputError: it has no features.
    """
    if not settings.method.needs.features:
        return None
    name, own = settings.method.features, settings.method.features == "reward"
    reward = trained if own else load_reward(name, dtype=settings.reward_dtype, shapes_only=not weights)
    if reward.features is None:
        raise InputError(
            f"{settings.algorithm}.features={name!r}: {settings.reward if own else name} has no features of images; "
            "wants a reward that has: one by CLIP, as pickscore:PATH, aesthetic:PATH or emoji_pickscore"
        )
    return reward if weights or own else reward._replace(params=_shapes_of(reward.params))


def text_features(settings: Settings, reward: Reward, tokens: Tokens, *, weights: bool = True) -> np.ndarray:
    """What the reward knows of prompts [P F], by its tokens of them; zeros where it has shapes in place of weights.

    Raises:
      InputError: it reads no prompts.
    """
    if reward.text_features is None:
        name, chosen = settings.algorithm, settings.method.features
        raise InputError(
            f"{name}.reads_text=True: the reward of {name}.features={chosen!r} has no features of prompts; wants one "
            "that has: one by CLIP, as pickscore:PATH or emoji_pickscore"
        )
    if not weights:
        shape = jax.eval_shape(reward.text_features, reward.params, tokens)
        return np.zeros(shape.shape, shape.dtype)
    embed, n = jax.jit(reward.text_features), len(jax.tree.leaves(tokens)[0])
    size = min(n, _PROMPTS_AT_A_TIME)
    rows = [np.minimum(np.arange(at, at + size), n - 1) for at in range(0, n, size)]  # one shape, so one program
    parts = [np.asarray(embed(reward.params, jax.tree.map(lambda x, at=at: x[at], tokens))) for at in rows]
    return np.concatenate(parts)[:n]


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
