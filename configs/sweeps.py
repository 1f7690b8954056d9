"""The paper's experiments as comparisons over seeds, each run by one command.

    python scripts/sweep.py --experiment fig4_ddpo_pickscore --model emoji --seeds 3 --out runs/sweeps
    python scripts/analyse.py --experiment fig4_ddpo_pickscore --sweeps runs/sweeps --out docs/evidence/results

An experiment has arms, one of which is the baseline that the others are compared with. An arm is what follows --config
configs/, and what it changes of that by dotted keys: values, or functions of the config that give one. Names are those
of paper.py.

| names | arms beside the baseline |
|---|---|
| fig1, fig4_ALGORITHM_REWARD, fig8, fig10b, and paper.py's ALIASES of them (fig6_..., fig17b, ...) | DiffExp |
| fig9a_REWARD | one part of exploration, or both |
| fig9b_REWARD | thresholds of Eq. 7 |
| thresholds_ddpo_REWARD | the same for DDPO |
| controls_fig1 | DiffExp, each of its parts, and the schedule's mean as a constant guidance |
| controls_ALGORITHM_REWARD | DiffExp, and what could explain its gain away; its schedule on the baseline's model |
| unknowns_ALGORITHM_REWARD | DiffExp, and other values of what the paper does not give, one changed at a time |
| steps_ddpo_REWARD | of no exploration: the update learns from the first 80, 60 or 40 % of the steps, not all |
| tune_ALGORITHM_REWARD | the baseline with other settings of the optimizer, one changed at a time |
| grpo | DiffExp, of configs/grpo.py; for `--model emoji_flow` above all |
| parts_grpo | DiffExp and each of its parts within groups; one draw of words a prompt; no guidance in training |
| methods | of every method without and with DiffExp, for the same reward queries; for the miniatures |
| groups | of methods that compare a prompt's images without and with DiffExp; the judge counts groups with a success |
| rates | of the same methods without exploration: the same three learning rates for each |

Arms of different experiments that come to the same config share their runs. ALGORITHM is ddpo or alignprop, REWARD is
aesthetic or pickscore.
"""

from configs.models import MINIATURES
from configs.paper import PARTS, REWARDS, THRESHOLDS

_ALGORITHMS = {"ddpo": "DDPO", "alignprop": "AlignProp"}


def evaluation(config):
    """About 12 evaluations beside the first: enough for a curve."""
    return max(1, round(config.iterations / 12))


# Of every arm: curves are of evaluations without exploration, at the same iterations in all arms
ALL_ARMS = {"eval.every": evaluation, "checkpoint.every": evaluation}


def times(key, factor):
    """The config's own value times a factor."""

    def value(config):
        for name in key.split("."):
            config = config[name]
        return factor * config

    return {key: value}


def mean_guidance(config):
    """The mean of Eq. 7's schedule over the steps: t_thresh is a share of them, or their timesteps are even."""
    low = (1000 - config.exploration.t_thresh) / 1000
    return low * config.exploration.w_low + (1 - low) * config.sampling.guidance


def held_out(config):
    """What fig1 reports besides its reward: in the miniature the judge is the reward, so another one is held out."""
    return ("emoji_pickscore",) if config.model.path in MINIATURES else tuple(config.eval.rewards)


def _pair(name, changes=()):
    changes = dict(changes)
    return {"baseline": (f"paper.py:{name},explore=false", changes), "diffexp": (f"paper.py:{name}", changes)}


def _changed(name, arms, common=()):
    return {arm: (f"paper.py:{name}", dict(common) | changes) for arm, changes in arms.items()}


_CONSTANT = {"exploration.w_low": mean_guidance, "exploration.t_thresh": 0}  # every step is above that


def _controls(name):
    arms = {
        "constant": _CONSTANT,
        "all_iterations": {"exploration.fraction": 1.0},
        "per_prompt": {"exploration.scope": "prompt"},
    }
    return _pair(name) | _changed(name, arms)


def _parts(name, common):
    arms = {part: PARTS[part] for part in ("weighting", "schedule")} | {"constant": _CONSTANT}
    return _pair(name, common) | _changed(name, arms, common)


def _unknowns(name):
    arms = {f"w_low_{w_low}": {"exploration.w_low": float(w_low)} for w_low in (0, 2)}
    arms |= {f"upper_{upper}": {"exploration.weight_range": (1.0, upper)} for upper in (1.2, 2.0)}
    arms |= {unit: {"exploration.unit": unit} for unit in ("phrase", "token")}
    return _pair(name) | _changed(name, arms)


def _tuning(name, algorithm):
    arms = {"baseline": {}} | {f"lr_x{factor}": times("optim.lr", factor) for factor in (0.5, 2, 0.25, 4)}
    if algorithm == "ddpo":
        arms |= {"clip_x0.33": times("ddpo.clip", 1 / 3), "clip_x3": times("ddpo.clip", 3)}
        arms |= {f"updates_{n}": {"ddpo.updates": n} for n in (1, 4)}
    return _changed(f"{name},explore=false", arms)


def _experiment(shows, arms, baseline="baseline", explored_evaluation=False, pairs=()):
    """An experiment.

    explored_evaluation: the baseline's final model is also sampled with DiffExp's guidance schedule.
    pairs: {arm: the arm that it is compared with}, of arms that have a baseline of their own.
    """
    return {
        "shows": shows,
        "baseline": baseline,
        "arms": arms,
        "explored_evaluation": explored_evaluation,
        "pairs": dict(pairs),
    }


def _queries(config):
    """Iterations for 768 reward queries; of models that are no miniatures, what the method's config has."""
    return 768 // config.batch.samples if config.model.path in MINIATURES else config.iterations


def _quarter(config):
    return max(1, _queries(config) // 4)


# Samplers with and without noise begin at different success: evaluated are all by the one without
_EQUAL = {"iterations": _queries, "eval.every": _quarter, "checkpoint.every": _quarter, "eval.eta": 0.0}
_METHODS = {  # name: its config, and what it changes of that
    "ddpo": ("ddpo", {"ddpo.updates": 2}),
    "ddpo_four_updates": ("ddpo", {"ddpo.updates": 4}),
    "ddpo_one_update": ("ddpo", {"ddpo.updates": 1}),
    "dpok": ("dpok", {}),
    "grpo": ("grpo", {}),
    "prdp": ("prdp", {}),
    "prdp_groups_of_4": ("prdp", {"batch.group": 4, "prdp.timestep_fraction": 0.8}),
    "rwr": ("rwr", {}),
    "nft": ("nft", {}),
    "awm": ("awm", {}),
    "alignprop": ("alignprop", {}),
    "alignprop_published": ("alignprop", {"alignprop.input_gradient": True}),
    "draft": ("draft", {}),
    "draft_lv": ("draft", {"draft.lv_samples": 2}),
    "entropy": ("entropy", {}),
    "seiko": ("seiko", {}),
    "seiko_images": ("seiko", {"seiko.reads_text": False}),
}
_GROUPED = ("grpo", "nft")  # learn from groups of four images


def _method(name, *, explore, changes=()):
    """An arm of `methods`."""
    config, own = _METHODS[name]
    return f"{config}.py:explore={str(explore).lower()}", _EQUAL | own | dict(changes)


def _without_and_with(names, changes=()):
    """Arms of methods without exploration, NAME, and with it, NAME_diffexp."""
    sides = (("", False), ("_diffexp", True))
    return {
        f"{name}{ending}": _method(name, explore=explore, changes=changes)
        for name in names
        for ending, explore in sides
    }


# The judge says of each image whether it is a success, and weighs nothing
_JUDGED = {"reward": "emoji_pickscore+emoji_judge", "reward_weights": (1.0, 0.0), "eval.every": _queries}
_UNGUIDED = {"sampling.guidance": 1.0, "eval.guidance": lambda config: config.sampling.guidance}
_IN_GROUPS = {"diffexp": {}, "constant": _CONSTANT, "per_prompt": {"exploration.scope": "prompt"}}
_IN_GROUPS |= {part: PARTS[part] for part in ("weighting", "schedule")} | {"share_0.75": {"exploration.share": 0.75}}
_RATES = {f"lr_{rate:g}": {"optim.lr": rate} for rate in (0.003, 0.01, 0.03)}
_STEPS = {"all": {"ddpo.timestep_fraction": 1.0}}
_STEPS |= {f"first_{100 * share:.0f}": {"ddpo.timestep_fraction": share} for share in (0.8, 0.6, 0.4)}
_FIG1 = {"eval.rewards": held_out}
_FIGURES = [(algorithm, reward) for algorithm in _ALGORITHMS for reward in REWARDS]

SWEEPS = {
    "fig1": _experiment("DDPO with and without DiffExp on one prompt that the base model fails", _pair("fig1", _FIG1)),
    **{
        f"fig4_{algorithm}_{reward}": _experiment(
            f"{_ALGORITHMS[algorithm]} with and without DiffExp on {reward}, unseen prompts, and what is held out",
            _pair(f"fig4_{algorithm}_{reward}"),
        )
        for algorithm, reward in _FIGURES
    },
    "fig8": _experiment("AlignProp with and without DiffExp on a sum of rewards", _pair("fig8")),
    **{
        f"fig9a_{reward}": _experiment(
            f"AlignProp on {reward}: what each part of exploration does",
            {part: (f"paper.py:fig9a_{reward}_{part}", {}) for part in PARTS},
            "none",
        )
        for reward in REWARDS
    },
    **{
        f"fig9b_{reward}": _experiment(
            f"AlignProp on {reward}: the threshold of the guidance schedule",
            {"none": (f"paper.py:fig9a_{reward}_none", {})}
            | {name: (f"paper.py:fig9b_{reward}_{name}", {}) for name in THRESHOLDS},
            "none",
        )
        for reward in REWARDS
    },
    **{
        f"thresholds_ddpo_{reward}": _experiment(
            f"DDPO on {reward}: the threshold of the guidance schedule",
            {"baseline": (f"paper.py:fig4_ddpo_{reward},explore=false", {})}
            | _changed(f"fig4_ddpo_{reward}", THRESHOLDS),
        )
        for reward in REWARDS
    },
    "fig10b": _experiment("AlignProp with and without DiffExp on SDXL", _pair("fig10b")),
    "controls_fig1": _experiment(
        "DDPO on one prompt that the base model fails: which part of exploration helps", _parts("fig1", _FIG1)
    ),
    **{
        f"controls_{algorithm}_{reward}": _experiment(
            f"{_ALGORITHMS[algorithm]} on {reward}: what could explain DiffExp's gain away",
            _controls(f"fig4_{algorithm}_{reward}"),
            explored_evaluation=True,
        )
        for algorithm, reward in _FIGURES
    },
    **{
        f"unknowns_{algorithm}_{reward}": _experiment(
            f"{_ALGORITHMS[algorithm]} on {reward}: exploration's numbers that the paper does not give",
            _unknowns(f"fig4_{algorithm}_{reward}"),
        )
        for algorithm, reward in _FIGURES
    },
    **{
        f"steps_ddpo_{reward}": _experiment(
            f"DDPO on {reward} without exploration: how many of the first steps it learns from",
            _changed(f"fig4_ddpo_{reward},explore=false", _STEPS),
            "all",
        )
        for reward in REWARDS
    },
    **{
        f"tune_{algorithm}_{reward}": _experiment(
            f"{_ALGORITHMS[algorithm]} on {reward} without exploration: settings of the optimizer",
            _tuning(f"fig4_{algorithm}_{reward}", algorithm),
        )
        for algorithm, reward in _FIGURES
    },
    "grpo": _experiment(
        "GRPO with and without DiffExp",
        {"baseline": ("grpo.py:explore=false", {}), "diffexp": ("grpo.py:explore=true", {})},
    ),
    "parts_grpo": _experiment(
        "GRPO for 768 reward queries: what each part of exploration does within groups, and training without guidance",
        {"baseline": _method("grpo", explore=False)}
        | {"unguided": _method("grpo", explore=False, changes=_UNGUIDED)}
        | {arm: _method("grpo", explore=True, changes=changes) for arm, changes in _IN_GROUPS.items()},
    ),
    "methods": _experiment(
        "what each method learns from 768 reward queries, without and with DiffExp",
        _without_and_with(_METHODS),
        "ddpo",
        pairs={f"{name}_diffexp": name for name in _METHODS},
    ),
    "groups": _experiment(
        "how many groups of a prompt's images have a success to learn from, without and with DiffExp",
        _without_and_with(_GROUPED, _JUDGED),
        _GROUPED[0],
        pairs={f"{name}_diffexp": name for name in _GROUPED},
    ),
    "rates": _experiment(
        "each method without exploration at its own learning rate, and at three that are the same for all",
        {
            arm: _method(name, explore=False, changes=changes)
            for name in _METHODS
            for arm, changes in ((name, {}), *((f"{name}_{rate}", change) for rate, change in _RATES.items()))
        },
        "ddpo",
        pairs={f"{name}_{rate}": name for name in _METHODS for rate in _RATES},
    ),
}
