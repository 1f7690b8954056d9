"""Sampling as one `lax.scan` over the steps; the differentiable variant is the same function."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from diffexp_jax.errors import InputError
from diffexp_jax.sampling.gradient import LiveDenoise
from diffexp_jax.sampling.guidance import Context, Denoise, Steps
from diffexp_jax.sampling.process import Process, gaussian_kl, gaussian_log_prob, sample_noise

START = "x_T"  # beside a LoRA's layers: the mean of x_T [h, w, c], where that was learnt (`entropy.start`)


class Trajectory(NamedTuple):
    """A sampled chain and all that produced it, so that it can be scored under the very policy that sampled.

    The x_{t-1} of a step is the x_t of the next: every latent is kept once.
    """

    x_T: Float[Array, "B h w c"]
    x_tm1: Float[Array, "T B h w c"]
    log_prob: Float[Array, "T B"]
    steps: Steps
    context: Context

    def first(self, n: int | None) -> "Trajectory":
        """The first n steps of a chain, noise first; None: all."""
        x_tm1, log_prob, steps = jax.tree.map(lambda x: x[:n], (self.x_tm1, self.log_prob, self.steps))
        return self._replace(x_tm1=x_tm1, log_prob=log_prob, steps=steps)

    def noisy(self, n: int) -> "Trajectory":
        """n steps from the first that adds noise: a chain that begins with the latents of that step."""
        kept = noisy_rows((self.x_tm1, self.log_prob, self.steps), self.steps, n)
        return Trajectory(self.x_t(first_noisy(self.steps)), *kept, self.context)

    def x_t(self, i: Int[Array, ""] | int) -> Float[Array, "B h w c"]:
        """The latents that step i (0-based) begins with."""
        return jnp.where(i == 0, self.x_T, self.x_tm1[i - 1])


def first_noisy(steps: Steps) -> Int[Array, ""]:
    """The number of the first step that adds noise; 0 where none does."""
    return jnp.argmax(steps.sigma_t > 0)


def noisy_rows(tree: Any, steps: Steps, n: int) -> Any:
    """Of arrays [T, ...] the n rows from that of the first step that adds noise."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first_noisy(steps), n), tree)


def initial_latents(keys: jax.Array, shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """x_T for each sample's key."""
    return sample_noise(jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys), shape)


def start_of(lora: Any) -> Float[Array, "h w c"] | None:
    """The mean of x_T that was learnt with a LoRA; None: none was."""
    return lora.get(START) if isinstance(lora, Mapping) else None


def moved(x_T: Float[Array, "B h w c"], lora: Any) -> Float[Array, "B h w c"]:
    """x_T around the mean that was learnt with the LoRA, where one was, of standard normal numbers.

    Raises:
      InputError: the mean is of latents of another size.
    """
    mean = start_of(lora)
    if mean is None:
        return x_T
    if mean.shape != x_T.shape[1:]:
        sizes = f"of latents {mean.shape}, these are {x_T.shape[1:]}"
        raise InputError(f"the LoRA's {START} is {sizes}; wants the image_size that it was trained at")
    return x_T + mean


def check_latents(latents: Any, shape: tuple[int, ...], name: str = "latents") -> None:
    """Raises InputError where a user's starting noise is of another shape; `name` is what it was given by."""
    if np.shape(latents) != shape:
        raise InputError(f"{name}: shape {np.shape(latents)}; wants {shape}: one for each image")


def step_noise(keys: jax.Array, i: Array, shape: tuple[int, ...]) -> Float[Array, "B h w c"]:
    """The noise of step i (0-based) for each sample's key."""
    return sample_noise(jax.vmap(lambda k: jax.random.fold_in(k, i + 1))(keys), shape)


def rollout(
    process: Process,
    denoise: Denoise | LiveDenoise,
    x_T: Float[Array, "B h w c"],
    context: Context,
    steps: Steps,
    keys: jax.Array,
    *,
    live: Bool[Array, "T"] | None = None,
    reference: Denoise | LiveDenoise | None = None,
    keep_trajectory: bool = False,
) -> tuple[Float[Array, "B h w c"], Trajectory | Float[Array, "T B"] | None]:
    """Samples x_0 by the process' steps (stochastic where sigma_t > 0).

    Args:
      keys: one PRNG key per sample; the noise depends on nothing else, so not on how samples are batched.
      live: makes the chain differentiable: the steps at which the network's output carries gradient, which `denoise`
        gets as a fourth argument (`differentiable`). The linear recursion always carries it.
      reference: another network, evaluated at the same x_t: called as `denoise` is. With `live` it is a
        `differentiable` one too (`fixed`). At a step that is not live neither output has a gradient, and so nor has
        their KL: the means are of the same x_t, and differ by the outputs alone.
      keep_trajectory: also return the chain with its log-probs.

    Returns:
      x_0, and with `keep_trajectory` the chain, or with a `reference` each step's KL(p_theta || p_reference) [T, B]
      (`gaussian_kl`), whose sum over the steps is that of the whole paths. Log-probs and KL of steps without noise
      are 0.
    """

    def body(x_t, xs):
        i, step, *live_i = xs
        mean, std = process.transition(x_t, denoise(x_t, step, context, *live_i), step)
        x_tm1 = mean + std * step_noise(keys, i, x_t.shape[1:])
        if keep_trajectory:
            return x_tm1, (x_tm1, gaussian_log_prob(x_tm1, mean, std))
        if reference is None:
            return x_tm1, None
        other, _ = process.transition(x_t, reference(x_t, step, context, *live_i), step)
        return x_tm1, gaussian_kl(mean, other, std)

    columns = (jnp.arange(len(steps.t)), steps)
    x_0, kept = jax.lax.scan(body, x_T, columns if live is None else (*columns, live))
    return x_0, Trajectory(x_T, *kept, steps, context) if keep_trajectory else kept


def transition_log_prob(
    process: Process,
    out: Float[Array, "B h w c"],
    x_t: Float[Array, "B h w c"],
    x_tm1: Float[Array, "B h w c"],
    step: Steps,
) -> Float[Array, "B"]:
    """log p_theta(x_{t-1} | x_t, c) of a transition that was sampled before, from the network's guided output."""
    mean, std = process.transition(x_t, out, step)
    return gaussian_log_prob(x_tm1, mean, std)


def transition_kl(
    process: Process,
    out: Float[Array, "B h w c"],
    other: Float[Array, "B h w c"],
    x_t: Float[Array, "B h w c"],
    step: Steps,
) -> Float[Array, "B"]:
    """KL of the step p(x_{t-1} | x_t, c) by one network's guided output from that by another's; see `gaussian_kl`."""
    (mean, std), (reference, _) = process.transition(x_t, out, step), process.transition(x_t, other, step)
    return gaussian_kl(mean, reference, std)


def step_log_prob(
    process: Process,
    denoise: Denoise,
    x_t: Float[Array, "B h w c"],
    x_tm1: Float[Array, "B h w c"],
    step: Steps,
    context: Context,
) -> Float[Array, "B"]:
    """log p_theta(x_{t-1} | x_t, c) of a transition that was sampled before; runs the network."""
    return transition_log_prob(process, denoise(x_t, step, context), x_t, x_tm1, step)
