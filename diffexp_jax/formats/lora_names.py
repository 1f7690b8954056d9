"""The names that LoRA files give to layers and tensors: peft's and diffusers', diffusers' old ones, and kohya's."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from diffexp_jax.formats.original_names import unet_names

# Before the names of a network's layers, in the files that diffusers writes
UNET, TRANSFORMER = "unet.", "transformer."
_PEFT = "base_model.model."  # in those that peft itself writes
# Of data-parallel training, of torch.compile, of the original code; and kohya's
_WRAPPERS = (_PEFT, "module.", "_orig_mod.", "model.", "diffusion_model.", "lora_unet_")
_MATRIX = re.compile(r"(.+)\.lora_(A|B)(?:\.([^.]+))?\.weight")  # peft, diffusers; with or without the adapter's name
_ENDINGS = {
    ".lora.down.weight": "A",  # diffusers 0.2x
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",  # kohya
    ".lora_up.weight": "B",
    ".down.weight": "A",  # diffusers' attention processors
    ".up.weight": "B",
    ".alpha": "alpha",
}
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_TEXT += ("text_model.",)
# What tensors of other kinds are called, in whole or in part
_OTHERS = {
    r"lora_magnitude_vector|dora_scale": "DoRA",
    r"hada_w[12]": "LoHa",
    r"lokr_w[12]": "LoKr",
    r"lora_mid|lora_t[12]": "a LoRA with a core tensor",
    r"oft_(blocks|r)": "OFT",
    r"lora_[AB]\.(\w+\.)?bias|lora_bias": "a LoRA with biases",
    r"\.diff(_b)?$": "changed weights",
    r"lora_embedding": "a LoRA of an embedding",
    r"custom_diffusion": "Custom Diffusion",
    r"^bundle_emb|emb_params|string_to_param": "a textual inversion",
}
# What layers of other networks are called, and of which
_NETWORKS = {
    UNET: (
        r"^unet\.|(down|up)_blocks|mid_block|(in|out)put_blocks|middle_block",
        "a LoRA of a UNet (Stable Diffusion)",
    ),
    TRANSFORMER: (
        r"^(transformer|lora_transformer)|(double|single)_?(transformer_)?blocks|joint_blocks",
        "a LoRA of a transformer model (SD 3, FLUX)",
    ),
}
# A transformer's layers in the original code, whose queries, keys and values are one layer
_ORIGINAL = r"joint_blocks|(double|single)_blocks"


class Tensor(NamedTuple):
    """What a tensor's name says."""

    layer: str | None  # as the file spells it, without what stands before the network's names
    kind: str | None  # "A", "B", "alpha"; None: unknown
    text: bool = False  # of a text encoder
    peft: bool = False  # named as only peft does, which writes alpha elsewhere
    adapter: str | None = None  # peft's name for this LoRA, where the tensor's name has it


def parse(name: str, prefix: str = UNET) -> Tensor:
    """Splits a tensor's name, in a file of a network of this prefix."""
    bare = _unwrapped(name, (prefix, f"lora_{prefix.removesuffix('.')}_", *_WRAPPERS))
    if bare.startswith(_TEXT):
        return Tensor(None, None, text=True)
    if match := _MATRIX.fullmatch(bare):
        layer, kind, adapter = match.groups()
        return Tensor(layer, kind, peft=_PEFT in name or adapter is not None, adapter=adapter)
    for ending, kind in _ENDINGS.items():
        if bare.endswith(ending):
            return Tensor(bare.removesuffix(ending), kind)
    return Tensor(None, None)


def _unwrapped(name: str, wrappers: Sequence[str]) -> str:
    while wrapper := next((wrapper for wrapper in wrappers if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    return name


def network_of(prefix: str) -> str:
    """What errors call the network whose layers have this prefix."""
    return "UNet" if prefix == UNET else prefix.removesuffix(".")


def kind_of(name: str, prefix: str = UNET) -> str | None:
    """What a file with such a tensor is, where it is none of the kinds that `parse` knows of this network."""
    kinds = [*_OTHERS.items(), *(pair for network, pair in _NETWORKS.items() if network != prefix)]
    if prefix == TRANSFORMER:
        kinds.append((_ORIGINAL, "a LoRA under the original code's names of layers (joint_blocks, double_blocks)"))
    return next((kind for pattern, kind in kinds if re.search(pattern, name)), None)


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every known spelling of a network's layers -> our name, e.g. of "down_blocks.1.attentions.0.proj_in".

    kohya writes "_" for "."; for SDXL it counts blocks as the original code does: "input_blocks_4_1_proj_in".
    Layers of another network than a UNet have no such names.
    """
    layers = list(layers)
    original, out = unet_names(layers), {}
    for layer in layers:
        attention, _, projection = layer.rpartition(".to_")
        processor = f"{attention}.processor.to_{projection.removesuffix('.0')}_lora" if attention else layer
        for spelling in (layer, processor, original.get(layer, layer)):
            out[spelling] = out[spelling.replace(".", "_")] = layer
    return out
