"""The settings that methods by the steps' log-probs share, and what they come to."""

from collections.abc import Mapping
from typing import Any

from diffexp_jax import backend
from diffexp_jax.algorithms.algorithm import Setup
from diffexp_jax.limits import Number, one_of, positive, whole

# Where the log-probs of the sampling policy come from, see `policy_gradient.several_updates` and below
OLD_LOG_PROBS = ("sampled", "recomputed", "current")
# Of the updates, which every such method has. A ratio that nothing clips is a clip that is large.
NUMBERS: dict[str, Number] = {"updates": whole(1, 4096), "inner_epochs": whole(1, 4096), "clip": positive()}
NUMBERS |= {"timestep_fraction": positive(1.0)}


def check_updates(method: str, settings: Mapping[str, Any]) -> None:
    """Raises InputError for the words among those settings."""
    one_of(f"{method}.old_log_prob", settings["old_log_prob"], ("auto", *OLD_LOG_PROBS))


def has_several_updates(settings: Mapping[str, Any]) -> bool:
    """Whether an iteration is more than one optimizer step."""
    return settings["updates"] * settings["inner_epochs"] > 1


def resolved_old_log_prob(settings: Mapping[str, Any], full_float32: bool) -> str:
    """What the setting comes to on this machine.

    "auto" takes the sampling program's log-probs in float32 on a CPU, where that program and the update's agree to
    1e-5, and recomputed ones elsewhere. Not "current", although in 16 bits rounding changes a log-prob by more than an
    update does, so that about half of the samples are clipped for no reason: with several updates an iteration the
    clip is all that bounds them (docs/precision.md shows the curves).
    """
    if settings["old_log_prob"] != "auto":
        return settings["old_log_prob"]
    return "sampled" if full_float32 and backend.platform() == "cpu" else "recomputed"


def trained_steps(settings: Mapping[str, Any], n_steps: int) -> int:
    """How many of a chain's steps are learnt from, at least one."""
    return max(1, round(settings["timestep_fraction"] * n_steps))


def keywords(setup: Setup, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method's function takes by keyword: its settings, those of the updates resolved, and the split."""
    resolved = {"n_updates": settings["updates"], "old_log_prob": resolved_old_log_prob(settings, setup.full_float32)}
    resolved |= {"n_trained": trained_steps(settings, setup.n_steps)}
    rest = {key: x for key, x in settings.items() if key not in ("updates", "old_log_prob", "timestep_fraction")}
    return rest | resolved | {"n_chunks": setup.n_chunks, "n_prompts": setup.n_prompts}


def passes(settings: Mapping[str, Any], n_steps: int, full_float32: bool) -> dict[str, float]:
    """See `Method.passes`: all but the first minibatch are recorded, of the steps that are learnt from."""
    recomputed = resolved_old_log_prob(settings, full_float32) == "recomputed"
    again = 1.0 - 1.0 / settings["updates"] if recomputed else 0.0
    again *= trained_steps(settings, n_steps) / n_steps
    return {"to sample": 1.0} | ({"for the old log-probs": again} if again else {})
