"""What the methods share that learn from images alone, by the loss of pretraining: no chains, no log-probs of steps.

An image's latent x_0 is noised again, and the network's output there compared with what it is trained to predict. So
any sampler will do, without noise too, and any process: epsilon, v and flow.

The loss sees the conditioning that the image was sampled by, reweighted words included, and where it is guided, the
guidance of the sampler's nearest step: it is of the policy that sampled, as a loss of the steps' log-probs is. With the
plain prompt in its place a constant reward would train too: it would teach the prompt alone what its reweighted words
and guidance make.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num

from diffexp_jax.algorithms.algorithm import (
    Inputs,
    Policy,
    Samples,
    across_devices,
    by_chunks,
    chunked,
    mean_over,
    reward_metrics,
    rewarded,
)
from diffexp_jax.algorithms.by_prompt import of_one_prompt
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Context, Process, Steps, initial_latents, rollout, sample_noise

# Sampling has the first numbers of a sample's key, one a step (`sampling.step_noise`); passes of the update have these
UPDATE = 2**20


class Latents(NamedTuple):
    """What is kept of a sample."""

    x_0: Float[Array, "*chunks B h w c"]
    untuned: Float[Array, "*chunks B h w c"] | None = None  # the untuned model's, of the same prompt and noise


class Chunk(NamedTuple):
    """Samples that one forward pass learns from."""

    latents: Latents
    context: Context  # that they were sampled by
    key: jax.Array  # [B], for this pass over the samples
    weight: Float[Array, "B"]  # an advantage, or a factor of the loss


class Fixed(NamedTuple):
    """What an iteration's updates read and leave alone."""

    frozen: Any
    lora: Any  # before the first update
    extra: Any  # the state's
    steps: Steps  # of the sampler


class Rule(NamedTuple):
    """How a method learns from images.

    `loss(lora, fixed, chunk, i)` is (a scalar, {metric: scalar}) of a chunk at the i-th of its timesteps; followed is
    its mean over timesteps, chunks and devices.
    """

    optimizer: optax.GradientTransformation
    loss: Callable[[Any, Fixed, Chunk, Int[Array, ""]], tuple[Array, dict[str, Array]]]
    n_timesteps: int = 1  # that an image is learnt at, in each pass over the samples


def sample(
    policy: Policy, lora: Any, frozen: Any, batch: Any, steps: Steps, *, n_chunks: int, untuned: bool = False
) -> Samples:
    """Samples and their rewards; of the chains only `Latents` are kept, with the chunks' axis.

    Args:
      lora: what is sampled by.
      untuned: whether the untuned model samples too.
    """

    def one(chunk):
        x_T = initial_latents(chunk.key, policy.latent_shape)

        def run(lora):
            denoise = partial(policy.network, frozen, lora)
            return rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key)[0]

        latents = Latents(run(lora), run(None) if untuned else None)
        return Samples(latents, *rewarded(policy, frozen, latents.x_0, chunk.tokens))

    return by_chunks(one, batch, n_chunks)


# --------------------------------------------------------------------------------------------------------- noise levels


def folded(keys: jax.Array, number: Int[Array, ""] | int) -> jax.Array:
    """A further key for each sample's."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Noised(NamedTuple):
    """Latents at noise levels of their own."""

    x_t: Float[Array, "B h w c"]
    target: Float[Array, "B h w c"]  # what the network is trained to predict there
    row: Any  # `Process.training_row`, each column [B]


def noised(process: Process, x_0: Float[Array, "B h w c"], t: Num[Array, "B"], keys: jax.Array) -> Noised:
    """x_0 with each key's noise, at timesteps t."""
    eps, row = sample_noise(keys, x_0.shape[1:]), process.training_row(t)
    return Noised(process.add_noise(x_0, eps, row), process.target(x_0, eps, row), row)


def guided_as(steps: Steps, row: Any) -> Any:
    """The row with the guidance of the sampler's nearest step."""
    nearest = jnp.abs(steps.t - row.t[:, None]).argmin(1)
    return row._replace(w_t=steps.w_t[nearest])


def uniform_timesteps(keys: jax.Array, process: Process) -> Int[Array, "B"]:
    """One for each key, uniform in 1..n_train - 1."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 1, process.n_train))(keys)


def shuffled_timesteps(keys: jax.Array, steps: Steps, i: Int[Array, ""]) -> Num[Array, "B"]:
    """The i-th of the sampler's timesteps in an order of each key's own; over all i, each comes once."""
    n = len(steps.t)
    return steps.t[jax.vmap(lambda key: jax.random.permutation(key, n)[i])(keys)]


def stratified_timesteps(
    keys: jax.Array, steps: Steps, i: Int[Array, ""], *, n: int, fraction: float
) -> Num[Array, "B"]:
    """One of the i-th part of the sampler's first steps (of `fraction` of them), of which there are n parts."""
    bounds = np.linspace(0, first_steps(len(steps.t), fraction), n + 1).astype(np.int32)
    low, high = jnp.asarray(bounds[:-1])[i], jnp.asarray(bounds[1:])[i]
    return steps.t[jax.vmap(lambda key: jax.random.randint(key, (), low, jnp.maximum(high, low + 1)))(keys)]


def first_steps(n_steps: int, fraction: float) -> int:
    """So many of a sampler's steps, at least one; rounded down, as published."""
    return max(1, int(fraction * n_steps))


class Scales(NamedTuple):
    """What the process says of a noise level x_t = signal x_0 + noise eps, [B]."""

    level: Float[Array, "B"]  # noise / (signal + noise): flow matching's s, and of others that of the same mixture
    x_0: Float[Array, "B"]  # x_0's error by the network's, of an output that is off by 1


def scales(process: Process, row: Any) -> Scales:
    """Found by the process' own functions, which are linear: target = a x_0 + b eps. Flow matching's x_0 is s."""
    one, zero = jnp.ones((*row.t.shape, 1, 1, 1)), jnp.zeros((*row.t.shape, 1, 1, 1))
    (signal, a), (noise, b) = (
        (process.add_noise(*of, row)[:, 0, 0, 0], process.target(*of, row)[:, 0, 0, 0])
        for of in ((one, zero), (zero, one))
    )
    return Scales(noise / (signal + noise), noise / jnp.abs(b * signal - a * noise))


def mean_square(x: Float[Array, "B h w c"]) -> Float[Array, "B"]:
    return jnp.square(x).mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------- updates


def compared(inputs: Inputs, group: int, function: Callable[..., Float[Array, "B"]]) -> Float[Array, "B"]:
    """function(own rewards, who is compared, all rewards), of `by_prompt`; images of a prompt are compared."""
    own = inputs.samples.rewards
    rewards, ids = (across_devices(x, group) for x in (own, inputs.batch.prompt_id))
    return function(own, of_one_prompt(inputs.batch.prompt_id, ids), rewards)


def minibatch_gradient(rule: Rule, lora: Any, fixed: Fixed, minibatch: Chunk) -> tuple[Array, Any, dict[str, Array]]:
    """(loss, its gradient, metrics), means over timesteps, chunks and devices; what is held is one evaluation's."""

    def over_timesteps(chunk):
        def one(i):
            (loss, seen), grads = jax.value_and_grad(rule.loss, has_aux=True)(lora, fixed, chunk, i)
            return (loss, grads, seen), None

        return mean_over(one, jnp.arange(rule.n_timesteps))

    means, _ = mean_over(over_timesteps, minibatch)
    return jax.lax.pmean(means, AXIS)


def updated(
    rule: Rule,
    state: TrainState,
    frozen: Any,
    inputs: Inputs,
    weight: Float[Array, "B"],
    *,
    n_chunks: int,
    n_updates: int,
    inner_epochs: int,
) -> tuple[TrainState, dict[str, Array]]:
    """What `Algorithm.update` returns, once the samples' weights are known; `extra` is as it was.

    An optimizer step for each share of the samples, `inner_epochs` times over, each time with other noise.
    """
    batch, samples = inputs.batch, inputs.samples
    fixed = Fixed(frozen, state.lora, state.extra, inputs.steps)
    chunks = Chunk(samples.trajectory, *chunked((batch.context, batch.key, weight), n_chunks))
    minibatches = chunked(chunks, n_updates)

    def one(state, visit):
        epoch, i = visit
        minibatch = jax.tree.map(lambda x: x[i], minibatches)
        keys = jax.vmap(folded, (0, None))(minibatch.key, UPDATE + epoch)
        loss, grads, seen = minibatch_gradient(rule, state.lora, fixed, minibatch._replace(key=keys))
        change, opt_state = rule.optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, change)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)} | seen
        return state.replace(lora=lora, opt_state=opt_state), metrics

    visits = np.repeat(np.arange(inner_epochs), n_updates), np.tile(np.arange(n_updates), inner_epochs)
    state, found = jax.lax.scan(one, state.replace(iteration=state.iteration + 1), visits)
    metrics = {name: values.mean() for name, values in found.items()} | {"lora_norm": optax.tree.norm(state.lora)}
    return state, metrics | reward_metrics(samples.rewards, samples.parts)


# ------------------------------------------------------------------------------------------------- an average of LoRAs


def rising(step: Int[Array, ""], *, start: int, rate: float, most: float) -> Float[Array, ""]:
    """The decay of an average after so many updates: 0 up to `start`, then rate (step - start), at most `most`."""
    return jnp.clip(rate * (step - start), 0.0, most)


def followed(state: TrainState, name: str, n_updates: int, **numbers: float) -> TrainState:
    """extra[name] <- d extra[name] + (1 - d) lora, d as it is after so many updates in each iteration (`rising`)."""
    d = rising(state.iteration * n_updates, **numbers)
    average = jax.tree.map(lambda a, x: d * a + (1.0 - d) * x, state.extra[name], state.lora)
    return state.replace(extra={name: average})
