"""The layers of Stable Diffusion's networks as the original code (CompVis, Stability AI) names and numbers them.

Single-file checkpoints use these names, and so do kohya's LoRA files for SDXL. The original code counts the UNet's
blocks without levels, each level ending in a block that shrinks or enlarges. Its VAE gives a resolution the same number
in both halves, where diffusers counts the decoder's levels from the coarse end.
"""

import re
from collections.abc import Iterable

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(?:(mid)_block|(down|up)_blocks\.(\d+))\.(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)")


def unet_names(layers: Iterable[str]) -> dict[str, str]:
    """Names of a UNet's layers in diffusers -> in the original code; layers that it does not have are left out.

    "down_blocks.1.attentions.0.proj_in" -> "input_blocks.4.1.proj_in" in a UNet of two residual blocks a level.
    """
    layers = list(layers)
    matches = {layer: match.groups() for layer in layers if (match := _BLOCK.fullmatch(layer))}
    blocks = {layer: (mid or outer, *rest) for layer, (mid, outer, *rest) in matches.items()}
    counted = [
        int(n) for where, level, kind, n, _ in blocks.values() if (where, level, kind) == ("down", "0", "resnet")
    ]
    per_level = 1 + max(counted, default=-1)
    attending = {level for where, level, kind, *_ in blocks.values() if (where, kind) == ("up", "attention")}
    names = {layer: _UNET[layer] for layer in layers if layer in _UNET}
    for layer, (where, level, kind, n, rest) in blocks.items():
        rest = _RESNET.get(rest, rest) if kind == "resnet" else rest
        at = int(n) + (0 if where == "mid" else int(level) * (per_level + 1))
        if where == "mid":
            names[layer] = f"middle_block.{1 if kind == 'attention' else 2 * int(n)}.{rest}"
        elif kind == "downsampler":
            names[layer] = f"input_blocks.{at + per_level + 1}.0.op"
        elif kind == "upsampler":
            names[layer] = f"output_blocks.{at + per_level}.{2 if level in attending else 1}.{rest}"
        elif where == "down":  # block 0 is the first convolution
            names[layer] = f"input_blocks.{at + 1}.{0 if kind == 'resnet' else 1}.{rest}"
        else:
            names[layer] = f"output_blocks.{at}.{0 if kind == 'resnet' else 1}.{rest}"
    return names


_VAE = (
    (r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"encoder.down.\1.block.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"decoder.up.\1.block.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv", r"decoder.up.\1.upsample.conv"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0", r"\1.mid.attn_1.proj_out"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to|group)_(.+)", r"\1.mid.attn_1.\2"),
)


def vae_name(layer: str, levels: int) -> str:
    """The name of a layer of an AutoencoderKL of so many levels: "decoder.up_blocks.0.resnets.1.conv1" of four levels
    -> "decoder.up.3.block.1.conv1"."""
    for pattern, new in _VAE:
        if match := re.fullmatch(pattern, layer):
            layer = match.expand(new)
            break
    layer = layer.replace(".conv_shortcut", ".nin_shortcut")
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", layer)
