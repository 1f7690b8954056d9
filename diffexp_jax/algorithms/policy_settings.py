"""The settings that methods by the steps' log-probs share, and what they come to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffexp_jax import backend
from diffexp_jax.algorithms.algorithm import SAMPLE, WITH_GRADIENT, Method, Setup
from diffexp_jax.limits import positive, setting, whole

# Where the log-probs of the sampling policy come from, see `policy_gradient.several_updates` and below
OLD_LOG_PROBS = ("sampled", "recomputed", "current")
AGREE = 1e-5  # to which a float32 log-prob is the same in two programs on a CPU


@dataclass(frozen=True, kw_only=True)
class PolicyMethod(Method):
    """A method by the log-probs of the steps that were sampled."""

    updates: int = setting(2, "optimizer updates an iteration, each on batch.samples / updates images", whole(1, 4096))
    inner_epochs: int = setting(1, "passes over an iteration's samples", whole(1, 4096))
    clip: float = setting(1e-4, "how far the importance ratio may be from 1", positive())  # a large one clips nothing
    old_log_prob: str = setting(
        "auto",
        "what the importance ratio is relative to",
        ("auto", *OLD_LOG_PROBS),
        about="""
        "sampled": the log-probs of the sampling program. "recomputed": the same by the update program, for one more
        forward pass of all but the first update's samples. "current": each update's own, so that there is no ratio and
        no clip. "auto": "sampled" in float32 on a CPU where the clip is at least 1e-5, else "recomputed"
        (docs/understand/precision.md).
        """,
    )
    timestep_fraction: float = setting(
        1.0,
        "share of the steps that add noise, from the first, that the update learns from",
        positive(1.0),
        about="""
        1: all, as published. DDIM's last but one step, to an image with hardly any noise left, has by far the largest
        gradient and says least about the reward: the fewer the steps, the more so (docs/understand/methods/ddpo.md).
        """,
    )

    @property
    def has_several_updates(self) -> bool:
        """Whether an iteration is more than one optimizer step."""
        return self.updates * self.inner_epochs > 1

    def resolved_old_log_prob(self, full_float32: bool) -> str:
        """What `old_log_prob` comes to on this machine.

        "auto" takes the sampling program's log-probs in float32 on a CPU, where that program and the update's agree to
        1e-5, and recomputed ones elsewhere. Not "current", although in 16 bits rounding changes a log-prob by more than
        an update does, so that about half of the samples are clipped for no reason: with several updates an iteration
        the clip is all that bounds them (docs/understand/precision.md shows the curves). A clip that is smaller than
        what two programs differ by wants recomputed ones everywhere.
        """
        if self.old_log_prob != "auto":
            return self.old_log_prob
        agree = full_float32 and backend.platform() == "cpu" and self.clip >= AGREE
        return "sampled" if agree else "recomputed"

    def trained_steps(self, n_steps: int) -> int:
        """How many of so many steps, all that add noise, are learnt from, at least one."""
        return max(1, round(self.timestep_fraction * n_steps))

    def trained_share(self, n_steps: int) -> float:
        """Of a chain's evaluations, that a pass over the samples takes."""
        return self.trained_steps(n_steps) / n_steps

    def keywords(self, setup: Setup) -> dict[str, Any]:
        """What the function of every such method takes by keyword: the settings above, and the split of the samples."""
        return {
            "n_updates": self.updates,
            "inner_epochs": self.inner_epochs,
            "clip": self.clip,
            "old_log_prob": self.resolved_old_log_prob(setup.full_float32),
            "n_trained": self.trained_steps(setup.n_noisy or setup.n_steps),
            "confined": setup.confined,
            "n_chunks": setup.n_chunks,
            "n_prompts": setup.n_prompts,
            "group": setup.group,
        }

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        """Of the steps that are learnt from; recomputed log-probs are of all but the first minibatch."""
        share = self.trained_share(n_steps)
        recomputed = self.resolved_old_log_prob(full_float32) == "recomputed"
        again = share * (1.0 - 1.0 / self.updates) if recomputed else 0.0
        learning = {WITH_GRADIENT: self.inner_epochs * share}
        return {SAMPLE: 1.0} | learning | ({"for the old log-probs": again} if again else {})
