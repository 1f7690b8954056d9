"""The emoji world's scenes: what is drawn, how often, and where it lands in the picture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.emoji import names, scenes

N = 60_000  # the same everywhere, and large enough to meet every combination: one compilation serves most tests
render = jax.jit(scenes.render)
sample_n = jax.jit(scenes.sample_scenes, static_argnums=1, static_argnames=("held_out",))


def sample(seed, *, activity_share=0.6, missing=scenes.MISSING, held_out=False):
    missing = None if missing is None else np.asarray(missing, np.float32)
    drawn = sample_n(jax.random.key(seed), N, activity_share=activity_share, missing=missing, held_out=held_out)
    return jax.tree.map(np.asarray, drawn)


@pytest.fixture(scope="module")
def sprites():
    return scenes.load_sprites()


def scene(**fields):
    """Scenes that are all zero but for the fields given, which broadcast against each other."""
    arrays = np.broadcast_arrays(*(np.atleast_1d(fields.get(f, 0)) for f in scenes.Scene._fields))
    return scenes.Scene(*arrays)


def test_captions():
    captions = scenes.captions()
    assert len(captions) == len(set(captions)) == 51 * 7
    assert captions[0] == "a cat"
    animal = names.ANIMALS.index
    activity = ("", *names.ACTIVITIES).index
    assert captions[scenes.caption_id(animal("dog"), activity("riding a bike"))] == "a dog riding a bike"
    assert captions[scenes.caption_id(animal("ant"), activity(""))] == "an ant"
    assert captions[scenes.caption_id(animal("octopus"), activity("doing laundry"))] == "an octopus doing laundry"
    assert [c for c in captions if c.startswith("an ")] == captions[20 * 7 : 21 * 7] + captions[50 * 7 :]
    np.testing.assert_array_equal(scenes.caption_id(jnp.array([0, 1, 50]), jnp.array([6, 0, 6])), [6, 7, 356])


def test_archive_matches_the_names():
    with np.load(Path(scenes.__file__).with_name("sprites.npz")) as archive:
        assert tuple(archive["animals"]) == names.ANIMALS
        assert tuple(archive["objects"]) == names.OBJECTS
        for key, shape in [
            ("animals_50", (2, 51, 50, 50, 4)),
            ("animals_34", (2, 51, 34, 34, 4)),
            ("objects_28", (2, 6, 28, 28, 4)),
        ]:
            assert (archive[key].shape, archive[key].dtype) == (shape, np.uint8)
            assert (archive[key][..., 3] > 128).mean(axis=(2, 3)).min() > 0.2  # every sprite fills some of its square


def test_no_two_sprites_look_the_same(sprites):
    for table in (sprites.animals[0], sprites.objects[:, 1:]):
        for style in np.asarray(table):
            flat = style.reshape(len(style), -1)
            rms = np.sqrt([np.mean(np.square(flat - other), axis=1) for other in flat])
            assert (rms + np.eye(len(rms))).min() > 0.05


@pytest.mark.parametrize(
    "missing, shares",
    [(scenes.MISSING, scenes.MISSING), (None, [0] * 6), (0.5, [0.5] * 6), ([0, 1, 0.2, 0.3, 0.4, 0.5],) * 2],
)
def test_shares(missing, shares):
    drawn, activity = sample(0, missing=missing)
    assert np.mean(activity > 0) == pytest.approx(0.6, abs=0.01)
    assert np.all((drawn.obj == 0) | (drawn.obj == activity))
    for k, share in enumerate(shares, start=1):
        named = activity == k
        assert np.mean(named) == pytest.approx(0.1, abs=0.01)
        assert np.mean(drawn.obj[named] == 0) == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)


@pytest.mark.parametrize("activity_share", [0.0, 1.0])
def test_activity_share_extremes(activity_share):
    _, activity = sample(1, activity_share=activity_share)
    assert np.all((activity > 0) == activity_share)


def test_held_out_grounds():
    """Each combination keeps one ground for held-out scenes, and training scenes have every other one."""

    def pictures(held_out):
        drawn, _ = sample(2, missing=[0.5] * 6, held_out=held_out)
        combination = np.ravel_multi_index(np.array([drawn.animal, drawn.obj, drawn.style, drawn.flip]), (51, 7, 2, 2))
        return set(combination.tolist()), set((combination * 6 + np.asarray(drawn.ground)).tolist())

    combinations, train = pictures(False)
    _, held_out = pictures(True)
    assert len(combinations) == 51 * 7 * 2 * 2
    assert not train & held_out
    assert len(held_out) == len(combinations)
    assert {picture % 6 for picture in train} == {picture % 6 for picture in held_out} == set(range(6))


def test_reserved_grounds_are_balanced():
    axes = np.meshgrid(*(np.arange(n) for n in (51, 7, 2, 2)), indexing="ij")
    counts = np.bincount(jax.jit(scenes.reserved_ground)(*map(np.ravel, axes)), minlength=6)
    assert counts.min() > 0.8 * counts.mean()


def test_jitter_covers_its_range():
    drawn, _ = sample(3)
    for offset in drawn[-4:]:
        assert set(np.asarray(offset).tolist()) == {-1, 0, 1}


def test_render_with_and_without_jit(sprites):
    drawn = jax.tree.map(lambda field: field[:8], sample(4)[0])
    images = render(sprites, drawn)
    assert images.shape == (8, 64, 64, 3)
    assert images.dtype == jnp.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1 + 1e-6
    np.testing.assert_array_equal(images, render(sprites, drawn))
    np.testing.assert_allclose(images, scenes.render(sprites, drawn), atol=1e-6)


def test_ground_and_layers():
    """Half-transparent object over the ground, and an opaque animal over both, with invented sprites."""
    animals = jnp.zeros((2, 2, 51, 66, 66, 4)).at[1, 1, 7, :33].set(jnp.array([0, 1, 0, 1.0]))
    objects = jnp.zeros((2, 7, 66, 66, 4)).at[1, 3].set(jnp.array([0.5, 0, 0, 0.5]))
    image = render(scenes.Sprites(animals, objects), scene(animal=7, obj=3, style=1, ground=4))[0]
    np.testing.assert_allclose(image[:32], np.broadcast_to([0.0, 1, 0], (32, 64, 3)))
    mixed = [0.5 + 0.5 * 210 / 255, 0.5 * 232 / 255, 0.5 * 250 / 255]
    np.testing.assert_allclose(image[32:], np.broadcast_to(mixed, (32, 64, 3)), atol=1e-6)


@pytest.mark.parametrize("ground", range(6))
def test_alone_is_centred_on_its_ground(sprites, ground):
    images = np.asarray(render(sprites, scene(animal=np.arange(51), ground=ground)))
    expected = scenes.GROUNDS[ground] / 255
    for margin in (images[:, :7], images[:, 57:], images[:, :, :7], images[:, :, 57:]):
        np.testing.assert_allclose(margin, np.broadcast_to(expected, margin.shape), atol=1e-6)
    assert np.abs(images[:, 7:57, 7:57] - expected).max(axis=(1, 2, 3)).min() > 0.3


def test_object_is_below_the_animal(sprites):
    images = np.asarray(render(sprites, scene(animal=1, obj=np.arange(1, 7))))  # [6, 64, 64, 3]
    np.testing.assert_array_equal(images[:, :34], np.broadcast_to(images[:1, :34], images[:, :34].shape))
    for i, below in enumerate(images[:, 35:]):
        others = np.delete(images[:, 35:], i, axis=0)
        assert np.abs(others - below).mean(axis=(1, 2, 3)).min() > 0.02


def test_style_changes_animal_and_object(sprites):
    noto, fluent = np.asarray(render(sprites, scene(animal=1, obj=2, style=[0, 1])))
    for rows in (slice(0, 34), slice(36, 64)):
        assert np.abs(noto[rows] - fluent[rows]).mean() > 0.02


def test_flip_mirrors_the_whole_scene(sprites):
    plain, mirrored = np.asarray(render(sprites, scene(animal=1, obj=2, animal_dx=1, object_dy=1, flip=[0, 1])))
    np.testing.assert_allclose(plain, mirrored[:, ::-1], rtol=0, atol=1e-6)  # of numbers in [0, 1]


@pytest.mark.parametrize("dx, dy", [(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1)])
def test_jitter_moves_right_and_down(sprites, dx, dy):
    still = np.asarray(render(sprites, scene(animal=1, obj=2)))[0]
    moved = np.asarray(render(sprites, scene(animal=1, obj=2, animal_dx=dx, animal_dy=dy, object_dx=dx, object_dy=dy)))[
        0
    ]
    np.testing.assert_array_equal(moved, np.roll(still, (dy, dx), axis=(0, 1)))
    moved_animal = np.asarray(render(sprites, scene(animal=1, obj=2, animal_dx=dx, animal_dy=dy)))[0]
    np.testing.assert_array_equal(moved_animal[37:], still[37:])
