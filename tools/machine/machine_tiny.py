"""Small random models of SD 1.5's, SDXL's, SD 3.5's and FLUX's kind, and what they sample: scripts/check_machine.py has
their results.
"""

from functools import partial

import jax
import numpy as np
from machine_checks import draw

from diffexp_jax import parallel
from diffexp_jax.pipelines import PIPELINES, Pipeline, make_context, sizes
from diffexp_jax.sampling import rollout

# As published, but narrow and of fewer layers. Lengths (4096 pixels, 77 tokens; of SD 3.5 1357 tokens, of FLUX 768)
# and kinds of blocks are real, so that 16 bits go the real way on a GPU.
UNET = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
WORDS = 1000
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": WORDS, "projection_dim": 16}
PARTS = {"vae": {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}}
PARTS |= {"text_encoder": TEXT, "text_encoder_2": TEXT}
MMDIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
MMDIT |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "sample_size": 64, "dual_attention_layers": [0]}
FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
FLUX |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": [4, 4, 8], "guidance_embeds": True}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": WORDS}
TINY = {
    "SD 1.5": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"unet": UNET | {"block_out_channels": [16, 16, 32, 32], "attention_head_dim": 2, "cross_attention_dim": 16}},
    ),
    "SDXL": (
        "stabilityai/stable-diffusion-xl-base-1.0",
        {
            "unet": UNET
            | {"block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4], "cross_attention_dim": 32}
            | {"transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8}
        },
    ),
    "SD 3.5": ("stabilityai/stable-diffusion-3.5-medium", {"transformer": MMDIT, "text_encoder_3": T5}),
    "FLUX": ("black-forest-labs/FLUX.1-dev", {"transformer": FLUX, "text_encoder_2": T5}),
}
IMAGE_SIZES = {"FLUX": 256}  # of the others the sizes say what they are for


def tiny_model(name: str, dtype: str) -> Pipeline:
    """A small pipeline of the family, of random weights that keep activations in size."""
    path, changes = TINY[name]
    index, parts = sizes.PIPELINES[path]
    parts = {part: own | (PARTS | changes).get(part, {}) for part, own in parts.items()}
    model = PIPELINES[index["_class_name"]].shapes(index, parts, name, dtype=dtype, image_size=IMAGE_SIZES.get(name))
    numbers = np.random.RandomState(0)

    def weights(path, leaf):
        x, kind = numbers.standard_normal(leaf.shape).astype(np.float32), path[-1].key
        if kind == "kernel":
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            x = {"scale": 1 + 0.1 * x, "bias": 0.1 * x}.get(kind, 0.5 * x)
        return x.astype(leaf.dtype)

    return model._replace(params=jax.tree_util.tree_map_with_path(weights, model.params))


def tiny_results(name: str, dtype: str, n_steps: int = 2) -> dict[str, np.ndarray]:
    """Some of the latents and pixels of one prompt's image; the whole pipeline, from token ids on."""
    model, numbers = tiny_model(name, dtype), np.random.RandomState(1)
    ids = tuple(numbers.randint(0, WORDS, (2, length)).astype(np.int32) for length in model.lengths)
    t = model.process.timesteps(n_steps)
    w_t = np.full(n_steps, 5.0, np.float32)
    steps = model.process.make_steps(t, w_t, eta=0.0)

    @jax.jit
    def sample(params, x_T, context, steps, keys):
        denoise = partial(model.network(w_t), params, None)
        x_0, _ = rollout(model.process, denoise, x_T, context, steps, keys)
        return {f"{name}/latents": x_0[:, ::2, ::2], f"{name}/images": model.decode(params, x_0)[:, ::16, ::16]}

    rows = jax.device_get(jax.jit(model.encode)(model.params, ids))
    cond, empty = jax.tree.map(lambda x: x[:1], rows), jax.tree.map(lambda x: x[1], rows)
    context = make_context(cond, model.unconditional(empty))
    keys = parallel.sample_keys(jax.random.key(0), 1)  # of no noise, as eta is 0
    return jax.device_get(sample(model.params, draw(2, (1, *model.latent_shape)), context, steps, keys))
