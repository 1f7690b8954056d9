"""DiffExp's exploration (Chae et al., AAAI 2025): a guidance schedule and random prompt weighting.

Both change only what a sampler is fed (the guidance per step, the prompt's embedding), so any reward fine-tuning
method takes them as they are.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray


def guidance_schedule(
    t: Num[Array, "T"],
    *,
    w_low: float | Array,
    w_high: float | Array,
    t_thresh: float | Array,
    active: bool | Bool[Array, ""] = True,
) -> Float[Array, "T"]:
    """DiffExp Eq. 7: w(t) = w_low if t > t_thresh else w_high.

    t is in training-timestep units (0..1000), or another measure of the noise that is left (`measured`), and falls
    during sampling, so the low scale comes first: diverse layouts while there is mostly noise, then the prompt. Where
    not `active`, w_high throughout (plain guidance).
    """
    return jnp.where(active & (t > t_thresh), w_low, w_high).astype(jnp.float32)


# What t of Eq. 7 counts
MEASURES = ("timestep", "noise_level", "steps")


def measured(
    t: Num[np.ndarray, "T"], of: str, *, noise_level: Callable[[Num[np.ndarray, "T"]], Float[np.ndarray, "T"]]
) -> Num[np.ndarray, "T"]:
    """How much noise is left at each step, from 1000 to 0, by one of MEASURES.

    "timestep": t itself, which is another amount of noise in each kind of model. "noise_level": 1000 s of x_t =
    c ((1 - s) x_0 + s eps), the same amount in all. "steps": the share of the steps still to come, of 1000.
    """
    if of == "noise_level":
        return 1000.0 * noise_level(t)
    return 1000.0 * np.arange(len(t), 0, -1) / len(t) if of == "steps" else t


def sample_phrase_weights(
    key: PRNGKeyArray, unit_ids: Int[Array, "L"], *, weight_range: tuple[float, float]
) -> Float[Array, "L"]:
    """One draw for one image: a random unit of the prompt gets a random weight, everything else weight 1.

    `unit_ids` numbers the prompt's units (words, tokens or phrases) 1..n token by token; 0 marks the positions that are
    never weighted (start, end, padding). The unit is uniform over 1..n, its weight uniform in `weight_range`; a prompt
    without units ("") gets ones.
    """
    unit_key, weight_key = jax.random.split(key)
    chosen = jax.random.randint(unit_key, (), 1, jnp.maximum(unit_ids.max(), 1) + 1)
    weight = jax.random.uniform(weight_key, (), minval=weight_range[0], maxval=weight_range[1])
    return jnp.where(unit_ids == chosen, weight, 1.0)


def has_weights(n_samples: int, *, share: float) -> Bool[np.ndarray, " N"]:
    """Which samples of an iteration have prompt weights: this share of any that follow each other, hence of a group.

    The others have weights of 1, and the same guidance, as the steps of all samples are taken together. The paper has
    no such share (it is 1 there).
    """
    so_far = np.floor(share * np.arange(n_samples + 1) + 1e-6)  # 1e-6: 0.1 x 30 is less than 3 in floats
    return np.diff(so_far) > 0


def reweight_prompt(
    cond: Float[Array, "L D"], null: Float[Array, "L D"], weights: Float[Array, "L"]
) -> Float[Array, "L D"]:
    """DiffExp Eq. 8: c~_i = null_i + w_i (c_i - null_i), null the text embedding of "".

    Positions of weight 1 keep their c_i bit for bit. Computed in float32, and given in cond's type.
    """
    w, c, n = weights[:, None], cond.astype(jnp.float32), null.astype(jnp.float32)
    return jnp.where(w == 1.0, cond, (n + w * (c - n)).astype(cond.dtype))


def exploring_iterations(n_iterations: int, *, fraction: float) -> int:
    """How many iterations explore, from the first: `fraction` (the paper: 3/4) of fine-tuning, rounded up.

    So every run that explores has an iteration that does: 1 of 1, 6 of 7, 75 of 100. (0.07 x 100 is 7, although the
    product of floats is 7.000000000000001.)
    """
    return math.ceil(round(fraction * n_iterations, 6))
