"""The settings of configs/ for Stable Diffusion are those that the methods' authors published."""

import importlib

import pytest

from diffexp_jax.settings import flat, parsed

FLOW = "model=sd35m,reward=pickscore:x,prompts=animals"
PUBLISHED = {  # config and argument -> what its authors' code or paper has
    ("rwr", "model=sd15,reward=aesthetic:x,prompts=animals"): {  # jannerm/ddpo, a_animals_rwr
        "iterations": 10,
        "batch.samples": 10240,
        "rwr.updates": 160,  # of 64 images
        "rwr.inner_epochs": 5,
        "rwr.temperature": 5.0,
        "rwr.weighting": "exponential",
        "rwr.per_prompt": True,
        "rwr.guided": True,
        "sampling.steps": 50,
        "sampling.eta": 1.0,
        "sampling.guidance": 5.0,
        "optim.weight_decay": 1e-4,
        "optim.grad_clip": 1.0,
        "optim.eps": 1e-8,
    },
    ("seiko", "model=sd15,reward=aesthetic:x,prompts=animals"): {  # zhaoyl18/SEIKO
        "iterations": 4,
        "sampling.steps": 50,
        "sampling.eta": 1.0,
        "sampling.guidance": 7.5,
        "seiko.label_noise": 0.1,
        "seiko.kl_weight": 0.01,
        "seiko.loss_coefficient": 0.01,
        "seiko.truncation": "per_step",
        "seiko.fit_epochs": 300,
        "seiko.fit_batch": 512,
        "seiko.fit_lr": 1e-3,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.1,
        "optim.grad_clip": 5.0,
        "lora.rank": 4,
    },
    ("nft", FLOW): {  # NVlabs/DiffusionNFT
        "batch.samples": 48 * 24,
        "batch.group": 24,
        "nft.strength": 1.0,
        "nft.kl_weight": 1e-4,
        "nft.timestep_fraction": 0.99,
        "sampling.guidance": 1.0,
        "sampling.eta": 0.0,
        "eval.steps": 40,
        "optim.lr": 3e-4,
        "optim.ema": 0.9,
        "lora.rank": 32,
        "lora.alpha": 64.0,
    },
    ("awm", FLOW): {  # scxue/advantage_weighted_matching
        "batch.samples": 24 * 24,
        "batch.group": 24,
        "awm.timesteps": 6,
        "awm.kl_weight": 1e-4,
        "awm.average_weight": 1.0,
        "sampling.guidance": 1.0,
        "sampling.eta": 0.0,
        "eval.steps": 40,
        "optim.lr": 3e-4,
        "optim.ema": 0.99,
        "lora.rank": 32,
        "lora.alpha": 64.0,
    },
    ("grpo", FLOW): {  # yifan123/flow_grpo: first recipe's noise, clip and groups, fast recipe's steps
        "batch.samples": 48 * 24,
        "batch.group": 24,
        "ddpo.updates": 2,
        "ddpo.clip": 1e-4,
        "ddpo.advantage": "group_mean",
        "sampling.steps": 10,
        "sampling.noise": "sde",
        "sampling.eta": 0.7,
        "sampling.noise_steps": (0, 5),
        "sampling.window": 3,
        "sampling.guidance": 1.0,
        "eval.steps": 40,
        "eval.eta": 0.0,
        "optim.lr": 3e-4,
        "lora.rank": 32,
        "lora.alpha": 64.0,
        "model.t5_tokens": 128,
        "model.image_size": 512,
    },
}


@pytest.mark.parametrize("config, argument", PUBLISHED, ids=[config for config, _ in PUBLISHED])
def test_published(config, argument):
    settings = parsed(importlib.import_module(f"configs.{config}").get_config(argument))
    found, expected = flat(settings), PUBLISHED[config, argument]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("method", ["nft", "awm", "grpo"])
@pytest.mark.parametrize("model, steps", [("flux", 6), ("flux_schnell", 4)])
def test_few_steps_stay_few(method, model, steps):
    """Of models that were distilled; their guidance is an input, or none."""
    argument = f"model={model},reward=pickscore:x,prompts=animals"
    settings = parsed(importlib.import_module(f"configs.{method}").get_config(argument))
    assert (settings.sampling.steps, settings.sampling.guidance) == (steps, 3.5)
    assert method == "grpo" or settings.method.guided  # the loss is of the guidance that the images are sampled with


def test_a_round_of_rwr_is_shared_by_sixteen_devices():
    """Each update is of whole groups on every device."""
    settings = parsed(
        importlib.import_module("configs.rwr").get_config("model=sd15,reward=aesthetic:x,prompts=animals")
    )
    assert settings.batch.samples % (16 * settings.method.updates * settings.batch.group) == 0
