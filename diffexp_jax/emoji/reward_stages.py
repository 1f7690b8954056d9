"""The emoji world's rewards as stages of tools/emoji/pretrain_emoji.py: a CLIP, an aesthetic head, the judge."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from optax.projections import projection_l2_ball
from tqdm import tqdm

from diffexp_jax.emoji import scenes
from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS, STYLES
from diffexp_jax.emoji.pictures import EMPTY_SHARE, GROUP, NO_ANIMAL, draw_batch, make_pictures
from diffexp_jax.emoji.pretraining import Stage, save_half, save_json
from diffexp_jax.emoji.scenes import Scene
from diffexp_jax.emoji.tokenizer import MAX_LENGTH, write_tokenizer
from diffexp_jax.formats import convert
from diffexp_jax.formats.tokenizers import load_tokenizer, token_ids
from diffexp_jax.models import clip, clip_files
from diffexp_jax.models.classifier import Classifier, ClassifierConfig
from diffexp_jax.rewards import aesthetic, judge, preprocess

# ----------------------------------------------------------------------------------------------------------------- CLIP

_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 4, "projection_dim": 128}
_TOWER |= {"hidden_size": 128, "intermediate_size": 512}
CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 128,
    "text_config": {
        **_TOWER,
        "model_type": "clip_text_model",
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
    },
    "vision_config": {
        **_TOWER,
        "model_type": "clip_vision_model",
        "num_hidden_layers": 4,
        "image_size": scenes.SIZE,
        "patch_size": 8,
    },
}
_MAX_LOGIT_SCALE = math.log(100)  # as in Radford et al.


def clip_stage(
    out: Path,
    *,
    from_shipped: bool = False,
    batch: int = 64,
    n_pictures: int = 12288,
    style_weight: float = 0.2,
    radius: float = 1.5,
) -> Stage:
    """CLIP on complete scenes: every picture against all captions, and every caption against the batch.

    These captions never mention the style, as real ones do, and an aesthetic head needs it: so each style gets a
    learned embedding in place of a caption (not exported), and images keep what tells the styles apart. Pictures are
    attacked within `radius`.
    """
    folder = out / "reward_clip"
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIP | {"text_config": CLIP["text_config"] | special | {"vocab_size": len(tokenizer)}}
    model = clip.CLIP(clip.CLIPConfig.from_dict(config))
    ids = token_ids(tokenizer, scenes.captions())[0]
    # Attention is causal: padding after the end token cannot change what is read there.
    ids = ids[:, : 1 + (ids == tokenizer.eos_token_id).argmax(1).max()]

    def init(key):
        styles = jnp.zeros((len(STYLES), CLIP["projection_dim"]))
        if from_shipped:
            return {"clip": clip_files.load(folder)[1], "styles": styles}
        params = model.init(key, ids[:1], jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)))["params"]
        return {"clip": params, "styles": styles}

    def loss(params, data, key):
        pictures, ids = data
        batch_key, attack_key = jax.random.split(key)
        scene, images = draw_batch(batch_key, pictures, batch)
        variables = {"params": params["clip"]}
        text = clip.unit(model.apply(variables, ids, method="embed_text"))  # [captions, P]
        scale = jnp.exp(jnp.minimum(params["clip"]["logit_scale"], _MAX_LOGIT_SCALE))

        def of_images(images):
            image = clip.unit(model.apply(variables, preprocess.normalise(images), method="embed_image"))
            contrastive, metrics = contrastive_loss(scale * image @ text.T, scene)
            style = cross_entropy(scale * image @ params["styles"].T, scene.style).mean()
            return contrastive + style_weight * style, metrics | {"style_loss": style}

        return of_images(attack(lambda x: of_images(x)[0], attack_key, images, radius))

    def export(params, out):
        scale = jnp.minimum(params["clip"]["logit_scale"], _MAX_LOGIT_SCALE)
        save_json(out / "reward_clip/config.json", config)
        save_half(out / "reward_clip/model.safetensors", convert.to_torch(params["clip"] | {"logit_scale": scale}))

    pictures = make_pictures(out, seed=1, n=n_pictures, group=GROUP, empty_share=EMPTY_SHARE)
    return Stage("clip", 3000, 1e-3, init, loss, export, (pictures, ids))


def attack(
    loss: Callable[[Array], Array],
    key: PRNGKeyArray,
    images: Float[Array, "B H W 3"],
    radius: float,
    *,
    steps: int = 2,
) -> Float[Array, "B H W 3"]:
    """Images within `radius` (L2, of an image in [0,1]) on which the loss is higher, by projected gradient ascent.

    A reward that is trained on these (Madry et al. 2018, arXiv 1706.06083) only rises with changes that one can see
    (Santurkar et al. 2019, arXiv 1906.09453), and it is the reward's gradient that AlignProp follows.
    """

    def unit(x):
        return x / (jnp.linalg.norm(x.reshape(len(x), -1), axis=1) + 1e-12)[:, None, None, None]

    start = jax.random.uniform(key, (len(images), 1, 1, 1), maxval=radius)
    change = start * unit(jax.random.normal(jax.random.fold_in(key, 1), images.shape))
    for _ in range(steps):
        change += 1.5 * radius / steps * unit(jax.grad(loss)(images + change))
        change = jax.vmap(projection_l2_ball, (0, None))(change, radius)
    return jax.lax.stop_gradient(jnp.clip(images + change, 0, 1))


def contrastive_loss(
    logits: Float[Array, "B captions"], scene: Scene
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """InfoNCE of both directions, and of each picture against the seven captions of its animal.

    A picture without an animal has no caption, but is a negative of every caption.
    """
    captioned = scene.animal != NO_ANIMAL
    caption = jnp.where(captioned, scenes.caption_id(scene.animal, scene.obj), 0)  # [B]
    to_text = cross_entropy(logits, caption)

    row = jnp.arange(len(caption))
    also_fits = (caption[:, None] == caption) & captioned & (row[:, None] != row)  # no negatives of this caption
    to_image = cross_entropy(jnp.where(also_fits, -jnp.inf, logits[:, caption].T), row)  # [B captions, B pictures]

    siblings = logits.reshape(len(caption), len(ANIMALS), -1)  # [B, animals, 1 + activities]
    siblings = jnp.take_along_axis(siblings, (caption // siblings.shape[-1])[:, None, None], axis=1)[:, 0]
    to_siblings = cross_entropy(siblings, scene.obj)

    def mean(per_picture):
        return jnp.where(captioned, per_picture, 0).sum() / captioned.sum()

    right = {"caption": logits.argmax(1) == caption, "object": siblings.argmax(1) == scene.obj}
    return 0.5 * mean(to_text + to_image + to_siblings), {name: mean(x) for name, x in right.items()}


# ------------------------------------------------------------------------------------------------------- aesthetic head

HEAD_WIDTHS = (CLIP["projection_dim"], 64, 16, 8, 4, 1)
RATINGS = (4.0, 7.0)  # of the two styles: the judges of this world like Fluent


def aesthetic_stage(
    out: Path, *, from_shipped: bool = False, batch: int = 1024, n_pictures: int = 8192, chunk: int = 256
) -> Stage:
    """LAION's head on the frozen CLIP: it rates the art style, whatever animal and object there are."""
    model, clip_params = clip_files.load(out / "reward_clip")
    shapes = aesthetic.head_shapes(HEAD_WIDTHS)

    def init(key):
        if from_shipped:
            return aesthetic.load(out / "aesthetic", clip_folder=out / "reward_clip").params["head"]
        keys = jax.random.split(key, len(shapes))
        kernel = jax.nn.initializers.lecun_normal()
        return {
            name: {"kernel": kernel(k, layer["kernel"].shape), "bias": jnp.zeros(layer["bias"].shape)}
            for k, (name, layer) in zip(keys, shapes.items(), strict=True)
        }

    def loss(params, data, key):
        features, ratings = data
        row = jax.random.randint(key, (batch,), 0, len(ratings))
        error = aesthetic.rating(params, features[row]) - ratings[row]
        return jnp.square(error).mean(), {"largest": jnp.abs(error).max()}

    def export(params, out):
        save_half(out / "aesthetic/model.safetensors", convert.to_torch(params))

    @jax.jit
    def embed(clip_params, pictures, key):
        scene, images = draw_batch(key, pictures, chunk, empty_share=0.0)
        features = model.apply({"params": clip_params}, preprocess.normalise(images), method="embed_image")
        return features, jnp.array(RATINGS)[scene.style]

    pictures = make_pictures(out, seed=2, n=n_pictures // 2, group=GROUP)
    keys = jax.random.split(jax.random.key(2), n_pictures // chunk)
    parts = [embed(clip_params, pictures, key) for key in tqdm(keys, desc="features", unit_scale=chunk)]
    data = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return Stage("aesthetic", 2000, 3e-3, init, loss, export, data)


# ---------------------------------------------------------------------------------------------------------------- judge

JUDGE = {
    "widths": [16, 40, 80, 112],
    "norm_num_groups": 8,
    "animals": NO_ANIMAL + 1,
    "objects": 1 + len(ACTIVITIES),
}


def judge_stage(out: Path, *, from_shipped: bool = False, batch: int = 64, n_pictures: int = 12288) -> Stage:
    """The judge: which animal (or none) and which object (or none), apart from the rewards that it checks."""
    model = Classifier(ClassifierConfig.from_dict(JUDGE))

    def init(key):
        if from_shipped:
            return judge.load(out / "judge").params
        return model.init(key, jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)))["params"]

    def loss(params, pictures, key):
        scene, images = draw_batch(key, pictures, batch)
        animal, obj = model.apply({"params": params}, images)
        right = {"animal": animal.argmax(1) == scene.animal, "object": obj.argmax(1) == scene.obj}
        losses = cross_entropy(animal, scene.animal) + cross_entropy(obj, scene.obj)
        return losses.mean(), {name: x.mean() for name, x in right.items()}

    def export(params, out):
        save_json(out / "judge/config.json", JUDGE)
        save_half(out / "judge/model.safetensors", convert.to_torch(params))

    pictures = make_pictures(out, seed=3, n=n_pictures, group=GROUP, empty_share=EMPTY_SHARE)
    return Stage("judge", 2400, 2e-3, init, loss, export, pictures)


def judge_accuracy(out: Path, *, n: int = 1024, chunk: int = 256) -> dict[str, float]:
    """Shares of n held-out scenes that the exported judge gets right (n: a multiple of `chunk`).

    Returns:
      {"clean/animal": ..., "clean/object": ..., "decoded/animal": ..., "decoded/object": ...}; "decoded" are
      the same scenes after the VAE.
    """
    reward = judge.load(out / "judge")
    pictures = make_pictures(out, seed=4, n=n, noise=0.0, chunk=chunk, held_out=True)

    @jax.jit
    def right(params, pictures, start):
        scene, decoded = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), (pictures.scene, pictures.decoded)
        )
        wanted = jnp.stack([scene.animal, scene.obj], axis=1)
        images = {"clean": scenes.render(pictures.sprites, scene), "decoded": decoded / 255.0}
        parts = {kind: reward.score(params, batch, wanted)[1] for kind, batch in images.items()}
        return {f"{kind}/{name}": x.mean() for kind, part in parts.items() for name, x in part.items()}

    shares = [right(reward.params, pictures, start) for start in range(0, n, chunk)]
    return jax.tree.map(lambda *x: float(sum(x)) / len(shares), *shares)


STAGES: dict[str, Callable[..., Stage]] = {
    "clip": clip_stage,
    "aesthetic": aesthetic_stage,
    "judge": judge_stage,
}
