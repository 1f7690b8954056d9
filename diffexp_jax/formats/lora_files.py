"""LoRA files: which file a path means, its tensors by name, and what peft's settings in or beside it make of them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffexp_jax.errors import InputError
from diffexp_jax.formats import files, lora_names, pickles
from diffexp_jax.formats.json_text import parse_json

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
METADATA = "lora_adapter_metadata"  # the entry for peft's settings in the header of diffusers' files
SETTINGS_FILE = "adapter_config.json"  # peft's own, beside its weights
_PEFT_STEM = "adapter_model"
_STEMS = ("pytorch_lora_weights", _PEFT_STEM)
_SUFFIXES = (".safetensors", *pickles.SUFFIXES)
_SHOWN = 3  # names printed in an error
_MOST_ALPHA = 1e30
# Regular expressions of a bounded effort: names, alternatives, groups, and up to four of .* or \d+ (not of a group).
_PATTERN = re.compile(r"[\w^$.\-\\|()]*((\.|\\[dw])[*+][\w^$.\-\\|()]*){0,4}")

# Settings of peft that `scale_of` reads, and those that say nothing of what the tensors mean. Any other that is set
# asks for what plain LoRA is not.
_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of a first draw, see init_lora_weights
)
_ACCEPTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The other first draws change the model's own weights: what was learned does not fit the untouched ones.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def find(path: Path) -> Path:
    """The LoRA file that a path means: itself, or the one in a folder.

    Raises:
      InputError: the folder holds none, or several of which none goes before the others.
    """
    if not path.is_dir():
        return path
    known = [
        [path / f"{stem}{suffix}" for suffix in _SUFFIXES if (path / f"{stem}{suffix}").is_file()] for stem in _STEMS
    ]
    found = [of_a_stem[0] for of_a_stem in known if of_a_stem]  # a pickle beside the same in safetensors is passed over
    if not found:
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path}: holds several files ({_listed([file.name for file in found])}); give one of them")
    below = [file.parent.name for file in path.glob(f"*/{SETTINGS_FILE}")]
    below = f"; there are some in its subfolders {_listed(below)}" if below else ""
    wanted = " or ".join(f"{stem}.safetensors" for stem in _STEMS)
    raise InputError(f"{path}: not a readable LoRA file, and no folder with {wanted}{below}")


def read(path: Path, prefix: str = lora_names.UNET) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """The tensors of a LoRA file, read when asked for, and peft's settings for the network: {} where there are none.

    Args:
      prefix: before the names of the network's layers, as diffusers writes them.

    Raises:
      InputError: the file is not readable, or the settings ask for more than plain LoRA.
    """
    try:
        tensors = pickles.open_checkpoint(path) if path.suffix in pickles.SUFFIXES else files.Weights([path])
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a readable LoRA file: {reason}") from None
    settings, where = _settings(path, tensors, prefix)
    for key, value in settings.items():
        accepted = _ACCEPTED.get(key, (None, False))
        if key in (*_READ, *_WITHOUT_EFFECT) or value in (None, False, [], {}):
            continue
        if value not in accepted:
            raise InputError(f"{where}: {key}={str(value)[:60]} is not supported; wants plain LoRA")
    return tensors, settings


def _settings(path: Path, tensors: Mapping[str, np.ndarray], prefix: str) -> tuple[dict[str, Any], str]:
    """peft's settings and where they stand: in the header, or, for files that peft wrote itself, in the json beside."""
    header = getattr(tensors, "metadata", {}).get(METADATA)
    if header is not None:
        try:
            content = parse_json(header)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InputError(f"{path}: not a readable LoRA file: {METADATA} in its header is no json object")
        of_network = {key.removeprefix(prefix): x for key, x in content.items() if key.startswith(prefix)}
        plain = {key: x for key, x in content.items() if "." not in key}
        return of_network or plain, f"{path}: its header's {METADATA}"
    parsed = [lora_names.parse(name, prefix) for name in tensors]
    if path.stem != _PEFT_STEM and not any(tensor.peft for tensor in parsed):
        return {}, ""
    beside = path.with_name(SETTINGS_FILE)
    if beside.is_file():
        settings = files.read_json(beside)
        if "lora_alpha" not in settings:
            raise InputError(f"{beside}: lora_alpha is missing")
        return settings, str(beside)
    with_alpha = {tensor.layer for tensor in parsed if tensor.kind == "alpha"}
    if any(tensor.kind == "A" and tensor.layer not in with_alpha for tensor in parsed):
        raise InputError(
            f"{path}: its tensors have peft's names, and the scale of such a LoRA stands in {SETTINGS_FILE}, which is "
            'not beside it; wants that file, at least {"lora_alpha": NUMBER}'
        )
    return {}, ""


def scale_of(path: Path, settings: Mapping[str, Any], layer: str, rank: int, alpha: np.ndarray | None) -> float:
    """What the product of a layer's pair is multiplied by: alpha / rank, or alpha / sqrt(rank) by use_rslora.

    Args:
      path: for errors.
      settings: peft's, of `read`.
      rank: that of the layer's tensors.
      alpha: the layer's own, of its tensor; else the settings say it, and where there are none it is the rank.

    Raises:
      InputError: alpha is no number, or the settings say another rank.
    """
    if alpha is not None:
        return number(path, f"alpha of {layer}", alpha) / rank
    said = _of_layer(path, settings, "rank_pattern", layer, settings.get("r"))
    if said is not None and number(path, "r", said) != rank:
        raise InputError(f"{path}: {layer} has rank {rank}, and the settings say r={said}")
    alpha = number(
        path, f"alpha of {layer}", _of_layer(path, settings, "alpha_pattern", layer, settings.get("lora_alpha", rank))
    )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_layer(path: Path, settings: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the layer's name."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {key} in peft's settings is no json object")
    for pattern, value in patterns.items():
        try:
            if not _PATTERN.fullmatch(pattern):
                raise re.error("of a kind that is not supported")
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return value
        except re.error as error:
            raise InputError(f"{path}: {key} {pattern[:60]!r} in peft's settings: {error}") from None
    return default


def number(path: Path, name: str, value: Any) -> float:
    """A finite number of a file as a float; `name` says what it is."""
    value = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST_ALPHA:
        raise InputError(f"{path}: {name} is {str(value)[:40]}; wants a number")
    return float(value)


def matrices(
    path: Path, tensors: Mapping[str, np.ndarray], known: Mapping[str, str], prefix: str = lora_names.UNET
) -> tuple[dict[str, dict[str, str]], int]:
    """{layer: {"A", "B", "alpha": the tensor's name}} by our names of layers, and how many text encoder tensors.

    `known` is `lora_names.spellings` of the network's layers, `prefix` what diffusers writes before them.

    Raises:
      InputError: tensors of other layers or kinds, several LoRAs in one file, or none.
    """
    found, text, unknown, twice, adapters = {}, 0, [], [], set()
    network = lora_names.network_of(prefix)
    for name in tensors:
        tensor = lora_names.parse(name, prefix)
        if tensor.text:
            text += 1
        elif tensor.layer not in known:
            unknown.append(name)
        else:
            parts = found.setdefault(known[tensor.layer], {})
            if tensor.kind != "alpha":
                adapters.add(tensor.adapter)
            if tensor.kind in parts:
                twice.append(f"{parts[tensor.kind]} and {name}")
            parts[tensor.kind] = name
    if len(adapters) > 1:
        names = _listed([str(adapter) for adapter in adapters])
        raise InputError(f"{path}: holds {len(adapters)} LoRAs ({names}); wants one a file")
    if twice:
        raise InputError(f"{path}: two tensors for the same of a layer: {twice[0]}")
    if unknown:
        kinds = dict.fromkeys(kind for name in sorted(unknown) if (kind := lora_names.kind_of(name, prefix)))
        what = (
            f"{' and '.join(kinds)}, which is not supported"
            if kinds
            else "a LoRA of another model, or of a kind that is not supported"
        )
        raise InputError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors belong to no layer of this model's {network} "
            f"({_listed(unknown)}): {what}"
        )
    if not found:
        raise InputError(
            f"{path}: holds no LoRA of a {network}" + (f", only {text} text encoder tensors" if text else "")
        )
    return found, text


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
