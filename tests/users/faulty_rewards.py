"""Rewards of a user's that are odd or wrong, named by faulty_rewards:FUNCTION in the tests."""

import functools
import sys

import jax.numpy as jnp
import numpy as np

from diffexp_jax.rewards.reward import no_tokens, of_pixels


def with_prompts(images, prompts):
    return images.mean((1, 2, 3))


def three(images, prompts, extra):
    return [0.0] * len(images)


def images_alone(images):
    return [float(image.mean()) for image in images]


async def waits(images, prompts):
    return [0.0] * len(images)


def yields(images, prompts):
    yield from range(len(images))


class Brightness:
    def __init__(self, *anything):
        self.factor = 1.0

    def __call__(self, images, prompts):
        return self.factor * np.asarray(images).mean((1, 2, 3))


instance = Brightness()
partial = functools.partial(lambda factor, images, prompts: factor * images.mean((1, 2, 3)), 1.0)
short = lambda images, prompts: [float(image.mean()) for image in images]  # noqa: E731


def prints(images, prompts):
    print("half a line,", end=" ")
    print("then the rest")
    return images.mean((1, 2, 3))


def changes_its_input(images, prompts):
    found = images.mean((1, 2, 3))
    images[:] = 0
    prompts.clear()
    return found


def tensors(images, prompts):
    import torch

    return torch.tensor(images.mean((1, 2, 3))).requires_grad_()


def list_of_tensors(images, prompts):
    import torch

    return [torch.tensor(float(image.mean()), dtype=torch.bfloat16 if i else None) for i, image in enumerate(images)]


def jax_array(images, prompts):
    return jnp.asarray(images.mean((1, 2, 3)), jnp.bfloat16)


def pair(images, prompts):
    return images.mean((1, 2, 3)).tolist(), {
        "red": images[..., 0].mean((1, 2)),
        "constant": 3,
        "words": list(prompts),
        "text": "x",
    }


def pair_of_none(images, prompts):
    return [1.0] * len(images), {}


def with_metadata(images, prompts, metadata):
    return [float(each.get("count", -1)) for each in metadata]


def with_metadata_by_name(images, prompts, *, metadata):
    return with_metadata(images, prompts, metadata)


def dictionary(images, prompts):
    return {"scores": [1.0] * len(images)}


def nothing(images, prompts):
    images.mean()


def complex_numbers(images, prompts):
    return np.ones(len(images), complex)


def ragged(images, prompts):
    return [[1.0], [1.0, 2.0]]


def huge(images, prompts):
    return [10**400] * len(images)


def too_large(images, prompts):
    return [1e300] * len(images)


def masked(images, prompts):
    return np.ma.masked_less(np.arange(float(len(images))), 1)


def returns_a_coroutine(images, prompts):
    return waits(images, prompts)


def leaves(images, prompts):
    sys.exit(3)


def interrupts(images, prompts):
    raise KeyboardInterrupt


class Odd(BaseException):
    pass


def raises_what_is_no_exception(images, prompts):
    raise Odd("odd\nsecond line")


# ------------------------------------------------------------------------------------------------------------------ JAX


def numpy_inside(images):
    return np.asarray(images).mean((1, 2, 3))


def branches(images):
    return images.mean((1, 2, 3)) if images.mean() > 0 else images.sum((1, 2, 3))


def assigns(images):
    images[0] = 0.0
    return images.mean((1, 2, 3))


def leaves_while_traced(images):
    sys.exit("no licence")


def gives_none(images):
    return None


def gives_a_dict(images):
    return {"scores": images.mean((1, 2, 3))}


def gives_complex(images):
    return images.mean((1, 2, 3)) + 1j


def gives_columns(images):
    return images.mean((1, 2))


def gives_a_list(images):
    return [image.mean() for image in images]


def gives_a_pair(images):
    return images.mean((1, 2, 3)), {"red": images[..., 0].mean((1, 2)), "constant": 3.0, "words": "x"}


def _nothing_there(params, pixels, tokens):
    return pixels["x"], {}


faulty_reward = of_pixels(
    {}, tokenize=no_tokens, pixels=lambda images: images, prepare=lambda image: image, score_prepared=_nothing_there
)
bare_scores = faulty_reward._replace(score=lambda params, images, tokens: images.mean((1, 2, 3)))
