"""What a text-to-image model is to the rest of the package: one value, whatever family it is of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from diffexp_jax.formats.tokenizers import token_ids
from diffexp_jax.models.lora import scaled
from diffexp_jax.prompts import PromptSet
from diffexp_jax.prompts.units import unit_ids, units_of_text
from diffexp_jax.sampling import CLASSIFIER_FREE, Context, Guidance, Network, Process, Scales

SHOWN = 4096  # prompts whose encoding takes long enough for a progress bar
AT_ONCE = 16  # prompts that are encoded together: few enough to fill up for "", which a run encodes alone

# What conditions a network on prompts: a tree of arrays, a row per prompt. Only the pipeline knows what is in it.
Conditioning = Any


class Pipeline(NamedTuple):
    """A model as pure functions of (params, ...); `params` is an argument of them, never closed over.

    `encode(params, token ids of each tokenizer)` gives prompts' conditioning, on the host kept as numpy. Its types are
    the pipeline's choice: what is exact enough for the network.
    `denoise(params, lora or None, x_t, step, conditioning)` gives the network's output, float32; `step` is a row of the
    process' steps, of which it reads t, and w_t where that is an input of the network.
    `decode(params, x_0)` gives images in [0,1], not clipped.
    `reweight(cond, null, weights [L])` is Eq. 8 on a prompt's conditioning; its positions are those of `units`.
    `unconditional(conditioning of "")` is what guidance leads away from: the same, or zeros if trained so (SDXL).
    """

    params: dict[str, Any]  # by part: arrays, or their shapes
    trainable: str  # the part that takes LoRA
    text_parts: tuple[str, ...]  # the parts that `encode` reads, and nothing else
    tokenizers: tuple[Any, ...]  # transformers' fast ones; () where only shapes are known
    lengths: tuple[int, ...]  # tokens of a prompt, by tokenizer: its model_max_length
    weighted: tuple[int, ...]  # indices of the tokenizers whose tokens, one after the other, `reweight` has weights for
    encode: Callable[[Any, tuple[Int[Array, "B _"], ...]], Conditioning]
    reweight: Callable[[Conditioning, Conditioning, Float[Array, "L"]], Conditioning]
    unconditional: Callable[[Conditioning], Conditioning]
    denoise: Callable[..., Float[Array, "B h w c"]]
    decode: Callable[[Any, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]
    process: Process  # how the network's outputs turn noise into a latent
    latent_shape: tuple[int, int, int]  # (h, w, c)
    lora_targets: Mapping[str, tuple[str, ...]]  # what lora.targets may name -> the last parts of layers' names
    lora_prefix: str  # before the names of layers in LoRA files, as diffusers writes them: "unet.", "transformer."
    blocks: tuple[str, ...] = ()  # names of the network's blocks, whose parameters may be stacked: see `blocks.stacked`
    guidance: Guidance = CLASSIFIER_FREE  # how the network takes its guidance scale

    @property
    def base(self) -> Any:
        """The weights of the part that takes LoRA."""
        return self.params[self.trainable]

    @property
    def sampling_params(self) -> dict[str, Any]:
        """The parts that sampling reads: all but the text encoders."""
        return {part: tree for part, tree in self.params.items() if part not in self.text_parts}

    def units(self, prompts: PromptSet, unit: str) -> Int[np.ndarray, "P L"]:
        """The prompts' units for Eq. 8 by position, see `unit_ids`; zeros where only shapes are known."""
        if not self.tokenizers:
            return np.zeros((len(prompts), sum(self.lengths[i] for i in self.weighted)), np.int32)
        return unit_ids([self.tokenizers[i] for i in self.weighted], prompts, unit)

    def units_of_text(self, text: str, units: Int[np.ndarray, "L"]) -> list[tuple[str, int]]:
        """A prompt cut where its units begin and end, each with its number, 0 for none; `units` is its row."""
        return units_of_text([self.tokenizers[i] for i in self.weighted], text, units)

    def without_text_encoders(self) -> "Pipeline":
        """The pipeline once all of a run's prompts are encoded: the host's memory holds no text encoder any more."""
        return self._replace(params=self.sampling_params)

    def network(self, w_t: Scales | None = None, *, lora_scale: float = 1.0) -> Network:
        """The model under guidance; its frozen arrays are `params`.

        Args:
          w_t: every guidance scale that it is for; None: any. A program holds what these need, and no more.
          lora_scale: alpha / rank.
        """

        def evaluate(params, lora, *args):
            return self.denoise(params, scaled(lora, lora_scale), *args)

        return self.guidance.network(evaluate, w_t)

    def evaluations(self, w_t: Scales) -> Int[np.ndarray, "T"]:
        """How often the network is evaluated for a sample at steps of these guidance scales."""
        return self.guidance.evaluations(w_t)


def on_one_device(function: Callable, params: Any) -> Callable:
    """args -> function(params, args) as host arrays, by the first device, which holds the params."""
    compiled = jax.jit(function)
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), params)  # one after the other: some are made here
    return lambda args: jax.device_get(compiled(params, args))


def encode_prompts(
    pipeline: Pipeline, texts: Sequence[str], *, chunk: int = AT_ONCE, program: Callable = on_one_device
) -> tuple[Conditioning, dict[int, list[str]]]:
    """The conditioning of many prompts (host arrays), and the prompts that were cut, by the tokens that are read.

    They are encoded `chunk` at once, the last ones filled up: a run's prompt sets share one compiled program.

    Args:
      program: (function, params) -> a function of ids, that computes function(params, ids) somewhere and gives host
        arrays: `on_one_device`, or by all of them for encoders that no device can hold (`sampler.program`).

    Raises:
      ValueError: the pipeline is one without its text encoders.
    """
    if gone := [part for part in pipeline.text_parts if part not in pipeline.params]:
        raise ValueError(f"{', '.join(gone)}: dropped when all of the run's prompts were encoded")
    ids, cuts = zip(*(token_ids(tokenizer, texts) for tokenizer in pipeline.tokenizers), strict=True)
    encode = program(pipeline.encode, {part: pipeline.params[part] for part in pipeline.text_parts})
    padded = [np.concatenate([x, np.repeat(x[:1], -len(texts) % chunk, axis=0)]) for x in ids]
    starts = tqdm(range(0, len(texts), chunk), desc="encoding prompts", disable=len(texts) < SHOWN)
    rows = [encode(tuple(x[i : i + chunk] for x in padded)) for i in starts]
    cut = {length: some for length, some in zip(pipeline.lengths, cuts, strict=True) if some}
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(texts)], *rows), cut


def encode_empty(pipeline: Pipeline, *, program: Callable = on_one_device) -> Conditioning:
    """The conditioning of "", without a batch axis: Eq. 8's null. `program` is that of `encode_prompts`."""
    return jax.tree.map(lambda x: x[0], encode_prompts(pipeline, [""], program=program)[0])


def zero_conditioning(pipeline: Pipeline, n: int) -> Conditioning:
    """Zeros of the shape of n prompts' conditioning, for a pipeline of which only shapes are known."""
    ids = tuple(jax.ShapeDtypeStruct((n, length), np.int32) for length in pipeline.lengths)
    shapes = jax.eval_shape(pipeline.encode, pipeline.params, ids)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def make_context(cond: Conditioning, uncond: Conditioning) -> Context:
    """The conditioning of a batch: `cond` has a row per image, `uncond` is the same for all. Host arrays."""
    n = len(jax.tree.leaves(cond)[0])
    return Context(cond, jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), uncond))
