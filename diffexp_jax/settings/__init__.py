"""The settings of a run: `Settings` is one frozen value of sections, each with its defaults, ranges and meanings.

`checked` makes it of a config, once. `training.py` and `running.py` have the sections, algorithms/ those of the
methods, parallel/ that of the hosts. tools/settings/write_base.py writes configs/base.py from them.
"""

from diffexp_jax.settings.checks import check, checked, cpu_devices, warn_of_bare_names
from diffexp_jax.settings.config import as_dict, changed, flat, parsed, read_config
from diffexp_jax.settings.settings import Settings, by_key
from diffexp_jax.settings.to_sample import SAMPLED, sampling_settings

__all__ = ["SAMPLED", "Settings", "as_dict", "by_key", "changed", "check", "checked", "cpu_devices", "flat", "parsed"]
__all__ += ["read_config", "sampling_settings", "warn_of_bare_names"]
