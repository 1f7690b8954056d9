"""Sampling without exploration on fixed seeds, and scoring: for evaluations, image grids and the scripts."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diffexp_jax import parallel
from diffexp_jax.algorithms.algorithm import chunked, unchunked
from diffexp_jax.models.lora import scaled
from diffexp_jax.models.stable_diffusion import StableDiffusion, TextEmbedding, token_ids
from diffexp_jax.rewards import Reward
from diffexp_jax.sampling import Context, Denoise, Steps, guided, initial_latents, rollout


class Task(NamedTuple):
    """A prompt set ready to sample: arrays on the host, a row per prompt (also in the parts of `cond`)."""

    name: str
    texts: tuple[str, ...]
    cond: TextEmbedding
    tokens: Mapping[str, Any]  # per reward


def denoiser(model: StableDiffusion, frozen: Any, lora: Any, *, lora_scale: float = 1.0) -> Denoise:
    """The model's guided denoiser; `frozen["model"]` holds its parameters, `lora_scale` is alpha / rank."""
    lora = scaled(lora, lora_scale)
    return guided(lambda x, t, embedding, added: model.unet(frozen["model"], lora, x, t, embedding, added))


def encode_prompts(model: StableDiffusion, texts: Sequence[str], *, chunk: int = 64) -> tuple[TextEmbedding, list[str]]:
    """Embeddings of many prompts (host arrays), `chunk` at once, and the prompts that were too long and cut."""
    ids, cuts = zip(*(token_ids(tokenizer, texts) for tokenizer in model.tokenizers), strict=True)
    ids = np.stack(ids)  # [E, P, L]
    encode = jax.jit(model.encode)
    params = jax.device_put({part: x for part, x in model.params.items() if part.startswith("text_encoder")})
    chunk = min(chunk, len(texts))
    padded = np.concatenate([ids, np.repeat(ids[:, :1], -len(texts) % chunk, axis=1)], axis=1)
    rows = [jax.device_get(encode(params, padded[:, i : i + chunk])) for i in range(0, padded.shape[1], chunk)]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(texts)], *rows), cuts[0]


def encode_empty(model: StableDiffusion) -> TextEmbedding:
    """The embedding of "", without a batch axis: Eq. 8's null."""
    return jax.tree.map(lambda x: x[0], encode_prompts(model, [""])[0])


def unconditional(model: StableDiffusion, empty: TextEmbedding) -> TextEmbedding:
    """What guidance leads away from: `empty`, the embedding of "", or zeros where the model was trained so (SDXL).

    Eq. 8's null embedding is `empty` in any case.
    """
    if not model.zero_uncond:
        return empty
    pooled, time_ids = empty.added
    return TextEmbedding(np.zeros_like(empty.embedding), (np.zeros_like(pooled), time_ids))


def make_context(cond: TextEmbedding, uncond: TextEmbedding) -> Context:
    """The conditioning of a batch: `cond` has a row per image, `uncond` is the same for all. Host arrays."""
    n = len(cond.embedding)
    uncond = jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), uncond)
    return Context(cond.embedding, uncond.embedding, cond.added, uncond.added)


def as_bytes(images: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
    """[0,1] -> 0..255, rounded; values outside are clipped."""
    return jnp.round(jnp.clip(images, 0.0, 1.0) * 255).astype(jnp.uint8)


def make_generate(
    model: StableDiffusion, *, n_chunks: int, lora_scale: float
) -> Callable[..., UInt8[Array, "D B H W 3"]]:
    """A mapped program (frozen, lora, context, keys, steps) -> images as bytes."""

    def one(frozen, lora, steps, chunk):
        context, keys = chunk
        x_T = initial_latents(keys, model.latent_shape)
        denoise = denoiser(model, frozen, lora, lora_scale=lora_scale)
        x_0, _ = rollout(model.process, denoise, x_T, context, steps, keys)
        return as_bytes(model.decode(frozen["model"], x_0))

    def generate(frozen, lora, context, keys, steps):
        chunks = chunked((context, keys), n_chunks)
        return unchunked(jax.lax.map(lambda chunk: one(frozen, lora, steps, chunk), chunks))

    return parallel.pmap(generate)


def make_official_scorer(
    reward: Reward, *, batch: int, params: Any = None
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ 3"]], Any], dict[str, Float[np.ndarray, " N"]]]:
    """A function (images, the reward's tokens of their prompts) -> {"": the reward, part: each of its parts}.

    What is reported: bytes in, by the reward's published path, which has no gradient. The images may differ in size.

    Args:
      reward: any; one in plain Python is called with up to `batch` images of one size.
      batch: images at once, over all devices (a multiple of their number). A last, smaller batch is filled up, so that
        everything compiles once.
      params: the reward's, on every device (`parallel.replicate`); None: put there now.
    """
    if reward.start:
        return partial(_score_on_host, reward.start, batch=batch)
    rate = parallel.pmap(reward.rate)
    params = parallel.replicate(reward.params) if params is None else params

    def score(images, tokens):
        done = []
        for start in range(0, len(images), batch):
            rows = np.arange(start, start + batch).clip(max=len(images) - 1)
            pixels = [reward.prepare(images[row]) for row in rows[: len(images) - start]]
            pixels += pixels[-1:] * (batch - len(pixels))
            stacked = jax.tree.map(lambda *x: np.stack(x), *pixels)
            own = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], tokens)
            total, parts = parallel.unshard(rate(params, *parallel.shard((stacked, own), batch)))
            done.append({name: x[: len(images) - start] for name, x in ({"": total} | parts).items()})
        return jax.tree.map(lambda *x: np.concatenate(x), *done) if done else {}

    return score


def _score_on_host(start: Callable, images: Any, tokens: Int[np.ndarray, " N"], *, batch: int):
    """All the calls are begun, then waited for; images that follow each other share one if they have the same size."""
    groups = [list(same) for _, same in itertools.groupby(range(len(images)), lambda i: images[i].shape)]
    calls = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]
    waits = [start(np.stack([images[i] for i in rows]), tokens[rows]) for rows in calls]
    return {"": np.concatenate([wait() for wait in waits])} if waits else {}


def evaluate(
    generate: Callable,
    scorers: Mapping[str, Callable],
    frozen: Any,
    lora: Any,
    task: Task,
    uncond: TextEmbedding,
    steps: Steps,
    *,
    seed: int,
    batch: int,
    samples_per_prompt: int = 1,
) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[str, Float[np.ndarray, "N"]]]:
    """Images and scores of every prompt, `samples_per_prompt` each, with seeds that depend on nothing else.

    `scorers` are rewards' names and what `make_official_scorer` makes of them.

    Returns:
      The images, prompt by prompt; {"reward": [N], "reward/part": [N]} in the same order.
    """
    rows = np.repeat(np.arange(len(task.texts)), samples_per_prompt)
    keys = parallel.sample_keys(parallel.stream(seed, f"eval/{task.name}"), len(rows) + -len(rows) % batch)
    padded = np.concatenate([rows, np.zeros(-len(rows) % batch, np.int64)])
    images = []
    for start in range(0, len(padded), batch):
        part = padded[start : start + batch]
        context = make_context(jax.tree.map(lambda x, part=part: x[part], task.cond), uncond)
        inputs = parallel.shard((context, keys[start : start + batch]), batch)
        images.append(parallel.unshard(generate(frozen, lora, *inputs, steps)))
    images = np.concatenate(images)[: len(rows)]
    scores = {}
    for name, scorer in scorers.items():
        own = scorer(images, jax.tree.map(lambda x: x[rows], task.tokens[name]))
        scores |= {f"{name}/{part}" if part else name: x for part, x in own.items()}
    return images, scores
