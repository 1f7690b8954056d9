"""The emoji world's judge: does the picture show the prompt's animal, and its activity's object?"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from diffexp_jax.emoji.names import ACTIVITIES, ANIMALS
from diffexp_jax.formats import convert, files
from diffexp_jax.models.classifier import Classifier, ClassifierConfig
from diffexp_jax.rewards.preprocess import as_floats, resize_and_crop
from diffexp_jax.rewards.reward import SHIPPED, Builtin, Reward, of_pixels

SIZE = 64  # pixels: the pictures that the judge was trained on

_UNKNOWN = -1
_ANIMAL = re.compile(rf"\b({'|'.join(ANIMALS)})\b")


def load(folder: Path, *, dtype: DTypeLike = jnp.float32) -> Reward:
    """1 where the picture shows the prompt's animal and object, else 0; parts: each of the two alone.

    For reports, not for optimisation: made of argmaxes, it has no gradient.

    Args:
      folder: holds the classifier's config.json and model.safetensors.
      dtype: of the weights and of the network's arithmetic.

    Raises:
      InputError: a file is missing or broken, or the tensors do not fit the config.
    """
    file = folder / "config.json"
    model = Classifier(ClassifierConfig.from_dict(files.read_json(file), str(file)), dtype)
    shapes = convert.abstract_params(model, np.zeros((1, SIZE, SIZE, 3), np.float32))
    params = convert.from_torch(files.open_weights(folder), shapes, where=str(folder), dtype=dtype)

    def score_prepared(
        params, pixels: Float[Array, "B H W 3"], wanted: Int[Array, "B 2"]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        logits = model.apply({"params": params}, pixels)
        seen = jnp.stack([head.argmax(-1) for head in logits], axis=1)  # [B, 2]
        right = (seen == wanted).astype(jnp.float32)
        return right.prod(1), {"animal": right[:, 0], "object": right[:, 1]}

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, "B 2"]:
        return np.array([parse(text) for text in texts], np.int32).reshape(-1, 2)

    def pixels(images: Float[Array, "B H W 3"]) -> Float[Array, "B 64 64 3"]:
        return resize_and_crop(images, SIZE)

    def prepare(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "64 64 3"]:
        return np.asarray(pixels(as_floats(image)[None])[0])

    return of_pixels(params, tokenize=tokenize, pixels=pixels, prepare=prepare, score_prepared=score_prepared)


def parse(text: str) -> tuple[int, int]:
    """A prompt's animal (index into ANIMALS) and object (0 none, k that of activity k).

    No activity wants no object. -1, which no picture gets right, where the prompt does not say: no known
    animal or several; after the animal something else than one known activity.
    """
    text = text.lower()
    animals = list(_ANIMAL.finditer(text))
    if len(animals) != 1:
        return _UNKNOWN, _UNKNOWN
    rest = text[animals[0].end() :].strip(" .,!")
    doing = [k for k, activity in enumerate(ACTIVITIES, start=1) if activity in rest]
    obj = 0 if not rest else doing[0] if len(doing) == 1 else _UNKNOWN
    return ANIMALS.index(animals[0][1]), obj


BUILTINS = {
    "emoji_judge": Builtin("1 where the emoji world's animal and object are right, else 0", load, SHIPPED / "judge")
}
