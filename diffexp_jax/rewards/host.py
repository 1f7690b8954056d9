"""Rewards that are plain Python on the host: JPEG's file size, a vision-language model behind a server, anything.

They have no gradient: methods that need one cannot train on them. They run in threads while the devices sample on.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffexp_jax import InputError, RewardError
from diffexp_jax.rewards.reward import HostFunction, HostScores, Reward, Tokens


def host_reward(function: HostFunction, name: str, *, timeout: float, workers: int) -> Reward:
    """A reward of f(images, prompts) -> N floats, called in `workers` threads.

    Its `start(images, tokens)` begins the work (images: bytes [N,H,W,3] or a function that makes them, called in the
    thread) and returns a function that waits for the scores, at most `timeout` seconds. That one raises RewardError if
    the reward raised, hung, or returned something else than N finite numbers.
    """
    if timeout <= 0 or workers < 1:
        raise InputError(f"host_reward: timeout={timeout}, workers={workers}: wants seconds > 0 and at least 1 worker")
    ids: dict[str, int] = {}  # of every prompt seen: devices carry numbers, not texts
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        while True:
            future, job = jobs.get()
            try:
                future.set_result(job())
            except Exception as error:  # whatever a stranger's function raises: `wait` raises it again
                future.set_exception(error)

    threads: list[threading.Thread] = []

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, " N"]:
        return np.array([ids.setdefault(text, len(ids)) for text in texts], np.int32)

    def start(images, tokens) -> Callable[[], HostScores]:
        while len(threads) < workers:  # daemons: one that hangs does not keep the program from ending
            threads.append(threading.Thread(target=work, daemon=True, name=f"reward {name}"))
            threads[-1].start()
        prompts = list(ids)
        texts = [prompts[i] for i in np.asarray(tokens)]
        future: Future = Future()
        jobs.put((future, lambda: function(images() if callable(images) else images, texts)))

        def wait():
            try:
                return _checked(future.result(timeout), len(texts)), {}
            except TimeoutError as error:
                took = str(error) or f"no scores after {timeout:g} s (host_reward.timeout)"
                raise RewardError(f"reward {name}: {took}") from error
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                raise RewardError(f"reward {name}: {type(error).__name__}: {first}") from error

        return wait

    def nothing(params, images, tokens):
        return jnp.zeros(len(tokens)), {}

    return Reward({}, tokenize, nothing, lambda image: np.zeros(0, np.float32), nothing, start)


def _checked(scores, n: int) -> Float[np.ndarray, " n"]:
    """Scores as float32.

    Raises:
      ValueError: not n finite numbers.
    """
    scores = np.asarray(scores)
    if scores.shape != (n,) or not np.issubdtype(scores.dtype, np.number):
        raise ValueError(f"returned {scores.dtype} of shape {list(scores.shape)}; wants {n} floats: [{n}]")
    scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError(f"returned {int((~np.isfinite(scores)).sum())} of {n} scores that are not finite")
    return scores


def start_by_size(reward: Reward, images: Any, tokens: Tokens, *, batch: int) -> Callable | None:
    """Begins to score images on the host, of which those that follow each other share a call if of one size.

    Args:
      images: bytes [H,W,3], of any sizes.

    Returns:
      A function that waits for what `Reward.start` scores of all the images; None where it scores nothing.
    """
    if not reward.start or not len(images):
        return None
    groups = [list(same) for _, same in itertools.groupby(range(len(images)), lambda i: images[i].shape)]
    calls = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]

    def start(rows: list[int]) -> Callable[[], HostScores]:
        return reward.start(np.stack([images[i] for i in rows]), jax.tree.map(lambda x: np.asarray(x)[rows], tokens))

    waits = [start(rows) for rows in calls]
    return lambda: jax.tree.map(lambda *x: np.concatenate(x), *[wait() for wait in waits])
