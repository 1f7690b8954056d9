"""The compiled programs of a run, mapped over the devices: training, evaluation and the dry run use the same."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from diffexp_jax import exploration, parallel
from diffexp_jax.algorithms import Algorithm, Samples
from diffexp_jax.algorithms.algorithm import chunked, unchunked
from diffexp_jax.experiment import Experiment
from diffexp_jax.pipelines import Conditioning, Pipeline
from diffexp_jax.rewards import Reward
from diffexp_jax.rewards.host import joined, start_by_size
from diffexp_jax.sampling import initial_latents, rollout

_LARGE = 2**32  # bytes of a batch that is not filled up with copies


class Programs(NamedTuple):
    """One iteration, and the images between iterations; all but `algorithm` are mapped over the devices."""

    algorithm: Algorithm
    explore: Callable[..., Conditioning]
    sample: Callable | None  # None where the algorithm samples inside its update
    update: Callable
    generate: Callable
    sample_chunk: Callable | None = None  # what `sample` calls for each chunk, where the host scores


def make_programs(experiment: Experiment) -> Programs:
    """The programs of an experiment, whose arrays may be shapes."""
    algorithm, split, sample_chunk = experiment.algorithm(), experiment.split, None
    if experiment.trained.start:
        sample_chunk = parallel.pmap(experiment.algorithm(n_chunks=1).sample)
        sample = sample_and_score(sample_chunk, experiment.trained, split.chunks, split.per_forward)
    else:
        sample = algorithm.sample and parallel.pmap(lambda *args: algorithm.sample(*args)._replace(images=None))
    return Programs(
        algorithm,
        make_explore(experiment),
        sample,
        parallel.pmap(algorithm.update, donate_argnums=0),
        make_generate(experiment.sampler.pipeline, n_chunks=split.chunks, lora_scale=experiment.lora_scale),
        sample_chunk,
    )


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


def add_scores(in_program: tuple, on_host: tuple) -> tuple:
    """The scores of a reward's two halves, see `Reward.start`: rewards and parts are added, name by name."""
    (total, parts), (more, more_parts) = in_program, on_host
    return total + more, parts | {name: x + parts.get(name, 0.0) for name, x in more_parts.items()}


# ---------------------------------------------------------------------------------------------------------- evaluation


def as_bytes(images: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
    """[0,1] -> 0..255, rounded; values outside are clipped."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255).astype(jnp.uint8)


def bytes_and_finite(images: Float[Array, "B H W 3"]) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, " B"]]:
    """`as_bytes`, which makes black of NaN, and which images have only finite numbers."""
    return as_bytes(images), jnp.isfinite(images).all(axis=(1, 2, 3))


def make_generate(
    pipeline: Pipeline, *, n_chunks: int, lora_scale: float, form: Callable[[Float[Array, "B H W 3"]], Any] = as_bytes
) -> Callable[..., Any]:
    """A program (params, lora, context, keys, steps) -> images [D,B,H,W,3] as bytes, or in another `form`."""

    def one(params, lora, steps, chunk):
        context, keys = chunk
        x_T = initial_latents(keys, pipeline.latent_shape)
        denoise = pipeline.denoiser(params, lora, lora_scale=lora_scale)
        x_0, _ = rollout(pipeline.process, denoise, x_T, context, steps, keys)
        return form(pipeline.decode(params, x_0))

    def generate(params, lora, context, keys, steps):
        chunks = chunked((context, keys), n_chunks)
        return unchunked(jax.lax.map(lambda chunk: one(params, lora, steps, chunk), chunks))

    return parallel.pmap(generate)


def make_scorers(experiment: Experiment, frozen: Any) -> dict[str, Callable]:
    """What a run's evaluation scores with, by name: every reward on its published path."""
    batch = experiment.split.per_forward * experiment.split.devices
    return {
        name: make_scorer(reward, batch=batch, params=frozen["reward"] if reward is experiment.trained else None)
        for name, reward in experiment.rewards.items()
    }


def batches_by_shape(trees: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Lists of at most `most` trees of arrays that follow each other and can be stacked: of the same shapes."""
    batch: list[Any] = []
    for tree in trees:
        if batch and (len(batch) == most or jax.tree.map(np.shape, tree) != jax.tree.map(np.shape, batch[0])):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def make_embedder(
    reward: Reward, *, batch: int, params: Any = None
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ 3"]]], Float[np.ndarray, "N P"]]:
    """A function images -> the features that such a reward has of them (`Reward.embed`); arguments as `make_scorer`."""

    def embed(params, pixels, tokens):
        del tokens
        features = reward.embed(params, pixels)
        return jnp.zeros(len(features)), {"features": features}

    score = make_scorer(reward._replace(score_prepared=embed, start=None), batch=batch, params=params)
    return lambda images: score(images, np.zeros((len(images), 0), np.int32))["features"]


def make_scorer(
    reward: Reward, *, batch: int, params: Any = None
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ _"]], Any], dict[str, Float[np.ndarray, " N"]]]:
    """A function (images, the reward's tokens of their prompts) -> {"": the reward, part: each of its parts}.

    What is reported: bytes in, by the reward's published path, which has no gradient. The images may differ in size,
    and have a fourth channel, transparency.

    Args:
      reward: any; one in plain Python is called with up to `batch` images of one size, on each host with its share.
      batch: images at once, over all devices (a multiple of their number). A smaller one is filled up, so that what
        the reward reads of them is compiled once for each of its sizes: for most rewards there is one. Not so where
        that would take gigabytes.
      params: the reward's, on every device (`parallel.share`); None: put there now.
    """
    score_prepared = parallel.pmap(reward.score_prepared)
    params = parallel.share(reward.params) if params is None else params

    def in_program(images, tokens):
        done, start = [], 0
        for pixels in batches_by_shape((reward.prepare(image) for image in images), batch):
            n, size = len(pixels), batch
            if sum(np.asarray(x).nbytes for x in jax.tree.leaves(pixels[0])) * batch > _LARGE:
                size = -(-n // jax.device_count()) * jax.device_count()
            stacked = jax.tree.map(lambda *x: np.stack(x), *pixels, *pixels[-1:] * (size - n))
            rows = np.arange(start, start + size).clip(max=start + n - 1)
            their_tokens = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], tokens)
            scores = parallel.unshard(score_prepared(params, *parallel.shard((stacked, their_tokens), size)))
            done.append(jax.tree.map(lambda x, n=n: x[:n], scores))
            start += n
        return jax.tree.map(lambda *x: np.concatenate(x), *done)

    def score(images, tokens):
        if not len(images):
            return {}
        rows = parallel.own_share(len(images))
        wait = start_by_size(reward, images[rows], jax.tree.map(lambda x: x[rows], tokens), batch=batch)
        total, parts = in_program(images, tokens)
        if reward.start:
            shares = [share for share in parallel.from_each(lambda: wait and wait()) if share]
            total, parts = add_scores((total, parts), joined(shares))
        return {"": total} | parts

    return score
