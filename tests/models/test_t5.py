"""T5's encoder against transformers, on a small random model, and T5's tokenizer on a small vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert, files
from diffexp_jax.formats.tokenizers import load_t5_tokenizer, load_tokenizer, token_ids
from diffexp_jax.models import t5
from diffexp_jax.prompts import PromptSet
from diffexp_jax.prompts.units import unit_ids
from tests.support.tiny import random_weights, write_t5_tokenizer

SIZES = {"vocab_size": 100, "d_model": 32, "d_kv": 6, "d_ff": 64, "num_layers": 3, "num_heads": 4}
CONFIG = SIZES | {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 40}
IDS = np.random.default_rng(0).integers(0, 100, (2, 150)).astype(np.int32)  # longer than the farthest distance
READ = np.arange(150) < np.array([[9], [150]])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model, and what it saved."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return torch, model, files.open_weights(folder)


@pytest.mark.parametrize("masked", [False, True])
def test_parity(theirs, masked):
    torch, model, tensors = theirs
    ours = t5.T5Encoder(t5.T5Config.from_dict(CONFIG))
    params = convert.from_torch(t5.canonical_names(tensors), convert.abstract_params(ours, IDS), where="t5")
    out = jax.jit(ours.apply)({"params": params}, IDS, READ if masked else None)
    with torch.no_grad():
        of_theirs = model.double()(torch.tensor(IDS), attention_mask=torch.tensor(READ) if masked else None)[0].numpy()
    rows = READ if masked else np.ones_like(READ)
    np.testing.assert_allclose(out[rows], of_theirs[rows], rtol=0, atol=1e-5 * np.abs(of_theirs).max())


@pytest.mark.parametrize("said, length", [({}, 256), ({"n_positions": 512}, 256), ({"n_positions": 12}, 12)])
def test_length_of_a_prompt(said, length):
    """The pipeline's, 256, or the config's where that is less."""
    assert t5.T5Config.from_dict(CONFIG | said).prompt_length(256) == length


def test_distances():
    """Of 8 buckets, four for keys before the query and itself: 0, 1, 2 to 5, farther; transformers' for 512 tokens."""
    buckets = t5.distance_buckets(9, n_buckets=8, max_distance=16)
    assert buckets[8].tolist() == [3, 3, 3, 2, 2, 2, 2, 1, 0] and buckets[0].tolist() == [0, 5, 6, 6, 6, 6, 7, 7, 7]
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    want = T5Attention._relative_position_bucket(offset, True, 32, 128)
    np.testing.assert_array_equal(t5.distance_buckets(512, n_buckets=32, max_distance=128), want.numpy())


def test_bfloat16():
    """The sum of the blocks' outputs stays in float32: large numbers do not swallow the blocks' own."""
    config = t5.T5Config(**SIZES)
    params = random_weights(convert.abstract_params(t5.T5Encoder(config), IDS), seed=0)
    short, exact = (
        jax.jit(t5.T5Encoder(config, dtype).apply)({"params": params}, IDS) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert short.dtype == jnp.bfloat16
    assert np.abs(short.astype(jnp.float32) - exact).mean() < 0.02 * np.abs(exact).mean()


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_names(names):
    tensors = {f"{name}.weight": np.zeros(1) for name in [*names, "encoder.final_layer_norm", "decoder.x", "lm_head"]}
    assert list(t5.canonical_names(tensors)) == ["shared.weight", "encoder.final_layer_norm.weight"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"feed_forward_proj": None}, "^x: feed_forward_proj is missing; wants 'gated-gelu'"),
        ({"feed_forward_proj": "relu"}, "^x: feed_forward_proj='relu'; accepted: gated-gelu"),
        ({"relative_attention_max_distance": 8}, "^x: relative_attention_max_distance=8; accepted: more than 8"),
    ],
)
def test_another_t5(changes, says):
    with pytest.raises(InputError, match=says):
        t5.T5Config.from_dict(CONFIG | changes, "x")


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer(tmp_path):
    write_t5_tokenizer(tmp_path)
    tokenizer = load_t5_tokenizer(tmp_path, size=99, length=8)
    texts = ["", "a dog riding", "dog " * 7, "dog " * 8, "a™a a"]  # the last is read as "aTMa a"
    ids, cut = token_ids(tokenizer, texts)
    read = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert read[0] == ["</s>", *["<pad>"] * 7]
    assert read[1] == ["▁", "a", "▁dog", "▁rid", "ing", "</s>", "<pad>", "<pad>"]
    assert read[2] == ["▁dog"] * 7 + ["</s>"] == read[3]
    assert cut == [texts[3]]


def test_units_of_two_tokenizers(tmp_path):
    """CLIP's and T5's tokens of a word are one unit, however many there are of it."""
    write_tokenizer(tmp_path / "clip")
    write_t5_tokenizer(tmp_path / "t5")
    both = [load_tokenizer(tmp_path / "clip"), load_t5_tokenizer(tmp_path / "t5", size=99, length=9)]
    text = "a dog riding a bike"
    (row,) = unit_ids(both, PromptSet("test", (text,), (("dog", "bike"),)), "word")
    assert row[:7].tolist() == [0, 1, 2, 3, 4, 5, 0] and not row[7:32].any()
    assert row[32:].tolist() == [1, 1, 2, 3, 3, 4, 4, 5, 0]


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda path: path.unlink(), "no tokenizer.json; wants T5's tokenizer"),
        (lambda path: path.write_text("{"), "tokenizer.json: not readable as json"),
        (lambda path: path.write_text("{}"), "tokenizer.json: the tokenizer's files are not readable"),
        (lambda path: None, "has the id 11, and the network knows 0 to 9"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, damage, says):
    write_t5_tokenizer(tmp_path)
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=says) as error:
        load_t5_tokenizer(tmp_path, size=10, length=8)
    assert "\n" not in str(error.value)
