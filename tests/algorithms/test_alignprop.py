"""AlignProp: the truncations, the gradient against torch's through diffusers' networks, and whether it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffexp_jax import parallel
from diffexp_jax.algorithms import Batch, Inputs, Policy
from diffexp_jax.algorithms.alignprop import AlignProp, alignprop, live_steps
from diffexp_jax.algorithms.draft import DRaFT
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import init_lora, save_lora
from diffexp_jax.sampling import Context, Network, initial_latents, load_process, step_noise
from diffexp_jax.settings import checked
from tests.support.tiny import nonzero_lora, policy_of

# ----------------------------------------------------------------------------------------------------------- truncation


def draws(truncation, n_steps, n=4000, k=1):
    keys = jax.random.split(jax.random.key(0), n)
    live = np.asarray(jax.jit(jax.vmap(lambda key: live_steps(key, n_steps, truncation=truncation, k=k)))(keys))
    return live, live.sum(1)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_fixed_is_the_last_k(k):
    live, _ = draws("fixed", 5, n=3, k=k)
    np.testing.assert_array_equal(live, np.broadcast_to(np.arange(5) >= 5 - k, (3, 5)))


@pytest.mark.parametrize("truncation", ["uniform", "per_step", "fixed", "none"])
def test_the_mean_of_the_draws(truncation):
    live, _ = draws(truncation, 10, k=3)
    share = AlignProp(truncation=truncation, truncation_k=3).live_share(10)
    assert live.mean() == pytest.approx(share, abs=0.02)  # of 4,000 draws


def test_what_it_costs():
    """Passes of the chain: those that carry gradient are among them; DRaFT-LV takes the last step again."""
    assert AlignProp(truncation="per_step").passes(10, True) == {"to sample": 0.5, "to sample with a gradient": 0.5}
    assert AlignProp(truncation="none").passes(10, True) == {"to sample with a gradient": 1.0}
    assert DRaFT(k=1, lv_samples=2).passes(10, True) == {
        "to sample": 0.9,
        "to sample with a gradient": pytest.approx(0.3),
    }


def test_none_is_all_steps():
    assert draws("none", 5, n=3)[0].all()


def test_uniform_is_the_last_steps_as_many_as_one_draw_says():
    live, count = draws("uniform", 5)
    np.testing.assert_array_equal(live, np.arange(5) >= 5 - count[:, None])
    values, times = np.unique(count, return_counts=True)
    np.testing.assert_array_equal(values, [1, 2, 3, 4, 5])  # never none, and all of them too
    np.testing.assert_allclose(times / 4000, 0.2, atol=0.03)  # 4.7 standard errors


def test_per_step_draws_the_cut_anew_at_every_step():
    """The published code: step i (from 0) of T is cut where i < randint(0, T), both ends included."""
    live, _ = draws("per_step", 4)
    np.testing.assert_allclose(live.mean(0), [1 / 5, 2 / 5, 3 / 5, 4 / 5], atol=0.04)
    covariance = np.cov(live.T)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=0.02)  # independent of each other


# ---------------------------------------------------------------------------------------- the gradient on a tiny model

N_STEPS, COEFFICIENT = 4, 0.01


def recorded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with the last gradient kept in its state, where the test can read it."""

    def init(params):
        return optimizer.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params=None):
        updates, inner = optimizer.update(grads, state[0], params)
        return updates, (inner, grads)

    return optax.GradientTransformation(init, update)


class Tiny:
    """The tiny pipeline with a weighted mean of the pixels as its reward, and its one compiled program."""

    def __init__(self, config, **options):
        self.config, self.experiment, self.traced = config, Experiment.build(checked(config)), 0
        self.model, self.n = self.experiment.sampler.pipeline, config.batch.samples
        self.policy = policy_of(self.model, self.score)
        self.algorithm = alignprop(
            self.policy,
            recorded(optax.adam(1e-2)),
            n_chunks=2,
            loss_coefficient=COEFFICIENT,
            reward_target=None,
            truncation="uniform",
            truncation_k=1,
            **options,
        )
        self.update = parallel.pmap(self.algorithm.update)
        self.model_arrays = parallel.replicate(self.experiment.frozen).model
        lora = init_lora(jax.random.key(0), self.model.params["unet"], rank=2)
        self.lora = nonzero_lora(lora, size=0.3)
        self.state = parallel.replicate(self.algorithm.init(self.lora))
        # keys by the number of live steps that they draw
        self.keys = {}
        for seed in range(40):
            key = jax.random.key(seed)
            self.keys[int(live_steps(key, N_STEPS, truncation="uniform", k=1).sum())] = key
        self.weights = np.random.default_rng(5).standard_normal((16, 16, 3), np.float32)

    def score(self, frozen, images):
        self.traced += 1
        return (images * frozen["weights"]).mean((1, 2, 3))

    def steps(self, w, eta=0.0):
        return parallel.replicate(self.experiment.sampler._replace(guidance=w, eta=eta).steps(explore=False))

    def step(self, state, batch, steps, k, weights):
        frozen = parallel.replicate({"weights": np.broadcast_to(weights, (16, 16, 3)).astype(np.float32)})
        frozen["model"] = self.model_arrays
        return self.update(state, frozen, Inputs(batch, steps, parallel.replicate(self.keys[k])))


@pytest.fixture(scope="module")
def four_samples(make_config):
    return make_config("alignprop", {"eval.every": 0, "batch.samples": 4, "batch.samples_per_forward": 2})


@pytest.fixture(scope="module")
def tiny(four_samples):
    return Tiny(four_samples)


class Reference:
    """The same chain in torch: diffusers' UNet, VAE and DDIMScheduler, the LoRA loaded by diffusers and peft."""

    def __init__(self, torch, folder, lora_file):
        import diffusers

        self.torch = torch
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        self.pipe.load_lora_weights(lora_file)
        self.pipe.set_progress_bar_config(disable=True)
        for name, parameter in [*self.pipe.unet.named_parameters(), *self.pipe.vae.named_parameters()]:
            parameter.requires_grad_("lora_" in name)

    def run(self, x_T, cond, uncond, weights, *, w, n_live, input_gradient=True, noise=None, kl_weight=0.0):
        """(rewards [B], {name: gradient}, images, KL of the paths); network outputs are detached before the last n_live
        steps, inputs where they are to have no gradient. `noise` [T,B,h,w,c] is that of eta = 1.
        """
        torch, unet, vae, scheduler = self.torch, self.pipe.unet, self.pipe.vae, self.pipe.scheduler
        scheduler.set_timesteps(N_STEPS)
        x = torch.tensor(np.asarray(x_T).transpose(0, 3, 1, 2))
        context = torch.tensor(np.concatenate([cond, uncond]))
        unet.zero_grad()

        def guided(x_in, t, live):
            eps, eps_null = unet(torch.cat([x_in, x_in]), t, context).sample.chunk(2)
            eps = w * eps + (1 - w) * eps_null
            return eps if live else eps.detach()

        kl = torch.zeros(())
        for i, t in enumerate(scheduler.timesteps):
            x_in, live = x if input_gradient else x.detach(), i >= N_STEPS - n_live
            z = {} if noise is None else {"variance_noise": torch.tensor(np.asarray(noise[i]).transpose(0, 3, 1, 2))}
            eta = 0.0 if noise is None else 1.0
            tuned = scheduler.step(guided(x_in, t, live), t, x, eta=eta, **z).prev_sample
            if kl_weight:
                self.pipe.disable_lora()
                untuned = scheduler.step(guided(x_in, t, live), t, x, eta=eta, **z).prev_sample
                self.pipe.enable_lora()
                variance = scheduler._get_variance(int(t), int(t) - 1000 // N_STEPS)
                kl = kl + ((tuned - untuned) ** 2 / (2 * variance)).mean()
            x = tuned
        images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        rewards = (images * torch.tensor(weights.transpose(2, 0, 1))).mean((1, 2, 3))
        (kl_weight * kl - COEFFICIENT * rewards.mean()).backward()
        gradients = {n: p.grad.numpy().copy() for n, p in unet.named_parameters() if "lora_" in n}
        return rewards.detach().numpy(), gradients, images.detach().numpy(), float(kl.detach())


@pytest.fixture(scope="module")
def reference(tiny, tiny_model, tmp_path_factory):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    file = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    save_lora(file, tiny.lora, alpha=2.0)  # alpha = rank: not scaled
    return Reference(torch, str(tiny_model), str(file))


def as_torch_names(gradient):
    """{name without the adapter's: gradient}, in torch's axis order."""
    flat = jax.tree_util.tree_leaves_with_path(gradient)
    out = {}
    for path, value in flat:
        *module, leaf = (p.key for p in path)
        out[f"{'.'.join(module)}.lora_{leaf}"] = np.asarray(value).T
    return out


def relative_error(ours, theirs):
    """Of the whole gradient, as one vector."""
    assert ours.keys() == theirs.keys()
    difference = sum(np.square(ours[name] - theirs[name]).sum() for name in ours)
    return np.sqrt(difference / sum(np.square(value).sum() for value in theirs.values()))


_LONG = [pytest.param(n, w, marks=pytest.mark.slow) for n, w in ((1, 0.5), (1, 5.0), (4, 0.5), (4, 5.0))]


@pytest.mark.parametrize("n_live, w", [(2, 5.0), *_LONG])
def test_gradient_is_torchs(tiny, reference, n_live, w):
    batch, steps = tiny.experiment.draw_batch(0, None), tiny.steps(w)
    state, metrics = tiny.step(tiny.state, batch, steps, n_live, tiny.weights)
    ours = as_torch_names(parallel.first(state.opt_state)[1])
    cond, uncond, keys = (x[0] for x in (batch.context.cond.embedding, batch.context.uncond.embedding, batch.key))
    x_T = initial_latents(keys, tiny.model.latent_shape)
    rewards, theirs, images, _ = reference.run(x_T, cond, uncond, tiny.weights, w=w, n_live=n_live)
    theirs = {name.removesuffix(".default_0.weight"): value for name, value in theirs.items()}
    inside = (images > 0) & (images < 1)
    assert inside.mean() > 0.5  # most pixels carry gradient
    assert int(metrics["truncation/k"][0]) == n_live
    assert float(metrics["reward/mean"][0]) == pytest.approx(rewards.mean(), abs=1e-4)
    assert float(metrics["loss"][0]) == pytest.approx(-COEFFICIENT * rewards.mean(), abs=1e-6)
    assert relative_error(ours, theirs) <= 1e-3
    norm = np.sqrt(sum(np.square(value).sum() for value in theirs.values()))
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-3)
    if n_live < N_STEPS:  # the cut is seen: another number of live steps gives another gradient
        _, whole, *_ = reference.run(x_T, cond, uncond, tiny.weights, w=w, n_live=N_STEPS)
        whole = {name.removesuffix(".default_0.weight"): value for name, value in whole.items()}
        assert relative_error(ours, whole) > 0.02


@pytest.mark.slow
def test_gradient_without_the_inputs_is_torchs(four_samples, tiny, reference):
    """DRTune's stop-gradient: the same images and reward, another gradient."""
    detached = Tiny(four_samples, input_gradient=False)
    batch, steps = tiny.experiment.draw_batch(0, None), tiny.steps(5.0)
    state, metrics = detached.step(detached.state, batch, steps, N_STEPS, tiny.weights)
    ours = as_torch_names(parallel.first(state.opt_state)[1])
    cond, uncond, keys = (x[0] for x in (batch.context.cond.embedding, batch.context.uncond.embedding, batch.key))
    chain = (initial_latents(keys, tiny.model.latent_shape), cond, uncond, tiny.weights)
    rewards, theirs, *_ = reference.run(*chain, w=5.0, n_live=N_STEPS, input_gradient=False)
    _, whole, *_ = reference.run(*chain, w=5.0, n_live=N_STEPS)
    theirs, whole = ({k.removesuffix(".default_0.weight"): x for k, x in g.items()} for g in (theirs, whole))
    assert float(metrics["reward/mean"][0]) == pytest.approx(rewards.mean(), abs=1e-4)
    assert relative_error(ours, theirs) <= 1e-3
    assert relative_error(ours, whole) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("n_live, coefficient", [(4, 1e-3), (2, 1e-3), (2, 1.0)])
def test_gradient_with_the_kl_of_the_paths_is_torchs(four_samples, tiny, reference, n_live, coefficient):
    """A chain with noise; the untuned model is the same one with its LoRA off, evaluated at the tuned one's x_t."""
    held = Tiny(four_samples, kl_weight=coefficient)
    batch, steps = tiny.experiment.draw_batch(0, None), tiny.steps(5.0, eta=1.0)
    state, metrics = held.step(held.state, batch, steps, n_live, tiny.weights)
    ours = as_torch_names(parallel.first(state.opt_state)[1])
    cond, uncond, keys = (x[0] for x in (batch.context.cond.embedding, batch.context.uncond.embedding, batch.key))
    shape = tiny.model.latent_shape
    chain = initial_latents(keys, shape), cond, uncond, tiny.weights
    options = {"w": 5.0, "n_live": n_live, "noise": [step_noise(keys, jnp.int32(i), shape) for i in range(N_STEPS)]}
    rewards, theirs, _, kl = reference.run(*chain, **options, kl_weight=coefficient)
    _, without, *_ = reference.run(*chain, **options)
    theirs, without = ({k.removesuffix(".default_0.weight"): x for k, x in g.items()} for g in (theirs, without))
    assert float(metrics["kl/path"][0]) == pytest.approx(kl, rel=1e-3)
    assert float(metrics["loss"][0]) == pytest.approx(coefficient * kl - COEFFICIENT * rewards.mean(), rel=1e-3)
    assert relative_error(ours, theirs) <= 1e-3 and relative_error(ours, without) > 0.02


def test_one_program_serves_every_truncation(tiny, compiles):
    batch, steps = tiny.experiment.draw_batch(0, None), tiny.steps(5.0)
    tiny.step(tiny.state, batch, steps, 1, tiny.weights)  # compiled now at the latest
    compiled, traced = compiles.count, tiny.traced
    for k in range(1, N_STEPS + 1):
        _, metrics = tiny.step(tiny.state, batch, steps, k, tiny.weights)
        assert np.asarray(metrics["truncation/k"]) == [k]
    assert (compiles.count, tiny.traced) == (compiled, traced)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_learns_brightness(tiny, sign):
    """The reward sign x brightness rises."""
    state, steps, rewards = tiny.state, tiny.steps(3.0), []
    for it in range(10):
        batch = tiny.experiment.draw_batch(1000 if it in (0, 9) else it, None)
        state, metrics = tiny.step(state, batch, steps, 1 + it % 2, sign)
        rewards.append(float(metrics["reward/mean"][0]))
    assert rewards[-1] > rewards[0] + 0.015  # the first and the last batch have the same prompts and noise


@pytest.mark.parametrize("target, loss", [(None, -0.3), (10.0, 9.7), (0.1, 0.2)])
def test_loss_literal(target, loss):
    """coefficient x mean |target - r|, or x mean(-r) without a target; r = 0.3 whatever the picture."""
    process = load_process({"beta_schedule": "scaled_linear"})
    policy = Policy(
        network=Network(lambda frozen, lora, x_t, step, context: lora * x_t),
        decode=lambda frozen, x_0: x_0,
        score=lambda frozen, images, tokens: (0.3 + 0.0 * images.mean((1, 2, 3)), {}),
        latent_shape=(2, 2, 3),
        process=process,
    )
    kwargs = dict(n_chunks=1, loss_coefficient=0.5, reward_target=target, truncation="fixed", truncation_k=1)
    algorithm = alignprop(policy, optax.sgd(1.0), **kwargs)
    steps = process.make_steps(np.array([1]), np.ones(1, np.float32), eta=0.0)
    cond = np.zeros((2, 1, 1), np.float32)
    batch = Batch(np.zeros(2, np.int32), Context(cond, cond), None, parallel.sample_keys(jax.random.key(0), 2))
    state = algorithm.init(jnp.float32(0.5))
    args = (state, {}, Inputs(batch, steps, jax.random.key(0)))
    _, metrics = parallel.pmap(algorithm.update)(*parallel.replicate(args))
    assert float(metrics["loss"][0]) == pytest.approx(0.5 * loss, rel=1e-5)
