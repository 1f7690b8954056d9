"""ImageReward against transformers' BLIP modules, renamed as in the published checkpoint; and its full size."""

import json
import re

import jax
import numpy as np
import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.formats import tokenizers
from diffexp_jax.models import blip
from diffexp_jax.rewards import imagereward, load_reward
from tests.support.reward_checks import assert_same_score_and_gradient, perturbed, torch_pixels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.blip.modeling_blip import BlipVisionModel  # noqa: E402
from transformers.models.blip.modeling_blip_text import BlipTextModel  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,.", "dog", "bike", "##s", "red"]
TEXTS = ["A dog, a red dogs bike", "red", "dog " * 60]
VISION = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, image_size=24)
VISION |= dict(patch_size=8, layer_norm_eps=1e-6)
TEXT = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3)
TEXT |= dict(max_position_embeddings=40, layer_norm_eps=1e-12)
FULL_VISION = VISION | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
FULL_VISION |= dict(image_size=224, patch_size=16)
FULL_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
FULL_TEXT |= dict(max_position_embeddings=512, layer_norm_eps=1e-12)

RENAMED = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("self_attn.projection", "attn.proj"),
    ("self_attn", "attn"),
    ("layer_norm", "norm"),
    ("post_layernorm", "norm"),
)


class Reference(torch.nn.Module):
    """ImageReward's forward pass out of transformers' parts."""

    def __init__(self, vision, text, head, vocab_size):
        super().__init__()
        ids = dict(bos_token_id=2, sep_token_id=3, pad_token_id=0, eos_token_id=3)
        config = transformers.BlipTextConfig(
            **text | ids, vocab_size=vocab_size, encoder_hidden_size=vision["hidden_size"]
        )
        self.image = BlipVisionModel(transformers.BlipVisionConfig(**vision))
        self.text = BlipTextModel(config, add_pooling_layer=False)
        widths = [text["hidden_size"], *head]
        linear = [torch.nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        drop = torch.nn.Dropout(0.2)
        self.head = torch.nn.Sequential(*linear[:1], drop, *linear[1:2], drop, *linear[2:3], drop, *linear[3:])

    def forward(self, pixels, ids):
        image = self.image(pixels).last_hidden_state
        out = self.text(
            ids,
            attention_mask=(ids != 0).long(),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
        )
        return self.head(out.last_hidden_state[:, 0])[:, 0]

    def tensors(self):
        """A state dict under the published names, with what it holds and scoring does not use."""
        out = {}
        for name, value in self.image.state_dict().items():
            for theirs, ours in RENAMED:
                name = re.sub(rf"^{theirs}\b|(?<=\.){theirs}(?=\.|\d)", ours, name)
            out[f"blip.visual_encoder.{name}"] = value
        out |= {f"blip.text_encoder.{name}": value for name, value in self.text.state_dict().items()}
        out |= {f"mlp.layers.{name}": value for name, value in self.head.state_dict().items()}
        out["blip.text_encoder.embeddings.position_ids"] = torch.arange(3)[None]
        out["blip.vision_proj.weight"] = out["blip.text_proj.bias"] = torch.zeros(2)
        return out


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return perturbed(Reference(VISION, TEXT, (10, 7, 6, 3, 1), len(WORDS) + 2))


@pytest.fixture
def folder(tmp_path, reference):
    torch.save(reference.tensors(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    med = TEXT | {"architectures": ["BertModel"], "vocab_size": len(WORDS) + 2, "encoder_width": 768}
    (tmp_path / "med_config.json").write_text(json.dumps(med))
    return tmp_path


@pytest.mark.parametrize("file", [pytest.param("ImageReward.pt", marks=pytest.mark.slow), ""])
def test_imagereward(reference, folder, file):
    images = np.random.default_rng(0).uniform(size=(3, 24, 24, 3)).astype(np.float32)
    raw, pixels = torch_pixels(images)
    reward = load_reward(f"imagereward:{folder / file}")
    ids = torch.tensor(reward.tokenize(TEXTS)).long()
    expected = (reference(pixels, ids) - imagereward.MEAN) / imagereward.STD
    assert_same_score_and_gradient(reward, images, TEXTS, raw, expected)


def test_tokenizer(folder):
    ids, cut = tokenizers.bert(folder)(["A Dog, [DEC] dogs [ENC]", "dog " * 60, ""])
    assert cut == ["dog " * 60]
    a, dog, s, comma = (WORDS.index(word) for word in ("a", "dog", "##s", ","))
    expected = [2, a, dog, comma, len(WORDS), dog, s, len(WORDS) + 1, 3]
    np.testing.assert_array_equal(ids[0], expected + [0] * (35 - len(expected)))
    np.testing.assert_array_equal(ids[1], [2] + [dog] * 33 + [3])  # cut
    np.testing.assert_array_equal(ids[2], [2, 3] + [0] * 33)


def test_padding_is_not_read(folder):
    reward = load_reward(f"imagereward:{folder}")
    images, ids = np.full((1, 24, 24, 3), 0.5, np.float32), reward.tokenize(["red"])
    long, short = (jax.jit(reward.score)(reward.params, images, x)[0] for x in (ids, ids[:, :3]))
    np.testing.assert_allclose(long, short, rtol=1e-5)


def test_files_that_do_not_fit(folder, reference):
    (folder / "med_config.json").unlink()
    with pytest.raises(InputError, match="ImageReward.pt: the tensors do not fit the config: .* missing"):
        load_reward(f"imagereward:{folder}")
    torch.save({"a": torch.zeros(1)}, folder / "ImageReward.pt")
    with pytest.raises(InputError, match="not an ImageReward checkpoint: the tensor 'blip.visual_encoder.patch"):
        load_reward(f"imagereward:{folder}")
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match="no BERT vocabulary; wants vocab.txt or tokenizer.json"):
        tokenizers.bert(folder)


# ------------------------------------------------------------------------------------------------------------ full size


def test_published_parameter_count():
    """All of ImageReward.pt but the contrastive projections, which scoring does not use."""
    unused = 1024 * 256 + 256 + 768 * 256 + 256
    count = sum(leaf.size for leaf in jax.tree.leaves(blip.abstract_params(blip.BLIPConfig())))
    assert count + unused == 446_665_953


@pytest.mark.slow
def test_full_size():
    """The whole network with random weights, to 1e-3."""
    torch.manual_seed(0)
    reference = Reference(FULL_VISION, FULL_TEXT, (1024, 128, 64, 16, 1), 30524).eval()
    tensors = {name: x.numpy() for name, x in reference.tensors().items() if not name.startswith(blip.UNUSED)}
    config = blip.config_of(tensors, {}, where="random")
    assert config == blip.BLIPConfig()
    params = blip.convert.from_torch(tensors, blip.abstract_params(config), where="random")
    ids, pixels = torch.randint(1, 30000, (2, 35)), torch.randn(2, 3, 224, 224)
    ids[:, 20:] = 0
    ours = jax.jit(blip.ImageReward(config).apply)({"params": params}, pixels.permute(0, 2, 3, 1).numpy(), ids.numpy())
    with torch.no_grad():
        theirs = reference(pixels, ids).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
