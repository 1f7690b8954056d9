"""Numbers that are not finite: weights are refused by file and tensor, pictures and scores by one line."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import base
from diffexp_jax import rewards
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.formats import convert
from diffexp_jax.pipelines import load_pipeline
from diffexp_jax.programs import check_pictures
from diffexp_jax.rewards import load_reward
from diffexp_jax.rewards.scoring import check_scores, means_of
from diffexp_jax.sampler import Sampler
from diffexp_jax.settings import parsed

DTYPES = [np.float32, np.float16, jnp.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, (np.inf, -np.inf)])
def test_weights_that_are_not_finite(dtype, wrong):
    x = np.ones((3, 4), np.float32)
    x.flat[-np.size(wrong) :] = wrong
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((4, 3), np.float32)}}
    with pytest.raises(InputError, match=r"^model/unet: tensor a\.weight holds NaN or infinite numbers"):
        convert.from_torch({"a.weight": x}, shapes, where="model/unet", dtype=dtype)


@pytest.mark.filterwarnings("error")
def test_weights_too_large_for_their_type():
    shapes = {"a": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}}
    tensors = {"a.bias": np.array([1.0, 7e4], np.float32)}
    with pytest.raises(InputError, match="^m: tensor a.bias has numbers too large for float16; wants bfloat16 or"):
        convert.from_torch(tensors, shapes, where="m", dtype=np.float16)
    for value in (7e4, 3e38):  # whose sum overflows, and not they
        tensors = {"a.bias": np.full(2, value, np.float32)}
        assert convert.from_torch(tensors, shapes, where="m", dtype=np.float32)["a"]["bias"][0] == np.float32(value)


def spoilt(folder, name=None):
    """One number of a file's tensor becomes NaN; the file and the tensor's name."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = name or min(key for key, x in tensors.items() if x.size > 1)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = np.nan
    save_file(tensors, file)
    return file, name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_with_nan(tiny_model, tmp_path, part):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file, name = spoilt(folder / part)
    with pytest.raises(InputError) as error:
        load_pipeline(folder)
    assert str(error.value).startswith(f"{file}: tensor {name} holds NaN")


@pytest.mark.parametrize("name", ["emoji_pickscore", "emoji_aesthetic", "emoji_judge"])
def test_a_reward_with_nan(tmp_path, name):
    shipped = rewards.BUILTINS[name].path
    folder = shutil.copytree(shipped, tmp_path / "reward")
    if name == "emoji_aesthetic":
        shutil.copytree(shipped.parent / "reward_clip", folder / "clip")
    _, tensor = spoilt(folder)
    spec = {"emoji_pickscore": "pickscore", "emoji_aesthetic": "aesthetic"}.get(name, name)
    with pytest.raises(InputError, match=f"tensor {tensor} holds NaN"):
        load_reward(f"{spec}:{folder}")


def test_a_score_that_is_not_finite(monkeypatch, script, tmp_path, capsys):
    """score.py ends in one line and exit code 2, in place of "mean nan"."""
    (tmp_path / "half_nan.py").write_text(
        "import jax.numpy as jnp\n\n\ndef score(images):\n    x = images.mean((1, 2, 3))\n    return jnp.log(x - 0.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for i, level in enumerate((50, 200)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"{i}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    with pytest.raises(SystemExit) as stop:
        script("score", "--reward=jax:half_nan:score", "--images", *files, f"--out={tmp_path / 's.csv'}")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(said) == 1 and not (tmp_path / "s.csv").exists()
    assert ": 1 of 2 scores are not finite (NaN or infinite)" in said[0]
    check_scores({"a": np.ones(3), "b": np.zeros(0)})


@pytest.mark.parametrize("value", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, -np.inf))])
def test_pictures_that_are_not_finite(tiny_model, value, monkeypatch):
    """Of sample.py, which wants numbers, and of evaluate.py: as bytes they would be black or white."""
    config = base.default()
    config.update_from_flattened_dict({"model.path": str(tiny_model), "sampling.steps": 1})
    built = Sampler.build(parsed(config))
    built.pipeline.params["vae"]["decoder"]["conv_out"]["bias"][0] = value
    monkeypatch.setattr(Sampler, "build", lambda config: built)
    model = Evaluator.of_settings(parsed(config), batch=1)
    for sample in (partial(model.images, floats=True), model.images, model.evaluate):
        with pytest.raises(InputError, match="^1 of 1 pictures are not finite: the model, its VAE or the LoRA"):
            sample(["a dog"])


def test_finite_pictures_pass():
    check_pictures(np.ones(3, bool))
    with pytest.raises(InputError, match="^2 of 3 pictures"):
        check_pictures(np.array([False, True, False]))


def test_evaluations_while_training_warn_of_scores(caplog):
    """A held-out reward that fails does not end a run, and its mean is not silent."""
    scores = {"judge": np.array([1.0, np.nan, np.inf]), "other": np.array([1.0, 3.0])}
    means = means_of("eval/animals", scores)
    assert means["eval/animals/other"] == 2.0 and not np.isfinite(means["eval/animals/judge"])
    (said,) = caplog.messages
    assert said.startswith("eval/animals/judge: 2 of 3 scores are not finite")
