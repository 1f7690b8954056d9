"""LoRA (Hu et al. 2021) as the linen variable collection "lora", and its files in diffusers' and peft's format.

The collection mirrors the parameter tree: {..., "to_q": {"A": [in, rank], "B": [rank, out]}}, with
[height, width, in, rank] and [1, 1, rank, out] for a convolution. `layers.Dense` and `layers.Conv` add (x A) B where
they find a pair; base weights are never touched. Arrays that lie beside the layers, at the top, are what else was
learnt with them: "x_T", see `sampling.moved`.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray
from safetensors.numpy import save

from diffexp_jax import paths
from diffexp_jax.errors import InputError, first_line
from diffexp_jax.formats import lora_files, lora_names
from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.lora_files import LORA_FILE, METADATA
from diffexp_jax.formats.lora_names import UNET

__all__ = ["BESIDE", "LORA_FILE", "TARGETS", "file_beside", "init_lora", "initial_lora", "load_lora", "save_lora"]
__all__ += ["scaled", "split", "target_layers"]

BESIDE = ("x_T",)  # arrays that a file beside a LoRA's may hold
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the four projections of every attention


def target_layers(targets: Any, groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The last parts of layers' names that the words of lora.targets stand for.

    Args:
      targets: one or several of the groups' names and of their layers' names.
      groups: the pipeline's `lora_targets`.

    Raises:
      InputError: it is something else.
    """
    words = [targets] if isinstance(targets, str) or not isinstance(targets, Sequence) else targets
    layers = [layer for group in groups.values() for layer in group]
    unknown = [word for word in words if word not in [*groups, *layers]]
    if any(isinstance(word, str) and word.startswith("text") for word in unknown):
        raise InputError(f"lora.targets={unknown[0]!r}: the text encoders are not trained")
    if unknown or not words:
        wrong, single = repr(unknown[0])[:60] if unknown else "()", ", ".join(dict.fromkeys(layers))
        raise InputError(f"lora.targets={wrong}: accepted: {', '.join(groups)}, or single layers: {single}")
    return tuple(dict.fromkeys(layer for word in words for layer in groups.get(word, (word,))))


def init_lora(
    key: PRNGKeyArray, params: Mapping[str, Any], *, rank: int, targets: Sequence[str] = TARGETS
) -> dict[str, Any]:
    """A normal with standard deviation 1/rank, B = 0 (so the model is unchanged at first), float32, for every target.

    As diffusers' LoRALinearLayer and peft's init_lora_weights="gaussian" start. `targets` are the last parts of the
    layers' names, whole ones: "attn.to_q" is not the end of "attn2.to_q".
    """
    flat = traverse_util.flatten_dict(params)
    lora, suffixes = {}, tuple(f".{layer}" for layer in targets)
    for i, (path, kernel) in enumerate(sorted(flat.items(), key=lambda item: item[0])):
        if path[-1] == "kernel" and f".{'.'.join(path[:-1])}".endswith(suffixes):
            *lead, fan_in, fan_out = kernel.shape
            lora[(*path[:-1], "A")] = _draw(key, i, rank, shape=(*lead, fan_in, rank))
            lora[(*path[:-1], "B")] = np.zeros((*(1 for _ in lead), rank, fan_out), np.float32)
    if not lora:
        raise InputError(f"lora: the model has no layer named {', '.join(targets)}")
    return traverse_util.unflatten_dict(lora)


@partial(jax.jit, static_argnames="shape")
def _draw(key: PRNGKeyArray, i: int | Array, rank: int | Array, *, shape: tuple[int, ...]) -> Array:
    """Columns of A of the i-th target: a program for each shape of a model."""
    return jax.random.normal(jax.random.fold_in(key, i), shape) / rank


def initial_lora(
    key: PRNGKeyArray,
    params: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    path: str | Path | None = None,
    prefix: str = UNET,
) -> dict[str, Any]:
    """The LoRA to start from: `init_lora`, or a collection that under alpha / rank does what the file at `path` does.

    A file of a smaller rank is filled up with columns of A as `init_lora` draws them and zero rows of B; so are targets
    that the file leaves out. Further layers of the file are trained too.

    Raises:
      InputError: as `load_lora`; or the file's rank is larger.
    """
    fresh = init_lora(key, params, rank=rank, targets=targets)
    if path is None:
        return fresh
    loaded, scale = load_lora(path, params, prefix=prefix)
    loaded, _ = split(loaded)  # what a method learns beside the layers begins anew
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


def scaled(lora: Mapping[str, Any] | None, scale: float, *, others: float = 1.0) -> Mapping[str, Any] | None:
    """The collection as `layers.Dense` wants it: the factor scale = alpha / rank multiplied into every B.

    `others` is the factor of the arrays beside the layers.
    """
    if scale == others == 1.0:
        return lora
    factors = {"A": 1.0, "B": scale}
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factors.get(path[-1].key, others), lora)


def split(lora: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The layers of a collection, and the arrays that lie beside them."""
    others = {name for name, x in lora.items() if not isinstance(x, Mapping)}
    return {name: x for name, x in lora.items() if name not in others}, {name: lora[name] for name in others}


def file_beside(path: Path, name: str) -> Path:
    """Of an array beside the layers whose LoRA has this file: latents are [channels, height, width] there."""
    return path.with_name(f"{path.stem}.{name}.npy")


def save_lora(path: str | Path, lora: Mapping[str, Any], *, alpha: float, prefix: str = UNET) -> None:
    """Writes a file for diffusers' `load_lora_weights`.

    The tensors are PREFIX<module>.lora_A.weight [rank, in] and .lora_B.weight [out, rank], where the prefix is "unet."
    or what diffusers calls another network (`Pipeline.lora_prefix`). alpha stands in the header, in the keys of peft's
    LoraConfig, where diffusers writes and reads it. Arrays beside the layers have files of their own (`file_beside`),
    of which diffusers does not know: a warning says so.
    """
    path, tensors, modules = Path(path), {}, []
    path.parent.mkdir(parents=True, exist_ok=True)
    layers, others = split(lora)
    for name in BESIDE:
        beside = file_beside(path, name)
        if name not in others:
            beside.unlink(missing_ok=True)  # of the LoRA that lay here before
            continue
        with replaced(beside) as partial, open(partial, "wb") as file:
            np.save(file, np.asarray(others[name], np.float32).transpose(2, 0, 1))
        logging.warning("%s: in diffusers add it to the noise that sampling begins with", beside)
    for (*path_to, leaf), value in sorted(traverse_util.flatten_dict(layers).items()):
        modules.append(".".join(path_to))
        value = np.asarray(value, np.float32)
        axes = (1, 0) if value.ndim == 2 else (3, 2, 0, 1)  # torch keeps outputs first
        tensors[f"{prefix}{modules[-1]}.lora_{leaf}.weight"] = np.ascontiguousarray(value.transpose(axes))
    rank = next(len(value) for name, value in tensors.items() if ".lora_A." in name)
    adapter = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(set(modules))}
    adapter = {f"{prefix}{key}": value for key, value in adapter.items()}
    with replaced(path) as partial:  # not by save_file: that makes files that nobody but their owner can read
        partial.write_bytes(_sorted_header(save(tensors, {"format": "pt", METADATA: json.dumps(adapter)})))


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes metadata in another order each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of 8, as the library has it
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def load_lora(path: str | Path, params: Mapping[str, Any], *, prefix: str = UNET) -> tuple[dict[str, Any], float]:
    """Reads a LoRA file, safetensors or pickled, or a folder that holds one (see `lora_files.find`), for a network.

    Known are the names of peft, of diffusers since 0.11 and of kohya's scripts, for all linear layers and convolutions,
    with a rank and an alpha per layer. peft's own files want adapter_config.json beside them. Tensors for the text
    encoders are left out, with a warning.

    Args:
      params: the network's, or their shapes.
      prefix: what diffusers writes before the names of its layers, `Pipeline.lora_prefix`.

    Returns:
      The collection, with what `save_lora` wrote beside it, and its scale, alpha / rank. Where layers have different
      scales, each is multiplied into its layer's B, and the scale that is returned is 1.

    Raises:
      InputError: not a LoRA file, one of another kind than plain LoRA, or its tensors do not fit the network.
    """
    path = lora_files.find(paths.local("LoRA", path))
    tensors, settings = lora_files.read(path, prefix)
    layers = {
        ".".join(names[:-1]): (names[:-1], kernel.shape)
        for names, kernel in traverse_util.flatten_dict(params).items()
        if names[-1] == "kernel"
    }
    found, text = lora_files.matrices(path, tensors, lora_names.spellings(layers), prefix)
    if text:
        logging.warning("%s: %d tensors for the text encoders are left out: they take no LoRA here", path, text)
    flat, scales = {}, {}
    for layer, parts in found.items():
        if not {"A", "B"} <= parts.keys():
            raise InputError(f"{path}: wants a pair (lora_A, lora_B) per layer; {layer} has only one of them")
        names, shape = layers[layer]
        a, b = _pair(path, {kind: (name, _finite(path, name, tensors[name])) for kind, name in parts.items()}, shape)
        flat[*names, "A"], flat[*names, "B"] = a, b
        alpha = tensors[parts["alpha"]] if "alpha" in parts else None
        scales[names] = lora_files.scale_of(path, settings, layer, a.shape[-1], alpha)
    scale = next(iter(scales.values()))
    if len(set(scales.values())) > 1:
        for names, of_layer in scales.items():
            flat[*names, "B"] = flat[*names, "B"] * np.float32(of_layer)
        scale = 1.0
    others = {name: file for name in BESIDE if (file := file_beside(path, name)).is_file()}
    return traverse_util.unflatten_dict(flat) | {name: _latents(file) for name, file in others.items()}, scale


def _latents(file: Path) -> np.ndarray:
    """[height, width, channels] of a file that `save_lora` wrote beside a LoRA's."""
    try:
        value = np.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no array of numpy ({first_line(error)})") from None
    if value.ndim != 3:
        raise InputError(f"{file}: shape {value.shape}; wants [channels, height, width]")
    return _finite(file, "x_T", value).astype(np.float32).transpose(1, 2, 0)


def _finite(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """The tensor, once its numbers are seen to be usable."""
    if not np.isfinite(np.asarray(value, np.float32)).all():
        raise InputError(f"{path}: tensor {name} holds numbers that are not finite: a run that diverged?")
    return value


def _pair(path: Path, parts: Mapping[str, tuple[str, np.ndarray]], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(A, B) of a layer with a kernel of this shape, in its axis order: [..., in, rank] and [1..., rank, out]."""
    (name_a, a), (name_b, b) = parts["A"], parts["B"]
    *lead, fan_in, fan_out = shape  # lead: height and width of a convolution's kernel
    rank = a.shape[0] if a.ndim else 0
    pointwise = all(side == 1 for side in lead)
    wanted_a = {(rank, fan_in, *(lead or (1, 1)))} | ({(rank, fan_in)} if pointwise else set())
    for name, value, wanted in ((name_a, a, wanted_a), (name_b, b, {(fan_out, rank), (fan_out, rank, 1, 1)})):
        if not rank or value.shape not in wanted:
            window = "" if pointwise else f" ({lead[0]}x{lead[1]})"
            raise InputError(
                f"{path}: tensor {name} has shape {value.shape}, the model's layer {fan_in} -> {fan_out}{window}, "
                f"the pair's rank {rank}: a LoRA of another model?"
            )
    a = np.asarray(a, np.float32).reshape(rank, fan_in, *lead)
    a = np.ascontiguousarray(a.transpose(*range(2, a.ndim), 1, 0))
    return a, np.asarray(b, np.float32).reshape(fan_out, rank).T.reshape(*(1 for _ in lead), rank, fan_out)
