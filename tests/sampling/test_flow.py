"""Flow matching: diffusers' levels and Euler steps, Flow-GRPO's stochastic step, and a run on a tiny model."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import train
from diffexp_jax.errors import InputError
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.sampling import gaussian_log_prob, load_process

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def row(steps, i):
    return jax.tree.map(lambda column: column[i], steps)


def make(n, eta, config=FLOW):
    process = load_process(config)
    return process, process.make_steps(process.timesteps(n), np.full(n, 4.5, np.float32), eta=eta)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n, shift", [(1, 1.0), (2, 3.0), (10, 1.0), (28, 3.0), (50, 1.15)])
def test_levels_and_euler_steps_are_diffusers(n, shift):
    torch = pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(n)
    process, steps = make(n, 0.0, FLOW | {"shift": shift})
    np.testing.assert_allclose(steps.t, theirs.timesteps, rtol=1e-5)
    np.testing.assert_allclose(steps.level, theirs.sigmas[:-1], rtol=1e-5)
    assert float(steps.w_t[0]) == 4.5
    ours = want = normal(0, 2, 3, 4, 2)
    for i, t in enumerate(theirs.timesteps):
        out = normal(1 + i, 2, 3, 4, 2)
        mean, std = process.transition(jnp.asarray(ours), out, row(steps, i))
        assert float(std) == 0.0
        want = theirs.step(torch.from_numpy(out), t, torch.from_numpy(np.array(want))).prev_sample.numpy()
        ours = mean
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


def test_literal_levels():
    """Ten steps of shift 1 from 1 to 0.001; the noise of the first step, whose level is 1, is that of the second's."""
    _, steps = make(10, 0.7, FLOW | {"shift": 1.0})
    np.testing.assert_allclose(steps.t, np.linspace(1000, 1, 10), rtol=1e-6)
    np.testing.assert_allclose(steps.change, [-0.111] * 9 + [-0.001], rtol=1e-5)
    g = 0.7 * np.sqrt([1 / 0.111, 0.889 / 0.111])
    np.testing.assert_allclose(steps.sigma_t[:2], g * np.sqrt(0.111), rtol=1e-5)
    np.testing.assert_allclose(steps.drift[:2], np.square(g) / np.array([2.0, 1.778]), rtol=1e-5)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_every_step_is_flow_grpos(eta):
    """Eq. 9 as the published code groups it, in float64, with its log-prob."""
    process, steps = make(12, eta)
    levels = np.append(np.asarray(steps.level, np.float64), 0.0)
    for i in range(12):
        x, out, noise = normal(3 * i, 2, 2, 3, 4), normal(3 * i + 1, 2, 2, 3, 4), normal(3 * i + 2, 2, 2, 3, 4)
        s, ds = levels[i], levels[i + 1] - levels[i]
        std_dev = np.sqrt(s / (1 - (levels[1] if s == 1 else s))) * eta
        mean = x * (1 + std_dev**2 / (2 * s) * ds) + out * (1 + std_dev**2 * (1 - s) / (2 * s)) * ds
        std = std_dev * np.sqrt(-ds)
        ours, own_std = process.transition(jnp.asarray(x), out, row(steps, i))
        np.testing.assert_allclose(ours, mean, rtol=1e-4, atol=1e-5 * np.abs(mean).max())
        np.testing.assert_allclose(own_std, std, rtol=1e-4)
        after = mean + std * noise
        log_prob = -((after - mean) ** 2) / (2 * std**2) - np.log(std) - np.log(np.sqrt(2 * np.pi))
        own = gaussian_log_prob(jnp.asarray(after, jnp.float32), jnp.asarray(mean, jnp.float32), own_std)
        np.testing.assert_allclose(own, log_prob.mean((1, 2, 3)), rtol=1e-3, atol=1e-3)


def test_the_stochastic_chain_keeps_the_marginals():
    """The point of Eq. 9: with the true velocity of data N(0, 1), whose latents stay N(0, (1-s)^2 + s^2)."""
    process, steps = make(400, 0.7, FLOW | {"shift": 1.0})
    key = jax.random.key(0)
    x = jax.random.normal(key, (4096, 1, 1, 1))

    def step(x, xs):
        i, row = xs
        variance = jnp.square(1 - row.level) + jnp.square(row.level)
        velocity = (2 * row.level - 1) / variance * x  # E[eps - x_0 | x]
        mean, std = process.transition(x, velocity, row)
        return mean + std * jax.random.normal(jax.random.fold_in(key, i), x.shape), x.std()

    x_0, stds = jax.jit(lambda x: jax.lax.scan(step, x, (jnp.arange(400), steps)))(x)
    levels = np.asarray(steps.level)
    ratio = np.asarray(stds) / np.sqrt((1 - levels) ** 2 + levels**2)
    np.testing.assert_allclose(ratio, 1.0, atol=0.1)  # near 1 the steps are coarse, however many there are
    np.testing.assert_allclose(ratio[levels < 0.5], 1.0, atol=0.04)
    assert float(x_0.std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("key", ["use_dynamic_shifting", "use_karras_sigmas", "shift_terminal", "stochastic_sampling"])
def test_other_levels_are_refused(key):
    with pytest.raises(InputError, match=f"{key}=true is not supported"):
        load_process(FLOW | {key: True})
    load_process(FLOW | {key: False})


@pytest.mark.parametrize("n", [0, 1001])
def test_number_of_steps(n):
    with pytest.raises(InputError, match=f"{n} sampling steps; accepted: 1 to 1000"):
        load_process(FLOW).timesteps(n)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("algorithm", ["ddpo", pytest.param("alignprop", marks=pytest.mark.slow)])
def test_a_run_on_a_tiny_model(make_config, tiny_model, tmp_path, algorithm):
    """A folder whose scheduler says flow matching is fine-tuned so, by both algorithms, with exploration."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(FLOW))
    settings = {"model.path": str(folder), "iterations": 1, "eval.every": 0, "log.images_every": 0}
    settings |= {"ddpo.updates": 1, "ddpo.gradient": "twopass", "exploration.t_thresh": 800}
    train.run(make_config(algorithm, settings), tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run")[1:]
    assert row["grad_norm"] > 0 and np.isfinite(row["reward/mean"])
    if algorithm == "ddpo":  # the update scores under the very policy that sampled
        assert row["ratio/max_abs_log"] < 1e-5


def test_what_the_network_is_trained_on():
    """x_s = (1 - s) x_0 + s eps and v = eps - x_0, s one a sample; a whole step along v ends at x_0."""
    process = load_process(FLOW)
    x_0, eps = normal(0, 3, 2, 2, 1), normal(1, 3, 2, 2, 1)
    row = process.training_row(np.array([1000, 250, 1]))
    np.testing.assert_allclose(row.level, [1.0, 0.25, 0.001], rtol=1e-6)
    assert row.w_t.tolist() == [1.0] * 3 and process.n_train == 1000
    x_s, v = process.add_noise(x_0, eps, row), process.target(x_0, eps, row)
    np.testing.assert_allclose(x_s[0], eps[0], rtol=1e-6)
    np.testing.assert_allclose(x_s[1], 0.75 * x_0[1] + 0.25 * eps[1], rtol=1e-6)
    np.testing.assert_allclose(v, eps - x_0, rtol=1e-6)
    np.testing.assert_allclose(x_s - row.level[:, None, None, None] * v, x_0, atol=1e-6)


def test_the_forward_process_is_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs, process = FlowMatchEulerDiscreteScheduler(shift=3.0), load_process(FLOW)
    x_0, eps = normal(0, 2, 3, 4, 2), normal(1, 2, 3, 4, 2)
    t = theirs.timesteps[[10, 700]]
    want = theirs.scale_noise(torch.from_numpy(x_0), t, torch.from_numpy(eps)).numpy()
    np.testing.assert_allclose(process.add_noise(x_0, eps, process.training_row(t.numpy())), want, atol=1e-5)
