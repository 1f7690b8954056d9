"""DDPO: policy gradient with a clipped importance ratio.

    python -m diffexp_jax.train --config configs/ddpo.py:model=emoji,explore=true --workdir runs/ddpo

Arguments (all optional): model, reward, prompts, explore; see arguments.py.
"""

from configs.arguments import structured
from configs.models import MINIATURES, POLICY_RATES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "ddpo"
    if chosen["model"] in MINIATURES:
        config.iterations = 36
        config.optim.lr = POLICY_RATES[chosen["model"]]
        config.optim.schedule = "linear"
        config.ddpo.timestep_fraction = 0.8  # few steps: the second-to-last has 25 times the first's gradient
        config.ddpo.clip = 3e-3  # of a mean over 512 numbers: as wide as 1e-4 of SD 1.5's mean over 16,384
        config.ddpo.stats_min_count = 4  # each of the 135 prompts comes up every other iteration
    return config
