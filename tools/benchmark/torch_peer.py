"""What benchmark.py compares with: the same sampling and training in plain torch, as careful as it gets.

diffusers' UNet and VAE in channels_last, LoRA by peft, both halves of the guidance in one batch (the conditional one
alone where it is 1), prompts encoded once, the step's coefficients computed once, no scheduler objects, gradients for
LoRA alone, torch.utils.checkpoint for each live step of AlignProp and none for the others. The reward is brightness. On
a GPU the networks are bfloat16 with torch's fused attention, the LoRA float32; models of a published size have random
weights. Nothing is compiled.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffexp_jax.pipelines import sizes

EMOJI = Path(__file__).resolve().parents[2] / "diffexp_jax" / "emoji" / "assets" / "model"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
GUIDANCE = 5.0
CHUNK = 32  # samples at once, at most
VAE_DEFAULTS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE_DEFAULTS |= {"force_upcast": False}
# What diffusers' config of SDXL also says; ours takes it from the shapes.
PROJECTION = {"stabilityai/stable-diffusion-xl-base-1.0": {"projection_class_embeddings_input_dim": 2816}}

MID_UNET = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 384, 384),
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "attention_head_dim": 8,
}
MID_VAE = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 256,
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def write_mid(folder: Path) -> None:
    """A random pipeline with the emoji tokenizer."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    torch.manual_seed(0)
    old = pipe.text_encoder.config
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    kept = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    text = CLIPTextModel(CLIPTextConfig(**sizes, **{key: getattr(old, key) for key in kept}))
    parts = {"unet": diffusers.UNet2DConditionModel(**MID_UNET), "vae": diffusers.AutoencoderKL(**MID_VAE)}
    mid = diffusers.StableDiffusionPipeline(
        **parts,
        text_encoder=text,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    mid.save_pretrained(folder)


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
    t_thresh: int,
) -> Callable:
    """A function that does a repetition of the case.

    Args:
      published: {model: its id} of models without files.
      t_thresh: of DiffExp's schedule.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parts = random_parts(published[model]) if model in published else parts_of(EMOJI if model == "emoji" else folder)
    texts = Path(folder, "prompts.txt").read_text().splitlines()
    trainer = Trainer(*parts(texts), size, eta=1.0 if case.startswith("DDPO") else 0.0, t_thresh=t_thresh)
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


def parts_of(path: Any) -> Callable:
    """A function texts -> (UNet, VAE, embeddings [P,L,D], that of "", nothing added) of a pipeline's folder."""

    @torch.no_grad()
    def load(texts):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
        ids = [pipe.tokenizer(t, padding="max_length", return_tensors="pt").input_ids for t in [*texts, ""]]
        *cond, uncond = (pipe.text_encoder(x).last_hidden_state for x in ids)
        return pipe.unet, pipe.vae, torch.cat(cond), uncond, None

    return load


def random_parts(name: str) -> Callable:
    """`parts_of` in a published model's sizes, with random weights and embeddings; SDXL's pooled ones too."""
    _, configs = sizes.PIPELINES[name]

    def make(texts):
        with torch.device(DEVICE):
            unet = diffusers.UNet2DConditionModel.from_config(configs["unet"] | PROJECTION.get(name, {}))
            vae = diffusers.AutoencoderKL.from_config(VAE_DEFAULTS | configs["vae"])
        cond = torch.randn(len(texts) + 1, 77, unet.config.cross_attention_dim)
        added = None
        if unet.config.addition_embed_type == "text_time":
            side = 8.0 * unet.config.sample_size
            added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.tensor([[side, side, 0, 0, side, side]])}
        return unet, vae, cond[:-1], cond[-1:], added

    return make


class Trainer:
    """The model, its LoRA with an optimizer, and the steps' coefficients."""

    def __init__(
        self, unet: Any, vae: Any, cond: Any, uncond: Any, added: Any, size: Any, *, eta: float, t_thresh: int = 1000
    ):
        """Args: as `parts_of`'s function gives them, then the work's size, DDIM's noise, Eq. 7's threshold."""
        self.unet = unet.requires_grad_(False).to(DEVICE, DTYPE, memory_format=torch.channels_last)
        self.vae_dtype = torch.float32 if vae.config.force_upcast else DTYPE
        self.vae = vae.requires_grad_(False).to(DEVICE, self.vae_dtype, memory_format=torch.channels_last)
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4)
        self.n, self.n_steps, self.chunk = size.samples, size.steps, min(size.per_forward, CHUNK)
        rows = torch.as_tensor(np.random.default_rng(0).integers(len(cond), size=self.n))
        self.cond = cond[rows].to(DEVICE, DTYPE)
        self.uncond = uncond.expand(self.n, -1, -1).to(DEVICE, DTYPE)
        self.added = {name: x.to(DEVICE, DTYPE) for name, x in added.items()} if added else None
        channels, side = self.unet.config.in_channels, self.unet.config.sample_size
        self.shape = (channels, side, side)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        a = torch.cumprod(1 - betas, 0)
        self.steps = []
        for i in reversed(range(size.steps)):
            t = i * (1000 // size.steps) + 1
            prev = t - 1000 // size.steps
            a_t, a_prev = float(a[t]), float(a[prev] if prev >= 0 else a[0])
            std = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
            w = 1.0 if t > t_thresh else GUIDANCE
            self.steps.append((torch.tensor(t, device=DEVICE), a_t, a_prev, std, w))

    def mean(self, x: torch.Tensor, step: tuple, both: torch.Tensor) -> torch.Tensor:
        """The mean of p(x_{t-1} | x_t), by the guided noise."""
        t, *_, w = step
        inputs, context = (x, both[: len(x)]) if w == 1 else (torch.cat([x, x]), both)
        inputs = inputs.to(DTYPE).contiguous(memory_format=torch.channels_last)
        added = {name: row.expand(len(inputs), -1) for name, row in self.added.items()} if self.added else None
        with torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda"):  # the LoRA is float32, the network is not
            out = self.unet(inputs, t, context, added_cond_kwargs=added).sample.float()
        if w != 1:
            cond, uncond = out.chunk(2)
            out = w * cond + (1 - w) * uncond
        return self.move(x, out, step)

    def move(self, x: torch.Tensor, eps: torch.Tensor, step: tuple) -> torch.Tensor:
        _, a_t, a_prev, std, _ = step
        x_0 = (x - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        return a_prev**0.5 * x_0 + (1 - a_prev - std**2) ** 0.5 * eps

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        x = (x / self.vae.config.scaling_factor).to(self.vae_dtype).contiguous(memory_format=torch.channels_last)
        return (self.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)

    def chunks(self) -> list[tuple[slice, torch.Tensor]]:
        """Rows of the batch that go through the network at once, and their conditioning, both halves."""
        rows = [slice(i, min(i + self.chunk, self.n)) for i in range(0, self.n, self.chunk)]
        return [(part, torch.cat([self.cond[part], self.uncond[part]])) for part in rows]

    @torch.no_grad()
    def sample_images(self) -> torch.Tensor:
        images = []
        for part, both in self.chunks():
            x = torch.randn(part.stop - part.start, *self.shape, device=DEVICE)
            for step in self.steps:
                x = self.mean(x, step, both)
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
                for step in self.steps:
                    mean = self.mean(x, step, both)
                    x_prev = mean + step[3] * torch.randn_like(x)
                    chain.append((x, x_prev, self.log_prob(x_prev, mean, step[3])))
                    x = x_prev
                kept.append((chain, both))
                rewards.append(self.decode(x).mean((1, 2, 3)))
        r = torch.cat(rewards)
        adv = ((r - r.mean()) / (r.std() + 1e-6)).clamp(-5, 5).split([len(x) for x in rewards])
        per_update = max(len(kept) // updates, 1)
        for first in range(0, len(kept), per_update):
            for (chain, both), a in zip(kept[first : first + per_update], adv[first:], strict=False):
                for step, (x, x_prev, old) in zip(self.steps, chain, strict=True):
                    ratio = torch.exp(self.log_prob(x_prev, self.mean(x, step, both), step[3]) - old)
                    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
                    (loss / (self.n_steps * per_update)).backward()
            self.update()

    def alignprop(self, k: int) -> None:
        """An iteration: the reward's gradient through the last k steps."""
        chunks = self.chunks()
        for part, both in chunks:
            x = torch.randn(part.stop - part.start, *self.shape, device=DEVICE)
            with torch.no_grad():
                for step in self.steps[: self.n_steps - k]:
                    x = self.mean(x, step, both)
            for step in self.steps[self.n_steps - k :]:
                x = checkpoint(self.mean, x, step, both, use_reentrant=False)
            (-self.decode(x).mean() / len(chunks)).backward()
        self.update()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
