"""DiffusionNFT: towards good images and away from bad ones, on the forward process.

    python -m diffexp_jax.train --config configs/nft.py:model=emoji --workdir runs/nft

Arguments (all optional): model, reward, prompts, explore; see arguments.py. The settings are those of its authors
(NVlabs/DiffusionNFT) for Stable Diffusion 3.5 with PickScore or HPSv2: neither sampling nor training has guidance,
so that DiffExp's weights of words alone explore. DDIM's 25 steps take the place of ten of a second-order solver.
"""

from configs.arguments import structured
from configs.models import DISTILLED, MINIATURES, NFT_RATES


def get_config(argument: str | None = None):
    config, chosen = structured(argument)
    config.algorithm = "nft"
    config.sampling.eta = 0.0  # any sampler does: nothing is learnt of its steps
    config.optim.lr = 3e-4  # as published
    config.nft.strength = 1.0  # 0.1 for several rewards at once
    config.nft.kl_weight = 1e-4  # of the squared distance to the untuned model's output
    if chosen["model"] in MINIATURES:
        config.iterations = 10  # nine of ten objects are learnt by then
        config.batch.samples = 64
        config.batch.group = 4  # of 16 prompts
        config.optim.lr = NFT_RATES[chosen["model"]]
        config.nft.timestep_fraction = 0.3  # timesteps of each image that it is trained at, of all steps
        config.eval.every = config.log.images_every = config.checkpoint.every = 5
    else:
        config.batch.samples = 1152  # images of an iteration
        config.batch.group = 24  # of 48 prompts
        if chosen["model"] not in DISTILLED:  # few steps, and guidance as an input
            config.sampling.steps = 25  # of DDIM
            config.sampling.guidance = 1.0  # none
            config.eval.steps = 40  # as published
        else:
            config.nft.guided = True  # it reads its guidance as an input: that which it is sampled with
        config.lora.rank = 32  # this, alpha and the average as published
        config.lora.alpha = 64.0  # a factor of 2
        config.optim.ema = 0.9  # what is evaluated is this average
    return config
