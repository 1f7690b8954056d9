"""SEIKO: few queries of the true reward, a learnt one to climb.

    python -m diffexp_jax.train --config configs/seiko.py:model=emoji,explore=true --workdir runs/seiko

Arguments (all optional): model, reward, prompts, explore; see arguments.py. An iteration is a round: batch.samples
queries, a fit, seiko.updates x seiko.inner_epochs updates.
"""

from configs.arguments import structured
from configs.models import MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument, guidance=7.5)
    config.algorithm = "seiko"
    config.iterations = 4  # rounds
    config.sampling.eta = 1.0  # the path KL wants noise at every step
    config.optim.lr = 1e-3  # this and the next two: as published
    config.optim.weight_decay = 0.1
    config.optim.grad_clip = 5.0
    config.batch.samples = 1024  # the published rounds' queries are 1024, 2048, 4096 and 8192
    config.seiko.truncation = "per_step"  # AlignProp's random one, drawn for each step
    config.seiko.updates = 16  # so an update climbs on 64 samples, as published
    config.seiko.inner_epochs = 1  # so a round is 16 updates; published are 10
    config.seiko.label_noise = 0.1  # of an aesthetic score
    config.eval.every = config.log.images_every = config.checkpoint.every = 1  # each round
    if chosen["model"] in MINIATURES:  # the rate: docs/evidence/results/rates-emoji_hard.md
        config.iterations = 12  # rounds
        config.batch.samples = 64  # queries of a round
        config.optim.lr = 1e-2
        config.optim.grad_clip = 1.0  # as AlignProp there
        config.seiko.updates = 2  # of 32 images each
        config.seiko.inner_epochs = 2  # so a round is four updates
        config.seiko.input_gradient = False  # as AlignProp there
        config.seiko.label_noise = 0.0  # a model answers, not people
        config.seiko.reads_text = config.reward == "emoji_pickscore"  # the image does not tell which object is wanted
        config.seiko.fit_epochs = 100  # published are 300
        config.seiko.fit_batch = 64
        config.seiko.truncation = "fixed"  # the same steps each time
        config.seiko.truncation_k = 5  # of 10 steps
        config.eval.every = config.log.images_every = config.checkpoint.every = 6
    return config
