"""GRPO as flow-matching models are trained by it: DDPO with groups, Flow-GRPO's advantage, and noise in a few steps.

    python -m diffexp_jax.train --config configs/grpo.py:model=emoji,explore=true --workdir runs/grpo

Arguments (all optional): model, reward, prompts, explore; see arguments.py. The settings are Flow-GRPO's (Liu et al.
2025, arXiv 2505.05470, and its code) for Stable Diffusion 3.5 with PickScore. From its fast recipe are the noise in
three of the first five of ten steps, no guidance in sampling and training, and no KL. From the first one are the rule
of the noise, the clip and the groups: the fast one's noise (cps, 0.8) comes with a clip of 1e-5 of another log-prob
than a Gaussian's. Evaluation is by 40 steps without noise. Without guidance DiffExp's weights of words alone explore.
The first recipe has guidance, and noise in all steps but the last:

    --config.sampling.guidance=4.5 --config.sampling.noise_steps=0,9 --config.sampling.window=0
    --config.ddpo.kl_weight=0.04 --config.ddpo.kl_by_length=True
"""

from configs.arguments import structured
from configs.models import DISTILLED, MINIATURES, POLICY_RATES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "ddpo"
    config.ddpo.advantage = "group_mean"
    config.ddpo.updates = 2
    config.ddpo.clip = 1e-4
    config.optim.ema = 0.987  # what is evaluated is this average; Flow-GRPO's is 0.9 every eight updates
    config.sampling.window = 3
    config.eval.eta = 0.0  # the ODE, as people sample
    if chosen["model"] in MINIATURES:
        config.iterations = 36
        config.batch.group = 4
        config.optim.lr = POLICY_RATES[chosen["model"]]
        config.optim.schedule = "linear"
        config.ddpo.clip = 3e-3  # of a mean over 512 numbers: as wide as 1e-4 of SD 1.5's mean over 16,384
        config.sampling.noise_steps = (0, config.sampling.steps // 2)
    else:
        config.batch.samples = 1152
        config.batch.group = 24  # of 48 prompts
        config.optim.lr = 3e-4
        config.lora.rank = 32
        config.lora.alpha = 64.0
        if chosen["model"] in DISTILLED:  # few steps
            config.sampling.noise_steps = (0, 3)
            config.eval.steps = 28 if chosen["model"] == "flux" else None  # schnell is made for four
        else:
            config.sampling.steps = 10
            config.sampling.noise_steps = (0, 5)
            config.sampling.guidance = 1.0
            config.eval.steps = 40
    return config
