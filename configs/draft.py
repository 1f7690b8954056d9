"""DRaFT: reward gradients through the last sampling steps.

    python -m diffexp_jax.train --config configs/draft.py:model=emoji --workdir runs/draft --config.draft.lv_samples=2

Arguments (all optional): model, reward, prompts, explore; see common.py. The optimizer's settings are AlignProp's. Its
loss is a hundredth of DRaFT's: hence the wide gradient clip here.
"""

from configs import common


def get_config(argument: str | None = None):
    config, chosen = common.structured(argument)
    config.algorithm = "draft"
    config.sampling.guidance = 7.5
    config.sampling.eta = 0.0
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 500.0
    if chosen["model"] == "emoji":
        config.iterations = 60
        config.batch.samples = 32
        config.sampling.guidance = 5.0
        config.optim.lr = 1e-2
        config.optim.grad_clip = 100.0
        config.eval.every = config.log.images_every = config.checkpoint.every = 30
    return config
