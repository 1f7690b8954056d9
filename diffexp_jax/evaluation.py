"""Sampling without exploration on fixed seeds, and scoring: for evaluations, image grids and the scripts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from diffexp_jax import parallel
from diffexp_jax.algorithms import chunked, unchunked
from diffexp_jax.diffusion import Steps
from diffexp_jax.models.lora import scaled
from diffexp_jax.models.stable_diffusion import StableDiffusion, TextEmbedding, token_ids
from diffexp_jax.rewards import Reward
from diffexp_jax.sampling import Context, Denoise, guided, initial_latents, rollout


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


def make_generate(
    model: StableDiffusion, rewards: Mapping[str, Reward], *, prediction_type: str, n_chunks: int, lora_scale: float
) -> Callable[..., tuple[Array, dict[str, Any]]]:
    """A mapped program (frozen, lora, context, tokens, keys, steps) -> (images, {reward: (scores, parts)})."""

    def one(frozen, lora, steps, chunk):
        context, tokens, keys = chunk
        x_T = initial_latents(keys, model.latent_shape)
        denoise = denoiser(model, frozen, lora, lora_scale=lora_scale)
        x_0, _ = rollout(denoise, x_T, context, steps, keys, prediction_type=prediction_type)
        images = model.decode(frozen["model"], x_0).clip(0.0, 1.0)
        scores = {name: reward.score(frozen["rewards"][name], images, tokens[name]) for name, reward in rewards.items()}
        return images, scores

    def generate(frozen, lora, context, tokens, keys, steps):
        chunks = chunked((context, tokens, keys), n_chunks)
        return unchunked(jax.lax.map(lambda chunk: one(frozen, lora, steps, chunk), chunks))

    return parallel.pmap(generate)


def evaluate(
    generate: Callable,
    frozen: Any,
    lora: Any,
    task: Task,
    uncond: TextEmbedding,
    steps: Steps,
    *,
    seed: int,
    batch: int,
    samples_per_prompt: int = 1,
) -> tuple[Float[np.ndarray, "N H W 3"], dict[str, Float[np.ndarray, "N"]]]:
    """Images and scores of every prompt, `samples_per_prompt` each, with seeds that depend on nothing else.

    Returns:
      The images, prompt by prompt; {"reward": [N], "reward/part": [N]} in the same order.
    """
    rows = np.repeat(np.arange(len(task.texts)), samples_per_prompt)
    keys = parallel.sample_keys(parallel.stream(seed, f"eval/{task.name}"), len(rows) + -len(rows) % batch)
    padded = np.concatenate([rows, np.zeros(-len(rows) % batch, np.int64)])
    images, scores = [], []
    for start in range(0, len(padded), batch):
        part = padded[start : start + batch]
        cond, tokens = jax.tree.map(lambda x, part=part: x[part], (task.cond, task.tokens))
        context = make_context(cond, uncond)
        inputs = parallel.shard((context, tokens, keys[start : start + batch]), batch)
        images_n, scores_n = parallel.unshard(generate(frozen, lora, *inputs, steps))
        images.append(images_n)
        scores.append(scores_n)
    joined = jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *scores)
    flat = {name: total for name, (total, _) in joined.items()}
    flat |= {f"{name}/{part}": x for name, (_, parts) in joined.items() for part, x in parts.items()}
    return np.concatenate(images)[: len(rows)], flat
