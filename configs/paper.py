"""The settings of the DiffExp paper's experiments, a name for each run that a figure is made of.

    python -m diffexp_jax.train --config configs/paper.py:fig4_ddpo_aesthetic --workdir runs/fig4_ddpo_aesthetic
    python -m diffexp_jax.train --config configs/paper.py:fig4_ddpo_aesthetic,explore=false --workdir runs/its_baseline
    python -m diffexp_jax.train --config configs/paper.py:fig4_ddpo_aesthetic,model=emoji --workdir runs/its_miniature
    python -m diffexp_jax.train --config configs/paper.py:fig10b --dry_run

| names | what |
|---|---|
| fig1 | DDPO, ImageReward, the single prompt "a dolphin riding a bike" |
| fig3 | three samplers, nothing to train: this name only says which command of scripts/sample.py shows them |
| fig4_ALGORITHM_REWARD, the same as fig5_, fig6_, fig7_ | ddpo or alignprop; aesthetic or pickscore |
| fig8, fig10a, fig17a | AlignProp, HPS + Aesthetic + PickScore, 58 DrawBench prompts; unseen: 150 of PartiPrompts |
| fig9a_REWARD_PART | AlignProp; of exploration: none, weighting, schedule or both |
| fig9b_REWARD_tNNN | AlignProp; t_thresh 900, 800, 700 or 600 |
| fig10b, fig17b | SDXL, AlignProp, Aesthetic |

Names that share a run: those of ALIASES; "both" and t900 are fig4_alignprop_, "none" is its baseline. Figures 4, 6 and
7 are three curves of metrics.jsonl: reward/mean, eval/UNSEEN PROMPTS/REWARD and eval/PROMPTS/imagereward. Figures 5 and
8 (and 11 to 16, 18 and 19, which have no names here) are pictures of such a run and its baseline, side by side: what
both have in images/ is of the same prompts and noise.

What the copies of the paper that we could read give: Stable Diffusion 1.5 with LoRA, 50 steps, 64 images an iteration,
guidance 5.0 (DDPO) and 7.5 (AlignProp), the learning rates, the 3/4 rule, and which prompts go with which reward. Not
the numbers of exploration and of iterations: those are our defaults. SDXL's settings are those of SD 1.5, at 1024
pixels.

The 3/4 rule is a share of `iterations`: of 100, which are 6,400 reward queries, the first 75 explore. AlignProp on
Aesthetic has 24 (1,536 queries, 18 explore): the published AlignProp run ends at 1,792, before it over-optimises.

`,model=` takes any of models.py's names. With emoji or emoji_hard an experiment becomes its miniature: that model with
its settings, on prompts that it knows, with its rewards in the place of the published ones (ImageReward's: the judge).
AlignProp is the published one there too, which alignprop.py's miniature is not (`alignprop.input_gradient`).

Memory by `--dry_run` in float32 on a CPU (its numbers, not a GPU's; bfloat16 halves the weights), GiB a device:
fig4_ddpo_aesthetic sampling 5.54, update 10.19; fig4_alignprop_aesthetic 11.51; fig4_ddpo_pickscore,model=sdxl sampling
17.71, update 17.88; fig10b 32.43. The others were not measured.

Weights, DrawBench and PartiPrompts cannot be shipped. They are looked for, the prompts in their published files, in
`weights/` and `prompts/` of the current folder; other places by `--config.model.path=`,
`--config.reward=aesthetic:PATH`, `--config.prompts=FILE`, `--config.eval.prompts=`, `--config.eval.rewards=`.
"""

import re

from configs import alignprop, ddpo
from configs.arguments import did_you_mean, parse
from configs.models import MINIATURES

_DOLPHIN = "a dolphin riding a bike"
_IMAGEREWARD = "imagereward:weights/imagereward"
_ENSEMBLE = "hpsv2:weights/hpsv2+aesthetic:weights/aesthetic+pickscore:weights/pickscore"
_DRAWBENCH = "prompts/DrawBench.csv:Category=Conflicting|Gary Marcus et al.|Reddit"
_PARTI = "prompts/PartiPrompts.tsv:Challenge=Imagination"
# task: its reward, its prompts, and the unseen ones, which are only evaluated
PUBLISHED = {
    "dolphin": (_IMAGEREWARD, _DOLPHIN, ()),
    "aesthetic": ("aesthetic:weights/aesthetic", "animals", ("animals_unseen",)),
    "pickscore": ("pickscore:weights/pickscore", "animal_activities", ("unseen_activities",)),
    "drawbench": (_ENSEMBLE, _DRAWBENCH, (_PARTI,)),
}
MINIATURE = {
    "dolphin": ("emoji_judge", _DOLPHIN, ()),
    "aesthetic": ("emoji_aesthetic", "animals_with_article", ("animals_unseen_with_article",)),
    "pickscore": ("emoji_pickscore", "animal_activities", ("unseen_activities",)),
    "drawbench": ("emoji_aesthetic+emoji_pickscore", "animal_activities", ("unseen_activities",)),
}

# What a miniature changes beside its model's settings. At AlignProp's usual rate this reward makes the animals into
# coloured squares within 12 iterations; here most are still there at the end
_MINIATURE_SETTINGS = {("alignprop", "aesthetic"): {"optim.lr": 2.5e-3, "iterations": 36}}

# Of the published models. Aesthetic scores of single images are about 0.5 apart, and six prompts are unseen: with an
# image of each a curve's standard error is 0.2; with 16 it is 0.05.
_AESTHETIC = {"eval.samples_per_set": 96}
_SHORT = {"iterations": 24, "eval.every": 4, "log.images_every": 4, "checkpoint.every": 4}
_PUBLISHED_SETTINGS = {("ddpo", "aesthetic"): _AESTHETIC, ("alignprop", "aesthetic"): _AESTHETIC | _SHORT}

# One prompt: its statistics are of a whole iteration, and an evaluation is of as many images.
_ONE_PROMPT = {"ddpo.stats_buffer": 64, "eval.samples_per_prompt": 64}
PARTS = {
    "none": {"exploration.enabled": False},
    "weighting": {"exploration.t_thresh": 1000},  # no step is above it: the guidance is constant
    "schedule": {"exploration.weight_range": (1.0, 1.0)},
    "both": {},
}
THRESHOLDS = {f"t{t}": {"exploration.t_thresh": t} for t in (900, 800, 700, 600)}
ALGORITHMS, REWARDS = ("ddpo", "alignprop"), ("aesthetic", "pickscore")

# name: (model, algorithm, task, what else is set)
_RUNS = {
    "fig1": ("sd15", "ddpo", "dolphin", _ONE_PROMPT),
    **{f"fig4_{algorithm}_{reward}": ("sd15", algorithm, reward, {}) for algorithm in ALGORITHMS for reward in REWARDS},
    "fig8": ("sd15", "alignprop", "drawbench", {}),
    **{f"fig9a_{r}_{part}": ("sd15", "alignprop", r, changes) for r in REWARDS for part, changes in PARTS.items()},
    **{f"fig9b_{r}_{t}": ("sd15", "alignprop", r, changes) for r in REWARDS for t, changes in THRESHOLDS.items()},
    "fig10b": ("sdxl", "alignprop", "aesthetic", {}),
}
# Figures that are of another one's run; sweeps.py's experiments have these names too
ALIASES = {
    f"{figure}_{algorithm}_{reward}": f"fig4_{algorithm}_{reward}"
    for figure in ("fig5", "fig6", "fig7")
    for algorithm in ALGORITHMS
    for reward in REWARDS
} | {"fig10a": "fig8", "fig17a": "fig8", "fig17b": "fig10b"}


def _figure(name: str) -> tuple[int, str]:
    number, part = re.match(r"fig(\d+)([ab]?)", name).groups()
    return int(number), part


EXPERIMENTS = {name: _RUNS[ALIASES.get(name, name)] for name in sorted((*_RUNS, *ALIASES), key=_figure)}


def get_config(argument: str | None = None):
    """A name of EXPERIMENTS; with ",explore=false" its baseline, with ",model=emoji" its miniature."""
    name, *options = (argument or "").split(",")
    for option in options:
        if option.partition("=")[0] not in ("explore", "model"):
            raise ValueError(f"config argument {option!r}: accepted: explore=..., model=...")
    if name == "fig3":
        raise ValueError(f"fig3 trains nothing; it is {samplers(','.join(['model=sd15', *options]))}")
    if name not in EXPERIMENTS:
        near = did_you_mean(name, EXPERIMENTS)
        raise ValueError(
            f"config argument {name!r}: accepted: {accepted(name)}, each also with ,explore= and ,model={near}"
        )
    usual, algorithm, task, changes = EXPERIMENTS[name]
    options = ",".join([f"model={usual}", *options])
    model = parse(options)["model"]
    reward, prompts, unseen = (MINIATURE if model in MINIATURES else PUBLISHED)[task]
    module = {"ddpo": ddpo, "alignprop": alignprop}[algorithm]
    config = module.get_config(f"{options},reward={reward},prompts={prompts}")
    config.alignprop.input_gradient = True  # the paper's AlignProp, in the miniature too
    config.eval.prompts = (prompts, *unseen)
    if model in MINIATURES:
        config.update_from_flattened_dict(_MINIATURE_SETTINGS.get((algorithm, task), {}))
    else:
        config.eval.rewards = (_IMAGEREWARD,)
        config.update_from_flattened_dict(_PUBLISHED_SETTINGS.get((algorithm, task), {}))
    config.update_from_flattened_dict(changes)
    return config


def accepted(name: str) -> str:
    """The names that begin so; where there are none, the figures."""
    begun = [known for known in EXPERIMENTS if name and known.startswith(f"{name}_")]
    figures = dict.fromkeys(re.sub("_.*", "_...", known) for known in (*EXPERIMENTS, "fig3"))
    return ", ".join(begun or figures)


def samplers(options: str) -> str:
    """The command that shows Fig. 3: guidance low, high and scheduled, from the same noise."""
    config = alignprop.get_config(options)
    s, e = config.sampling, config.exploration
    return (
        f'python scripts/sample.py --model {config.model.path} --prompt "{_DOLPHIN}" --steps {s.steps} '
        f"--guidance {s.guidance:g} --w_low {e.w_low:g} --t_thresh {e.t_thresh} --samplers --out samples/fig3"
    )
