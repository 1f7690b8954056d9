"""What the emoji world's rewards are trained on, and the contrastive loss, on known numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.emoji import pictures, pretraining, reward_stages, scenes
from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS
from diffexp_jax.formats import convert
from diffexp_jax.formats.tokenizers import load_tokenizer, token_ids
from diffexp_jax.models import clip, clip_files
from diffexp_jax.rewards import preprocess
from tests.support.tiny import random_weights

N = 4096
N_CAPTIONS = len(ANIMALS) * (1 + len(ACTIVITIES))
draw = jax.jit(pictures.draw_scenes, static_argnums=1, static_argnames=("group", "empty_share", "held_out"))
contrastive_loss = jax.jit(reward_stages.contrastive_loss)


def test_scenes_come_in_groups_of_one_animal():
    scene = draw(jax.random.key(0), N, group=4)
    groups = np.asarray(scene.animal).reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert len(np.unique(groups[:, 0])) == len(ANIMALS)
    assert len(np.unique(scene.obj)) == 1 + len(ACTIVITIES)
    assert np.mean(np.asarray(scene.obj) == 0) == pytest.approx(1 - pictures.ACTIVITY_SHARE, abs=0.03)


@pytest.mark.parametrize("held_out", [False, True])
def test_reserved_grounds_stay_reserved(held_out):
    """Also where a scene was given another animal, or none."""
    scene = draw(jax.random.key(1), N, group=4, empty_share=0.3, held_out=held_out)
    reserved = scenes.reserved_ground(scene.animal, scene.obj, scene.style, scene.flip)
    assert ((scene.ground == reserved) == held_out).all()
    assert np.mean(scene.animal == pictures.NO_ANIMAL) == pytest.approx(0.3, abs=0.03)


def test_a_scene_without_animal_is_its_object_on_the_ground():
    scene = draw(jax.random.key(2), 8)
    scene = scene._replace(animal=jnp.full(8, pictures.NO_ANIMAL), obj=jnp.arange(8) % 7)
    images = np.asarray(jax.jit(scenes.render)(pictures.load_sprites(), scene))
    ground = scenes.GROUNDS[np.asarray(scene.ground)][:, None, None] / 255
    np.testing.assert_allclose(images[:, :33], np.broadcast_to(ground, images[:, :33].shape), atol=1e-6)
    empty = np.isclose(images, ground).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(empty, scene.obj == 0)


def test_augmentation_keeps_the_picture():
    images = jnp.broadcast_to(jnp.linspace(0.2, 0.8, 64)[:, None, None], (64, 64, 64, 3))
    augmented = jax.jit(pictures.augment)(jax.random.key(3), images)
    assert float(augmented.min()) >= 0
    assert float(augmented.max()) <= 1
    np.testing.assert_allclose(augmented.mean((2, 3)), images.mean((2, 3)), atol=0.03)
    deviations = np.asarray((augmented - images).std((1, 2, 3)))
    assert deviations.min() < 0.01
    assert 0.05 < deviations.max() < 0.07


def loss_of(logits, animals, objects):
    zeros = jnp.zeros(len(animals), jnp.int32)
    scene = scenes.Scene(jnp.array(animals), jnp.array(objects), *(zeros,) * 7)
    loss, metrics = contrastive_loss(jnp.array(logits), scene)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def fitting(animals, objects, height=30.0):
    """Logits that are `height` for each picture's own caption and 0 for every other."""
    logits = np.zeros((len(animals), N_CAPTIONS), np.float32)
    for row, (animal, obj) in enumerate(zip(animals, objects, strict=True)):
        if animal != pictures.NO_ANIMAL:
            logits[row, scenes.caption_id(animal, obj)] = height
    return logits


def test_contrastive_loss_by_hand():
    """Three pictures that all logits treat alike: log of the number of captions, of pictures, of siblings."""
    loss, _ = loss_of(np.zeros((3, N_CAPTIONS)), [4, 4, 9], [0, 2, 2])
    assert loss == pytest.approx(0.5 * (np.log(N_CAPTIONS) + np.log(3) + np.log(7)), rel=1e-6)


def test_contrastive_loss_of_a_perfect_model():
    loss, metrics = loss_of(fitting([4, 4, 9], [0, 2, 2]), [4, 4, 9], [0, 2, 2])
    assert loss == pytest.approx(0, abs=1e-6)
    assert metrics == {"caption": 1.0, "object": 1.0}


def test_pictures_of_one_caption_are_no_negatives_of_each_other():
    loss, _ = loss_of(fitting([4, 4], [2, 2]), [4, 4], [2, 2])
    assert loss == pytest.approx(0, abs=1e-6)


def test_pictures_without_animal_are_negatives_only():
    """They have no caption of their own (no row in the mean), but must not fit those of others."""
    animals, objects = [4, pictures.NO_ANIMAL], [2, 2]
    logits = fitting(animals, objects)
    loss, metrics = loss_of(logits, animals, objects)
    assert loss == pytest.approx(0, abs=1e-6)
    assert metrics == {"caption": 1.0, "object": 1.0}
    logits[1] = logits[0]
    loss, _ = loss_of(logits, animals, objects)
    assert loss == pytest.approx(0.5 * np.log(2), abs=1e-5)


def test_transformers_accepts_the_config():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = reward_stages.CLIP
    reference = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config)).state_dict()
    module = clip.CLIP(clip.CLIPConfig.from_dict(config))
    ids, pixels = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3))
    params = random_weights(jax.eval_shape(module.init, jax.random.key(0), ids, pixels)["params"], seed=0)
    ours = {name: value.shape for name, value in convert.to_torch(params).items()}
    assert ours == {name: tuple(value.shape) for name, value in reference.items()}


def test_an_attack_is_as_bad_as_the_radius_allows():
    """On a linear loss, where the worst change is known: the radius along the gradient."""
    radius, weights = 0.5, jax.random.normal(jax.random.key(5), (16, 16, 3))
    images = jnp.full((8, 16, 16, 3), 0.5)
    worst = reward_stages.attack(lambda x: (x * weights).mean(0).sum(), jax.random.key(6), images, radius)
    change = np.asarray(worst - images).reshape(8, -1)
    np.testing.assert_allclose(np.linalg.norm(change, axis=1), radius, rtol=1e-4)
    along = change @ np.asarray(weights).ravel() / np.linalg.norm(weights)
    assert (along > 0.8 * radius).all()


def test_an_attacked_image_stays_an_image():
    white = jnp.ones((2, 16, 16, 3))
    brighter = reward_stages.attack(jnp.sum, jax.random.key(7), white, 0.5)
    np.testing.assert_array_equal(brighter.max((1, 2, 3)), 1)


@pytest.mark.slow
def test_the_shipped_reward_stands_an_attack():
    """Before it was trained on attacked images, 5 % of these captions and 65 % of these objects were told."""
    folder = pretraining.ASSETS / "reward_clip"
    model, params = clip_files.load(folder)
    scene = draw(jax.random.key(8), 32, group=4, held_out=True)
    images = jax.jit(scenes.render)(pictures.load_sprites(), scene)
    ids = token_ids(load_tokenizer(folder), scenes.captions())[0]

    @jax.jit
    def told_of_the_worst(params, images, ids):
        text = clip.unit(model.apply({"params": params}, ids, method="embed_text"))

        def told(images):
            image = clip.unit(model.apply({"params": params}, preprocess.normalise(images), method="embed_image"))
            return reward_stages.contrastive_loss(jnp.exp(params["logit_scale"]) * image @ text.T, scene)

        return told(reward_stages.attack(lambda x: told(x)[0], jax.random.key(9), images, 1.0))[1]

    right = told_of_the_worst(params, images, ids)
    assert right["caption"] > 0.8 and right["object"] > 0.95, right
