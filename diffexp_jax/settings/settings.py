"""All settings of a run as one frozen value: default, range and meaning of each in one place."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffexp_jax import backend, paths
from diffexp_jax.algorithms import METHODS, Method
from diffexp_jax.errors import InputError
from diffexp_jax.exploration import exploring_iterations
from diffexp_jax.limits import SEED, Number, Setting, one_of, setting, settings_of, whole
from diffexp_jax.models.precision import DTYPES, is_full_float32
from diffexp_jax.parallel import HostSettings, Split, split_batch
from diffexp_jax.rewards import Spec, parsed_spec
from diffexp_jax.settings.running import Checkpoint, Eval, HostReward, Log, Parallel
from diffexp_jax.settings.sampling import Sampling
from diffexp_jax.settings.training import BatchSizes, Exploration, LoRA, Model, Optim, TextNorm


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a run, in the order of configs/base.py."""

    seed: int = setting(0, "seed of everything random: same seed, same run", SEED)
    algorithm: str | None = setting(None, f"how to fine-tune: {', '.join(METHODS)}")
    cpu_devices: int | None = setting(
        None,
        "number of devices that a CPU counts as; None: one per core, as the batch and the memory allow",
        whole(1, 1024, optional=True),
    )
    iterations: int = setting(
        100,
        "iterations of the run: each draws a batch of samples",
        whole(1),
        about="""
        The paper gives no number. Exploration ends at three quarters of it (`exploration.fraction`): of 100
        iterations of 64 images, which are 6,400 reward queries, after 4,800.
        """,
    )
    model: Model = Model()
    prompts: str = setting(
        "animal_activities",
        "prompts to fine-tune on",
        about="""
        A built-in set; a file (.txt, .csv, .tsv, .json); rows of one, FILE.csv:COLUMN=VALUE|VALUE; a single prompt: its
        words, or prompt:TEXT, which may be one word.
        """,
    )
    reward: str = setting(
        "emoji_pickscore",
        "reward that is maximised",
        about="""
        NAME, NAME:PATH, NAME:hub:ORG/NAME, textnorm(NAME:PATH), several joined by "+"; the user's own function:
        jax:MODULE:FUNCTION or, for methods that need no gradient of it, python:MODULE:FUNCTION
        """,
    )
    reward_weights: tuple[float, ...] = setting(
        (), "weights of the parts of a sum, in their order; (): those of DRaFT and PRDP", Number(-1e6, 1e6)
    )
    reward_dtype: str = setting(
        "float32", 'of the trained reward\'s networks: "float32", "bfloat16", "float16"', DTYPES
    )
    host_reward: HostReward = HostReward()
    textnorm: TextNorm = TextNorm()
    batch: BatchSizes = BatchSizes()
    sampling: Sampling = Sampling()
    exploration: Exploration = Exploration()
    lora: LoRA = LoRA()
    optim: Optim = Optim()
    methods: Mapping[str, Method] = field(default_factory=lambda: {name: kind() for name, kind in METHODS.items()})
    eval: Eval = Eval()
    log: Log = Log()
    deterministic: bool = setting(
        False,
        "whether GPUs must give the same bits each time",
        about="""
        On a GPU sums are made in any order: a run that is repeated or resumed differs in its last bits, and soon in
        more. True asks XLA for kernels that repeat themselves, which may be slower. CPUs do without it.
        """,
    )
    compilation_cache: str = setting(
        "~/.cache/diffexp_jax",
        'folder that keeps compiled programs for the next run; "": none',
        paths.local_or_none,
    )
    hosts: HostSettings = HostSettings()
    parallel: Parallel = Parallel()
    stop_grace: float = setting(
        20.0,
        "seconds that an iteration may take after a signal",
        Number(0.0, 1e6),
        about="""
        SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) end a run after the current iteration, saved. An
        iteration that takes longer is stopped, and the state before it is saved. Schedulers kill some 30 s
        after SIGTERM.
        """,
    )
    checkpoint: Checkpoint = Checkpoint()

    # --------------------------------------------------------------------------------------- what follows from them

    @property
    def method(self) -> Method:
        """How the run fine-tunes, with the settings of that.

        Raises:
          InputError: there is no such method.
        """
        one_of("algorithm", self.algorithm, METHODS)
        return self.methods[self.algorithm]

    @property
    def optimizer_updates(self) -> int:
        """The number of optimizer updates in the whole run."""
        return self.iterations * self.method.updates * self.method.inner_epochs

    def split_among(self, devices: int) -> Split:
        """How an iteration's samples are shared out among so many devices.

        Raises:
          InputError: they do not divide.
        """
        samples, group = self.batch.samples, self.batch.group
        if samples % group:
            raise InputError(f"batch.samples={samples}: wants a multiple of batch.group={group}")
        options = {"per_forward": self.batch.samples_per_forward, "updates": self.method.updates, "group": group}
        return split_batch(samples, devices=devices, **options)

    @cached_property
    def split(self) -> Split:
        """`split_among` the devices that there are."""
        return self.split_among(backend.device_count())

    @property
    def eval_sampling(self) -> Sampling:
        """How images are sampled between iterations and after the run."""
        return self.sampling.otherwise(steps=self.eval.steps, eta=self.eval.eta, guidance=self.eval.guidance)

    @property
    def exploring_iterations(self) -> int:
        """How many of the first iterations explore, whether or not exploration is enabled."""
        e = self.exploration
        return exploring_iterations(self.iterations, fraction=e.fraction) if e.iterations is None else e.iterations

    @property
    def dtype(self) -> np.dtype:
        """What model.dtype comes to on this machine."""
        auto = "float32" if backend.platform() == "cpu" else "bfloat16"
        return jnp.dtype(auto if self.model.dtype == "auto" else self.model.dtype)

    @property
    def full_float32(self) -> bool:
        """Whether the model computes in float32 throughout, matrix products too."""
        return is_full_float32(self.model.matmul_precision, self.dtype)

    @cached_property
    def trained_reward(self) -> Spec:
        return parsed_spec(self.reward)

    @cached_property
    def reported_rewards(self) -> tuple[Spec, ...]:
        """What evaluation reports: the trained reward, and where the run evaluates, `eval.rewards`; each once."""
        others = self.eval.rewards if self.eval.every else ()
        return (self.trained_reward, *(parsed_spec(text) for text in dict.fromkeys(others) if text != self.reward))


def sections_of(section: Any) -> Iterator[tuple[str, Any]]:
    """(name, section) of the sections in a value of a section's dataclass, or of `Settings`; methods have their own."""
    for part in dataclasses.fields(section):
        value = getattr(section, part.name)
        if part.name == "methods":
            yield from value.items()
        elif dataclasses.is_dataclass(value):
            yield part.name, value


def by_key(section: Any, prefix: str = "") -> Iterator[tuple[str, Setting, Any]]:
    """(dotted key, setting, value) of all settings in a section's value, or in `Settings`."""
    for name, known in settings_of(section):
        yield prefix + name, known, getattr(section, name)
    for name, part in sections_of(section):
        yield from by_key(part, f"{prefix}{name}.")
