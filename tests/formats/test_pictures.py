"""Picture files of every kind: what rewards read of them, what is said of them, and what is refused."""

import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from diffexp_jax.errors import InputError
from diffexp_jax.formats import pictures
from diffexp_jax.formats.pictures import MOST_PIXELS, n_pixels, natural, read_picture
from diffexp_jax.rewards import load_reward, scoring
from diffexp_jax.rewards.reward import flattened
from diffexp_jax.rewards.scoring import make_scorer

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 255, (6, 5, 3), np.uint8)
OPACITY = RNG.integers(0, 255, (6, 5, 1), np.uint8)
RGB = Image.fromarray(COLOURS)
GREY = RGB.convert("L")
TURNED = Image.Exif()
TURNED[0x0112] = 6

# name: (picture, how it is saved, its notes)
FILES = {
    "rgb.png": (RGB, {}, ()),
    "grey.png": (GREY, {}, ()),
    "opaque.png": (Image.fromarray(np.concatenate([COLOURS, OPACITY * 0 + 255], 2)), {}, ()),
    "rgb.avif": (RGB, {}, ()),
    "rgb.dib": (RGB, {}, ()),
    "rgb.jfif": (RGB, {}, ()),
    "rgba.png": (Image.fromarray(np.concatenate([COLOURS, OPACITY], 2)), {}, ("transparent",)),
    "rgba.webp": (Image.fromarray(np.concatenate([COLOURS, OPACITY], 2)), {"lossless": True}, ("transparent",)),
    "la.png": (Image.fromarray(np.concatenate([COLOURS[..., :1], OPACITY], 2)), {}, ("transparent",)),
    "palette.png": (RGB.quantize(8), {}, ("mode",)),
    "palette_one.png": (RGB.quantize(8), {"transparency": 0}, ("transparent", "mode")),
    "palette_many.png": (RGB.quantize(8), {"transparency": bytes(range(0, 256, 32))}, ("transparent", "mode")),
    "palette.gif": (RGB.quantize(8), {"transparency": 0}, ("transparent", "mode")),
    "grey_one.png": (GREY, {"transparency": GREY.getpixel((0, 0))}, ("transparent",)),
    "rgb_one.png": (RGB, {"transparency": RGB.getpixel((0, 0))}, ("transparent",)),
    "bits.png": (RGB.convert("1"), {}, ("mode",)),
    "cmyk.jpg": (RGB.convert("CMYK"), {}, ("mode",)),
    "ycbcr.tif": (RGB.convert("YCbCr"), {}, ("mode",)),
    "lab.tif": (Image.merge("LAB", RGB.split()), {}, ("mode",)),
    "turned.jpg": (RGB, {"exif": TURNED}, ("turned",)),
    "frames.gif": (RGB, {"save_all": True, "append_images": [RGB.rotate(180)]}, ("mode", "frames")),
    "frames.apng": (RGB, {"format": "PNG", "save_all": True, "append_images": [RGB.rotate(180)]}, ("frames",)),
    "frames.webp": (RGB, {"save_all": True, "append_images": [RGB.rotate(180)], "lossless": True}, ("frames",)),
    "frames.tiff": (RGB, {"save_all": True, "append_images": [RGB.rotate(180)]}, ("frames",)),
    "frames.mpo": (RGB, {"save_all": True, "append_images": [RGB.rotate(180)]}, ("frames",)),
    "profile.png": (RGB, {"icc_profile": b"\0D\0i\0s\0p\0l\0a\0y\0 \0P\x003"}, ("profile",)),
    "srgb.png": (RGB, {"icc_profile": b"\0s\0R\0G\0B"}, ()),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_read(name, tmp_path):
    """Without transparency Pillow's convert("RGB"), with it transformers' CLIPImageProcessor; the first frame."""
    transformers = pytest.importorskip("transformers")
    picture, options, notes = FILES[name]
    if not name.endswith(pictures.endings()):
        pytest.skip("this Pillow has no such format")
    picture.save(tmp_path / name, **options)
    found = read_picture(tmp_path / name)
    assert found.notes == notes
    assert found.pixels.shape == (6, 5, 4 if "transparent" in notes else 3) and n_pixels(tmp_path / name) == 30
    with Image.open(tmp_path / name) as image:
        np.testing.assert_array_equal(flattened(found.pixels, on_white=False), np.asarray(image.convert("RGB")))
    steps = ("resize", "center_crop", "rescale", "normalize")
    processor = transformers.CLIPImageProcessor(**{f"do_{step}": False for step in steps})
    with Image.open(tmp_path / name) as image:
        (theirs,) = processor(image, return_tensors="np").pixel_values
    np.testing.assert_array_equal(flattened(found.pixels, on_white=True), theirs.transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_sixteen_bits_are_not_white(name, tmp_path):
    """By the upper eight of them, as colours of 16 bits are read."""
    values = np.linspace(0, 65535, 30).reshape(6, 5).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    found = read_picture(tmp_path / name)
    assert found.notes == ("sixteen",)
    np.testing.assert_array_equal(found.pixels, np.repeat(values[..., None] // 256, 3, axis=2))


def test_sixteen_bits_of_other_files(tmp_path):
    """The larger byte first, and 12 of the bits: the same grey."""
    values = np.array([[0, 4095 * 16 + 15, 256 * 100]], ">u2")
    Image.frombytes("I;16B", (3, 1), values.tobytes()).save(tmp_path / "big.tif")
    assert read_picture(tmp_path / "big.tif").pixels[0, :, 0].tolist() == [0, 255, 100]
    tags = ImageFileDirectory_v2()
    tags[258] = 12
    image = Image.fromarray(np.array([[0, 4095, 1600]], np.uint16))
    image.tag_v2 = tags
    assert pictures._of_sixteen_bits(tmp_path, image)[0, :, 0].tolist() == [0, 255, 100]


def test_one_of_sixteen_bits_is_transparent(tmp_path):
    Image.fromarray(np.array([[7, 40000]], np.uint16)).save(tmp_path / "x.png", transparency=7)
    found = read_picture(tmp_path / "x.png")
    assert found.pixels.tolist() == [[[0, 0, 0, 0], [156, 156, 156, 255]]] and found.notes == ("sixteen", "transparent")


def test_what_is_refused(tmp_path):
    float32, wide = np.zeros((2, 2), np.float32), Image.new("1", (2**13 + 1, 2**13))
    for name, image, options, said in [
        ("float.tif", Image.fromarray(float32), {}, "holds 32-bit numbers, whose white is not known"),
        ("int.tif", Image.fromarray(float32.astype(np.int32)), {}, "holds 32-bit numbers"),
        ("bomb.png", wide, {}, f"has 8193 x 8192 pixels; wants at most {MOST_PIXELS:,}"),
        ("eps.png", RGB, {"format": "EPS"}, "not a readable picture; accepted: PNG, JPEG, "),
        ("ppm.png", RGB, {"format": "PPM"}, "not a readable picture; accepted: PNG, JPEG, "),
        ("jp2.png", RGB, {"format": "JPEG2000"}, "not a readable picture; accepted: PNG, JPEG, "),
    ]:
        image.save(tmp_path / name, **options)
        for reader in (read_picture, n_pixels):  # also by the header alone, before any work
            with pytest.raises(InputError, match=f"{name}: {said}"):
                reader(tmp_path / name)
    buffer = io.BytesIO()
    RGB.save(buffer, "PNG")
    for name, content in (("cut.png", buffer.getvalue()[:-30]), ("empty.png", b""), ("gone.png", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not a readable picture"):
            read_picture(tmp_path / name)


def test_white_is_zero(tmp_path):
    """A TIFF file of 16 bits whose 0 is white: Pillow would read its negative."""
    tags = ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "x.tif", tiffinfo=tags)
    with Image.open(tmp_path / "x.tif") as image:
        assert image.tag_v2[262] == 0
    with pytest.raises(InputError, match="x.tif: is grey of 16 bits where 0 is white"):
        read_picture(tmp_path / "x.tif")


def test_only_picture_formats_are_opened(tmp_path, monkeypatch):
    """EPS would start Ghostscript."""
    RGB.save(tmp_path / "x.png", "EPS")
    plugin = sys.modules["PIL.EpsImagePlugin"]
    monkeypatch.setattr(plugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    for reader in (read_picture, n_pixels):
        with pytest.raises(InputError):
            reader(tmp_path / "x.png")


def test_natural_order(tmp_path):
    names = ["0.png", "1.png", "2.png", "10.png", "a2b10.png", "a10b2.png"]
    assert [path.name for path in sorted((tmp_path / name for name in sorted(names)), key=natural)] == names


def test_transparency_by_reward(tiny_clip):
    """PickScore and CLIP read it on white, others without it: the same scores as of pictures made so."""
    image = np.concatenate([COLOURS, OPACITY], 2)
    white, colours = (flattened(image, on_white=on_white) for on_white in (True, False))
    assert np.abs(white.astype(int) - colours).max() > 50
    for spec, same in (
        (f"pickscore:{tiny_clip}", white),
        (f"clip_similarity:{tiny_clip}", white),
        ("jax:sample_rewards:brightness", colours),
        ("jpeg_compressibility", colours),
    ):
        reward = load_reward(spec)
        scores = make_scorer(reward, batch=2)([image, same], reward.tokenize(["a dog", "a dog"]))[""]
        assert scores[0] == scores[1] and np.isfinite(scores).all(), spec


def test_large_pictures_are_not_copied_to_fill_a_batch(monkeypatch):
    reward = load_reward("jax:sample_rewards:brightness")
    shapes = []

    def prepared(params, pixels, tokens):
        shapes.append(pixels.shape)
        return reward.score_prepared(params, pixels, tokens)

    monkeypatch.setattr(scoring, "_LARGE", 6 * 5 * 3 * 4 * 16 - 1)
    for batch, size in ((15, 15), (16, 1)):
        make_scorer(reward._replace(score_prepared=prepared), batch=batch)([COLOURS], np.zeros((1, 0), np.int32))
        assert shapes.pop()[0] == size


def test_every_note_is_one_of_a_file():
    said = set(itertools.chain.from_iterable(notes for _, _, notes in FILES.values())) | {"sixteen"}
    assert said == set(pictures.NOTES)
