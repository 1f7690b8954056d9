"""A CLIP folder's preprocessor_config.json: how the pictures that it reads are normalised; it wants no other change."""

from pathlib import Path

from diffexp_jax.errors import InputError
from diffexp_jax.formats import files
from diffexp_jax.formats.config_keys import Keys, Many, checked, shown
from diffexp_jax.limits import Number, positive
from diffexp_jax.rewards.preprocess import CLIP, Statistics

_YES = (True, None)
KEYS = Keys(
    read={"image_mean": Many(Number(-10.0, 10.0), or_one=True), "image_std": Many(positive(100.0), or_one=True)},
    only={
        "resample": (3, None),  # bicubic
        "do_resize": _YES,
        "do_center_crop": _YES,
        "do_rescale": _YES,
        "do_normalize": _YES,
        "do_pad": (False, None),
        "rescale_factor": (1 / 255, None),
        "use_square_size": (False, None),
    },
    ignored=frozenset(
        "size crop_size do_convert_rgb image_processor_type feature_extractor_type processor_class default_to_square "
        "data_format input_data_format return_tensors device disable_grouping image_seq_length pad_size".split()
    ),  # the sizes are looked at below
)


def statistics(folder: Path, size: int) -> Statistics:
    """The normalisation of a CLIP's folder; OpenAI's where no file says.

    Args:
      folder: may hold preprocessor_config.json, or processor_config.json with an "image_processor".
      size: pixels of a side that the network reads.

    Raises:
      InputError: a file asks for another preprocessing than the shortest side to `size`, bicubic, and a centre crop.
    """
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if file.is_file():
        content = files.read_json(file)
    elif whole.is_file():
        file, content = whole, files.read_json(whole).get("image_processor") or {}
    else:
        return CLIP
    known = checked(content, KEYS, str(file))
    for key, accepted in (
        ("size", ({"shortest_edge": size}, size, None)),
        ("crop_size", ({"height": size, "width": size}, size, None)),
    ):
        if content.get(key) not in accepted:
            words = f"{shown(accepted[0])}, the network's size"
            raise InputError(f"{file}: {key}={shown(content[key])} is not supported; accepted: {words}")
    given = {}
    for key, usual in (("image_mean", CLIP.mean), ("image_std", CLIP.std)):
        value = known.get(key, usual)
        given[key] = value if isinstance(value, tuple) else (value,) * 3
        if len(given[key]) != 3:
            raise InputError(f"{file}: {key}={shown(value)}; wants three numbers, of red, green and blue")
    return Statistics(given["image_mean"], given["image_std"])
