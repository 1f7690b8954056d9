"""Tiny networks whose blocks may be loops, with inputs and the layers that may take LoRA."""

import jax
import numpy as np

from diffexp_jax.formats import convert
from diffexp_jax.models import flux, lora, mmdit
from diffexp_jax.models.blocks import TRANSFORMER_BLOCKS
from diffexp_jax.models.flux import Flux, FluxConfig
from diffexp_jax.models.mmdit import MMDiT, MMDiTConfig
from diffexp_jax.models.unet import Transformer2D
from diffexp_jax.pipelines.stable_diffusion import LORA_TARGETS as OF_UNET
from tests.support import flux as tiny_flux
from tests.support import sd3
from tests.support.arrays import normal

BLOCKS = (TRANSFORMER_BLOCKS, flux.SINGLE_BLOCKS)


def of_flux():
    config = tiny_flux.TINY["dev"]
    return Flux(FluxConfig.from_dict(config)), tiny_flux.inputs(config), flux.LORA_TARGETS


def of_sd35():
    """Two blocks of dual attention, two without, and the last."""
    config = sd3.TINY["sd3.5-medium"] | {"num_layers": 5}
    return MMDiT(MMDiTConfig.from_dict(config)), sd3.inputs(config), mmdit.LORA_TARGETS


def of_sdxl():
    """The blocks at one place of its UNet."""
    network = Transformer2D(depth=3, heads=2, linear=True, groups=4, dtype=np.float32)
    return network, (normal(0, 2, 3, 2, 8), normal(1, 2, 5, 6)), OF_UNET


def random_params(network, args, rng, over=5):
    """Normal numbers over a number, for every parameter that the network has with these inputs."""
    shapes = convert.abstract_params(network, *args)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / over, shapes)


def random_lora(params, groups, rng):
    """LoRA of rank 3, which does something, on every layer that may take it."""
    targets = sorted({layer for group in groups.values() for layer in group})
    start = lora.init_lora(jax.random.key(0), params, rank=3, targets=targets)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 5, start)
