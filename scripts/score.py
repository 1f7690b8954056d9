"""Scores pictures with one or several rewards, on each reward's published path, and writes a CSV file.

python scripts/score.py --reward hpsv2:HPS_v2.1_compressed.pt --reward aesthetic:LAION_DIR --images samples \
    --out scores.csv

Of a folder that scripts/sample.py wrote the prompts are known, and the pictures are those that were asked for: not the
grid, nor those that are there to compare (name these as files to score them).
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
import csv
import json
import re
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from diffexp_jax import InputError, report
from diffexp_jax.evaluation import check_scores, score_all
from diffexp_jax.formats.files import read_json, replaced
from diffexp_jax.limits import check_number, positive, whole
from diffexp_jax.programs import make_scorer
from diffexp_jax.rewards import check_reward, load_reward, reward_name

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def main(args: argparse.Namespace) -> None:
    check_number("--batch ", args.batch, whole(1, 2**20))
    check_number("--temperature ", args.temperature, positive())
    if args.out.is_dir():
        raise InputError(f"--out {args.out}: is a folder; wants the .csv file to write")
    command.check_writable(args.out.parent, "--out")
    names = [reward_name(spec) for spec in args.reward]
    if len(set(names)) < len(names):
        raise InputError(f"--reward {' '.join(args.reward)}: names a reward twice")
    for spec in args.reward:
        check_reward(spec)
    paths = find_images(args.images)
    texts = known_prompts(args.prompts, paths)
    rewards = {}
    for name, spec in zip(names, args.reward, strict=True):
        rewards[name] = load_reward(spec, temperature=args.temperature, contrast=args.contrast)
        tokens = [] if rewards[name].start else jax.tree.leaves(rewards[name].tokenize(["a dog"]))
        if texts is None and any(map(np.size, tokens)):
            raise InputError(f"--prompts is missing: the reward {name!r} reads prompts")
    texts = texts or [""] * len(paths)
    tokens = {name: reward.tokenize(texts) for name, reward in rewards.items()}
    batch = -(-args.batch // jax.device_count()) * jax.device_count()
    scorers = {name: make_scorer(reward, batch=batch) for name, reward in rewards.items()}
    rows: list[dict] = []
    with tqdm(total=len(paths), desc="scoring", unit="image") as progress:
        for start in range(0, len(paths), batch):
            here = slice(start, start + batch)
            images = [read_image(path) for path in paths[here]]
            scores = score_all(scorers, images, jax.tree.map(lambda x, here=here: x[here], tokens))
            check_scores(scores)
            for i, (path, text) in enumerate(zip(paths[here], texts[here], strict=True)):
                rows.append({"image": str(path), "prompt": text} | {name: f"{x[i]:.6f}" for name, x in scores.items()})
            progress.update(len(images))
    write(args.out, rows)
    for name in list(rows[0])[2:]:
        values = np.array([float(row[name]) for row in rows])
        print(f"{name}: mean {values.mean():.4f}, std {values.std():.4f}, {len(values)} images")
    print(f"written: {args.out}")


def find_images(given: list[Path]) -> list[Path]:
    """The files, and of folders the pictures in them, by name."""
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"--images {path}: no pictures in the folder; accepted: {', '.join(SUFFIXES)}")
            asked_for = [file for file in found if not is_for_comparison(file)]
            if passed_over := len(found) - len(asked_for):
                print(f"{path}: {passed_over} pictures passed over: {report.GRID}, and those that compare")
            paths += asked_for or found
        elif path.is_file():
            paths.append(path)
        else:
            raise InputError(f"--images {path}: no such file or folder")
    return paths


def is_for_comparison(path: Path) -> bool:
    """Whether scripts/sample.py made the picture for people to compare: its grid, or NNNN-base.png and the like."""
    if not (path.parent / "prompts.csv").is_file():
        return False
    return path.name == report.GRID or bool(re.fullmatch(rf"\d+-({'|'.join(report.COMPARISONS)})\.png", path.name))


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
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if file.suffix.lower() == ".txt":
        lines = content.splitlines()
        if len(lines) != len(images):
            raise InputError(f"--prompts {file}: {len(lines)} lines for {len(images)} images; wants one for each")
        return lines
    if file.suffix.lower() == ".json":
        table = read_json(file)
    elif file.suffix.lower() == ".csv":
        rows = [row for row in csv.reader(content.splitlines()) if row]
        if any(len(row) != 2 for row in rows):
            raise InputError(f"--prompts {file}: wants two columns, an image's name and its prompt")
        table = dict(rows)
    else:
        raise InputError(f"--prompts {file}: accepted: .txt (a line per image), .json or .csv (image name, prompt)")
    missing = [path.name for path in images if not isinstance(table.get(path.name), str)]
    if missing:
        raise InputError(f"--prompts {file}: no prompt for {', '.join(map(json.dumps, missing[:5]))}")
    return [table[path.name] for path in images]


def read_image(path: Path) -> np.ndarray:
    """A picture as RGB bytes [H,W,3]; transparency is dropped, as the published scorers do."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--images {path}: not a readable picture ({error})") from None


def write(path: Path, rows: list[dict]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error})") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reward", action="append", required=True, help="as the config's `reward` (repeat for more)")
    add("--images", type=Path, nargs="+", required=True, help="folders or files")
    add(
        "--prompts",
        type=Path,
        help=".txt with a line per image, or .json or .csv from image names to prompts (default: their prompts.csv)",
    )
    add("--out", type=Path, required=True, help="the .csv file to write")
    add("--batch", type=int, default=16, help="images at once")
    add("--temperature", type=float, default=1.0, help="of textnorm, in the reward's units")
    add("--contrast", type=Path, help="of textnorm: json file {prompt: [contrastive prompts]}")
    command.guarded(main, parser.parse_args())
