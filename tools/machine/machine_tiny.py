"""Small random models of SD 1.5's and SDXL's kind, and what they sample: scripts/check_machine.py has their results."""

from functools import partial

import jax
import numpy as np
from machine_checks import draw

from diffexp_jax import parallel
from diffexp_jax.pipelines import Pipeline, families, make_context, sizes, stable_diffusion
from diffexp_jax.sampling import rollout

# As published, but narrow and of fewer layers. Lengths (4096 pixels, 77 tokens) and kinds of blocks are real, so
# that 16 bits go the real way on a GPU.
SD15, _, SDXL = sizes.PIPELINES
UNET = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
TINY = {
    "SD 1.5": (
        SD15,
        UNET | {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 16},
    ),
    "SDXL": (
        SDXL,
        UNET
        | {"block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4], "cross_attention_dim": 32}
        | {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8},
    ),
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 1000, "projection_dim": 16}
PARTS = {"vae": {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}}
PARTS |= {"text_encoder": TEXT, "text_encoder_2": TEXT}


def tiny_model(name: str, dtype: str) -> tuple[Pipeline, int]:
    """A small pipeline of the family, of random weights that keep activations in size; its number of text encoders."""
    path, unet = TINY[name]
    index, parts = sizes.PIPELINES[path]
    changes = PARTS | {"unet": unet}
    config = families.model_config(index, {part: own | changes.get(part, {}) for part, own in parts.items()})
    numbers = np.random.RandomState(0)

    def weights(path, leaf):
        x, kind = numbers.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if kind == "kernel":
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            x = {"scale": 1 + 0.1 * x, "bias": 0.1 * x}.get(kind, 0.5 * x)
        return x.astype(config.dtype(path[0].key, dtype))

    params = jax.tree_util.tree_map_with_path(weights, stable_diffusion.abstract_params(config))
    return stable_diffusion.build(config, dtype=dtype)._replace(params=params), len(config.text)


def tiny_results(name: str, dtype: str, n_steps: int = 2) -> dict[str, np.ndarray]:
    """Some of the latents and pixels of one prompt's image; the whole pipeline, from token ids on."""
    model, n_encoders = tiny_model(name, dtype)
    ids = np.random.RandomState(1).randint(0, TEXT["vocab_size"], (n_encoders, 2, 77)).astype(np.int32)
    t = model.process.timesteps(n_steps)
    w_t = np.full(n_steps, 5.0, np.float32)
    steps = model.process.make_steps(t, w_t, eta=0.0)

    @jax.jit
    def sample(params, x_T, context, steps, keys):
        denoise = partial(model.network(w_t), params, None)
        x_0, _ = rollout(model.process, denoise, x_T, context, steps, keys)
        return {f"{name}/latents": x_0[:, ::2, ::2], f"{name}/images": model.decode(params, x_0)[:, ::16, ::16]}

    rows = jax.device_get(jax.jit(model.encode)(model.params, tuple(ids)))
    cond, empty = jax.tree.map(lambda x: x[:1], rows), jax.tree.map(lambda x: x[1], rows)
    context = make_context(cond, model.unconditional(empty))
    keys = parallel.sample_keys(jax.random.key(0), 1)  # of no noise, as eta is 0
    return jax.device_get(sample(model.params, draw(2, (1, *model.latent_shape)), context, steps, keys))
