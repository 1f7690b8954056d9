"""The sampling loop with fake networks whose chains have closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import sampling
from diffexp_jax.sampling import Context, ddim, differentiable, load_process, step_log_prob
from diffexp_jax.sampling.guidance import two_halves
from tests.support.tiny import network_of

compiled_rollout = jax.jit(sampling.rollout, static_argnums=(0, 1), static_argnames="keep_trajectory")
step_noise = jax.jit(sampling.step_noise, static_argnums=2)
initial_latents = jax.jit(sampling.initial_latents, static_argnums=1)

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
SD15 |= {"steps_offset": 1}
PROCESS, SCHEDULE = load_process(SD15), ddim.noise_schedule(SD15)
SHAPE = (2, 3, 4)  # h, w, c


def make_steps(n, eta=0.0, w=1.0):
    return PROCESS.make_steps(PROCESS.timesteps(n), jnp.broadcast_to(w, n), eta=eta)


def rollout(*args, process=PROCESS, **kwargs):
    return compiled_rollout(process, *args, **kwargs)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def row(steps, i):
    return jax.tree.map(lambda column: column[i], steps)


def context(batch):
    return Context(normal(10, batch, 2, 3), normal(11, batch, 2, 3))


KEYS = jax.random.split(jax.random.key(7), 3)


def zero(x_t, step, context):
    return jnp.zeros_like(x_t)


def constant(x_t, step, context):
    """A noise estimate that depends on the prompt and on t only."""
    return jnp.broadcast_to(context.cond.mean((1, 2))[:, None, None, None] + step.t / 1000, x_t.shape)


def tanh(x_t, step, context):
    return jnp.tanh(x_t + context.cond.mean((1, 2))[:, None, None, None]) * 0.7 + 0.1 * x_t


TANH_LIVE = differentiable(network_of(lambda *_: tanh), None, None, remat=True)  # made once: jit knows it again

# ---- the chain


def test_rollout_of_the_zero_network():
    """eps = 0 and eta = 0: x_{t-1} = sqrt(a_prev / a_t) x_t, a product that telescopes."""
    x_T, steps = normal(0, 3, *SHAPE), make_steps(10)
    x_0, trajectory = rollout(zero, x_T, context(3), steps, KEYS)
    assert trajectory is None
    np.testing.assert_allclose(x_0, x_T * np.sqrt(0.99915 / SCHEDULE.alpha_bar[901]), rtol=1e-5)


def test_rollout_without_jit():
    args = tanh, normal(0, 3, *SHAPE), context(3), make_steps(2, eta=1.0), KEYS
    with jax.disable_jit():
        plain = sampling.rollout(PROCESS, *args, keep_trajectory=True)
    compiled = rollout(*args, keep_trajectory=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), plain, compiled)


def test_rollout_of_a_constant_network():
    """The linear recursion written out in float64, state by state."""
    x_T, steps, ctx = normal(0, 3, *SHAPE), make_steps(8), context(3)
    x_0, _ = rollout(constant, x_T, ctx, steps, KEYS)
    t = PROCESS.timesteps(8)
    a = np.append(SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[0])
    x = np.asarray(x_T, np.float64)
    for i in range(8):
        eps = np.asarray(ctx.cond, np.float64).mean((1, 2))[:, None, None, None] + t[i] / 1000
        x = np.sqrt(a[i + 1] / a[i]) * (x - np.sqrt(1 - a[i]) * eps) + np.sqrt(1 - a[i + 1]) * eps
    np.testing.assert_allclose(x_0, x, rtol=1e-4, atol=1e-4)


def test_a_perfect_network_finds_x_0():
    """With eps = (x_t - sqrt(a) x_0) / sqrt(1-a) every step points at x_0; one last bit of noise stays."""
    x_0 = normal(1, 3, *SHAPE)

    def perfect(x_t, step, context):
        return (x_t - jnp.sqrt(step.alpha_bar_t) * x_0) / jnp.sqrt(1 - step.alpha_bar_t)

    found, _ = rollout(perfect, normal(0, 3, *SHAPE), context(3), make_steps(10, eta=1.0), KEYS)
    np.testing.assert_allclose(found, x_0, atol=0.15)  # std of the last step: 0.02


def test_v_prediction_reaches_the_steps():
    x_T, steps = normal(0, 3, *SHAPE), make_steps(4)
    x_0, _ = rollout(
        tanh, x_T, context(3), steps, KEYS, process=load_process(SD15 | {"prediction_type": "v_prediction"})
    )
    x = x_T
    for i in range(4):
        x = ddim.ddim_step(x, tanh(x, row(steps, i), context(3)), row(steps, i), "v_prediction")[0]
    np.testing.assert_allclose(x_0, x, rtol=1e-5, atol=1e-5)
    assert np.abs(x_0 - rollout(tanh, x_T, context(3), steps, KEYS)[0]).max() > 0.1


def test_trajectory_is_the_chain_and_its_noise():
    x_T, steps, ctx = normal(0, 3, *SHAPE), make_steps(6, eta=1.0), context(3)
    x_0, kept = rollout(tanh, x_T, ctx, steps, KEYS, keep_trajectory=True)
    assert kept.x_tm1.shape == (6, 3, *SHAPE) and kept.log_prob.shape == (6, 3)
    x_t = np.stack([kept.x_t(i) for i in range(6)])
    np.testing.assert_array_equal(x_t[0], x_T)
    np.testing.assert_array_equal(x_t[1:], kept.x_tm1[:-1])
    np.testing.assert_array_equal(kept.x_tm1[-1], x_0)
    for i in range(6):
        mean, std = ddim.ddim_step(kept.x_t(i), tanh(kept.x_t(i), row(steps, i), ctx), row(steps, i))
        noise = step_noise(KEYS, jnp.int32(i), SHAPE)
        np.testing.assert_allclose(kept.x_tm1[i], mean + std * noise, atol=1e-5)
        # log N(mean + std z; mean, std^2) = -mean z^2 / 2 - log std - log(2 pi) / 2
        want = -0.5 * jnp.square(noise).mean((1, 2, 3)) - jnp.log(std) - 0.9189385332
        np.testing.assert_allclose(kept.log_prob[i], want, atol=2e-3)


@pytest.mark.parametrize("prediction_type", ddim.PREDICTION_TYPES)
def test_log_probs_are_those_of_step_log_prob(prediction_type):
    """DDPO's ratio is 1 before the first update: |log ratio| < 1e-5, a tenth of the clip range."""
    steps, process = make_steps(20, eta=1.0), load_process(SD15 | {"prediction_type": prediction_type})
    _, kept = rollout(tanh, normal(0, 3, *SHAPE), context(3), steps, KEYS, keep_trajectory=True, process=process)

    def score(_, row):
        return None, step_log_prob(process, tanh, *row, kept.context)

    again = jax.jit(
        lambda kept: jax.lax.scan(score, None, (jax.vmap(kept.x_t)(jnp.arange(20)), kept.x_tm1, kept.steps))[1]
    )(kept)
    assert np.abs(again - kept.log_prob).max() < 1e-5
    other = step_log_prob(process, zero, kept.x_t(3), kept.x_tm1[3], row(kept.steps, 3), kept.context)
    assert np.abs(other - kept.log_prob[3]).min() > 1e-3  # another network, another likelihood


# ---- randomness


@pytest.mark.parametrize("order", [[2, 0], [0, 1, 2, 1]])
def test_noise_belongs_to_the_sample_and_not_to_the_batch(order):
    order, steps, ctx = np.array(order), make_steps(5, eta=1.0), context(3)
    x_T = initial_latents(KEYS, SHAPE)
    np.testing.assert_array_equal(x_T[order], initial_latents(KEYS[order], SHAPE))
    x_0, kept = rollout(tanh, x_T, ctx, steps, KEYS, keep_trajectory=True)
    some = jax.tree.map(lambda x: x[order], ctx)
    x_0_some, kept_some = rollout(tanh, x_T[order], some, steps, KEYS[order], keep_trajectory=True)
    np.testing.assert_array_equal(x_0_some, x_0[order])
    np.testing.assert_array_equal(kept_some.x_tm1, kept.x_tm1[:, order])
    np.testing.assert_allclose(kept_some.log_prob, kept.log_prob[:, order], atol=1e-6)


def test_noise_differs_between_steps_samples_and_the_start():
    start = initial_latents(KEYS, SHAPE)
    drawn = jnp.stack([start] + [step_noise(KEYS, jnp.int32(i), SHAPE) for i in range(4)])
    flat = drawn.reshape(5 * 3, -1)
    assert len(np.unique(np.asarray(flat), axis=0)) == 15


@pytest.mark.parametrize("live", [None, jnp.ones(4, bool)])
def test_eta_0_does_not_look_at_the_keys(live):
    x_T, steps, other = normal(0, 3, *SHAPE), make_steps(4), jax.random.split(jax.random.key(8), 3)
    denoise = tanh if live is None else TANH_LIVE
    a, _ = rollout(denoise, x_T, context(3), steps, KEYS, live=live)
    b, _ = rollout(denoise, x_T, context(3), steps, other, live=live)
    np.testing.assert_array_equal(a, b)


# ---- gradients

N = 6


def network(theta):
    def denoise(x_t, step, context):
        cond = context.cond.mean((1, 2))[:, None, None, None]
        return theta[0] * jnp.tanh(theta[1] * x_t + cond) + theta[2] * step.t / 1000

    return denoise


THETA = jnp.array([0.8, 0.5, -0.3])


def loss(theta, x_T, live, denoise=network, eta=0.0, **options):
    """What AlignProp differentiates; see `differentiable` for the options."""
    steps, options = make_steps(N, eta), {"remat": True} | options
    live_network = network_of(lambda _, theta: denoise(theta))
    chosen = denoise(theta) if live is None else differentiable(live_network, None, theta, **options)
    x_0, _ = sampling.rollout(PROCESS, chosen, x_T, context(3), steps, KEYS, live=live)
    return jnp.sum(jnp.square(x_0 - 1.0))


GRAD = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnames=("eta", "remat", "input_gradient"))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_live_is_the_plain_gradient(eta):
    x_T = normal(0, 3, *SHAPE)
    plain, ours = GRAD(THETA, x_T, None, eta=eta), GRAD(THETA, x_T, jnp.ones(N, bool), eta=eta)
    assert np.abs(plain[1][0]).min() > 0.1
    assert_same(ours, plain)


@partial(jax.jit, static_argnames="detached")
def where_grad(theta, x_T, live, detached=False):
    """The reference: stop_gradient by a `where`, the mask handed over in the guidance column."""

    def loss(theta, x_T):
        def denoise(x_t, step, context):
            out = network(theta)(jax.lax.stop_gradient(x_t) if detached else x_t, step, context)
            return jnp.where(step.w_t > 0, out, jax.lax.stop_gradient(out))

        x_0, _ = sampling.rollout(PROCESS, denoise, x_T, context(3), make_steps(N, w=live.astype(jnp.float32)), KEYS)
        return jnp.sum(jnp.square(x_0 - 1.0))

    return jax.value_and_grad(loss, argnums=(0, 1))(theta, x_T)


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    "mask", [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0] * 6, [1] * 6]
)
def test_truncated_gradient_is_stop_gradient(mask):
    x_T, live = normal(0, 3, *SHAPE), jnp.array(mask, bool)
    ours, theirs = GRAD(THETA, x_T, live), where_grad(THETA, x_T, live)
    assert_same(ours, theirs)
    assert_same(GRAD(THETA, x_T, live, remat=False), theirs)
    assert np.all(np.asarray(ours[1][0]) != 0) == any(mask)


@pytest.mark.parametrize("remat", [True, False])
def test_without_input_gradient_the_linear_recursion_alone_joins_the_steps(remat):
    """d x_0 / d theta sums each step's own, times the coefficients of the steps after it; d x_0 / d x_T is theirs."""
    x_T, live = normal(0, 3, *SHAPE), jnp.array([1, 0, 1, 1, 0, 1], bool)
    value, (d_theta, d_x) = GRAD(THETA, x_T, live, remat=remat, input_gradient=False)
    assert_same((value, (d_theta, d_x)), where_grad(THETA, x_T, live, detached=True))
    assert_same(d_x, GRAD(THETA, x_T, jnp.zeros(N, bool))[1][1])
    assert np.abs(d_theta / GRAD(THETA, x_T, live)[1][0] - 1).max() > 0.05


def test_no_live_step_leaves_the_linear_recursion_only():
    """d x_0 / d x_T is the product of the steps' own coefficients, and nothing reaches the network."""
    x_T = normal(0, 3, *SHAPE)
    live = jnp.zeros(N, bool)
    value, (d_theta, d_x) = GRAD(THETA, x_T, live)
    np.testing.assert_array_equal(d_theta, 0.0)
    x_0, _ = rollout(network(THETA), x_T, context(3), make_steps(N), KEYS)
    assert float(value) == pytest.approx(float(jnp.sum(jnp.square(x_0 - 1.0))), rel=1e-5)
    coefficient = np.sqrt(SCHEDULE.alpha_bar[0] / SCHEDULE.alpha_bar[PROCESS.timesteps(N)[0]])
    np.testing.assert_allclose(d_x, coefficient * 2 * (x_0 - 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("n_live", [0, 4])
def test_backward_runs_the_network_at_the_live_steps_only(n_live, remat):
    """Counts the runs of the network's backward pass: the cost of truncation follows a traced K."""
    calls = []

    @jax.custom_vjp
    def net(theta, x):
        return theta[0] * jnp.tanh(x)

    def backward(saved, g):
        theta, x = saved
        jax.debug.callback(lambda: calls.append(1))
        return jax.vjp(lambda theta, x: theta[0] * jnp.tanh(x), theta, x)[1](g)

    net.defvjp(lambda theta, x: (net(theta, x), (theta, x)), backward)

    def denoise(theta):
        return lambda x_t, step, context: net(theta, x_t)

    live = jnp.arange(N) >= N - n_live
    grad = jax.jit(jax.grad(lambda *args: loss(*args, denoise, remat=remat)))(THETA, normal(0, 3, *SHAPE), live)
    jax.block_until_ready(grad)
    jax.effects_barrier()
    assert len(calls) == n_live


def test_one_compilation_serves_every_mask():
    grad = jax.jit(jax.grad(lambda theta, x, live: loss(theta, x, live)))
    x_T = normal(0, 3, *SHAPE)
    results = [grad(THETA, x_T, jnp.arange(N) >= N - k) for k in range(N + 1)]
    assert grad._cache_size() == 1
    assert len({tuple(np.asarray(g).tolist()) for g in results}) == N + 1  # and each is another gradient


# ---- guidance


def unet(x, t, cond):
    """Of conditioning that is an array [B,L,D], or a tree of it and others [B,P]."""
    embedding, *added = cond if isinstance(cond, tuple) else (cond,)
    out = x * embedding.mean((1, 2))[:, None, None, None] + t / 1000
    return out + sum(more[:, :1, None, None] for more in added)


GUIDED = partial(two_halves(lambda frozen, lora, x_t, step, cond: unet(x_t, step.t, cond)), None, None)


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("with_added", [False, True])
def test_guided_literal(w, with_added):
    """The output is linear in the embedding's mean m and in the added inputs, so both are blended by w."""
    ctx, x = context(3), normal(0, 3, *SHAPE)
    if with_added:
        ctx = Context((ctx.cond, normal(3, 3, 5), normal(4, 3, 6)), (ctx.uncond, normal(5, 3, 5), normal(6, 3, 6)))
    step = row(make_steps(4, w=w), 1)
    out = GUIDED(x, step, ctx)
    halves = [unet(x, 501, ctx.cond), unet(x, 501, ctx.uncond)]
    assert int(step.t) == 501
    np.testing.assert_allclose(out, w * halves[0] + (1 - w) * halves[1], rtol=1e-5, atol=1e-5)
    if w in (0.0, 1.0):
        np.testing.assert_array_equal(out, halves[0 if w else 1])


def test_guidance_of_each_step_is_its_own():
    """A schedule of 1, then 0: the chain is conditional first, unconditional after, and never a blend."""
    ctx, x_T = context(3), normal(0, 3, *SHAPE)
    steps = make_steps(4, w=jnp.array([1.0, 1.0, 0.0, 0.0]))
    x_0, _ = rollout(GUIDED, x_T, ctx, steps, KEYS)
    x = x_T
    for i, embedding in enumerate((ctx.cond, ctx.cond, ctx.uncond, ctx.uncond)):
        x, _ = ddim.ddim_step(x, unet(x, steps.t[i], embedding), row(steps, i))
    np.testing.assert_allclose(x_0, x, rtol=1e-4, atol=1e-5)


def test_both_halves_of_the_guidance_carry_gradient():
    ctx, step = context(3), row(make_steps(4, w=7.5), 1)
    grads = jax.grad(lambda c: GUIDED(normal(0, 3, *SHAPE), step, c).sum())(ctx)
    np.testing.assert_allclose(grads.uncond, grads.cond * (1 - 7.5) / 7.5, rtol=1e-4)
    assert np.abs(grads.cond).min() > 1e-3
