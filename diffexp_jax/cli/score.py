"""Scores pictures with one or several rewards, on each reward's published path, and writes a CSV file.

python scripts/score.py --reward hpsv2:HPS_v2.1_compressed.pt --reward aesthetic:LAION_DIR --images samples \
    --out scores.csv

Of a folder that scripts/sample.py wrote the prompts are known, and the pictures are those that were asked for: not the
grid, nor those that are there to compare. --compare scores these too, with a mean for each kind: NNNN-base.png are of
the untuned model. Pictures of a folder are taken in the
order of the numbers in their names: 1, 2, 10.
"""

import argparse
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from diffexp_jax import command, report
from diffexp_jax.errors import InputError
from diffexp_jax.formats import pictures
from diffexp_jax.formats.files import replaced
from diffexp_jax.limits import check_number, positive, whole
from diffexp_jax.prompts.files import read_lines, read_named_prompts
from diffexp_jax.rewards import check_reward, load_reward, parsed_spec
from diffexp_jax.rewards.scoring import Scorers, check_scores

_TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names of files may not be UTF-8
# What lies beside pictures without being one: prompts, scores, arrays, notes
BESIDE = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".npy", ".npz", ".md", ".html")


def main(args: argparse.Namespace) -> None:
    check_number("--batch ", args.batch, whole(1, 2**20))
    check_number("--temperature ", args.temperature, positive())
    if args.out.is_dir():
        raise InputError(f"--out {args.out}: is a folder; wants the .csv file to write")
    command.check_writable(args.out.parent, "--out")
    names = [parsed_spec(spec).name for spec in args.reward]
    if len(set(names)) < len(names):
        raise InputError(f"--reward {' '.join(args.reward)}: names a reward twice")
    for spec in args.reward:
        check_reward(spec)
    paths = find_images(args.images, compare=args.compare)
    batch = -(-args.batch // jax.device_count()) * jax.device_count()
    parts = list(batches(paths, batch))
    texts = known_prompts(args.prompts, paths)
    rewards = {}
    for name, spec in zip(names, args.reward, strict=True):
        rewards[name] = load_reward(spec, temperature=args.temperature, contrast=args.contrast)
        tokens = [] if rewards[name].start else jax.tree.leaves(rewards[name].tokenize(["a dog"]))
        if texts is None and any(map(np.size, tokens)):
            raise InputError(f"--prompts is missing: the reward {name!r} reads prompts")
    texts = texts or [""] * len(paths)
    scorers = Scorers.of(rewards, batch=batch)
    tokens = scorers.tokens(texts)
    rows: list[dict] = []
    notes: dict[str, list[str]] = {}  # by kind, the pictures
    with tqdm(total=len(paths), desc="scoring", unit="image") as progress:
        for here in parts:
            found = [pictures.read_picture(path) for path in paths[here]]
            scores = scorers.score([one.pixels for one in found], jax.tree.map(lambda x, at=here: x[at], tokens))
            check_scores(scores)
            for i, (path, text) in enumerate(zip(paths[here], texts[here], strict=True)):
                rows.append({"image": str(path), "prompt": text} | {name: f"{x[i]:.6f}" for name, x in scores.items()})
                for note in found[i].notes:
                    notes.setdefault(note, []).append(path.name)
            progress.update(len(found))
    for note, its in notes.items():
        print(f"note: {len(its)} of {len(paths)} pictures ({some(its)}) {pictures.NOTES[note]}")
    write(args.out, rows)
    kinds = [kind_of(path) if args.compare else "" for path in paths]
    for name in list(rows[0])[2:]:
        for kind in sorted(set(kinds), key=(*report.COMPARISONS, report.GRID, "").index):
            values = np.array([float(row[name]) for row, its in zip(rows, kinds, strict=True) if its == kind])
            of = f"{name}, {kind}" if kind else name
            print(f"{of}: mean {values.mean():.4f}, std {values.std():.4f}, {len(values)} images")
    print(f"written: {args.out}")


def batches(paths: Sequence[Path], most: int) -> Iterator[slice]:
    """The pictures in their order, as many at once as are asked for; fewer where they are large."""
    start, pixels = 0, 0
    for i, path in enumerate(paths):
        size = pictures.n_pixels(path)
        if i > start and (i - start == most or pixels + size > pictures.MOST_PIXELS):
            yield slice(start, i)
            start, pixels = i, 0
        pixels += size
    yield slice(start, len(paths))


def find_images(given: list[Path], *, compare: bool = False) -> list[Path]:
    """The files, and of folders the pictures in them, by the numbers in their names; says what is left out.

    Args:
      compare: whether those of folders that are there to compare are wanted too.
    """
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            paths += images_of(path, compare=compare)
        elif path.is_file():
            paths.append(path)
        else:
            raise InputError(f"--images {path}: no such file or folder")
    return paths


def images_of(folder: Path, *, compare: bool) -> list[Path]:
    """The pictures of a folder, without its grid and, unless `compare`, without those that are there to compare."""
    endings = pictures.endings()
    there = sorted(folder.iterdir(), key=pictures.natural)
    found = [file for file in there if file.suffix.lower() in endings and not file.is_dir()]
    others = [file.name for file in there if file not in set(found) and file.suffix.lower() not in BESIDE]
    if not found:
        left = f"; it holds {some(others)}" if others else ""
        raise InputError(f"--images {folder}: no pictures in the folder; accepted: {', '.join(endings)}{left}")
    if others := [name for name in others if not name.startswith(".")]:
        print(f"{folder}: {len(others)} files and folders passed over, no pictures by their names: {some(others)}")
    asked_for = [file for file in found if (kind := kind_of(file)) == "" or (compare and kind != report.GRID)]
    if passed_over := len(found) - len(asked_for):
        others = "" if compare else ", and those that are there to compare, which --compare scores too"
        print(f"{folder}: {passed_over} pictures passed over: {report.GRID}{others}")
    return asked_for or found


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    return ", ".join([*names[:most], f"and {len(names) - most} more"] if len(names) > most else names)


def kind_of(path: Path) -> str:
    """What scripts/sample.py made a picture for, by its name: its grid, one of `report.COMPARISONS` as in
    NNNN-base.png, or "" for what was asked for, and for pictures of any other origin."""
    if not (path.parent / "prompts.csv").is_file():
        return ""
    if path.name == report.GRID:
        return report.GRID
    found = re.fullmatch(rf"\d+-({'|'.join(report.COMPARISONS)})\.png", path.name)
    return found[1] if found else ""


def known_prompts(file: Path | None, images: list[Path]) -> list[str] | None:
    """A prompt per image: of the file, else of prompts.csv in the images' folders; None where there is none."""
    if file:
        return find_prompts(file, images)
    folders: dict[Path, list[Path]] = {}
    for path in images:
        folders.setdefault(path.parent, []).append(path)
    if not all((folder / "prompts.csv").is_file() for folder in folders):
        return None
    found = {folder: iter(find_prompts(folder / "prompts.csv", its)) for folder, its in folders.items()}
    return [next(found[path.parent]) for path in images]


def find_prompts(file: Path, images: list[Path]) -> list[str]:
    """A prompt per image: of a text file line by line, of a json or csv file by the image's name."""
    if (kind := file.suffix.lower()) not in (".txt", ".json", ".csv"):
        raise InputError(f"--prompts {file}: accepted: .txt (a line per image), .json or .csv (image name, prompt)")
    if kind == ".txt":
        lines = read_lines(file)
        if len(lines) != len(images):
            raise InputError(f"--prompts {file}: {len(lines)} lines for {len(images)} images; wants one for each")
        check_order(file, images)
        print(f"{file}: line 1 is for {images[0].name}, ..., line {len(lines)} for {images[-1].name}")
        return lines
    table = read_named_prompts(file)
    missing = [path.name for path in images if path.name not in table]
    if missing:
        raise InputError(f"--prompts {file}: no prompt for {', '.join(map(json.dumps, missing[:5]))}")
    return [table[path.name] for path in images]


def check_order(file: Path, images: list[Path]) -> None:
    """Raises InputError where pictures are in the order of a shell's *: 1.png, 10.png, 2.png."""
    names = [str(path) for path in images]
    if names == sorted(names) and images != sorted(images, key=pictures.natural) and len({*names}) == len(names):
        first = next(i for i, path in enumerate(sorted(images, key=pictures.natural)) if path != images[i])
        raise InputError(
            f"--prompts {file}: is line {first + 1} for {images[first].name}, which --images names there? Give the "
            "folder, to take its pictures by their numbers (1, 2, 10), or a .csv file of image names and prompts"
        )


def write(path: Path, rows: list[dict]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial, open(partial, "w", newline="", **_TEXT) as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from None


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line; None: the program's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward", action="append", required=True, help="as the config's `reward` (repeat for more)")
    add("--images", type=Path, nargs="+", required=True, help="folders (by the numbers in the names), or files")
    add(
        "--prompts",
        type=Path,
        help=".txt with a line per image, or .json or .csv from image names to prompts (default: their prompts.csv)",
    )
    add("--out", type=Path, required=True, help="the .csv file to write")
    add("--compare", action="store_true", help="also the pictures that sample.py made to compare: NNNN-base.png, ...")
    add("--batch", type=int, default=16, help="images at once")
    add("--temperature", type=float, default=1.0, help="of textnorm, in the reward's units")
    add("--contrast", type=Path, help="of textnorm: json file {prompt: [contrastive prompts]}")
    return parser.parse_args(words)


def run() -> None:
    command.guarded(main, arguments())
