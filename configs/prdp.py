"""PRDP: the log-ratios of a prompt's samples are made to differ as their rewards do.

    python -m diffexp_jax.train --config configs/prdp.py:model=sd15,reward=hpsv2:DIR,prompts=animals --workdir runs/prdp

Arguments (all optional): model, reward, prompts, explore; see arguments.py. The numbers are those of the paper's
experiment with 45 prompts. With 100,000 prompts it has an iteration of 64 prompts x 8 images, one update, beta 3e-6,
clip 1e-4, 1,000 iterations. It trains all weights at 1e-5; LoRA wants about 30 times that, as DDPO's.
"""

from configs.arguments import structured
from configs.models import MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "prdp"
    config.iterations = 100  # each samples anew
    config.batch.group = 16  # images of each prompt: all pairs of them are compared
    config.batch.samples = 512  # 32 prompts
    config.optim.lr = 3e-4  # 30 times the published one, which is for all weights
    config.prdp.inner_epochs = 10  # updates an iteration, each on all pairs
    config.prdp.beta = 3e-5  # the reward is a cosine: differences / beta are about 1,000, so the gradient clip binds
    config.prdp.clip = 1e-6  # how far an update may move a step's log-prob, which is a mean over the latent
    if chosen["model"] in MINIATURES:  # the rate: docs/evidence/results/rates-emoji_hard.md
        config.iterations = 36  # as DDPO there
        config.batch.samples = 64  # 4 prompts; with 16 groups of 4 images some seeds learn nothing
        config.optim.lr = 1e-2  # 3e-2 is faster, and goes wrong with some seeds
        config.optim.schedule = "linear"  # to 0 at the end
        config.prdp.inner_epochs = 2  # with four updates some seeds lose what they had
        config.prdp.beta = 3e-3  # emoji_pickscore is a cosine times 100
        config.prdp.clip = 0.1  # the first updates move a step's log-prob, a mean over 512 numbers, by up to 0.05
        config.prdp.timestep_fraction = 0.6  # of ten steps six: the later ones' gradients are larger, and mostly noise
    return config
