"""The rewards: scores and gradients against torch, preprocessing, and what is said about bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.numpy import save_file

from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS
from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.errors import InputError
from diffexp_jax.formats import convert
from diffexp_jax.models.classifier import Classifier, ClassifierConfig
from diffexp_jax.rewards import BUILTINS, aesthetic, judge, load_reward, preprocess
from diffexp_jax.rewards.preprocess import floor_half, official_crop
from diffexp_jax.rewards.scoring import make_embedder, make_scorer
from tests.support.reward_checks import assert_same_score_and_gradient, perturbed, torch_pixels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEAR = "did you mean 'pickscore' or 'emoji_pickscore'?"
ACCEPTED = (
    f"accepted: {', '.join(BUILTINS)}, each also as NAME:PATH or "
    "textnorm(NAME:PATH), several joined by +; jax:MODULE:FUNCTION, python:MODULE:FUNCTION"
)
SIZE, WIDTH = 24, 12  # pixels of the tower's side, width of its embedding
TEXTS = ["a dog riding a bike", "an ant", "A red car!"]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(3, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small random CLIPModel with the emoji world's tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    sizes = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    sizes["projection_dim"] = WIDTH
    ids = dict(eos_token_id=len(vocab) - 1, vocab_size=len(vocab), max_position_embeddings=32)
    config = transformers.CLIPConfig(
        text_config=sizes | ids,
        vision_config=sizes | dict(image_size=SIZE, patch_size=8),
        projection_dim=WIDTH,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head():
    """The published layout at other widths, in torch's axis order."""
    widths, rng = (WIDTH, 10, 7, 6, 3, 1), np.random.default_rng(1)
    tensors = {}
    for i, before, after in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        tensors[f"layers.{i}.weight"] = rng.normal(size=(after, before)).astype(np.float32)
        tensors[f"layers.{i}.bias"] = rng.normal(size=after).astype(np.float32)
    return tensors


@pytest.fixture
def aesthetic_folder(tmp_path, clip_folder, head):
    save_file(head, tmp_path / "model.safetensors")
    (tmp_path / "clip").symlink_to(clip_folder)
    return tmp_path


@pytest.mark.parametrize("name", ["pickscore", "emoji_pickscore"])
def test_pickscore(clip_folder, images, name):
    reference = transformers.CLIPModel.from_pretrained(clip_folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(clip_folder)(TEXTS, padding=True, return_tensors="pt")
    raw, pixels = torch_pixels(images)
    logits = reference(pixel_values=pixels, **tokens).logits_per_image
    reward = load_reward(f"{name}:{clip_folder}")
    assert_same_score_and_gradient(reward, images, TEXTS, raw, logits.diagonal())


@pytest.mark.parametrize(
    "spec",
    [
        "pickscore:{clip}",
        pytest.param("textnorm(clip_similarity:{clip})", marks=pytest.mark.slow),
        pytest.param("aesthetic:{aesthetic}", marks=pytest.mark.slow),
        "emoji_judge+aesthetic:{aesthetic}+pickscore:{clip}",
    ],
)
def test_image_features(clip_folder, aesthetic_folder, images, spec):
    """CLIP's, as transformers embeds the same pixels; of a sum those of the first part that has some."""
    reward = load_reward(spec.format(clip=clip_folder, aesthetic=aesthetic_folder))
    pictures = (images * 255).astype(np.uint8)
    ours = make_embedder(reward, batch=2)(pictures)
    prepared = np.stack([official_crop(image, SIZE, floor_half) for image in pictures])
    with torch.no_grad():
        pixels = torch.tensor(prepared).permute(0, 3, 1, 2)
        model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
        want = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).numpy()
    assert ours.shape == (3, WIDTH)
    np.testing.assert_allclose(ours, want, atol=1e-5)
    # of images that need no resizing the training path reads the same
    np.testing.assert_allclose(reward.features(reward.params, pictures.astype(np.float32) / 255), want, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["pickscore:{clip}", "textnorm(clip_similarity:{clip})", "emoji_judge+pickscore:{clip}"]
)
def test_text_features(clip_folder, spec):
    """CLIP's, as transformers embeds the same prompts; of a sum those of the part whose image features are read."""
    reward = load_reward(spec.format(clip=clip_folder))
    texts = ["a dog riding a bike", "a cat washing the dishes"]
    ours = reward.text_features(reward.params, reward.tokenize(texts))
    ids = transformers.CLIPTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
        want = model.text_projection(model.text_model(**ids).pooler_output).numpy()
    np.testing.assert_allclose(ours, want, atol=1e-5)


def test_rewards_without_image_features():
    for reward in map(load_reward, ("emoji_judge", "jpeg_compressibility")):
        assert reward.embed is None and reward.features is None and reward.text_features is None


def test_aesthetic_reads_no_text():
    reward = load_reward("emoji_aesthetic+emoji_pickscore")
    assert reward.features and reward.text_features is None  # those of the first part are read, which reads no prompts


@pytest.mark.parametrize(
    "name, factor", [("pickscore_26", 1 / 26), pytest.param("pickscore_cosine", None, marks=pytest.mark.slow)]
)
def test_pickscore_as_others_report_it(clip_folder, images, name, factor):
    logit, other = load_reward(f"pickscore:{clip_folder}"), load_reward(f"{name}:{clip_folder}")
    scale = np.exp(logit.params["logit_scale"])
    scores = [jax.jit(r.score)(r.params, images, r.tokenize(TEXTS))[0] for r in (logit, other)]
    np.testing.assert_allclose(scores[1], scores[0] * (factor or 1 / scale), rtol=1e-5)


def test_clip_similarity(clip_folder, images):
    """The cosine of transformers' own embeddings."""
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    reward = load_reward(f"clip_similarity:{clip_folder}")
    prepared = [reward.prepare((image * 255).astype(np.uint8)) for image in images]
    tokens = reward.tokenize(TEXTS)
    ours, parts = jax.jit(reward.score_prepared)(reward.params, np.stack(prepared), tokens)
    with torch.no_grad():
        pixels = torch.tensor(np.stack(prepared)).permute(0, 3, 1, 2)
        out = model(pixel_values=pixels, input_ids=torch.tensor(tokens, dtype=torch.long))
        want = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    np.testing.assert_allclose(ours, want.numpy(), atol=1e-5)
    assert parts == {} and np.abs(ours).max() < 1


def test_pickscore_tells_prompts_apart(clip_folder, images):
    reward = load_reward(f"pickscore:{clip_folder}")
    first = np.repeat(images[:1], 3, axis=0)
    scores, _ = jax.jit(reward.score)(reward.params, first, reward.tokenize(TEXTS))
    assert len(set(np.asarray(scores).round(4).tolist())) == 3


def test_bfloat16_is_near_float32(clip_folder, images):
    exact, coarse = (load_reward(f"pickscore:{clip_folder}", dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    tokens = exact.tokenize(TEXTS)
    scores, near = (jax.jit(r.score)(r.params, images, tokens)[0] for r in (exact, coarse))
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, scores, atol=0.03 * float(np.exp(exact.params["logit_scale"])))


def test_aesthetic(aesthetic_folder, clip_folder, head, images):
    reference = transformers.CLIPModel.from_pretrained(clip_folder)
    raw, pixels = torch_pixels(images)
    x = torch.nn.functional.normalize(reference.get_image_features(pixels).pooler_output, dim=-1)
    for i in (0, 2, 4, 6, 7):
        x = x @ torch.tensor(head[f"layers.{i}.weight"]).T + torch.tensor(head[f"layers.{i}.bias"])
    reward = load_reward(f"aesthetic:{aesthetic_folder}")
    assert "text_model" not in reward.params["clip"]
    assert_same_score_and_gradient(reward, images, TEXTS, raw, x[:, 0])


def test_head_layout():
    """Each layer's place in the chain, by known numbers: (3/5, 4/5) -> 5 -> 5, 0 -> 15 -> 16 -> 32."""
    kernels = ([[3.0], [5.25]], [[1.0, 0.0]], [[3.0], [1.0]], [[1.0]], [[2.0]])
    biases = ([-1.0], [0.0, 0.0], [0.0], [1.0], [0.0])
    params = {
        name: {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}
        for name, kernel, bias in zip(aesthetic.LAYERS, kernels, biases, strict=True)
    }
    np.testing.assert_allclose(aesthetic.rating(params, jnp.array([[3.0, 4.0], [0.3, 0.4]])), [32, 32], rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.4.bias": None}, "1 missing (layers.4.bias)"),
        ({"layers.1.bias": np.zeros(3, np.float32)}, "1 unexpected (layers.1.bias)"),
        (
            {"layers.2.weight": np.zeros((7, 9), np.float32)},
            "layers.2.weight is (7, 9), the config wants (7, 10)",
        ),
    ],
)
def test_heads_that_do_not_fit(aesthetic_folder, head, change, message):
    tensors = {name: value for name, value in (head | change).items() if value is not None}
    save_file(tensors, aesthetic_folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_reward(f"aesthetic:{aesthetic_folder}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def as_torch(head):
    return {name: torch.tensor(value) for name, value in head.items()}


@pytest.mark.parametrize("where", ["beside clip/", "in CLIP's folder", "the file"])
def test_aesthetic_head_as_published(tmp_path, clip_folder, head, images, where):
    """LAION's .pth, a pickle, gives what the same tensors as safetensors give."""
    save_file(head, tmp_path / "model.safetensors")
    plain = aesthetic.load(tmp_path, clip_folder=clip_folder)
    folder = tmp_path / "sac+logos"  # a path with a "+"
    folder.mkdir()
    if where == "in CLIP's folder":
        for path in clip_folder.iterdir():
            (folder / path.name).symlink_to(path)
    else:
        (folder / "clip").symlink_to(clip_folder)
    torch.save(as_torch(head), folder / "sac+logos+ava1-l14-linearMSE.pth")
    path = folder / "sac+logos+ava1-l14-linearMSE.pth" if where == "the file" else folder
    reward = load_reward(f"aesthetic:{path}")
    tokens = reward.tokenize(TEXTS)
    scores = [jax.jit(r.score)(r.params, images, tokens)[0] for r in (plain, reward)]
    np.testing.assert_array_equal(*scores)


class Predictor(transformers.CLIPVisionModelWithProjection):
    """The layout of the aesthetic predictors in transformers' format: a CLIP image tower and a head in one."""

    def __init__(self, config):
        super().__init__(config)
        linear = [torch.nn.Linear(a, b) for a, b in zip((WIDTH, 10, 7, 6, 3), (10, 7, 6, 3, 1), strict=True)]
        drop = torch.nn.Dropout(0.2)
        self.layers = torch.nn.Sequential(*linear[:1], drop, *linear[1:2], drop, *linear[2:3], drop, *linear[3:])
        self.post_init()


@pytest.mark.parametrize("pickled", [False, True])
def test_aesthetic_predictor_in_transformers_format(tmp_path, images, pickled):
    sizes = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=8, projection_dim=WIDTH)
    torch.manual_seed(0)
    reference = perturbed(Predictor(config))
    reference.save_pretrained(tmp_path)
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    raw, pixels = torch_pixels(images)
    features = reference.get_submodule("")(pixel_values=pixels).image_embeds
    expected = reference.layers(features / features.norm(dim=-1, keepdim=True))[:, 0]
    assert_same_score_and_gradient(load_reward(f"aesthetic:{tmp_path}"), images, TEXTS, raw, expected)


# -------------------------------------------------------------------------------------------------------- preprocessing

BOXES = [(600, 512), (512, 512), (224, 224), (300, 451), (227, 500), (97, 130), (64, 64)]  # height, width


def photograph(height, width):
    """A piece of a real photograph, at a size of its own."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        w, h = image.size
        scale = min(w / width, h / height)
        box = image.crop((0, 0, int(width * scale), int(height * scale)))
        return np.asarray(box.resize((width, height), Image.Resampling.LANCZOS).convert("RGB"))


def bytes_of(pixels):
    return (pixels * np.array(preprocess.CLIP_STD) + np.array(preprocess.CLIP_MEAN)) * 255


@pytest.mark.parametrize("height, width", BOXES)
def test_the_two_paths_are_near(height, width):
    """On a photograph: mean difference at most 1/255 of the range; that of HPSv2 is only rounding."""
    image = photograph(height, width)
    floats = jnp.array(image[None] / np.float32(255))
    for start in (preprocess.floor_half, preprocess.round_half):
        ours = preprocess.clip_pixels(floats, 224, start)[0]
        theirs = preprocess.official_crop(image, 224, start)
        assert np.abs(bytes_of(ours) - bytes_of(theirs)).mean() <= 1
    ours = preprocess.normalise(preprocess.resize_and_pad(floats, 224))[0]
    np.testing.assert_allclose(ours, preprocess.official_pad(image, 224), atol=1e-4)


@pytest.mark.parametrize("height, width", BOXES)
def test_official_crop_is_transformers(height, width):
    image = photograph(height, width)
    reference = transformers.CLIPImageProcessorPil(do_convert_rgb=True)
    theirs = reference(Image.fromarray(image), return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(preprocess.official_crop(image, 224, preprocess.floor_half), theirs, atol=1e-5)


@pytest.mark.parametrize("height, width", BOXES)
def test_official_pad_is_torchs(height, width):
    """The float tensor's antialiased bicubic, black around it before the normalisation."""
    image = photograph(height, width)
    h, w = (round(side * 224 / max(height, width)) for side in (height, width))
    tensor = torch.tensor(image).permute(2, 0, 1)[None] / 255
    resized = torch.nn.functional.interpolate(tensor, size=(h, w), mode="bicubic", antialias=True)
    before = ((224 - w) // 2, (224 - h) // 2)
    padded = torch.nn.functional.pad(resized, (before[0], 224 - w - before[0], before[1], 224 - h - before[1]))
    theirs = preprocess.normalise(padded[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(preprocess.official_pad(image, 224), theirs, atol=1e-4)


@pytest.mark.slow
def test_how_far_the_two_paths_scores_are_apart(capsys):
    """Of pieces of a photograph, of many sizes: at most 0.5 % of the scores' spread on average."""
    rng, images = np.random.default_rng(0), []
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as photo:
        for _ in range(16):
            width, height = rng.integers(150, 400, 2)
            left, top = rng.integers(photo.width - width), rng.integers(photo.height - height)
            images.append(np.asarray(photo.crop((left, top, left + width, top + height)).convert("RGB")))
    texts, apart = [f"a {animal}" for animal in ANIMALS[:16]], {}
    for name in ("emoji_pickscore", "emoji_aesthetic"):
        reward = load_reward(name)
        tokens = reward.tokenize(texts)
        official = make_scorer(reward, batch=16)(images, tokens)[""]
        ours = [
            reward.score(reward.params, jnp.asarray(image[None] / np.float32(255)), token[None])[0][0]
            for image, token in zip(images, tokens, strict=True)
        ]
        apart[name] = float(np.abs(official - np.array(ours)).mean() / official.std())
    with capsys.disabled():
        print({name: f"{100 * share:.2f} % of the spread" for name, share in apart.items()})
    assert max(apart.values()) <= 0.005, apart


@pytest.mark.parametrize("spare, floor, nearest", [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2), (5, 2, 2), (7, 3, 4)])
def test_where_a_crop_begins(spare, floor, nearest):
    assert (preprocess.floor_half(spare), preprocess.round_half(spare)) == (floor, nearest)


def test_official_scores(clip_folder, aesthetic_folder):
    """In batches, of pictures of different sizes, one by one the same; near the differentiable path's."""
    images = [photograph(*box) for box in ((60, 51), (24, 24), (30, 45))]
    reward = load_reward(f"pickscore:{clip_folder}+aesthetic:{aesthetic_folder}")
    scorer = make_scorer(reward, batch=2)
    scores = scorer(images, reward.tokenize(TEXTS))
    assert scores.keys() == {"", "pickscore", "aesthetic"}
    np.testing.assert_allclose(scorer(images[2:], reward.tokenize(TEXTS[2:]))[""], scores[""][2:], rtol=1e-5)
    total, parts = jax.jit(reward.score)(reward.params, images[0][None] / np.float32(255), reward.tokenize(TEXTS[:1]))
    np.testing.assert_allclose(scores[""][0], total[0], rtol=0.05)
    np.testing.assert_allclose(scores["aesthetic"][0], parts["aesthetic"][0], rtol=0.05)


@pytest.mark.parametrize("height, width", [(24, 24), (50, 37), (37, 50), (24, 31), (17, 20), (96, 96)])
def test_resize_is_torchs_antialiased_bicubic(height, width):
    images = np.random.default_rng(2).uniform(size=(2, height, width, 3)).astype(np.float32)
    shortest = min(height, width)
    size = (SIZE * height // shortest, SIZE * width // shortest)
    resized = torch.nn.functional.interpolate(
        torch.tensor(images.transpose(0, 3, 1, 2)), size=size, mode="bicubic", antialias=True
    ).numpy()
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    expected = resized[:, :, top : top + SIZE, left : left + SIZE].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess.resize_and_crop(jnp.array(images), SIZE), expected, atol=3e-6)


def test_right_size_is_left_alone(images):
    np.testing.assert_array_equal(preprocess.resize_and_crop(jnp.array(images), SIZE), images)


def test_crop_is_the_centre():
    images = jnp.broadcast_to(jnp.arange(10.0)[None, None, :, None] / 10, (1, 4, 10, 3))
    np.testing.assert_allclose(preprocess.resize_and_crop(images, 4)[0, 0, :, 0], [0.3, 0.4, 0.5, 0.6], atol=1e-6)


def test_normalise():
    """Black and white by OpenAI's statistics, and clip_pixels as the same after a resize."""
    grey = jnp.array([0.0, 1.0])[:, None, None, None] * jnp.ones((2, 30, 30, 3))
    expected = [[-1.79226253, -1.75209713, -1.48021977], [1.93033625, 2.07488384, 2.14589670]]
    pixels = preprocess.clip_pixels(grey, SIZE)
    np.testing.assert_allclose(pixels, np.broadcast_to(np.array(expected)[:, None, None], pixels.shape), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    "text, animal, obj",
    [
        ("a cat", "cat", 0),
        ("ant", "ant", 0),
        ("A photo of a Dog.", "dog", 0),
        ("an ant washing the dishes", "ant", 1),
        ("a kangaroo riding a bike", "kangaroo", 2),
        ("an octopus playing soccer", "octopus", 6),
        ("a bat driving a car at night", "bat", 5),
        ("a rat flying a kite", "rat", -1),  # nothing to look for
        ("a rat playing chess and riding a bike", "rat", -1),
        ("a cat and a dog", None, -1),
        ("bats", None, -1),  # a whole word only
        ("a robot riding a bike", None, -1),
        ("", None, -1),
    ],
)
def test_judge_reads_prompts(text, animal, obj):
    assert judge.parse(text) == (-1 if animal is None else ANIMALS.index(animal), obj)


@pytest.mark.parametrize("k, activity", list(enumerate(ACTIVITIES, start=1)))
def test_judge_knows_every_caption(k, activity):
    for i, animal in enumerate(ANIMALS):
        assert judge.parse(f"a {animal} {activity}") == (i, k)
        assert judge.parse(f"a {animal}") == (i, 0)


def test_judge_scores(tmp_path):
    """Heads with fixed biases see a dog on a bicycle in everything."""
    config = {"widths": [8, 8], "norm_num_groups": 2, "animals": 52, "objects": 7}
    model = Classifier(ClassifierConfig.from_dict(config))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    params["animal"]["bias"] = 1e3 * jax.nn.one_hot(ANIMALS.index("dog"), 52)
    params["object"]["bias"] = 1e3 * jax.nn.one_hot(2, 7)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(convert.to_torch(params), tmp_path / "model.safetensors")
    reward = load_reward(f"emoji_judge:{tmp_path}")
    texts = ["a dog riding a bike", "a dog", "a cat riding a bike", "a dog flying a kite", "the moon"]
    tokens = reward.tokenize(texts)
    scores, parts = jax.jit(reward.score)(reward.params, np.zeros((5, 80, 64, 3), np.float32), tokens)
    np.testing.assert_array_equal(scores, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(parts["animal"], [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(parts["object"], [1, 0, 1, 0, 0])


def test_classifier_is_small():
    model = Classifier(ClassifierConfig())
    image = jnp.zeros((1, 64, 64, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 600_000
    assert [head.shape for head in jax.eval_shape(model.apply, params, image)] == [(1, 52), (1, 7)]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip", f"unknown reward 'clip'; {ACCEPTED}"),
        ("", f"unknown reward ''; {ACCEPTED}"),
        ("textnorm(clip)", f"unknown reward 'clip'; {ACCEPTED}"),
        ("textnorm(pickscore:x", f"unknown reward 'textnorm(pickscore'; {ACCEPTED}; {NEAR}"),
        ("pickscore", "reward 'pickscore' needs its weights: pickscore:PATH"),
        ("aesthetic:", "reward 'aesthetic' needs its weights: aesthetic:PATH"),
        ("pickscore:no/such/clip", "reward 'pickscore:no/such/clip': no/such/clip: no such file or folder"),
        ("emoji_judge+emoji_judge", "reward 'emoji_judge+emoji_judge': names a reward twice"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError) as error:
        load_reward(spec)
    assert str(error.value) == message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "vocab.json"])
def test_missing_files(tmp_path, clip_folder, file):
    for path in clip_folder.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError) as error:
        load_reward(f"pickscore:{tmp_path}")
    assert str(tmp_path) in str(error.value) and file in str(error.value) and "\n" not in str(error.value)
