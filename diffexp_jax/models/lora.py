"""LoRA (Hu et al. 2021) as the linen variable collection "lora", and its files in diffusers' and peft's format.

The collection mirrors the parameter tree: {..., "to_q": {"A": [in, rank], "B": [rank, out]}}. `layers.Dense` adds
(x A) B where it finds a pair; base weights are never touched.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import PRNGKeyArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffexp_jax import InputError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the four projections of every attention
_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
_ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora.down.weight": "A", ".lora.up.weight": "B"}


def init_lora(
    key: PRNGKeyArray, params: Mapping[str, Any], *, rank: int, targets: Sequence[str] = TARGETS
) -> dict[str, Any]:
    """A ~ N(0, 1/rank), B = 0 (so the model is unchanged at first), float32, for every target in `params`."""
    flat = traverse_util.flatten_dict(params)
    lora = {}
    for i, (path, kernel) in enumerate(sorted(flat.items(), key=lambda item: item[0])):
        if path[-1] == "kernel" and path[-2] in targets:
            fan_in, fan_out = kernel.shape
            a = jax.random.normal(jax.random.fold_in(key, i), (fan_in, rank)) / jnp.sqrt(rank)
            lora[(*path[:-1], "A")], lora[(*path[:-1], "B")] = a, jnp.zeros((rank, fan_out))
    if not lora:
        raise InputError(f"lora: the model has no layer named {', '.join(targets)}")
    return traverse_util.unflatten_dict(lora)


def rank(lora: Mapping[str, Any]) -> int:
    """The rank of a collection: every pair of it has the same."""
    return next(value.shape[1] for path, value in traverse_util.flatten_dict(lora).items() if path[-1] == "A")


def scaled(lora: Mapping[str, Any] | None, scale: float) -> Mapping[str, Any] | None:
    """The collection as `layers.Dense` wants it: the factor scale = alpha / rank multiplied into every B."""
    if scale == 1.0:
        return lora
    return jax.tree_util.tree_map_with_path(lambda path, x: x * scale if path[-1].key == "B" else x, lora)


def save_lora(path: str | Path, lora: Mapping[str, Any], *, alpha: float) -> None:
    """Writes a file for diffusers' `load_lora_weights`.

    The tensors are unet.<module>.lora_A.weight [rank, in] and .lora_B.weight [out, rank]; alpha stands in
    the header, in the keys of peft's LoraConfig, where diffusers writes and reads it.
    """
    tensors, modules = {}, []
    for (*path_to, leaf), value in sorted(traverse_util.flatten_dict(lora).items()):
        modules.append(".".join(path_to))
        tensors[f"unet.{modules[-1]}.lora_{leaf}.weight"] = np.ascontiguousarray(np.asarray(value, np.float32).T)
    rank = next(len(value) for name, value in tensors.items() if ".lora_A." in name)
    adapter = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": sorted(set(modules))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not save_file: that makes files that nobody but their owner can read
    path.write_bytes(save(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)}))


def load_lora(path: str | Path, params: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Reads a LoRA file (or a folder that holds pytorch_lora_weights.safetensors) for the network `params`.

    Returns:
      The collection and alpha (the file's own; the rank where it does not say).

    Raises:
      InputError: not a safetensors file, or its tensors do not fit the network.
    """
    path = Path(path)
    path = path / _FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a readable LoRA file in safetensors format ({error})") from None
    config = {key.removeprefix("unet."): value for key, value in header.items()}
    for key in ("alpha_pattern", "use_rslora"):
        if config.get(key):
            raise InputError(f"{path}: {key}={config[key]} is not supported; wants one alpha / rank for all layers")
    layers = {
        ".".join(path[:-1]): (path[:-1], kernel.shape)
        for path, kernel in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and len(kernel.shape) == 2
    }
    flat, ranks = {}, set()
    for name, value in tensors.items():
        module, leaf = _parse(name)
        if leaf is None or module not in layers:
            raise InputError(f"{path}: tensor {name} belongs to no linear layer of this model's UNet")
        layer, (fan_in, fan_out) = layers[module]
        rank = value.shape[0 if leaf == "A" else -1] if value.ndim else 0
        if value.shape != ((rank, fan_in) if leaf == "A" else (fan_out, rank)):
            raise InputError(f"{path}: tensor {name} has shape {value.shape}, the model's layer {fan_in} -> {fan_out}")
        flat[(*layer, leaf)] = jnp.asarray(value.T, jnp.float32)
        ranks.add(rank)
    if len(ranks) != 1 or len(flat) != 2 * len({key[:-1] for key in flat}):
        raise InputError(f"{path}: wants one rank and a pair (lora_A, lora_B) per layer; found ranks {sorted(ranks)}")
    return traverse_util.unflatten_dict(flat), float(config.get("lora_alpha", ranks.pop()))


def _parse(name: str) -> tuple[str, str | None]:
    """(module, "A" or "B") of a tensor's name, in peft's spelling or in diffusers' own."""
    for ending, leaf in _ENDINGS.items():
        if name.endswith(ending):
            return name.removeprefix("unet.").removesuffix(ending), leaf
    return name, None
