"""What the kinds of pipelines do alike with their parts: the arrays of a folder, the networks' arguments, decoding."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, files
from diffexp_jax.models.vae import AutoencoderKL, in_slices


def read_configs(
    folder: Path, parts: Sequence[str], *, networks: Sequence[str], hints: Mapping[str, str] = {}
) -> dict[str, Any]:
    """What the json files of a pipeline's networks and of its scheduler say, by subfolder.

    Args:
      parts: its subfolders.
      networks: those of them that have a config.json.
      hints: ends of the error where a subfolder is missing, by its name.

    Raises:
      InputError: a subfolder or file is missing, or a file is broken.
    """
    for part in parts:
        if not (folder / part).is_dir():
            accepted = f"{', '.join(parts)}{hints.get(part, '')}"
            raise InputError(f"{folder}: the subfolder {part}/ is missing; the pipeline has {accepted}")
    configs = {part: files.read_json(folder / part / "config.json") for part in networks}
    # DPM++'s has lambda_min_clipped=-Infinity
    return configs | {"scheduler": files.read_json(folder / "scheduler" / "scheduler_config.json", finite=False)}


def loaded(shapes: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The arrays of a pipeline's parts, of the shapes and types that it has them in.

    Args:
      tensors: of each part, under diffusers' and transformers' names; they are read one at a time.
      folder: the parts' subfolders are in it, for the errors.

    Raises:
      InputError: tensors do not fit.
    """
    return {
        part: convert.from_torch(tensors[part], tree, where=str(folder / part), dtype=jax.tree.leaves(tree)[0].dtype)
        for part, tree in shapes.items()
    }


def variables(params: Any, lora: Any) -> dict[str, Any]:
    """What a network that takes LoRA is applied to; `lora` None: without."""
    return {"params": params} | ({"lora": lora} if lora is not None else {})


def decoder(vae: AutoencoderKL, vae_slice: int) -> Callable[[Any, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]:
    """A pipeline's `decode`, of at most so many images at once, whose VAE's arrays are params["vae"]."""

    def decode(params, latents):
        return in_slices(lambda z: vae.apply({"params": params["vae"]}, z, method="decode"), latents, vae_slice)

    return decode


def type_of_t5(dtype: DTypeLike) -> DTypeLike:
    """What T5 computes in where the other networks do in `dtype`: its numbers leave float16's range."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype
