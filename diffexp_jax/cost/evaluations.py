"""How often a method evaluates the network."""

from diffexp_jax.settings import Settings


def evaluations_of(settings: Settings, sampling: float) -> dict[str, float]:
    """The network's evaluations for each sample of an iteration, of `Method.passes`; a guided one is of two halves.

    Args:
      sampling: evaluations of a chain.
    """
    method, n_steps = settings.method, settings.sampling.steps
    updating = sampling if method.trains_guided else n_steps
    if method.needs.step_noise:  # the other steps learn nothing
        updating *= settings.sampling.noise_rule.n_noisy(n_steps) / n_steps
    passes = method.passes(n_steps, settings.full_float32)
    return {why: n * (sampling if why.startswith("to sample") else updating) for why, n in passes.items()}
