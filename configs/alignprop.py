"""AlignProp: reward gradients through the sampling chain.

    python -m diffexp_jax.train --config configs/alignprop.py:model=emoji,explore=true --workdir runs/alignprop

Arguments (all optional): model, reward, prompts, explore; see arguments.py.
"""

from configs.arguments import structured
from configs.models import MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument, guidance=7.5)
    config.algorithm = "alignprop"
    config.sampling.eta = 0.0
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 5.0
    if chosen["model"] in MINIATURES:  # some minutes on two cores
        # Of as many images, many small steps learn more than few large ones
        config.iterations = 48
        config.batch.samples = 32
        config.optim.lr = 1e-2  # twice that learns sooner, but some runs lose it again
        config.optim.grad_clip = 1.0  # gradients are about 0.03; a rare one of 8 would make Adam crawl for the rest
        # Through the later networks, as published, chance decides such a run (docs/evidence/results/input_gradient.md)
        config.alignprop.input_gradient = False
        config.eval.every = config.log.images_every = config.checkpoint.every = 24
    return config
