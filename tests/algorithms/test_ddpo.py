"""DDPO: its loss in closed form, its updates against a plain loop, its ratio, and whether it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import Batch, Inputs, Policy
from diffexp_jax.algorithms.algorithm import mean_over
from diffexp_jax.algorithms.ddpo import DDPO, clipped_ratio_loss, ddpo
from diffexp_jax.algorithms.ratios import ratio_metrics
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora
from diffexp_jax.programs import make_explore, make_programs
from diffexp_jax.sampling import Context, load_process, step_log_prob
from diffexp_jax.settings import checked
from tests.support.tiny import network_of, nonzero_lora, policy_of

# ------------------------------------------------------------------------------------------------------------- the loss

LITERAL = [  # ratio, advantage, loss, d loss / d log_prob; clip 0.1
    (1.25, 2.0, -2.2, 0.0),  # already more likely than the clip allows: no gradient
    (1.25, -2.0, 2.5, 2.5),
    (0.8, 2.0, -1.6, -1.6),
    (0.8, -2.0, 1.8, 0.0),  # already less likely than the clip allows
    (1.05, 2.0, -2.1, -2.1),
    (0.95, -2.0, 1.9, 1.9),
    (1.0, 3.0, -3.0, -3.0),  # before the first update: the plain policy gradient
]


@pytest.mark.parametrize("ratio, adv, loss, gradient", LITERAL)
def test_clipped_ratio_loss_literal(ratio, adv, loss, gradient):
    old = jnp.array([-1.3])
    new = old + jnp.log(jnp.array([ratio]))
    value, slope = jax.value_and_grad(clipped_ratio_loss)(new, old, jnp.array([adv]), clip=0.1)
    assert float(value) == pytest.approx(loss, rel=1e-6)
    assert float(slope[0]) == pytest.approx(gradient, rel=1e-6)


def test_clipped_ratio_loss_is_a_mean_over_the_batch():
    ratio, adv, loss, gradient = (jnp.array(column) for column in zip(*LITERAL, strict=True))
    value, slope = jax.value_and_grad(clipped_ratio_loss)(jnp.log(ratio), jnp.zeros(7), adv, clip=0.1)
    assert float(value) == pytest.approx(float(loss.mean()), rel=1e-5)
    np.testing.assert_allclose(slope, gradient / 7, rtol=1e-5)


# ------------------------------------------------------------------------- the updates, on a network of three numbers

SHAPE, N, T = (2, 2, 3), 8, 3
PROCESS = load_process({"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1})
STEPS = PROCESS.make_steps(PROCESS.timesteps(T), np.full(T, 2.0, np.float32), eta=1.0)


def linear(frozen, lora):
    def denoise(x_t, step, context):
        cond = context.cond.mean((1, 2))[:, None, None, None]
        return lora["a"] * x_t + lora["b"] * step.t / 1000 + lora["c"] * step.w_t * cond

    return denoise


LINEAR = Policy(
    network=network_of(linear),
    decode=lambda frozen, x_0: jax.nn.sigmoid(x_0),
    score=lambda frozen, images, tokens: (images.mean((1, 2, 3)), {"part": tokens.astype(jnp.float32)}),
    latent_shape=SHAPE,
    process=PROCESS,
)
LORA = {"a": jnp.float32(0.7), "b": jnp.float32(-0.2), "c": jnp.float32(0.3)}
SETTINGS = dict(n_prompts=5, inner_epochs=1, n_updates=1, n_chunks=1, clip=1e-4, advantage_clip=5.0)
SETTINGS |= dict(stats_buffer=32, stats_min_count=16)
RATE = 0.02


def linear_batch():
    rng = np.random.default_rng(0)
    cond, uncond = (rng.standard_normal((N, 4, 3), np.float32) for _ in range(2))
    ids, keys = np.arange(N, dtype=np.int32) % 5, parallel.sample_keys(jax.random.key(3), N)
    return parallel.shard(Batch(ids, Context(cond, uncond), np.arange(N, dtype=np.int32), keys), N)


OF_UPDATES = ("n_updates", "inner_epochs", "clip", "stats_min_count")  # sampling knows nothing of them


@functools.cache
def sampled(**changes):
    """What the algorithm samples before its first update."""
    algorithm = ddpo(LINEAR, optax.sgd(RATE), **SETTINGS | changes)
    state, steps = parallel.replicate((algorithm.init(LORA), STEPS))
    return parallel.pmap(algorithm.sample)(state, parallel.replicate({}), linear_batch(), steps)


def iterate(**changes):
    """One iteration by the algorithm with plain gradient descent: (samples, LoRA after it, metrics)."""
    algorithm = ddpo(LINEAR, optax.sgd(RATE), **SETTINGS | changes)
    state, batch, steps = parallel.replicate(algorithm.init(LORA)), linear_batch(), parallel.replicate(STEPS)
    samples = sampled(**{name: x for name, x in changes.items() if name not in OF_UPDATES})
    key = parallel.replicate(jax.random.key(0))
    state, metrics = parallel.pmap(algorithm.update)(state, parallel.replicate({}), Inputs(batch, steps, key, samples))
    assert int(state.iteration[0]) == 1
    return parallel.first(samples), parallel.first(state.lora), parallel.first(metrics)


@pytest.fixture(scope="module")
def whole():
    """An iteration as one chunk and one update."""
    return iterate()


def by_hand(samples, *, n_updates, inner_epochs, clip, n_trained=T):
    """The same iteration as loops over epochs, updates and steps; adv of the whole batch, all samples in one chunk."""
    rewards = np.asarray(samples.rewards, np.float64)
    adv = jnp.asarray((rewards - rewards.mean()) / (rewards.std() + 1e-6), jnp.float32)
    tr = jax.tree.map(lambda x: jnp.asarray(x[0]), samples.trajectory)

    @jax.jit
    def gradient(lora, rows):
        def loss(lora):
            total, log_ratios = 0.0, []
            for i in range(n_trained):
                step = jax.tree.map(lambda column, i=i: column[i], tr.steps)
                context = jax.tree.map(lambda x: x[rows], tr.context)
                log_prob = step_log_prob(PROCESS, linear({}, lora), tr.x_t(i)[rows], tr.x_tm1[i][rows], step, context)
                log_ratios.append(log_prob - tr.log_prob[i][rows])
                ratio = jnp.exp(log_ratios[-1])
                bounded = jnp.minimum(jnp.maximum(ratio, 1 - clip), 1 + clip)
                total += -jnp.minimum(adv[rows] * ratio, adv[rows] * bounded).mean() / n_trained
            return total, jnp.stack(log_ratios)

        return jax.value_and_grad(loss, has_aux=True)(lora)

    lora, losses, norms, log_ratios = LORA, [], [], []
    for _ in range(inner_epochs):
        for rows in np.split(np.arange(N), n_updates):
            (loss, log_ratio), grads = gradient(lora, rows)
            lora = jax.tree.map(lambda x, g: x - RATE * g, lora, grads)
            losses.append(float(loss))
            norms.append(float(optax.tree.norm(grads)))
            log_ratios.append(np.asarray(log_ratio, np.float64))
    log_ratios = np.array(log_ratios)
    ratios, thirds = np.exp(log_ratios), dict(zip(("early", "middle", "late"), range(n_trained), strict=False))
    return lora, {
        "loss": np.mean(losses),
        "grad_norm": np.mean(norms),
        "ratio/mean": ratios.mean(),
        "ratio/clip_fraction": (np.abs(ratios - 1) > clip).mean(),
        "ratio/clip_fraction_high": (ratios > 1 + clip).mean(),
        "ratio/clip_fraction_low": (ratios < 1 - clip).mean(),
        "ratio/max_abs_log": np.abs(log_ratios).max(),
        **{f"ratio/log_std_{name}": log_ratios[:, i].std() for name, i in thirds.items()},
        "approx_kl": 0.5 * np.square(log_ratios).mean(),
    }


def assert_same_lora(ours, theirs, rtol=1e-4):
    """The *changes* agree, not only the weights."""
    for name, start in LORA.items():
        want = float(theirs[name] - start)
        assert abs(want) > 1e-5
        assert float(ours[name] - start) == pytest.approx(want, rel=rtol, abs=1e-7)


@pytest.mark.parametrize(
    "n_updates, inner_epochs, n_chunks, clip",
    [(1, 1, 1, 1e-4), pytest.param(2, 1, 2, 1e-4, marks=pytest.mark.slow), (2, 3, 4, 1e-4), (4, 2, 4, 0.05)],
)
def test_an_iteration_is_the_plain_loops(whole, n_updates, inner_epochs, n_chunks, clip):
    samples = whole[0]
    kwargs = dict(n_updates=n_updates, inner_epochs=inner_epochs, clip=clip)
    _, lora, metrics = iterate(n_chunks=n_chunks, **kwargs)
    expected_lora, expected = by_hand(samples, **kwargs)
    later_updates = n_updates * inner_epochs > 1  # rounding decides there what is just inside the clip
    assert_same_lora(lora, expected_lora, rtol=5e-3 if later_updates else 1e-4)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=5e-3, abs=1e-5), name
    if later_updates:
        assert expected["ratio/clip_fraction"] > 0.05  # the clip is at work in what was compared


@pytest.mark.parametrize(
    "settings", [{}, {"one_pass": True}, pytest.param({"old_log_prob": "recomputed"}, marks=pytest.mark.slow)]
)
def test_only_the_first_steps_are_learnt_from(whole, settings):
    """The samples stay the same; the update is that of a loss over two of the three steps, however it is made."""
    samples, lora, _ = iterate(n_trained=T - 1, n_chunks=2, n_updates=1 if "one_pass" in settings else 2, **settings)
    np.testing.assert_allclose(samples.images, whole[0].images, atol=1e-6)
    expected, _ = by_hand(
        whole[0], n_updates=1 if "one_pass" in settings else 2, inner_epochs=1, clip=1e-4, n_trained=2
    )
    assert_same_lora(lora, expected, rtol=5e-3)
    assert abs(float(lora["a"] - whole[1]["a"])) > 1e-5  # that of all steps is another


@pytest.mark.parametrize("share, n_steps, expected", [(1.0, 50, 50), (0.8, 10, 8), (0.01, 10, 1), (0.66, 3, 2)])
def test_trained_steps(share, n_steps, expected):
    assert DDPO(timestep_fraction=share).trained_steps(n_steps) == expected


@pytest.mark.parametrize(
    "n_updates, inner_epochs",
    [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_recomputed_log_probs_change_nothing_where_numerics_agree(n_updates, inner_epochs):
    """One more pass, or none for one update: the same updates, and metrics of the updates alone."""
    settings = dict(n_updates=n_updates, inner_epochs=inner_epochs, n_chunks=2, clip=0.05)
    _, plain_lora, plain = iterate(**settings)
    _, lora, metrics = iterate(**settings, old_log_prob="recomputed")
    assert_same_lora(lora, plain_lora)
    for name, value in plain.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_the_sampling_programs_log_probs_are_not_looked_at():
    """However wrong they are: the ratio is of the update program's own."""
    algorithm = ddpo(LINEAR, optax.sgd(0.0), **SETTINGS | {"n_updates": 2, "n_chunks": 2}, old_log_prob="recomputed")
    state, batch, steps = parallel.replicate(algorithm.init(LORA)), linear_batch(), parallel.replicate(STEPS)
    samples = parallel.pmap(algorithm.sample)(state, parallel.replicate({}), batch, steps)
    samples = samples._replace(trajectory=samples.trajectory._replace(log_prob=samples.trajectory.log_prob + 1.0))
    key = parallel.replicate(jax.random.key(0))
    _, metrics = parallel.pmap(algorithm.update)(state, parallel.replicate({}), Inputs(batch, steps, key, samples))
    assert float(metrics["ratio/max_abs_log"][0]) == 0.0


# ------------------------------------------------------------------------------------------------------------ one pass


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_one_pass_is_the_two_passes(whole, n_chunks):
    """The same samples, and the same update within float32; nothing of the chain is kept."""
    samples, lora, metrics = iterate(n_chunks=n_chunks, one_pass=True)
    np.testing.assert_allclose(samples.rewards, whole[0].rewards, atol=1e-6)
    assert samples.trajectory is None
    assert_same_lora(lora, whole[1], rtol=2e-4)  # changes of 0.001 to numbers of float32
    for name in ("grad_norm", "lora_norm", "reward/mean", "reward/part"):
        assert float(metrics[name]) == pytest.approx(float(whole[2][name]), rel=1e-5), name
    assert float(metrics["loss"]) == pytest.approx(float(whole[2]["loss"]), abs=1e-6)  # a mean of advantages: 0


def test_the_gradient_of_a_sample(whole):
    """Against the derivative of its chain's mean log-prob, sample by sample."""
    samples, _, _ = iterate(one_pass=True)
    tr = jax.tree.map(lambda x: jnp.asarray(x[0]), whole[0].trajectory)

    def mean_log_prob(lora, row):
        rows = jnp.array([row])
        context = jax.tree.map(lambda x: x[rows], tr.context)
        return (
            sum(
                step_log_prob(
                    PROCESS,
                    linear({}, lora),
                    tr.x_t(i)[rows],
                    tr.x_tm1[i][rows],
                    jax.tree.map(lambda column, i=i: column[i], tr.steps),
                    context,
                )[0]
                for i in range(T)
            )
            / T
        )

    slopes = jax.jit(jax.vmap(jax.grad(mean_log_prob), in_axes=(None, 0)))(LORA, jnp.arange(N))
    for row in range(N):
        expected = jax.tree.map(lambda x, row=row: x[row], slopes)
        for name, value in expected.items():
            found = np.asarray(samples.gradients[name])
            assert abs(found[row] - value) <= 1e-4 * np.abs(found).max(), (row, name)


@pytest.mark.parametrize(
    "gradient, updates, epochs, samples, size, expected",
    [
        ("auto", 1, 1, 64, 800_000, True),
        ("auto", 1, 1, 64, 10**8, False),  # 25 GB
        ("auto", 2, 1, 64, 1000, False),
        ("auto", 1, 2, 64, 1000, False),
        ("onepass", 1, 1, 64, 10**8, True),
        ("twopass", 1, 1, 64, 1000, False),
    ],
)
def test_when_the_gradient_is_made(gradient, updates, epochs, samples, size, expected):
    method = DDPO(gradient=gradient, updates=updates, inner_epochs=epochs)
    assert method.in_one_pass(samples, size) is expected


def test_one_pass_is_for_one_update():
    for changes in ({"updates": 2}, {"updates": 1, "inner_epochs": 2}):
        with pytest.raises(InputError, match="ddpo.gradient='onepass': wants ddpo.updates=1 and ddpo.inner_epochs=1"):
            DDPO(gradient="onepass", **changes).check(10)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["jax:sample_rewards:bright_and_long_jax", "python:sample_rewards:bright_and_long"])
def test_one_pass_on_a_unet(make_config, reward):
    """A tiny pipeline under exploration: LoRA's gradient of both ways within rounding, host rewards too."""
    found = {}
    for gradient in ("onepass", "twopass"):
        changes = {"ddpo.updates": 1, "ddpo.gradient": gradient, "reward": reward, "optim.grad_clip": 1e6}
        experiment = Experiment.build(checked(make_config("ddpo", {"eval.every": 0} | changes)))
        programs, batch = make_programs(experiment), experiment.draw_batch(3, make_explore(experiment))
        frozen, steps, key = parallel.replicate(
            (experiment.frozen, experiment.sampler.steps(explore=True), jax.random.key(0))
        )
        state = parallel.replicate(programs.algorithm.init(nonzero_lora(experiment.initial_lora())))
        samples = programs.sample(state, frozen, batch, steps)
        assert (samples.trajectory is None) == (samples.gradients is not None) == (gradient == "onepass")
        samples = samples._replace(rewards=jnp.arange(8.0)[None])  # the same advantages for both
        state, _ = programs.update(state, frozen, Inputs(batch, steps, key, samples))
        adams_mean = optax.tree.get(parallel.first(state.opt_state), "mu")
        found[gradient] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(adams_mean)])
    error = np.linalg.norm(found["onepass"] - found["twopass"]) / np.linalg.norm(found["twopass"])
    # two passes take the slope (x_{t-1} - mean) / std^2 from a difference of numbers near 1, at a std of 0.02
    assert error < 1e-4, (reward, error)


def test_ratio_metrics_literal():
    """Five steps in thirds of 2, 2 and 1; three of ten ratios above the clip, one below."""
    log_ratio = jnp.array([[0.2, 0.0], [0.0, 0.2], [0.0, 0.0], [0.0, 0.0], [0.2, -0.3]])
    metrics = parallel.first(parallel.pmap(lambda x: ratio_metrics(x, 0.1))(log_ratio[None]))
    assert float(metrics["ratio/clip_fraction_high"]) == pytest.approx(0.3)
    assert float(metrics["ratio/clip_fraction_low"]) == pytest.approx(0.1)
    assert float(metrics["ratio/clip_fraction"]) == pytest.approx(0.4)
    assert float(metrics["ratio/max_abs_log"]) == pytest.approx(0.3)
    spread = [float(metrics[f"ratio/log_std_{third}"]) for third in ("early", "middle", "late")]
    assert spread == pytest.approx([0.1, 0.0, 0.25])
    few = parallel.first(parallel.pmap(lambda x: ratio_metrics(x, 0.1))(log_ratio[None, :2]))
    assert "ratio/log_std_middle" in few and "ratio/log_std_late" not in few


@pytest.mark.parametrize("n_updates, inner_epochs", [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)])
def test_current_log_probs_are_the_plain_policy_gradient(whole, n_updates, inner_epochs):
    """Whatever the clip: the updates that an infinitely wide clip around ratios of 1 makes, and a ratio of 1."""
    settings = dict(n_updates=n_updates, inner_epochs=inner_epochs, n_chunks=2)
    _, lora, metrics = iterate(**settings, clip=1e-6, old_log_prob="current")
    assert_same_lora(lora, plain_policy_gradient(whole[0], n_updates, inner_epochs))
    assert float(metrics["ratio/max_abs_log"]) == 0.0 and float(metrics["ratio/mean"]) == 1.0
    _, clipped, _ = iterate(**settings, clip=1e-6)
    assert abs(float(clipped["a"] - lora["a"])) > 1e-4  # with a ratio, such a clip stops the later updates


def plain_policy_gradient(samples, n_updates, inner_epochs):
    """Updates by -A grad log p, without a ratio."""
    rewards = np.asarray(samples.rewards, np.float64)
    adv = jnp.asarray((rewards - rewards.mean()) / (rewards.std() + 1e-6), jnp.float32)
    tr, lora = jax.tree.map(lambda x: jnp.asarray(x[0]), samples.trajectory), LORA

    @jax.jit
    def gradient(lora, rows):
        def loss(lora):
            total = 0.0
            for i in range(T):
                step, context = jax.tree.map(lambda x, i=i: x[i], tr.steps), jax.tree.map(lambda x: x[rows], tr.context)
                log_prob = step_log_prob(PROCESS, linear({}, lora), tr.x_t(i)[rows], tr.x_tm1[i][rows], step, context)
                total -= (adv[rows] * log_prob).mean() / T
            return total

        return jax.grad(loss)(lora)

    for _ in range(inner_epochs):
        for rows in np.split(np.arange(N), n_updates):
            lora = jax.tree.map(lambda x, g: x - RATE * g, lora, gradient(lora, rows))
    return lora


def test_a_mean_over_chunks_of_steps_traces_a_step_once():
    """However deep the scans are: a UNet takes seconds to trace."""
    traced = []

    def step(x):
        traced.append(x.shape)
        return x * x, x + 1

    mean, kept = jax.jit(lambda xs: mean_over(lambda chunk: mean_over(step, chunk), xs))(jnp.arange(6.0).reshape(2, 3))
    assert traced == [()]
    assert float(mean) == pytest.approx(55 / 6)
    np.testing.assert_array_equal(kept, [[1, 2, 3], [4, 5, 6]])


def test_accumulated_gradient_is_that_of_one_chunk(whole):
    samples, lora, metrics = whole
    small_samples, small_lora, small_metrics = iterate(n_chunks=4)
    np.testing.assert_allclose(small_samples.images, samples.images, atol=1e-6)
    np.testing.assert_allclose(small_samples.rewards, samples.rewards, atol=1e-6)
    assert small_samples.trajectory.x_tm1.shape == (4, T, 2, *SHAPE)
    assert_same_lora(small_lora, lora)
    for name in ("loss", "grad_norm", "reward/mean", "reward/std", "reward/part"):
        assert float(small_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6), name


def test_reward_metrics(whole):
    samples, _, metrics = whole
    np.testing.assert_allclose(samples.rewards, samples.images.mean((1, 2, 3)), rtol=1e-5)
    assert float(metrics["reward/mean"]) == pytest.approx(float(samples.rewards.mean()), rel=1e-5)
    assert float(metrics["reward/std"]) == pytest.approx(float(samples.rewards.std()), rel=1e-4)
    assert float(metrics["reward/part"]) == pytest.approx(3.5)  # the mean of the tokens 0..7
    assert float(metrics["advantage/own_statistics"]) == 0.0


def test_own_statistics_are_used_once_there_are_enough(whole):
    """Five prompts, eight samples: the prompts 0, 1 and 2 come twice, and two rewards are enough here."""
    _, lora, metrics = iterate(stats_min_count=2)
    assert float(metrics["advantage/own_statistics"]) == pytest.approx(6 / 8)
    assert abs(float(lora["a"] - whole[1]["a"])) > 1e-5


# --------------------------------------------------------------------------------------------------- a real, tiny model


class Tiny:
    """The tiny pipeline with brightness as its reward, and its compiled programs."""

    def __init__(self, config):
        self.config, self.experiment = config, Experiment.build(checked(config))
        self.model, self.explore = self.experiment.sampler.pipeline, make_explore(self.experiment)
        self.policy = policy_of(self.model, lambda frozen, images: frozen["sign"] * images.mean((1, 2, 3)))
        self.algorithm = ddpo(self.policy, optax.adam(5e-3), **SETTINGS | {"n_chunks": 2, "n_updates": 1})
        self.sample, self.update = parallel.pmap(self.algorithm.sample), parallel.pmap(self.algorithm.update)
        self.frozen = {"model": parallel.replicate(self.experiment.frozen.model)}
        lora = init_lora(jax.random.key(0), self.model.params["unet"], rank=2)
        self.state = parallel.replicate(self.algorithm.init(nonzero_lora(lora)))
        steps = self.experiment.sampler.steps
        self.plain, self.explored = (parallel.replicate(steps(explore=on)) for on in (False, True))
        self.key = parallel.replicate(jax.random.key(0))

    def batch(self, it, explore=True):
        return self.experiment.draw_batch(it, self.explore if explore else None)

    def frozen_with(self, sign):
        return self.frozen | {"sign": np.full(len(self.key), sign, np.float32)}


@pytest.fixture(scope="module")
def tiny(make_config):
    return Tiny(make_config("ddpo", {"eval.every": 0, "batch.samples": 32}))


def test_ratio_is_1_before_the_first_update(tiny):
    """With exploration on, at every timestep: the update scores under the very policy that sampled."""
    batch, frozen = tiny.batch(0), tiny.frozen_with(1.0)
    assert np.ptp(tiny.explored.w_t) > 1 and np.ptp(tiny.plain.w_t) == 0
    assert np.abs(batch.context.cond.embedding - tiny.batch(0, explore=False).context.cond.embedding).max() > 0.01
    samples = tiny.sample(tiny.state, frozen, batch, tiny.explored)
    _, metrics = tiny.update(tiny.state, frozen, Inputs(batch, tiny.explored, tiny.key, samples))
    assert float(metrics["ratio/max_abs_log"][0]) < 1e-5
    assert float(metrics["approx_kl"][0]) < 1e-10
    assert float(metrics["ratio/clip_fraction"][0]) == 0.0
    assert float(metrics["ratio/mean"][0]) == pytest.approx(1.0, abs=1e-5)

    # the same samples scored without the schedule: another policy
    trajectory = samples.trajectory
    w_t = np.full(trajectory.steps.w_t.shape, tiny.config.sampling.guidance, np.float32)
    samples = samples._replace(trajectory=trajectory._replace(steps=trajectory.steps._replace(w_t=w_t)))
    _, metrics = tiny.update(tiny.state, frozen, Inputs(batch, tiny.explored, tiny.key, samples))
    assert float(metrics["ratio/max_abs_log"][0]) > 1e-4


@pytest.mark.slow
def test_learns_brightness(tiny):
    """On samples never trained on."""
    test_batch, frozen, state = tiny.batch(1000), tiny.frozen_with(1.0), tiny.state
    before = float(tiny.sample(state, frozen, test_batch, tiny.explored).rewards.mean())
    for it in range(20):
        batch = tiny.batch(it)
        samples = tiny.sample(state, frozen, batch, tiny.explored)
        state, _ = tiny.update(state, frozen, Inputs(batch, tiny.explored, tiny.key, samples))
    after = float(tiny.sample(state, frozen, test_batch, tiny.explored).rewards.mean())
    assert before + 5e-4 < after, (before, after)


@pytest.mark.slow
def test_ratio_is_1_in_bfloat16(make_config):
    """With exploration on, at every timestep, for two updates that change nothing (sgd at rate 0).

    With the sampling program's log-probs the same number is 0.016 (on this CPU), far outside of the clip.
    """
    config = make_config("ddpo", {"eval.every": 0, "batch.samples": 8, "model.dtype": "bfloat16"})
    experiment = Experiment.build(checked(config))
    frozen = {"model": parallel.replicate(experiment.frozen.model)}
    lora = nonzero_lora(init_lora(jax.random.key(0), experiment.sampler.pipeline.base, rank=2))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(frozen))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(lora))
    policy = policy_of(experiment.sampler.pipeline, lambda frozen, images: images.mean((1, 2, 3)))
    settings = SETTINGS | {"n_chunks": 2, "n_updates": 2, "old_log_prob": "recomputed"}
    algorithm = ddpo(policy, optax.sgd(0.0), **settings)
    steps = parallel.replicate(experiment.sampler.steps(explore=True))
    args = (
        parallel.replicate(algorithm.init(lora)),
        frozen,
        experiment.draw_batch(0, make_explore(experiment)),
        steps,
    )
    samples = parallel.pmap(algorithm.sample)(*args)
    state, frozen, batch, steps = args
    inputs = Inputs(batch, steps, parallel.replicate(jax.random.key(0)), samples)
    _, metrics = parallel.pmap(algorithm.update)(state, frozen, inputs)
    assert float(metrics["grad_norm"][0]) > 0
    assert float(metrics["ratio/max_abs_log"][0]) < 1e-5
