"""DPOK: policy gradient with a penalty for leaving the untuned model.

    python -m diffexp_jax.train --config configs/dpok.py:model=emoji --workdir runs/dpok

Arguments (all optional): model, reward, prompts, explore; see arguments.py. For a single prompt the paper's own command
has these numbers; for many prompts it has reward_weight 1000 and kl_weight 0.1.

At the rate of 1e-5 a weight moves by at most about 1e-5 an update, so a run needs many. The published one makes 10,000
for 20,000 images. So does this one: 313 iterations of 64 images, 32 updates each. 64 images divide so on one or two
devices; n devices want `--config.batch.samples` to be 32 n.
"""

from configs.arguments import structured
from configs.models import MINIATURES


def get_config(argument: str | None = None):
    config, chosen = structured(argument, guidance=7.5)
    config.algorithm = "dpok"
    config.optim.lr = 1e-5
    config.optim.weight_decay = 0.0
    config.optim.grad_clip = 0.1
    config.iterations = 313
    config.dpok.updates = 32  # each of two images' states
    config.dpok.value_steps = 6  # one for 10 images, as published
    if chosen["model"] in MINIATURES:  # as DDPO there
        config.iterations = 60
        config.optim.lr = 6e-3
        config.dpok.clip = 3e-3
        config.dpok.updates = 2
        config.dpok.value_steps = 5  # of a run with a fifth of the images
    return config
