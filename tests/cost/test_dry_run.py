"""The dry run: its counts against published ones and XLA's, its shapes against a real run's, and what it prints."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax.algorithms import METHODS
from diffexp_jax.cost import dry_run, flops
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.pipelines import load_pipeline, sizes
from diffexp_jax.pipelines.stable_diffusion import TextEmbedding
from diffexp_jax.rewards import load_reward
from diffexp_jax.settings import checked

SD15, SD21, SDXL, *_ = sizes.PIPELINES

# ---------------------------------------------------------------------------------------------------------------- FLOPs


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def same_in_every_turn(x, w):
    return jax.lax.scan(lambda x, _: (x @ jax.nn.relu(w @ w), None), x, length=5)[0]


def same_but_in_a_branch(x, w):
    return jax.lax.scan(lambda x, _: (jax.lax.cond(x[0, 0] > 0, lambda: x @ (w @ w), lambda: x), None), x, length=5)[0]


def branch(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


def checkpointed(x, w):
    return jax.checkpoint(lambda x: jnp.sin(x @ w))(x).sum()


def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)


@pytest.mark.parametrize(
    "function, args, expected",
    [
        (lambda x, w: x @ w + 1, [zeros(2, 3), zeros(3, 4)], 2 * 2 * 3 * 4),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), [zeros(5, 2, 3), zeros(5, 3, 4)], 2 * 5 * 2 * 3 * 4),
        (loop, [zeros(2, 3), zeros(3, 3)], 5 * 2 * 2 * 3 * 3),
        (jax.jit(lambda x, w: jax.lax.map(lambda row: loop(row, w), x)), [zeros(7, 2, 3), zeros(3, 3)], 7 * 5 * 36),
        (same_in_every_turn, [zeros(2, 3), zeros(3, 3)], 5 * 36 + 54),
        (
            lambda x, w: jax.lax.map(lambda row: same_in_every_turn(row, w), x),
            [zeros(7, 2, 3), zeros(3, 3)],
            7 * 180 + 54,
        ),
        (
            lambda x, w: jax.lax.map(lambda w: same_in_every_turn(x, w), w),
            [zeros(2, 3), zeros(7, 3, 3)],
            7 * (180 + 54),
        ),
        (same_but_in_a_branch, [zeros(2, 3), zeros(3, 3)], 5 * (36 + 54)),
        (branch, [zeros(2, 3), zeros(3, 3)], 2 * 36),
        (convolve, [zeros(2, 8, 8, 3), zeros(3, 3, 3, 5)], 2 * (2 * 8 * 8 * 5) * 27),
        (jax.value_and_grad(checkpointed), [zeros(2, 3), zeros(3, 3)], 3 * 36),
        (jax.grad(checkpointed), [zeros(2, 3), zeros(3, 3)], 2 * 36),
    ],
)
def test_flops_literal(function, args, expected):
    """The last but one: a product forward, again in the backward pass, and the one of the gradient. The last: nobody
    reads the first.
    """
    assert flops.of(function, *args) == expected


def test_flops_against_xla():
    """On a UNet, which has no loops. XLA counts elementwise operations too, and leaves out products with padding: of
    these latents, larger than the model's own, little is padding.
    """
    model = load_pipeline("emoji", weights=False)
    x, context = zeros(1, 32, 32, model.latent_shape[-1]), zeros(1, 32, 64)

    def unet(params, x, context):
        return model.denoise(params, None, x, model.process.training_row(5), TextEmbedding(context))

    ours = flops.of(unet, model.params, x, context)
    theirs = jax.jit(unet).lower(model.params, x, context).cost_analysis()["flops"]
    assert 0.9 * theirs < ours < 1.1 * theirs


def test_what_is_taken_out_of_the_loop(make_config):
    """XLA makes the prompts' keys and values once for all steps of sampling, as the count has it, and no queries so."""
    experiment = Experiment.build(checked(make_config("ddpo", {"eval.every": 0})), weights=False)
    sampling, *_ = dry_run.programs_of(experiment)
    every_pass = {"xla_disable_hlo_passes": ""}  # conftest.py leaves this one out
    program = jax.jit(sampling.function).lower(*sampling.args).compile(compiler_options=every_pass)
    depths = loops_around(program.as_text(), "attn2/to_")
    assert depths["k"] == depths["v"] == depths["q"] - 1


def loops_around(program: str, layer: str) -> dict[str, int]:
    """{letter of the projection: the most loops that its products are in} in a compiled program's text."""
    callers, loops, products, inside = {}, set(), [], ""
    for line in program.splitlines():
        if name := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line):
            inside = name[1]
        for how, called in re.findall(r"(calls|to_apply|body|condition)=%([\w.-]+)", line):
            callers.setdefault(called, []).append(inside)
            loops |= {called} if how == "body" else set()
        if " dot(" in line and (found := re.search(re.escape(layer) + r"([a-z])\b", line)):
            products.append((found[1], inside))

    def depth(name):
        return (name in loops) + max((depth(caller) for caller in callers.get(name, [])), default=0)

    deepest = {}
    for projection, name in products:
        deepest[projection] = max(depth(name), deepest.get(projection, 0))
    return deepest


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "path, counts, latents",
    [
        (SD15, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}, (64, 64, 4)),
        pytest.param(
            SD21,
            {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
            (96, 96, 4),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SDXL,
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
            (128, 128, 4),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_published_sizes(path, counts, latents):
    model = load_pipeline(path, weights=False, dtype="bfloat16")
    assert {part: dry_run.count(tree) for part, tree in model.params.items()} == counts
    assert model.latent_shape == latents
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "spec, count",
    [
        # CLIP L/14 without its text tower, and the head
        ("aesthetic:nowhere", 427_616_513 - 123_060_480 - 768 * 768 + 927_969),
        # without BLIP's contrastive projections, which it does not use
        pytest.param("imagereward:nowhere", 446_665_953 - 459_264, marks=pytest.mark.slow),
        pytest.param("hpsv2:a+pickscore:b", 2 * 986_109_441, marks=pytest.mark.slow),
    ],
)
def test_published_rewards(spec, count):
    reward = load_reward(spec, shapes_only=True)
    assert dry_run.count(reward.params) == count
    tokens = reward.tokenize(("a dog", "a cat"))
    images = zeros(2, 64, 64, 3)
    scores, _ = jax.eval_shape(reward.score, reward.params, images, tokens)
    assert scores.shape == (2,) and scores.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_are_those_of_a_run(make_config, dtype):
    """Of every array that the programs take: so these are the programs that the run compiles."""
    config = make_config("ddpo", {"model.dtype": dtype})
    real, abstract = Experiment.build(checked(config)), Experiment.build(checked(config), weights=False)

    def arrays(experiment):
        rewards = {"": experiment.trained} | experiment.rewards
        frozen = {
            "model": experiment.sampler.pipeline.sampling_params,
            "rewards": {n: r.params for n, r in rewards.items()},
        }
        batch = experiment.draw_batch(0, None)
        sampler = experiment.sampler
        return frozen, batch, experiment.units, sampler.empty, sampler.uncond, experiment.train.tokens

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(arrays(real)) == shapes(arrays(abstract))
    assert (
        real.train.texts == abstract.train.texts
        and real.sampler.pipeline.latent_shape == abstract.sampler.pipeline.latent_shape
    )


def test_unknown_sizes():
    with pytest.raises(InputError, match="'some/model': no such folder, and its sizes are not known; accepted: emoji"):
        load_pipeline("some/model", weights=False)


# --------------------------------------------------------------------------------------------------------------- report


def test_halves_that_exploration_leaves_out(make_config):
    """Two steps of four at a guidance of 1: 6 evaluations of a sample instead of 8."""
    for w_low, said in (
        (1.0, "64 to sample, 48 with a gradient, 24 for the old log-probs; 25% fewer while it explores"),
        (2.0, "log-probs"),
    ):
        config = make_config("ddpo", {"exploration.w_low": w_low, "ddpo.old_log_prob": "recomputed"})
        assert dry_run.describe(Experiment.build(checked(config), weights=False))[-1].endswith(said)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ddpo.updates": 2, "ddpo.kl_weight": 0.1}, "64 to sample, 48 with a gradient, 48 of the untuned model"),
        ({"alignprop.truncation": "uniform"}, "24 to sample, 40 to sample with a gradient"),
        ({"draft.k": 1}, "48 to sample, 16 to sample with a gradient"),
        ({"dpok.updates": 2}, "64 to sample, 64 with a gradient, 64 of the untuned model"),
        (
            {"prdp.inner_epochs": 2, "prdp.timestep_fraction": 0.8},
            "64 to sample, 96 with a gradient, 48 of the untuned model, 48 to weigh",
        ),
        ({"rwr.updates": 2, "rwr.inner_epochs": 4}, "64 to sample, 64 with a gradient"),
        (
            {"nft.timestep_fraction": 0.3},
            "64 to sample, 8 with a gradient, 8 of the policy that sampled, 8 of the untuned model",
        ),
        ({"awm.timesteps": 6}, "64 to sample, 48 with a gradient, 48 of the untuned model, 48 of the average"),
        ({"entropy.alpha": 1.0}, "32 to sample, 32 to sample with a gradient, 64 of the untuned model"),
        (
            {"seiko.updates": 2, "seiko.inner_epochs": 2, "seiko.truncation_k": 3},
            "64 to sample, 32 to climb, 96 to climb with a gradient, 128 of the round's first model",
        ),
    ],
)
def test_network_evaluations_of_every_method(make_config, changes, said):
    """8 samples, 4 steps, guided: 64. DDPO and PRDP learn from three steps of four; NFT and AWM without guidance."""
    method = next(iter(changes)).partition(".")[0]
    group = {"batch.group": 2} if METHODS[method]().compares_groups else {}
    config = make_config(method, {"exploration.enabled": False, "sampling.eta": 1.0} | group | changes)
    line = dry_run.describe(Experiment.build(checked(config), weights=False))[-1]
    assert line == f"iteration   8 reward queries, network evaluations: {said}"


def test_what_it_prints(make_config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = make_config("ddpo", {"eval.every": 0, "log.images_every": 0, "ddpo.old_log_prob": "recomputed"})
    dry_run.dry_run(checked(config))
    said = capsys.readouterr().out
    experiment = Experiment.build(checked(config))
    assert f"{dry_run.count(experiment.sampler.pipeline.base):,}  unet" in said
    assert "8 samples = 1 devices x 2 updates x 1 forward passes x 4 samples, of " in said
    assert "8 reward queries, network evaluations: 64 to sample, 48 with a gradient, 24 for" in said
    rows = [line.split() for line in said.splitlines() if line.startswith(("sample ", "update "))]
    assert [row[0] for row in rows] == ["sample", "update"]
    sample, update = (float(row[5]) for row in rows)
    assert sample < update < 6 * sample
    assert "XLA's memory analysis for the backend 'cpu'" in said and "this is CPU's number" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reward_in_plain_python(make_config):
    """It samples chunk by chunk, so an iteration is as much work as of a reward in JAX."""
    work = {}
    for reward in ("python:sample_rewards:bright_and_long", "jax:sample_rewards:bright_and_long_jax"):
        config = make_config("ddpo", {"eval.every": 0, "log.images_every": 0, "reward": reward})
        programs = list(dry_run.programs_of(Experiment.build(checked(config), weights=False)))
        assert [program.name for program in programs] == ["sample", "update"]
        assert programs[0].calls == (2 if reward.startswith("python") else 1)
        work[reward] = sum(program.calls * flops.of(program.function, *program.args) for program in programs)
    python, jax_ = work.values()
    assert python == pytest.approx(jax_, rel=1e-3)


def test_bytes_are_xlas():
    """A program with 4 MB of arguments, 4 MB of results, and no room for the product in between to hide."""

    def f(x):
        return jnp.tanh(x @ x) @ x

    cost = dry_run.cost_of("f", jax.jit(f), (zeros(1024, 1024),))
    assert cost.arguments == cost.outputs == 4 * 1024**2
    assert 4 * 1024**2 <= cost.temporaries < 9 * 1024**2
    assert cost.peak == cost.arguments + cost.outputs + cost.temporaries
    assert cost.flops == 2 * 2 * 1024**3
    assert np.isfinite(cost.seconds)
