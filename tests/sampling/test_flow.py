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
from diffexp_jax.sampling import Noise, gaussian_kl, gaussian_log_prob, load_process
from tests.support.arrays import normal

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def row(steps, i):
    return jax.tree.map(lambda column: column[i], steps)


def make(n, eta, config=FLOW, **options):
    process = load_process(config)
    return process, process.make_steps(process.timesteps(n), np.full(n, 4.5, np.float32), eta=eta, **options)


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
    np.testing.assert_allclose(steps.dt, [0.111] * 9 + [0.001], rtol=1e-5)
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


# (std, drift) of each step by SD3's ten levels
NOISES = {
    "sde": (
        0.7,
        [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063],
        [6.1449, 6.1449, 2.8274, 1.7216, 1.1687, 0.8370, 0.6158, 0.4578, 0.3394, 0.2472],
    ),
    "dance": (
        0.3,
        [0.0599, 0.0649, 0.0708, 0.0778, 0.0865, 0.0973, 0.1112, 0.1297, 0.1556, 0.0283],
        [0.0450, 0.0469, 0.0493, 0.0525, 0.0569, 0.0636, 0.0747, 0.0968, 0.1618, 5.0400],
    ),
    "cps": (
        0.8,
        [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0.0],
        [16.6396, 13.4909, 10.6483, 8.1120, 5.8818, 3.9578, 2.3400, 1.0284, 0.0229, 0.0],
    ),
    "precise": (
        1.5,
        [0.9601, 0.8392, 0.7256, 0.6382, 0.5625, 0.4858, 0.3926, 0.2548, 0.0089, 0.0],
        [24.0811, 11.8168, 7.1935, 4.8141, 3.3522, 2.3437, 1.5730, 0.8923, 0.0327, 0.0],
    ),
}


@pytest.mark.parametrize("noise", NOISES)
def test_literal_noise(noise):
    """The numbers of the published implementations, whose means are of one form."""
    eta, std, drift = NOISES[noise]
    _, steps = make(10, eta, noise=noise)
    levels = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    np.testing.assert_allclose(steps.level, levels, atol=5e-5)
    np.testing.assert_allclose(steps.sigma_t, std, atol=6e-5)
    np.testing.assert_allclose(steps.drift, drift, atol=6e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_without_noise_every_rule_is_the_ode(noise):
    _, steps = make(7, 0.0, noise=noise)
    assert not steps.sigma_t.any() and not steps.drift.any()


@pytest.mark.parametrize("noise", ["cps", "precise"])
@pytest.mark.parametrize("n", [4, 10, 40])
def test_these_rules_leave_the_noise_of_each_level(noise, n):
    """By any number of steps: of data that is one point, of which the network knows all, x_s = (1 - s) x_0 + s eps."""
    process, steps = make(n, NOISES[noise][0], noise=noise)
    variance, levels = 1.0, np.append(np.asarray(steps.level, np.float64), 0.0)
    for i in range(n):
        one = row(steps, i)
        # the network's velocity is (x - x_0) / s: what the step makes of an x away from the mean
        (slope, std), zero = process.transition(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)) / one.level, one), 0.0
        at_zero, _ = process.transition(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), one)
        variance = float(slope[0, 0, 0, 0]) ** 2 * variance + float(std) ** 2
        assert float(at_zero[0, 0, 0, 0]) == zero
        assert variance == pytest.approx(levels[i + 1] ** 2, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("noise, eta, lost", [("precise", 1.5, 0.0), ("cps", 0.05, 0.0), ("cps", 0.8, 0.2)])
def test_the_marginals_of_gaussian_data(noise, eta, lost):
    """Of data N(0, 1) and the true velocity, by the variance of each step's x; 400 steps of shift 1.

    Strong noise by cps loses a fifth of the images' spread, however many steps: each draws anew from E[x_0 | x].
    """
    process, steps = make(400, eta, FLOW | {"shift": 1.0}, noise=noise)
    one = jnp.ones((1, 1, 1, 1))

    def slope(row):
        velocity = (2 * row.level - 1) / (jnp.square(1 - row.level) + jnp.square(row.level))
        return process.transition(one, velocity * one, row)[0][0, 0, 0, 0]

    variance, found = 1.0, []
    for of_x, std in zip(*map(np.asarray, (jax.vmap(slope)(steps), steps.sigma_t)), strict=True):
        variance = of_x**2 * variance + std**2
        found.append(np.sqrt(variance))
    levels = np.append(np.asarray(steps.level)[1:], 0.0)
    ratio = np.array(found) / np.sqrt((1 - levels) ** 2 + levels**2)
    assert ratio[-1] == pytest.approx(1.0 - lost, abs=0.01)
    np.testing.assert_allclose(ratio[levels > (0.9 if lost else 0.0)], 1.0, atol=0.01)
    halfway = ratio[np.abs(levels - 0.5).argmin()]
    assert halfway == pytest.approx(0.89 if lost else 1.0, abs=0.01)


def test_noise_that_a_process_has_not():
    process = load_process(FLOW)
    with pytest.raises(InputError, match="^eta=1.2: sampling.noise='cps' wants 0..1"):
        process.make_steps(process.timesteps(4), np.ones(4), eta=1.2, noise="cps")


@pytest.mark.parametrize(
    "noise, possible, starts, strengths",
    [
        (Noise(), range(4), range(1), [0.7, 0.7, 0.7, 0.7]),
        (Noise("cps"), range(3), range(1), [0.7, 0.7, 0.7, 0.0]),
        (Noise("sde", (0, 3)), range(3), range(1), [0.7, 0.7, 0.7, 0.0]),
        (Noise("sde", (1, 9)), range(1, 4), range(1, 2), [0.0, 0.7, 0.7, 0.7]),
        (Noise("sde", (0, 3), 2), range(3), range(2), [0.7, 0.7, 0.0, 0.0]),
        (Noise("precise", (1, 4), 1), range(1, 3), range(1, 3), [0.0, 0.7, 0.0, 0.0]),
        (Noise("sde", (4, 9)), range(4, 4), range(4, 5), [0.0] * 4),
    ],
)
def test_which_steps_add_noise(noise, possible, starts, strengths):
    assert noise.possible(4) == possible and noise.starts(4) == starts
    assert noise.strengths(0.7, 4).tolist() == strengths
    assert noise.n_noisy(4) == np.count_nonzero(strengths) and noise.confined(4) == (starts != range(1))
    last = noise.strengths(0.7, 4, starts[-1])
    assert np.count_nonzero(last) == noise.n_noisy(4) and not last[: starts[-1]].any()


@pytest.mark.parametrize(
    "noise, n, strengths",
    [
        (Noise("cps"), 4, [0.7, 0.7, 0.7, 0.0]),  # of any number all but the last
        (Noise("sde", (0, 9)), 20, [0.7] * 18 + [0.0] * 2),
        (Noise("sde", (2, 5), 1), 20, [0.0] * 4 + [0.7] * 2 + [0.0] * 14),
        (Noise("sde", (0, 5), 3), 2, [0.7, 0.0]),
        (Noise("sde", (2, 5), 1), 10, [0.0] * 2 + [0.7] + [0.0] * 7),
    ],
)
def test_rules_for_another_number_of_steps(noise, n, strengths):
    """Than ten."""
    assert noise.spread(10, n).strengths(0.7, n).tolist() == strengths


@pytest.mark.parametrize(
    "tokens, n, sigmas",
    [
        (1024, 6, [1.0, 0.9037355780601501, 0.7897047996520996, 0.652489423751831, 0.484218418598175, 0.273003309965]),
        (4096, 6, [1.0, 0.9404441714286804, 0.8633204698562622, 0.7595109343528748, 0.6122673153877, 0.387119174003]),
    ],
)
def test_the_levels_of_flux(tokens, n, sigmas):
    """Of 512 and 1024 pixels: shifted by the number of tokens, evenly spaced from 1 to 1/n before."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
    process = load_process(config, tokens=tokens, to_1_over_n=True)
    np.testing.assert_allclose(process.timesteps(n), 1000 * np.array(sigmas), rtol=1e-6)
    schnell = load_process(config | {"use_dynamic_shifting": False, "shift": 1.0}, tokens=tokens, to_1_over_n=True)
    np.testing.assert_allclose(schnell.timesteps(4), [1000, 750, 500, 250], rtol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_levels_are_diffusers(kind):
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = FLOW | {"use_dynamic_shifting": True, "time_shift_type": kind, "base_shift": 0.4, "max_shift": 1.3}
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(9, mu=0.4 + 0.9 / 3840 * (1000 - 256))
    np.testing.assert_allclose(load_process(config, tokens=1000).timesteps(9), theirs.timesteps, rtol=1e-5)


def test_the_number_of_tokens_is_only_for_flow_matching():
    with pytest.raises(InputError, match="_class_name='DDIMScheduler'; such a model wants FlowMatchEulerDiscrete"):
        load_process({"_class_name": "DDIMScheduler", "clip_sample": False}, tokens=256)


@pytest.mark.parametrize("key", ["use_dynamic_shifting", "use_karras_sigmas", "shift_terminal", "stochastic_sampling"])
def test_other_levels_are_refused(key):
    with pytest.raises(InputError, match=f"{key}=true is not supported"):
        load_process(FLOW | {key: True})
    load_process(FLOW | {key: False})


@pytest.mark.parametrize("n", [0, 1001])
def test_number_of_steps(n):
    with pytest.raises(InputError, match=f"{n} sampling steps; accepted: 1 to 1000"):
        load_process(FLOW).timesteps(n)


def test_a_step_without_noise_has_no_log_prob():
    """Nor a KL, nor a gradient: its ratio is 1 whatever the network says."""
    x, std = jnp.asarray(normal(0, 2, 2, 2, 1)), jnp.float32(0.0)
    for of_mean in (lambda m: gaussian_log_prob(x, m, std).sum(), lambda m: gaussian_kl(m, x, std).sum()):
        value, slope = jax.value_and_grad(of_mean)(x + 1.0)
        assert float(value) == 0.0 and not slope.any()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
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
