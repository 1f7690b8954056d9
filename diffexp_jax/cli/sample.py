"""Samples images from a model, with or without a LoRA, and writes them as PNG files and a captioned grid.

python scripts/sample.py --prompt "a dog riding a bike" --num_images 8 --lora runs/quickstart --out samples

The grid compares what there is to compare: --lora shows the model without and with it, --explore what DiffExp's
guidance schedule and prompt weights make of the same seed, --samplers low, high and scheduled guidance (the paper's
Figure 3). What no flag says is taken from the
run that --lora names; where there is none, as diffusers samples: 50 steps, guidance 7.5, eta 0.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from diffexp_jax import backend, command, parallel, programs, report
from diffexp_jax.cli.sample_flags import arguments, settings_of
from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.tokenizers import check_text
from diffexp_jax.models.lora import load_lora, scaled
from diffexp_jax.pipelines import Pipeline, make_context
from diffexp_jax.programs import check_pictures
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.prompts.files import comma_phrases
from diffexp_jax.run import checkpoint
from diffexp_jax.sampler import Sampler
from diffexp_jax.sampling import Context, Scales, Steps, initial_latents, rollout

MOST_ROWS = 12  # of a grid that compares
MOST_IMAGES = 64  # of one that does not


class Variant(NamedTuple):
    """A way to sample the prompts: one column of the grid. The seeds are the same in all."""

    name: str  # one of report.COMPARISONS; "" is what was asked for
    captions: list[str]
    lora: Any
    steps: Steps
    context: Context  # a row per image


def main(args: argparse.Namespace) -> None:
    config = settings_of(args)
    prompts = chosen_prompts(args)
    noise = read_latents(args.latents) if args.latents else None
    if noise is not None and args.num_images == 1 and len(prompts) == 1:
        args.num_images = len(noise)
    sampler = Sampler.build(config)
    pipeline, rows = sampler.pipeline, np.repeat(np.arange(len(prompts)), args.num_images)
    n = len(rows)
    check_memory(n, pipeline)
    lora = chosen_lora(args, config, pipeline)
    variants = make_variants(args, sampler, prompts, rows, lora)
    keys = parallel.sample_keys(parallel.stream(config.seed, "sample"), n)
    x_T = initial_latents(keys, pipeline.latent_shape) if noise is None else check_latents(args, noise, n, pipeline)
    w_t = np.concatenate([np.asarray(variant.steps.w_t) for variant in variants])
    images = sample_all(make_sample(pipeline, w_t), pipeline.sampling_params, variants, x_T, keys, batch=args.batch)
    write(args, variants, [prompts.texts[i] for i in rows], images)


def chosen_lora(args: argparse.Namespace, config: ConfigDict, pipeline: Pipeline) -> Any:
    """What --lora and --checkpoint name, scaled, also by --lora_scale; None where that is nothing."""
    if not args.lora:
        return None
    if args.checkpoint is None:
        lora, scale = load_lora(args.lora, pipeline.base, prefix=pipeline.lora_prefix)
    else:
        _, lora = checkpoint.read_lora(Path(args.lora), args.checkpoint)
        scale = config.lora.alpha / config.lora.rank
    return scaled(lora, scale * (1.0 if args.lora_scale is None else args.lora_scale))


def chosen_prompts(args: argparse.Namespace) -> PromptSet:
    """The prompts of --prompt, then those of --prompts."""
    file = load_prompts(args.prompts) if args.prompts else PromptSet("", (), ())
    texts = (*(check_text(text, "--prompt") for text in args.prompt), *file.texts)
    if not texts:
        raise InputError("nothing to sample: give --prompt or --prompts")
    return PromptSet("sample", texts, (*(comma_phrases(text) for text in args.prompt), *file.phrases))


def check_memory(n: int, pipeline: Pipeline) -> None:
    """Raises InputError where so many images, which are kept until all are there, take more than half of the memory."""
    latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), np.float32)
    numbers = jax.eval_shape(pipeline.decode, pipeline.sampling_params, latents).size
    needed, there = 5 * numbers * n, backend.host_memory() // 2  # as float32, and as bytes
    if needed > there:
        raise InputError(
            f"{n:,} images would take at least {needed / 2**30:.1f} GiB of this machine's memory; wants at most "
            f"{there // (5 * numbers):,} at once, half of it"
        )


# ------------------------------------------------------------------------------------------------------------- variants


def make_variants(
    args: argparse.Namespace, sampler: Sampler, prompts: PromptSet, rows: np.ndarray, lora: Any
) -> list[Variant]:
    """What was asked for, and beside it what to compare it with; `rows` are the images' prompts."""
    cond = jax.tree.map(lambda x: x[rows], sampler.encode(prompts))
    context, plain = make_context(cond, sampler.uncond), sampler.steps(explore=False)
    texts = [prompts.texts[i] for i in rows]
    variants = [Variant("", texts, lora, plain, context)]
    if args.lora:
        # the same program with an update of nothing
        without = jax.tree.map(np.zeros_like, lora)
        variants = [Variant("base", [f"without LoRA: {text}" for text in texts], without, plain, context), *variants]
    e, scheduled = sampler.exploration, sampler.steps(explore=True)
    n_low = int((np.asarray(scheduled.w_t) != np.asarray(plain.w_t)).sum())
    schedule = [f"guidance {e.w_low:g} in {n_low} of {sampler.n_steps} steps"] * len(rows)
    if args.explore or args.samplers:
        print(f"guidance: {e.w_low:g} in the first {n_low} of {sampler.n_steps} steps, then {sampler.guidance:g}")
    if args.samplers:
        low = sampler._replace(guidance=e.w_low).steps(explore=False)
        variants.append(Variant("low", [f"guidance {e.w_low:g} in all steps"] * len(rows), lora, low, context))
    if args.explore or args.samplers:
        variants.append(Variant("schedule", schedule, lora, scheduled, context))
    if args.explore:
        weighted, words = sampler.reweighted(prompts, rows, cond, seed=args.seed or 0)
        context_w = context._replace(cond=weighted)
        variants += [
            Variant("weights", words, lora, plain, context_w),
            Variant("both", [f"both: {word}" for word in words], lora, scheduled, context_w),
        ]
    return variants


# ------------------------------------------------------------------------------------------------------------- sampling


def make_sample(pipeline: Pipeline, w_t: Scales) -> Callable[..., jax.Array]:
    """A compiled program (params, lora, x_T, context, steps, keys) -> images in [0,1], NaN where not finite.

    `w_t` has every guidance scale of the steps that it will be called with.
    """
    network = pipeline.network(w_t)

    @jax.jit
    def sample(params, lora, x_T, context, steps, keys):
        x_0, _ = rollout(pipeline.process, partial(network, params, lora), x_T, context, steps, keys)
        images = pipeline.decode(params, x_0)
        return jnp.where(jnp.isfinite(images), images.clip(0.0, 1.0), jnp.nan)  # infinity would become white

    return sample


def sample_all(
    sample: Callable, params: Any, variants: Sequence[Variant], x_T: Any, keys: jax.Array, *, batch: int
) -> list[np.ndarray]:
    """The images [N,H,W,3] of every variant."""
    n, size = len(x_T), min(batch, len(x_T))
    starts = range(0, n, size)
    images = []
    with tqdm(total=len(variants) * n, desc="sampling", unit="image") as bar:
        for variant in variants:
            parts = []
            for start in starts:
                rows = np.arange(start, start + size).clip(max=n - 1)  # the last batch is filled up: one compile
                context = jax.tree.map(lambda x, rows=rows: x[rows], variant.context)
                parts.append(np.asarray(sample(params, variant.lora, x_T[rows], context, variant.steps, keys[rows])))
                check_pictures(np.isfinite(parts[-1]).all(axis=(1, 2, 3)))
                bar.update(min(size, n - start))
            images.append(np.concatenate(parts)[:n])
    return images


def read_latents(path: Path) -> np.ndarray:
    """The user's starting noise."""
    try:
        latents = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--latents {path}: not a readable .npy file ({reason})") from None
    if not isinstance(latents, np.ndarray) or not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"--latents {path}: wants one array of float32")
    if not np.isfinite(latents).all():
        raise InputError(f"--latents {path}: holds numbers that are not finite")
    return latents.astype(np.float32)


def check_latents(args: argparse.Namespace, latents: np.ndarray, n: int, pipeline: Pipeline) -> np.ndarray:
    """The latents, where they are as many and as large as is wanted."""
    if latents.shape != (n, *pipeline.latent_shape):
        wanted = (n, *pipeline.latent_shape)
        raise InputError(f"--latents {args.latents}: shape {latents.shape}; wants {wanted}: one for each image")
    return latents


# --------------------------------------------------------------------------------------------------------------- output


def write(
    args: argparse.Namespace, variants: Sequence[Variant], texts: Sequence[str], images: Sequence[np.ndarray]
) -> None:
    """Writes every variant's images [N,H,W,3], their prompts, a grid, and images.npy of what was asked for."""
    out, n, shown = Path(args.out), len(texts), shown_rows(len(texts), len(variants))
    as_bytes = [np.asarray(programs.as_bytes(column)) for column in images]
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = [("image", "prompt")]
        for variant, column in zip(variants, as_bytes, strict=True):
            for i, image in enumerate(column):
                name = f"{i:04d}-{variant.name}.png" if variant.name else f"{i:04d}.png"
                with replaced(out / name) as partial:
                    Image.fromarray(image).save(partial, format="png")
                rows.append((name, texts[i]))
        with replaced(out / "prompts.csv") as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        if args.save_npy:
            asked = images[[variant.name for variant in variants].index("")].astype(np.float32)
            with replaced(out / "images.npy") as partial, open(partial, "wb") as file:
                np.save(file, asked)
        by_row = np.stack([column[shown] for column in as_bytes], axis=1).reshape(-1, *as_bytes[0].shape[1:])
        captions = [variant.captions[i] for i in shown for variant in variants]
        report.save_grid(out / report.GRID, by_row, captions, columns=n_columns(len(shown), len(variants)))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    grid = "all together" if len(shown) == n else f"{len(shown)} of {n} rows"
    print(f"{n * len(variants)} images in {out}; {grid} in {out / report.GRID}")


def shown_rows(n: int, n_variants: int) -> np.ndarray:
    """The images that the grid shows: all, or evenly spaced ones of many."""
    most = MOST_ROWS if n_variants > 1 else MOST_IMAGES
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def n_columns(n: int, n_variants: int) -> int:
    """Of a grid of n images of each variant that is about as high as wide; an image's variants stay side by side."""
    return n_variants * max(round((n * n_variants) ** 0.5 / n_variants), 1)


def run() -> None:
    command.guarded(main, arguments(__doc__))
