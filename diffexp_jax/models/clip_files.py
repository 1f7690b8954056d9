"""CLIPs from the files that transformers writes, and the shapes of published ones without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffexp_jax.formats import convert, files
from diffexp_jax.models.clip import CLIP
from diffexp_jax.models.clip_config import CLIPConfig

_IMAGE_PARTS = ("vision_model.", "visual_projection.")


def canonical_text_names(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A view of CLIP tensors of any age under the names of transformers 5.

    Leaves out the `position_ids` buffers that older files hold, and the prefix `text_model.` that they put
    before every name of a bare text encoder.
    """
    bare = all(name.startswith("text_model.") for name in tensors)

    def rename(name):
        if name.endswith("embeddings.position_ids"):
            return None
        return name.removeprefix("text_model.") if bare else name

    return files.Renamed(tensors, rename)


def load(folder: Path, *, dtype: DTypeLike = jnp.float32) -> tuple[CLIP, dict[str, Any]]:
    """Reads a CLIPModel's folder (config.json and safetensors), as transformers writes it.

    Args:
      folder: where the files are.
      dtype: of the weights and of the arithmetic; features and `logit_scale` are always float32.

    Returns:
      The network and its parameters.

    Raises:
      InputError: a file is missing or broken, or its tensors do not fit the config.
    """
    config = CLIPConfig.from_dict(files.read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = canonical_text_names(files.open_weights(folder))
    return from_tensors(config, tensors, where=str(folder), dtype=dtype)


def load_image_tower(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, *, dtype: DTypeLike = jnp.float32
) -> tuple[CLIP, dict[str, Any]]:
    """A CLIP with the parameters of `embed_image` only, of a CLIPModel or a CLIPVisionModelWithProjection.

    Args:
      folder: holds config.json and the weights.
      tensors: the weights where they are not the folder's safetensors; names of other parts than the image's are
        passed over.
      dtype: of the weights and of the arithmetic; features are always float32.

    Raises:
      InputError: a file is missing or broken, or its tensors do not fit the config.
    """
    config = CLIPConfig.from_dict(_with_parts(files.read_json(folder / "config.json")), str(folder / "config.json"))
    tensors = files.open_weights(folder) if tensors is None else tensors
    tensors = files.Renamed(canonical_text_names(tensors), lambda name: name if name.startswith(_IMAGE_PARTS) else None)
    module, size = CLIP(config, dtype), config.vision.image_size
    shapes = convert.abstract_params(module, np.zeros((1, size, size, 3), np.float32), method="embed_image")
    shapes = {name: shape for name, shape in shapes.items() if name != "logit_scale"}
    params = convert.from_torch(tensors, shapes, where=str(folder), dtype=dtype)
    return module, params | {"logit_scale": np.zeros((), np.float32)}  # declared by the module, not used


def _with_parts(content: dict[str, Any]) -> dict[str, Any]:
    """The config of a whole CLIP, also where the file is of its image tower alone."""
    if "vision_config" in content:
        return content
    return {key: content[key] for key in ("projection_dim",) if key in content} | {"vision_config": content}


def from_tensors(
    config: CLIPConfig, tensors: Mapping[str, np.ndarray], *, where: str, dtype: DTypeLike = jnp.float32
) -> tuple[CLIP, dict[str, Any]]:
    """The network of these sizes and its parameters out of tensors under transformers' names; `where` is for errors.

    Raises:
      InputError: the tensors do not fit the sizes.
    """
    module = CLIP(config, dtype)
    params = convert.from_torch(tensors, _abstract(module), where=where, dtype=dtype)
    return module, params | {"logit_scale": np.asarray(tensors["logit_scale"], np.float32)}


def shapes(config: Mapping[str, Any], dtype: DTypeLike) -> tuple[CLIP, Any]:
    """The network of a config in transformers' form, and the shapes of its parameters."""
    module = CLIP(CLIPConfig.from_dict(config), dtype)
    params = convert.typed(_abstract(module), dtype)
    return module, params | {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}


def _abstract(module: CLIP) -> Any:
    size = module.config.vision.image_size
    return convert.abstract_params(module, np.zeros((1, 4), np.int32), np.zeros((1, size, size, 3), np.float32))
