"""The settings of a run: `Settings` is one frozen value of sections, each with its defaults, ranges and meanings.

`checked` makes it of a config, once; `training.py` and `running.py` have the sections, algorithms/ those of the
methods. configs/base.py is written from them (`listing.py`).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from diffexp_jax.algorithms import Method
from diffexp_jax.parallel import Split
from diffexp_jax.settings.checks import checked, cpu_devices
from diffexp_jax.settings.config import default_config, parsed, read_config
from diffexp_jax.settings.running import samples_of_each
from diffexp_jax.settings.settings import Settings, by_key
from diffexp_jax.settings.to_sample import SAMPLED, sampling_config

__all__ = ["Settings", "by_key", "checked", "cpu_devices", "default_config", "parsed", "read_config"]
__all__ += ["SAMPLED", "samples_of_each", "sampling_config"]


def check_config(config: ConfigDict) -> None:
    checked(config)


def check_values(config: ConfigDict, names: Mapping[str, str] = {}) -> None:
    parsed(config, names)


def chosen_method(config: ConfigDict) -> Method:
    return parsed(config).method


def optimizer_updates(config: ConfigDict) -> int:
    return parsed(config).optimizer_updates


def batch_split(config: ConfigDict, *, devices: int | None = None) -> Split:
    settings = parsed(config)
    return settings.split if devices is None else settings.split_among(devices)
