"""Whether a run's settings go together, and how many devices it makes of a CPU; each mistake is one line."""

from collections.abc import Iterable

from absl import logging
from ml_collections import ConfigDict

from diffexp_jax import backend, paths
from diffexp_jax.errors import InputError
from diffexp_jax.parallel import number_of_hosts
from diffexp_jax.pipelines import SHIPPED
from diffexp_jax.prompts import BARE_NAMES
from diffexp_jax.settings.config import parsed
from diffexp_jax.settings.settings import Settings


def checked(config: ConfigDict | Settings) -> Settings:
    """The settings of a run, which can work: before anything is loaded. It asks how many devices there are.

    Raises:
      InputError: the first setting that cannot.
    """
    settings = parsed(config)
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raises InputError where settings do not go together, or not with the devices that there are."""
    method, group, warmup = settings.method, settings.batch.group, settings.optim.warmup
    method.check(settings.sampling.steps)
    if method.noise_is_for and settings.sampling.eta == 0:
        raise InputError(f"sampling.eta=0: {method.name} needs steps with noise ({method.noise_is_for}); wants more")
    check_noise_steps(settings)
    if method.compares_groups and group < 2:
        raise InputError(f"batch.group={group}: {method.name} compares samples of a prompt; wants at least 2")
    if warmup >= settings.optimizer_updates:
        n = settings.optimizer_updates
        raise InputError(f"optim.warmup={warmup}: wants fewer than the run's {n} optimizer updates")
    _ = settings.split
    warn_of_bare_names(settings.model.path, (settings.prompts, *(settings.eval.prompts if settings.eval.every else ())))


def warn_of_bare_names(model: str, prompts: Iterable[str]) -> None:
    """Warns where a shipped model, which learnt captions alone, is given names: of "snail" it draws anything."""
    for name in prompts if model in SHIPPED else ():
        if name in BARE_NAMES:
            logging.warning("prompts %s: bare names, which %s does not know; wants %s_with_article", name, model, name)


def check_noise_steps(settings: Settings) -> None:
    """Raises InputError where no step adds noise and the method needs some, or a window does not fit."""
    sampling, method = settings.sampling, settings.method
    possible, (first, end) = len(sampling.noise_rule.possible(sampling.steps)), sampling.noise_steps
    if sampling.window > possible:
        raise InputError(
            f"sampling.window={sampling.window}: {possible} of sampling.steps={sampling.steps} may add noise "
            f"(sampling.noise_steps={first},{end}); wants at most so many"
        )
    if sampling.window and method.learns_of_each_step:
        raise InputError(
            f"sampling.window={sampling.window}: {method.name}'s value function is of each step; wants 0, or "
            f"{method.name}.value_baseline=False"
        )
    if method.noise_is_for and not possible:
        raise InputError(
            f"sampling.noise_steps={first},{end}: none of sampling.steps={sampling.steps} adds noise, and "
            f"{method.name} needs some ({method.noise_is_for})"
        )


MOST_CPU_DEVICES = 8


def cpu_devices(settings: Settings) -> int:
    """How many devices a run makes of this host's CPU: `cpu_devices`, else a device per core, to MOST_CPU_DEVICES.

    XLA keeps cores busier by a program on each than by several threads in one. The devices share the weights, but each
    has activations of its own, for which the model's size is a measure: fewer where that, times their number, would
    fill a quarter of the memory, or where the batch does not divide; one for a model that is not on the disk yet.

    Raises:
      InputError: there is no such method, or nothing can be at the model's path.
    """
    if settings.cpu_devices is not None:
        return settings.cpu_devices
    path = paths.local("model.path=", settings.model.path)
    path = SHIPPED.get(settings.model.path, path)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*.safetensors")))
    most = min(backend.cores(), MOST_CPU_DEVICES) if size else 1
    for n in range(most, 1, -1):
        if _divides(settings, n * number_of_hosts()) and 4 * n * size <= backend.host_memory():
            return n
    return 1


def _divides(settings: Settings, devices: int) -> bool:
    try:
        settings.split_among(devices)
    except InputError:
        return False
    return True
