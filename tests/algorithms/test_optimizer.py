"""The learning rate's warm-up against diffusers, and the LoRA's moving average by hand, in checkpoints and exports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from diffexp_jax import train
from diffexp_jax.algorithms.optimizer import gradient_snr, learning_rate, make_optimizer, with_new_moments
from diffexp_jax.algorithms.state import TrainState
from diffexp_jax.errors import InputError
from diffexp_jax.run import checkpoint
from diffexp_jax.run.metrics import read_metrics
from diffexp_jax.settings import checked
from tests.support.runs import LORA, PLAIN, assert_same_run


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_diffusers(make_config, schedule):
    """The rate at each of ten updates, three of them warming up: 0 at first, the whole rate at the fourth."""
    torch = pytest.importorskip("torch")
    from diffusers.optimization import get_scheduler

    usual = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, usual, num_warmup_steps=3, num_training_steps=10)
    changes = {"optim.schedule": schedule, "optim.lr": 0.5, "optim.warmup": 3}
    ours = learning_rate(make_config("ddpo", changes).optim, 10)
    assert (float(ours(0)), float(ours(3))) == (0.0, 0.5)
    for n in range(10):
        assert float(ours(n)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6), n
        usual.step()
        theirs.step()


def test_no_warm_up_is_the_schedule_itself(make_config):
    """A constant rate stays a number: the optimizer's state has nothing more in it."""
    assert learning_rate(make_config("ddpo", {"optim.lr": 0.5}).optim, 10) == 0.5


def test_a_warm_up_without_an_end(make_config):
    changes = {"iterations": 3, "ddpo.updates": 2, "ddpo.inner_epochs": 1, "optim.warmup": 6}
    with pytest.raises(InputError, match="optim.warmup=6: wants fewer than the run's 6 optimizer updates"):
        checked(make_config("ddpo", changes))
    checked(make_config("ddpo", changes | {"optim.warmup": 5}))


def test_the_moving_average_literal(make_config):
    """Of weights that fall by 1 an update: decays 1/10, 2/11, then 0.2."""
    changes = {"optim.lr": 0.5, "optim.weight_decay": 0.0, "optim.eps": 1e-12}
    usual = make_optimizer(make_config("ddpo", changes).optim, 4)
    optimizer = make_optimizer(make_config("ddpo", changes | {"optim.ema": 0.2}).optim, 4)
    x = {"A": jnp.full(2, 3.0)}
    state, plain, average = optimizer.init(x), usual.init(x), 3.0
    for n, decay in enumerate([1 / 10, 2 / 11, 0.2, 0.2]):
        change, state = optimizer.update({"A": jnp.ones(2)}, state, x)
        without, plain = usual.update({"A": jnp.ones(2)}, plain, x)
        np.testing.assert_array_equal(change["A"], without["A"])  # it only looks on
        x = optax.apply_updates(x, change)
        average = decay * average + (1 - decay) * float(x["A"][0])
        np.testing.assert_allclose(state.average["A"], average, rtol=1e-6)
        assert state.n == n + 1
    jax.tree.map(np.testing.assert_array_equal, state.inner, plain)


def snr_after(make_config, gradients, **changes):
    """Adam's signal-to-noise ratio after updates by these gradients, none of them clipped."""
    optim = make_config("ddpo", {"optim.grad_clip": 1e6} | changes).optim
    optimizer, x = make_optimizer(optim, len(gradients)), {"A": jnp.zeros(len(gradients[0]))}
    state = optimizer.init(x)
    assert float(gradient_snr(state, b1=optim.b1, b2=optim.b2)["grad_snr"]) == 0.0  # of nothing
    for gradient in gradients:
        _, state = optimizer.update({"A": jnp.asarray(gradient)}, state, x)
    assert float(gradient_snr(with_new_moments(state), b1=optim.b1, b2=optim.b2)["grad_snr"]) == 0.0
    return float(gradient_snr(state, b1=optim.b1, b2=optim.b2)["grad_snr"])


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_gradients_signal_to_noise_literal(make_config, ema):
    """Equal gradients agree wholly; of (1, 0) and (0, 1) the newer weighs 1, the older 0.9 of 1.9."""
    changes = {"optim.b1": 0.9, "optim.b2": 0.999, "optim.ema": ema}
    assert snr_after(make_config, [[2.0, -1.0]] * 3, **changes) == pytest.approx(1.0, rel=1e-5)
    crossed = (0.9**2 + 1.0) / 1.9**2
    assert snr_after(make_config, [[1.0, 0.0], [0.0, 1.0]], **changes) == pytest.approx(crossed, rel=1e-4)
    noise = np.random.default_rng(0).normal(size=(60, 4000)).astype(np.float32)
    assert snr_after(make_config, list(noise), **changes) == pytest.approx(0.1 / 1.9, rel=0.05)


def test_an_optimizer_without_moments_has_no_ratio():
    assert gradient_snr(optax.sgd(0.1).init({"A": jnp.zeros(2)}), b1=0.9, b2=0.999) == {}


def test_the_moving_average_is_kept_and_shown(make_config, tmp_path):
    """A checkpoint has it bit for bit, and the scripts take it in place of the LoRA; without one, the LoRA."""
    for folder, changes in (("with", {"optim.ema": 0.5}), ("without", {})):
        lora = {"to_q": {"A": jnp.ones((3, 2)), "B": jnp.zeros((2, 3))}}
        optimizer = make_optimizer(make_config("ddpo", changes).optim, 4)
        change, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, lora), optimizer.init(lora), lora)
        before = TrainState(jnp.int32(1), optax.apply_updates(lora, change), opt_state)
        with checkpoint.Checkpoints(tmp_path / folder, keep=1) as checkpoints:
            checkpoints.save(1, jax.device_get(before))
            _, found = checkpoints.restore_newest(jax.device_get(before))
        assert jax.tree.structure(found) == jax.tree.structure(before)
        jax.tree.map(np.testing.assert_array_equal, found, before)
        _, exported = checkpoint.read_lora(tmp_path / folder)
        jax.tree.map(np.testing.assert_array_equal, exported, before.tuned)
        differs = jax.tree.map(lambda a, b: bool((a != b).any()), before.tuned, before.lora)
        assert all(jax.tree.leaves(differs)) if changes else before.tuned is before.lora


@pytest.mark.slow  # three runs
@pytest.mark.parametrize("algorithm", ["alignprop", "ddpo"])
def test_a_run_with_a_moving_average_goes_on_bit_for_bit(make_config, tmp_path, algorithm):
    """It trains as without one, and ends with the average, which the checkpoint has too."""
    changes = PLAIN | {"exploration.iterations": 3, "optim.ema": 0.9}
    train.run(make_config(algorithm, changes), tmp_path / "whole")
    for iterations in (2, 4):
        train.run(make_config(algorithm, changes | {"iterations": iterations}), tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    train.run(make_config(algorithm, changes | {"optim.ema": 0.0}), tmp_path / "without")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "without", tmp_path / "whole")
    rows = [[row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("whole", "without")]
    assert rows[0] == rows[1]
    (_, saved), exported = checkpoint.read_lora(tmp_path / "whole"), load_file(tmp_path / "whole" / LORA).values()
    sizes = [sorted(float(np.abs(x).max()) for x in tensors) for tensors in (exported, jax.tree.leaves(saved))]
    assert sizes[0] == sizes[1]
