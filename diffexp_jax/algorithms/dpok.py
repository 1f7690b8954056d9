"""DPOK: policy gradient with a penalty for leaving the untuned model (Fan et al. 2023, arXiv 2305.16381).

Deviation: the published code keeps a buffer of the last 1,000 states (of 20 images) and draws its updates' states from
there. Here an update of the LoRA is of all states of its share of the iteration's samples, as in DDPO, and the value
function draws from all states of the iteration: what is learnt from is always of the policy that sampled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from diffexp_jax.algorithms.algorithm import Algorithm, Inputs, Needs, Policy, Setup, chunked, first_state
from diffexp_jax.algorithms.policy_gradient import PolicyGradient, Transition, sample, updated
from diffexp_jax.algorithms.policy_settings import PolicyMethod
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.limits import Number, positive, setting, whole
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Trajectory

# Of the value function, as published:
WIDTH = 256  # of its layers
MINIBATCH = 256  # states
WEIGHT_DECAY = 1e-2  # of its AdamW, which is torch's default


def clamped_ratio_loss(
    log_prob: Float[Array, "B"], old_log_prob: Float[Array, "B"], adv: Float[Array, "B"], *, clip: float
) -> Float[Array, ""]:
    """mean of -A clip(rho, 1 - clip, 1 + clip), rho = p / p_old: no learning outside the clip, on either side."""
    chex.assert_equal_shape((log_prob, old_log_prob, adv))
    ratio = jnp.exp(log_prob - old_log_prob)
    return (-adv * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)).mean()


def divergence(out: Float[Array, "B h w c"], untuned: Float[Array, "B h w c"]) -> Float[Array, ""]:
    """The KL between the steps of the tuned and the untuned model, but for a factor that depends on t.

    Two Gaussians of one std are |mu - mu_0|^2 / (2 std^2) apart, and mu is linear in the network's output: so the
    published code penalises mean |eps - eps_0|^2, without that factor, and we do.
    """
    chex.assert_equal_shape((out, untuned))
    return jnp.square(out - untuned).mean()


# ------------------------------------------------------------------------------------------------------ value function


def init_value(key: jax.Array, n_inputs: int, n_prompts: int, n_steps: int) -> dict[str, Any]:
    """Parameters of `value`. Weights as xavier_normal, the factors of steps uniform in 0..1, as published."""
    layers, widths = [], (n_inputs + WIDTH, WIDTH, WIDTH, WIDTH)
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        kernel, factor = jax.random.split(jax.random.fold_in(key, i))
        layers.append(
            {
                "kernel": jax.nn.initializers.glorot_normal()(kernel, (before, after)),
                "bias": jnp.zeros(after),
                "factor": jax.random.uniform(factor, (n_steps, after)),
            }
        )
    last, prompts = jax.random.split(jax.random.fold_in(key, len(layers)))
    return {
        "prompt": jax.random.normal(prompts, (n_prompts, WIDTH)),
        "layers": layers,
        "last": {"kernel": jax.nn.initializers.glorot_normal()(last, (WIDTH, 1)), "bias": jnp.zeros(1)},
    }


def value(
    params: Any, x_t: Float[Array, "B h w c"], prompt_id: Int[Array, "B"], i: Int[Array, ""]
) -> Float[Array, "B"]:
    """The reward that is expected of a chain that is at x_t before step i (0-based).

    The published network, with a learned vector for each prompt in place of the prompt's CLIP features.
    """
    x = jnp.concatenate([x_t.reshape(len(x_t), -1), params["prompt"][prompt_id]], axis=1)
    for layer in params["layers"]:
        x = jax.nn.relu(layer["factor"][i] * (x @ layer["kernel"] + layer["bias"]))
    return (x @ params["last"]["kernel"] + params["last"]["bias"])[:, 0]


def values(params: Any, trajectory: Trajectory, prompt_id: Int[Array, "chunks m"]) -> Float[Array, "chunks T m"]:
    """Of every state of the chains."""
    i = jnp.arange(trajectory.x_tm1.shape[1])

    def of_chunk(kept, prompt_id):
        return jax.vmap(lambda i: value(params, kept.x_t(i), prompt_id, i))(i)

    return jax.vmap(of_chunk)(trajectory, prompt_id)


def decaying_adam(lr: float) -> optax.GradientTransformation:
    """optax.adamw with a state of two parts, as optax.adam's: older checkpoints, written without decay, fit it."""

    def step(updates, params):
        return jax.tree.map(lambda u, p: -lr * (u + WEIGHT_DECAY * p), updates, params)

    return optax.chain(optax.scale_by_adam(), optax.stateless(step))


def shares_drawn(key: jax.Array, n_states: int, *, n_batches: int) -> Float[Array, "n_states"]:
    """What share of `n_batches` random minibatches each state is; a state is in a minibatch once at most.

    So a mean over states by these weights is the mean over the minibatches, whose gradients are accumulated.
    """
    size = min(n_states, MINIBATCH)

    def draw(count, key):
        return count.at[jax.random.permutation(key, n_states)[:size]].add(1.0), None

    count, _ = jax.lax.scan(draw, jnp.zeros(n_states), jax.random.split(key, n_batches))
    return count / (n_batches * size)


def own_shares(
    key: jax.Array, shape: tuple[int, int, int], *, n_batches: int, group: int = 1
) -> Float[Array, "chunks T m"]:
    """`shares_drawn` of this device's states [chunks, T, m]: they are drawn from those of all devices."""
    (chunks, n_steps, m), devices = shape, jax.lax.psum(1, AXIS)
    shares = shares_drawn(key, chunks * m * devices * n_steps, n_batches=n_batches)
    own = shares.reshape(-1, devices, group, n_steps)[:, jax.lax.axis_index(AXIS)]  # see `across_devices`
    return own.reshape(chunks, m, n_steps).swapaxes(1, 2)


def fit_value(
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    trajectory: Trajectory,
    prompt_id: Int[Array, "chunks m"],
    rewards: Float[Array, "chunks m"],
    key: jax.Array,
    *,
    n_steps: int,
    n_batches: int,
    group: int,
) -> tuple[Any, Any, Float[Array, ""]]:
    """`n_steps` optimizer steps on the mean squared error, each over `n_batches` random minibatches of states.

    Returns:
      Parameters, optimizer state, the first step's error.
    """
    shape = prompt_id.shape[0], trajectory.x_tm1.shape[1], prompt_id.shape[1]

    def error(params, shares):
        return (shares * jnp.square(values(params, trajectory, prompt_id) - rewards[:, None])).sum()

    def one(carry, key):
        params, opt_state = carry
        shares = own_shares(key, shape, n_batches=n_batches, group=group)
        loss, grads = jax.lax.psum(jax.value_and_grad(error)(params, shares), AXIS)
        change, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), loss

    (params, opt_state), losses = jax.lax.scan(one, (params, opt_state), jax.random.split(key, n_steps))
    return params, opt_state, losses[0]


class Extra(struct.PyTreeNode):
    """What DPOK carries besides the LoRA: the value function and its optimizer's state."""

    value: Any
    opt_state: Any


def less_expected(
    optimizer: optax.GradientTransformation,
    extra: Extra,
    trajectory: Trajectory,
    prompt_id: Int[Array, "chunks m"],
    rewards: Float[Array, "chunks m"],
    key: jax.Array,
    **options: int,
) -> tuple[Float[Array, "chunks T m"], Extra, dict[str, Array]]:
    """Rewards less what is expected of each state, after the value function was fitted to them; next Extra, metrics.

    Options are those of `fit_value`.
    """
    args = optimizer, extra.value, extra.opt_state, trajectory, prompt_id, rewards, key
    params, opt_state, error = fit_value(*args, **options)
    weight = rewards[:, None] - values(params, trajectory, prompt_id)
    return weight, Extra(params, opt_state), {"value/error": error}


# ----------------------------------------------------------------------------------------------------------- algorithm


def dpok(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    n_prompts: int,
    n_steps: int,
    n_updates: int,
    n_chunks: int,
    inner_epochs: int,
    clip: float,
    reward_weight: float,
    kl_weight: float,
    value_baseline: bool,
    value_lr: float,
    value_steps: int,
    value_batches: int,
    value_key: jax.Array,
    old_log_prob: str = "sampled",
    n_trained: int | None = None,
    confined: bool = False,
    group: int = 1,
) -> Algorithm:
    """Makes the algorithm: the loss is reward_weight times `clamped_ratio_loss`, and kl_weight times `divergence`.

    Args:
      n_prompts, n_steps: of the prompt set and of sampling, for the value function.
      n_updates, n_chunks, inner_epochs, clip: as of `ddpo`.
      value_baseline: whether an advantage is the reward less `value`, or the reward itself.
      value_lr, value_steps, value_batches: of AdamW; its steps an iteration, before the LoRA's; minibatches a step.
      value_key: of the value function's first parameters.
      old_log_prob: what the ratio is relative to, see `several_updates`.
      n_trained, confined, group: see `sample` and `Setup`.
    """
    value_optimizer = decaying_adam(value_lr)

    def init(lora) -> TrainState:
        extra = None
        if value_baseline:
            params = init_value(value_key, math.prod(policy.latent_shape), n_prompts, n_steps)
            extra = Extra(params, value_optimizer.init(params))
        return first_state(optimizer, lora, extra)

    def loss(log_prob, outputs, step: Transition):
        gain, kl = clamped_ratio_loss(log_prob, step.old_log_prob, step.weight, clip=clip), divergence(*outputs)
        return reward_weight * gain + kl_weight * kl, {"distance/untuned": kl}

    rule = PolicyGradient(policy, optimizer, loss, reference=lambda extra: None)  # the untuned model
    updates = dict(clip=clip, n_updates=n_updates, inner_epochs=inner_epochs, old_log_prob=old_log_prob)

    def update(state, frozen, inputs: Inputs):
        samples = inputs.samples
        rewards, prompt_id = chunked((samples.rewards, inputs.batch.prompt_id), n_chunks)  # [chunks, m]
        weight, extra, metrics = rewards, None, {}
        if value_baseline:
            args = value_optimizer, state.extra, samples.trajectory, prompt_id, rewards, inputs.key
            weight, extra, metrics = less_expected(*args, n_steps=value_steps, n_batches=value_batches, group=group)
        state, more = updated(rule, state, frozen, samples, weight, extra, **updates)
        return state, metrics | more

    return Algorithm(init, partial(sample, policy, n_chunks=n_chunks, n_trained=n_trained, confined=confined), update)


@dataclass(frozen=True, kw_only=True)
class DPOK(PolicyMethod):
    """DPOK: policy gradient with a penalty for leaving the untuned model (Fan et al. 2023)."""

    name: ClassVar[str] = "dpok"
    needs: ClassVar[Needs] = Needs(step_noise=True)
    reward_weight: float = setting(10.0, "factor of the policy gradient's loss", Number(0.0, 1e6))
    kl_weight: float = setting(0.01, "factor of the penalty for leaving the untuned model", Number(0.0, 1e6))
    value_baseline: bool = setting(True, "whether a value function is subtracted from the reward")
    value_lr: float = setting(1e-4, "learning rate of the value function (AdamW, weight decay 0.01)", positive(1.0))
    value_steps: int = setting(
        1, "AdamW steps of the value function each iteration; published: one for 10 images", whole(1, 10**4)
    )
    value_batches: int = setting(
        5, "minibatches of 256 random states that each gradient of the value function is the mean over", whole(1, 10**4)
    )

    @property
    def learns_of_each_step(self) -> bool:
        return self.value_baseline

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        share = self.inner_epochs * self.trained_share(n_steps)
        return super().passes(n_steps, full_float32) | {"of the untuned model": share}

    def make(self, setup: Setup) -> Algorithm:
        return dpok(
            setup.policy,
            setup.optimizer,
            **self.keywords(setup),
            n_steps=setup.n_steps,
            reward_weight=self.reward_weight,
            kl_weight=self.kl_weight,
            value_baseline=self.value_baseline,
            value_lr=self.value_lr,
            value_steps=self.value_steps,
            value_batches=self.value_batches,
            value_key=setup.stream("value"),
        )
