"""The CLIP networks against transformers, on small random models of odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models import clip, clip_files
from tests.support.tiny import random_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=11,
    projection_dim=14,
    layer_norm_eps=1e-4,
)
VISION = dict(
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=21,
    patch_size=7,
    projection_dim=14,
)
# A prompt padded with its end-of-text token (36, also the highest id), and one without padding.
IDS = jnp.array([[35, 4, 9, 36, 36, 36, 36], [35, 1, 2, 3, 4, 5, 36]])
PIXELS = jax.random.normal(jax.random.key(0), (3, 21, 21, 3))


def assert_close(ours, theirs):
    """Largest error at most 1e-4 of the largest value."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


def saved(model, folder):
    """Gives every tensor of a random model a size that matters, saves it, and reads back its tensors."""
    with torch.no_grad():
        for i, (_, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter += 0.2 * noise
    model.eval().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(module, tensors, *inputs):
    shapes = convert.abstract_params(module, *inputs)
    return {"params": convert.from_torch(clip_files.canonical_text_names(tensors), shapes, where="test")}


@pytest.mark.parametrize(
    "eos_token_id, act",
    [
        (2, "quick_gelu"),
        (36, "gelu"),
        (5, "quick_gelu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "gelu"), (36, "quick_gelu"), (5, "gelu"))),
    ],
)
def test_text_encoder(tmp_path, act, eos_token_id):
    config = transformers.CLIPTextConfig(**TEXT, hidden_act=act, eos_token_id=eos_token_id)
    reference = transformers.CLIPTextModel(config)
    tensors = saved(reference, tmp_path)
    module = clip.TextTransformer(clip.CLIPTextConfig.from_dict(config.to_dict()))
    out = jax.jit(module.apply)(loaded(module, tensors, IDS), IDS)
    with torch.no_grad():
        expected = reference(torch.tensor(np.asarray(IDS)), output_hidden_states=True)
    assert_close(out.last_hidden_state, expected.last_hidden_state)
    assert_close(out.penultimate, expected.hidden_states[-2])
    assert_close(out.pooled, expected.pooler_output)


@pytest.mark.parametrize("eos_token_id, positions", [(2, [3, 2]), (7, [1, 0]), (9, [3, 2])])
def test_eot_positions(eos_token_id, positions):
    """Legacy 2: the highest id. Else: the first that is equal (ids that were added later may be higher)."""
    ids = jnp.array([[2, 7, 2, 9, 9], [7, 2, 9, 0, 0]])
    np.testing.assert_array_equal(clip.eot_positions(ids, eos_token_id), positions)


def test_text_encoder_with_projection(tmp_path):
    config = transformers.CLIPTextConfig(**TEXT, hidden_act="gelu", eos_token_id=2)
    reference = transformers.CLIPTextModelWithProjection(config)
    tensors = saved(reference, tmp_path)
    module = clip.TextTransformerWithProjection(clip.CLIPTextConfig.from_dict(config.to_dict()))
    out = jax.jit(module.apply)(loaded(module, tensors, IDS), IDS)
    with torch.no_grad():
        expected = reference(torch.tensor(np.asarray(IDS)), output_hidden_states=True)
    assert_close(out.penultimate, expected.hidden_states[-2])
    assert_close(out.pooled, expected.text_embeds)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_model(tmp_path, act):
    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": act, "eos_token_id": 36},
        vision_config=VISION | {"hidden_act": act},
        projection_dim=14,
    )
    reference = transformers.CLIPModel(config)
    saved(reference, tmp_path)
    module, params = clip_files.load(tmp_path)
    text, image, scale = jax.jit(module.apply)({"params": params}, IDS, PIXELS)
    nchw = torch.tensor(np.asarray(PIXELS).transpose(0, 3, 1, 2))
    with torch.no_grad():
        assert_close(text, reference.get_text_features(torch.tensor(np.asarray(IDS))).pooler_output)
        assert_close(image, reference.get_image_features(nchw).pooler_output)
        assert_close(scale, reference.logit_scale.exp())


def test_vision_tower(tmp_path):
    config = transformers.CLIPVisionConfig(**VISION, hidden_act="gelu", layer_norm_eps=1e-4)
    reference = transformers.CLIPVisionModel(config)
    tensors = saved(reference, tmp_path)
    module = clip.VisionTransformer(clip.CLIPVisionConfig.from_dict(config.to_dict()))
    out = jax.jit(module.apply)(loaded(module, tensors, PIXELS), PIXELS)
    with torch.no_grad():
        assert_close(out, reference(torch.tensor(np.asarray(PIXELS).transpose(0, 3, 1, 2))).pooler_output)


def test_padding_does_not_reach_the_pooled_token():
    module = clip.TextTransformer(clip.CLIPTextConfig.from_dict(TEXT | {"eos_token_id": 36}))
    params = random_weights(jax.eval_shape(module.init, jax.random.key(0), IDS), seed=0)
    long, short = (jax.jit(module.apply)(params, ids).pooled for ids in (IDS[:1], IDS[:1, :4]))
    np.testing.assert_allclose(long, short, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_features():
    module = clip.CLIP(clip.CLIPConfig.from_dict({"text_config": TEXT, "vision_config": VISION}), jnp.bfloat16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, PIXELS)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = random_weights(shapes, seed=0)
    features, exact = (
        jax.jit(module.clone(dtype=dtype).apply, static_argnames="method")(params, PIXELS, method="embed_image")
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, exact, atol=0.03 * np.abs(exact).max())


def test_names_of_older_files():
    value = np.zeros(1)
    old = ["text_model.embeddings.position_ids", "text_model.final_layer_norm.bias"]
    whole = ["text_model.final_layer_norm.bias", "vision_model.embeddings.position_ids", "text_projection.weight"]
    for names, expected in [
        (old, ["final_layer_norm.bias"]),
        (whole, ["text_model.final_layer_norm.bias", "text_projection.weight"]),
        (["final_layer_norm.bias"], ["final_layer_norm.bias"]),
    ]:
        renamed = clip_files.canonical_text_names(dict.fromkeys(names, value))
        assert list(renamed) == expected
        assert all(renamed[name] is value for name in expected)


def test_defaults_are_those_of_transformers():
    """Files that transformers writes may leave out what is at its default."""
    config = clip.CLIPConfig.from_dict({})
    for ours, theirs in (
        (config.text, transformers.CLIPTextConfig()),
        (config.vision, transformers.CLIPVisionConfig()),
    ):
        assert {f: getattr(theirs, f) for f in ours.__dataclass_fields__} == vars(ours)
    assert config.projection_dim == transformers.CLIPConfig().projection_dim


def test_unknown_activation():
    with pytest.raises(InputError, match="hidden_act='gelu_new'; accepted: quick_gelu, gelu"):
        clip.CLIPTextConfig.from_dict({"hidden_act": "gelu_new"})
