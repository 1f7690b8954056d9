"""LoRA (Hu et al. 2021) as the linen variable collection "lora", and its files in diffusers' and peft's format.

The collection mirrors the parameter tree: {..., "to_q": {"A": [in, rank], "B": [rank, out]}}, with [1, 1, in, rank]
and [1, 1, rank, out] for a 1x1 convolution. `layers.Dense` and `layers.Conv` add (x A) B where they find a pair; base
weights are never touched.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffexp_jax import InputError, paths
from diffexp_jax.formats import lora_names
from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.json_text import parse_json

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the four projections of every attention
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
METADATA = "lora_adapter_metadata"  # the header's entry for peft's settings
_SHOWN = 3  # names printed in an error
_MOST_ALPHA = 1e30
# Regular expressions of a bounded effort: names, alternatives, groups, and up to four of .* or \d+ (not of a group).
_PATTERN = re.compile(r"[\w^$.\-\\|()]*((\.|\\[dw])[*+][\w^$.\-\\|()]*){0,4}")


def init_lora(
    key: PRNGKeyArray, params: Mapping[str, Any], *, rank: int, targets: Sequence[str] = TARGETS
) -> dict[str, Any]:
    """A normal with standard deviation 1/rank, B = 0 (so the model is unchanged at first), float32, for every target.

    As diffusers' LoRALinearLayer and peft's init_lora_weights="gaussian" start.
    """
    flat = traverse_util.flatten_dict(params)
    lora = {}
    for i, (path, kernel) in enumerate(sorted(flat.items(), key=lambda item: item[0])):
        if path[-1] == "kernel" and path[-2] in targets:
            fan_in, fan_out = kernel.shape
            lora[(*path[:-1], "A")] = _draw(key, i, rank, shape=(fan_in, rank))
            lora[(*path[:-1], "B")] = np.zeros((rank, fan_out), np.float32)
    if not lora:
        raise InputError(f"lora: the model has no layer named {', '.join(targets)}")
    return traverse_util.unflatten_dict(lora)


@partial(jax.jit, static_argnames="shape")
def _draw(key: PRNGKeyArray, i: int | Array, rank: int | Array, *, shape: tuple[int, ...]) -> Array:
    """Columns of A of the i-th target: a program for each shape of a model."""
    return jax.random.normal(jax.random.fold_in(key, i), shape) / rank


def initial_lora(
    key: PRNGKeyArray, params: Mapping[str, Any], *, rank: int, alpha: float, path: str | Path | None = None
) -> dict[str, Any]:
    """Where fine-tuning starts: `init_lora`, or a collection that under alpha / rank does what the file at `path` does.

    A file of a smaller rank is filled up with columns of A as `init_lora` draws them and zero rows of B; so are targets
    that the file leaves out. Further layers of the file are trained too.

    Raises:
      InputError: as `load_lora`; or the file's rank is larger.
    """
    fresh = init_lora(key, params, rank=rank)
    if path is None:
        return fresh
    loaded, scale = load_lora(path, params)
    factor, flat = scale * rank / alpha, traverse_util.flatten_dict(fresh)
    pairs = traverse_util.flatten_dict(loaded)
    for i, layer in enumerate(sorted({name[:-1] for name in pairs})):
        a, b = pairs[*layer, "A"], pairs[*layer, "B"]
        spare = rank - a.shape[-1]
        if spare < 0:
            raise InputError(f"lora.rank={rank}: {path} has rank {a.shape[-1]}; wants that or more")
        more = _draw(key, i, rank, shape=(*a.shape[:-1], spare))
        zeros = np.zeros((*b.shape[:-2], spare, b.shape[-1]), np.float32)
        flat[*layer, "A"] = np.concatenate([a, more], axis=-1)
        flat[*layer, "B"] = np.concatenate([b * np.float32(factor), zeros], axis=-2)
    return traverse_util.unflatten_dict(flat)


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
        value = np.asarray(value, np.float32)
        axes = (1, 0) if value.ndim == 2 else (3, 2, 0, 1)  # torch keeps outputs first
        tensors[f"{lora_names.PREFIX}{modules[-1]}.lora_{leaf}.weight"] = np.ascontiguousarray(value.transpose(axes))
    rank = next(len(value) for name, value in tensors.items() if ".lora_A." in name)
    adapter = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(set(modules))}
    adapter = {f"{lora_names.PREFIX}{key}": value for key, value in adapter.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:  # not by save_file: that makes files that nobody but their owner can read
        partial.write_bytes(_sorted_header(save(tensors, {"format": "pt", METADATA: json.dumps(adapter)})))


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes metadata in another order each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of 8, as the library has it
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def load_lora(path: str | Path, params: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Reads a LoRA file (or a folder that holds pytorch_lora_weights.safetensors) for the UNet `params`.

    Known are the names of peft, of diffusers since 0.15 and of kohya's scripts, for all linear layers and 1x1
    convolutions, with a rank and an alpha per layer. Tensors for the text encoders are left out, with a warning.

    Returns:
      The collection and its scale, alpha / rank. Where layers have different scales, each is multiplied into its
      layer's B, and the scale that is returned is 1.

    Raises:
      InputError: not a safetensors file, or its tensors do not fit the network.
    """
    path = paths.local("LoRA", path)
    path = path / LORA_FILE if path.is_dir() else path
    tensors, header = _read(path)
    layers = {
        ".".join(names[:-1]): (names[:-1], kernel.shape)
        for names, kernel in traverse_util.flatten_dict(params).items()
        if names[-1] == "kernel" and (len(kernel.shape) == 2 or kernel.shape[:2] == (1, 1))
    }
    found = _by_layer(path, tensors, lora_names.spellings(layers))
    flat, scales = {}, {}
    for layer, parts in found.items():
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{path}: wants a pair (lora_A, lora_B) per layer; {layer} has only one of them")
        names, shape = layers[layer]
        a, b = _pair(path, parts, shape)
        rank = a.shape[-1]
        flat[*names, "A"], flat[*names, "B"] = a, b
        alpha = parts["alpha"][1] if "alpha" in parts else _alpha(path, header, layer, rank)
        scales[names] = _number(path, f"alpha of {layer}", alpha) / rank
    if len(set(scales.values())) == 1:
        return traverse_util.unflatten_dict(flat), next(iter(scales.values()))
    for names, scale in scales.items():
        flat[*names, "B"] = flat[*names, "B"] * scale
    return traverse_util.unflatten_dict(flat), 1.0


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The file's tensors, and peft's settings for the UNet from its header."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = parse_json((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        reason = f"{error}".partition("\n")[0][:200]
        raise InputError(f"{path}: not a readable LoRA file in safetensors format ({reason})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: {METADATA} in the header is no json object")
    for name, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise InputError(f"{path}: tensor {name} holds numbers that are not finite: a run that diverged?")
    header = {key.removeprefix(lora_names.PREFIX): value for key, value in header.items()}
    for key in ("use_rslora", "use_dora"):
        if header.get(key):
            raise InputError(f"{path}: {key}={header[key]} is not supported; wants plain LoRA, scaled by alpha / rank")
    return tensors, header


def _by_layer(
    path: Path, tensors: Mapping[str, np.ndarray], known: Mapping[str, str]
) -> dict[str, dict[str, tuple[str, np.ndarray]]]:
    """{layer: {"A", "B", "alpha": (the tensor's name, the tensor)}} by our names of layers."""
    found, text, unknown = {}, 0, []
    for name, value in tensors.items():
        tensor = lora_names.parse(name)
        if tensor.text:
            text += 1
        elif tensor.layer in known:
            found.setdefault(known[tensor.layer], {})[tensor.kind] = (name, value)
        else:
            unknown.append(name)
    if unknown:
        names = ", ".join(sorted(unknown)[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        raise InputError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors belong to no linear layer or 1x1 convolution of this "
            f"model's UNet ({names}): a LoRA of another model, or of a kind that is not supported"
        )
    if not found:
        raise InputError(f"{path}: holds no LoRA of a UNet" + (f", only {text} text encoder tensors" if text else ""))
    if text:
        logging.warning("%s: %d tensors for the text encoders are left out: only the UNet takes LoRA here", path, text)
    return found


def _pair(path: Path, parts: Mapping[str, tuple[str, np.ndarray]], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(A, B) of a layer with a kernel of this shape, in its axis order."""
    (name_a, a), (name_b, b) = parts["A"], parts["B"]
    fan_in, fan_out = shape[-2:]
    rank = a.shape[0] if a.ndim else 0
    for name, value, wanted in ((name_a, a, (rank, fan_in)), (name_b, b, (fan_out, rank))):
        if not rank or value.shape not in (wanted, (*wanted, 1, 1)):
            raise InputError(
                f"{path}: tensor {name} has shape {value.shape}, the model's layer {fan_in} -> {fan_out}, "
                f"the pair's rank {rank}: a LoRA of another model?"
            )
    lead = shape[:-2]  # () or, of a 1x1 convolution, (1, 1)
    a = np.asarray(a.reshape(rank, fan_in).T, np.float32).reshape(*lead, fan_in, rank)
    return a, np.asarray(b.reshape(fan_out, rank).T, np.float32).reshape(*lead, rank, fan_out)


def _alpha(path: Path, header: Mapping[str, Any], layer: str, rank: int) -> Any:
    """alpha of a layer in peft's settings: that of the first pattern that matches its name; the rank by default."""
    patterns = header.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: alpha_pattern in the header is no json object")
    for pattern, alpha in patterns.items():
        try:
            if not _PATTERN.fullmatch(pattern):
                raise re.error("of a kind that is not supported")
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return alpha
        except re.error as error:
            raise InputError(f"{path}: alpha_pattern {pattern[:60]!r} in the header: {error}") from None
    return header.get("lora_alpha", rank)


def _number(path: Path, name: str, value: Any) -> float:
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST_ALPHA:
        raise InputError(f"{path}: {name} is {str(value)[:40]}; wants a number")
    return float(value)
