"""The package from Python: load a model, sample and score it, fine-tune it, look at pictures, export.

Each of these does what a program of the command line does, with values in place of files (docs/use/python.md).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from diffexp_jax import backend, config_files, paths, settings, train
from diffexp_jax.errors import InputError, Stopped
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.models.lora import save_lora
from diffexp_jax.report.grids import draw_grid
from diffexp_jax.report.run import lora_prefix
from diffexp_jax.run.checkpoint import NEWEST, read_lora
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings.names import known_keys, no_such_key

__all__ = ["Evaluator", "InputError", "Stopped", "config", "export_lora", "fine_tune", "grid", "load", "metrics"]


def config(name: str = "alignprop", changes: Mapping[str, Any] = {}, **arguments: Any) -> ConfigDict:
    """The settings of configs/NAME.py; all of them may be set on what is returned.

    Args:
      changes: {"optim.lr": 1e-3, ...}, by dotted key.
      arguments: what follows the file's colon on the command line: model, reward, prompts, explore.

    Raises:
      InputError: no such file, argument or setting.
    """
    words = {key: str(x).lower() if isinstance(x, bool) else str(x) for key, x in arguments.items()}
    text = ",".join(f"{key}={value}" for key, value in words.items())
    file, known = config_files.module(name), known_keys()
    for key in changes:
        if key not in known:
            raise InputError(f"config {name!r}: {no_such_key(key)}")
    with config_files.mistakes_in(f"config {name!r}"):
        chosen = file.get_config(text).lock()
        chosen.update_from_flattened_dict(changes)
    return chosen


def load(model: str | Path = "emoji", **options: Any) -> Evaluator:
    """A model to sample and score, by default as diffusers' pipelines sample; `Evaluator.of_run` is a run's.

    Args:
      model: "emoji", "emoji_hard" or "emoji_flow" (shipped), a folder in diffusers' format, a single file, or
        hub:ORGANISATION/NAME.
      options: how it is sampled, by the names of scripts/sample.py's flags: steps (50), guidance (7.5), eta (0),
        negative_prompt, dtype, image_size, w_low, t_thresh, weight_range, ...; and lora (a file or folder), lora_scale,
        batch (images at once, 16).

    Raises:
      InputError: an option that is not accepted, or a file that is missing or does not fit.
    """
    return Evaluator.of_model(model, **options)


def fine_tune(config: ConfigDict, workdir: str | Path) -> Evaluator:
    """Trains from the settings, or continues what `workdir` holds, and gives the tuned model.

    Everything that the run makes is in `workdir`, as on the command line: metrics, checkpoints, pictures, report.html.

    Raises:
      InputError: a setting that cannot work; Stopped: Ctrl-C, after which the same call resumes.
    """
    folder = paths.local("workdir", workdir)
    backend.set_cpu_devices(settings.cpu_devices(settings.parsed(config)))
    train.run(config, folder)
    return Evaluator.of_run(folder)


def metrics(workdir: str | Path) -> dict[str, Float[np.ndarray, " N"]]:
    """A run's metrics.jsonl by column: a number for each iteration from 0 on, NaN where a row has none.

    Row 0 is of the untuned model, before the first iteration: it has evaluations and no rewards.

    Raises:
      InputError: there is no run.
    """
    if not (Path(workdir) / "metrics.jsonl").is_file():
        raise InputError(f"{workdir}: no metrics.jsonl there; wants the workdir of a run")
    rows = read_metrics(Path(workdir))
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}


def grid(
    images: UInt8[np.ndarray, "N H W 3"], captions: Sequence[str] | None = None, *, columns: int | None = None
) -> Image.Image:
    """Images as one picture, row by row, with their captions; a notebook shows it."""
    return draw_grid(np.asarray(images), [""] * len(images) if captions is None else captions, columns=columns)


def export_lora(workdir: str | Path, out: str | Path, *, checkpoint: str | int = NEWEST) -> None:
    """Writes a run's LoRA as a file that diffusers' `load_lora_weights` reads.

    Raises:
      InputError: there is no run, or no such checkpoint.
    """
    chosen, _ = settings.read_config(Path(workdir) / "config.json")
    _, lora = read_lora(Path(workdir), str(checkpoint))
    save_lora(Path(out), lora, alpha=chosen.lora.alpha, prefix=lora_prefix(Path(workdir)))
