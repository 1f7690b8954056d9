"""Scenes of the emoji world: 64x64 pictures of an animal, alone or above the object of its activity.

A scene is a handful of integers, drawn (`sample_scenes`) and rendered (`render`) inside jit. Captions are strings with
an integer id, so that training data never leaves the device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS, STYLES
from diffexp_jax.prompts.animals import with_article

SIZE = 64  # pixels of a scene's side
JITTER = 1  # pixels: sprites move by up to this much in each direction

# Plain pastels: far enough apart to tell, light enough for every sprite to stand out.
GROUNDS = np.array(
    [(255, 224, 224), (255, 236, 204), (252, 248, 200), (214, 240, 214), (210, 232, 250), (242, 220, 244)],
    np.float32,
)  # [6, 3], 0..255

# Share of the captions naming an activity whose scene lacks its object, by activity: an easy, a medium and a hard one
# among the three of fine-tuning, and again among the three unseen. This is what makes the model forget the bike.
MISSING = (0.7, 0.8, 0.85, 0.7, 0.8, 0.85)
# The hard world's: what the paper's Figure 1 is about, a bike that is (almost) never there, beside an easy activity and
# one between, and so again among the unseen.
MISSING_HARD = (0.7, 0.98, 0.9, 0.7, 0.98, 0.9)


class Sprites(NamedTuple):
    """Premultiplied RGBA in [0,1], each sprite at its place in a scene, with a transparent margin of JITTER around."""

    animals: Float[Array, "2 2 51 66 66 4"]  # [alone or with an object, style, animal]
    objects: Float[Array, "2 7 66 66 4"]  # [style, object], object 0 is empty


class Scene(NamedTuple):
    """A batch of scenes, as integers."""

    animal: Int[Array, " B"]  # index into ANIMALS
    obj: Int[Array, " B"]  # 0 none, k the object of activity k
    style: Int[Array, " B"]  # index into STYLES, shared by animal and object
    ground: Int[Array, " B"]  # index into GROUNDS
    flip: Int[Array, " B"]  # 1: the whole scene mirrored
    animal_dx: Int[Array, " B"]  # pixels to the right, within +-JITTER, before mirroring
    animal_dy: Int[Array, " B"]  # pixels down
    object_dx: Int[Array, " B"]
    object_dy: Int[Array, " B"]


def load_sprites() -> Sprites:
    """Reads the sprites that the package ships."""
    with np.load(Path(__file__).with_name("sprites.npz")) as archive:
        alone = _place(archive["animals_50"], top=7)
        above = _place(archive["animals_34"], top=1)
        below = _place(archive["objects_28"], top=34)
    none = np.zeros_like(below[:, :1])
    return Sprites(jnp.asarray(np.stack([alone, above])), jnp.asarray(np.concatenate([none, below], axis=1)))


def _place(sprites: UInt8[np.ndarray, "S N s s 4"], top: int) -> Float[np.ndarray, "S N 66 66 4"]:
    """Premultiplies, and puts each sprite on a canvas: `top` rows down, centred from left to right."""
    size = sprites.shape[2]
    rgba = sprites.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    side = SIZE + 2 * JITTER
    canvas = np.zeros((*sprites.shape[:2], side, side, 4), np.float32)
    y, x = top + JITTER, (side - size) // 2
    canvas[:, :, y : y + size, x : x + size] = rgba
    return canvas


def reserved_ground(
    animal: Int[Array, " B"], obj: Int[Array, " B"], style: Int[Array, " B"], flip: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The ground that only held-out scenes of this combination have: a fixed hash of the four."""
    index = ((animal * (len(ACTIVITIES) + 1) + obj) * len(STYLES) + style) * 2 + flip
    mixed = index.astype(jnp.uint32) * jnp.uint32(2654435761)  # Knuth's multiplicative hash: the high bits are mixed
    return ((mixed >> 16) % len(GROUNDS)).astype(jnp.int32)


def sample_scenes(
    key: PRNGKeyArray,
    n: int,
    *,
    activity_share: Float[Array, ""] | float = 0.6,
    missing: Float[Array, "..."] | Sequence[float] | float | None = MISSING,
    held_out: bool = False,
) -> tuple[Scene, Int[Array, " n"]]:
    """Draws n scenes and the activity that each one's caption names.

    Args:
      n: how many (static under jit, as is held_out).
      activity_share: probability that the caption names an activity (which one: uniform).
      missing: probability that the object of a named activity is missing, per activity or for all; None: never.
      held_out: scenes on the ground reserved for their combination of animal, object, style and mirroring; training
        scenes (False) draw among the other five. So the two never share a picture.

    Returns:
      The scenes, and the activities in 0..6, 0 where the caption is the animal alone (see `caption_id`).
    """
    streams = ("animal", "named", "activity", "missing", "style", "flip", "ground", "jitter")
    keys = dict(zip(streams, jax.random.split(key, len(streams)), strict=True))
    animal = jax.random.randint(keys["animal"], (n,), 0, len(ANIMALS))
    style = jax.random.randint(keys["style"], (n,), 0, len(STYLES))
    flip = jax.random.randint(keys["flip"], (n,), 0, 2)

    named = jax.random.bernoulli(keys["named"], activity_share, (n,))
    activity = jnp.where(named, jax.random.randint(keys["activity"], (n,), 1, len(ACTIVITIES) + 1), 0)
    p_missing = jnp.broadcast_to(jnp.asarray(0.0 if missing is None else missing), (len(ACTIVITIES),))
    is_missing: Bool[Array, " n"] = jax.random.uniform(keys["missing"], (n,)) < p_missing[activity - 1]
    obj = jnp.where(is_missing, 0, activity)

    step = 0 if held_out else jax.random.randint(keys["ground"], (n,), 1, len(GROUNDS))
    ground = (reserved_ground(animal, obj, style, flip) + step) % len(GROUNDS)
    jitter = jax.random.randint(keys["jitter"], (4, n), -JITTER, JITTER + 1)
    return Scene(animal, obj, style, ground, flip, *jitter), activity


def render(sprites: Sprites, scene: Scene) -> Float[Array, "B 64 64 3"]:
    """The pictures of the scenes, in [0,1]."""
    return jax.vmap(_render_one, in_axes=(None, 0))(sprites, scene)


def _render_one(sprites: Sprites, s: Scene) -> Float[Array, "64 64 3"]:
    """One scene (fields are scalars): ground, then object, then animal, composited with the "over" operator."""
    window = (SIZE, SIZE, 4)

    # Reading the canvas one pixel further left shows the sprite one pixel further right.
    def at(table: Array, index: tuple[Array, ...], dx: Array, dy: Array) -> Float[Array, "64 64 4"]:
        start = (*index, JITTER - dy, JITTER - dx, 0)
        return jax.lax.dynamic_slice(table, start, (1,) * len(index) + window).reshape(window)

    with_object = (s.obj > 0).astype(jnp.int32)
    image = jnp.broadcast_to(jnp.asarray(GROUNDS)[s.ground] / 255, (SIZE, SIZE, 3))
    for layer in (
        at(sprites.objects, (s.style, s.obj), s.object_dx, s.object_dy),
        at(sprites.animals, (with_object, s.style, s.animal), s.animal_dx, s.animal_dy),
    ):
        image = layer[..., :3] + (1 - layer[..., 3:]) * image
    return jnp.where(s.flip, image[:, ::-1], image)


def captions() -> list[str]:
    """Every caption of the world, indexed by `caption_id`: "a dog", "a dog washing the dishes", ..."""
    return [f"{with_article(animal)} {activity}".rstrip() for animal in ANIMALS for activity in ("", *ACTIVITIES)]


def caption_id(animal: Int[Array, "*B"] | int, activity: Int[Array, "*B"] | int) -> Int[Array, "*B"] | int:
    """Index into `captions()` of an animal (0..50) with an activity (0 none, 1..6)."""
    return animal * (len(ACTIVITIES) + 1) + activity
