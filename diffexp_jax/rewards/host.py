"""Rewards that are plain Python on the host: JPEG's file size, a vision-language model behind a server, anything.

They have no gradient: methods that need one cannot train on them. They run in threads while the devices sample on.
"""

import copy
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffexp_jax.errors import BadRewardError, InputError, RewardError
from diffexp_jax.rewards import users
from diffexp_jax.rewards.reward import HostFunction, HostScores, Reward, Tokens

_FORMS = {
    "f(images, prompts, metadata)": ["images", "prompts", "metadata"],
    "f(images, prompts)": ["images", "prompts"],
}


def host_reward(function: HostFunction, name: str, *, timeout: float, workers: int) -> Reward:
    """A reward of f(images, prompts) -> N numbers, called in `workers` threads; or of f(images, prompts, metadata).

    `metadata` is a dict for each prompt, of the further columns of its file (`prompts.files`). The function may return
    (scores, {key: N numbers}) too: they are parts of the name "info/KEY", those that its first call gave.

    Its `start(images, tokens)` begins the work (images: bytes [N,H,W,3] or a function that makes them, called in the
    thread) and returns a function that waits for the scores, at most `timeout` seconds. That one raises RewardError if
    the function raised, hung, ended the program, or returned something else than N finite numbers; BadRewardError where
    it has never given any.

    Raises:
      InputError: the function cannot be called so, by its signature.
    """
    if timeout <= 0 or workers < 1:
        raise InputError(f"host_reward: timeout={timeout}, workers={workers}: wants seconds > 0 and at least 1 worker")
    score = _Scoring(function, name, "metadata" in users.check_function(function, name, _FORMS, ""), [])
    ids: dict[tuple[str, str], int] = {}  # of every prompt seen: devices carry numbers, not texts
    prompts: list[str] = []
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        while True:
            future, job = jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # sys.exit too: `wait` raises it again
                future.set_exception(error)

    threads: list[threading.Thread] = []

    def tokenize(texts: Sequence[str]) -> Int[np.ndarray, " N"]:
        tokens = []
        for text in texts:
            tokens.append(ids.setdefault((text, json.dumps(metadata_of(text))), len(ids)))
            prompts.extend([text] if len(prompts) < len(ids) else [])
        return np.array(tokens, np.int32)

    def start(images, tokens) -> Callable[[], HostScores]:
        while len(threads) < workers:  # daemons: one that hangs does not keep the program from ending
            threads.append(threading.Thread(target=work, daemon=True, name=f"reward {name}"))
            threads[-1].start()
        texts = [prompts[i] for i in np.asarray(tokens)]
        future: Future = Future()
        jobs.put((future, lambda: score(images() if callable(images) else images, texts)))

        def wait():
            try:
                return future.result(timeout)
            except TimeoutError as error:
                took = f"no scores after {timeout:g} s (host_reward.timeout)"
                raise RewardError(f"reward {name}: {took}{users.defined(function)}") from error

        return wait

    def nothing(params, images, tokens):
        return jnp.zeros(len(tokens)), {}

    return Reward({}, tokenize, nothing, lambda image: np.zeros(0, np.float32), nothing, start)


class _Scoring(NamedTuple):
    """A function's calls, from any thread."""

    function: HostFunction
    name: str
    with_metadata: bool
    known: list[Sequence[str]]  # once it has given scores: the names of what it says beside them

    def __call__(self, images: Any, texts: Sequence[str]) -> HostScores:
        """Scores on copies of what is given: a function may change them."""
        more = {"metadata": [copy.deepcopy(metadata_of(text)) for text in texts]} if self.with_metadata else {}
        try:
            scores, info = users.apart(self.function(np.array(images), [str(text) for text in texts], **more))
            checked, info = _checked(scores, len(texts)), _numbers_of(info, len(texts))
        except _WrongError as error:
            raise self.failed(f"{error}{users.defined(self.function)}") from error
        except BaseException as error:  # whatever a stranger's function raises
            raise self.failed(users.raised(error)) from error
        self.known.extend([] if self.known else [tuple(info)])
        nothing = np.full(len(texts), np.nan, np.float32)
        return checked, {key: info.get(key, nothing) for key in self.known[0]}

    def failed(self, what: str) -> RewardError:
        """A failure of the run where the function has given scores before; else it cannot be a reward."""
        return (RewardError if self.known else BadRewardError)(f"reward {self.name}: {what}")


def metadata_of(text: str) -> Mapping[str, Any]:
    """What a prompt's file says beside its text."""
    return getattr(text, "metadata", {})


class _WrongError(Exception):
    """What a function returned is no scores."""


def _checked(scores: Any, n: int) -> Float[np.ndarray, " n"]:
    """Scores as float32.

    Raises:
      _WrongError: not n finite numbers.
    """
    try:
        found = users.numbers(scores)
    except Exception:  # of many types: ragged lists, tensors of other libraries
        found = np.array(None)
    if found.shape != (n,) or found.dtype.kind not in "iuf":
        form = users.form(scores if found.dtype == object else found)
        raise _WrongError(f"returned {form}; wants {n} floats: [{n}]")
    with np.errstate(over="ignore"):
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise _WrongError(f"returned {int((~np.isfinite(found)).sum())} of {n} scores that are not finite")
    return found


def _numbers_of(info: Mapping[Any, Any], n: int) -> dict[str, Float[np.ndarray, " n"]]:
    """What is a number, or one for each of the n images, as float32 by the names of parts; the rest is left out."""
    found = {}
    for key, value in users.info_names(info).items():
        try:
            value = users.numbers(value)
        except Exception:  # it is the user's own, and nothing depends on it
            continue
        if value.dtype.kind in "iufb" and value.shape in ((), (n,)):
            found[key] = np.broadcast_to(value.astype(np.float32), (n,))
    return found


def start_by_size(reward: Reward, images: Any, tokens: Tokens, *, batch: int) -> Callable | None:
    """Begins to score images on the host, of which those that follow each other share a call if of one size.

    Args:
      images: bytes [H,W,3], of any sizes; or [H,W,4], of which transparency is left out.

    Returns:
      A function that waits for what `Reward.start` scores of all the images; None where it scores nothing.
    """
    if not reward.start or not len(images):
        return None
    groups = [list(same) for _, same in itertools.groupby(range(len(images)), lambda i: images[i].shape[:2])]
    calls = [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]

    def start(rows: list[int]) -> Callable[[], HostScores]:
        colours = np.stack([images[i][..., :3] for i in rows])
        return reward.start(colours, jax.tree.map(lambda x: np.asarray(x)[rows], tokens))

    waits = [start(rows) for rows in calls]
    return lambda: joined([wait() for wait in waits])


def joined(scores: Sequence[Any], names: Iterable[str] = ()) -> tuple[Float[np.ndarray, " N"], dict[str, np.ndarray]]:
    """`HostScores`, one after another; a part that some lack is NaN there, as are `names` that all lack."""
    names = sorted({*names}.union(*(parts for _, parts in scores)))
    filled = {
        name: [parts.get(name, np.full(len(total), np.nan, np.float32)) for total, parts in scores] for name in names
    }
    return np.concatenate([total for total, _ in scores]), {name: np.concatenate(x) for name, x in filled.items()}
