"""The tables of config keys against the libraries' own signatures, and values that no config should have."""

import inspect
import json
import logging

import numpy as np
import pytest

from diffexp_jax.errors import InputError
from diffexp_jax.formats.config_keys import Keys, Many, checked
from diffexp_jax.limits import whole
from diffexp_jax.models import blip, clip_config, flux, mmdit_config, open_clip, t5, unet_config, vae
from diffexp_jax.models.classifier import ClassifierConfig
from diffexp_jax.models.mmdit_config import MMDiTConfig
from diffexp_jax.models.unet_config import UNetConfig
from diffexp_jax.models.vae import VAEConfig
from diffexp_jax.pipelines import families, stable_diffusion
from diffexp_jax.rewards import processor
from diffexp_jax.sampling import ddim, flow, load_process
from tests.support.sd3 import SIZES
from tests.support.tiny import SCHEDULER, TOWER, UNET, VAE, VISION

TABLES = {
    "UNet2DConditionModel": unet_config.KEYS,
    "SD3Transformer2DModel": mmdit_config.KEYS,
    "FluxTransformer2DModel": flux.KEYS,
    "AutoencoderKL": vae.KEYS,
    **dict.fromkeys(ddim.SCHEDULERS, ddim.KEYS),
    "FlowMatchEulerDiscreteScheduler": flow.KEYS,
    "CLIPTextConfig": clip_config.TEXT_KEYS,
    "CLIPVisionConfig": clip_config.VISION_KEYS,
    "CLIPConfig": clip_config.CLIP_KEYS,
    "BertConfig": blip.KEYS,
    "T5Config": t5.KEYS,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_the_library_is_in_one_table(name):
    """A key that a new version brings is to be looked at: read, refused, or without effect."""
    library = pytest.importorskip("transformers" if name.endswith("Config") else "diffusers")
    pytest.importorskip("torch")
    if name == "DPMSolverSDEScheduler":  # a placeholder without torchsde
        return
    parameters = inspect.signature(getattr(library, name).__init__).parameters
    keys, table = set(parameters) - {"self", "kwargs"}, TABLES[name]
    rows = [set(table.read), set(table.only), set(table.ignored)]
    assert len(set().union(*rows)) == sum(map(len, rows)), "a key is in two tables"
    assert keys - set().union(*rows) == set()
    for key in set(table.only) & keys - {"clip_sample"}:  # the library's default is what an absent key means
        default = parameters[key].default
        values = default if isinstance(default, tuple) else [default]
        assert all(value in table.only[key] for value in values), key


def test_defaults_are_the_libraries():
    """What is read and left out has the library's default; only sizes that every file says differ."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    for ours, theirs, other in (
        (UNetConfig(), diffusers.UNet2DConditionModel, {"sample_size", "down_block_types", "up_block_types"}),
        (MMDiTConfig(), diffusers.SD3Transformer2DModel, set()),
        (flux.FluxConfig(), diffusers.FluxTransformer2DModel, set()),
        (VAEConfig(), diffusers.AutoencoderKL, {"block_out_channels", "layers_per_block", "shift_factor"}),
    ):
        parameters = inspect.signature(theirs.__init__).parameters
        for key in set(parameters) & set(ours.__dataclass_fields__) - other:
            assert getattr(ours, key) == parameters[key].default, key
    assert {key: getattr(UNetConfig(), key)[0] for key in ("down_depths", "up_depths", "heads")} == {
        "down_depths": (1, 1),
        "up_depths": (1, 1, 1),
        "heads": 8,
    }


def test_unknown_keys_are_named_once(caplog):
    keys = Keys(read={"a": whole(1)}, only={"b": (1,)}, ignored=frozenset("c"))
    with caplog.at_level(logging.WARNING):
        config = {"a": 2, "b": [1, 1], "c": 3, "d": 4, "e": None, "_private": 5, "f": False, "g\n": 1}
        assert checked(config, keys, "x.json") == {"a": 2}
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage() == "x.json: not known here, and ignored: 'd', 'g\\n'"


READERS = {
    "unet": (UNetConfig.from_dict, UNET, unet_config.KEYS),
    "mmdit": (MMDiTConfig.from_dict, SIZES, mmdit_config.KEYS),
    "flux": (flux.FluxConfig.from_dict, {}, flux.KEYS),
    "vae": (VAEConfig.from_dict, VAE, vae.KEYS),
    "text": (clip_config.CLIPTextConfig.from_dict, {}, clip_config.TEXT_KEYS),
    "vision": (clip_config.CLIPVisionConfig.from_dict, VISION, clip_config.VISION_KEYS),
    "clip": (clip_config.CLIPConfig.from_dict, {"vision_config": VISION}, clip_config.CLIP_KEYS),
    "t5": (t5.T5Config.from_dict, {"feed_forward_proj": "gated-gelu"}, t5.KEYS),
    "ddim": (load_process, SCHEDULER, ddim.KEYS),
    "flow": (load_process, {"_class_name": flow.SCHEDULER}, flow.KEYS),
    "judge": (ClassifierConfig.from_dict, {"widths": [8, 16]}, None),
}
ABSURD = [0, -1, 10**12, 10**400, 2.5, float("nan"), float("inf"), "64", "x" * 5000, True, [], [[]], [1, "2"], {}]
ABSURD += [{"a": 1}, [0, 0], ["a"], [None], [10**9] * 3]


@pytest.mark.parametrize("name", READERS)
def test_absurd_values_are_one_line(name):
    """Of every key: a config that is accepted, or one line that names the key."""
    read, good, keys = READERS[name]
    read(good)
    names = [*keys.read, *keys.only, "_class_name"] if keys else ["widths", "norm_num_groups", "animals"]
    refused = 0
    for key in names:
        for value in ABSURD:
            try:
                read(json.loads(json.dumps({**good, key: value})))
            except InputError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 1000 and key in str(error), error
    assert refused > 8 * len(names)


@pytest.mark.parametrize("config", [None, [], "text", 5])
def test_a_part_that_is_no_object(config):
    with pytest.raises(InputError, match="^CLIP config: vision_config: wants a json object, found"):
        clip_config.CLIPConfig.from_dict({"vision_config": config or [1]})


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention_head_dim": 3}, "attention_head_dim=3 does not divide block_out_channels=16"),
        ({"norm_num_groups": 32}, "norm_num_groups=32 does not divide block_out_channels=16"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 values; wants 2"),
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim has 3 values; wants 2"),
        ({"cross_attention_dim": [16, 24]}, "cross_attention_dim=[16, 24] is not supported; accepted: one value"),
        ({"layers_per_block": 16, "transformer_layers_per_block": 64}, "up to 512 of each"),
        ({"transformer_layers_per_block": [[1], 1]}, "wants reverse_transformer_layers_per_block beside it"),
        (
            {"transformer_layers_per_block": [[1, 2], 1], "reverse_transformer_layers_per_block": [1, 1]},
            "transformer_layers_per_block has [1, 2] for a block of 1 layers",
        ),
        ({"_class_name": "UNetMotionModel"}, "_class_name='UNetMotionModel' is not supported"),
        ({"act_fn": None}, "act_fn=null is not supported; accepted: 'silu', 'swish'"),
        ({"sample_size": [8, 8, 8]}, "sample_size=[8, 8, 8]; accepted: a number, or [height, width]"),
    ],
)
def test_sizes_of_a_unet_that_do_not_fit(changes, said):
    with pytest.raises(InputError) as error:
        UNetConfig.from_dict(UNET | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_equal_lists_are_one_value():
    """Every legal type of a value: lists of equal numbers, square sizes, nulls."""
    usual = UNetConfig.from_dict(UNET)
    for changes in (
        {"cross_attention_dim": [16, 16]},
        {"attention_head_dim": [2, 2]},
        {"layers_per_block": [1, 1]},
        {"transformer_layers_per_block": [1, 1]},
        {"transformer_layers_per_block": [[1], [1]], "reverse_transformer_layers_per_block": [[1, 1], 1]},
        {"only_cross_attention": [False, False], "norm_eps": None},
    ):
        assert UNetConfig.from_dict(UNET | changes) == usual, changes
    assert UNetConfig.from_dict(UNET | {"sample_size": [8, 8]}).side == 8
    assert UNetConfig.from_dict(UNET | {"sample_size": [6, 8]}).side is None
    text = clip_config.CLIPTextConfig.from_dict
    assert text({"eos_token_id": [7]}) == text({"eos_token_id": 7})
    vision = clip_config.CLIPVisionConfig.from_dict
    assert vision({"image_size": [224, 224], "patch_size": [32, 32]}) == vision({})


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "0.18", [0.18]])
def test_scaling_factors_that_cannot_be(value):
    with pytest.raises(InputError, match="^vae/config.json: scaling_factor="):
        VAEConfig.from_dict(VAE | {"scaling_factor": value})


def test_statistics_of_latents_that_do_not_fit():
    for changes, said in (
        ({"latents_mean": [0.0] * 4}, "wants latents_mean and latents_std, or none of them"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "latents_std has 3 values; wants 4"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std="),
    ):
        with pytest.raises(InputError, match=said):
            VAEConfig.from_dict(VAE | changes)
    sd, xl = (families.FAMILIES[name] for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    known = VAEConfig.from_dict(VAE | {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4})
    families.check_latents(known, xl)
    with pytest.raises(InputError, match="latents_mean is not supported in such a pipeline, where diffusers ignores"):
        families.check_latents(known, sd)
    for family in (sd, xl):
        with pytest.raises(InputError, match="shift_factor is not supported"):
            families.check_latents(VAEConfig.from_dict(VAE | {"shift_factor": 0.1}), family)


def test_open_clip_sizes_are_checked():
    good = open_clip.VIT_H_14
    assert open_clip.config_of(good).vision.num_attention_heads == 16
    for part, key, value in (
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "layers", 10**8),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "heads", 0),
        ("vision_cfg", "image_size", [224, 196]),
    ):
        with pytest.raises(InputError, match=f"{part}: {key}="):
            open_clip.config_of(good | {part: good[part] | {key: value}})
    with pytest.raises(InputError, match="model_cfg has no 'embed_dim'"):
        open_clip.config_of({key: value for key, value in good.items() if key != "embed_dim"})


# ---- preprocessor_config.json

HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3}


@pytest.mark.parametrize("nested", [False, True])
def test_statistics_of_a_processor(tmp_path, nested):
    assert processor.statistics(tmp_path, 16) == processor.CLIP
    name, content = "preprocessor_config.json", HALF
    if nested:
        name, content = "processor_config.json", {"image_processor": HALF, "processor_class": "CLIPProcessor"}
    (tmp_path / name).write_text(json.dumps(content))
    assert processor.statistics(tmp_path, 16) == ((0.5,) * 3, (0.25,) * 3)


def test_pixels_are_transformers(tmp_path):
    """On both paths the folder's own mean and deviation; transformers' processor on the published one."""
    from diffexp_jax.rewards import preprocess

    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(HALF | {"image_processor_type": "CLIPImageProcessor"})
    )
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    by = processor.statistics(tmp_path, 16)
    want = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"][0]
    found = preprocess.official_crop(picture, 16, preprocess.floor_half, by)
    np.testing.assert_allclose(found, want.transpose(1, 2, 0), atol=1e-5)
    on_device = preprocess.clip_pixels(picture[None].astype(np.float32) / 255, 16, by=by)
    np.testing.assert_allclose(on_device[0], found, atol=1e-5)


@pytest.mark.parametrize(
    "key, value",
    [
        ("size", {"shortest_edge": 32}),
        ("size", {"height": 16, "width": 16}),
        ("crop_size", {"height": 16, "width": 8}),
        ("resample", 2),
        ("do_center_crop", False),
        ("do_normalize", False),
        ("rescale_factor", 1.0),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", "0.5"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, key, value):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HALF | {key: value}))
    with pytest.raises(InputError, match=f"preprocessor_config.json: {key}"):
        processor.statistics(tmp_path, 16)


def test_rules_in_words():
    keys = Keys(read={"a": Many(Many(whole(0, 9), or_one=True)), "b": bool, "c": ("x", "y")}, only={})
    for config, said in (
        ({"a": 5}, "f: a=5; accepted: a list of a list of whole numbers 0..9, or one: whole numbers 0..9"),
        ({"b": 1}, "f: b=1; accepted: true, false"),
        ({"c": "z"}, "f: c='z'; accepted: x, y"),
    ):
        with pytest.raises(InputError) as error:
            checked(config, keys, "f")
        assert str(error.value) == said


# ---- sizes that the model was trained at


def tiny(**unet):
    """The config of a tiny pipeline whose UNet's file says something else."""
    index = {"_class_name": "StableDiffusionPipeline"}
    return families.model_config(
        index, {"unet": UNET | unet, "vae": VAE, "text_encoder": TOWER, "scheduler": SCHEDULER}
    )


@pytest.mark.parametrize(
    "version, size, side",
    [
        ("0.2.2", 8, 64),
        ("0.8.1", 32, 64),
        ("0.8.1", 96, 96),
        ("0.9.0.dev0", 8, 8),
        ("0.10.0", 8, 8),
        ("1.2", 8, 8),
        (None, 8, 8),
        (["0.2"], 8, 8),
        ("0.2.2", [8, 8], 8),
    ],
)
def test_old_files_say_a_smaller_size(version, size, side):
    """As diffusers' StableDiffusionPipeline has it: below 0.9, sizes below 64 that are one number are 64."""
    assert stable_diffusion.build(tiny(_diffusers_version=version, sample_size=size)).latent_shape == (side, side, 4)


def test_sizes_that_are_no_square():
    config = tiny(sample_size=[6, 8])
    with pytest.raises(
        InputError, match=r"sample_size=\[6, 8\] is no square; wants model.image_size \(or --image_size\)"
    ):
        stable_diffusion.build(config)
    assert stable_diffusion.build(config, image_size=16).latent_shape == (8, 8, 4)
