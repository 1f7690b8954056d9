"""Sampling: how a network's outputs turn noise into a latent, step by step.

`process.py` says what a step is, and has a file beside it for each kind (`ddim.py`, `flow.py`); `guidance.py` has the
network under guidance, `gradient.py` the network in a differentiable chain, `chain.py` the loop. To add a process,
write a file beside these with a function of the scheduler's config that returns a `Process`, and enter the names of its
schedulers in `PROCESSES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import shown
from diffexp_jax.sampling import ddim, flow
from diffexp_jax.sampling.chain import (
    START,
    Trajectory,
    check_latents,
    first_noisy,
    initial_latents,
    moved,
    noisy_rows,
    rollout,
    start_of,
    step_log_prob,
    step_noise,
    transition_kl,
    transition_log_prob,
)
from diffexp_jax.sampling.gradient import LiveDenoise, differentiable, fixed
from diffexp_jax.sampling.guidance import (
    CLASSIFIER_FREE,
    EMBEDDED,
    Context,
    Denoise,
    Guidance,
    Network,
    Scales,
    Steps,
    classifier_free_guidance,
)
from diffexp_jax.sampling.noise import Noise
from diffexp_jax.sampling.process import Process, gaussian_kl, gaussian_log_prob, sample_noise

__all__ = ["PROCESSES", "Noise", "Process", "gaussian_kl", "gaussian_log_prob", "load_process", "sample_noise"]
__all__ += ["CLASSIFIER_FREE", "EMBEDDED", "Context", "Denoise", "Guidance", "Network", "Scales", "Steps"]
__all__ += ["classifier_free_guidance", "LiveDenoise", "differentiable", "fixed"]
__all__ += [
    "START",
    "Trajectory",
    "check_latents",
    "first_noisy",
    "initial_latents",
    "moved",
    "noisy_rows",
    "rollout",
    "start_of",
    "step_log_prob",
    "step_noise",
    "transition_kl",
    "transition_log_prob",
]

# By the `_class_name` of scheduler_config.json, the scheduler that a model is published with. What the model was
# trained for decides, not how that scheduler takes its steps.
PROCESSES: dict[str, Callable[..., Process]] = {
    **dict.fromkeys(ddim.SCHEDULERS, ddim.ddim),
    flow.SCHEDULER: flow.flow_matching,
}


# What the user may set otherwise than the file says: model.scheduler.KEY.
SETTINGS = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "prediction_type", "rescale_betas_zero_snr")
SETTINGS += ("clip_sample", "shift")
_KEYS = {ddim.ddim: ddim.KEYS, flow.flow_matching: flow.KEYS}


def load_process(
    config: Mapping[str, Any], overrides: Mapping[str, Any] = {}, *, old_configs: bool = False, **of_flow: Any
) -> Process:
    """The process that a diffusers scheduler config asks for.

    Args:
      config: scheduler_config.json.
      overrides: settings that are to be otherwise, the user's model.scheduler.KEY.
      old_configs: whether to correct the file as diffusers' StableDiffusionPipeline does.
      of_flow: arguments of `flow.flow_matching`, for pipelines that have no other process.

    Raises:
      InputError: an unknown scheduler, or one with settings that are not implemented, or a setting that it has not.
    """
    name = config.get("_class_name", ddim.SCHEDULERS[0])
    if not isinstance(name, str) or name not in PROCESSES:
        raise InputError(f"scheduler_config.json: _class_name={shown(name)}; accepted: {', '.join(PROCESSES)}")
    make = PROCESSES[name]
    if of_flow and make is not flow.flow_matching:
        raise InputError(f"scheduler_config.json: _class_name={shown(name)}; such a model wants {flow.SCHEDULER}")
    if make in _KEYS:
        for key in overrides:
            if key not in _KEYS[make].read and key not in _KEYS[make].only:
                raise InputError(f"model.scheduler.{key}: the model's {name} has no such setting; wants None")
    corrections = ddim.CORRECTIONS if old_configs and name in ddim.SCHEDULERS else {}
    try:
        return make({**config, **corrections, **overrides}, **of_flow)
    except InputError as error:
        for key in SETTINGS:
            if f" {key}=" in str(error):
                raise InputError(f"{error}; model.scheduler.{key} overrides the file") from None
        raise
