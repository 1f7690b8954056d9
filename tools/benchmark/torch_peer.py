"""What benchmark.py compares with: the same sampling and training in plain torch, as careful as it gets.

diffusers' networks and VAE in channels_last, LoRA by peft, both halves of the guidance in one batch (the conditional
one alone where it is 1), prompts encoded once, the step's coefficients computed once, no scheduler objects, gradients
for LoRA alone, torch.utils.checkpoint for each live step of AlignProp and none for the others. The reward is
brightness. On a GPU the networks are bfloat16 with torch's fused attention, the LoRA float32; models of a published
size have random weights. Nothing is compiled.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from torch_models import EMOJI, Parts, Step, of_folder, random_parts
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

GUIDANCE = 5.0
CHUNK = 32  # samples at once, at most
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def peak_memory() -> int | None:
    """Bytes that torch has held on the GPU; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def make_work(
    model: str,
    folder: str,
    case: str,
    size: Any,
    live_steps: Callable[[str, int, int], int],
    published: dict[str, str],
    *,
    eta: float,
    t_thresh: int,
) -> Callable:
    """A function that does a repetition of the case.

    Args:
      published: {model: its id} of models without files.
      eta: the noise of the steps.
      t_thresh: of DiffExp's schedule.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    texts = Path(folder, "prompts.txt").read_text().splitlines()
    if model in published:
        parts = random_parts(published[model], texts, DEVICE)
    else:
        parts = of_folder(EMOJI if model == "emoji" else Path(folder), texts)
    trainer = Trainer(parts, size, eta=eta, t_thresh=t_thresh)
    if case.startswith("sampling"):
        work = trainer.sample_images
    elif case.startswith("DDPO"):
        work = partial(trainer.ddpo, updates=2 if "two" in case else 1)
    else:
        work = None

    def run(repetition):
        work() if work else trainer.alignprop(live_steps(case, size.steps, repetition))
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def make_scoring(images: np.ndarray, prompt: str, *, gradient: bool) -> Callable:
    """A function that scores these images [N,H,W,3] in [0,1] by the emoji world's CLIP; gives scores, or a gradient."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = EMOJI.parent / "reward_clip"
    model = CLIPModel.from_pretrained(folder).float()  # its file is float16
    model = model.requires_grad_(False).to(DEVICE, memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    ids = tokenizer([prompt] * len(images), padding="max_length", max_length=length, return_tensors="pt").to(DEVICE)
    mean, std = (torch.tensor(x, device=DEVICE)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)

    def scores(x):
        x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
        found = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=x)
        return model.logit_scale.exp() * (found.text_embeds * found.image_embeds).sum(-1)

    def run(repetition):
        with torch.set_grad_enabled(gradient):
            x = pixels.clone().requires_grad_(gradient)
            result = torch.autograd.grad(scores(x).sum(), x)[0] if gradient else scores(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    return run


class Trainer:
    """The model, its LoRA with an optimizer, and the steps."""

    def __init__(self, parts: Parts, size: Any, *, eta: float, t_thresh: int = 1000):
        """Args: the work's size, the noise of the steps, Eq. 7's threshold."""
        self.network = parts.network.requires_grad_(False).to(DEVICE, DTYPE, memory_format=torch.channels_last)
        self.vae_dtype = torch.float32 if parts.vae.config.force_upcast else DTYPE
        self.vae = parts.vae.requires_grad_(False).to(DEVICE, self.vae_dtype, memory_format=torch.channels_last)
        lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=parts.targets)
        self.network.add_adapter(lora)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4)
        self.n, self.n_steps, self.chunk = size.samples, size.steps, min(size.per_forward, CHUNK)
        rows = torch.as_tensor(np.random.default_rng(0).integers(len(parts.cond["encoder_hidden_states"]), size=self.n))
        self.cond = {name: x[rows].to(DEVICE, DTYPE) for name, x in parts.cond.items()}
        self.uncond = {name: x.expand(self.n, *x.shape[1:]).to(DEVICE, DTYPE) for name, x in parts.uncond.items()}
        self.added = {name: x.to(DEVICE, DTYPE) for name, x in parts.added.items()}
        channels, side = self.network.config.in_channels, self.network.config.sample_size
        self.shape = (channels, side, side)
        self.steps = [(step, 1.0 if step.t > t_thresh else GUIDANCE) for step in parts.steps(size.steps, eta)]

    def mean(self, x: torch.Tensor, step: Step, w: float, both: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean of p(x_{t-1} | x_t), by the guided output."""
        inputs, context = (x, {name: y[: len(x)] for name, y in both.items()}) if w == 1 else (torch.cat([x, x]), both)
        inputs = inputs.to(DTYPE).contiguous(memory_format=torch.channels_last)
        if self.added:
            context = context | {
                "added_cond_kwargs": {name: y.expand(len(inputs), -1) for name, y in self.added.items()}
            }
        t = torch.full((len(inputs),), step.t, device=DEVICE)
        with torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda"):  # the LoRA is float32, the network is not
            out = self.network(inputs, timestep=t, **context).sample.float()
        if w != 1:
            cond, uncond = out.chunk(2)
            out = w * cond + (1 - w) * uncond
        return step.move(x, out)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        x = (x / config.scaling_factor + (config.shift_factor or 0.0)).to(self.vae_dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return (self.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)

    def chunks(self) -> list[tuple[slice, dict[str, torch.Tensor]]]:
        """Rows of the batch that go through the network at once, and their conditioning, both halves."""
        rows = [slice(i, min(i + self.chunk, self.n)) for i in range(0, self.n, self.chunk)]
        return [
            (part, {name: torch.cat([x[part], self.uncond[name][part]]) for name, x in self.cond.items()})
            for part in rows
        ]

    @torch.no_grad()
    def sample_images(self) -> torch.Tensor:
        images = []
        for part, both in self.chunks():
            x = torch.randn(part.stop - part.start, *self.shape, device=DEVICE)
            for step, w in self.steps:
                x = self.mean(x, step, w, both)
            images.append((self.decode(x) * 255).round().byte())
        return torch.cat(images)

    def log_prob(self, x_prev: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
        return (-((x_prev - mean) ** 2) / (2 * std**2)).mean((1, 2, 3))  # less a constant

    def ddpo(self, *, updates: int) -> None:
        """An iteration: samples, rewards, and an optimizer step on each share of the samples."""
        kept, rewards = [], []
        with torch.no_grad():
            for part, both in self.chunks():
                x, chain = torch.randn(part.stop - part.start, *self.shape, device=DEVICE), []
                for step, w in self.steps:
                    mean = self.mean(x, step, w, both)
                    x_prev = mean + step.std * torch.randn_like(x)
                    chain.append((x, x_prev, self.log_prob(x_prev, mean, step.std)))
                    x = x_prev
                kept.append((chain, both))
                rewards.append(self.decode(x).mean((1, 2, 3)))
        r = torch.cat(rewards)
        adv = ((r - r.mean()) / (r.std() + 1e-6)).clamp(-5, 5).split([len(x) for x in rewards])
        per_update = max(len(kept) // updates, 1)
        for first in range(0, len(kept), per_update):
            for (chain, both), a in zip(kept[first : first + per_update], adv[first:], strict=False):
                for (step, w), (x, x_prev, old) in zip(self.steps, chain, strict=True):
                    ratio = torch.exp(self.log_prob(x_prev, self.mean(x, step, w, both), step.std) - old)
                    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
                    (loss / (self.n_steps * per_update)).backward()
            self.update()

    def alignprop(self, k: int) -> None:
        """An iteration: the reward's gradient through the last k steps."""
        chunks = self.chunks()
        for part, both in chunks:
            x = torch.randn(part.stop - part.start, *self.shape, device=DEVICE)
            with torch.no_grad():
                for step, w in self.steps[: self.n_steps - k]:
                    x = self.mean(x, step, w, both)
            for step, w in self.steps[self.n_steps - k :]:
                x = checkpoint(self.mean, x, step, w, both, use_reentrant=False)
            (-self.decode(x).mean() / len(chunks)).backward()
        self.update()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
