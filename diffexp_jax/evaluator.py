"""A model that can be sampled and scored: that of a run, of a run that is still training, or one without a run.

model = Evaluator.of_run("runs/x")
images = model.images(["a dog riding a bike"], seed=0)
scores = model.scores(images, ["a dog riding a bike"], rewards=["emoji_pickscore"])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from diffexp_jax import parallel
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats.lora_files import LORA_FILE
from diffexp_jax.models.lora import load_lora, scaled
from diffexp_jax.pipelines import make_context
from diffexp_jax.programs import Programs, as_bytes, bytes_and_finite, check_pictures, floats_and_finite, make_generate
from diffexp_jax.prompts import PromptSet, as_prompt_set
from diffexp_jax.rewards import Reward
from diffexp_jax.rewards.scoring import Scorers, means_of
from diffexp_jax.run.checkpoint import NEWEST, read_lora
from diffexp_jax.sampler import Sampler
from diffexp_jax.sampling import check_latents, initial_latents
from diffexp_jax.settings import SAMPLED, Settings, sampling_settings
from diffexp_jax.settings.running import Eval
from diffexp_jax.task import Task

Checkpoint = str | int | None
Prompts = str | Sequence[str] | PromptSet | Task  # a str as the config's `prompts` names a set, else prompts themselves


@dataclass(frozen=True)
class Evaluator:
    """A model that can be sampled and scored. Arrays are on the devices; a program is compiled once for each shape.

    Seeds depend on nothing else: image i of a call has the same noise on any number of devices, in any batch.
    """

    sampler: Sampler
    params: Any  # the pipeline's for sampling
    lora: Any  # None: the model as it is
    generate: Callable[..., Any]  # `make_generate`'s, of bytes; where `strict`, also whether each picture is finite
    batch: int  # images at once, over all devices
    scorers: Scorers
    chunks: int = 1  # forward passes that a device's share of a batch is split into
    strict: bool = True  # whether a picture that is not finite is an error: as bytes it would be black
    generate_floats: Callable[..., Any] | None = None  # numbers in place of bytes
    iteration: int | None = None  # of the run's, after which it had this LoRA
    _loaded: dict[tuple[str, ...], Scorers] = field(default_factory=dict, repr=False, compare=False)  # by specs

    # ---------------------------------------------------------------------------------------------------- made of what

    @classmethod
    def of_run(
        cls, workdir: str | Path, checkpoint: Checkpoint = None, *, settings: Settings | None = None, **options: Any
    ) -> "Evaluator":
        """The model that a run has fine-tuned, sampled as the run evaluates; where it keeps one, the LoRA's average.

        Args:
          checkpoint: "newest", "best", or the number of an iteration. None: what the run ended with, of a run that goes
            on the newest.
          settings: where they are to be others than those of its config.json.
          options: of `of_settings`; and, by the names of `settings.SAMPLED`, what is to be sampled by otherwise.

        Raises:
          InputError: there is no run, or no such checkpoint; or as `of_settings`.
        """
        workdir = Path(workdir)
        said = {name: options.pop(name) for name in SAMPLED & options.keys()}
        settings = sampling_settings(workdir, said) if settings is None else settings
        checkpoint = NEWEST if checkpoint is None and not (workdir / LORA_FILE).is_file() else checkpoint
        return cls.of_settings(settings, lora=workdir, checkpoint=checkpoint, **options)

    @classmethod
    def of_model(cls, model: str | Path = "emoji", **options: Any) -> "Evaluator":
        """A model without a run, sampled as diffusers does: 50 steps, guidance 7.5, eta 0.

        Args:
          model: what --model of scripts/sample.py may be.
          options: see `of_run`, e.g. steps=20, guidance=5.0, lora="FILE"; so are the errors.
        """
        said = {name: options.pop(name) for name in SAMPLED & options.keys()}
        return cls.of_settings(sampling_settings(None, said | {"model": str(model)}), **options)

    @classmethod
    def of_settings(
        cls,
        settings: Settings,
        *,
        lora: str | Path | None = None,
        checkpoint: Checkpoint = None,
        lora_scale: float = 1.0,
        rewards: Mapping[str, Reward] | None = None,
        batch: int = 16,
        chunks: int = 1,
        strict: bool = True,
    ) -> "Evaluator":
        """The model that settings name, with a LoRA or without.

        Args:
          lora: a file, a folder that holds one, or the folder of a run.
          checkpoint: of the run whose folder `lora` is, see `of_run`; None: the file that it holds.
          lora_scale: factor of the LoRA, besides its alpha / rank: 0 is the model before fine-tuning.
          rewards: to score with, by name.
          batch: images at once, over all devices; made a multiple of devices x chunks.
          chunks, strict: see `Evaluator`.

        Raises:
          InputError: a file is missing or does not fit, or there is no such checkpoint.
        """
        iteration, tuned, scale = None, None, settings.lora.alpha / settings.lora.rank
        if checkpoint is not None:
            iteration, tuned = read_lora(Path(lora), str(checkpoint))
        sampler = Sampler.build(settings).evaluating(settings)
        if lora is not None and checkpoint is None:
            tuned, scale = load_lora(lora, sampler.pipeline.base, prefix=sampler.pipeline.lora_prefix)
        unit = jax.device_count() * chunks
        batch, options = max(batch // unit, 1) * unit, {"n_chunks": chunks, "lora_scale": 1.0}
        return cls(
            sampler=sampler,
            params=parallel.share(sampler.frozen),
            lora=parallel.replicate(scaled(tuned, scale * lora_scale, others=lora_scale)),
            generate=make_generate(sampler.pipeline, form=bytes_and_finite if strict else as_bytes, **options),
            generate_floats=make_generate(sampler.pipeline, form=floats_and_finite, **options),
            batch=batch,
            scorers=Scorers.of(rewards or {}, batch=batch // chunks),
            chunks=chunks,
            strict=strict,
            iteration=iteration,
        )

    @classmethod
    def of_experiment(cls, experiment: Experiment, programs: Programs, frozen: Any) -> "Evaluator":
        """What a run evaluates with, by its own programs; `with_lora` gives it the LoRA as it is by then.

        Args:
          frozen: the experiment's, on the devices.
        """
        split, params = experiment.split, experiment.reported_params(frozen)
        return cls(
            sampler=experiment.sampler.evaluating(experiment.settings),
            params=frozen.model,
            lora=None,
            generate=programs.generate,
            batch=split.samples,
            scorers=Scorers.of(experiment.rewards, batch=split.samples // split.chunks, params=params),
            chunks=split.chunks,
            strict=False,
        )

    def with_lora(self, lora: Any) -> "Evaluator":
        """This model with another LoRA of the same shapes, which is on the devices."""
        return replace(self, lora=lora)

    def untuned(self) -> "Evaluator":
        """The model before fine-tuning, in the same program: with an update of nothing."""
        return self.with_lora(parallel.replicate(jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), self.lora)))

    def sampled_by(self, **changes: Any) -> "Evaluator":
        """This model with other numbers of its `Sampler`: guidance, eta, n_steps, exploration."""
        return replace(self, sampler=self.sampler._replace(**changes))

    # -------------------------------------------------------------------------------------------- sampling and scoring

    def task(self, prompts: Prompts) -> Task:
        """Prompts as the model and the rewards read them."""
        rewards = self.scorers.rewards
        return prompts if isinstance(prompts, Task) else Task.of(self.sampler, rewards, as_prompt_set(prompts))

    def weighted(self, prompts: Prompts, *, samples_per_prompt: int = 1, seed: int = 0) -> tuple[Task, list[str]]:
        """Prompts under random weights (Eq. 8), a row for each image; and what was weighted, in words."""
        task = self.task(prompts)
        rows, images = np.repeat(np.arange(len(task.texts)), samples_per_prompt), task.repeated(samples_per_prompt)
        cond, words = self.sampler.reweighted(task.prompts, rows, images.cond, seed=seed)
        return images._replace(cond=cond), words

    def images(
        self,
        prompts: Prompts,
        *,
        seed: int = 0,
        samples_per_prompt: int = 1,
        schedule: bool = False,
        latents: Any = None,
        floats: bool = False,
        advance: Callable[[int], Any] = lambda n: None,
    ) -> UInt8[np.ndarray, "N H W 3"] | Float[np.ndarray, "N H W 3"]:
        """Images of each prompt, prompt by prompt, as bytes; all of them are held at once.

        Args:
          schedule: whether guidance follows exploration's schedule (Eq. 7).
          latents: [N,h,w,c], standard normal: the noise to start from, in place of the seed's.
          floats: whether to give float32 in [0,1].
          advance: called with the number of images just sampled: a progress bar's update.

        Raises:
          InputError: a picture is not finite, the latents do not fit, or so many images take too much memory.
        """
        task = self.task(prompts)
        rows, shape = np.repeat(np.arange(len(task.texts)), samples_per_prompt), self.sampler.pipeline.latent_shape
        n, unit, key = len(rows), jax.device_count() * self.chunks, parallel.stream(seed, "sample")
        self.sampler.check_memory(n)
        if latents is not None:
            check_latents(latents, (n, *shape))
        sample = self._sampling(schedule=schedule, floats=floats)
        size, parts = min(self.batch, -(-n // unit) * unit), []
        for start in range(0, n, size):
            index = np.arange(start, start + size).clip(max=n - 1)  # the last batch is filled up: one compile
            keys = parallel.keys_of(key, index)
            x_T = initial_latents(keys, shape) if latents is None else np.asarray(latents)[index]
            parts.append(sample(task.rows(rows[index]), keys, x_T)[: n - start])
            advance(len(parts[-1]))
        return np.concatenate(parts)

    def scores(
        self, images: Any, prompts: Prompts, *, rewards: Sequence[str] | None = None
    ) -> dict[str, Float[np.ndarray, "N"]]:
        """{"reward": [N], "reward/part": [N]}, each reward on its published path.

        Args:
          images: bytes [H,W,3], which may differ in size: an array or a list.
          prompts: one for each image.
          rewards: as the config's `reward`; they are loaded once. None: those that this model was given.
        """
        texts, scorers = as_prompt_set(prompts).texts, self.scorers
        if rewards is not None:
            if (specs := tuple(rewards)) not in self._loaded:
                self._loaded[specs] = Scorers.load(specs, batch=self.scorers.batch)
            scorers = self._loaded[specs]
        if len(texts) != len(images):
            raise InputError(f"{len(images)} images and {len(texts)} prompts; wants a prompt for each image")
        return scorers.score(images, scorers.tokens(texts))

    def evaluate(
        self,
        prompts: Prompts,
        *,
        seed: int = 0,
        samples_per_prompt: int = 1,
        schedule: bool = False,
        keep: Sequence[int] | np.ndarray = (),
        measures: Mapping[str, Callable] | None = None,
        advance: Callable[[int], Any] = lambda n: None,
    ) -> tuple[UInt8[np.ndarray, "K H W 3"], dict[str, Float[np.ndarray, "N ..."]]]:
        """Scores of images of each prompt, on the noise of the prompt set's evaluations.

        A batch of images is scored and dropped before the next is sampled: what is held does not grow with the prompts.

        Args:
          schedule, advance: see `images`.
          keep: which images to return, counted prompt by prompt, in ascending order.
          measures: what else is taken of images, by name: functions of [B,H,W,3] that give [B,...].

        Returns:
          The images that `keep` says, {"reward": [N], "reward/part": [N], "measure": [N,...]} of all, prompt by prompt.
        """
        task, keep, kept, found = self.task(prompts), np.asarray(keep, int), [], []
        rows = np.repeat(np.arange(len(task.texts)), samples_per_prompt)
        key, sample = parallel.stream(seed, f"eval/{task.name}"), self._sampling(schedule=schedule)
        for start in range(0, len(rows), self.batch):
            index = np.arange(start, start + self.batch).clip(max=len(rows) - 1)
            part, n = task.rows(rows[index]), min(self.batch, len(rows) - start)
            images = sample(part, parallel.keys_of(key, index))[:n]
            found.append(self.scorers.score(images, jax.tree.map(lambda x, n=n: x[:n], part.tokens)))
            found[-1] |= {name: np.array(measure(images)) for name, measure in (measures or {}).items()}
            kept.append(images[keep[(start <= keep) & (keep < start + n)] - start])
            del images
            advance(n)
        return np.concatenate(kept), {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def means(self, tasks: Sequence[Task], numbers: Eval, *, seed: int) -> dict[str, float]:
        """The mean of every reward and part over each prompt set, as eval/SET/REWARD; `numbers` are `Settings.eval`."""
        means = {}
        for task in tasks:
            n = numbers.samples_of_each(len(task.texts))
            means |= means_of(f"eval/{task.name}", self.evaluate(task, seed=seed, samples_per_prompt=n)[1])
        return means

    def _sampling(self, *, schedule: bool, floats: bool = False) -> Callable[..., np.ndarray]:
        """A function (task, keys, x_T=None) -> a batch of images, one of each row of the task."""
        steps, of_scales = self.sampler.steps(explore=schedule), self.generate_floats if floats else self.generate
        generate, steps = of_scales(np.asarray(steps.w_t)), parallel.replicate(steps)

        def sample(task, keys, x_T=None):
            context = make_context(task.cond, self.sampler.uncond)
            context, keys, x_T = parallel.shard((context, keys, x_T), len(task.prompts))
            images = parallel.unshard(generate(self.params, self.lora, context, keys, steps, x_T))
            if self.strict or floats:
                images, finite = images
                check_pictures(finite)
            return images

        return sample
