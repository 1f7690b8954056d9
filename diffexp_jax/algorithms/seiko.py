"""SEIKO: a reward's gradient by few queries of the reward (Uehara et al. 2024b).

An iteration is a round: the model samples, the true reward is asked for these samples and no others, a network is
fitted to all answers so far (`surrogate.py`), and the model climbs that network's optimistic prediction for some
updates, while a path KL holds it near the model that the round began with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffexp_jax.algorithms import surrogate
from diffexp_jax.algorithms.algorithm import (
    SAMPLE,
    Algorithm,
    Batch,
    Inputs,
    Needs,
    Policy,
    Samples,
    Setup,
    across_devices,
    by_chunks,
    chunked,
    first_state,
    reward_metrics,
    rewarded,
    unchunked,
)
from diffexp_jax.algorithms.alignprop import Pulling, live_steps
from diffexp_jax.algorithms.optimizer import with_new_moments
from diffexp_jax.algorithms.reward_gradient import chain_passes, gradient_over_chunks, sampled, short_of
from diffexp_jax.algorithms.state import Learnt, TrainState
from diffexp_jax.limits import Number, positive, setting, whole
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Steps, initial_latents, rollout

_CLIMB = 2**30  # the samples' keys are folded with it, then with the update's number: its noise is of its own


class Climb(NamedTuple):
    """How a round's updates are made."""

    n_shares: int  # that the samples are split into, an update each
    n_epochs: int  # how often all shares are climbed on
    live: Callable[[PRNGKeyArray, int], Array]  # (key, number of steps) -> those whose outputs carry gradient
    loss_coefficient: float
    reward_target: float | None
    chain: dict[str, Any]  # `reward_gradient.sampled`'s further arguments


def features_of(
    policy: Policy, frozen: Any, images: Float[Array, "B H W 3"], text: Float[Array, "B P"] | None
) -> Float[Array, "B P"]:
    """What the learnt reward reads: the images' features as vectors of length 1, times sqrt(P) those of their prompts.

    Their product, number by number, has about the length 1 too, and its sum is sqrt(P) times their cosine.
    """
    features = unit(policy.features(frozen, images))
    return features if text is None else features * unit(text) * text.shape[-1] ** 0.5


def unit(features: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Vectors of length 1."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def climb_loss(
    policy: Policy,
    climb: Climb,
    frozen: Any,
    reward: Callable[[Array], Array],
    before: Any,
    steps: Steps,
    lora: Any,
    chunk: Batch,
    live: Bool[Array, "T"],
) -> tuple[Array, dict[str, Array]]:
    """(loss, {metric: [B]}) of a chunk; `before` is the LoRA that the round began with."""
    x_0, penalty, seen = sampled(policy, lora, frozen, chunk, steps, live, **climb.chain, reference=before)
    predictions = reward(features_of(policy, frozen, policy.decode(frozen, x_0).clip(0.0, 1.0), chunk.text))
    loss = climb.loss_coefficient * short_of(climb.reward_target, predictions).mean() + penalty
    return loss, seen | {"climb/predicted": predictions}


def climbed(
    optimizer: optax.GradientTransformation,
    climb: Climb,
    loss: Callable,
    state: TrainState,
    inputs: Inputs,
    n_chunks: int,
) -> tuple[Any, Any, dict[str, Array]]:
    """(LoRA, optimizer's state, metrics) after a round's updates, each on new noise of the round's prompts.

    Adam's moments begin anew, as published; the learning rate's schedule goes on.

    Args:
      loss: (LoRA, chunk, live steps) -> (loss, {metric: [B]}).
    """
    shares, n_steps = chunked(inputs.batch, climb.n_shares), len(inputs.steps.t)

    def update(carry, i):
        lora, opt_state = carry
        share = jax.tree.map(lambda x: x[i % climb.n_shares], shares)
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, _CLIMB), i))(share.key)
        live = climb.live(jax.random.fold_in(inputs.key, i), n_steps)
        value, grads, seen = gradient_over_chunks(
            partial(loss, live=live), lora, share._replace(key=keys), n_chunks // climb.n_shares
        )
        seen = jax.tree.map(jnp.mean, seen) | {"loss": value}
        grads, seen = jax.lax.pmean((grads, seen), AXIS)
        change, opt_state = optimizer.update(grads, opt_state, lora)
        return (optax.apply_updates(lora, change), opt_state), seen | {"grad_norm": optax.tree.norm(grads)}

    start = state.lora, with_new_moments(state.opt_state)
    (lora, opt_state), seen = jax.lax.scan(update, start, jnp.arange(climb.n_shares * climb.n_epochs))
    # the loss and the gradient of the whole round, the rest where it ended
    means = {name: seen[name].mean() for name in ("loss", "grad_norm")}
    return lora, opt_state, means | {name: x[-1] for name, x in seen.items() if name not in means}


def sample(policy: Policy, state: TrainState, frozen: Any, batch: Batch, steps: Steps, *, n_chunks: int) -> Samples:
    """`Algorithm.sample`: images with their true rewards; of the chains their features alone are kept."""

    def one(chunk):
        denoise = partial(policy.network, frozen, state.lora)
        x_T = initial_latents(chunk.key, policy.latent_shape)
        x_0, _ = rollout(policy.process, denoise, x_T, chunk.context, steps, chunk.key)
        rewards, parts, images = rewarded(policy, frozen, x_0, chunk.tokens)
        return Samples(features_of(policy, frozen, images, chunk.text), rewards, parts, images)

    return by_chunks(one, batch, n_chunks)


def seiko(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    climb: Climb,
    fit: Callable,
    optimistic: Callable,
    networks: Any,
    buffer: int,
    label_noise: float,
    n_features: int,
    n_chunks: int,
    group: int,
) -> Algorithm:
    """Makes the algorithm.

    Args:
      fit: (networks, queries, key) -> (networks, error), see `surrogate.fit`.
      optimistic: (networks, queries) -> the reward to climb, a function of features, see `surrogate.Optimistic`.
      networks: what the learnt reward begins with.
      buffer: how many answers are kept.
      label_noise: std of the noise that is added to each answer, which stands for people's disagreement.
    """

    def init(lora) -> TrainState:
        learnt = Learnt(surrogate.no_queries(buffer, n_features), networks)
        return first_state(optimizer, lora, learnt)

    def update(state, frozen, inputs: Inputs):
        samples, (for_noise, for_fit) = inputs.samples, jax.random.split(jax.random.fold_in(inputs.key, _CLIMB))
        features = unchunked(samples.trajectory)
        features = jax.vmap(partial(across_devices, group=group), in_axes=1, out_axes=1)(features)
        answers = across_devices(samples.rewards, group)
        answers += label_noise * jax.random.normal(for_noise, answers.shape)
        queries = surrogate.entered(state.extra.queries, features, answers)
        networks, error = fit(state.extra.networks, queries, for_fit)
        reward = optimistic(networks, queries)
        loss = partial(climb_loss, policy, climb, frozen, reward, state.lora, inputs.steps)
        lora, opt_state, metrics = climbed(optimizer, climb, loss, state, inputs, n_chunks)
        metrics |= {"surrogate/error": error, "surrogate/queries": queries.filled, "lora_norm": optax.tree.norm(lora)}
        if reward.inverse is not None:
            metrics["surrogate/bonus"] = reward.bonus(features).mean()
        state = TrainState(state.iteration + 1, lora, opt_state, Learnt(queries, networks))
        return state, metrics | reward_metrics(samples.rewards, samples.parts)

    return Algorithm(init, partial(sample, policy, n_chunks=n_chunks), update)


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class SEIKO(Pulling):
    """SEIKO: the gradient of a reward that is learnt from few queries of the true one (Uehara et al. 2024b)."""

    name: ClassVar[str] = "seiko"
    needs: ClassVar[Needs] = Needs(features=True)
    updates: int = setting(
        1,
        "shares that a round's prompts are split into, each for one update",
        whole(1, 4096),
        about="""
        A round is an iteration: batch.samples queries of the true reward, a fit, and updates x inner_epochs updates by
        the learnt reward, each on new noise of batch.samples / updates prompts. The published rounds ask 1024, 2048,
        4096 and 8192 times, and take 10 updates of 64 samples each.
        """,
    )
    inner_epochs: int = setting(10, "how often a round climbs on all of its prompts", whole(1, 4096))
    features: str = setting(
        "reward",
        "whose image features the learnt reward reads",
        about="""
        "reward": those of the trained reward's own network. Else a reward by name, as pickscore:PATH, of which only
        the features are read: for rewards that have none, as a function in plain Python.
        """,
    )
    reads_text: bool = setting(
        False,
        "whether the learnt reward knows the prompt: it reads the image's features times those of its text",
        about="""
        The product is taken number by number, so a linear layer can tell how well an image fits its prompt. Wants a
        reward of `features` that reads both, as pickscore:PATH. The paper's learnt reward knows the image alone.
        """,
    )
    optimism: str = setting(
        "ucb",
        "how the learnt reward is raised where little is known",
        surrogate.OPTIMISMS,
        about="""
        "ucb": by an upper confidence bound of its last layer. "bootstrap": the largest of four networks, each fitted to
        queries drawn with replacement. "none": not at all.
        """,
    )
    bonus: float = setting(1e-2, 'factor of the bound of "ucb"', Number(0.0, 1e6))
    ridge: float = setting(1e-3, 'number added to the diagonal of the covariance of "ucb"', positive())
    bonus_limit: float = setting(10.0, 'largest bound of "ucb"', positive())
    kl_weight: float = setting(0.01, "factor of the path KL to the model that the round began with", Number(0.0, 1e6))
    fit_epochs: int = setting(300, "passes over the queries of a round's fit", whole(1, 2**20))
    fit_batch: int = setting(512, "queries in a minibatch of the fit", whole(1, 2**20))
    fit_lr: float = setting(1e-3, "Adam's learning rate of the fit", positive())
    buffer: int = setting(16384, "number of newest queries that are kept", whole(1, 2**24))
    label_noise: float = setting(0.0, "std of the noise added to the true reward; 0.1 in the paper", Number(0.0, 1e6))

    @property
    def noise_is_for(self) -> str:
        return "seiko.kl_weight" if self.kl_weight else ""

    @property
    def chains(self) -> int:
        return 1 + self.inner_epochs

    def passes(self, n_steps: int, full_float32: bool) -> dict[str, float]:
        """A round samples once for queries, and `inner_epochs` times to climb."""
        chains = chain_passes(self.live_share(n_steps))
        climbing = {words.replace(SAMPLE, "to climb"): self.inner_epochs * share for words, share in chains.items()}
        before = {"of the round's first model": float(self.inner_epochs)} if self.kl_weight else {}
        return {SAMPLE: 1.0} | climbing | before

    def make(self, setup: Setup) -> Algorithm:
        keys = jax.random.split(setup.stream("surrogate"), 4 if self.optimism == "bootstrap" else 1)
        chain = {"remat": setup.remat, "input_gradient": self.input_gradient, "kl_weight": self.kl_weight}
        climb = Climb(
            self.updates,
            self.inner_epochs,
            partial(live_steps, truncation=self.truncation, k=self.truncation_k),
            self.loss_coefficient,
            self.target(setup.reward_target),
            chain,
        )
        bound = {"optimism": self.optimism, "alpha": self.bonus, "ridge": self.ridge, "most": self.bonus_limit}
        return seiko(
            setup.policy,
            setup.optimizer,
            climb=climb,
            fit=partial(surrogate.fit, n_epochs=self.fit_epochs, batch=self.fit_batch, lr=self.fit_lr),
            optimistic=partial(surrogate.Optimistic.of, **bound),
            networks=jax.vmap(partial(surrogate.init_network, n_features=setup.n_features))(keys),
            buffer=self.buffer,
            label_noise=self.label_noise,
            n_features=setup.n_features,
            n_chunks=setup.n_chunks,
            group=setup.group,
        )
