"""The folder of a run: which runs may be in it or resume there, its config.json and identity.json, and its lock."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffexp_jax import command, paths
from diffexp_jax.algorithms.optimizer import learning_rate
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.writing import clear_partials, replaced
from diffexp_jax.run import lease
from diffexp_jax.run.checksums import steps_in
from diffexp_jax.settings import Settings, as_dict, flat, read_config

# What a continued run may change: what it reports, and how its work is split, which moves nothing but last bits.
_FREE = ("eval", "log", "checkpoint", "host_reward", "iterations", "compilation_cache", "cpu_devices", "stop_grace")
_FREE += ("exploration.iterations", "batch.samples_per_forward", "model.remat", "model.scan_layers")
_FREE += ("model.vae_slice",)
# What may be called otherwise as long as it is the same: key -> its name in identity.json
_IDENTIFIED = {"model.path": "model", "model.revision": "model", "model.variant": "model"}
_IDENTIFIED |= {"prompts": "prompts", "model.tokenizer": "prompts", "reward": "reward"}


class Plan(NamedTuple):
    """What a run goes by once it is known what the workdir holds."""

    settings: Settings  # complete: nothing is left that another machine would choose otherwise
    notes: list[str]  # what a continued run does otherwise than it began, in words


def plan(workdir: Path, settings: Settings) -> Plan:
    """Checks, without writing anything, that a run of these settings can be in the workdir, or resume there.

    What a run began with stays: its type of numbers where `model.dtype` is "auto", and its last exploring iteration,
    whatever `iterations` is now.

    Raises:
      InputError: not writable, in use, or it holds a run of another config (the message lists the keys that differ).
    """
    command.check_writable(paths.local("workdir", workdir), "workdir")
    path = workdir / "config.json"
    if not steps_in(workdir / "checkpoints"):  # nothing of a run is there to lose
        return Plan(_complete(settings, settings, settings.model.dtype), [])
    if not path.exists():
        raise InputError(
            f"workdir {workdir}: has checkpoints and no config.json, so of which run is not known; move them away, or "
            "take another --workdir"
        )
    with lease.hold(workdir, create=False):
        old, new_keys = read_config(path)
    identified = _IDENTIFIED if (workdir / "identity.json").is_file() else {}
    old = _complete(old, old, "auto")
    settings = _complete(settings, old, old.model.dtype)
    before, now = _flat(old), _flat(settings)
    differing = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1] and not key.startswith("hosts.")}
    wrong = {key: pair for key, pair in differing.items() if key not in identified and not _is_free(key)}
    if wrong:
        shown = ", ".join(f"{key} ({old} there, {new} here)" for key, (old, new) in list(wrong.items())[:6])
        raise InputError(f"workdir {workdir}: holds a run of another config: {shown}; take another --workdir")
    notes = [f"{key} is {new}, was {old}" for key, (old, new) in differing.items() if key not in identified]
    if "iterations" in differing and "exploration.iterations" not in differing and settings.exploration.enabled:
        explored = settings.exploration.iterations
        notes.append(f"exploration is for the first {explored} iterations, as planned first (exploration.iterations)")
    if settings.iterations != old.iterations and settings.optim.schedule != "constant":
        done = max(steps_in(workdir / "checkpoints"))
        notes.append(_rate_note(settings, old, done))
    if new_keys:
        notes.append(f"the run began in an older version: {', '.join(new_keys)} had the defaults")
    return Plan(settings, notes)


def _complete(settings: Settings, first: Settings, dtype: str) -> Settings:
    """Fills in what depends on the machine (where it is "auto") or on how many iterations were planned first."""
    if settings.model.dtype == "auto":
        settings = replace(settings, model=replace(settings.model, dtype=dtype))
        settings = replace(settings, model=replace(settings.model, dtype=str(settings.dtype)))
    if settings.exploration.iterations is None:
        exploration = replace(settings.exploration, iterations=first.exploring_iterations)
        settings = replace(settings, exploration=exploration)
    return settings


def _rate_note(settings: Settings, old: Settings, done: int) -> str:
    """What another number of iterations makes of the learning rate after so many of them: its schedule is stretched."""

    def rate(planned: Settings) -> str:
        updates = planned.optimizer_updates
        return f"{float(learning_rate(planned.optim, updates)(done * updates // planned.iterations)):.4g}"

    now, before, schedule = settings.iterations, old.iterations, settings.optim.schedule
    return (
        f"the learning rate falls to 0 over {now} iterations in place of {before} (optim.schedule={schedule}): "
        f"after iteration {done} it is {rate(settings)}, as planned first {rate(old)}"
    )


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _flat(settings: Settings) -> dict[str, str]:
    """{dotted key: its value as json}."""
    return {key: json.dumps(value) for key, value in flat(settings).items()}


# --------------------------------------------------------------------------------------------------------------- claim


@contextlib.contextmanager
def claim(
    workdir: Path, settings: Settings, identity: Mapping[str, str], about: Mapping[str, Any] | None = None
) -> Iterator[lease.Lease]:
    """Makes the workdir this run's, for as long as the context lasts: its lock, config.json and identity.json.

    The lease that it gives says whether the workdir is still there, and still this run's.

    `about` goes to about.json: what its report says of the run, see `about.py`.

    Raises:
      InputError: another program has it; it holds a run of other weights or prompts; it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lease.hold(workdir))
            if steps_in(workdir / "checkpoints"):
                _check_identity(workdir, settings, identity)
            _clear_partials(workdir)
            _write_json(workdir / "config.json", as_dict(settings))
            _write_json(workdir / "identity.json", dict(identity))
            if about is not None:
                _write_json(workdir / "about.json", about)
        except OSError as error:
            raise InputError(f"workdir {workdir}: cannot be written ({error.strerror or error})") from None
        yield held


def _clear_partials(workdir: Path) -> None:
    """Removes half-written files of runs that were killed here; the workdir is ours, and nothing is written yet."""
    for folder in (workdir, workdir / "images"):
        clear_partials(folder)
    now = (workdir / lease.LEASE).stat().st_mtime
    for path in workdir.glob(f"{lease.LEASE}.*.partial"):  # of a program that looked at the lease: it lives shortly
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > lease.STALE:
                path.unlink()


def check(held: lease.Lease | None) -> None:
    """Raises OSError where the workdir is gone, or another run's by now; None: another host looks after it."""
    if held:
        held.check()


def _check_identity(workdir: Path, settings: Settings, identity: Mapping[str, str]) -> None:
    path = workdir / "identity.json"
    if not path.exists():  # of an older version: its settings were the same
        return
    stored = read_json(path)
    values = _flat(settings)
    for name, value in identity.items():
        if stored.get(name) != value:
            key = next(key for key, kind in _IDENTIFIED.items() if kind == name)
            raise InputError(
                f"workdir {workdir}: holds a run of another {name}: {key}={values[key]} is {value}, and it began with "
                f"{stored.get(name)}; take another --workdir"
            )


def _write_json(path: Path, content: Any) -> None:
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
