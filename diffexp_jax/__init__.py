"""Reward fine-tuning of text-to-image diffusion models in JAX, with the exploration method of DiffExp."""


class InputError(ValueError):
    """Bad input from the user: one clear line, exit code 2."""


class HostError(RuntimeError):
    """Another host of the run failed, or has gone: one clear line, exit code 1."""


class RewardError(RuntimeError):
    """A reward of the user's failed: one clear line, exit code 1, and what was trained is saved."""


class BadRewardError(RewardError, InputError):
    """A function that cannot be a reward, as it is called first: one clear line, exit code 2, and the same is saved."""
