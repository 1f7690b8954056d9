"""The KL of the paths of AlignProp and DRaFT: its numbers, its gradient, what it holds back, and its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import METHODS, Batch, Inputs, Policy
from diffexp_jax.algorithms.advantages import compared
from diffexp_jax.algorithms.alignprop import alignprop
from diffexp_jax.algorithms.ddpo import ddpo
from diffexp_jax.algorithms.draft import draft
from diffexp_jax.algorithms.reward_gradient import sampled
from diffexp_jax.algorithms.state import init_stats
from diffexp_jax.errors import InputError
from diffexp_jax.sampling import Context, gaussian_kl, initial_latents, load_process, step_noise, transition_kl
from diffexp_jax.sampling.flow import SCHEDULER as FLOW
from diffexp_jax.settings import checked
from tests.support import two_numbers
from tests.support.tiny import SCHEDULER, network_of

SHAPE, N, T = (2, 2, 3), 6, 3
PROCESSES = {
    "eps": load_process(SCHEDULER),
    "v": load_process(SCHEDULER | {"prediction_type": "v_prediction"}),
    "flow": load_process({"_class_name": FLOW}),
}
LORA, OTHER = {"a": jnp.float32(0.4), "b": jnp.float32(-0.1)}, {"a": jnp.float32(-0.2), "b": jnp.float32(0.3)}
KEYS = parallel.sample_keys(jax.random.key(3), N)
COND = np.random.default_rng(0).standard_normal((N, 1, 1)).astype(np.float32)
BATCH = Batch(np.zeros(N, np.int32), Context(COND, COND), None, KEYS)


def network(frozen, lora):
    """Not linear, so that its slope in x_t counts; without a LoRA as with one of zeros."""
    a, b = (0.0, 0.0) if lora is None else (lora["a"], lora["b"])
    return lambda x_t, step, context: jnp.sin((0.7 + a) * x_t) + b * context.cond[:, :, None] * step.w_t


def policy_of(process):
    return Policy(
        network=network_of(network),
        decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
        score=lambda frozen, images, tokens: (jnp.square(images).mean((1, 2, 3)), {}),
        latent_shape=SHAPE,
        process=process,
    )


def steps_of(process, eta=1.0):
    return process.make_steps(process.timesteps(T), np.array([1.0, 2.0, 2.0], np.float32), eta=eta)


# ---------------------------------------------------------------------------------------------------------- its numbers


def test_kl_literal():
    """((1 - 0)^2 + (2 - 5)^2) / 2 / (2 x 0.5^2) = 10; of equal means none."""
    mean, other = (jnp.array(x).reshape(1, 1, 1, 2) for x in ([1.0, 2.0], [0.0, 5.0]))
    assert gaussian_kl(mean, other, jnp.float32(0.5)) == 10.0
    assert gaussian_kl(mean, mean, jnp.float32(0.5)) == 0.0


@pytest.mark.parametrize(
    "t, kl, mean",
    [(981, [0.116830, 0.211332], 0.083936), (501, [0.063268, 0.114445], 0.079609), (1, [0.447531, 0.809535], 0.070111)],
)
def test_kl_is_what_seikos_code_gives(t, kl, mean):
    """Its ddim_step_KL, run once on these numbers with eta = 1 and 50 steps; `mean` is that of x_{t-1}."""
    wave = np.arange(24, dtype=np.float32)
    x_t, out, other, z = (np.sin(wave * k + k).reshape(2, 3, 2, 2).transpose(0, 2, 3, 1) for k in (0.3, 0.7, 0.9, 1.1))
    process, i = PROCESSES["eps"], (981 - t) // 20
    row = jax.tree.map(lambda column: column[i], process.make_steps(process.timesteps(50), np.ones(50), eta=1.0))
    assert int(row.t) == t
    np.testing.assert_allclose(transition_kl(process, out, other, x_t, row), kl, rtol=1e-4)
    centre, std = process.transition(x_t, out, row)
    assert float((centre + std * z).mean()) == pytest.approx(mean, abs=1e-5)


# --------------------------------------------------------------------------------------------------------- its gradient


def objective(process, lora, reference, live, *, input_gradient):
    """The plain loop: (mean over the samples of sum_t mean (mu - mu_ref)^2 / (2 sigma_t^2), mean of x_0^2)."""
    steps, x, kl = steps_of(process), initial_latents(KEYS, SHAPE), 0.0
    for i in range(T):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        seen = x if input_gradient else jax.lax.stop_gradient(x)
        outs = (network({}, theta)(seen, row, BATCH.context) for theta in (lora, reference))
        out, other = (jnp.where(live[i], out, jax.lax.stop_gradient(out)) for out in outs)
        (mean, std), (mean_ref, _) = process.transition(x, out, row), process.transition(x, other, row)
        kl += (jnp.square(mean - mean_ref) / (2 * std**2)).mean((1, 2, 3)).mean()
        x = mean + std * step_noise(KEYS, jnp.int32(i), SHAPE)
    return kl, jnp.square(x).mean()


@pytest.mark.parametrize(
    "name, remat, reference, input_gradient",
    [("eps", True, OTHER, True), ("v", False, OTHER, True), ("flow", True, None, True), ("eps", False, OTHER, False)],
)
def test_gradient_is_the_plain_loops(name, remat, reference, input_gradient):
    """Of the KL alone and with a reward, in the LoRA; in the reference's LoRA there is none."""
    process = PROCESSES[name]

    @jax.jit
    def ours(lora, reference, live, weight):
        def loss(lora, reference):
            options = {"remat": remat, "input_gradient": input_gradient, "kl_weight": 0.3, "reference": reference}
            args = policy_of(process), lora, {}, BATCH, steps_of(process), live
            x_0, penalty, metrics = sampled(*args, **options)
            return penalty + weight * jnp.square(x_0).mean(), metrics["kl/path"]

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lora, reference)

    @jax.jit
    def theirs(lora, live, weight):
        def loss(lora):
            kl, reward = objective(process, lora, reference, live, input_gradient=input_gradient)
            return 0.3 * kl + weight * reward

        return jax.value_and_grad(loss)(lora)

    for mask, weight in (([1, 1, 1], 0.0), ([0, 1, 1], 0.0), ([1, 0, 1], 0.5)):
        live = jnp.array(mask, bool)
        (value, path), (found, none) = ours(LORA, reference, live, weight)
        want, expected = theirs(LORA, live, weight)
        assert path.shape == (N,) and float(path.min()) > 0
        assert float(value) == pytest.approx(float(want), rel=1e-5)
        if not weight:
            assert float(value) == pytest.approx(0.3 * float(path.mean()), rel=1e-5)
        for key in LORA:
            assert abs(expected[key]) > 1e-4 and float(found[key]) == pytest.approx(float(expected[key]), rel=1e-3)
        assert all(float(x) == 0.0 for x in jax.tree.leaves(none))


# ------------------------------------------------------------------------------------------------------- in the methods


SGD = optax.sgd(1.0)


def updates(make, kl_weight, *, optimizer=SGD, **settings):
    """A function (LoRA, n=1) that gives [(LoRA, metrics)] of n updates of an eps model, by one program."""
    process = PROCESSES["eps"]
    algorithm = make(policy_of(process), optimizer, kl_weight=kl_weight, n_chunks=2, **settings)
    update, steps = parallel.pmap(algorithm.update), steps_of(process)
    inputs = Inputs(parallel.shard(BATCH, N), *parallel.replicate((steps, jax.random.key(0))))

    def run(lora, n=1):
        state, found = parallel.replicate(algorithm.init(lora)), []
        for _ in range(n):
            state, metrics = update(state, parallel.replicate({}), inputs)
            found.append(jax.tree.map(float, parallel.first((state.lora, metrics))))
        return found

    return run


ALIGNPROP = dict(make=alignprop, reward_target=None, truncation="fixed", truncation_k=2)
DRAFT = dict(make=draft, k=2, lv_samples=0)


@pytest.mark.parametrize("method", [ALIGNPROP | {"loss_coefficient": 1.0}, DRAFT], ids=["alignprop", "draft"])
def test_a_lora_of_nothing_has_no_kl_and_the_methods_own_gradient(method):
    zero = jax.tree.map(jnp.zeros_like, LORA)
    plain, held = (updates(kl_weight=weight, **method) for weight in (0.0, 0.5))
    ((expected, without),), ((found, metrics),) = plain(zero), held(zero)
    assert "kl/path" not in without and metrics["kl/path"] == 0.0
    assert found == pytest.approx(expected, rel=1e-5) and abs(found["a"]) > 1e-4
    assert metrics["loss"] == pytest.approx(without["loss"], rel=1e-6)
    # with one of something the loss has the KL in it
    ((_, without),), ((_, metrics),) = plain(LORA), held(LORA)
    assert metrics["loss"] == pytest.approx(without["loss"] + 0.5 * metrics["kl/path"], rel=1e-5)
    assert metrics["reward/mean"] == pytest.approx(without["reward/mean"], rel=1e-6)


def test_the_kl_alone_leads_back_to_the_untuned_model():
    found = updates(kl_weight=1.0, loss_coefficient=0.0, optimizer=optax.adam(0.01), **ALIGNPROP)(LORA, 20)
    path = [metrics["kl/path"] for _, metrics in found]
    assert path == sorted(path, reverse=True) and path[-1] < 0.5 * path[0]
    assert all(abs(found[-1][0][name]) < 0.7 * abs(LORA[name]) for name in LORA)


def test_ddpos_penalty_is_a_mean_over_the_steps():
    """One update against the gradient of the loss as a whole, with leave-one-out advantages."""
    settings = dict(n_prompts=4, n_updates=1, n_chunks=2, inner_epochs=1, clip=1e-4, advantage_clip=5.0, group=2)
    settings |= dict(stats_buffer=8, stats_min_count=2, advantage="loo", kl_weight=0.3)
    samples, state, metrics = two_numbers.iteration(ddpo(two_numbers.POLICY, optax.sgd(0.05), **settings))
    x_T, x_tm1, _, rewards = samples
    x_t, everything = np.concatenate([x_T, x_tm1[:-1]]), np.arange(two_numbers.N)
    others = rewards.reshape(-1, 2)[:, ::-1].reshape(-1)

    @jax.jit
    def objective(lora):
        log_prob, kl = two_numbers.log_probs(lora, samples, everything), 0.0
        ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
        for i in range(two_numbers.T):
            row = jax.tree.map(lambda column, i=i: column[i], two_numbers.STEPS)
            outs = (two_numbers.network({}, theta, x_t[i], row, two_numbers.CONTEXT) for theta in (lora, None))
            (mean, std), (mean_0, _) = (two_numbers.PROCESS.transition(x_t[i], out, row) for out in outs)
            kl += (jnp.square(mean - mean_0) / (2 * std**2)).mean() / two_numbers.T
        return -((rewards - others) * ratio).mean() + 0.3 * kl, kl

    (value, kl), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(two_numbers.LORA)
    assert float(metrics["kl/path"]) == pytest.approx(two_numbers.T * float(kl), rel=1e-4)  # their sum
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
    for name, start in two_numbers.LORA.items():
        assert float(state.lora[name] - start) == pytest.approx(-0.05 * float(grads[name]), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- settings


def test_ddpos_settings(make_config):
    with pytest.raises(InputError, match="ddpo.gradient='onepass': wants ddpo.kl_weight=0.0"):
        checked(make_config("ddpo", {"ddpo.kl_weight": 0.1, "ddpo.updates": 1, "ddpo.gradient": "onepass"}))
    method = checked(make_config("ddpo", {"ddpo.kl_weight": 0.1, "ddpo.updates": 1})).method
    assert not method.in_one_pass(8, 1000) and method.passes(10, True)["of the untuned model"] == 0.8
    with pytest.raises(InputError, match="batch.group=1: ddpo compares samples of a prompt; wants at least 2"):
        checked(make_config("ddpo", {"ddpo.advantage": "loo"}))
    checked(make_config("ddpo", {"ddpo.advantage": "group", "batch.group": 2}))


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("loo", [-1.5, 1.5, 0.0, -4.0, 0.0, 4.0]),
        ("group", [-1.224595, 1.224595, 0.0, -1.224689, 0.0, 1.224689]),
        ("group_mean", [-0.563570, 0.563570, 0.0, -1.502854, 0.0, 1.502854]),
    ],
)
def test_advantages_of_groups_literal(kind, expected):
    """Of two prompts with three samples each: means 2 and 3.333333, stds 0.816497 and 2.177324, 1.774302 of all."""
    samples = jnp.array([4, 4, 4, 1, 1, 1]), jnp.array([1.0, 3.0, 2.0, 2.0 / 3.0, 10.0 / 3.0, 6.0])
    found, clipped = (
        compared(init_stats(5, 1), samples, samples, kind=kind, clip=clip, min_count=1) for clip in (5.0, 1.0)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(clipped).max()) == pytest.approx(4.0 if kind == "loo" else 1.0)


@pytest.mark.parametrize("name", ["alignprop", "draft"])
def test_settings(make_config, name):
    config = make_config(name, {f"{name}.kl_weight": 0.1})
    with pytest.raises(InputError, match=rf"sampling.eta=0: {name} needs steps with noise \({name}.kl_weight\)"):
        checked(config)
    assert checked(make_config(name, {f"{name}.kl_weight": 0.1, "sampling.eta": 0.5})).method.kl_weight == 0.1
    with pytest.raises(InputError, match=f"{name}.kl_weight=-1.0: wants 0..1000000"):
        checked(make_config(name, {f"{name}.kl_weight": -1.0}))
    passes = METHODS[name](kl_weight=0.1).passes(10, True)
    assert passes == METHODS[name]().passes(10, True) | {"of the untuned model": 1.0}
