"""Models small enough to compile in seconds, the settings of a run of seconds, and what else tests ask of them."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from diffexp_jax.algorithms import Policy
from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.formats import convert
from diffexp_jax.models import clip
from diffexp_jax.pipelines import families, stable_diffusion
from diffexp_jax.sampling import Network

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 16, "patch_size": 8}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}


def write_t5_tokenizer(folder: Path) -> None:
    """A T5 tokenizer of a few words and letters, as transformers writes it."""
    from transformers import T5Tokenizer  # seconds to import

    pieces = ["▁", "a", "T", "M", "▁dog", "▁rid", "ing", "▁bike", "▁cat"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)


def random_weights(shapes, seed: int):
    """A tree of such shapes with weights that keep the activations' size, drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape, np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return x / np.float32(np.sqrt(max(np.prod(leaf.shape[:-1]), 1)))
        return {"scale": 1 + 0.1 * x, "bias": 0.1 * x, "logit_scale": np.full_like(x, 2.0)}.get(kind, 0.5 * x)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_part(folder: Path, config: dict, tensors: dict, *, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def text_config(folder: Path) -> dict:
    """Of a text tower for the tokenizer in `folder`."""
    size = len(json.loads((folder / "vocab.json").read_text()))
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    return TOWER | ids | {"vocab_size": size, "max_position_embeddings": 32}


def write_tiny_model(folder: Path) -> Path:
    """A random pipeline in diffusers' format: 8x8x4 latents, 16x16 images, prompts of 32 tokens."""
    write_tokenizer(folder / "tokenizer")
    text = text_config(folder / "tokenizer")
    parts = {"unet": UNET, "vae": VAE, "text_encoder": text | {"architectures": ["CLIPTextModel"]}}
    config = families.model_config(INDEX, parts | {"scheduler": SCHEDULER})
    params = random_weights(stable_diffusion.abstract_params(config), seed=0)
    params["vae"]["decoder"]["conv_out"]["kernel"] *= 0.3  # few pixels outside [0,1], where there is no gradient
    for part, config in parts.items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_part(folder / part, config, convert.to_torch(params[part]), stem=stem)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def write_tiny_clip(folder: Path) -> Path:
    """A random CLIPModel on 16x16 images, for the reward pickscore:PATH."""
    write_tokenizer(folder)
    config = {"text_config": text_config(folder), "vision_config": VISION, "projection_dim": 12}
    module = clip.CLIP(clip.CLIPConfig.from_dict(config))
    shapes = convert.abstract_params(module, np.zeros((1, 4), np.int32), np.zeros((1, 16, 16, 3), np.float32))
    write_part(folder, config, convert.to_torch(random_weights(shapes, seed=1)), stem="model")
    return folder


TRAIN_PROMPTS = ("a dog", "a cat riding a bike", "an ant", "a dog washing the dishes", "a zebra playing chess")
UNSEEN_PROMPTS = ("a snail", "a lobster riding a bike")


def write_tiny_settings(folder: Path, tiny_model: Path, tiny_clip: Path) -> dict:
    """{config key: value} of a run that takes seconds: 4 steps (t = 751, 501, 251, 1), 4 iterations of 8 images."""
    (folder / "train.txt").write_text("\n".join(TRAIN_PROMPTS))
    (folder / "unseen.txt").write_text("\n".join(UNSEEN_PROMPTS))
    return {
        "iterations": 4,
        "compilation_cache": "",
        "model.path": str(tiny_model),
        "cpu_devices": 1,
        "reward": f"pickscore:{tiny_clip}",
        "prompts": str(folder / "train.txt"),
        "batch.samples": 8,
        "batch.samples_per_forward": 4,
        "sampling.steps": 4,
        "sampling.guidance": 3.0,
        "exploration.w_low": 0.5,
        "exploration.t_thresh": 500,
        "optim.lr": 1e-2,
        "optim.schedule": "constant",  # a run that is made longer goes on at the same rate
        "optim.eps": 1e-4,  # Adam divides gradients by their own size: of the smallest, only rounding would be left
        "alignprop.loss_coefficient": 1.0,
        "ddpo.stats_buffer": 4,
        "ddpo.stats_min_count": 2,
        "eval.every": 3,
        "eval.prompts": (str(folder / "unseen.txt"),),
        "eval.rewards": (),
        "log.images_every": 3,
        "log.images": 3,
        "checkpoint.every": 1,
    }


def as_flags(settings: dict) -> list[str]:
    """The same settings on a command line."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


def network_of(make) -> Network:
    """The network of a function (frozen, lora) -> denoise(x_t, step, context)."""
    return Network(lambda frozen, lora, *args: make(frozen, lora)(*args))


def policy_of(model, score, w_t=(2.0,)) -> Policy:
    """The model, for steps of these guidance scales, with a reward score(frozen, images) -> [B]."""
    return Policy(
        network=model.network(w_t).reading(lambda frozen: frozen["model"]),
        decode=lambda frozen, x_0: model.decode(frozen["model"], x_0),
        score=lambda frozen, images, tokens: (score(frozen, images), {}),
        latent_shape=model.latent_shape,
        process=model.process,
    )


def nonzero_lora(lora, seed=0, size=0.1):
    """The LoRA with random B, so that it changes something and every part of it has a gradient."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return np.asarray(x) + size * rng.standard_normal(x.shape, np.float32) * (path[-1].key == "B")

    return jax.tree_util.tree_map_with_path(draw, jax.device_get(lora))


class CompileCounter:
    """Counts the programs that jax compiles (or reads from its cache) while the context is open."""

    event = "/jax/core/compile/backend_compile_duration"

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, seconds, **details):
        self.count += event == self.event
