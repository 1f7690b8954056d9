"""Scores of images by rewards, each on its published path: in programs on all devices, and on the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from diffexp_jax import parallel
from diffexp_jax.errors import InputError
from diffexp_jax.rewards import Reward, load_reward, parsed_spec
from diffexp_jax.rewards.host import joined, start_by_size

_LARGE = 2**32  # bytes of a batch that is not filled up with copies


def add_scores(in_program: tuple, on_host: tuple) -> tuple:
    """The scores of a reward's two halves, see `Reward.start`: rewards and parts are added, name by name."""
    (total, parts), (more, more_parts) = in_program, on_host
    return total + more, parts | {name: x + parts.get(name, 0.0) for name, x in more_parts.items()}


def batches_by_shape(trees: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Lists of at most `most` trees of arrays that follow each other and can be stacked: of the same shapes."""
    batch: list[Any] = []
    for tree in trees:
        if batch and (len(batch) == most or jax.tree.map(np.shape, tree) != jax.tree.map(np.shape, batch[0])):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def make_embedder(
    reward: Reward, *, batch: int, params: Any = None
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ 3"]]], Float[np.ndarray, "N P"]]:
    """A function images -> the features that such a reward has of them (`Reward.embed`); arguments as `make_scorer`."""

    def embed(params, pixels, tokens):
        del tokens
        features = reward.embed(params, pixels)
        return jnp.zeros(len(features)), {"features": features}

    score = make_scorer(reward._replace(score_prepared=embed, start=None), batch=batch, params=params)
    return lambda images: score(images, np.zeros((len(images), 0), np.int32))["features"]


def make_scorer(
    reward: Reward, *, batch: int, params: Any = None
) -> Callable[[Sequence[UInt8[np.ndarray, "_ _ _"]], Any], dict[str, Float[np.ndarray, " N"]]]:
    """A function (images, the reward's tokens of their prompts) -> {"": the reward, part: each of its parts}.

    What is reported: bytes in, by the reward's published path, which has no gradient. The images may differ in size,
    and have a fourth channel, transparency.

    Args:
      reward: any; one in plain Python is called with up to `batch` images of one size, on each host with its share.
      batch: images at once, over all devices (a multiple of their number). A smaller one is filled up, so that what
        the reward reads of them is compiled once for each of its sizes: for most rewards there is one. Not so where
        that would take gigabytes.
      params: the reward's, on every device (`parallel.share`); None: put there now.
    """
    score_prepared = parallel.pmap(reward.score_prepared)
    params = parallel.share(reward.params) if params is None else params

    def in_program(images, tokens):
        done, start = [], 0
        for pixels in batches_by_shape((reward.prepare(image) for image in images), batch):
            n, size = len(pixels), batch
            if sum(np.asarray(x).nbytes for x in jax.tree.leaves(pixels[0])) * batch > _LARGE:
                size = -(-n // jax.device_count()) * jax.device_count()
            stacked = jax.tree.map(lambda *x: np.stack(x), *pixels, *pixels[-1:] * (size - n))
            rows = np.arange(start, start + size).clip(max=start + n - 1)
            their_tokens = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], tokens)
            scores = parallel.unshard(score_prepared(params, *parallel.shard((stacked, their_tokens), size)))
            done.append(jax.tree.map(lambda x, n=n: x[:n], scores))
            start += n
        return jax.tree.map(lambda *x: np.concatenate(x), *done)

    def score(images, tokens):
        if not len(images):
            return {}
        rows = parallel.own_share(len(images))
        wait = start_by_size(reward, images[rows], jax.tree.map(lambda x: x[rows], tokens), batch=batch)
        total, parts = in_program(images, tokens)
        if reward.start:
            shares = [share for share in parallel.from_each(lambda: wait and wait()) if share]
            total, parts = add_scores((total, parts), joined(shares))
        return {"": total} | parts

    return score


@dataclass(frozen=True)
class Scorers:
    """Rewards that are ready to score: a program of each is compiled once, its weights are on the devices."""

    rewards: Mapping[str, Reward]  # by the names that they are reported under
    score_each: Mapping[str, Callable]  # `make_scorer`'s
    batch: int  # images at once, over all devices

    @classmethod
    def of(cls, rewards: Mapping[str, Reward], *, batch: int, params: Mapping[str, Any] | None = None) -> "Scorers":
        """`params` has the weights, by name, of rewards whose weights are on the devices already."""
        made = {name: make_scorer(x, batch=batch, params=(params or {}).get(name)) for name, x in rewards.items()}
        return cls(dict(rewards), made, batch)

    @classmethod
    def load(cls, specs: Sequence[str], *, batch: int, **options: Any) -> "Scorers":
        """The scorers that specs ask for; options as of `load_reward`.

        Raises:
          InputError: two have the same name; or as `load_reward`.
        """
        names = [parsed_spec(spec).name for spec in specs]
        if len(set(names)) < len(names):
            raise InputError(f"rewards {', '.join(specs)}: two have the same name")
        rewards = {name: load_reward(spec, **options) for name, spec in zip(names, specs, strict=True)}
        return cls.of(rewards, batch=batch)

    def tokens(self, texts: Sequence[str]) -> dict[str, Any]:
        """What each reward reads of prompts, by its name."""
        return {name: reward.tokenize(texts) for name, reward in self.rewards.items()}

    def score(self, images: Any, tokens: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "N"]]:
        """{"reward": [N], "reward/part": [N]}.

        Args:
          images: bytes [H,W,3], which may differ in size: an array or a list.
          tokens: of the images' prompts, by the names of the rewards that are to score them.
        """
        scores = {}
        for name, scorer in self.score_each.items():  # in the order in which they were named
            if name not in tokens:
                continue
            found = scorer(images, tokens[name])
            scores |= {f"{name}/{part}" if part else name: x for part, x in found.items()}
        return scores

    @cached_property
    def features(self) -> tuple[str, Callable] | None:
        """The first reward that has features of images, by name, and a function images -> features [N,F]."""
        name = next((name for name, reward in self.rewards.items() if reward.embed), None)
        return name and (name, make_embedder(self.rewards[name], batch=self.batch))


def check_scores(scores: Mapping[str, Float[np.ndarray, "N"]]) -> None:
    """Raises InputError where a score is not finite."""
    for name, values in scores.items():
        if wrong := int((~np.isfinite(values)).sum()):
            raise InputError(f"reward {name}: {wrong} of {len(values)} scores are not finite (NaN or infinite)")


def summary(values: Float[np.ndarray, "N"]) -> dict[str, float]:
    """The mean, and its standard error as of N independent values."""
    return {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}


def means_of(evaluation: str, scores: Mapping[str, Float[np.ndarray, "N"]]) -> dict[str, float]:
    """The mean of each reward and part, by EVALUATION/REWARD; warns of scores that are not finite, which spoil it."""
    for name, values in scores.items():
        if wrong := int((~np.isfinite(values)).sum()):
            line = "%s/%s: %d of %d scores are not finite (NaN or infinite), and so is their mean"
            logging.warning(line, evaluation, name, wrong, len(values))
    return {f"{evaluation}/{name}": float(values.mean()) for name, values in scores.items()}
