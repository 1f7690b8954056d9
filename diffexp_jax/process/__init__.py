"""Sampling processes, one file each: how a network's outputs turn noise into a latent.

To add one, write a file beside this one with a function of the scheduler's config that returns a `Process`, and enter
the names of its schedulers in `PROCESSES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from diffexp_jax import InputError
from diffexp_jax.process import ddim, flow
from diffexp_jax.process.process import Process, gaussian_log_prob, sample_noise

__all__ = ["PROCESSES", "Process", "gaussian_log_prob", "load_process", "sample_noise"]

# By the `_class_name` of scheduler_config.json, the scheduler that a model is published with. What the model was
# trained for decides, not how that scheduler takes its steps.
PROCESSES: dict[str, Callable[[Mapping[str, Any]], Process]] = {
    **dict.fromkeys(ddim.SCHEDULERS, ddim.ddim),
    flow.SCHEDULER: flow.flow_matching,
}


def load_process(config: Mapping[str, Any]) -> Process:
    """The process that a diffusers scheduler config asks for.

    Raises:
      InputError: an unknown scheduler, or one with settings that are not implemented.
    """
    name = config.get("_class_name", ddim.SCHEDULERS[0])
    if name not in PROCESSES:
        raise InputError(f"scheduler_config.json: _class_name={name!r}; accepted: {', '.join(PROCESSES)}")
    return PROCESSES[name](config)
