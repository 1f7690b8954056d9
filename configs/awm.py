"""AWM: advantage-weighted matching, a policy gradient by the loss of pretraining.

    python -m diffexp_jax.train --config configs/awm.py:model=emoji --workdir runs/awm

Arguments (all optional): model, reward, prompts, explore; see arguments.py. The settings are those of its authors
(scxue/advantage_weighted_matching) for Stable Diffusion 3.5 with PickScore: neither sampling nor training has guidance,
so that DiffExp's weights of words alone explore. DDIM's 25 steps take the place of 14 of a solver of higher order.
"""

from configs.arguments import structured
from configs.models import DISTILLED, MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "awm"
    config.sampling.eta = 0.0  # any sampler does: nothing is learnt of its steps
    config.optim.lr = 3e-4  # as published
    config.awm.timesteps = 6  # of each image, drawn at random
    config.awm.kl_weight = 1e-4  # 1e-3 for GenEval, 3e-3 for text in images
    if chosen["model"] in MINIATURES:  # only the rate is tuned: docs/evidence/results/rates-emoji_hard.md
        config.iterations = 36  # 768 queries, a third of these, teach nine of ten objects
        config.batch.samples = 64
        config.batch.group = 4  # of 16 prompts
        config.optim.lr = 1e-2
        config.optim.schedule = "linear"  # to 0 at the end
        config.eval.every = config.log.images_every = config.checkpoint.every = 12
    else:
        config.batch.samples = 576  # images of an iteration
        config.batch.group = 24  # of 24 prompts
        if chosen["model"] not in DISTILLED:  # few steps, and guidance as an input
            config.sampling.steps = 25  # of DDIM
            config.sampling.guidance = 1.0  # none
            config.eval.steps = 40  # as published
        else:
            config.awm.guided = True  # it reads its guidance as an input: that which it is sampled with
        config.lora.rank = 32  # this, alpha and the average as published
        config.lora.alpha = 64.0  # a factor of 2
        config.optim.ema = 0.99  # what is evaluated is this average
    return config
