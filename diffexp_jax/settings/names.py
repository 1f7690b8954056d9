"""What to say of a setting's name that does not exist: the one that is meant, where it can be told."""

import difflib
from collections.abc import Collection

from diffexp_jax.settings.config import flat
from diffexp_jax.settings.settings import Settings

# What other trainers, and the papers, call a setting
_ALSO_KNOWN_AS = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.grad_clip",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "batch_size": "batch.samples",
    "train_batch_size": "batch.samples_per_forward",
    "guidance_scale": "sampling.guidance",
    "w_high": "sampling.guidance",
    "num_steps": "sampling.steps",
    "num_inference_steps": "sampling.steps",
    "num_epochs": "iterations",
    "num_inner_epochs": "ddpo.inner_epochs",
    "clip_range": "ddpo.clip",
    "adv_clip_max": "ddpo.advantage_clip",
    "resolution": "model.image_size",
    "save_freq": "checkpoint.every",
    "pretrained_model_name_or_path": "model.path",
}


def known_keys() -> Collection[str]:
    """The dotted keys of all settings."""
    return flat(Settings()).keys()


def no_such_key(key: str) -> str:
    """The error message about a dotted key that no setting has."""
    near = nearest(key)
    return f"no such key {key!r}" + (f"; did you mean {near!r}?" if near else "")


def nearest(key: str) -> str | None:
    """The setting that is meant: by its own name, by another one, in another section, or mistyped; None: unknown."""
    known, (section, _, leaf) = known_keys(), key.rpartition(".")
    if key in known:
        return key
    if leaf in _ALSO_KNOWN_AS:
        return _ALSO_KNOWN_AS[leaf]
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    mistyped = difflib.get_close_matches(key, known, 1, 0.8)
    leaves = {name.rpartition(".")[2]: name for name in sorted(known) if name.startswith(f"{section}.") or not section}
    close = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    return next(iter([*sorted(elsewhere)[:1], *mistyped, *close]), None)
