"""The third side of benchmark.py: TRL's own DDPOTrainer and AlignPropTrainer, the last release that has them.

    pip install --no-deps trl==0.23.1 pandas datasets    # not among the test's requirements: nothing else needs them

They run as they are: prompts encoded by each call, their schedulers, gradients stored for every step of DDPO one by
one. The batch sizes are as many images at once as the other sides have, precision and threads too.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch_peer import CHUNK, EMOJI, GUIDANCE, peak_memory

__all__ = ["can", "make_work", "peak_memory"]


def can(model: str, case: str) -> bool:
    """Whether TRL does this: its samplers alone are diffusers', random models need files, and guidance is constant."""
    return model in ("emoji", "mid") and case.startswith(("DDPO", "AlignProp")) and not case.endswith("schedule")


def make_work(model: str, folder: str, case: str, size: Any, live_steps: Callable[[str, int, int], int]) -> Callable:
    """A function that does a repetition of the case."""
    accelerate.PartialState()  # TRL's log wants it before its own comes
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    import trl  # after the log can be written

    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(EMOJI if model == "emoji" else folder))
    texts = itertools.cycle(Path(folder, "prompts.txt").read_text().splitlines())
    common = {
        "mixed_precision": None,
        "sample_num_steps": size.steps,
        "sample_guidance_scale": GUIDANCE,
        "train_learning_rate": 1e-4,
        "save_freq": 10**9,
        "project_kwargs": {"project_dir": folder},
    }
    at_once = min(size.per_forward, size.samples, CHUNK)
    if case.startswith("DDPO"):
        share = size.samples // (2 if "two" in case else 1)
        config = trl.DDPOConfig(
            **common,
            sample_eta=1.0,
            sample_batch_size=at_once,
            sample_num_batches_per_epoch=size.samples // at_once,
            train_batch_size=min(at_once, share),
            train_gradient_accumulation_steps=share // min(at_once, share),
            per_prompt_stat_tracking=False,
        )
        trainer = trl.DDPOTrainer(config, brightness, lambda: (next(texts), {}), pipeline)
    else:
        config = trl.AlignPropConfig(
            **common,
            sample_eta=0.0,
            train_batch_size=at_once,
            train_gradient_accumulation_steps=size.samples // at_once,
            truncated_backprop_rand=False,
        )
        trainer = trl.AlignPropTrainer(config, brightness, lambda: (next(texts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)

    def run(repetition):
        if not case.startswith("DDPO"):
            config.truncated_backprop_timestep = size.steps - live_steps(case, size.steps, repetition)
        trainer.step(0, repetition)

    return run


def brightness(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
    """The reward, [B,3,H,W] -> [B], and nothing more."""
    return images.float().mean((1, 2, 3)), {}
