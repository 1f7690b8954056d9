"""A model with the settings that it is sampled by: what training, evaluation and scripts/sample.py have in common."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Int, Num

from diffexp_jax import backend, parallel
from diffexp_jax.errors import InputError
from diffexp_jax.exploration import guidance_schedule, has_weights, measured, sample_phrase_weights
from diffexp_jax.models.blocks import OF_ENCODERS, stacked
from diffexp_jax.pipelines import (
    Conditioning,
    Pipeline,
    encode_empty,
    encode_prompts,
    load_pipeline,
    on_one_device,
    zero_conditioning,
)
from diffexp_jax.prompts import PromptSet, one_prompt
from diffexp_jax.sampling import EMBEDDED, Noise, Steps
from diffexp_jax.settings import Settings
from diffexp_jax.settings.training import Exploration


class Sampler(NamedTuple):
    """A model, and how it is sampled; arrays are on the host, or shapes where so built."""

    pipeline: Pipeline
    empty: Conditioning  # of "": the null of Eq. 8
    uncond: Conditioning  # of guidance (Eq. 4), which leads away from it: of none, or of the negative prompt
    n_steps: int
    guidance: float
    eta: float
    exploration: Exploration  # its `iterations` is a number
    noise: Noise = Noise()
    shards: bool = False  # whether the devices share out the large weights of the network and the text encoders
    equal_blocks: int | None = None  # of a network, in a row, that are a loop in a program: so many or more

    @classmethod
    def build(cls, settings: Settings, *, weights: bool = True) -> "Sampler":
        """Loads the model that the settings name.

        Args:
          weights: False gives shapes in place of weights, and zeros for conditioning.

        Raises:
          InputError: a file of the model is missing or does not fit.
        """
        pipeline = load_pipeline(settings.model.path, weights=weights, **pipeline_options(settings))
        shards = settings.parallel.shards(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pipeline.base)))
        of_devices = {"shards": shards, "equal_blocks": settings.model.equal_blocks(shards=shards)}
        if weights:
            empty = encode_empty(pipeline, program=program(**of_devices))
        else:
            empty = jax.tree.map(lambda x: x[0], zero_conditioning(pipeline, 1))
        s, exploration = settings.sampling, replace(settings.exploration, iterations=settings.exploring_iterations)
        uncond = pipeline.unconditional(empty)
        sampler = cls(pipeline, empty, uncond, s.steps, s.guidance, s.eta, exploration, s.noise_rule, **of_devices)
        for each in (sampler, sampler.evaluating(settings)):
            each.steps(explore=False)  # what the model's process does not accept
        return sampler.negated(s.negative_prompt) if s.negative_prompt else sampler

    def evaluating(self, settings: Settings) -> "Sampler":
        """A sampler of this model by the steps, and with the noise and the guidance, that evaluation has."""
        s = settings.eval_sampling
        return self._replace(n_steps=s.steps, eta=s.eta, guidance=s.guidance, noise=s.noise_rule)

    def negated(self, negative_prompt: str) -> "Sampler":
        """A sampler whose guidance leads away from this prompt, as diffusers' `negative_prompt`; SDXL gets no zeros.

        Eq. 8's null stays the embedding of "": it says how much of a word there is, not what is to be left out.

        Raises:
          InputError: the model's guidance leads away from nothing.
        """
        if self.pipeline.guidance is EMBEDDED:
            raise InputError(
                f"negative_prompt={negative_prompt[:40]!r}: the model has its guidance as an input, which leads away "
                "from no prompt; wants none"
            )
        cond = self.encode(one_prompt(negative_prompt))
        return self._replace(uncond=jax.tree.map(lambda x: x[0], cond))

    @property
    def frozen(self) -> dict[str, Any]:
        """The arrays that sampling reads, by the pipeline's parts; the network's as the devices are to hold them."""
        pipeline = self.pipeline
        base = as_held(pipeline.base, pipeline.blocks, shards=self.shards, equal_blocks=self.equal_blocks)
        return pipeline.sampling_params | {pipeline.trainable: base}

    def steps(self, *, explore: bool, noise_from: int | None = None) -> Steps:
        """The sampling steps; guidance follows Eq. 7 where `explore`, else it is constant.

        `noise_from` is the first that adds noise, None: the first that may (`Noise.starts`).
        """
        process, e = self.pipeline.process, self.exploration
        t = process.timesteps(self.n_steps)
        scales = {"w_low": e.w_low, "w_high": self.guidance, "t_thresh": e.t_thresh, "active": explore}
        w_t = guidance_schedule(self.noise_left(), **scales)
        eta = self.noise.strengths(self.eta, self.n_steps, noise_from)
        return process.make_steps(t, w_t, eta=eta, noise=self.noise.kind)

    def noise_left(self) -> Num[np.ndarray, "T"]:
        """What t_thresh of Eq. 7 is compared with at each step."""
        process = self.pipeline.process
        t = process.timesteps(self.n_steps)
        return measured(t, self.exploration.threshold_of, noise_level=process.noise_level)

    def count_low_steps(self) -> int:
        """How many steps have another guidance under Eq. 7 than without it."""
        return int((np.asarray(self.steps(explore=True).w_t) != np.asarray(self.steps(explore=False).w_t)).sum())

    def warn_of_no_schedule(self) -> None:
        """Warns where Eq. 7 is asked for and changes no step: with few steps none may be above the threshold."""
        e = self.exploration
        if e.w_low != self.guidance and e.t_thresh < 1000 and not self.count_low_steps():
            first = np.max(self.noise_left())
            logging.warning(
                "t_thresh %d is above all %d steps, of which the first is at t=%.0f: guidance is never low; wants a "
                "smaller threshold, or more steps",
                *(e.t_thresh, self.n_steps, first),
            )

    def evaluations(self, *, explore: bool) -> int:
        """The network's evaluations of a sample: at each step both halves of the guidance, or the one that counts."""
        return int(self.pipeline.evaluations(np.asarray(self.steps(explore=explore).w_t)).sum())

    def count_evaluations(self) -> Callable[[int], int]:
        """A function (iterations) -> the network's evaluations of a sample in each of the first ones of fine-tuning."""
        explored, plain = (self.evaluations(explore=on) for on in (True, False))
        exploring = self.exploration.iterations if self.exploration.enabled else 0

        def count(iterations):
            n = min(iterations, exploring)
            return n * explored + (iterations - n) * plain

        return count

    def guidance_scales(self, *, explore: bool) -> Float[np.ndarray, "N"]:
        """Every w_t of the plain steps, and of those that explore where `explore`: see `Pipeline.network`."""
        return np.concatenate([np.asarray(self.steps(explore=on).w_t) for on in {False, explore}])

    def encode(self, prompts: PromptSet) -> Conditioning:
        """The prompts' conditioning, a row each; zeros where there are no weights. Warns of prompts that are cut.

        Raises:
          InputError: there are so many that it would take more than half of the machine's memory.
        """
        needed = len(prompts) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.empty))
        if needed > backend.host_memory() // 2:
            most = len(prompts) * (backend.host_memory() // 2) // needed
            raise InputError(
                f"prompts {prompts.name!r}: {len(prompts):,} of them would take {needed / 2**30:.1f} GiB of this "
                f"machine's memory once they are encoded; wants at most {most:,}, half of it"
            )
        if not self.pipeline.tokenizers:
            return zero_conditioning(self.pipeline, len(prompts.texts))
        cond, cut = encode_prompts(
            self.pipeline, prompts.texts, program=program(shards=self.shards, equal_blocks=self.equal_blocks)
        )
        for longest, texts in cut.items():
            more = f" (and {len(texts) - 1} others)" if texts[1:] else ""
            logging.warning("prompt cut to %d tokens: %.100r%s", longest, texts[0], more)
        return cond

    def weighted_units(self, units: Int[np.ndarray, "N L"]) -> Int[np.ndarray, "N L"]:
        """The units of an iteration's samples; zeros, so that nothing is weighted, where `share` leaves one out."""
        return np.where(has_weights(len(units), share=self.exploration.share)[:, None], units, 0)

    def reweighted(
        self, prompts: PromptSet, rows: np.ndarray, cond: Conditioning, *, seed: int
    ) -> tuple[Conditioning, list[str]]:
        """Draws of Eq. 8, for every image or prompt: the conditioning, and what was weighted, in words.

        Args:
          rows: of the prompts, one for each image.
          cond: of the images.
        """
        pipeline, e = self.pipeline, self.exploration
        units = pipeline.units(prompts, e.unit)[rows]
        drawn_for = rows if e.scope == "prompt" else np.arange(len(rows))
        keys = parallel.keys_of(parallel.stream(seed, "weights"), drawn_for)

        def one(key, units, cond):
            weights = sample_phrase_weights(key, units, weight_range=e.weight_range)
            return pipeline.reweight(cond, self.empty, weights), weights

        weighted, weights = jax.device_get(jax.vmap(one)(keys, units, cond))
        words = []
        for row, of_prompt, weight in zip(rows, units, weights, strict=True):
            chosen = of_prompt[weight != 1.0]
            pieces = pipeline.units_of_text(prompts.texts[row], of_prompt)
            word = "".join(text for text, unit in pieces if unit in chosen)
            words.append(f"{word} x {weight[weight != 1.0][0]:.2f}" if chosen.size else "no word weighted")
        return weighted, words

    def check_memory(self, n: int) -> None:
        """Raises InputError where n images, held until all are there, take more than half of the machine's memory."""
        pipeline = self.pipeline
        latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), np.float32)
        numbers = jax.eval_shape(pipeline.decode, pipeline.sampling_params, latents).size
        needed, there = 5 * numbers * n, backend.host_memory() // 2  # as float32, and as bytes
        if needed > there:
            raise InputError(
                f"{n:,} images would take at least {needed / 2**30:.1f} GiB of this machine's memory; wants at most "
                f"{there // (5 * numbers):,} at once, half of it"
            )


def as_held(params: Any, blocks: Sequence[str], *, shards: bool, equal_blocks: int | None) -> Any:
    """Frozen weights as the devices are to hold them.

    Args:
      blocks: see `stacked`.
      shards: each device has a part of the large kernels.
      equal_blocks: see `Sampler`.
    """
    params = parallel.shared_out(params, backend.device_count()) if shards else params
    return stacked(params, blocks, at_least=equal_blocks) if equal_blocks else params


def program(*, shards: bool, equal_blocks: int | None) -> Callable:
    """How prompts are encoded: see `encode_prompts`."""
    by_devices = parallel.by_all_devices if shards else on_one_device

    def of(function: Callable, params: Any) -> Callable:
        return by_devices(function, as_held(params, OF_ENCODERS, shards=shards, equal_blocks=equal_blocks))

    return of


def pipeline_options(settings: Settings) -> dict[str, Any]:
    """The settings that `load_pipeline` takes."""
    m = settings.model
    options = {"image_size": m.image_size, "remat_blocks": m.remat == "block", "vae_slice": m.vae_slice}
    options |= {"revision": m.revision, "variant": m.variant, "tokenizer": m.tokenizer}
    options |= {"scheduler": m.scheduler.overrides, "t5_tokens": m.t5_tokens}
    return {"dtype": settings.dtype, "matmul_precision": m.matmul_precision} | options
