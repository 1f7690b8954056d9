"""DDIM's equations and what all processes share: literal values, and diffusers' DDIMScheduler."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from diffexp_jax.pipelines import families
from diffexp_jax.sampling import SETTINGS, classifier_free_guidance, ddim, gaussian_log_prob, load_process, sample_noise
from diffexp_jax.sampling.ddim import Steps
from tests.support.arrays import normal

SD15 = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LINEAR_OFFSET_0 = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
}
SD15_V = SD15 | {"prediction_type": "v_prediction"}
ZERO_SNR = SD15_V | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "set_alpha_to_one": True}
SCHEDULES = {"sd15": SD15, "linear": LINEAR_OFFSET_0, "v": SD15_V, "zero_snr": ZERO_SNR}


def make_steps(config, n, eta, w=1.0):
    schedule = ddim.noise_schedule(config)
    t = ddim.timesteps(schedule, n)
    return ddim.make_steps(schedule, t, np.full(n, w, np.float32), eta=eta)


def row(steps, i) -> Steps:
    return jax.tree.map(lambda column: np.asarray(column)[i], steps)


# ---- noise tables and steps


@pytest.mark.parametrize(
    "t, alpha_bar_t, alpha_bar_prev, std",
    [
        (981, 0.0057755001, 0.0072817271, 0.45446327),
        (501, 0.27499907, 0.30229566, 0.29478454),
        (21, 0.98038075, 0.99829603, 0.039479546),
        (1, 0.99829603, 0.99915000, 0.020648320),
    ],
)
def test_literal_rows(t, alpha_bar_t, alpha_bar_prev, std):
    schedule = ddim.noise_schedule(SD15)
    assert schedule.alpha_bar.dtype == np.float64
    assert schedule.alpha_bar[t] == pytest.approx(alpha_bar_t, rel=2e-8)
    assert schedule.final_alpha_bar == schedule.alpha_bar[0] == pytest.approx(0.99915)
    steps = make_steps(SD15, 50, eta=1.0)
    step = row(steps, 50 - 1 - t // 20)
    assert step.t == t and all(column.dtype == jnp.float32 for column in step[1:])
    expected = [alpha_bar_t, alpha_bar_prev, std, 1.0, 0.02]
    np.testing.assert_allclose(step[1:], expected, rtol=1.5e-7)  # float32's own error


def test_literal_timesteps():
    schedule = ddim.noise_schedule(SD15)
    assert ddim.timesteps(schedule, 50).tolist() == list(range(981, 0, -20))
    assert ddim.timesteps(schedule, 3).tolist() == [667, 334, 1]
    assert ddim.timesteps(ddim.noise_schedule(ZERO_SNR), 4).tolist() == [999, 749, 499, 249]


def test_sigma_is_proportional_to_eta():
    full = make_steps(SD15, 10, eta=1.0).sigma_t
    np.testing.assert_allclose(make_steps(SD15, 10, eta=0.3).sigma_t, 0.3 * full, rtol=1e-6)
    np.testing.assert_array_equal(make_steps(SD15, 10, eta=0.0).sigma_t, 0.0)


def test_guidance_is_a_column():
    schedule, w = ddim.noise_schedule(SD15), jnp.array([1.0, 5.0, 7.5])
    steps = ddim.make_steps(schedule, ddim.timesteps(schedule, 3), w, eta=0.0)
    np.testing.assert_array_equal(steps.w_t, w)
    assert {column.shape for column in steps} == {(3,)}


def test_offset_0_has_no_noise_at_the_last_step():
    """Why `steps_offset: 1` matters to DDPO: without it the last log-prob does not exist."""
    steps = make_steps(SD15 | {"steps_offset": 0}, 10, eta=1.0)
    assert steps.t[-1] == 0 and steps.sigma_t[-1] == 0.0 and jnp.all(steps.sigma_t[:-1] > 0)
    assert jnp.all(jnp.isfinite(ddim.ddim_step(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)), row(steps, -1))[0]))


def test_trained_betas():
    schedule = ddim.noise_schedule({"trained_betas": [0.1, 0.2, 0.5], "num_train_timesteps": 1000})
    np.testing.assert_allclose(schedule.alpha_bar, [0.9, 0.72, 0.36], rtol=1e-12)


@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_schedule", "cosine"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "karras"),
        ("_class_name", "EDMEulerScheduler"),
        ("_class_name", "LCMScheduler"),
    ],
)
def test_unknown_settings_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}='{value}'; accepted: ") as error:
        load_process(SD15 | {key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding", "use_flow_sigmas"])
def test_what_would_change_every_step_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}=true is not supported"):
        ddim.noise_schedule(SD15 | {key: True})


def test_zero_snr_wants_v_prediction():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=true wants prediction_type='v_prediction'"):
        ddim.noise_schedule(ZERO_SNR | {"prediction_type": "epsilon"})


def test_sdxl_base_is_read_as_ddim():
    """The published scheduler_config.json: another sampler's, with settings that only that sampler has."""
    euler = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": True}
    euler |= {"clip_sample": False, "sample_max_value": 1.0, "skip_prk_steps": True, "trained_betas": None}
    euler |= {"prediction_type": "epsilon", "timestep_spacing": "leading", "num_train_timesteps": 1000}
    ours, sd15 = ddim.noise_schedule(SD15 | euler), ddim.noise_schedule(SD15)
    np.testing.assert_array_equal(ours.alpha_bar, sd15.alpha_bar)
    assert ours._replace(alpha_bar=0) == sd15._replace(alpha_bar=0)


@pytest.mark.parametrize("n_steps", [0, -1, 1001])
@pytest.mark.parametrize("config", [SD15, ZERO_SNR], ids=["leading", "trailing"])
def test_impossible_numbers_of_steps_are_refused(config, n_steps):
    with pytest.raises(ValueError, match=f"{n_steps}.*1000"):
        ddim.timesteps(ddim.noise_schedule(config), n_steps)


# ---- diffusers


def scheduler(config, n):
    """diffusers' DDIM with its tables in float64, from its own betas."""
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**config, clip_sample=False)
    theirs.set_timesteps(n)
    float32 = theirs.alphas_cumprod
    theirs.alphas_cumprod = torch.cumprod(1.0 - theirs.betas.double(), 0)
    theirs.final_alpha_cumprod = torch.tensor(1.0) if config.get("set_alpha_to_one", True) else theirs.alphas_cumprod[0]
    np.testing.assert_allclose(theirs.alphas_cumprod, float32, rtol=2e-4, atol=1e-9)
    return theirs


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 27, 50, 64, 93, 300, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_diffusers(n, spacing, offset):
    config = SD15 | {"timestep_spacing": spacing, "steps_offset": offset}
    ours, theirs = (
        ddim.timesteps(ddim.noise_schedule(config), n),
        scheduler(config, n).timesteps.numpy(),
    )
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "KDPM2" in name else [])  # diffusers takes seconds to make them
        for name in ddim.SCHEDULERS
        if "SDE" not in name  # which wants torchsde
    ],
)
def test_files_of_other_schedulers_are_read_as_diffusers(name, family):
    """By DDIMScheduler.from_config in its pipeline, which corrects it: spacings, offsets, keys that a class has not."""
    pytest.importorskip("torch")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()  # of what the pipelines correct
    own = inspect.signature(getattr(diffusers, name)).parameters
    grid = [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"timestep_spacing": "linspace", "prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": False},
        {"timestep_spacing": "leading", "steps_offset": 3, "num_train_timesteps": 500},
        {"trained_betas": [0.01 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    ]
    for changes in grid:
        saved = getattr(diffusers, name)(**{k: v for k, v in changes.items() if k in own}).to_json_string()
        content = json.loads(saved) | {"clip_sample": False}
        theirs = diffusers.DDIMScheduler.from_config(content)
        parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": None, "scheduler": theirs}
        parts |= {"text_encoder_2": None, "tokenizer_2": None} if "XL" in family else {}
        parts |= {} if "XL" in family else {"safety_checker": None, "feature_extractor": None}
        theirs = getattr(diffusers, family)(**parts).scheduler
        theirs.set_timesteps(10)
        ours = load_process(content, old_configs=families.FAMILIES[family].old_configs)
        t = ours.timesteps(10)
        np.testing.assert_array_equal(t, theirs.timesteps.numpy(), err_msg=str(changes))
        steps = ours.make_steps(t, np.ones(10, np.float32), eta=1.0)
        previous = t - theirs.config.num_train_timesteps // 10
        alphas, last = theirs.alphas_cumprod.numpy(), float(theirs.final_alpha_cumprod)
        before = np.where(previous >= 0, alphas[previous.clip(0)], last)
        np.testing.assert_allclose(steps.alpha_bar_t, alphas[t], rtol=2e-4, atol=1e-7)
        np.testing.assert_allclose(steps.alpha_bar_prev, before, rtol=2e-4)
        sigma = [float(theirs._get_variance(int(i), int(j))) ** 0.5 for i, j in zip(t, previous, strict=True)]
        np.testing.assert_allclose(steps.sigma_t, sigma, atol=2e-3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_clipping_is_corrected_or_refused(name):
    """Their classes' default clips x_0; diffusers' StableDiffusionPipeline sets it to false, its SDXL pipeline not."""
    for config in (SD15 | {"_class_name": name}, SD15 | {"_class_name": name, "clip_sample": True}):
        load_process(config, old_configs=True)
        load_process(config, {"clip_sample": False})
        if name in ddim.CLIPPING or "clip_sample" in config:
            with pytest.raises(ValueError, match="clip_sample=true is not supported; accepted: false"):
                load_process(config)


def test_old_configs_get_an_offset_of_1():
    old = SD15 | {"_class_name": "PNDMScheduler", "steps_offset": 0}
    assert load_process(old).timesteps(4).tolist() == [750, 500, 250, 0]
    assert load_process(old, old_configs=True).timesteps(4).tolist() == [751, 501, 251, 1]
    assert load_process(old, {"steps_offset": 0}, old_configs=True).timesteps(4).tolist() == [750, 500, 250, 0]
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert load_process(flow, old_configs=True).timesteps(4)[0] == 1000.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_advice_about_steps_without_noise_leads_out(name, spacing):
    """What a method that needs noise at every step says to set (experiment.py) gives some, for any number of steps."""
    config = SCHEDULES[name] | {"timestep_spacing": spacing, "set_alpha_to_one": True}
    assert not np.all(load_process(config).make_steps(np.array([1, 0]), np.ones(2), eta=1.0).sigma_t > 0)
    process = load_process(config, {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False})
    for n in (1, 2, 3, 7, 50, 99, 333, 500, 501, 999, 1000):
        assert np.all(process.make_steps(process.timesteps(n), np.ones(n), eta=1.0).sigma_t > 0), n


def test_noise_by_steps():
    """eta may be of each step; DDIM knows one rule, and no eta of more than 1."""
    process = load_process(SD15)
    t = process.timesteps(4)
    some, all_of_them = (
        process.make_steps(t, np.ones(4), eta=eta).sigma_t for eta in (np.array([0, 0.5, 0.5, 0]), 0.5)
    )
    assert some.tolist() == [0.0, *all_of_them[1:3].tolist(), 0.0]
    np.testing.assert_allclose(process.make_steps(t, np.ones(4), eta=0.0).dt, 0.25)
    with pytest.raises(ValueError, match="^eta=1.5: the model's steps are DDIM's, wants 0..1"):
        process.make_steps(t, np.ones(4), eta=1.5)
    with pytest.raises(ValueError, match="sampling.noise='cps': is for models of flow matching"):
        process.make_steps(t, np.ones(4), eta=1.0, noise="cps")


def test_noise_levels_at_equal_signal_to_noise():
    """SD's timesteps as levels of flow matching, where 1 - s and s are the parts of image and noise."""
    found = load_process(SD15).noise_level(np.array([950, 900, 800, 700, 500]))
    np.testing.assert_allclose(found, [0.916, 0.893, 0.836, 0.769, 0.618], atol=1e-3)
    flow = load_process({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    np.testing.assert_allclose(flow.noise_level(np.array([900.0, 0.0])), [0.9, 0.0])


def test_the_settings_are_those_of_the_config():
    """An error of one of them says how to override the file."""
    assert set(base.default().model.scheduler) == set(SETTINGS)
    with pytest.raises(ValueError, match="timestep_spacing='odd'; .*; model.scheduler.timestep_spacing overrides the"):
        load_process(SD15 | {"timestep_spacing": "odd"})


def test_overrides_that_a_process_has_not():
    with pytest.raises(ValueError, match="^model.scheduler.shift: the model's DDIMScheduler has no such setting"):
        load_process(SD15, {"shift": 3.0})
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(ValueError, match="^model.scheduler.steps_offset: the model's FlowMatchEuler"):
        load_process(flow, {"steps_offset": 1})
    assert load_process(flow, {"shift": 3.0}).timesteps(3)[1] < 1000.0


@pytest.mark.parametrize(
    "betas",
    [[0.5, 1.0, 0.5], [0.5, 1.0], [1e-20, 1e-20], [0.5], [0.9] * 400, [0.5, float("nan")], [0.5, "0.5"], [-0.5, 0.5]],
)
def test_betas_that_cannot_be(betas):
    with pytest.raises(ValueError, match="^scheduler_config.json: (alpha_bar goes from|trained_betas=)"):
        ddim.noise_schedule({"trained_betas": betas})


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_is_diffusers(name):
    ours, theirs = ddim.noise_schedule(SCHEDULES[name]), scheduler(SCHEDULES[name], 10)
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-12)
    assert ours.final_alpha_bar == pytest.approx(float(theirs.final_alpha_cumprod), rel=1e-6)
    assert (ours.alpha_bar[-1] == 0.0) == (name == "zero_snr")


def test_pure_noise_step_at_eta_1():
    """From alpha_bar 0 the direction is sqrt(1 - a_prev - sigma^2) = 0; rounded, diffusers' is NaN."""
    runs = [make_steps(ZERO_SNR, n, eta=1.0) for n in range(2, 40)]
    steps = jax.tree.map(lambda *columns: jnp.array([np.asarray(column)[0] for column in columns]), *runs)
    assert np.all(steps.alpha_bar_t == 0) and np.all(steps.sigma_t > 0.1)
    x_t, v = normal(0, 1, 2, 2, 3), normal(1, 1, 2, 2, 3)
    mean, _ = jax.vmap(lambda step: ddim.ddim_step(x_t, v, step, "v_prediction"))(steps)
    np.testing.assert_allclose(mean, -jnp.sqrt(steps.alpha_bar_prev)[:, None, None, None, None] * v, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_diffusers(name, eta):
    """Mean and std of each step on its own, and the whole chain of which they are made."""
    torch = pytest.importorskip("torch")
    config, n, shape = SCHEDULES[name], 12, (2, 3, 4, 2)
    eta = min(eta, 0.9) if name == "zero_snr" else eta  # see above
    peer, steps = scheduler(config, n), make_steps(config, n, eta)
    prediction_type = ddim.noise_schedule(config).prediction_type
    ours = theirs = normal(0, *shape)
    for i, t in enumerate(peer.timesteps):
        out, noise, step = normal(1 + i, *shape), normal(100 + i, *shape), row(steps, i)
        assert int(step.t) == int(t)

        def their_step(x, variance_noise, out=out, t=t):
            x, out, variance_noise = (torch.from_numpy(np.array(a, np.float64)) for a in (x, out, variance_noise))
            return peer.step(out, t, x, eta=eta, variance_noise=variance_noise).prev_sample.numpy()

        mean, std = ddim.ddim_step(theirs, out, step, prediction_type)
        want = their_step(theirs, np.zeros(shape))
        np.testing.assert_allclose(mean, want, rtol=0, atol=3e-5 * np.abs(want).max())
        np.testing.assert_allclose(std, (their_step(theirs, np.ones(shape)) - want).mean(), rtol=1e-4, atol=1e-7)

        mean, std = ddim.ddim_step(ours, out, step, prediction_type)
        ours, theirs = mean + std * noise, jnp.asarray(their_step(theirs, noise), jnp.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_add_noise_is_diffusers():
    torch = pytest.importorskip("torch")
    x_0, eps, t = normal(0, 3, 2, 2, 4), normal(1, 3, 2, 2, 4), np.array([0, 500, 999])
    want = scheduler(SD15, 50).add_noise(*map(torch.from_numpy, (np.array(x_0), np.array(eps), t))).numpy()
    ours = ddim.add_noise(x_0, eps, jnp.asarray(ddim.noise_schedule(SD15).alpha_bar[t], jnp.float32))
    np.testing.assert_allclose(ours, want, atol=1e-5)


# ---- the equations


def test_add_noise_literal():
    x_0, eps = jnp.full((2, 1, 1, 1), 2.0), jnp.full((2, 1, 1, 1), -1.0)
    np.testing.assert_allclose(ddim.add_noise(x_0, eps, jnp.array([0.64, 1.0])).ravel(), [1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("w, expected", [(0.0, 1.0), (1.0, 2.0), (7.5, 8.5), (0.5, 1.5), (-1.0, 0.0)])
def test_classifier_free_guidance_literal(w, expected):
    cond, uncond = jnp.full((1, 1, 1, 2), 2.0), jnp.ones((1, 1, 1, 2))
    np.testing.assert_allclose(classifier_free_guidance(cond, uncond, jnp.float32(w)), expected, rtol=1e-6)


@pytest.mark.parametrize("w, picked", [(0.0, 1), (1.0, 0)])
def test_guidance_0_and_1_are_one_half_bit_for_bit(w, picked):
    halves = normal(0, 2, 3, 3, 4), normal(1, 2, 3, 3, 4)
    np.testing.assert_array_equal(classifier_free_guidance(*halves, jnp.float32(w)), halves[picked])


def test_ddim_step_literal():
    """alpha_bar 0.36 -> 0.64, sigma 0.36: x_0 = (1 - 0.8 * 0.5) / 0.6 = 1, sqrt(0.36 - 0.1296) = 0.48."""
    step = Steps(jnp.int32(1), *map(jnp.float32, (0.36, 0.64, 0.36, 1.0, 0.25)))
    x_t, out = jnp.ones((1, 1, 1, 1)), jnp.full((1, 1, 1, 1), 0.5)
    mean, std = ddim.ddim_step(x_t, out, step)
    assert float(mean[0, 0, 0, 0]) == pytest.approx(0.8 + 0.48 * 0.5, rel=1e-6) and float(std) == pytest.approx(0.36)


@pytest.mark.parametrize("prediction_type", ddim.PREDICTION_TYPES)
def test_predictions_invert_the_forward_process(prediction_type):
    x_0, eps, a = normal(0, 2, 2, 2, 3), normal(1, 2, 2, 2, 3), jnp.float32(0.3)
    x_t = ddim.add_noise(x_0, eps, jnp.full(2, a))
    out = eps if prediction_type == "epsilon" else jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_0
    for ours, want in zip(ddim.predictions(out, x_t, a, prediction_type), (x_0, eps), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5)])
def test_gaussian_log_prob_literal(shape):
    """-(0.5)^2 / (2 * 0.25) - log 0.5 - log(2 pi) / 2; the mean over pixels, so any size gives the same."""
    log_prob = gaussian_log_prob(jnp.ones(shape), jnp.full(shape, 0.5), jnp.float32(0.5))
    np.testing.assert_allclose(log_prob, np.full(shape[0], -0.7257913526), rtol=1e-6)


def test_gaussian_log_prob_is_per_sample():
    x = jnp.array([0.0, 1.0])[:, None, None, None] * jnp.ones((2, 2, 2, 1))
    log_prob = gaussian_log_prob(x, jnp.zeros_like(x), jnp.float32(1.0))
    np.testing.assert_allclose(log_prob, [-0.9189385332, -1.4189385332], rtol=1e-6)


def test_gaussian_log_prob_gradient():
    """d / d mean = (x - mean) / std^2 / number of pixels."""
    x, mean = normal(0, 1, 2, 2, 3), normal(1, 1, 2, 2, 3)
    grad = jax.grad(lambda m: gaussian_log_prob(x, m, jnp.float32(0.3)).sum())(mean)
    np.testing.assert_allclose(grad, (x - mean) / 0.09 / 12, rtol=1e-5)


@pytest.mark.parametrize("alpha_bar, expected", [(0.5, 1.0), (5 / 6, 1.0), (0.9, 5 / 9), (0.99, 5 / 99), (0.001, 1.0)])
def test_min_snr_weight_literal(alpha_bar, expected):
    np.testing.assert_allclose(ddim.min_snr_weight(jnp.array([alpha_bar])), [expected], rtol=1e-5)
    np.testing.assert_allclose(ddim.min_snr_weight(jnp.array([0.9]), gamma=3.0), [1 / 3], rtol=1e-5)  # SNR 9


def test_sample_noise_is_per_key_and_normal():
    keys = jax.random.split(jax.random.key(0), 50)
    sample = jax.jit(lambda keys: sample_noise(keys, (8, 8, 4)))
    noise = sample(keys)
    np.testing.assert_array_equal(noise, sample(keys[::-1])[::-1])
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert np.abs(np.corrcoef(noise.reshape(50, -1)) - np.eye(50)).max() < 0.3


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_what_is_not_honoured_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}=true is not supported"):
        ddim.noise_schedule(SD15 | {key: True})
    ddim.noise_schedule(SD15 | {key: False})


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("prediction_type", ddim.PREDICTION_TYPES)
def test_what_the_network_is_trained_on_is_diffusers(prediction_type):
    """x_t and the target at several timesteps, one a sample; and x_0 and eps come back out of the target."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = diffusers.DDPMScheduler(**config)
    process = load_process(config | {"prediction_type": prediction_type, "set_alpha_to_one": False, "steps_offset": 1})
    rng, t = np.random.default_rng(0), np.array([0, 20, 501, 999])
    x_0, eps = (rng.standard_normal((4, 2, 3, 4)).astype(np.float32) for _ in range(2))
    row = process.training_row(t)
    assert row.t.tolist() == t.tolist() and process.n_train == 1000 and row.w_t.tolist() == [1.0] * 4
    args = torch.from_numpy(x_0), torch.from_numpy(eps), torch.from_numpy(t)
    x_t, target = process.add_noise(x_0, eps, row), process.target(x_0, eps, row)
    np.testing.assert_allclose(x_t, theirs.add_noise(*args).numpy(), atol=1e-5)
    want = eps if prediction_type == "epsilon" else theirs.get_velocity(*args).numpy()
    np.testing.assert_allclose(target, want, atol=1e-5)
    for i, a in enumerate(row.alpha_bar_t):
        back = ddim.predictions(target[i : i + 1], x_t[i : i + 1], a, prediction_type)
        np.testing.assert_allclose(back[1][0], eps[i], atol=1e-4)
        np.testing.assert_allclose(back[0][0], x_0[i], atol=1e-3)


def test_a_target_literal():
    """v = sqrt(a) eps - sqrt(1 - a) x_0 at a = 0.36; a row of a run's steps does as well."""
    row = ddim.TrainingRow(jnp.int32(5), jnp.float32(0.36), jnp.float32(1.0))
    x_0, eps = np.full((1, 1, 1, 1), 2.0, np.float32), np.full((1, 1, 1, 1), 3.0, np.float32)
    assert float(ddim.target(x_0, eps, row, "v_prediction")[0, 0, 0, 0]) == pytest.approx(0.6 * 3 - 0.8 * 2)
    assert ddim.target(x_0, eps, row) is eps
