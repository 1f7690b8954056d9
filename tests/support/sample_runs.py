"""Folders of runs as training leaves them, without training: for tests of reports."""

import json

import numpy as np

from diffexp_jax.report import save_grid
from diffexp_jax.settings import Settings, as_dict, changed

ABOUT = {
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "devices": {"device": "cpu", "devices": "2", "machine": "Linux x86_64"},
    "schedule": {"t": [951, 901, 501, 1], "w_t": [1.0, 1.0, 5.0, 5.0]},
    "prompt": {"pieces": [["a", 1], [" ", 0], ["cat", 2]], "draws": [[2, 1.25]]},
}
CAPTIONS = ("a dog", 'a cat & a <b>"bat"</b>', "a dog")
ITERATIONS = (0, 5, 10)


def pictures(seed, *, size=16, n=3):
    """n pictures [n, size, size, 3] of one colour each, whose red depends on the seed."""
    colours = np.stack([np.full(n, 20 + 20 * seed), 80 * np.arange(n), np.full(n, 40)], -1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (n, size, size, 3))


def rows(iterations=ITERATIONS[-1]):
    """Metrics of that many iterations, evaluated before and after."""
    found = [{"iteration": 0, "eval/animals/emoji_judge": 0.25, "eval/animals/pickscore": 20.0}]
    for i in range(1, iterations + 1):
        found.append({"iteration": i, "reward/mean": 0.1 * i, "grad_norm": 1.0 / i, "reward_queries": 8 * i})
        found[-1] |= {"time/sample": 1.0, "time/train": 0.5, "unet_evaluations": 64 * i}
    found[-1] |= {"eval/animals/emoji_judge": 0.5, "eval/animals/pickscore": 20.5}
    return found


def write_run(folder, changes=(), *, metrics=None, iterations=ITERATIONS, base=0, about=ABOUT):
    """A run with these changes of the settings, a grid for each of the iterations, and metrics; its folder.

    `base` is the seed of its first pictures.
    """
    usual = {"algorithm": "ddpo", "iterations": 10, "exploration.iterations": 8}
    settings = changed(Settings(), usual | dict(changes))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(as_dict(settings)))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (rows() if metrics is None else metrics))
    )
    if about is not None:
        (folder / "about.json").write_text(json.dumps(about))
    for i in iterations:
        save_grid(folder / "images" / f"{i:06d}.png", pictures(base if i == 0 else i), CAPTIONS)
    return folder


ROWS = [
    {"iteration": 0, "eval/animals/emoji_judge": 0.25, "eval/animals/pickscore": 20.0},
    {"iteration": 1, "reward/mean": 0.5, "loss": -0.5, "grad_norm": 1.0, "approx_kl": 0.0, "ratio/clip_fraction": 0.1},
    {"iteration": 2, "reward/mean": 0.7, "loss": -0.7, "grad_norm": 2.0, "eval/animals/emoji_judge": 0.5}
    | {"eval/animals/pickscore": 20.5, "eval/new/pickscore": 1.0},
]


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
