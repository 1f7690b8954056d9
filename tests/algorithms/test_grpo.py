"""GRPO on flow matching: DDPO with groups and noise in a few steps, against Flow-GRPO's loss as a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import grpo
from diffexp_jax import parallel
from diffexp_jax.algorithms.ddpo import ddpo, step_loss
from diffexp_jax.algorithms.policy_gradient import Transition
from diffexp_jax.experiment import Experiment
from diffexp_jax.sampling import Noise, initial_latents, load_process
from diffexp_jax.settings import checked
from tests.support import two_numbers
from tests.support.two_numbers import GROUP, LORA, SHAPE, N

FLOW = load_process({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
POLICY = two_numbers.POLICY._replace(process=FLOW)
SETTINGS = dict(n_prompts=4, n_updates=1, n_chunks=2, inner_epochs=1, clip=1e-4, advantage_clip=5.0, group=GROUP)
SETTINGS |= dict(stats_buffer=8, stats_min_count=2, advantage="group_mean")
RULE, T = Noise("sde", (0, 4), 2), 5  # two of the first four of five steps


def steps_of(process, start):
    t = process.timesteps(T)
    eta = RULE.strengths(0.7, T, start)
    return process.make_steps(t, np.full(T, 3.0, np.float32), eta=eta)


def flow_grpos_loss(lora, x_t, x_tm1, row, adv, kl_weight):
    """Of one step, as the published code groups it: mean, log-prob, clipped ratio, and the KL without dt."""
    s, ds = row.level, -row.dt

    def mean_of(theta):
        v = two_numbers.network({}, theta, x_t, row, two_numbers.CONTEXT)
        return x_t * (1 + std_dev**2 / (2 * s) * ds) + v * (1 + std_dev**2 * (1 - s) / (2 * s)) * ds

    std_dev = 0.7 * jnp.sqrt(s / (1 - s))
    mean, std = mean_of(lora), std_dev * jnp.sqrt(-ds)
    log_prob = (-((x_tm1 - mean) ** 2) / (2 * std**2) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).mean((1, 2, 3))
    ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
    policy = jnp.maximum(-adv * ratio, -adv * jnp.clip(ratio, 1 - 1e-4, 1 + 1e-4)).mean()
    return policy + kl_weight * (((mean - mean_of(None)) ** 2).mean((1, 2, 3)) / (2 * std_dev**2)).mean(), log_prob


def test_an_iteration_is_flow_grpos():
    """The window's two steps alone are learnt from; before it and after it the chain is the ODE's."""
    algorithm = ddpo(POLICY, optax.sgd(0.05), **SETTINGS, kl_weight=0.3, kl_by_length=True, n_trained=2, confined=True)
    steps = steps_of(FLOW, 1)
    ((x_1,), x_tm1, log_prob, rewards), state, metrics = two_numbers.iteration(algorithm, steps)
    assert x_tm1.shape[0] == log_prob.shape[0] == 2
    rows = [jax.tree.map(lambda column, i=i: column[i], steps) for i in range(T)]
    x_0 = initial_latents(parallel.sample_keys(jax.random.key(3), N), SHAPE)
    v = two_numbers.network({}, LORA, x_0, rows[0], two_numbers.CONTEXT)
    np.testing.assert_allclose(x_1, x_0 - rows[0].dt * v, rtol=1e-5, atol=1e-6)
    of_group = rewards.reshape(-1, GROUP)
    adv = ((of_group - of_group.mean(1, keepdims=True)) / (rewards.std() + 1e-4)).reshape(-1)

    @jax.jit
    def objective(lora):
        losses, log_probs = [], []
        for i, (x_t, after) in enumerate(zip([x_1, x_tm1[0]], x_tm1, strict=True), 1):
            loss, of_step = flow_grpos_loss(lora, x_t, after, rows[i], adv, 0.3)
            losses, log_probs = [*losses, loss], [*log_probs, of_step]
        return sum(losses) / 2, jnp.stack(log_probs)

    (value, expected), grads = jax.value_and_grad(objective, has_aux=True)(LORA)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)  # advantages near 1 cancel out
    for name, start in LORA.items():
        assert float(state.lora[name] - start) == pytest.approx(-0.05 * float(grads[name]), rel=1e-3)


def test_the_penalty_literal():
    """With dt 0.25, g^2 0.49 and means 0.1 apart: 0.01 / (2 0.49 0.25), and 0.25 times that by length."""
    row = jax.tree.map(lambda x: x[2], FLOW.make_steps(np.array([1000.0, 750.0, 500.0, 250.0]), np.ones(4), eta=0.7))
    out = jnp.ones((3, *SHAPE))
    x_t, slope = jnp.zeros_like(out), 0.25 * (1 + 0.49 * 0.5)  # of the mean in the velocity
    adv = old = jnp.zeros(3)
    transition = Transition(x_t, x_t, adv, old, row)
    outputs = out, out + 0.1 / slope
    kinds = dict(process=FLOW, clip=1e-4, kl_weight=2.0, proportionate=False)
    for by_length, expected in ((False, 2 * 0.01 / (2 * 0.49 * 0.25)), (True, 2 * 0.01 / (2 * 0.49))):
        loss, _ = step_loss(old, outputs, transition, **kinds, kl_by_length=by_length)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_before_the_first_update_the_ratio_is_exactly_1():
    """Of all minibatches, recomputed by the update's program: at a learning rate of 0 none of them moves."""
    settings = SETTINGS | dict(n_updates=2, inner_epochs=2, old_log_prob="recomputed", n_trained=2, confined=True)
    _, _, metrics = two_numbers.iteration(ddpo(POLICY, optax.sgd(0.0), **settings), steps_of(FLOW, 2))
    assert float(metrics["ratio/max_abs_log"]) == 0.0 and float(metrics["ratio/mean"]) == 1.0
    assert float(metrics["grad_norm"]) > 0


def test_windows_of_ddim_in_one_pass_and_two():
    """The models that predict eps have windows too; the gradient made while sampling is that of the window."""
    policy, steps = two_numbers.POLICY, steps_of(two_numbers.PROCESS, 2)
    found = []
    for one_pass in (False, True):
        algorithm = ddpo(policy, optax.sgd(0.05), **SETTINGS, n_trained=2, confined=True, one_pass=one_pass)
        ids = np.arange(N, dtype=np.int32) // GROUP
        keys = parallel.sample_keys(jax.random.key(3), N)
        batch = parallel.shard(two_numbers.Batch(ids, two_numbers.CONTEXT, ids, keys), N, group=GROUP)
        args = parallel.replicate((algorithm.init(LORA), {}, steps, jax.random.key(0)))
        state, frozen, on_devices, key = args
        samples = parallel.pmap(algorithm.sample)(state, frozen, batch, on_devices)
        inputs = two_numbers.Inputs(batch, on_devices, key, samples)
        found.append(parallel.first(parallel.pmap(algorithm.update)(state, frozen, inputs)[0].lora))
    for name, start in LORA.items():
        assert abs(float(found[0][name] - start)) > 1e-5
        assert float(found[1][name] - start) == pytest.approx(float(found[0][name] - start), rel=1e-3)


def test_the_window_moves(make_config):
    """From iteration to iteration, by the seed alone, and everything in it fits the config."""
    config = make_config("ddpo", {"sampling.noise_steps": (0, 3), "sampling.window": 2, "ddpo.updates": 2})
    experiment = Experiment.build(checked(config), weights=False)
    starts = [experiment.noise_from(it) for it in range(12)]
    assert set(starts) == {0, 1} and starts == [experiment.noise_from(it) for it in range(12)]
    for start in (0, 1):
        sigma_t = experiment.sampler.steps(explore=True, noise_from=start).sigma_t
        assert np.flatnonzero(sigma_t).tolist() == [start, start + 1]


@pytest.mark.parametrize(
    "model, n, evaluated",
    [("emoji", 20, 20), ("sd15", 10, 40), ("sd35m", 10, 40), ("flux", 6, 28), ("flux_schnell", 4, 4)],
)
def test_the_config(model, n, evaluated):
    settings = checked(grpo.get_config(f"model={model},explore=true"))
    rule = settings.sampling.noise_rule
    assert settings.sampling.steps == n and rule.n_noisy(n) == 3 and settings.method.compares_groups
    assert (settings.eval_sampling.steps, settings.eval_sampling.eta) == (evaluated, 0.0)
    assert rule.confined(n) == (n > 6)  # else the three are always the first
    assert settings.method.advantage == "group_mean" and settings.optim.ema > 0
