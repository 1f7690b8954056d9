"""What an algorithm is, what it is made from, and what several of them use."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num

from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.parallel import AXIS
from diffexp_jax.sampling import Context, Network, Process, Steps


class Policy(NamedTuple):
    """The model and the reward, as pure functions; `frozen` holds every array that is not trained."""

    network: Network
    decode: Callable[[Any, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]
    # (frozen, images, tokens) -> rewards and their parts, less what the host adds to the samples (`Reward.start`)
    score: Callable[..., tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]]]
    latent_shape: tuple[int, int, int]
    process: Process
    # (frozen, images) -> what a reward's network knows of them; None: the method asks for none (`Needs.features`)
    features: Callable[[Any, Float[Array, "B H W 3"]], Float[Array, "B P"]] | None = None


class Batch(NamedTuple):
    """One device's share of an iteration's samples; every leaf has the leading axis B."""

    prompt_id: Int[Array, "B"]
    context: Context
    tokens: Any  # the reward's tokens of the (unweighted) prompts
    key: jax.Array  # a PRNG key per sample, from its global index
    text: Float[Array, "B P"] | None = None  # features of the (unweighted) prompts, see `Method.reads_text`


class Samples(NamedTuple):
    """What a sampling program hands to the update."""

    trajectory: Any  # what is kept of the chains, leading axes [chunks, ...]; None where there are gradients
    rewards: Float[Array, "B"]
    parts: dict[str, Float[Array, "B"]]
    images: Float[Array, "B H W 3"] | None  # None where the host does not score them: nobody else reads them
    gradients: Any = None  # of each sample, [B, ...] (`one_pass.py`)


class Inputs(NamedTuple):
    """What an iteration gives to the update."""

    batch: Batch
    steps: Steps
    key: jax.Array  # of the iteration, the same on every device
    samples: Samples | None = None  # None where the algorithm samples inside its update


class Algorithm(NamedTuple):
    """Pure per-device functions, run under an axis named "data" (`parallel.pmap`).

    `init(lora)` is the first state.
    `sample(state, frozen, batch, steps)` gives samples; None where the algorithm samples inside its update.
    `update(state, frozen, inputs)` gives (state, metrics), the same on every device.
    """

    init: Callable[[Any], TrainState]
    sample: Callable[..., Samples] | None
    update: Callable[..., tuple[TrainState, dict[str, Array]]]


class Setup(NamedTuple):
    """What a method makes its algorithm from, besides its own settings."""

    policy: Policy
    optimizer: optax.GradientTransformation
    n_samples: int  # of an iteration, on a device
    n_chunks: int  # forward passes that they are split into
    n_prompts: int  # size of the prompt set
    n_steps: int  # of sampling
    remat: bool  # see `sampling.differentiable`
    lora_size: int  # numbers that are trained
    full_float32: bool  # the model computes in float32 throughout, products too
    stream: Callable[[str], jax.Array]  # the run's key of what this name says
    group: int = 1  # samples of a prompt that follow each other, on one device
    n_noisy: int | None = None  # of the steps, those that add noise; None: all
    confined: bool = False  # whether these begin later than the chain, perhaps at another step in each iteration
    n_features: int = 0  # of an image, see `Policy.features`
    reward_target: float | None = None  # what AlignProp pulls the reward to, where that is published


# Passes of the network, in words
SAMPLE, SAMPLE_WITH_GRADIENT, WITH_GRADIENT = "to sample", "to sample with a gradient", "with a gradient"


class Needs(NamedTuple):
    """What a method asks of the rest of a run."""

    reward_gradient: bool = False  # the reward's gradient in the image, so a reward in JAX
    step_noise: bool = False  # noise at every step, whose log-prob it uses
    groups: bool = False  # several samples of each prompt (batch.group)
    features: bool = False  # an image's features, of the reward that its setting `features` names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune, with its settings, each of which is a field (`limits.setting`).

    `config.algorithm` names it, and the config's section of that name has its settings.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    updates: ClassVar[int] = 1  # of the optimizer in an iteration, each on its own share of the samples
    inner_epochs: ClassVar[int] = 1  # how often an iteration goes over all of them
    reads_text: ClassVar[bool] = False  # features of the prompts, beside those of the images (`Needs.features`)

    def make(self, setup: Setup) -> Algorithm:
        raise NotImplementedError

    def check(self, n_steps: int) -> None:
        """Raises InputError for settings that cannot work together, or with so many steps of sampling."""

    @property
    def trains_guided(self) -> bool:
        """Whether what the update evaluates is the network's guided output, or that for the prompts alone."""
        return True

    @property
    def compares_groups(self) -> bool:
        """Whether samples of a prompt are compared, of which there are then at least two (batch.group)."""
        return self.needs.groups

    @property
    def chains(self) -> int:
        """How often an iteration samples its prompts."""
        return 1

    @property
    def noise_is_for(self) -> str:
        """What needs noise at every step of sampling, in words; "": nothing does."""
        return "their log-probability" if self.needs.step_noise else ""

    @property
    def learns_of_each_step(self) -> bool:
        """Whether it keeps something of each step, which then adds noise in every iteration or none."""
        return False

    def passes(self, n_steps: int, full_float32: bool) -> Mapping[str, float]:
        """The passes of the network over the samples in an iteration, by what they are for in words.

        Of each the share of all steps of all samples that it goes over, as if all added noise. Those whose words begin
        with "to sample" are guided, the others where `trains_guided`; a gradient is taken through those whose words
        end with "with a gradient". What `model.remat` computes again is not among them.
        """
        return {SAMPLE: 1.0}


def rewarded(
    policy: Policy, frozen: Any, x_0: Float[Array, "B h w c"], tokens: Any
) -> tuple[Float[Array, "B"], dict[str, Float[Array, "B"]], Float[Array, "B H W 3"]]:
    """(rewards, their parts, images) of latents."""
    images = policy.decode(frozen, x_0).clip(0.0, 1.0)
    rewards, parts = policy.score(frozen, images, tokens)
    chex.assert_shape([rewards, *parts.values()], (len(images),))  # [B,1] would broadcast against [B]
    return rewards, parts, images


def chunked(tree: Any, n_chunks: int) -> Any:
    """[B, ...] -> [n_chunks, B / n_chunks, ...], in order."""
    # no -1 in the shape: a reward that reads no prompts has tokens of width 0
    return jax.tree.map(lambda x: x.reshape(n_chunks, len(x) // n_chunks, *x.shape[1:]), tree)


def unchunked(tree: Any) -> Any:
    """[chunks, m, ...] -> [chunks * m, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def by_chunks(sample: Callable[[Batch], Samples], batch: Batch, n_chunks: int) -> Samples:
    """sample(chunk) of each chunk, one after another; what is kept of the chains has the chunks' axis."""
    samples = jax.lax.map(sample, chunked(batch, n_chunks))
    return Samples(samples.trajectory, *unchunked((samples.rewards, samples.parts, samples.images)))


def first_state(optimizer: optax.GradientTransformation, lora: Any, extra: Any = None) -> TrainState:
    """What `Algorithm.init` returns."""
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), extra)


def zeros_like_output(function: Callable, *args) -> Any:
    """A tree of zeros shaped like the function's output: the start of a sum of such outputs."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *args))


def mean_over(function: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
    """(mean of the first, stack of the second) result of function(x) over the leading axis of xs.

    A scan that holds one x's work at a time.
    """
    length = len(jax.tree.leaves(xs)[0])
    function = jax.jit(function, inline=True)  # traced once, for its shapes and in the scan

    def add(total, x):
        to_add, to_keep = function(x)
        return jax.tree.map(jnp.add, total, to_add), to_keep

    start, _ = zeros_like_output(function, jax.tree.map(lambda x: x[0], xs))
    total, kept = jax.lax.scan(add, start, xs)
    return jax.tree.map(lambda x: x / length, total), kept


def stepped(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: Float[Array, ""],
    grads: Any,
    scores: tuple[Float[Array, "B"], dict[str, Float[Array, "B"]]],
    extra: Any = None,
) -> tuple[TrainState, dict[str, Array]]:
    """What `Algorithm.update` returns after one optimizer step; `scores` are the rewards and their parts."""
    change, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    lora = optax.apply_updates(state.lora, change)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lora_norm": optax.tree.norm(lora)}
    return TrainState(state.iteration + 1, lora, opt_state, extra), metrics | reward_metrics(*scores)


def across_devices(x: Num[Array, "B"], group: int = 1) -> Num[Array, "N"]:
    """A per-sample array of all devices, in the order of the global sample index (see `parallel.devices`).

    `group` is `Setup.group`; without it the order is another one.
    """
    return jax.lax.all_gather(x.reshape(-1, group), AXIS, axis=1).reshape(-1)


def reward_metrics(rewards: Float[Array, "B"], parts: dict[str, Float[Array, "B"]]) -> dict[str, Array]:
    """Mean and std of the reward over all devices, and the mean of each of its parts."""
    everything = across_devices(rewards)
    metrics = {"reward/mean": everything.mean(), "reward/std": everything.std()}
    return metrics | {f"reward/{name}": jax.lax.pmean(part.mean(), AXIS) for name, part in parts.items()}
