"""Samples images from a model, with or without a LoRA, and writes them as PNG files and a captioned grid.

python scripts/sample.py --prompt "a dog riding a bike" --num_images 8 --lora runs/quickstart --out samples

The grid compares what there is to compare: --lora shows the model without and with it, --explore what DiffExp's
guidance schedule and prompt weights make of the same seed, --samplers low, high and scheduled guidance (the paper's
Figure 3). What no flag says is taken from the run that --lora names; where there is none, as diffusers samples: 50
steps, guidance 7.5, eta 0.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffexp_jax import command, programs, report
from diffexp_jax.cli.sample_flags import arguments, settings_of
from diffexp_jax.errors import InputError, first_line
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.formats.files import replaced
from diffexp_jax.formats.tokenizers import check_text
from diffexp_jax.prompts import PromptSet, load_prompts
from diffexp_jax.prompts.files import comma_phrases
from diffexp_jax.sampling import check_latents
from diffexp_jax.settings import warn_of_bare_names
from diffexp_jax.task import Task

MOST_ROWS = 12  # of a grid that compares
MOST_IMAGES = 64  # of one that does not


class Variant(NamedTuple):
    """A way to sample the prompts: one column of the grid. The seeds are the same in all."""

    name: str  # one of report.COMPARISONS; "" is what was asked for
    captions: list[str]
    model: Evaluator
    task: Task  # a row per image
    schedule: bool = False  # whether guidance follows Eq. 7


def main(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    prompts = chosen_prompts(args)
    warn_of_bare_names(settings.model.path, [args.prompts or ""])
    latents = read_latents(args.latents) if args.latents else None
    if latents is not None and args.num_images == 1 and len(prompts) == 1:
        args.num_images = len(latents)
    lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
    options = {"lora": args.lora, "checkpoint": args.checkpoint, "lora_scale": lora_scale}
    model = Evaluator.of_settings(settings, batch=args.batch, **options)
    n = len(prompts) * args.num_images
    model.sampler.check_memory(n)
    if latents is not None:
        check_latents(latents, (n, *model.sampler.pipeline.latent_shape), f"--latents {args.latents}")
    variants = make_variants(args, model, prompts)
    with tqdm(total=len(variants) * n, desc="sampling", unit="image") as bar:
        options = {"seed": args.seed or 0, "latents": latents, "floats": True, "advance": bar.update}
        images = [one.model.images(one.task, schedule=one.schedule, **options) for one in variants]
    write(args, variants, [text for text in prompts.texts for _ in range(args.num_images)], images)


def chosen_prompts(args: argparse.Namespace) -> PromptSet:
    """The prompts of --prompt, then those of --prompts."""
    file = load_prompts(args.prompts) if args.prompts else PromptSet("", (), ())
    texts = (*(check_text(text, "--prompt") for text in args.prompt), *file.texts)
    if not texts:
        raise InputError("nothing to sample: give --prompt or --prompts")
    return PromptSet("sample", texts, (*(comma_phrases(text) for text in args.prompt), *file.phrases))


def make_variants(args: argparse.Namespace, model: Evaluator, prompts: PromptSet) -> list[Variant]:
    """What was asked for, and beside it what to compare it with."""
    sampler, e, n = model.sampler, model.sampler.exploration, args.num_images
    prompts = model.task(prompts)
    task = prompts.repeated(n)
    variants = [Variant("", list(task.texts), model, task)]
    if args.lora:
        words = {name: [f"{name}: {text}" for text in task.texts] for name in ("without LoRA", "with LoRA")}
        untuned = Variant("base", words["without LoRA"], model.untuned(), task)
        variants = [untuned, variants[0]._replace(captions=words["with LoRA"])]
    n_low = sampler.count_low_steps()
    schedule = [f"guidance {e.w_low:g} in {n_low} of {sampler.n_steps} steps"] * len(task.texts)
    if args.explore or args.samplers:
        print(f"guidance: {e.w_low:g} in the first {n_low} of {sampler.n_steps} steps, then {sampler.guidance:g}")
        sampler.warn_of_no_schedule()
    if args.samplers:
        captions = [f"guidance {e.w_low:g} in all steps"] * len(task.texts)
        variants.append(Variant("low", captions, model.sampled_by(guidance=e.w_low), task))
    if args.explore or args.samplers:
        variants.append(Variant("schedule", schedule, model, task, schedule=True))
    if args.explore:
        weighted, words = model.weighted(prompts, samples_per_prompt=n, seed=args.seed or 0)
        variants += [
            Variant("weights", words, model, weighted),
            Variant("both", [f"both: {word}" for word in words], model, weighted, schedule=True),
        ]
    return variants


def read_latents(path: Path) -> np.ndarray:
    """The user's starting noise."""
    try:
        latents = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--latents {path}: not a readable .npy file ({first_line(error)})") from None
    if not isinstance(latents, np.ndarray) or not np.issubdtype(latents.dtype, np.floating):
        raise InputError(f"--latents {path}: wants one array of float32")
    if not np.isfinite(latents).all():
        raise InputError(f"--latents {path}: holds numbers that are not finite")
    return latents.astype(np.float32)


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
    """The columns of a grid of n images that is about as high as wide; an image's variants stay side by side."""
    return n_variants * max(round((n * n_variants) ** 0.5 / n_variants), 1)


def run() -> None:
    command.guarded(main, arguments(__doc__))
