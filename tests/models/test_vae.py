"""The image autoencoder against diffusers' on tiny random models, and against the published model's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from diffexp_jax.formats import convert
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig
from tests.support.tiny import random_weights

# name: (config, height and width of the latents)
TINY = {
    "sd15": (dict(block_out_channels=(8, 16), layers_per_block=2, latent_channels=4), (5, 7)),
    "emoji": (
        dict(
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=8,
            mid_block_add_attention=False,
            scaling_factor=0.7,
        ),
        (3, 2),
    ),
    "no_quant_conv": (
        dict(
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        (4, 4),
    ),
}


def full_config(config):
    """The config with what diffusers wants on top: the groups and the block types, one per resolution."""
    n = len(config["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return dict(config, norm_num_groups=4, **types)


def assert_close(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "sd15")) for x in TINY])
def test_vae_is_diffusers(name, tmp_path):
    torch = pytest.importorskip("torch")
    import diffusers

    config, size = TINY[name]
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**full_config(config)).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms (1, 0 at first) and biases count too
            if key.split(".")[-2] in ("conv_in", "conv2", "conv_shortcut"):
                parameter *= 1e-3  # small activations meet the norms, so that their epsilon counts
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")

    ours = AutoencoderKL(VAEConfig.from_dict(diffusers.AutoencoderKL.load_config(tmp_path)))
    rng, f = np.random.default_rng(0), ours.config.downsampling
    images = jnp.asarray(rng.random((2, f * size[0], f * size[1], 3), np.float32))
    latents = jnp.asarray(rng.standard_normal((2, *size, config["latent_channels"]), np.float32))
    params = convert.from_torch(tensors, convert.abstract_params(ours, images), where=name)

    def run(params, images, latents):
        vae = ours.bind({"params": params})
        return vae.encode(images), vae.moments(images), vae.decode(latents)

    encoded, (mean, logvar), decoded = jax.jit(run)(params, images, latents)

    # what diffusers' pipelines do: img2img into the latent space, and latents to pictures
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    chw, z = (torch.from_numpy(np.array(x)).permute(0, 3, 1, 2) for x in (images, latents))
    with torch.no_grad():
        posterior = theirs.encode(2 * chw - 1).latent_dist
        assert_close(mean, posterior.mean)
        assert_close(logvar, posterior.logvar)
        assert_close(encoded, (posterior.mode() - shift) * scale)
        assert_close(decoded, theirs.decode(z / scale + shift).sample / 2 + 0.5)

    back = convert.to_torch(params)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape), key
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_decode_is_not_clipped():
    """Far outside [0,1] the picture still has a gradient, which AlignProp needs."""
    vae = AutoencoderKL(VAEConfig.from_dict(full_config(TINY["emoji"][0])))
    shapes = convert.abstract_params(vae, jnp.zeros((1, 8, 8, 3)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 / 3, np.float32), shapes)
    params["decoder"]["conv_out"]["bias"] = np.full(3, 40.0, np.float32)
    latents = jnp.linspace(-1, 1, 2 * 2 * 8).reshape(1, 2, 2, 8)

    def image_and_gradient(params, latents):
        image, vjp = jax.vjp(lambda z: vae.apply({"params": params}, z, method="decode"), latents)
        return image, vjp(jnp.ones_like(image))[0]

    image, gradient = jax.jit(image_and_gradient)(params, latents)
    assert image.min() > 5 and np.abs(gradient).max() > 0


def test_remat_keeps_the_blocks_inputs_alone():
    """The gradient is the same; what a backward pass reads is less than half."""
    vae = AutoencoderKL(VAEConfig.from_dict(full_config(TINY["no_quant_conv"][0] | {"layers_per_block": 2})))
    params = random_weights(convert.abstract_params(vae, jnp.zeros((1, 8, 8, 3))), seed=0)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4)), jnp.float32)

    def kept_and_gradient(vae):
        image, pull_back = jax.vjp(lambda z: vae.apply({"params": params}, z, method="decode"), latents)
        kept = sum(x.size for x in jax.tree.leaves(pull_back) if x.ndim == 4 and x.shape[0] == 1)  # no weights
        return kept, pull_back(image)[0]

    (plain, expected), (less, found) = kept_and_gradient(vae), kept_and_gradient(vae.clone(remat=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert 0 < less < plain / 2


def test_defaults_of_a_config_without_scaling_factor():
    """The published SD 1.5 file has none: 0.18215. A null is as good as an absent key."""
    config = VAEConfig.from_dict({"block_out_channels": [128, 256, 512, 512], "shift_factor": None, "act_fn": "silu"})
    assert config == VAEConfig()
    assert (config.scaling_factor, config.shift_factor, config.downsampling) == (0.18215, 0.0, 8)
    assert VAEConfig.from_dict({"scaling_factor": 0.13025}).scaling_factor == 0.13025


def test_statistics_of_the_latents():
    """diffusers' SDXL pipeline: z = latents std / scaling_factor + mean; encoding is its inverse."""
    tiny = {"block_out_channels": [4], "layers_per_block": 1, "norm_num_groups": 2, "scaling_factor": 0.5}
    mean, std = [-0.5, 0.6, -0.4, 0.8], [1.5, 0.7, 1.2, 0.9]
    plain = AutoencoderKL(VAEConfig.from_dict(tiny))
    known = AutoencoderKL(VAEConfig.from_dict(tiny | {"latents_mean": mean, "latents_std": std}))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 4, 4, 3)), jnp.float32)
    params = random_weights(jax.eval_shape(plain.init, jax.random.key(0), images), seed=0)

    def of(vae, x, method):
        return jax.jit(vae.apply, static_argnames="method")(params, x, method=method)

    latents, z = of(known, images, "encode"), of(plain, images, "moments")[0]
    np.testing.assert_allclose(latents, (z - np.array(mean)) * 0.5 / np.array(std), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of(known, latents, "decode"), of(plain, z, "decode_raw"), atol=1e-5)


def test_full_size():
    vae = AutoencoderKL(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
    flat = traverse_util.flatten_dict(convert.abstract_params(vae, jnp.zeros((1, 64, 64, 3))))
    assert sum(int(np.prod(leaf.shape)) for leaf in flat.values()) == 83_653_863
    assert len(flat) == 248
    shapes = {convert.torch_name(path): leaf.shape for path, leaf in flat.items()}
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["encoder.conv_out.weight"] == (3, 3, 512, 8)
    assert shapes["post_quant_conv.weight"] == (1, 1, 4, 4)
