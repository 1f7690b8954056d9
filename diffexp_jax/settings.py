"""A run's settings before anything is loaded: read, completed, and checked; each mistake is one line."""

import dataclasses
import json
import os
import runpy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from diffexp_jax import backend, paths
from diffexp_jax.algorithms import METHODS, Method
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.limits import Number, check_number, check_text, one_of, positive, settings_of, whole
from diffexp_jax.models.lora import check_targets
from diffexp_jax.models.precision import DTYPES, MATMUL_PRECISIONS
from diffexp_jax.parallel import Split, number_of_hosts, split_batch
from diffexp_jax.pipelines import SHIPPED
from diffexp_jax.prompts.units import UNITS
from diffexp_jax.sampling.ddim import PREDICTION_TYPES, SPACINGS

CHOICES = {
    "model.dtype": ("auto", *DTYPES),
    "model.matmul_precision": MATMUL_PRECISIONS,
    "model.remat": ("none", "step", "block"),
    "model.scheduler.timestep_spacing": (None, *SPACINGS),
    "model.scheduler.prediction_type": (None, *PREDICTION_TYPES),
    "reward_dtype": DTYPES,
    "eval.reward_dtype": DTYPES,
    "optim.schedule": ("constant", "linear", "cosine"),
    "exploration.unit": UNITS,
    "exploration.scope": ("image", "prompt"),
}
# Settings that may name a file or folder
PATHS = ("model.path", "model.tokenizer", "lora.path", "textnorm.contrast", "compilation_cache")
TEXTS = ("sampling.negative_prompt",)  # free words, or ""
GUIDANCE = Number(0.0, 100.0)  # 0 is unconditional, 1 none
# Every setting that is a number or several numbers; those of a method's section are its dataclass' own.
NUMBERS: dict[str, Number] = {
    "seed": whole(0, 2**32 - 1),  # jax takes a seed modulo 2**32
    "iterations": whole(1),
    "cpu_devices": whole(1, 1024, optional=True),
    "model.image_size": whole(8, 8192, optional=True, multiple=8),
    "model.scheduler.steps_offset": whole(0, 1000, optional=True),
    "model.scheduler.shift": Number(0.0, 1e3, above=True, optional=True),
    "model.vae_slice": whole(1),
    "reward_weights": Number(-1e6, 1e6),
    "host_reward.timeout": positive(1e7),
    "host_reward.workers": whole(1, 1024),
    "textnorm.temperature": positive(),
    "batch.samples": whole(1, 2**20),
    "batch.samples_per_forward": whole(1, 2**20),
    "batch.group": whole(1, 2**20),
    "sampling.steps": whole(1, 1000),
    "sampling.guidance": GUIDANCE,
    "sampling.eta": Number(0.0, 1.0),
    "exploration.w_low": GUIDANCE,
    "exploration.t_thresh": whole(0, 1000),
    "exploration.weight_range": Number(0.0, 100.0),
    "exploration.fraction": Number(0.0, 1.0),
    "exploration.iterations": whole(0, optional=True),
    "lora.rank": whole(1, 1024),
    "lora.alpha": positive(),
    "optim.lr": positive(1.0),
    "optim.warmup": whole(0),
    "optim.ema": Number(0.0, 1.0, below=True),
    "optim.b1": Number(0.0, 1.0, below=True),
    "optim.b2": Number(0.0, 1.0, below=True),
    "optim.eps": positive(1.0),
    "optim.weight_decay": Number(0.0, 100.0),
    "optim.grad_clip": positive(),
    "eval.every": whole(0),
    "eval.samples_per_prompt": whole(1, 2**20),
    "eval.samples_per_set": whole(1, 2**20),
    "log.images": whole(0, 4096),
    "log.images_every": whole(0),
    "hosts.number": whole(1, 2**16, optional=True),
    "hosts.index": whole(0, 2**16, optional=True),
    "hosts.initialization_timeout": whole(1, 86400),
    "hosts.heartbeat_timeout": whole(1, 86400),
    "checkpoint.every": whole(1),
    "checkpoint.keep": whole(1, 10**4),
    "stop_grace": Number(0.0, 1e6),
}


def method_numbers() -> dict[str, Number]:
    """What each number of the methods' sections may be, by METHOD.KEY."""
    return {
        f"{method.name}.{key}": setting.accepted
        for method in METHODS.values()
        for key, setting in settings_of(method)
        if isinstance(setting.accepted, Number)
    }


# --------------------------------------------------------------------------------------------------------------- check


def check_config(config: ConfigDict) -> None:
    """Raises InputError for the first setting that cannot work, before anything is loaded."""
    one_of("algorithm", config.algorithm, METHODS)
    check_values(config, NUMBERS)
    method = chosen_method(config)
    method.check(config.sampling.steps)
    if method.needs.step_noise and config.sampling.eta == 0:
        raise InputError(
            f"sampling.eta=0: {method.name} needs steps with noise (their log-probability); wants eta in (0, 1]"
        )
    if method.needs.groups and config.batch.group < 2:
        group = config.batch.group
        raise InputError(f"batch.group={group}: {method.name} compares samples of a prompt; wants at least 2")
    if config.optim.warmup >= (n := optimizer_updates(config)):
        raise InputError(f"optim.warmup={config.optim.warmup}: wants fewer than the run's {n} optimizer updates")
    batch_split(config)


def check_values(config: ConfigDict, keys: Iterable[str], names: Mapping[str, str] = {}) -> None:
    """Checks settings one by one: the numbers among `keys`, the methods' numbers, the words, and that paths are local.

    Args:
      names: what the user sets a key by, where that is not KEY=.

    Raises:
      InputError: a value that is not accepted.
    """
    flat = flatten_dict(config.to_dict(), sep=".")
    numbers = {key: NUMBERS[key] for key in keys if key in NUMBERS}
    numbers |= {key: accepted for key, accepted in method_numbers().items() if key in flat}
    for key in (*numbers, *CHOICES, *TEXTS, "lora.targets"):
        if key not in flat:
            raise InputError(f"config: has no key {key}; configs/base.py has them all")
    for key, accepted in CHOICES.items():
        one_of(key, flat[key], accepted)
    for key in TEXTS:
        check_text(names.get(key, f"{key}="), flat[key])
    check_targets(flat["lora.targets"])
    for key, accepted in numbers.items():
        name, value = names.get(key, f"{key}="), flat[key]
        for number in value if isinstance(value, tuple | list) else [value]:
            check_number(name, number, accepted)
        if key == "exploration.weight_range" and not (isinstance(value, tuple | list) and _is_pair(value)):
            raise InputError(f"{name}{value}: wants (low, high) with low <= high")
    for key in PATHS:
        if flat[key] not in (None, "") or key == "model.path":
            paths.local(names.get(key, f"{key}="), flat[key])
    for method in METHODS.values():
        for key, setting in settings_of(method):
            if (dotted := f"{method.name}.{key}") in flat and not isinstance(setting.accepted, Number):
                setting.check(dotted, flat[dotted])


def _is_pair(numbers: Sequence[float]) -> bool:
    return len(numbers) == 2 and numbers[0] <= numbers[1]


def chosen_method(config: ConfigDict) -> Method:
    """The method with its settings: its defaults, and what the config's section of its name says instead.

    Raises:
      InputError: the section has a key that the method does not know.
    """
    method, section = METHODS[config.algorithm], config.get(config.algorithm, {})
    known = [key for key, _ in settings_of(method)]
    for key in section:
        one_of(f"{method.name}: the key", key, known)
    return method(**section)


def optimizer_updates(config: ConfigDict) -> int:
    """How many optimizer updates a run makes."""
    method = chosen_method(config)
    return config.iterations * method.updates * method.inner_epochs


def batch_split(config: ConfigDict, *, devices: int | None = None) -> Split:
    """How the configured batch is shared out among the devices, by default those that there are.

    Raises:
      InputError: it does not divide.
    """
    b, updates = config.batch, chosen_method(config).updates
    if b.samples % b.group:
        raise InputError(f"batch.samples={b.samples}: wants a multiple of batch.group={b.group}")
    n = jax.device_count() if devices is None else devices
    return split_batch(b.samples, devices=n, per_forward=b.samples_per_forward, updates=updates)


def samples_of_each(n_prompts: int, *, per_prompt: int, per_set: int) -> int:
    """Images of each of an evaluation set's prompts: at least `per_prompt`, and at least `per_set` of the whole set."""
    return max(per_prompt, -(-per_set // n_prompts))


def _divides(config: ConfigDict, devices: int) -> bool:
    try:
        batch_split(config, devices=devices)
    except InputError:
        return False
    return True


MOST_CPU_DEVICES = 8


def cpu_devices(config: ConfigDict) -> int:
    """How many devices a run makes of this host's CPU: `cpu_devices`, else a device per core, to MOST_CPU_DEVICES.

    XLA keeps cores busier by a program on each than by several threads in one. The devices share the weights, but each
    has activations of its own, for which the model's size is a measure: fewer where that, times their number, would
    fill a quarter of the memory, or where the batch does not divide; one for a model that is not on the disk yet.

    Raises:
      InputError: a setting that is not accepted.
    """
    one_of("algorithm", config.algorithm, METHODS)
    check_values(config, NUMBERS)
    if config.cpu_devices is not None:
        return config.cpu_devices
    path = paths.local("model.path=", config.model.path)
    path = SHIPPED.get(config.model.path, path)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*.safetensors")))
    most = min(len(os.sched_getaffinity(0)), MOST_CPU_DEVICES) if size else 1
    for n in range(most, 1, -1):
        if _divides(config, n * number_of_hosts()) and 4 * n * size <= backend.host_memory():
            return n
    return 1


# ---------------------------------------------------------------------------------------------------------------- read


def default_config(sections: Collection[str] = ()) -> ConfigDict:
    """Every setting with its default, of configs/base.py.

    Args:
      sections: of a config; those of methods that configs/base.py does not know are added, with the method's defaults.

    Raises:
      InputError: the package was installed without it.
    """
    path = Path(__file__).parents[1] / "configs" / "base.py"
    if not path.is_file():
        raise InputError(f"{path}: the file is missing; wants the package beside configs/, as in its repository")
    config = runpy.run_path(str(path))["default"]()
    for name, method in METHODS.items():
        if name in sections and name not in config:
            config[name] = dataclasses.asdict(method())
    return config


def read_config(path: Path) -> tuple[ConfigDict, list[str]]:
    """The settings of a run's config.json, and the keys that it lacks: newer ones, which get their defaults.

    Raises:
      InputError: the file is missing, is no json object, or has keys or types of values that no run has.
    """
    content = read_json(path)
    stored = flatten_dict(content, sep=".")
    config = default_config([*content, str(content.get("algorithm"))])
    known = flatten_dict(config.to_dict(), sep=".")
    if unknown := sorted(stored.keys() - known.keys()):
        raise InputError(f"{path}: no run has the keys {', '.join(unknown[:6])}; is it of another version?")
    for key, value in stored.items():
        try:
            if value is None and known[key] is not None:
                raise TypeError
            if isinstance(value, bool) != isinstance(known[key], bool) and known[key] is not None:
                raise TypeError
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except (TypeError, AttributeError, KeyError, ValueError):
            wanted = "another type" if known[key] is None else f"a {type(known[key]).__name__}, as {known[key]!r}"
            raise InputError(f"{path}: {key}={json.dumps(value)}: wants {wanted}") from None
    return config, sorted(known.keys() - stored.keys())
