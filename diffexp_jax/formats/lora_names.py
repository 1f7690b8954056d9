"""The names that LoRA files give to layers and tensors: peft's and diffusers', diffusers' old ones, and kohya's."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PREFIX = "unet."  # before a layer's name, in the files of diffusers and peft
_ENDINGS = {
    ".lora_A.weight": "A",  # peft, diffusers
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",  # diffusers 0.2x
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",  # kohya
    ".lora_up.weight": "B",
    ".down.weight": "A",  # diffusers' attention processors
    ".up.weight": "B",
    ".alpha": "alpha",
}
_TEXT = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")


class Tensor(NamedTuple):
    """What a tensor's name says."""

    layer: str | None  # as the file spells it, without the prefix of the UNet
    kind: str | None  # "A", "B", "alpha"; None: unknown
    text: bool  # of a text encoder


def parse(name: str) -> Tensor:
    """Splits a tensor's name."""
    if name.startswith(_TEXT):
        return Tensor(None, None, True)
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending):
            layer = name.removesuffix(ending).removeprefix("lora_unet_").removeprefix(PREFIX)
            return Tensor(layer, kind, False)
    return Tensor(None, None, False)


def spellings(layers: Iterable[str]) -> dict[str, str]:
    """Every known spelling of the UNet's layers -> our name, e.g. of "down_blocks.1.attentions.0.proj_in".

    kohya writes "_" for "."; for SDXL it counts blocks as the original code does: "input_blocks_4_1_proj_in".
    """
    layers = list(layers)
    in_first_level = filter(None, map(re.compile(r"down_blocks\.0\.resnets\.(\d+)").match, layers))
    per_level = 1 + max(int(match[1]) for match in in_first_level)
    out = {}
    for layer in layers:
        attention, _, projection = layer.rpartition(".to_")
        processor = f"{attention}.processor.to_{projection.removesuffix('.0')}_lora" if attention else layer
        for spelling in (layer, processor, *_original(layer, per_level)):
            out[spelling] = out[spelling.replace(".", "_")] = layer
    return out


_ORIGINAL = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def _original(layer: str, per_level: int) -> Iterator[str]:
    """The layer's name in the original code (CompVis, Stability AI), which numbers blocks without levels."""
    if layer in _ORIGINAL:
        yield _ORIGINAL[layer]
    block = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", layer)
    if not block:
        return
    where, level, kind, n, rest = block.groups()
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    inner = 0 if kind == "resnets" else 1
    if where == "mid":
        yield f"middle_block.{1 if kind == 'attentions' else 2 * int(n)}.{rest}"
    elif where == "down":  # block 0 is the first convolution; each level ends in a block that shrinks
        yield f"input_blocks.{1 + int(level) * (per_level + 1) + int(n)}.{inner}.{rest}"
    else:
        yield f"output_blocks.{int(level) * (per_level + 1) + int(n)}.{inner}.{rest}"
