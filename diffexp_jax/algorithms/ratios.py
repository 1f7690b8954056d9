"""What a run reports of the importance ratios of its updates."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffexp_jax.parallel import AXIS


def ratio_metrics(log_ratio: Float[Array, "*N T B"], clip: float) -> dict[str, Float[Array, ""]]:
    """What importance ratios look like over all updates, steps, samples and devices.

    The clip fractions are of ratios above 1 + clip ("high") and below 1 - clip ("low"). A ratio that moves with the
    weights does so on both sides; rounding mostly makes old samples less likely. `ratio/log_std_*` is the standard
    deviation of the log-ratio in each third of the steps, noise first: rounding shows at the end, where std is small.
    """
    ratio = jnp.exp(log_ratio)

    def mean(x):
        return jax.lax.pmean(x.mean(), AXIS)

    high, low = mean(ratio > 1.0 + clip), mean(ratio < 1.0 - clip)
    metrics = {
        "ratio/mean": mean(ratio),
        "ratio/max_abs_log": jax.lax.pmax(jnp.abs(log_ratio).max(), AXIS),
        "ratio/clip_fraction": high + low,
        "ratio/clip_fraction_high": high,
        "ratio/clip_fraction_low": low,
        "approx_kl": 0.5 * mean(jnp.square(log_ratio)),
    }
    thirds = np.array_split(np.arange(log_ratio.shape[-2]), 3)
    for name, steps in zip(("early", "middle", "late"), thirds, strict=True):
        its_steps = log_ratio[..., steps, :]
        if its_steps.size:  # fewer steps than thirds
            metrics[f"ratio/log_std_{name}"] = jnp.sqrt(mean(jnp.square(its_steps - mean(its_steps))))
    return metrics
