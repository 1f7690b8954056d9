"""tools/emoji/pretrain_emoji.py: learns, logs, and continues where it stopped."""

import functools
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.emoji import flow_stages, pretraining, reward_stages
from diffexp_jax.emoji.pretraining import Stage
from diffexp_jax.pipelines import load_pipeline
from diffexp_jax.run.fingerprint import fingerprint
from tests.support import ROOT

_SCRIPT = ROOT / "tools/emoji/pretrain_emoji.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_emoji", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quadratic(fail_at: int | None = None) -> Stage:
    """Fits the mean of noisy data; after `fail_at` steps the loss is no longer a number."""
    seen = {"steps": 0}

    def count(_):
        seen["steps"] += 1
        return np.float32(np.nan if seen["steps"] == fail_at else 0.0)

    def loss(params, data, key):
        target = data + 0.1 * jax.random.normal(key, data.shape)
        bad = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), key) if fail_at else 0.0
        value = jnp.square(params["mean"] - target).mean() + jax.lax.stop_gradient(bad)
        return value, {"distance": jnp.abs(params["mean"] - data).max()}

    def init(key):
        return {"mean": jax.random.normal(key, (3,))}

    return Stage("quadratic", 0, 0.05, init, loss, lambda params, out: None, jnp.arange(3.0))


def test_learns_and_logs(script, tmp_path):
    ema = script.train(quadratic(), tmp_path, seed=0, steps=300, save_every=100)
    np.testing.assert_allclose(ema["mean"], [0.0, 1.0, 2.0], atol=0.3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["distance"] < 0.2 < rows[0]["distance"] and {"stage", "loss", "seconds"} <= rows[0].keys()


def test_continues_bit_for_bit(script, tmp_path):
    whole = script.train(quadratic(), tmp_path / "whole", seed=3, steps=60, save_every=10)
    with pytest.raises(SystemExit, match="not finite at step 50"):
        script.train(quadratic(fail_at=50), tmp_path / "cut", seed=3, steps=60, save_every=10)
    assert sorted(path.name for path in (tmp_path / "cut/quadratic").iterdir()) == ["40"]
    continued = script.train(quadratic(), tmp_path / "cut", seed=3, steps=60, save_every=10)
    np.testing.assert_array_equal(whole["mean"], continued["mean"])


def test_another_seed_is_another_run(script, tmp_path):
    runs = [script.train(quadratic(), tmp_path / str(n), seed=n, steps=5, save_every=5)["mean"] for n in (0, 1)]
    assert not np.array_equal(*runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["diffusion_hard", "vae", "vae_decoder", "diffusion", "flow", "flow_hard", "clip", "judge", "aesthetic"]
)
def test_every_stage_trains_and_exports(script, tmp_path, monkeypatch, name):
    """From what is shipped: two steps change what the stage makes, in its published format, and nothing else."""
    encode = pretraining.encoded_scenes
    for module in (pretraining, flow_stages):
        monkeypatch.setattr(module, "encoded_scenes", lambda *args, **kw: encode(*args[:2], 64, chunk=64, **kw))
    if name in reward_stages.STAGES:
        monkeypatch.setitem(script.STAGES, name, functools.partial(reward_stages.STAGES[name], n_pictures=512))
    out = shutil.copytree(pretraining.ASSETS, tmp_path / "assets")
    shutil.rmtree(out / "model_hard", ignore_errors=True)
    before = digests(out)
    line = f"--stages={name} --workdir={tmp_path / 'work'} --out={out} --steps=2 --batch=16 --from_shipped"
    script.main(script.parse(line.split()))
    after = digests(out)
    part = {"diffusion_hard": "model_hard", "vae_decoder": "model/vae", "clip": "reward_clip"}.get(name, name)
    parts = {"vae": ["model/vae"], "diffusion": ["model/unet", "model/text_encoder"]}.get(name, [part])
    if name.startswith("flow"):
        parts = [f"model_flow/{part}" for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")]
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed and all(any(path.startswith(f"{part}/") for part in parts) for path in changed), changed
    assert {path for path in changed if path.endswith(".safetensors")} >= {
        path for path in before if path.endswith(".safetensors") and any(path.startswith(f"{x}/") for x in parts)
    }
    if name == "diffusion_hard":
        hard, base = (load_pipeline(out / folder) for folder in ("model_hard", "model"))
        same = {name: fingerprint(x) == fingerprint(base.params[name]) for name, x in hard.params.items()}
        assert same == {"unet": False, "text_encoder": False, "vae": True}


def digests(folder: Path) -> dict[str, str]:
    """Of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
