"""What each stage of tools/emoji/pretrain_emoji.py trains: networks, data, losses, and the files they end up in."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from diffexp_jax.emoji import scenes
from diffexp_jax.emoji.tokenizer import MAX_LENGTH, write_tokenizer
from diffexp_jax.formats import convert, files
from diffexp_jax.formats.tokenizers import load_tokenizer, token_ids
from diffexp_jax.models.clip import CLIPTextConfig, TextTransformer
from diffexp_jax.models.unet import UNet, UNetConfig
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig
from diffexp_jax.pipelines import stable_diffusion
from diffexp_jax.sampling import load_process
from diffexp_jax.sampling.ddim import min_snr_weight

ASSETS = Path(__file__).parent / "assets"


class Stage(NamedTuple):
    """One network (or several trained together) of the emoji world."""

    name: str
    steps: int
    learning_rate: float
    init: Callable[[jax.Array], Any]  # key -> params
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]  # params, data, key
    export: Callable[[Any, Path], None]
    data: Any = None  # arrays that the loss reads: an argument, not a constant of the compiled step
    weight_decay: float = 1e-4
    ema: float = 0.998
    horizon: int | None = None  # the step at which the learning rate would be 0; None: the last


def save_half(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {k: np.asarray(v.astype(np.float16), order="C") for k, v in tensors.items()}
    path.write_bytes(save(half, {"format": "pt"}))


def save_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------------ VAE

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
    "scaling_factor": 1.0,
}


_DECODER = ("decoder", "post_quant_conv")


def vae_stage(
    out: Path,
    *,
    from_shipped: bool = False,
    decoder_only: bool = False,
    batch: int = 8,
    kl_weight: float = 2e-4,
) -> Stage:
    """The autoencoder: L1 of pixels and of their differences (edges), and a small KL.

    With `decoder_only` the shipped encoder stays, and with it the latents that the diffusion model knows.
    """
    model = AutoencoderKL(VAEConfig.from_dict(VAE))
    shipped = load_part(out, "vae", model) if from_shipped or decoder_only else {}
    frozen = {part: tree for part, tree in shipped.items() if decoder_only and part not in _DECODER}

    def init(key):
        if shipped:
            return {part: tree for part, tree in shipped.items() if part not in frozen}
        return model.init(key, jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)))["params"]

    def loss(params, data, key):
        sprites, frozen = data
        variables = {"params": params | frozen}
        scene_key, noise_key = jax.random.split(key)
        scene, _ = scenes.sample_scenes(scene_key, batch, missing=0.25)
        images = scenes.render(sprites, scene)
        mean, logvar = model.apply(variables, images, method="moments")
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key, mean.shape)
        error = model.apply(variables, z, method="decode_raw") - images
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        l1 = jnp.abs(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
        psnr = -10.0 * jnp.log10(jnp.square(error).mean())
        return l1 + 0.5 * edges + kl_weight * kl, {"l1": l1, "kl": kl, "psnr": psnr}

    def export(params, out):
        params = params | frozen
        config = VAE
        if decoder_only:
            config = files.read_json(out / "model/vae/config.json")
        else:
            scene, _ = scenes.sample_scenes(jax.random.key(1), 2048)
            latents = encode_all(model, params, scenes.load_sprites(), scene)
            config = VAE | {"scaling_factor": round(float(1.0 / latents.std()), 5)}
        save_json(out / "model/vae/config.json", config)
        save_half(out / "model/vae/diffusion_pytorch_model.safetensors", convert.to_torch(params))

    name = "vae_decoder" if decoder_only else "vae"
    return Stage(name, 6000, 1.5e-3, init, loss, export, (scenes.load_sprites(), frozen))


def load_part(out: Path, part: str, module) -> Any:
    """Float32 parameters of an exported network."""
    shapes = convert.abstract_params(module, np.zeros((1, scenes.SIZE, scenes.SIZE, 3), np.float32))
    return convert.from_torch(files.open_weights(out / "model" / part), shapes, where=f"{out}/model/{part}")


@functools.partial(jax.jit, static_argnums=0)
def encode(model: AutoencoderKL, params: Any, sprites: scenes.Sprites, scene: scenes.Scene):
    """Scaled latents of scenes [B h w c]."""
    return model.apply({"params": params}, scenes.render(sprites, scene), method="encode")


def encode_all(model: AutoencoderKL, params: Any, sprites: scenes.Sprites, scene: scenes.Scene, *, at_once: int = 64):
    """Scaled latents of many scenes."""
    starts = range(0, len(scene.animal), at_once)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + at_once], scene) for i in starts]
    return jnp.concatenate([encode(model, params, sprites, part) for part in parts])


# ------------------------------------------------------------------------------------------------------------ diffusion

TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": MAX_LENGTH,
    "projection_dim": 64,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [48, 96],
    "cross_attention_dim": TEXT["hidden_size"],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "sample_size": 8,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
ACTIVITY_SHARE = 0.65  # of the diffusion model's captions


def diffusion_stage(
    out: Path,
    *,
    from_shipped: bool = False,
    hard: bool = False,
    batch: int = 32,
    n_scenes: int = 49152,
    drop_caption: float = 0.1,
) -> Stage:
    """UNet and text encoder together: the eps loss of Eq. 1 with Min-SNR-5 weights, on latents encoded once.

    With `hard` the shipped model is trained on, on scenes whose objects are missing more unequally; its folder is
    model_hard.
    """
    vae = AutoencoderKL(VAEConfig.from_dict(files.read_json(out / "model/vae/config.json")))
    write_tokenizer(out / "model/tokenizer")
    tokenizer = load_tokenizer(out / "model/tokenizer")
    text_config = TEXT | vocabulary(tokenizer)
    unet, text = UNet(UNetConfig.from_dict(UNET)), TextTransformer(CLIPTextConfig.from_dict(text_config))
    ids, _ = token_ids(tokenizer, [*scenes.captions(), ""])
    process = load_process(SCHEDULER)

    def init(key):
        if from_shipped or hard:
            model = stable_diffusion.load(out / "model")
            return {part: model.params[part] for part in ("unet", "text_encoder")}
        text_key, unet_key = jax.random.split(key)
        text_params = text.init(text_key, ids[:1])["params"]
        embedding = jnp.zeros((1, ids.shape[1], TEXT["hidden_size"]))
        unet_params = unet.init(unet_key, jnp.zeros((1, 8, 8, 8)), jnp.zeros((), jnp.int32), embedding)["params"]
        return {"unet": unet_params, "text_encoder": text_params}

    def loss(params, data, key):
        latents, captions, ids = data
        pick_key, t_key, noise_key, drop_key = jax.random.split(key, 4)
        i = jax.random.randint(pick_key, (batch,), 0, len(latents))
        x_0 = latents[i].astype(jnp.float32)
        caption = jnp.where(jax.random.bernoulli(drop_key, drop_caption, (batch,)), len(ids) - 1, captions[i])
        context = text.apply({"params": params["text_encoder"]}, ids[caption]).last_hidden_state
        row = process.training_row(jax.random.randint(t_key, (batch,), 0, process.n_train))
        eps = jax.random.normal(noise_key, x_0.shape)
        out = unet.apply({"params": params["unet"]}, process.add_noise(x_0, eps, row), row.t, context)
        error = jnp.square(out - process.target(x_0, eps, row)).mean((1, 2, 3))
        return (min_snr_weight(row.alpha_bar_t) * error).mean(), {"mse": error.mean()}

    def export(params, out):
        folder = out / "model"
        if hard:  # the same autoencoder and tokenizer
            folder = shutil.copytree(folder, out / "model_hard", dirs_exist_ok=True)
        _export_diffusion(folder, text_config, params)

    missing = scenes.MISSING_HARD if hard else scenes.MISSING
    encoded = encoded_scenes(vae, load_part(out, "vae", vae), n_scenes, missing=missing)
    data = (*encoded, ids)
    kind = ("diffusion_hard", 4000, 5e-4) if hard else ("diffusion", 6000, 1.5e-3)
    return Stage(*kind, init, loss, export, data)


def _export_diffusion(folder: Path, text_config: dict[str, Any], params: Any) -> None:
    save_json(folder / "model_index.json", MODEL_INDEX)
    save_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    save_json(folder / "unet/config.json", UNET)
    save_half(folder / "unet/diffusion_pytorch_model.safetensors", convert.to_torch(params["unet"]))
    save_json(folder / "text_encoder/config.json", text_config)
    save_half(folder / "text_encoder/model.safetensors", convert.to_torch(params["text_encoder"]))


def vocabulary(tokenizer) -> dict[str, int]:
    """What a text encoder's config says of its tokenizer."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer)} | special


def encoded_scenes(vae: AutoencoderKL, params: Any, n: int, *, missing: tuple[float, ...], chunk: int = 4096):
    """Latents (float16) and caption ids of n training scenes."""
    sprites, latents, captions = scenes.load_sprites(), [], []
    for i in range(0, n, chunk):
        scene, activity = scenes.sample_scenes(
            jax.random.key(100 + i), chunk, activity_share=ACTIVITY_SHARE, missing=missing
        )
        latents.append(encode_all(vae, params, sprites, scene).astype(jnp.float16))
        captions.append(scenes.caption_id(scene.animal, activity))
    return jnp.concatenate(latents), jnp.concatenate(captions)


STAGES: dict[str, Callable[..., Stage]] = {
    "vae": vae_stage,
    "vae_decoder": functools.partial(vae_stage, decoder_only=True),
    "diffusion": diffusion_stage,
    "diffusion_hard": functools.partial(diffusion_stage, hard=True),
}
