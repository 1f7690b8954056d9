"""Entropy-regularised control: the reward's gradient through the chain less the KL of the paths.

    python -m diffexp_jax.train --config configs/entropy.py:model=emoji --workdir runs/entropy

Arguments (all optional): model, reward, prompts, explore; see arguments.py. Sampling's and the optimizer's settings are
AlignProp's, as in its authors' next paper (SEIKO), but for the noise: the KL is between the steps of chains with noise.
"""

from configs import alignprop


def get_config(argument: str | None = None):
    config = alignprop.get_config(argument)
    config.algorithm = "entropy"
    config.sampling.eta = 1.0  # noise at every step
    config.optim.grad_clip /= config.alignprop.loss_coefficient  # which this loss does not have
    config.entropy.alpha = 1.0  # of the reward, for a KL that is a mean over a latent's numbers
    config.entropy.input_gradient = config.alignprop.input_gradient  # False in the miniatures: see alignprop.py
    return config
