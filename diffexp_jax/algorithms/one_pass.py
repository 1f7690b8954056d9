"""The policy gradient in one pass: a sample's gradient is made while it is sampled (LeanGRPO, 2026).

As long as the weights have not moved, the importance ratio is 1 and nothing is clipped, so that the gradient of DDPO's
loss (`ddpo.clipped_ratio_loss`) over N samples of T trained steps is

    -1/N sum_i A_i g_i,   g_i = 1/T sum_t grad log p_theta(x_{t-1} | x_t, c)   of sample i

The advantage A_i is a factor, known when the rewards are; g_i needs no reward. The forward pass of sampling is then the
forward pass of training too: no second one, no stored trajectory, no ratio. What is kept is a gradient per sample.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffexp_jax.algorithms.algorithm import Policy, Samples, chunked, rewarded, unchunked
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Context, Network, Steps, first_noisy, initial_latents, step_noise


def step_and_gradient(
    policy: Policy,
    network: Network,
    frozen: Any,
    lora: Any,
    x_t: Float[Array, "h w c"],
    noise: Float[Array, "h w c"],
    context: Context,
    step: Steps,
    is_trained: Bool[Array, ""] | None,
) -> tuple[Float[Array, "h w c"], Any]:
    """(x_{t-1}, gradient in `lora` of its mean log-prob) of one sample, whose arrays have no batch axis.

    A step that is not trained has a gradient of zeros, which is not made; None: every step is.

    The log-prob's slope in the mean is (x_{t-1} - mean) / std^2, divided by the latent's size: noise / std.
    """

    def mean_and_std(lora):
        x = x_t[None]
        out = network(frozen, lora, x, step, jax.tree.map(lambda leaf: leaf[None], context))
        mean, std = policy.process.transition(x, out, step)
        return mean[0], std

    mean, pull_back, std = jax.vjp(mean_and_std, lora, has_aux=True)

    def run():
        return pull_back(noise / (std * math.prod(x_t.shape)))[0]

    nothing = jax.tree.map(jnp.zeros_like, lora)
    gradient = run() if is_trained is None else jax.lax.cond(is_trained, run, lambda: nothing)
    return mean + std * noise, gradient


def sample_with_gradients(
    policy: Policy,
    state: Any,
    frozen: Any,
    batch: Any,
    steps: Steps,
    *,
    n_chunks: int,
    n_trained: int | None = None,
    confined: bool = False,
) -> Samples:
    """A method's `Algorithm.sample`; a sample has its gradient in place of its chain.

    That is of its first `n_trained` steps, or where `confined` of so many from the first that adds noise.
    """
    n_steps = len(steps.t)
    n_trained = n_trained or n_steps
    start = first_noisy(steps) if confined else 0

    def one(chunk):
        x_T = initial_latents(chunk.key, policy.latent_shape)

        def body(carry, xs):
            x_t, total = carry
            i, step = xs
            noise = step_noise(chunk.key, i, policy.latent_shape)
            is_trained = (i >= start) & (i < start + n_trained) if n_trained < n_steps else None

            def each(network):
                one = partial(step_and_gradient, policy, network, frozen, state.lora, step=step, is_trained=is_trained)
                return jax.vmap(one)(x_t, noise, chunk.context)

            x_tm1, gradients = policy.network.at(step, each)
            return (x_tm1, jax.tree.map(jnp.add, total, gradients)), None

        nothing = jax.tree.map(lambda x: jnp.zeros((len(x_T), *x.shape)), state.lora)
        (x_0, total), _ = jax.lax.scan(body, (x_T, nothing), (jnp.arange(n_steps), steps))
        gradients = jax.tree.map(lambda x: x / n_trained, total)
        return Samples(None, *rewarded(policy, frozen, x_0, chunk.tokens), gradients)

    return unchunked(jax.lax.map(one, chunked(batch, n_chunks)))


def gradient_of_loss(gradients: Any, adv: Float[Array, "B"]) -> Any:
    """-1/N sum_i A_i g_i over the samples of all devices."""

    def weighted(g):
        return -jnp.einsum("b,b...->...", adv, g, precision=jax.lax.Precision.HIGHEST) / len(adv)

    return jax.lax.pmean(jax.tree.map(weighted, gradients), AXIS)
