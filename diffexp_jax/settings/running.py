"""What a run reports, keeps, and waits for: the sections of its settings that move nothing that it learns."""

from dataclasses import dataclass

from diffexp_jax import backend
from diffexp_jax.limits import Number, positive, setting, whole
from diffexp_jax.models.precision import DTYPES
from diffexp_jax.settings.sampling import GUIDANCE


@dataclass(frozen=True, kw_only=True)
class HostReward:
    """How a reward in plain Python is called: python:..., jpeg_compressibility."""

    timeout: float = setting(
        600.0,
        "seconds that a call may take (on samples_per_forward images) before the run stops",
        positive(1e7),
    )
    workers: int = setting(4, "threads that call the reward at once", whole(1, 1024))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluations between iterations, without exploration."""

    every: int = setting(10, "iterations between evaluations; 0: never", whole(0))
    prompts: tuple[str, ...] = setting(
        ("animal_activities", "animal_activities_unseen", "animals"),
        "prompt sets that are evaluated, each as `prompts`",
    )
    rewards: tuple[str, ...] = setting((), "further rewards to report, never optimised")
    reward_dtype: str = setting(
        "float32", "type of the networks that evaluation scores with, as `reward_dtype`", DTYPES
    )
    steps: int | None = setting(
        None,
        "sampling steps of evaluations; None: sampling.steps",
        whole(1, 1000, optional=True),
        about="""
        Of these the same share adds noise as in training, unless eval.eta is 0. Flow-GRPO trains at 10 steps and
        evaluates at 40.
        """,
    )
    eta: float | None = setting(
        None,
        "noise of these steps, as sampling.eta; None: that",
        Number(0.0, 10.0, optional=True),
        about="""
        0 is the deterministic chain, as people sample: DDIM's, or the ODE of flow matching. Image grids, evaluate.py
        and sample.py follow eval.steps, eval.eta and eval.guidance too.
        """,
    )
    guidance: float | None = setting(
        None,
        "guidance of evaluations, as sampling.guidance; None: that",
        GUIDANCE._replace(optional=True),
        about="For a run that trains without guidance (sampling.guidance=1), whose model people sample with it.",
    )
    samples_per_prompt: int = setting(1, "images of each prompt in an evaluation", whole(1, 2**20))
    samples_per_set: int = setting(
        1, "images of each set at least: a small set gets more of each prompt", whole(1, 2**20)
    )

    def samples_of_each(self, n_prompts: int, per_prompt: int | None = None) -> int:
        """Images of each of a set's prompts: at least `samples_per_set` of the whole set.

        Args:
          per_prompt: at least so many of each; None: `samples_per_prompt`.
        """
        return max(per_prompt or self.samples_per_prompt, -(-self.samples_per_set // n_prompts))


@dataclass(frozen=True, kw_only=True)
class Log:
    """Image grids, and where else the rows of metrics go."""

    images_every: int = setting(10, "iterations between image grids; 0: never", whole(0))
    images: int = setting(12, "pictures in a grid: fixed prompts, fixed seeds", whole(0, 4096))
    tensorboard: bool = setting(
        False,
        "whether to write metrics and grids as TensorBoard's event files, to WORKDIR/tensorboard",
    )
    wandb: bool = setting(
        False, "whether to send them to Weights & Biases (pip install wandb; WANDB_MODE=offline: no account)"
    )


SHARDING = ("auto", "true", "false")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the frozen model lies on the devices; what a run computes does not depend on it."""

    shard_weights: str = setting(
        "auto",
        "whether each device holds a part of the network's large weights, and gathers a layer's where it uses it",
        SHARDING,
        about="""
        For models that one device cannot hold: the gathering takes time. "auto": where a copy of the network would fill
        more than a third of a device's memory.
        """,
    )

    def shards(self, size: int) -> bool:
        """Whether a network of so many bytes is shared out on this machine's devices."""
        if self.shard_weights != "auto":
            return self.shard_weights == "true"
        memory = backend.device_memory()
        return memory is not None and 3 * size > memory


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which checkpoints are kept."""

    every: int = setting(10, "iterations between checkpoints (and one at the end)", whole(1))
    keep: int = setting(2, "newest checkpoints kept", whole(1, 10**4))
    best: str = setting(
        "",
        'metric whose best checkpoint is kept too, a name of metrics.jsonl; "": none',
        about="""
        Besides them the one after which this metric was largest, e.g. "eval/animals/emoji_judge"; it is written when
        the metric is, whatever `every` says. sample.py, evaluate.py and export_lora.py take it by --checkpoint best.
        """,
    )
