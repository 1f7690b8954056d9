"""Samples images from a model, with or without a LoRA, and writes them as PNG files and a captioned grid.

python scripts/sample.py --model emoji --prompt "a dog riding a bike" --lora runs/quickstart --out samples
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from diffexp_jax import InputError, command, evaluation, parallel, report
from diffexp_jax.diffusion import make_steps, timesteps
from diffexp_jax.models import stable_diffusion
from diffexp_jax.models.lora import load_lora, scaled
from diffexp_jax.problem import load_schedule
from diffexp_jax.prompts import load_prompts
from diffexp_jax.sampling import initial_latents, rollout


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="emoji", help="emoji, a folder in the diffusers pipeline format, or a hub id")
    add("--revision", help="of the hub's repository: a branch, tag or commit")
    add("--variant", help="fp16: take the half-precision weight files")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights and networks")
    add("--prompt", action="append", default=[], help="a prompt (repeat for several)")
    add("--prompts", help="a built-in prompt set or a file, after the --prompt ones")
    add("--lora", help="a LoRA file, or the workdir of a run")
    add("--steps", type=int, default=50, help="DDIM steps, 1..1000")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1 is none")
    add("--eta", type=float, default=0.0, help="noise of the DDIM steps, 0..1")
    add("--seed", type=int, default=0)
    add("--latents", help="float32 .npy [N,h,w,c], standard normal: the noise to start from")
    add("--batch", type=int, default=16, help="images at once")
    add("--image_size", type=int, help="pixels of a side (default: what the model was trained at)")
    add("--out", required=True, help="folder for NNNN.png and grid.png")
    add("--save_npy", action="store_true", help="also write images.npy, float32 [N,H,W,3] in [0,1]")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if not 1 <= args.steps <= 1000:
        raise InputError(f"--steps {args.steps}: wants 1..1000")
    if not 0 <= args.eta <= 1:
        raise InputError(f"--eta {args.eta}: wants 0..1")
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: wants at least 1")
    if args.image_size is not None and (args.image_size < 8 or args.image_size % 8):
        raise InputError(f"--image_size {args.image_size}: wants a multiple of 8 pixels")
    command.check_writable(Path(args.out), "--out")
    texts = [*args.prompt, *(load_prompts(args.prompts).texts if args.prompts else ())]
    if not texts:
        raise InputError("nothing to sample: give --prompt or --prompts")
    model = stable_diffusion.load(
        args.model, dtype=args.dtype, image_size=args.image_size, revision=args.revision, variant=args.variant
    )
    x_T = read_latents(args.latents, len(texts), model.latent_shape) if args.latents else None
    lora = None
    if args.lora:
        lora = scaled(*load_lora(args.lora, model.params["unet"]))

    schedule = load_schedule(model)
    t = timesteps(schedule, args.steps)
    steps = make_steps(schedule, t, np.full(len(t), args.guidance), eta=args.eta)
    cond, cut = evaluation.encode_prompts(model, texts)
    for text in cut:
        print(f"warning: prompt cut to {model.tokenizer.model_max_length} tokens: {text!r}")
    empty = jax.tree.map(lambda x: x[0], evaluation.encode_prompts(model, [""])[0])
    context = evaluation.make_context(cond, evaluation.unconditional(model, empty))
    keys = parallel.sample_keys(parallel.stream(args.seed, "sample"), len(texts))
    frozen = {"model": {part: model.params[part] for part in ("unet", "vae")}}

    @jax.jit
    def sample(frozen, lora, x_T, context, keys):
        denoise = evaluation.denoiser(model, frozen, lora)
        x_0, _ = rollout(denoise, x_T, context, steps, keys, prediction_type=schedule.prediction_type)
        return model.decode(frozen["model"], x_0).clip(0.0, 1.0)

    images, size = [], min(args.batch, len(texts))
    x_T = initial_latents(keys, model.latent_shape) if x_T is None else x_T
    for start in tqdm(range(0, len(texts), size), desc="sampling", unit="batch"):
        rows = np.arange(start, start + size).clip(max=len(texts) - 1)  # the last batch is filled up: one compile
        here = jax.tree.map(lambda x, rows=rows: x[rows], context)
        images.append(np.asarray(sample(frozen, lora, x_T[rows], here, keys[rows])))
    images = np.concatenate(images)[: len(texts)]
    write(Path(args.out), images, texts, save_npy=args.save_npy)


def read_latents(path: str, n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The user's starting noise, one per prompt."""
    try:
        latents = np.load(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--latents {path}: not a readable .npy file ({error})") from None
    if not isinstance(latents, np.ndarray) or not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"--latents {path}: wants one array of float32")
    if latents.shape != (n, *shape):
        raise InputError(f"--latents {path}: shape {latents.shape}; wants {(n, *shape)}: one per prompt")
    return latents.astype(np.float32)


def write(out: Path, images: np.ndarray, texts: list[str], *, save_npy: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for n, image in enumerate(images):
            Image.fromarray(report.to_uint8(image)).save(out / f"{n:04d}.png")
        report.save_grid(out / "grid.png", images, texts)
        if save_npy:
            np.save(out / "images.npy", images.astype(np.float32))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    print(f"{len(images)} images in {out}, all together in {out / 'grid.png'}")


if __name__ == "__main__":
    command.guarded(main, arguments())
