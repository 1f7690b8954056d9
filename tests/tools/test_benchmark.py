"""The benchmark: its torch peer does the same work, and its table says what was measured."""

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.errors import InputError
from diffexp_jax.pipelines import encode_empty, encode_prompts, load_pipeline, make_context
from diffexp_jax.sampling import load_process
from tests.support import ROOT
from tests.support.pipelines import SD15

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture
def scripts(monkeypatch):
    import benchmark
    import benchmark_work
    import torch_models
    import torch_peer

    return SimpleNamespace(benchmark=benchmark, work=benchmark_work, models=torch_models, peer=torch_peer)


@pytest.fixture(params=["emoji", "mid_sd3"])
def folder(request, scripts, tmp_path):
    """The emoji model's, or that of a random SD 3.5 of two blocks."""
    if request.param == "emoji":
        return scripts.models.EMOJI
    scripts.models.write_mid_sd3(tmp_path, num_layers=2, dual_attention_layers=(0,))
    return tmp_path


@pytest.fixture
def trainer(scripts, folder):
    size = scripts.work.Size(samples=4, steps=3, per_forward=4)
    parts = scripts.models.of_folder(folder, TEXTS)
    return scripts.peer.Trainer(parts, size, eta=1.0)


TEXTS = ["a dog riding a bike", "a cat"]


@pytest.mark.slow
def test_the_peer_takes_the_same_steps(scripts, trainer, folder):
    """Prompts, guidance, and the mean and std of each step, before its LoRA has learned."""
    model = load_pipeline(folder)
    process = model.process
    t = process.timesteps(3)
    steps = process.make_steps(t, np.full(3, 5.0, np.float32), eta=1.0)
    denoise = functools.partial(model.network(steps.w_t), model.sampling_params, None)
    rng, rows = np.random.default_rng(0), np.random.default_rng(0).integers(2, size=4)  # as the trainer draws them
    cond, _ = encode_prompts(model, tuple(TEXTS))
    context = make_context(jax.tree.map(lambda x: x[rows], cond), model.unconditional(encode_empty(model)))
    ((_, both),) = trainer.chunks()
    for i, (theirs, w) in enumerate(trainer.steps):
        step = type(steps)(*(column[i] for column in steps))
        x_t = rng.standard_normal((4, *model.latent_shape)).astype(np.float32)
        mean, std = process.transition(x_t, denoise(x_t, step, context), step)
        with torch.no_grad():
            found = trainer.mean(torch.tensor(x_t.transpose(0, 3, 1, 2)), theirs, w, both).numpy()
        assert theirs.t == pytest.approx(float(t[i]), rel=1e-4) and theirs.std == pytest.approx(float(std), rel=1e-4)
        np.testing.assert_allclose(found.transpose(0, 2, 3, 1), mean, atol=1e-3)


@pytest.mark.parametrize("kind, eta", [("ddim", 1.0), ("flow", 0.7), ("flow", 0.0)])
def test_steps_literal(scripts, kind, eta):
    """Mean and std of the package's steps, of numbers in place of latents."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    process = load_process(flow if kind == "flow" else SD15)
    ours = process.make_steps(process.timesteps(5), np.ones(5), eta=eta)
    x, out = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 1)).astype(np.float32)
    for i, theirs in enumerate(getattr(scripts.models, f"{kind}_steps")(5, eta)):
        mean, std = process.transition(x, out, type(ours)(*(column[i] for column in ours)))
        assert theirs.t == pytest.approx(float(ours.t[i]), rel=1e-4)
        assert theirs.std == pytest.approx(float(std), rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(theirs.move(torch.tensor(x), torch.tensor(out)), mean, atol=1e-4)


@pytest.mark.slow  # its steps are compared by default
def test_the_peer_scores_alike(scripts, monkeypatch):
    """Scores and their gradients by the images, of the emoji world's CLIP."""
    monkeypatch.setattr(scripts.work, "N_SCORED", 4 * jax.device_count())
    images = scripts.work.scored_images()
    for case in scripts.work.SCORING:
        ours = np.concatenate(np.asarray(scripts.work.our_scoring(case)[0](0)))
        run = scripts.peer.make_scoring(images, scripts.work.SCORED_PROMPT, gradient="gradient" in case)
        theirs = run(0).numpy()
        if "gradient" in case:
            theirs = theirs.transpose(0, 2, 3, 1)
        order = np.argsort(np.concatenate(parallel.sample_index(len(images))), kind="stable")
        np.testing.assert_allclose(ours[order], theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.slow
def test_the_peer_learns(trainer):
    """Both methods change the LoRA, and nothing else; one chunk of samples makes one update."""
    frozen = [p.clone() for p in trainer.network.parameters() if not p.requires_grad]
    for work in (lambda: trainer.ddpo(updates=1), lambda: trainer.alignprop(2)):
        before = [p.detach().clone() for p in trainer.trained]
        work()
        assert any((p != old).any() for p, old in zip(trainer.trained, before, strict=True))
    unchanged = (p for p in trainer.network.parameters() if not p.requires_grad)
    assert all((p == old).all() for p, old in zip(unchanged, frozen, strict=True))


OURS = {"median": 2.0, "first": 9.6, "first_again": 3.0, "peak_bytes": 10**9, "peak_bytes_again": 9 * 10**8}
REPORT = {
    "date": "2026-01-02",
    "command": "python tools/benchmark/benchmark.py",
    "machine": {"devices": "2 x a CPU (avx2), 2 cores", "jax": "0.10.2"},
    "repeats": 3,
    "matrix_peak": 1e11,
    "rows": [
        {
            "model": "emoji",
            "case": "sampling",
            "flops": 1e11,
            "ours": OURS,
            "torch": {"median": 3.0, "ratio": 1.5, "first": 3.1, "peak_bytes": 5 * 10**8},
        },
        {
            "model": "sd15",
            "case": "sampling",
            "flops": 1e11,
            "ours": OURS,
        },
    ],
    "growth": [
        {"model": "emoji", "case": "sampling", "size": {"steps": 50}, "flops": 5e11, "median": 6.0, "first": 9.0}
    ],
}


def test_uniform_k_is_what_the_update_draws(scripts):
    """The peer is told the K of each repetition."""
    found = [scripts.work.live_steps("AlignProp, uniform K", 20, repetition) for repetition in range(8)]
    assert len(set(found)) > 3 and all(1 <= k <= 20 for k in found)
    assert [scripts.work.live_steps(case, 20) for case in ("AlignProp, K = T", "AlignProp, K = T/4")] == [20, 5]


def test_table_literal(scripts, tmp_path):
    text = scripts.benchmark.table(REPORT)
    assert "| emoji | sampling | 2.00 s | 3.00 s | 1.50 | 1.00 GB | 0.90 GB | 0.50 GB | 10 s | 3 s | 50 % |" in text
    assert "| sd15 | sampling | 2.00 s |  |  | 1.00 GB | 0.90 GB |  | 10 s | 3 s | 50 % |" in text
    assert "| emoji | sampling | steps 50 | 6.00 s | 12.0 s | 9 s |" in text
    assert "2 x a CPU (avx2), 2 cores, jax 0.10.2; matrix peak 100 GFLOP/s; medians of 3, 2026-01-02" in text
    path = tmp_path / "b.md"
    path.write_text("above\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nbelow\n")
    scripts.benchmark.write_table(path, text)
    assert path.read_text().startswith("above\n<!-- benchmark -->\n| model") and "old" not in path.read_text()
    path.write_text("no markers")
    with pytest.raises(InputError, match="wants the lines"):
        scripts.benchmark.write_table(path, text)


def test_a_table_that_cannot_be_written_is_told_before_the_work(scripts, tmp_path):
    args = SimpleNamespace(repeats=1, out=tmp_path / "b.json", table=tmp_path / "b.md", before=None)
    with pytest.raises(InputError, match="b.md: the file is missing"):
        scripts.benchmark.main(args)
    (tmp_path / "b.md").write_text("no markers")
    with pytest.raises(InputError, match="b.md: wants the lines <!-- benchmark --> and"):
        scripts.benchmark.main(args)
    assert not (tmp_path / "b.json").exists()


def test_a_folder_that_is_no_checkout_is_told_before_the_work(scripts, tmp_path):
    args = SimpleNamespace(repeats=1, out=tmp_path / "b.json", table=None, before=tmp_path)
    with pytest.raises(InputError, match="--before .*: not a checkout of this package"):
        scripts.benchmark.main(args)


@pytest.mark.slow
def test_a_benchmark(tmp_path):
    """Beside torch, and this checkout as the one before."""
    line = [
        sys.executable,
        str(ROOT / "tools" / "benchmark" / "benchmark.py"),
        "--model=emoji",
        "--case=sampling",
        "--repeats=1",
        f"--before={ROOT}",
    ]
    done = subprocess.run([*line, "--out=b.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert 0 < row["ours"]["first_again"] < row["ours"]["first"]
    assert row["flops"] > 1e11 and row["ours"]["median"] > 0 and row["torch"]["peak_bytes"] > 1e8
    assert row["before"]["ratio"] == row["before"]["median"] / row["ours"]["median"]
