"""DRaFT: reward gradients through the last sampling steps.

    python -m diffexp_jax.train --config configs/draft.py:model=emoji --workdir runs/draft --config.draft.lv_samples=2

Arguments (all optional): model, reward, prompts, explore; see arguments.py. Sampling's and the optimizer's settings are
AlignProp's.
"""

from configs import alignprop


def get_config(argument: str | None = None):
    config = alignprop.get_config(argument)
    config.algorithm = "draft"
    config.optim.grad_clip /= config.alignprop.loss_coefficient  # which DRaFT's loss does not have
    return config
