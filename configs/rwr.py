"""RWR: reward-weighted likelihood, in rounds.

    python -m diffexp_jax.train --config configs/rwr.py:model=emoji --workdir runs/rwr

Arguments (all optional): model, reward, prompts, explore; see arguments.py. The settings are those of DDPO's authors
(Black et al. 2024, jannerm/ddpo): an iteration is one of their rounds, of 10,240 images. They fine-tune the whole UNet
at a rate of 1e-5; a LoRA takes 30 times that, as in DDPO's.
"""

from configs.arguments import structured
from configs.models import MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "rwr"
    config.iterations = 10  # rounds
    config.batch.samples = 10240  # images of a round
    config.batch.group = 4  # each is weighed among all of its prompt in the round, about 230 of 45 prompts
    config.optim.lr = 3e-4  # 30 times the published one, which is for all weights
    config.rwr.updates = 160  # of 64 images each
    config.rwr.inner_epochs = 5  # passes over a round's images
    config.rwr.weighting = "exponential"  # "quantile" is the paper's sparse form: 1,024 images, 50 passes
    config.rwr.temperature = 5.0  # in the reward's units: for others than LAION's aesthetic score, see standardised
    config.eval.every = config.log.images_every = config.checkpoint.every = 1  # each round
    if chosen["model"] in MINIATURES:  # only the rate is tuned: docs/evidence/results/rates-emoji_hard.md
        config.iterations = 36  # rounds, of few images: a CPU's minutes
        config.batch.samples = 64
        config.batch.group = 4  # images of each of 16 prompts
        config.optim.lr = 3e-3  # a larger one ruins the model
        config.optim.schedule = "linear"  # to 0 at the end
        config.rwr.updates = 2  # of 32 images each
        config.rwr.inner_epochs = 4  # so a round is eight updates
        config.rwr.standardised = True  # the temperature is in standard deviations of an iteration's rewards
        config.rwr.temperature = 0.5  # one of them weighs exp(2)
        config.eval.every = config.log.images_every = config.checkpoint.every = 12
    return config
