"""A run's settings become values, here and nowhere else: model, rewards, prompts, method, and what an iteration draws.

`Experiment.build` is what a run and its dry run start from. What only samples starts from its first part, `Sampler`.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from diffexp_jax import parallel
from diffexp_jax.algorithms import Algorithm, Batch, Policy, Setup
from diffexp_jax.algorithms.optimizer import make_optimizer
from diffexp_jax.chosen_rewards import check_files, load_features, load_rewards, text_features
from diffexp_jax.errors import InputError
from diffexp_jax.models.lora import init_lora, initial_lora, target_layers
from diffexp_jax.parallel import Split
from diffexp_jax.pipelines import Conditioning, make_context
from diffexp_jax.prompts import load_prompt_sets, load_prompts
from diffexp_jax.rewards import Reward
from diffexp_jax.run.fingerprint import fingerprint
from diffexp_jax.sampler import Sampler, as_held
from diffexp_jax.sampling import Steps
from diffexp_jax.settings import Settings
from diffexp_jax.task import Task


class Frozen(NamedTuple):
    """The arrays (or shapes) that training reads and leaves alone."""

    model: dict[str, Any]  # the pipeline's by part, those that sampling reads
    reward: Any  # the trained one's parameters
    features: Any = None  # those of another reward, whose image features the method reads


class Experiment(NamedTuple):
    """Everything that a run works with; arrays are on the host, a row per prompt, or shapes where so built."""

    sampler: Sampler  # without text encoders, as all prompts are encoded
    model: str  # the fingerprint of its weights, text encoders included
    reward: str  # the name of the trained one
    trained: Reward  # as training uses it, in reward_dtype
    rewards: Mapping[str, Reward]  # as evaluation reports them, in eval.reward_dtype: it, and those only reported
    features: Reward | None  # the one whose image features the method reads; None: it reads none
    text: Float[np.ndarray, "P F"] | None  # its features of the training prompts, where the method reads them too
    train: Task
    evals: list[Task]
    ids: Int[np.ndarray, "P"]  # of the training prompts, see `PromptSet.ids`
    units: Int[np.ndarray, "P L"]  # of the training prompts, see `Pipeline.units`
    settings: Settings
    optimizer: optax.GradientTransformation

    @classmethod
    def build(cls, settings: Settings, *, weights: bool = True) -> "Experiment":
        """Loads what the settings name; prompts are encoded once, here.

        Args:
          settings: `checked`.
          weights: False gives shapes in place of weights, and zeros for conditioning and tokens: for a dry run. It
            needs no files of published models, and has no evaluation sets.

        Raises:
          InputError: a setting that cannot work, or a file that is missing or does not fit.
        """
        check_files(settings, weights=weights)
        train, evals = load_prompts(settings.prompts), []
        if weights and settings.eval.every:
            evals = load_prompt_sets(settings.eval.prompts)
        reward, trained, rewards = load_rewards(settings, weights=weights)
        sampler = Sampler.build(settings, weights=weights)
        target_layers(settings.lora.targets, sampler.pipeline.lora_targets)
        task, text = Task.of(sampler, {reward: trained}, train), None
        if (features := load_features(settings, trained, weights=weights)) and settings.method.reads_text:
            tokens = task.tokens[reward] if features is trained else features.tokenize(train.texts)
            text = text_features(settings, features, tokens, weights=weights)
        evals, pipeline = [Task.of(sampler, rewards, prompts) for prompts in evals], sampler.pipeline
        experiment = cls(
            sampler=sampler._replace(pipeline=pipeline.without_text_encoders()) if weights else sampler,
            model=fingerprint(pipeline.params) if weights else "",
            reward=reward,
            trained=trained,
            rewards=rewards,
            features=features,
            text=text,
            train=task,
            evals=evals,
            ids=np.array(train.ids, np.int32),
            units=pipeline.units(train, settings.exploration.unit),
            settings=settings,
            optimizer=make_optimizer(settings.optim, settings.optimizer_updates),
        )
        if settings.method.noise_is_for:
            check_noise(experiment)
        return experiment

    @property
    def split(self) -> Split:
        """How an iteration's samples are shared out."""
        return self.settings.split

    # ------------------------------------------------------------------------------------------------------- arrays

    @property
    def frozen(self) -> Frozen:
        other = self._other_reward
        return Frozen(self.sampler.frozen, self.reward_params(self.trained), other and self.reward_params(other))

    def reward_params(self, reward: Reward) -> Any:
        """A reward's weights as the devices are to hold them: each has them all."""
        return as_held(reward.params, reward.blocks, shards=False, equal_blocks=self.sampler.equal_blocks)

    @property
    def _other_reward(self) -> Reward | None:
        """The one whose image features the method reads, where it is not the trained one."""
        return None if self.features is self.trained else self.features

    def reported_params(self, frozen: Frozen) -> dict[str, Any]:
        """The weights of the rewards that evaluation reports, on the devices, where those of `frozen` are already."""
        return {
            name: frozen.reward if reward is self.trained else parallel.share(self.reward_params(reward))
            for name, reward in self.rewards.items()
        }

    @property
    def lora_scale(self) -> float:
        return self.settings.lora.alpha / self.settings.lora.rank

    @property
    def lora_layers(self) -> tuple[str, ...]:
        """The last parts of the names of the layers that are trained."""
        return target_layers(self.settings.lora.targets, self.sampler.pipeline.lora_targets)

    def initial_lora(self) -> Any:
        """The LoRA that fine-tuning starts from."""
        key, pipeline, lora = parallel.stream(self.settings.seed, "lora"), self.sampler.pipeline, self.settings.lora
        options = {"rank": lora.rank, "alpha": lora.alpha, "targets": self.lora_layers, "prefix": pipeline.lora_prefix}
        return initial_lora(key, pipeline.base, path=lora.path, **options)

    def lora_shapes(self) -> Any:
        """The shapes of what is trained."""
        base, options = self.sampler.pipeline.base, {"rank": self.settings.lora.rank, "targets": self.lora_layers}
        return jax.eval_shape(lambda: init_lora(jax.random.key(0), base, **options))

    def identity(self) -> dict[str, str]:
        """Fingerprints of the model, the reward and the prompts, which do not depend on the names of their files."""
        trained, texts, tokens = self.trained, self.train.texts, self.train.tokens[self.reward]
        other = self._other_reward
        read = (trained.params, tokens) if other is None else (trained.params, tokens, other.params)
        return {
            "model": self.model,
            "reward": f"{self.settings.trained_reward.without_locations} {fingerprint(*read)}",
            "prompts": f"{len(texts)} {fingerprint(texts, self.units)}",
        }

    # ------------------------------------------------------------------------------------------------- an iteration

    @property
    def policy(self) -> Policy:
        """What methods know of the model and the trained reward."""
        pipeline = self.sampler.pipeline
        w_t = self.sampler.guidance_scales(explore=self.sampler.exploration.enabled)
        network = pipeline.network(w_t, lora_scale=self.lora_scale)
        return Policy(
            network=network.reading(lambda frozen: frozen.model),
            decode=lambda frozen, x_0: pipeline.decode(frozen.model, x_0),
            score=lambda frozen, *args: self.trained.score(frozen.reward, *args),
            features=self.features and self._features_of,
            latent_shape=pipeline.latent_shape,
            process=pipeline.process,
        )

    def _features_of(self, frozen: Frozen, images: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
        params = frozen.reward if self.features is self.trained else frozen.features
        return self.features.features(params, images)

    def n_features(self) -> int:
        """How many features of an image the method reads."""
        if self.features is None:
            return 0
        policy, x_0 = self.policy, jax.ShapeDtypeStruct((1, *self.sampler.pipeline.latent_shape), np.float32)

        def features(frozen, x_0):
            return policy.features(frozen, policy.decode(frozen, x_0))

        return jax.eval_shape(features, self.frozen, x_0).shape[1]

    def algorithm(self, *, n_chunks: int | None = None) -> Algorithm:
        """The method on this model and reward; `n_chunks` None: as many as the batch is split into."""
        setup = Setup(
            self.policy,
            self.optimizer,
            n_samples=self.split.samples // self.split.devices,
            n_chunks=n_chunks or self.split.chunks,
            n_prompts=len(self.train.texts),
            group=self.settings.batch.group,
            n_steps=self.sampler.n_steps,
            n_noisy=self.sampler.noise.n_noisy(self.sampler.n_steps),
            confined=self.sampler.noise.confined(self.sampler.n_steps),
            remat=self.settings.model.remat != "none",
            lora_size=sum(leaf.size for leaf in jax.tree.leaves(self.lora_shapes())),
            full_float32=self.settings.full_float32,
            n_features=self.n_features(),
            reward_target=self.trained.target,
            stream=partial(parallel.stream, self.settings.seed),
        )
        algorithm = self.settings.method.make(setup)
        return algorithm._replace(init=jax.jit(algorithm.init))  # one program, not one for each shape of a state

    def batch_in_words(self) -> str:
        """How an iteration's samples come about."""
        split, group, hosts = self.split, self.settings.batch.group, parallel.number_of_hosts()
        devices = f"{split.devices} devices" + (f" of {hosts} hosts" if hosts > 1 else "")
        return (
            f"{split.samples} samples = {devices} x {split.updates} updates x {split.chunks // split.updates} forward "
            f"passes x {split.per_forward} samples, of {split.samples // group} prompts x {group}"
        )

    def explores(self, it: int) -> bool:
        """Whether iteration `it`, counted from 0, explores."""
        return self.sampler.exploration.enabled and it < self.sampler.exploration.iterations

    def all_steps(self) -> dict[tuple[bool, int], Steps]:
        """The sampling steps of any iteration, by whether it explores and by `noise_from`."""
        starts = self.sampler.noise.starts(self.sampler.n_steps)
        kinds = itertools.product((False, True), starts)
        return {(on, start): self.sampler.steps(explore=on, noise_from=start) for on, start in kinds}

    def noise_from(self, it: int) -> int:
        """The first step that adds noise in iteration `it`."""
        starts = self.sampler.noise.starts(self.sampler.n_steps)
        key = parallel.stream(self.settings.seed, "window", it)
        return starts[int(jax.random.randint(key, (), 0, len(starts)))] if len(starts) > 1 else starts[0]

    def draw_batch(self, it: int, explore: Callable[..., Conditioning] | None) -> Batch:
        """Random prompts of iteration `it` with all that the method needs of them, split among the devices.

        Prompts are drawn for `batch.group` samples that follow each other in the global index.

        Args:
          explore: reweights their conditioning (`programs.make_explore`); None leaves it as it is.
        """
        n, group, seed = self.split.samples, self.settings.batch.group, self.settings.seed
        drawn = jax.random.randint(parallel.stream(seed, "prompts", it), (n // group,), 0, len(self.train.texts))
        rows = np.repeat(np.asarray(drawn), group)
        ids = self.ids[rows]
        noise = parallel.sample_keys(parallel.stream(seed, "noise", it), n)
        cond, tokens = jax.tree.map(lambda x: x[rows], (self.train.cond, self.train.tokens[self.reward]))
        context = make_context(cond, self.sampler.uncond)
        text = None if self.text is None else self.text[rows]
        batch = parallel.shard(Batch(ids, context, tokens, noise, text), n, group=group)
        if explore is not None:
            drawn_for = ids if self.sampler.exploration.scope == "prompt" else np.arange(n)
            keys = parallel.keys_of(parallel.stream(seed, "weights", it), drawn_for)
            units = self.sampler.weighted_units(self.units[ids])
            cond = self.reweighted(explore, batch.context.cond, units, keys)
            batch = batch._replace(context=batch.context._replace(cond=cond))
        return batch

    def reweighted(
        self, explore: Callable[..., Conditioning], cond: Conditioning, units: Int[np.ndarray, "N L"], keys: Any
    ) -> Conditioning:
        """Conditioning that lies on the devices, of prompts with these units, by Eq. 8.

        Args:
          explore: `programs.make_explore`'s.
          units: zeros leave a prompt as it is.
          keys: [N]; the same key draws the same weights for a prompt.
        """
        n, group = len(units), self.settings.batch.group
        null = jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), self.sampler.empty)
        return explore(cond, *parallel.shard((null, units, keys), n, group=group))


def check_noise(experiment: Experiment) -> None:
    """Raises InputError where a step adds no noise, hence has no log-probability, and the method needs it."""
    sampler = experiment.sampler
    noise, n_steps = sampler.noise, sampler.n_steps
    of_starts = [np.asarray(sampler.steps(explore=False, noise_from=x).sigma_t) > 0 for x in noise.starts(n_steps)]
    if min(noisy.sum() for noisy in of_starts) < noise.n_noisy(n_steps):
        method = experiment.settings.method.name
        raise InputError(
            f"scheduler_config.json: a step adds no noise, and {method} needs some at every step; "
            "wants --config.model.scheduler.timestep_spacing=leading --config.model.scheduler.steps_offset=1 "
            "--config.model.scheduler.set_alpha_to_one=False"
        )
