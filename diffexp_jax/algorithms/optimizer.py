"""How the LoRA is updated: AdamW on the clipped gradient, the learning rate over a run, the LoRA's moving average."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffexp_jax.algorithms.state import Averaged


def make_optimizer(optim: Any, n_updates: int) -> optax.GradientTransformation:
    """The optimizer that the config's section `optim` describes, of a run with so many updates."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(optim.grad_clip),
        optax.adamw(
            learning_rate(optim, n_updates), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay
        ),
    )
    return averaged(optimizer, optim.ema) if optim.ema else optimizer


def learning_rate(optim: Any, n_updates: int) -> float | optax.Schedule:
    """The rate, or its schedule: it rises linearly from 0 over `warmup` updates, then follows `schedule` to the end.

    As diffusers' get_scheduler: the first update of a warm-up has a rate of 0.
    """
    rest = n_updates - optim.warmup
    schedules = {
        "constant": optim.lr,
        "linear": optax.linear_schedule(optim.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(optim.lr, rest),
    }
    after = schedules[optim.schedule]
    if not optim.warmup:
        return after
    after = after if callable(after) else optax.constant_schedule(after)
    return optax.join_schedules([optax.linear_schedule(0.0, optim.lr, optim.warmup), after], [optim.warmup])


def decay_at(n: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Of the moving average at update n (from 0): min(decay, (1 + n) / (10 + n)), as in flow_grpo and diffusers.

    So the first updates' average follows the weights, and does not stay at where they began.
    """
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Adds the weights' moving average to an optimizer's state: a <- d a + (1 - d) w after each update."""

    def init(params) -> Averaged:
        return Averaged(optimizer.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))

    def update(grads, state: Averaged, params):
        change, inner = optimizer.update(grads, state.inner, params)
        d, new = decay_at(state.n, decay), optax.apply_updates(params, change)
        average = jax.tree.map(lambda a, w: d * a + (1.0 - d) * w, state.average, new)
        return change, Averaged(inner, average, state.n + 1)

    return optax.GradientTransformation(init, update)


def with_new_moments(opt_state: Any) -> Any:
    """The optimizer's state with Adam's moments as at first; the learning rate's schedule and the average go on."""
    return jax.tree.map(lambda x: jax.tree.map(jnp.zeros_like, x) if is_adam(x) else x, opt_state, is_leaf=is_adam)


def gradient_snr(opt_state: Any, *, b1: float, b2: float) -> dict[str, Float[Array, ""]]:
    """{"grad_snr": sum of m^2 / sum of v}, of Adam's two moments without their bias, over all of the LoRA.

    m / sqrt(v) is what Kingma & Ba (2015, section 2.1) call the signal-to-noise ratio. The square is 1 where the newest
    gradients all agree, and (1 - b1) / (1 + b1) = 0.05 where they are noise. It is of clipped gradients, as the moments
    are. Empty for an optimizer without these moments.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(x)]
    if not found:
        return {}
    adam = found[0]
    m = optax.tree.bias_correction(adam.mu, b1, adam.count)
    v = optax.tree.bias_correction(adam.nu, b2, adam.count)
    signal, all_of_it = optax.tree.norm(m, squared=True), optax.tree.sum(v)
    return {"grad_snr": jnp.where(all_of_it > 0.0, signal / all_of_it, 0.0)}


def is_adam(x: Any) -> bool:
    """Whether it is Adam's part of an optimizer's state."""
    return isinstance(x, optax.ScaleByAdamState)
