"""The compiled programs of a run, mapped over the devices: training, evaluation and the dry run use the same."""

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from diffexp_jax import exploration, parallel
from diffexp_jax.algorithms import Algorithm, Samples
from diffexp_jax.algorithms.algorithm import chunked, unchunked
from diffexp_jax.algorithms.optimizer import gradient_snr
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.pipelines import Conditioning, Pipeline
from diffexp_jax.rewards import Reward
from diffexp_jax.rewards.host import joined
from diffexp_jax.rewards.scoring import add_scores
from diffexp_jax.sampling import Scales, initial_latents, moved, rollout


class Programs(NamedTuple):
    """One iteration, and the images between iterations; all programs are mapped over the devices."""

    algorithm: Algorithm
    explore: Callable[..., Conditioning]
    sample: Callable | None  # None where the algorithm samples inside its update
    update: Callable
    generate: Callable[[Scales], Callable]  # see `make_generate`
    sample_chunk: Callable | None = None  # what `sample` calls for each chunk, where the host scores


def make_programs(experiment: Experiment) -> Programs:
    """The programs of an experiment, whose arrays may be shapes."""
    algorithm, split, sample_chunk = experiment.algorithm(), experiment.split, None
    group = experiment.settings.batch.group if algorithm.sample else 1
    update = measured(algorithm.update, experiment.settings.optim, group)
    if experiment.trained.start:
        sample_chunk = parallel.pmap(experiment.algorithm(n_chunks=1).sample)
        sample = sample_and_score(sample_chunk, experiment.trained, split.chunks, split.per_forward)
    else:
        sample = algorithm.sample and parallel.pmap(lambda *args: algorithm.sample(*args)._replace(images=None))
    return Programs(
        algorithm,
        make_explore(experiment),
        sample,
        parallel.pmap(update, donate_argnums=0),
        make_generate(experiment.sampler.pipeline, n_chunks=split.chunks, lora_scale=experiment.lora_scale),
        sample_chunk,
    )


def measured(update: Callable, optim: Any, group: int) -> Callable:
    """`Algorithm.update` whose metrics also say how far the newest gradients agree, and what there is to compare.

    Args:
      group: samples of each prompt that the iteration has sampled; 1: none are compared.
    """

    def with_metrics(state, frozen, inputs):
        state, metrics = update(state, frozen, inputs)
        metrics = metrics | gradient_snr(state.opt_state, b1=optim.b1, b2=optim.b2)
        samples = inputs.samples
        return state, metrics | (group_metrics(samples.rewards, samples.parts, group) if group > 1 else {})

    return with_metrics


def group_metrics(
    rewards: Float[Array, "B"], parts: dict[str, Float[Array, "B"]], group: int
) -> dict[str, Float[Array, ""]]:
    """Means over all devices' groups: the std of a group's rewards and the largest, and how many have equal rewards.

    Of groups of equal rewards nothing is learnt where samples are compared within groups. Of each part of a sum of
    rewards there is the largest too: of one that is 1 or 0 it is the share of groups with a success.
    """
    of_groups = rewards.reshape(-1, group)
    equal = (of_groups == of_groups[:, :1]).all(axis=1)
    means = {"reward/std_in_group": of_groups.std(axis=1).mean(), "reward/equal_groups": equal.mean()}
    means["reward/best_in_group"] = of_groups.max(axis=1).mean()
    means |= {
        f"reward/{name}/best_in_group": part.reshape(-1, group).max(axis=1).mean() for name, part in parts.items()
    }
    return jax.lax.pmean(means, parallel.AXIS)


def make_explore(experiment: Experiment) -> Callable[..., Conditioning]:
    """A program (cond, null, unit ids, keys) -> the randomly reweighted prompts, one draw per key (Eq. 8)."""
    pipeline, weight_range = experiment.sampler.pipeline, experiment.sampler.exploration.weight_range

    def one(cond, null, units, key):
        weights = exploration.sample_phrase_weights(key, units, weight_range=weight_range)
        return pipeline.reweight(cond, null, weights)

    return parallel.pmap(jax.vmap(one))


def sample_and_score(sample: Callable, reward: Reward, n_chunks: int, per_forward: int) -> Callable[..., Samples]:
    """The mapped `Algorithm.sample` where the host scores too: it scores a chunk while the devices sample the next.

    Each host scores what its own devices sampled. `sample` is the mapped one of a single chunk.
    """
    slices = [slice(i * per_forward, (i + 1) * per_forward) for i in range(n_chunks)]
    split = parallel.pmap(lambda batch: [jax.tree.map(operator.itemgetter(rows), batch) for rows in slices])
    join = parallel.pmap(lambda chunks: jax.tree.map(lambda *x: jnp.concatenate(x), *chunks))
    to_bytes, add = parallel.pmap(as_bytes), parallel.pmap(add_scores)

    def all_chunks(state, frozen, batch, steps) -> Samples:
        chunks, waits = [], []
        for chunk in split(batch):
            chunks.append(sample(state, frozen, chunk, steps))
            images = to_bytes(chunks[-1].images)  # still being computed: the reward's thread waits for them
            chunks[-1] = chunks[-1]._replace(images=None)  # the bytes are enough
            waits.append(reward.start(partial(parallel.unshard_local, images), parallel.unshard_local(chunk.tokens)))
        samples = jax.block_until_ready(join(chunks))  # the reward's time limit counts from here
        del chunks  # or all would be there twice while the reward is waited for
        scores = parallel.together(lambda: [wait() for wait in waits])
        names = parallel.from_each(lambda: sorted(scores[0][1]))  # all hosts' programs have the same parts
        on_host = joined(scores, itertools.chain(*names))
        rewards, parts = add((samples.rewards, samples.parts), parallel.shard_local(on_host))
        return samples._replace(rewards=rewards, parts=parts)

    return all_chunks


# ---------------------------------------------------------------------------------------------------------- evaluation


def as_bytes(images: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
    """[0,1] -> 0..255, rounded; values outside are clipped."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255).astype(jnp.uint8)


def bytes_and_finite(images: Float[Array, "B H W 3"]) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, " B"]]:
    """`as_bytes`, which makes black of NaN, and which images have only finite numbers."""
    return as_bytes(images), jnp.isfinite(images).all(axis=(1, 2, 3))


def floats_and_finite(images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], Bool[Array, " B"]]:
    """The images in [0,1], values outside clipped, and which have only finite numbers."""
    return images.clip(0.0, 1.0), jnp.isfinite(images).all(axis=(1, 2, 3))


def check_pictures(finite: Bool[np.ndarray, " N"]) -> None:
    """Raises InputError where a picture has a number that is not finite."""
    if wrong := int((~np.asarray(finite)).sum()):
        raise InputError(
            f"{wrong} of {len(finite)} pictures are not finite: the model, its VAE or the LoRA overflows; wants "
            "another type of numbers (float32, or bfloat16 in place of float16), another LoRA or less guidance"
        )


def make_generate(
    pipeline: Pipeline, *, n_chunks: int, lora_scale: float, form: Callable[[Float[Array, "B H W 3"]], Any] = as_bytes
) -> Callable[[Scales], Callable[..., Any]]:
    """A function of steps' guidance scales that gives the program to sample by these steps.

    The program is of (params, lora, context, keys, steps, x_T), and gives images [D,B,H,W,3] as bytes, or in another
    `form`; x_T None: the keys' own. Steps that want the same evaluations of the network share one.
    """
    programs = {}

    def of(w_t):
        wanted = frozenset(pipeline.evaluations(w_t).tolist())
        if wanted not in programs:
            network = pipeline.network(w_t, lora_scale=lora_scale)
            programs[wanted] = parallel.pmap(partial(generate, network))
        return programs[wanted]

    def one(network, params, lora, steps, chunk):
        context, keys, x_T = chunk
        x_T = moved(initial_latents(keys, pipeline.latent_shape) if x_T is None else x_T, lora)
        x_0, _ = rollout(pipeline.process, partial(network, params, lora), x_T, context, steps, keys)
        return form(pipeline.decode(params, x_0))

    def generate(network, params, lora, context, keys, steps, x_T=None):
        chunks = chunked((context, keys, x_T), n_chunks)
        return unchunked(jax.lax.map(lambda chunk: one(network, params, lora, steps, chunk), chunks))

    return of
