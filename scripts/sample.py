"""Samples images from a model, with or without a LoRA, and writes them as PNG files and a captioned grid.

python scripts/sample.py --model emoji --prompt "a dog riding a bike" --lora runs/quickstart --out samples

The grid has a row for each prompt where there is something to compare: --lora shows the model without and with it,
--explore what DiffExp's guidance schedule and prompt weights make of the same seed (the paper's Figure 3).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from diffexp_jax import InputError, command, exploration, parallel, programs, report
from diffexp_jax.formats.tokenizers import token_ids
from diffexp_jax.models.lora import load_lora, scaled
from diffexp_jax.models.precision import DTYPES
from diffexp_jax.pipelines import Conditioning, Pipeline, encode_empty, encode_prompts, load_pipeline, make_context
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.prompts.files import comma_phrases
from diffexp_jax.prompts.units import UNITS, unit_ids
from diffexp_jax.sampling import Context, Steps, initial_latents, rollout


class Variant(NamedTuple):
    """A way to sample the prompts: one column of the grid. The seeds are the same in all."""

    suffix: str  # of its files' names; "" is what was asked for, the others are there to compare
    captions: list[str]
    lora: Any
    steps: Steps
    context: Context  # a row per prompt


def arguments() -> argparse.Namespace:
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from configs.base import default

    ours = default().exploration
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="emoji", help="emoji, a folder in the diffusers pipeline format, or a hub id")
    add("--revision", help="of the hub's repository: a branch, tag or commit")
    add("--variant", help="fp16: take the half-precision weight files")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights and networks")
    add("--prompt", action="append", default=[], help="a prompt (repeat for several)")
    add("--prompts", help="a built-in prompt set or a file, after the --prompt ones")
    add("--lora", help="a LoRA file, or the workdir of a run")
    add("--steps", type=int, default=50, help="DDIM steps, 1..1000")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1 is none")
    add("--eta", type=float, default=0.0, help="noise of the DDIM steps, 0..1")
    add("--seed", type=int, default=0)
    add("--latents", help="float32 .npy [N,h,w,c], standard normal: the noise to start from")
    add("--explore", action="store_true", help="show what exploration does to the same seeds")
    add("--w_low", type=float, default=ours.w_low, help="with --explore: guidance while t > --t_thresh (Eq. 7)")
    add("--t_thresh", type=float, default=ours.t_thresh, help="with --explore: in training timesteps, 0..1000")
    add(
        "--weight_range",
        type=float,
        nargs=2,
        default=ours.weight_range,
        help="with --explore: of a unit's weight (Eq. 8)",
    )
    add("--unit", default=ours.unit, choices=UNITS, help="with --explore: what is weighted together")
    add("--batch", type=int, default=16, help="images at once")
    add("--image_size", type=int, help="pixels of a side (default: what the model was trained at)")
    add("--out", required=True, help="folder for NNNN.png and grid.png")
    add("--save_npy", action="store_true", help="also write images.npy, float32 [N,H,W,3] in [0,1]")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check(args)
    prompts = chosen_prompts(args)
    n = len(prompts)
    model = load_pipeline(
        args.model, dtype=args.dtype, image_size=args.image_size, revision=args.revision, variant=args.variant
    )
    x_T = read_latents(args.latents, n, model.latent_shape) if args.latents else None
    lora = scaled(*load_lora(args.lora, model.base)) if args.lora else None
    variants = make_variants(args, model, prompts, lora)
    keys = parallel.sample_keys(parallel.stream(args.seed, "sample"), n)
    x_T = initial_latents(keys, model.latent_shape) if x_T is None else x_T
    sample = make_sample(model)

    size = min(args.batch, n)
    starts = range(0, n, size)
    bar = tqdm(total=len(variants) * len(starts), desc="sampling", unit="batch")
    images = []
    for variant in variants:
        parts = []
        for start in starts:
            rows = np.arange(start, start + size).clip(max=n - 1)  # the last batch is filled up: one compile
            here = jax.tree.map(lambda x, rows=rows: x[rows], variant.context)
            parts.append(
                np.asarray(sample(model.sampling_params, variant.lora, x_T[rows], here, variant.steps, keys[rows]))
            )
            bar.update()
        images.append(np.concatenate(parts)[:n])
    bar.close()
    write(Path(args.out), variants, images, save_npy=args.save_npy)


def check(args: argparse.Namespace) -> None:
    """Raises InputError for a flag that cannot work."""
    for flag, low, high in (("steps", 1, 1000), ("eta", 0, 1), ("t_thresh", 0, 1000)):
        if not low <= getattr(args, flag) <= high:
            raise InputError(f"--{flag} {getattr(args, flag)}: wants {low}..{high}")
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: wants at least 1")
    if args.image_size is not None and (args.image_size < 8 or args.image_size % 8):
        raise InputError(f"--image_size {args.image_size}: wants a multiple of 8 pixels")
    if args.weight_range[0] > args.weight_range[1]:
        raise InputError(f"--weight_range {args.weight_range[0]} {args.weight_range[1]}: wants the lower number first")
    command.check_writable(Path(args.out), "--out")


def chosen_prompts(args: argparse.Namespace) -> PromptSet:
    """The prompts of --prompt, then those of --prompts."""
    file = load_prompts(args.prompts) if args.prompts else PromptSet("", (), ())
    texts = (*args.prompt, *file.texts)
    if not texts:
        raise InputError("nothing to sample: give --prompt or --prompts")
    return PromptSet("sample", texts, (*(comma_phrases(text) for text in args.prompt), *file.phrases))


def make_variants(args: argparse.Namespace, model: Pipeline, prompts: PromptSet, lora: Any) -> list[Variant]:
    """What was asked for, and beside it what to compare it with."""
    cond, cut = encode_prompts(model, prompts.texts)
    for text in cut:
        print(f"warning: prompt cut to {model.tokenizer.model_max_length} tokens: {text!r}")
    empty = encode_empty(model)
    context = make_context(cond, model.unconditional(empty))
    t = model.process.timesteps(args.steps)
    steps = model.process.make_steps(t, np.full(len(t), args.guidance, np.float32), eta=args.eta)
    texts = list(prompts.texts)
    variants = [Variant("", texts, lora, steps, context)]
    if args.lora:
        # the same program with an update of nothing
        without = jax.tree.map(np.zeros_like, lora)
        variants = [Variant("-base", [f"without LoRA: {text}" for text in texts], without, steps, context), *variants]
    if args.explore:
        w_t = exploration.guidance_schedule(t, w_low=args.w_low, w_high=args.guidance, t_thresh=args.t_thresh)
        low = model.process.make_steps(t, w_t, eta=args.eta)
        weighted, words = weigh(args, model, prompts, cond, empty)
        context_w = context._replace(cond=weighted)
        said = f"guidance {args.w_low:g} while t > {args.t_thresh:g}"
        n_low = int((t > args.t_thresh).sum())
        print(f"guidance: {args.w_low:g} in the first {n_low} of {len(t)} steps, then {args.guidance:g}")
        variants += [
            Variant("-schedule", [said] * len(texts), lora, low, context),
            Variant("-weights", words, lora, steps, context_w),
            Variant("-both", [f"{said}, {word}" for word in words], lora, low, context_w),
        ]
    return variants


def weigh(
    args: argparse.Namespace, model: Pipeline, prompts: PromptSet, cond: Conditioning, empty: Conditioning
) -> tuple[Conditioning, list[str]]:
    """A draw of Eq. 8 for every prompt: the conditioning, and what was weighted, in words."""
    units = unit_ids(model.tokenizer, prompts, args.unit)
    keys = parallel.sample_keys(parallel.stream(args.seed, "weights"), len(prompts))
    weight_range = tuple(args.weight_range)

    def one(key, units, cond):
        weights = exploration.sample_phrase_weights(key, units, weight_range=weight_range)
        return model.map_tokens(lambda c, n: exploration.reweight_prompt(c, n, weights), cond, empty), weights

    weighted, weights = jax.device_get(jax.vmap(one)(keys, units, cond))
    ids, _ = token_ids(model.tokenizer, prompts.texts)
    words = []
    for row, weight in zip(ids, weights, strict=True):
        chosen = weight != 1.0
        word = model.tokenizer.decode(row[chosen]).strip()
        words.append(f"{word} x {weight[chosen][0]:.2f}" if chosen.any() else "no word weighted")
    return weighted, words


def make_sample(model: Pipeline) -> Callable[..., jax.Array]:
    """A compiled program (params, lora, x_T, context, steps, keys) -> images in [0,1]."""

    @jax.jit
    def sample(params, lora, x_T, context, steps, keys):
        denoise = model.denoiser(params, lora)
        x_0, _ = rollout(model.process, denoise, x_T, context, steps, keys)
        return model.decode(params, x_0).clip(0.0, 1.0)

    return sample


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


def as_bytes(images: np.ndarray) -> np.ndarray:
    return np.asarray(programs.as_bytes(images))


def write(out: Path, variants: Sequence[Variant], images: Sequence[np.ndarray], *, save_npy: bool) -> None:
    """Writes every variant's images [N,H,W,3], a grid with a column each, and images.npy of what was asked for."""
    n = len(images[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for variant, column in zip(variants, images, strict=True):
            for i, image in enumerate(as_bytes(column)):
                Image.fromarray(image).save(out / f"{i:04d}{variant.suffix}.png")
            if save_npy and not variant.suffix:
                np.save(out / "images.npy", column.astype(np.float32))
        by_prompt = np.stack(images, axis=1).reshape(-1, *images[0].shape[1:])  # prompt by prompt
        captions = [variant.captions[i] for i in range(n) for variant in variants]
        columns = len(variants) if len(variants) > 1 else None
        report.save_grid(out / "grid.png", as_bytes(by_prompt), captions, columns=columns)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    print(f"{n * len(variants)} images in {out}, all together in {out / 'grid.png'}")


if __name__ == "__main__":
    command.guarded(main, arguments())
