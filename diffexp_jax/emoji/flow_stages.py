"""The emoji world's Stable Diffusion 3.5 as stages of tools/emoji/pretrain_emoji.py: rectified flow by an MMDiT.

It has all that SD3.5-medium has, in small: two CLIPs of different widths, a T5, pooled embeddings, normed queries and
keys, blocks with a second attention. The autoencoder is that of the emoji world's other models.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffexp_jax.emoji import scenes
from diffexp_jax.emoji.pretraining import Stage, encoded_scenes, load_part, save_half, save_json, vocabulary
from diffexp_jax.emoji.tokenizer import write_t5_tokenizer, write_tokenizer
from diffexp_jax.formats import convert, files
from diffexp_jax.formats.tokenizers import load_t5_tokenizer, load_tokenizer, token_ids
from diffexp_jax.models.vae import AutoencoderKL
from diffexp_jax.pipelines import stable_diffusion_3 as sd3

FOLDER = "model_flow"
LENGTH = 12  # tokens of a prompt, of each tokenizer
SIDE = 8  # latent pixels
_CLIP = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": LENGTH,
}
_SIZES_L = dict(hidden_act="quick_gelu", hidden_size=48, intermediate_size=192, num_hidden_layers=2, projection_dim=48)
_SIZES_G = dict(hidden_act="gelu", hidden_size=64, intermediate_size=256, num_hidden_layers=3, projection_dim=64)
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "n_positions": LENGTH,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": SIDE,
    "patch_size": 1,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": T5["d_model"],
    "caption_projection_dim": 128,
    "pooled_projection_dim": 112,
    "pos_embed_max_size": SIDE,
    "dual_attention_layers": [0, 1],
    "qk_norm": "rms_norm",
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def flow_stage(
    out: Path,
    *,
    from_shipped: bool = False,
    hard: bool = False,
    batch: int = 32,
    n_scenes: int = 49152,
    drop_caption: float = 0.1,
) -> Stage:
    """Transformer and text encoders together: the velocity's squared error, at logit-normal noise levels (SD3's).

    With `hard` the model is trained on, on scenes whose objects are missing more unequally.
    """
    folder = out / FOLDER
    parts, tokenizers = _write_untrained(out)
    config = sd3.model_config(parts)
    pipeline = sd3.build(config)
    learned = [part for part in pipeline.params if part != "vae"]
    ids = tuple(token_ids(tokenizer, [*scenes.captions(), ""])[0] for tokenizer in tokenizers)

    def init(key):
        if from_shipped or hard:
            shipped = sd3.load(folder).params
            return {part: shipped[part] for part in learned}
        return _first_weights(config, dict(zip(learned, jax.random.split(key, len(learned)), strict=True)))

    def loss(params, data, key):
        latents, captions, ids = data
        pick_key, level_key, noise_key, drop_key = jax.random.split(key, 4)
        i = jax.random.randint(pick_key, (batch,), 0, len(latents))
        x_0 = latents[i].astype(jnp.float32)
        caption = jnp.where(jax.random.bernoulli(drop_key, drop_caption, (batch,)), len(ids[0]) - 1, captions[i])
        text = pipeline.encode(params, tuple(of_captions[caption] for of_captions in ids))
        level = jax.nn.sigmoid(jax.random.normal(level_key, (batch,)))
        row = pipeline.process.training_row(pipeline.process.n_train * level)
        eps = jax.random.normal(noise_key, x_0.shape)
        velocity = pipeline.denoise(params, None, pipeline.process.add_noise(x_0, eps, row), row, text)
        mse = jnp.square(velocity - pipeline.process.target(x_0, eps, row)).mean()
        return mse, {"mse": mse}

    def export(params, out):
        for part in learned:
            name = "diffusion_pytorch_model" if part == "transformer" else "model"
            save_half(out / FOLDER / part / f"{name}.safetensors", convert.to_torch(params[part]))

    vae = AutoencoderKL(config.vae)
    missing = scenes.MISSING_HARD if hard else scenes.MISSING
    data = (*encoded_scenes(vae, load_part(out, "vae", vae), n_scenes, missing=missing), ids)
    if hard:
        # the shipped weights: 3,000, and 5,000 more with --from_shipped
        return Stage("flow_hard", 8000, 4e-4, init, loss, export, data)
    return Stage("flow", 5500, 1e-3, init, loss, export, data, horizon=8000)  # what follows brings the rate to 0


STAGES = {"flow": flow_stage, "flow_hard": functools.partial(flow_stage, hard=True)}


def _write_untrained(out: Path) -> tuple[dict[str, Any], list[Any]]:
    """Writes all of the model's folder but what is learned; gives the parts' configs and the three tokenizers."""
    folder = out / FOLDER
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name, length=LENGTH)
    write_t5_tokenizer(folder / "tokenizer_3", length=LENGTH)
    clips = [load_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
    words = vocabulary(clips[0])
    third = load_t5_tokenizer(folder / "tokenizer_3", size=10**6, length=LENGTH)
    shutil.copytree(out / "model" / "vae", folder / "vae", dirs_exist_ok=True)
    vae = files.read_json(folder / "vae" / "config.json") | {"shift_factor": 0.0}  # diffusers' pipeline wants one
    parts = {
        "transformer": TRANSFORMER,
        "vae": vae,
        "text_encoder": _CLIP | _SIZES_L | words,
        "text_encoder_2": _CLIP | _SIZES_G | words,
        "text_encoder_3": T5 | {"vocab_size": len(third), "pad_token_id": 0, "eos_token_id": 1},
    }
    for part, config in parts.items():
        save_json(folder / part / "config.json", config)
    save_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_json(folder / "model_index.json", MODEL_INDEX)
    return parts | {"scheduler": SCHEDULER}, [*clips, third]


def _first_weights(config: sd3.ModelConfig, keys: dict[str, jax.Array]) -> dict[str, Any]:
    """Of the networks: the blocks' gates are closed and the velocity is 0 (Peebles and Xie 2023, adaLN-Zero)."""
    params = {}
    for part, key in keys.items():
        network, args = sd3.networks(config, SIDE)[part]
        params[part] = network.init(key, *(jnp.zeros(x.shape, x.dtype) for x in args))["params"]

    def closed(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.zeros_like(x) if any(part in name for part in ("norm1", "norm_out", "proj_out")) else x

    transformer = jax.tree_util.tree_map_with_path(closed, params["transformer"])
    transformer["pos_embed"] |= {"pos_embed": jnp.asarray(places(SIDE, config.transformer.caption_projection_dim))}
    return params | {"transformer": transformer}


def places(side: int, width: int) -> Float[np.ndarray, "1 S D"]:
    """The first table of places: sines and cosines of the column, then of the row (Dosovitskiy et al. 2021)."""
    rows, columns = np.divmod(np.arange(side * side), side)
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    return np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)
