"""What the emoji world's rewards learn from: complete scenes, clean and as the VAE reconstructs them."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from tqdm import tqdm

from diffexp_jax.emoji import scenes
from diffexp_jax.emoji.names import ANIMALS
from diffexp_jax.emoji.pretraining import load_part
from diffexp_jax.emoji.scenes import Scene, Sprites
from diffexp_jax.formats import files
from diffexp_jax.models.vae import AutoencoderKL, VAEConfig

ACTIVITY_SHARE = 0.65  # of the scenes that have an object
EMPTY_SHARE = 0.06  # of the scenes that have no animal: no caption fits them, and the judge must say "none"
NO_ANIMAL = len(ANIMALS)
GROUP = 4  # scenes of one animal in a row: a batch then holds the same animal with and without the object
LATENT_NOISE = 0.3  # largest deviation added to latents (their own is 1): a diffusion model is not perfect either


class Pictures(NamedTuple):
    """What the networks learn from."""

    sprites: Sprites  # for fresh scenes; with an invisible animal at NO_ANIMAL
    scene: Scene  # [N], of the pictures below
    decoded: UInt8[Array, "N 64 64 3"]  # after the VAE; every GROUP in a row of one animal


def draw_scenes(
    key: PRNGKeyArray, n: int, *, group: int = 1, empty_share: float = 0.0, held_out: bool = False
) -> Scene:
    """n complete scenes, each `group` in a row of one animal; some have none (NO_ANIMAL)."""
    scene_key, empty_key = jax.random.split(key)
    scene, _ = scenes.sample_scenes(scene_key, n, activity_share=ACTIVITY_SHARE, missing=None, held_out=held_out)
    animal = scene.animal[::group].repeat(group)
    animal = jnp.where(jax.random.bernoulli(empty_key, empty_share, (n,)), NO_ANIMAL, animal)
    # The reserved ground goes with the animal: keep the distance to it.
    reserved = [scenes.reserved_ground(a, scene.obj, scene.style, scene.flip) for a in (scene.animal, animal)]
    ground = (scene.ground - reserved[0] + reserved[1]) % len(scenes.GROUNDS)
    return scene._replace(animal=animal, ground=ground)


def load_sprites() -> Sprites:
    """The shipped sprites, and an invisible animal."""
    sprites = scenes.load_sprites()
    return sprites._replace(animals=jnp.pad(sprites.animals, ((0, 0), (0, 0), (0, 1), *((0, 0),) * 3)))


def make_pictures(out: Path, *, seed: int, n: int, noise: float = LATENT_NOISE, chunk: int = 256, **kwargs) -> Pictures:
    """Draws n scenes and sends them through the VAE of `out`.

    n is a multiple of `chunk`. Latents get Gaussian noise, of a deviation uniform in 0..noise. `kwargs` go to
    `draw_scenes`.
    """
    vae = AutoencoderKL(VAEConfig.from_dict(files.read_json(out / "model/vae/config.json")))

    @jax.jit
    def decode(params, sprites, key):
        scene_key, noise_key, size_key = jax.random.split(key, 3)
        scene = draw_scenes(scene_key, chunk, **kwargs)
        latents = vae.apply({"params": params}, scenes.render(sprites, scene), method="encode")
        size = jax.random.uniform(size_key, (chunk, 1, 1, 1), maxval=noise)
        latents = latents + size * jax.random.normal(noise_key, latents.shape)
        images = jnp.clip(vae.apply({"params": params}, latents, method="decode"), 0, 1)
        return scene, jnp.round(255 * images).astype(jnp.uint8)

    params, sprites = load_part(out, "vae", vae), load_sprites()
    keys = jax.random.split(jax.random.key(seed), n // chunk)
    parts = [decode(params, sprites, key) for key in tqdm(keys, desc="pictures", unit_scale=chunk)]
    return Pictures(sprites, *jax.tree.map(lambda *x: jnp.concatenate(x), *parts))


def draw_batch(
    key: PRNGKeyArray, pictures: Pictures, n: int, *, empty_share: float = EMPTY_SHARE
) -> tuple[Scene, Float[Array, "n 64 64 3"]]:
    """Half fresh clean scenes (`empty_share` of them without animal), half decoded ones, then `augment`."""
    fresh_key, row_key, augment_key = jax.random.split(key, 3)
    fresh = draw_scenes(fresh_key, n // 2, group=GROUP, empty_share=empty_share)
    start = jax.random.randint(row_key, (n // 2 // GROUP, 1), 0, len(pictures.decoded) // GROUP) * GROUP
    rows = (start + jnp.arange(GROUP)).ravel()
    scene = jax.tree.map(lambda a, b: jnp.concatenate([a, b[rows]]), fresh, pictures.scene)
    images = jnp.concatenate([scenes.render(pictures.sprites, fresh), pictures.decoded[rows] / 255.0])
    return scene, augment(augment_key, images)


def augment(key: PRNGKeyArray, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Half of the images blurred by up to a 3x3 binomial filter, all with noise of deviation 0..0.06."""
    blur_key, size_key, noise_key = jax.random.split(key, 3)
    b, h, w, _ = images.shape
    share = jnp.maximum(0.0, jax.random.uniform(blur_key, (b, 1, 1, 1), minval=-1.0))
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :h] + 2 * padded[:, 1 : h + 1] + padded[:, 2:]) / 4
    blurred = (rows[:, :, :w] + 2 * rows[:, :, 1 : w + 1] + rows[:, :, 2:]) / 4
    size = jax.random.uniform(size_key, (b, 1, 1, 1), maxval=0.06)
    noise = size * jax.random.normal(noise_key, images.shape)
    return jnp.clip((1 - share) * images + share * blurred + noise, 0, 1)
