"""What the methods share that follow the reward's gradient through the sampling chain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffexp_jax.algorithms.algorithm import (
    SAMPLE,
    SAMPLE_WITH_GRADIENT,
    Algorithm,
    Batch,
    Inputs,
    Method,
    Needs,
    Policy,
    chunked,
    first_state,
    stepped,
    unchunked,
)
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import Number, setting
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Steps, differentiable, fixed, initial_latents, moved, rollout, start_of

# (LoRA, frozen arrays, a chunk of the batch, steps, live steps) -> the loss, and (rewards, parts, {metric: [B]})
Loss = Callable[[Any, Any, Batch, Steps, Array], tuple[Array, tuple[Array, dict[str, Array], dict[str, Array]]]]


def sampled(
    policy: Policy,
    lora: Any,
    frozen: Any,
    chunk: Batch,
    steps: Steps,
    live: Bool[Array, "T"],
    *,
    remat: bool,
    input_gradient: bool = True,
    kl_weight: float = 0.0,
    reference: Any = None,
) -> tuple[Float[Array, "B h w c"], Float[Array, ""], dict[str, Float[Array, "B"]]]:
    """The chain whose gradient is followed: (x_0, what the loss is to have added, metrics of the samples).

    The second is kl_weight times the mean over the samples of the KL between the paths of the tuned model and a
    reference, KL(p || p_ref) = sum_t |mu - mu_ref|^2 / (2 sigma_t^2), both at the tuned model's x_t and under the same
    guidance (Uehara et al. 2024a, b; a mean over a latent's numbers, see `sampling.rollout`), and where the mean m of
    x_T is learnt, of that between N(m, 1) and N(0, 1). Where there is a weight, a step costs one more pass of the
    network, and a live one another in the backward pass.

    Args:
      live, remat, input_gradient: see `sampling.rollout` and `sampling.differentiable`.
      reference: the LoRA of the reference, which has no gradient; None: the untuned model.
    """
    options = {"remat": remat, "input_gradient": input_gradient}
    denoise, other = differentiable(policy.network, frozen, lora, **options), None
    if kl_weight:
        other = differentiable(policy.network.map(fixed), (frozen, reference), None, **options)
    x_T = moved(initial_latents(chunk.key, policy.latent_shape), lora)
    x_0, kl = rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key, live=live, reference=other)
    if kl is None:
        return x_0, jnp.zeros(()), {}
    seen = {"kl/path": kl.sum(0)}
    if (mean := start_of(lora)) is not None:  # KL(N(m, 1) || N(0, 1)) = m^2 / 2, a mean over the numbers as the path's
        seen["kl/start"] = jnp.full(len(x_0), jnp.square(mean).mean() / 2)
    return x_0, kl_weight * sum(seen.values()).mean(), seen


def short_of(target: float | None, rewards: Float[Array, "B"]) -> Float[Array, "B"]:
    """|target - r|, or -r where there is no target: what is to become small."""
    return -rewards if target is None else jnp.abs(target - rewards)


def reward_gradient(
    optimizer: optax.GradientTransformation,
    loss: Loss,
    live_steps: Callable[[PRNGKeyArray, int], Array],
    *,
    n_chunks: int,
) -> Algorithm:
    """An algorithm whose update is one step against the loss' gradient, and that samples in its course.

    Args:
      live_steps: (key of the iteration, T) -> [T], the steps whose network outputs carry gradient.
      n_chunks: forward passes that a device's samples are split into; their gradients are averaged.
    """

    def init(lora) -> TrainState:
        return first_state(optimizer, lora)

    def update(state, frozen, inputs: Inputs):
        live = live_steps(inputs.key, len(inputs.steps.t))
        value, grads, (rewards, parts, more) = gradient_over_chunks(
            lambda lora, chunk: loss(lora, frozen, chunk, inputs.steps, live), state.lora, inputs.batch, n_chunks
        )
        value, grads, more = jax.lax.pmean((value, grads, jax.tree.map(jnp.mean, more)), AXIS)
        state, metrics = stepped(optimizer, state, value, grads, (rewards, parts))
        return state, metrics | more | {"truncation/k": live.sum()}

    return Algorithm(init, None, update)


def gradient_over_chunks(
    loss: Callable[[Any, Any], tuple[Array, Any]], lora: Any, batch: Any, n_chunks: int
) -> tuple[Array, Any, Any]:
    """Mean over the chunks of loss(lora, chunk)[0] and of its gradient in `lora`, and all of loss(lora, chunk)[1].

    A scan that holds one chunk's work at a time; the second results keep the samples' order.
    """

    def one(total, chunk):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(lora, chunk)
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, lora))
    total, aux = jax.lax.scan(one, start, chunked(batch, n_chunks))
    return *jax.tree.map(lambda x: x / n_chunks, total), unchunked(aux)


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Method):
    """A method by the reward's gradient through the sampling chain."""

    needs: ClassVar[Needs] = Needs(reward_gradient=True)
    kl_weight: float = setting(
        0.0,
        "factor of the KL between the tuned and the untuned model's paths, in the loss; 0: none",
        Number(0.0, 1e6),
        about="""
        Holds back what over-optimises the reward (Uehara et al. 2024a, b; SEIKO's code has 0.01 beside AlignProp's
        coefficient of 0.01). It is a sum over the steps, a mean over a latent's numbers, and needs sampling.eta above
        0. A step then runs a second network, the untuned one.
        """,
    )

    @property
    def noise_is_for(self) -> str:
        return f"{self.name}.kl_weight" if self.kl_weight else ""

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        live = self.live_share(n_steps)
        return chain_passes(live) | ({"of the untuned model": 1.0} if self.kl_weight else {})

    def live_share(self, n_steps: int) -> float:
        """The share of a chain's steps whose network outputs carry gradient, in the mean over the iterations."""
        raise NotImplementedError


def chain_passes(live: float) -> dict[str, float]:
    """The passes of a chain of which this share carries gradient."""
    return {name: share for name, share in ((SAMPLE, 1.0 - live), (SAMPLE_WITH_GRADIENT, live)) if share}
