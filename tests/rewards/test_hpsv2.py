"""HPSv2 against open_clip: the checkpoint's format, the tokenizer, and the scores; and the full-size towers."""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, tokenizers
from diffexp_jax.models import clip, clip_files, open_clip
from diffexp_jax.rewards import load_reward, preprocess
from tests.support.reward_checks import assert_same_score_and_gradient, perturbed

torch = pytest.importorskip("torch")

SIZES = {
    "embed_dim": 14,
    "vision_cfg": {"image_size": 21, "layers": 2, "width": 20, "head_width": 10, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2},
}
TEXTS = ["a dog riding a bike", "“It’s” an ant &amp; a bee", "A red car!"]


def anything(name):
    """An attribute of a module that is not there."""
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock()


@pytest.fixture(scope="module")
def original():
    """open_clip; it imports torchvision, of which nothing that is tested here needs more than names."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip_torch is not installed")
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
    stubs = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for stub in stubs.values():
        stub.__path__, stub.__getattr__ = [], anything
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        yield importlib.import_module("open_clip")


def build(original, sizes):
    import open_clip.model as classes

    vision, text = classes.CLIPVisionCfg(**sizes["vision_cfg"]), classes.CLIPTextCfg(**sizes["text_cfg"])
    return classes.CLIP(sizes["embed_dim"], vision, text, quick_gelu=sizes.get("quick_gelu", False))


def vocabulary(original) -> Path:
    return Path(original.__file__).parent / tokenizers.OPEN_CLIP_VOCABULARY


@pytest.fixture(scope="module")
def model(original):
    torch.manual_seed(0)
    return perturbed(build(original, SIZES))


@pytest.fixture
def folder(tmp_path, original):
    (tmp_path / tokenizers.OPEN_CLIP_VOCABULARY).symlink_to(vocabulary(original))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES}))
    return tmp_path


@pytest.mark.parametrize("height, width", [pytest.param(21, 21, marks=pytest.mark.slow), (30, 47)])
@pytest.mark.parametrize("file", ["HPS.pt", pytest.param("HPS.safetensors", marks=pytest.mark.slow)])
def test_hpsv2(original, model, folder, height, width, file):
    if file == "HPS.pt":
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / file)
    else:
        save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / file)
    images = np.random.default_rng(0).uniform(size=(3, height, width, 3)).astype(np.float32)
    raw = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    h, w = round(21 * height / max(height, width)), round(21 * width / max(height, width))
    padded = torch.zeros(3, 3, 21, 21)
    top, left = (21 - h) // 2, (21 - w) // 2
    small = torch.nn.functional.interpolate(raw, size=(h, w), mode="bicubic", antialias=True)
    padded[:, :, top : top + h, left : left + w] = small if (h, w) != (height, width) else raw
    mean, std = (torch.tensor(x)[:, None, None] for x in (preprocess.CLIP_MEAN, preprocess.CLIP_STD))
    tokens = original.tokenizer.SimpleTokenizer()(TEXTS)
    features = (
        model.encode_image((padded - mean) / std, normalize=True) * model.encode_text(tokens, normalize=True)
    ).sum(-1)
    reward = load_reward(f"hpsv2:{folder / file if width == 21 else folder}")
    assert_same_score_and_gradient(reward, images, TEXTS, raw, features)


def test_quick_gelu_and_bin(original, tmp_path):
    torch.manual_seed(1)
    sizes = SIZES | {"quick_gelu": True}
    reference = perturbed(build(original, sizes))
    torch.save(reference.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    module, params = open_clip.load(tmp_path / "open_clip_pytorch_model.bin")
    ids = original.tokenizer.SimpleTokenizer()(TEXTS)
    pixels = torch.randn(2, 3, 21, 21)
    text, image, scale = jax.jit(module.apply)({"params": params}, ids.numpy(), pixels.permute(0, 2, 3, 1).numpy())
    for ours, theirs in ((text, reference.encode_text(ids)), (image, reference.encode_image(pixels))):
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(scale, reference.logit_scale.exp().item(), rtol=1e-6)


AWKWARD = [
    "“It’s a dog’s life”  &amp;amp; more",
    "",
    "A café naïve ﬁne Ünïcödé ÅÄÖ ß",
    "  spaces \n\t tab",
    "emoji 🐶🏽 x",
    "don't we'll I'd they've",
    "x" * 400,
    "word " * 100,
    "12345 3.14!!! ???",
    "<b>html</b> &lt;i&gt;",
    "日本語 テキスト",
    "schÃ¶n",
    "a_b-c/d\\e «quotes» …",
]


def test_tokenizer(original, tmp_path):
    expected = original.tokenizer.SimpleTokenizer()(AWKWARD).numpy()
    (tmp_path / tokenizers.OPEN_CLIP_VOCABULARY).symlink_to(vocabulary(original))
    ids, cut = tokenizers.open_clip(tmp_path)(AWKWARD)
    np.testing.assert_array_equal(ids, expected)
    assert cut == ["x" * 400, "word " * 100]
    short, cut = tokenizers.open_clip(tmp_path, length=9)(["a dog"])
    np.testing.assert_array_equal(short, expected[:1, :9] * 0 + AN_IDS)
    assert cut == []


AN_IDS = [49406, 320, 1929, 49407, 0, 0, 0, 0, 0]  # "a dog", padded with 0


def test_clean():
    assert tokenizers.clean(" “It’s” A\nCAFÉ &amp;amp; ") == '"it\'s" a café &'


def test_names_that_do_not_fit(model, folder):
    tensors = dict(model.state_dict())
    tensors["visual.extra"] = tensors.pop("ln_final.bias")
    torch.save(tensors, folder / "HPS.pt")
    with pytest.raises(InputError) as error:
        load_reward(f"hpsv2:{folder}")
    assert "1 missing (text_model.final_layer_norm.bias)" in str(error.value)
    assert "1 unexpected (visual.extra)" in str(error.value)


def test_a_folder_without_the_rest(model, tmp_path):
    with pytest.raises(InputError, match="wants one file ending in .pt, .* found none"):
        load_reward(f"hpsv2:{tmp_path}")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 14}}')
    with pytest.raises(InputError, match="model_cfg has no 'vision_cfg'"):
        load_reward(f"hpsv2:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIZES}))
    with pytest.raises(InputError, match="no CLIP vocabulary; wants vocab.json and merges.txt, or bpe_simple"):
        load_reward(f"hpsv2:{tmp_path}")
    (tmp_path / "b.pt").touch()
    with pytest.raises(InputError, match="found a.pt, b.pt"):
        load_reward(f"hpsv2:{tmp_path}")


# ------------------------------------------------------------------------------------------------------------ full size

L_14 = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    "quick_gelu": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes, count", [(L_14, 427_616_513), (open_clip.VIT_H_14, 986_109_441)])
def test_published_parameter_counts(sizes, count):
    config = open_clip.config_of(sizes)
    pixels = jnp.zeros((1, 224, 224, 3))
    shapes = convert.abstract_params(clip.CLIP(config), jnp.zeros((1, 4), jnp.int32), pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [L_14, open_clip.VIT_H_14])
def test_full_size(original, sizes):
    """Both towers with random weights, to 1e-3 of the largest feature."""
    torch.manual_seed(0)
    reference = build(original, sizes).eval()
    tensors = open_clip.as_transformers({name: x.numpy() for name, x in reference.state_dict().items()})
    module, params = clip_files.from_tensors(open_clip.config_of(sizes), tensors, where="random")
    ids, pixels = original.tokenizer.SimpleTokenizer()(TEXTS[:1]), torch.randn(1, 3, 224, 224)
    text, image, _ = jax.jit(module.apply)({"params": params}, ids.numpy(), pixels.permute(0, 2, 3, 1).numpy())
    with torch.no_grad():
        for ours, theirs in ((text, reference.encode_text(ids)), (image, reference.encode_image(pixels))):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3 * theirs.abs().max().item())
