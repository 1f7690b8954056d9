"""Text-to-image models, one file a kind. Each is a `Pipeline`: all that the rest of the package knows of a model.

To add a kind: write `name.py` whose `load(folder, ...)` and `shapes(...)` make a `Pipeline`, and enter them in
`PIPELINES` under the `_class_name` of the folders' model_index.json. Its sizes in `sizes.py` let a dry run do without
the files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffexp_jax import paths
from diffexp_jax.errors import InputError
from diffexp_jax.formats import files
from diffexp_jax.formats.config_keys import shown
from diffexp_jax.models.lora import target_layers
from diffexp_jax.pipelines import families, flux, single_file, sizes, stable_diffusion, stable_diffusion_3
from diffexp_jax.pipelines.pipeline import (
    Conditioning,
    Pipeline,
    encode_empty,
    encode_prompts,
    make_context,
    on_one_device,
    zero_conditioning,
)

__all__ = [
    "PIPELINES",
    "SHIPPED",
    "Conditioning",
    "Kind",
    "Pipeline",
    "check_lora_targets",
    "encode_empty",
    "encode_prompts",
    "on_one_device",
    "load_pipeline",
]
__all__ += ["make_context", "zero_conditioning"]

_ASSETS = Path(__file__).parents[1] / "emoji" / "assets"
_FOLDERS = {"emoji": "model", "emoji_hard": "model_hard", "emoji_flow": "model_flow"}
SHIPPED = {name: _ASSETS / folder for name, folder in _FOLDERS.items()}  # the models that the package ships


class Kind(NamedTuple):
    """How the pipelines of one class are read."""

    parts: tuple[str, ...]  # subfolders
    load: Callable[..., Pipeline]  # (folder, dtype=, variant=, **options)
    read_jsons: Callable[[Path], tuple[Any, Any]]  # of a folder: model_index.json, configs of the parts
    shapes: Callable[..., Pipeline]  # (model_index.json, configs of the parts, where, dtype=, **options)
    lora_targets: Mapping[str, tuple[str, ...]]  # its pipelines'


# By `_class_name` of model_index.json.
PIPELINES: dict[str, Kind] = {
    name: Kind(
        family.parts, stable_diffusion.load, families.read_jsons, stable_diffusion.shapes, stable_diffusion.LORA_TARGETS
    )
    for name, family in families.FAMILIES.items()
} | {
    "StableDiffusion3Pipeline": Kind(
        stable_diffusion_3.PARTS,
        stable_diffusion_3.load,
        stable_diffusion_3.read_jsons,
        stable_diffusion_3.shapes,
        stable_diffusion_3.LORA_TARGETS,
    ),
    "FluxPipeline": Kind(flux.PARTS, flux.load, flux.read_jsons, flux.shapes, flux.LORA_TARGETS),
}


def load_pipeline(
    path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
    variant: str | None = None,
    tokenizer: str | None = None,
    weights: bool = True,
    **options,
) -> Pipeline:
    """Loads a pipeline from a folder, a single file or the Hugging Face hub, or one of SHIPPED by its name.

    Args:
      dtype: of the weights and the networks' arithmetic; timestep embeddings, norms, softmax and the products of LoRA
        stay float32.
      revision: of the hub's repository: a branch, tag or commit.
      variant: "fp16" prefers the half-precision weight files where there are both.
      tokenizer: of a single file, see `single_file.load`.
      weights: False gives shapes in their place and no tokenizers; published models need no files then (`sizes.py`).
      **options: of the kind, those of its `build`: image_size (pixels of a square image's side; default: what the model
        was trained at) and others.

    Raises:
      InputError: a file is missing or broken, its tensors do not fit, or a config asks for what is not implemented.
    """
    file = _single_file(path)
    if (given := [key for key, x in (("revision", revision), ("variant", variant)) if x]) and file:
        raise InputError(f"model {path}: is a single file; model.{given[0]} is for a folder or a hub id")
    if tokenizer and not file:
        raise InputError(f"model.tokenizer={tokenizer}: is for a model that is a single file; {path} has its own")
    if not weights:
        return _load_shapes(str(path), dtype=dtype, **options)
    if file:
        return single_file.load(file, dtype=dtype, tokenizer=tokenizer, **options)
    folder = SHIPPED.get(str(path)) or files.model_folder(str(path), all_parts(), revision=revision, variant=variant)
    return _kind(folder).load(folder, dtype=dtype, variant=variant, **options)


def _single_file(path: str | Path) -> Path | None:
    """The path, where it is of a file."""
    if str(path) in SHIPPED or str(path).startswith(files.HUB):
        return None
    return file if (file := paths.local("model", path)).is_file() else None


def _kind(folder: Path) -> Kind:
    index = folder / "model_index.json"
    name = files.read_json(index).get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise InputError(f"{index}: _class_name={shown(name)} is not supported; accepted: {', '.join(PIPELINES)}")
    return PIPELINES[name]


def check_lora_targets(targets: Any) -> None:
    """Raises InputError where lora.targets names what no kind of model has; what this one has is known later."""
    groups: dict[str, tuple[str, ...]] = {}
    for kind in PIPELINES.values():
        groups |= {word: (*groups.get(word, ()), *layers) for word, layers in kind.lora_targets.items()}
    target_layers(targets, groups)


def all_parts() -> tuple[str, ...]:
    """The subfolders that a pipeline of any kind may have."""
    return tuple(dict.fromkeys(part for kind in PIPELINES.values() for part in kind.parts))


def _load_shapes(path: str, **options) -> Pipeline:
    if file := _single_file(path):
        return single_file.shapes(file, **options)
    folder = SHIPPED.get(path) or paths.local("model", path)
    path = path.removeprefix(files.HUB)
    if not folder.is_dir() and path not in sizes.PIPELINES:
        raise InputError(
            f"model {path!r}: no such folder, and its sizes are not known; accepted: {', '.join(SHIPPED)}, a folder, "
            f"or one of {', '.join(sizes.PIPELINES)}"
        )
    index, parts = _kind(folder).read_jsons(folder) if folder.is_dir() else sizes.PIPELINES[path]
    return PIPELINES[index["_class_name"]].shapes(index, parts, path, **options)
