"""Entropy-regularised control: it finds the optimum that is known in closed form, on any devices; its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import entropy as entropy_config
from diffexp_jax import parallel, train
from diffexp_jax.algorithms import Batch, Inputs, Policy, Setup
from diffexp_jax.algorithms.entropy import Entropy
from diffexp_jax.errors import InputError
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.sampling import START, Context, load_process
from diffexp_jax.settings import checked, parsed
from tests.support.runs import PLAIN
from tests.support.tiny import SCHEDULER, network_of

# ---------------------------------------- latents of one number: the untuned model's are normal, the reward a parabola

T, CURVE, BEST = 6, 3.0, 1.5  # reward -CURVE / 2 (x_0 - BEST)^2
PROCESS = load_process(SCHEDULER)
STEPS, FEW_NOISE = (PROCESS.make_steps(PROCESS.timesteps(T), np.ones(T, np.float32), eta=eta) for eta in (1.0, 0.3))


def network(frozen, lora):
    """eps of images that are standard normal, and a shift of each step, linear in x_t: the best control is one."""

    def denoise(x_t, step, context):
        eps = jnp.sqrt(1.0 - step.alpha_bar_t) * x_t
        if lora is None:
            return eps
        i = jnp.argmax(step.t == STEPS.t)
        return eps + lora["shift"][i] + lora["slope"][i] * x_t

    return denoise


NORMAL = Policy(
    network=network_of(network),
    decode=lambda frozen, x_0: jnp.repeat(0.5 + x_0 / 20.0, 3, axis=-1),
    score=lambda frozen, images, tokens: (-CURVE / 2 * jnp.square(20.0 * images[:, 0, 0, 0] - 10.0 - BEST), {}),
    latent_shape=(1, 1, 1),
    process=PROCESS,
)


def transition(i, steps=STEPS, lora=None):
    """(a, b, sigma) of x_{t-1} = a x_t + b + sigma z at step i."""
    row, x = jax.tree.map(lambda column: column[i], steps), jnp.array([0.0, 1.0]).reshape(2, 1, 1, 1)
    mean, std = PROCESS.transition(x, network(None, lora)(x, row, None), row)
    return float(mean[1, 0, 0, 0] - mean[0, 0, 0, 0]), float(mean[0, 0, 0, 0]), float(std)


def moments(transitions, mean=0.0):
    """(mean, std) of x_0, where x_T has this mean."""
    var = 1.0
    for a, b, std in transitions:
        mean, var = a * mean + b, a**2 * var + std**2
    return mean, var**0.5


def optimum(alpha, steps):
    """The transitions under the best control, by dynamic programming: the value of x_t is a parabola -p/2 (x - q)^2.

    And the mean m of x_T for which that value less alpha m^2 / 2 is largest.
    """
    p, q, found = CURVE, BEST, []
    for i in reversed(range(T)):
        a, _, std = transition(i, steps)
        share = p / (p + alpha / std**2)  # by which the mean a x moves towards q
        found.append(((1 - share) * a, share * q, std))
        p, q = p * (1 - share) * a**2, q / a
    return found[::-1], p * q / (p + alpha)


def algorithm(alpha, policy, optimizer, n, n_chunks=1, **settings):
    sizes = dict(n_samples=n, n_chunks=n_chunks, n_prompts=1, n_steps=T, lora_size=2 * T)
    setup = Setup(policy, optimizer, **sizes, remat=True, full_float32=True, stream=None)
    return Entropy(alpha=alpha, **settings).make(setup)


@pytest.mark.parametrize(
    "alpha, steps, start",
    [
        pytest.param(0.5, STEPS, False, marks=pytest.mark.slow),
        pytest.param(5.0, STEPS, False, marks=pytest.mark.slow),
        (0.5, FEW_NOISE, True),
        pytest.param(0.5, STEPS, True, marks=pytest.mark.slow),
    ],
)
def test_it_finds_the_best_control(alpha, steps, start):
    """Mean and spread of the images: drawn to the reward's best the more, the less the KL weighs.

    With the best mean of x_T where that is learnt: less of it with eta 1, as the chain forgets it.
    """
    n, iterations = 512, 400
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, iterations))
    made = algorithm(alpha, NORMAL, optimizer, n, truncation="none", start=start)
    lora, cond = {"shift": jnp.zeros(T), "slope": jnp.zeros(T)}, np.zeros((n, 1, 1), np.float32)

    @jax.jit
    def trained(state):
        def one(state, it):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), it), n)
            batch = Batch(jnp.zeros(n, jnp.int32), Context(cond, cond), None, keys)
            update = jax.vmap(made.update, (None, None, None), axis_name=parallel.AXIS, axis_size=1)
            state, metrics = update(state, {}, Inputs(batch, steps, jax.random.key(0)))
            return jax.tree.map(lambda x: x[0], (state, metrics))

        return jax.lax.scan(one, state, jnp.arange(iterations))

    state, metrics = trained(made.init(lora))
    (controlled, mean), own = optimum(alpha, steps), float(state.lora[START].item()) if start else 0.0
    found = moments([transition(i, steps, state.lora) for i in range(T)], own)
    best, untuned = moments(controlled, start * mean), moments([transition(i, steps) for i in range(T)])
    assert best[0] - untuned[0] > 0.2 and untuned[1] - best[1] > 0.05
    if start:
        assert own == pytest.approx(mean, abs=0.03) and (mean > 1.0) == (steps is FEW_NOISE)
        assert metrics["kl/start"][-1] == pytest.approx(own**2 / 2, abs=0.02)
    np.testing.assert_allclose(found, best, rtol=0.03)
    assert metrics["kl/path"][0] == 0.0 and metrics["kl/path"][-1] > 0.05


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_published_settings():
    """Those of AlignProp, whose code the authors' next one is, but for the noise."""
    found = parsed(entropy_config.get_config("model=sd15,reward=aesthetic:x,prompts=animals"))
    assert found.method == Entropy(alpha=1.0, truncation="per_step")
    assert (found.sampling.steps, found.sampling.guidance, found.sampling.eta) == (50, 7.5, 1.0)
    assert (found.optim.lr, found.optim.weight_decay, found.lora.rank) == (1e-3, 0.1, 4)
    assert found.optim.grad_clip == pytest.approx(500.0)  # of a loss without AlignProp's factor of 0.01
    passes = {"to sample": 0.5, "to sample with a gradient": 0.5, "of the untuned model": 1.0}
    assert found.method.passes(50, True) == passes


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sampling.eta": 0.0}, r"sampling.eta=0: entropy needs steps with noise \(the KL of its paths\)"),
        ({"entropy.alpha": 0.0}, "entropy.alpha=0.0: wants more than 0"),
        ({"entropy.alpha": float("inf")}, "entropy.alpha=inf: wants more than 0"),
        ({"entropy.truncation": "last"}, "entropy.truncation='last': accepted: uniform"),
        ({"entropy.truncation_k": 5}, "entropy.truncation_k=5: wants 1..4"),
    ],
)
def test_bad_settings(make_config, changes, said):
    with pytest.raises(InputError, match=said):
        checked(make_config("entropy", changes))


@pytest.mark.slow
def test_a_run_that_learns_where_chains_begin(make_config, tmp_path):
    """Its file and its checkpoint hold the mean of x_T, and what samples reads it; without it images are others."""
    changes = {"entropy.start": True, "sampling.eta": 0.5, "iterations": 2, "optim.lr": 0.1, "checkpoint.every": 2}
    train.run(make_config("entropy", PLAIN | changes), tmp_path / "run")
    (file,) = (tmp_path / "run").glob("*.x_T.npy")
    mean = np.load(file).transpose(1, 2, 0)
    assert 0.01 < np.abs(mean).max() < 1.0
    ended, kept = (Evaluator.of_run(tmp_path / "run", checkpoint) for checkpoint in (None, "newest"))
    for model in (ended, kept):
        np.testing.assert_array_equal(parallel.first(model.lora)[START], mean)
    images = [model.images(["a dog"], seed=3) for model in (ended, kept)]
    np.testing.assert_array_equal(*images)
    file.unlink()
    without = Evaluator.of_run(tmp_path / "run").images(["a dog"], seed=3)
    assert np.abs(without.astype(int) - images[0]).max() > 2
