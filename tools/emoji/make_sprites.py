"""Shrinks the emoji of two public sets into diffexp_jax/emoji/sprites.npz. Run once; the result is shipped.

The sets are npm packages, each given as its .tgz (`npm pack NAME`) or as the folder it unpacks to:

    npm pack emoji-datasource-google@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python tools/emoji/make_sprites.py --noto emoji-datasource-google-16.0.0.tgz \\
        --fluent lobehub-fluent-emoji-3d-1.1.0.tgz

Needs Pillow. Takes seconds. Licences: diffexp_jax/emoji/LICENSES.md.
"""

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from diffexp_jax.emoji.names import ANIMALS, CODEPOINTS, OBJECTS

OUT = Path(__file__).parents[2] / "diffexp_jax" / "emoji" / "sprites.npz"


def read_folder(package: Path, folder: str) -> dict[str, bytes]:
    """The files of one folder of an npm package (a .tgz or unpacked), by name without suffix."""
    if package.is_dir():
        root = package / "package" if (package / "package").is_dir() else package
        return {file.stem: file.read_bytes() for file in (root / folder).iterdir()}
    with tarfile.open(package) as archive:
        files = [member for member in archive if Path(member.name).parent == Path("package", folder)]
        return {Path(file.name).stem: archive.extractfile(file).read() for file in files}


def load_emoji(files: dict[str, bytes], name: str) -> Image.Image:
    """The emoji called `name` in RGBA, cropped to its visible part."""
    code = CODEPOINTS[name]
    content = files.get(code) or files.get(code.removesuffix("-fe0f"))
    if content is None:
        raise SystemExit(f"{name}: the package has no file {code}")
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    # Below 10 of 255 is the haze around soft shadows: cropping to it would shrink the animal itself.
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 10)).getbbox())


def fit(image: Image.Image, size: int, align: float) -> UInt8[np.ndarray, "{size} {size} 4"]:
    """Resizes to fit a square, aspect ratio kept; `align` places it vertically: 0 top, 0.5 centre, 1 bottom."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # "RGBa" is premultiplied: filtering straight RGBA would mix in the colour hidden under transparent pixels.
    small = image.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (size, size))
    square.paste(small, ((size - width) // 2, round((size - height) * align)))
    return np.asarray(square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path, required=True, help="emoji-datasource-google: .tgz or folder")
    parser.add_argument("--fluent", type=Path, required=True, help="@lobehub/fluent-emoji-3d: .tgz or folder")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    sets = [read_folder(args.noto, "img/google/64"), read_folder(args.fluent, "assets")]  # STYLES' order

    def sprites(names: tuple[str, ...], size: int, align: float) -> UInt8[np.ndarray, "2 N {size} {size} 4"]:
        return np.array([[fit(load_emoji(files, name), size, align) for name in names] for files in sets])

    np.savez_compressed(
        args.out,
        animals_50=sprites(ANIMALS, 50, align=0.5),
        # Together, the animal stands on the line that the object hangs from: they meet whatever their shapes.
        animals_34=sprites(ANIMALS, 34, align=1.0),
        objects_28=sprites(OBJECTS, 28, align=0.0),
        animals=np.array(ANIMALS),
        objects=np.array(OBJECTS),
    )
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
