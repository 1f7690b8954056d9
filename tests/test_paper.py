"""The settings of the paper's experiments: which run is in which figure, each with its baseline and its miniature."""

import pytest
from flax.traverse_util import flatten_dict

from configs import alignprop, base, ddpo, paper
from diffexp_jax.exploration import exploring_iterations
from diffexp_jax.prompts import PROMPTS
from diffexp_jax.settings import checked, parsed

NAMES = """
fig1 fig4_ddpo_aesthetic fig4_ddpo_pickscore fig4_alignprop_aesthetic fig4_alignprop_pickscore
fig5_ddpo_aesthetic fig5_ddpo_pickscore fig5_alignprop_aesthetic fig5_alignprop_pickscore
fig6_ddpo_aesthetic fig6_ddpo_pickscore fig6_alignprop_aesthetic fig6_alignprop_pickscore
fig7_ddpo_aesthetic fig7_ddpo_pickscore fig7_alignprop_aesthetic fig7_alignprop_pickscore fig8
fig9a_aesthetic_none fig9a_aesthetic_weighting fig9a_aesthetic_schedule fig9a_aesthetic_both
fig9a_pickscore_none fig9a_pickscore_weighting fig9a_pickscore_schedule fig9a_pickscore_both
fig9b_aesthetic_t900 fig9b_aesthetic_t800 fig9b_aesthetic_t700 fig9b_aesthetic_t600
fig9b_pickscore_t900 fig9b_pickscore_t800 fig9b_pickscore_t700 fig9b_pickscore_t600
fig10a fig10b fig17a fig17b
""".split()
DRAWBENCH = "prompts/DrawBench.csv:Category=Conflicting|Gary Marcus et al.|Reddit"
PARTI = "prompts/PartiPrompts.tsv:Challenge=Imagination"
DOLPHIN = "a dolphin riding a bike"
ACTIVITIES = ("animal_activities", ("unseen_activities",))
WITH_ARTICLE = ("animals_with_article", ("animals_unseen_with_article",))
HPSV2, AESTHETIC, PICKSCORE = (f"{name}:weights/{name}" for name in ("hpsv2", "aesthetic", "pickscore"))


def test_the_papers_figures():
    assert list(paper.EXPERIMENTS) == NAMES


@pytest.mark.parametrize("model", ["", ",model=emoji"])
@pytest.mark.parametrize("name", NAMES)
def test_the_papers_configs(name, model):
    """Every one can run, explores, and its baseline differs in nothing else."""
    config, plain = paper.get_config(name + model), paper.get_config(f"{name},explore=false{model}")
    checked(config)
    checked(plain)
    assert flatten_dict(config.to_dict()).keys() == flatten_dict(base.default().to_dict()).keys()
    images = 32 if model and config.algorithm == "alignprop" else 64
    assert config.batch.samples == images and config.exploration.fraction == 0.75
    assert config.exploration.enabled == (not name.endswith("_none")) and not plain.exploration.enabled
    plain.exploration.enabled = config.exploration.enabled
    assert plain.to_dict() == config.to_dict()
    for spec in (config.prompts, *config.eval.prompts):
        assert spec in (*PROMPTS, DOLPHIN, DRAWBENCH, PARTI)


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_numbers(name):
    config = paper.get_config(name)
    xl, sd15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    path = xl if name in ("fig10b", "fig17b") else sd15
    lr, guidance, eta = {"ddpo": (3e-4, 5.0, 1.0), "alignprop": (1e-3, 7.5, 0.0)}[config.algorithm]
    s = config.sampling
    assert (config.model.path, s.steps, s.guidance, s.eta) == (path, 50, guidance, eta)
    assert (config.optim.lr, config.ddpo.clip, config.lora.rank) == (lr, 1e-4, 4)
    assert config.eval.rewards == ("imagereward:weights/imagereward",)  # held out, but for fig1


@pytest.mark.parametrize("name", NAMES)
def test_the_miniatures_numbers(name):
    """The emoji model's own: what is set for a figure is its rewards, prompts and exploration."""
    config = paper.get_config(f"{name},model=emoji")
    usual = {"ddpo": ddpo, "alignprop": alignprop}[config.algorithm].get_config("model=emoji")
    usual.update(reward=config.reward, prompts=config.prompts, exploration=config.exploration.to_dict())
    usual.eval.prompts = config.eval.prompts
    if name == "fig1":
        usual.ddpo.stats_buffer = usual.eval.samples_per_prompt = 64
    usual.alignprop.input_gradient = True  # as published
    if (config.algorithm, config.reward) == ("alignprop", "emoji_aesthetic"):  # which a larger rate over-optimises
        usual.optim.lr, usual.iterations = 2.5e-3, 36
    assert usual.to_dict() == config.to_dict()
    assert config.model.path == "emoji" and config.eval.rewards == ("emoji_judge",)


@pytest.mark.parametrize(
    "name, algorithm, reward, prompts, unseen",
    [
        ("fig1", "ddpo", "imagereward:weights/imagereward", DOLPHIN, ()),
        ("fig4_ddpo_aesthetic", "ddpo", AESTHETIC, "animals", ("animals_unseen",)),
        ("fig4_ddpo_pickscore", "ddpo", PICKSCORE, *ACTIVITIES),
        ("fig4_alignprop_aesthetic", "alignprop", AESTHETIC, "animals", ("animals_unseen",)),
        ("fig4_alignprop_pickscore", "alignprop", PICKSCORE, *ACTIVITIES),
        ("fig8", "alignprop", f"{HPSV2}+{AESTHETIC}+{PICKSCORE}", DRAWBENCH, (PARTI,)),
        ("fig10b", "alignprop", AESTHETIC, "animals", ("animals_unseen",)),
        ("fig1,model=emoji", "ddpo", "emoji_judge", DOLPHIN, ()),
        ("fig4_ddpo_aesthetic,model=emoji", "ddpo", "emoji_aesthetic", *WITH_ARTICLE),
        ("fig4_ddpo_pickscore,model=emoji", "ddpo", "emoji_pickscore", *ACTIVITIES),
        ("fig4_alignprop_aesthetic,model=emoji", "alignprop", "emoji_aesthetic", *WITH_ARTICLE),
        ("fig8,model=emoji", "alignprop", "emoji_aesthetic+emoji_pickscore", *ACTIVITIES),
        ("fig10b,model=emoji", "alignprop", "emoji_aesthetic", *WITH_ARTICLE),
    ],
)  # fmt: skip
def test_what_the_figures_are_of(name, algorithm, reward, prompts, unseen):
    config = paper.get_config(name)
    assert (config.algorithm, config.reward, config.prompts) == (algorithm, reward, prompts)
    assert config.eval.prompts == (prompts, *unseen)


@pytest.mark.parametrize("reward", ["aesthetic", "pickscore"])
@pytest.mark.parametrize(
    "arm, enabled, t_thresh, weight_range",
    [
        ("fig9a_{}_none", False, 900, (1.0, 1.5)),
        ("fig9a_{}_weighting", True, 1000, (1.0, 1.5)),
        ("fig9a_{}_schedule", True, 900, (1.0, 1.0)),
        ("fig9a_{}_both", True, 900, (1.0, 1.5)),
        ("fig9b_{}_t900", True, 900, (1.0, 1.5)),
        ("fig9b_{}_t800", True, 800, (1.0, 1.5)),
        ("fig9b_{}_t700", True, 700, (1.0, 1.5)),
        ("fig9b_{}_t600", True, 600, (1.0, 1.5)),
    ],
)
def test_the_arms_of_figure_9(reward, arm, enabled, t_thresh, weight_range):
    """They are Fig. 4's runs but for exploration."""
    config, whole = paper.get_config(arm.format(reward)), paper.get_config(f"fig4_alignprop_{reward}")
    e = config.exploration
    assert (e.enabled, e.t_thresh, e.weight_range, e.w_low) == (enabled, t_thresh, weight_range, 1.0)
    config.exploration = whole.exploration
    assert config.to_dict() == whole.to_dict()


@pytest.mark.parametrize("model", ["", ",model=emoji"])
@pytest.mark.parametrize(
    "names",
    [
        *([f"fig{n}_ddpo_{reward}" for n in (4, 5, 6, 7)] for reward in ("aesthetic", "pickscore")),
        *([f"fig{n}_alignprop_{reward}" for n in (4, 5, 6, 7)] for reward in ("aesthetic", "pickscore")),
        ["fig8", "fig10a", "fig17a"],
        ["fig10b", "fig17b"],
        ["fig4_alignprop_aesthetic", "fig9a_aesthetic_both", "fig9b_aesthetic_t900"],
        ["fig4_alignprop_pickscore,explore=false", "fig9a_pickscore_none"],
    ],
)
def test_runs_that_figures_share(names, model):
    first, *others = (paper.get_config(name + model).to_dict() for name in names)
    assert others == [first] * len(others)


def test_figure_3_is_one_command():
    with pytest.raises(ValueError) as error:
        paper.get_config("fig3,model=emoji")
    command = 'python scripts/sample.py --model emoji --prompt "a dolphin riding a bike" --steps 20'
    assert str(error.value) == (
        f"fig3 trains nothing; it is {command} --guidance 5 --w_low 1 --t_thresh 900 --samplers --out samples/fig3"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if paper.EXPERIMENTS[name][2] == "aesthetic"])
def test_aesthetic_curves_are_of_many_images(name):
    """16 of each of the six unseen animals, 3 of the 45; the miniature has seeds instead."""
    config = paper.get_config(name)
    evaluation = parsed(config).eval
    assert [evaluation.samples_of_each(len(PROMPTS[x])) for x in evaluation.prompts] == [3, 16]
    assert paper.get_config(f"{name},model=emoji").eval.samples_per_set == 1


@pytest.mark.parametrize(
    "name, iterations, exploring",
    [("fig4_alignprop_aesthetic", 24, 18), ("fig10b", 24, 18), ("fig4_ddpo_aesthetic", 100, 75), ("fig8", 100, 75)],
)
def test_how_long_it_explores(name, iterations, exploring):
    config = paper.get_config(name)
    assert config.iterations == iterations and iterations % config.eval.every == 0
    assert exploring_iterations(iterations, fraction=config.exploration.fraction) == exploring


@pytest.mark.parametrize(
    "argument, said",
    [
        (None, "config argument '': accepted: fig1, fig4_..., "),
        (
            "",
            "config argument '': accepted: fig1, fig4_..., fig5_..., fig6_..., fig7_..., fig8, fig9a_..., fig9b_..., ",
        ),
        ("fig99", "config argument 'fig99': accepted: fig1, fig4_..., "),
        (
            "fig4",
            "config argument 'fig4': accepted: fig4_ddpo_aesthetic, fig4_ddpo_pickscore, fig4_alignprop_aesthetic, "
            "fig4_alignprop_pickscore, each also with ,explore= and ,model=",
        ),
        ("fig1,explore=maybe", "config argument explore='maybe': accepted: true, false"),
        ("fig1,model=sd3", "config argument model='sd3': accepted: emoji, emoji_hard, emoji_flow, sd15, sd21, sdxl"),
        ("fig1,", "config argument '': accepted: explore=..., model=..."),
        ("fig1,reward=jpeg", "config argument 'reward=jpeg': accepted: explore=..., model=..."),
    ],
)
def test_unknown_experiments(argument, said):
    with pytest.raises(ValueError) as error:
        paper.get_config(argument)
    assert str(error.value).startswith(said)
