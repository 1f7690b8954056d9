"""What a run learns from and how: the sections of its settings that decide its result. Methods' own are theirs."""

from dataclasses import dataclass
from typing import Any

from diffexp_jax import backend, paths
from diffexp_jax.exploration import MEASURES
from diffexp_jax.limits import Number, positive, setting, settings_of, whole
from diffexp_jax.models.precision import DTYPES, MATMUL_PRECISIONS
from diffexp_jax.pipelines import check_lora_targets
from diffexp_jax.prompts.units import UNITS
from diffexp_jax.sampling.ddim import PREDICTION_TYPES, SPACINGS
from diffexp_jax.settings.sampling import GUIDANCE

SCOPES = ("image", "prompt")  # of which each has a draw of Eq. 8


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Overrides of the model's scheduler_config.json, by its names; None: as in the file.

    A model that was saved with DPM++ or Euler may want timestep_spacing="leading", steps_offset=1,
    set_alpha_to_one=False (docs/use/models.md).
    """

    timestep_spacing: str | None = setting(
        None, '"leading", "trailing" or "linspace": which timesteps are sampled', (None, *SPACINGS)
    )
    steps_offset: int | None = setting(
        None, 'number added to the timesteps of "leading"', whole(0, 1000, optional=True)
    )
    set_alpha_to_one: bool | None = setting(None, "False: the last step ends at the noise of timestep 0; True: at none")
    prediction_type: str | None = setting(
        None, '"epsilon" or "v_prediction": what the network was trained to predict', (None, *PREDICTION_TYPES)
    )
    rescale_betas_zero_snr: bool | None = setting(None, 'True: the last timestep is pure noise (with "v_prediction")')
    clip_sample: bool | None = setting(None, 'False for a file whose "true" is not meant; "true" is not supported')
    shift: float | None = setting(
        None, "shift of flow matching's noise levels", Number(0.0, 1e3, above=True, optional=True)
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """{name: value} of what is not as in the file."""
        values = {name: getattr(self, name) for name, _ in settings_of(self)}
        return {name: value for name, value in values.items() if value is not None}


SCAN_LAYERS = ("auto", "true", "false")
MANY = 8  # equal blocks in a row that "auto" makes a loop of


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is fine-tuned, and what its networks compute in."""

    path: str = setting(
        "emoji",
        '"emoji", "emoji_hard", "emoji_flow" (shipped), a folder in diffusers\' format, or of the hub: hub:ORG/NAME',
        paths.local,
    )
    revision: str | None = setting(None, "branch, tag or commit of the hub's repository; None: its main branch")
    variant: str | None = setting(
        None, '"fp16": take the half-precision weight files; None: the whole ones if there are any'
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer's files, for a model that is a single file",
        paths.local_or_none,
        about="""
        A single file has none: a folder with CLIP's vocab.json and merges.txt, or hub:ORGANISATION/NAME; None: that of
        the published model on the hub.
        """,
    )
    dtype: str = setting(
        "auto",
        "number type of the model's weights and networks",
        ("auto", *DTYPES),
        about="""
        "float32", "bfloat16", "float16", "auto" = bfloat16 on accelerators, float32 on a CPU. LoRA, latents, log-probs
        and losses are float32 always, and so are SDXL's VAE and T5 in place of float16, in which they overflow.
        """,
    )
    matmul_precision: str = setting(
        "auto",
        "precision of the networks' matrix products",
        MATMUL_PRECISIONS,
        about="""
        How an accelerator multiplies float32 matrices, by jax's names: "default" (TF32 on NVIDIA GPUs, one pass of
        bfloat16 on TPUs), "bfloat16", "tensorfloat32", "float32" (in full), "auto" = in full where model.dtype is
        float32.
        """,
    )
    image_size: int | None = setting(
        None,
        "pixels of an image's side; None: what the model was trained at",
        whole(8, 8192, optional=True, multiple=8),
    )
    t5_tokens: int | None = setting(
        None,
        "tokens that T5 reads of a prompt, its end included; None: as published",
        whole(2, 512, optional=True),
        about="""
        Of Stable Diffusion 3 and 3.5, published with 256 (most recipes for fine-tuning take 128), and of FLUX, 512.
        """,
    )
    remat: str = setting(
        "step",
        '"none", "step" or "block"',
        ("none", "step", "block"),
        about="""
        What the backward pass computes again instead of keeping, from fast to small: "none"; each sampling "step" (one
        latent a step is kept); also each "block" of the network and of the VAE. DDPO's gradient is of one step at a
        time: "none" is "step".
        """,
    )
    scan_layers: str = setting(
        "auto",
        "whether a program holds equal blocks of a network once, as a loop, instead of each of them",
        SCAN_LAYERS,
        about="""
        Of SDXL, SD 3 and FLUX, and of text encoders and rewards that are CLIPs, T5 or ImageReward. Such a program
        compiles in a fraction of the time and computes the same, to rounding. A GPU copies a block's weights before it
        multiplies with them, which takes longer with few images at once. "auto": for eight equal blocks or more, on
        TPUs, and on GPUs that share out the weights (`parallel.shard_weights`).
        """,
    )
    scheduler: Scheduler = Scheduler()
    vae_slice: int = setting(32, "images that the VAE decodes at once, at most", whole(1))

    def equal_blocks(self, *, shards: bool) -> int | None:
        """How many equal blocks in a row at least are a loop on this machine's devices; None: none are.

        Args:
          shards: the devices share out the network's weights.
        """
        if self.scan_layers == "auto":
            return MANY if backend.platform() == "tpu" or (backend.platform() == "gpu" and shards) else None
        return 2 if self.scan_layers == "true" else None


@dataclass(frozen=True, kw_only=True)
class TextNorm:
    """Rewards that are written as textnorm(...), Kim et al. 2024."""

    temperature: float = setting(
        1.0, "temperature of the softmax over prompts, in the reward's units (a cosine wants about 0.01)", positive()
    )
    contrast: str | None = setting(
        None,
        "json file {prompt: [contrastive prompts]}; None: swap animals and activities",
        paths.local_or_none,
    )
    uncertainty: float = setting(
        0.0,
        "factor of the variance among several textnorm(...), subtracted from their mean; 0: their sum",
        Number(0.0, 1e6),
        about="""
        Of reward="textnorm(A)+textnorm(B)+...": what the models disagree about is rewarded less (Kim et al. 2024).
        """,
    )


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """How many images an iteration draws, and how they are shared out."""

    samples: int = setting(64, "images an iteration, over all devices", whole(1, 2**20))
    samples_per_forward: int = setting(
        32, "images a device handles at once; smaller needs less memory", whole(1, 2**20)
    )
    group: int = setting(
        1, "images of each prompt that an iteration draws: batch.samples / batch.group prompts", whole(1, 2**20)
    )


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """DiffExp: Eq. 7 for the guidance of the steps, Eq. 8 for the weights of words."""

    enabled: bool = setting(True, "whether to explore; False: plain fine-tuning, bit for bit")
    w_low: float = setting(1.0, 'Eq. 7: guidance while t > t_thresh (the paper: "extremely low")', GUIDANCE)
    t_thresh: int = setting(900, "Eq. 7: timestep above which guidance is low, 0..1000 (our choice)", whole(0, 1000))
    threshold_of: str = setting(
        "timestep",
        "what t_thresh is, of 1000",
        MEASURES,
        about="""
        "timestep": the model's own. "noise_level": 1000 s of x_t = c ((1 - s) x_0 + s eps), the same noise in all
        models; Stable Diffusion's timesteps 900, 800, 700 and 600 are 893, 836, 769 and 696. "steps": the share of the
        sampling steps to come, so 900 is the first tenth. Of ten steps of SD 3, which are denser at the noise, three
        are above timestep 900.
        """,
    )
    weight_range: tuple[float, float] = setting(
        (1.0, 1.5), "Eq. 8: range that the weight is drawn from (our choice)", Number(0.0, 100.0, pair=True)
    )
    unit: str = setting("word", 'Eq. 8: what is weighted together: "word", "token" or "phrase"', UNITS)
    scope: str = setting(
        "image",
        'Eq. 8: a draw for each "image", or for each "prompt", the same for its images of an iteration',
        SCOPES,
    )
    share: float = setting(
        1.0,
        "Eq. 8: share of an iteration's images, and of each group, whose prompt is weighted; 1 in the paper",
        Number(0.0, 1.0),
        about="""
        The others have their prompt as it is, and are compared with the weighted ones. Eq. 7 guides all of them.
        """,
    )
    fraction: float = setting(
        0.75, "share of the iterations that explore, from the first; rounded up", Number(0.0, 1.0)
    )
    iterations: int | None = setting(
        None,
        "number of iterations that explore, from the first; None: by the fraction",
        whole(0, optional=True),
        about="""
        A run that is continued with more iterations keeps the number that it began with, unless this says another.
        """,
    )


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What is trained: low-rank updates of the network's layers."""

    rank: int = setting(4, "rank of the update A B that is added to each layer that takes LoRA", whole(1, 1024))
    alpha: float = setting(4.0, "scale of the update: alpha / rank", positive())
    targets: tuple[str, ...] = setting(
        ("attention",),
        "which layers take LoRA",
        lambda name, value: check_lora_targets(value),
        about="""
        Of a UNet: "attention" (the four projections of each), "feed_forward", "projections" (proj_in and proj_out),
        "convolutions" (of residual blocks and between levels). Of SD3's and FLUX's transformers: "attention" (of image
        and prompt), "feed_forward", "modulation", SD3.5-medium's "second_attention". Or single layers of these by name:
        "to_k", "attn.to_k".
        """,
    )
    path: str | None = setting(
        None,
        "a LoRA file or folder to start from (diffusers, peft, kohya); None: from nothing",
        paths.local_or_none,
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer, AdamW."""

    lr: float = setting(3e-4, "learning rate", positive(1.0))
    schedule: str = setting(
        "constant",
        'how the rate falls to 0 over the run\'s updates: "constant" (not at all), "linear", "cosine"',
        ("constant", "linear", "cosine"),
    )
    warmup: int = setting(
        0, "optimizer updates over which the rate rises from 0, before the schedule; 0: none", whole(0)
    )
    ema: float = setting(
        0.0,
        "decay of a moving average of the LoRA, which evaluation, grids and exports then take; 0: none",
        Number(0.0, 1.0, below=True),
    )
    b1: float = setting(0.9, "decay of the gradient's running mean", Number(0.0, 1.0, below=True))
    b2: float = setting(0.999, "decay of the gradient's running square", Number(0.0, 1.0, below=True))
    eps: float = setting(1e-8, "number added to the root of the running square", positive(1.0))
    weight_decay: float = setting(1e-4, "weight decay, times lr, decoupled from the gradient", Number(0.0, 100.0))
    grad_clip: float = setting(1.0, "largest global norm of the gradient; a larger one is scaled down", positive())
