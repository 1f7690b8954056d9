"""The numbers of an experiment's results as cells of tables, and the names of what is measured."""

from collections.abc import Mapping, Sequence
from typing import Any

SIGNS = ("diversity/distance", "diversity/vendi", "luminance", "saturation", "background_share")
SHARES = ("emoji_judge", "background_share")  # and their parts: shares
# Metrics of what there is to learn from, and what columns call them
WITHIN_GROUPS = {"reward/std_in_group": "standard deviation", "reward/best_in_group": "best"}
WITH_SUCCESS = {"reward/emoji_judge/best_in_group": "groups with a success"}  # a share: the judge says 1 or 0
OF_GRADIENT = {"grad_snr": "grad_snr"}
OF_TRAINING = WITHIN_GROUPS | WITH_SUCCESS | OF_GRADIENT
_DIGITS = {"diversity/distance": 3, "luminance": 3, "saturation": 3, "grad_snr": 3}
_WORDS = {"diversity/distance": "distance of a prompt's images", "diversity/vendi": "Vendi score"}
_WORDS |= {"background_share": "background"}


# -------------------------------------------------------------------------------------------------------------- numbers


def number(x: float, what: str, *, signed: bool = False) -> str:
    """Shares in percent, the others with as many digits as they deserve."""
    sign = "+" if signed else ""
    x, digits = (100 * x, 1) if what.split("/")[0] in SHARES else (x, _DIGITS.get(what, 2))
    return f"{round(x, digits) + 0.0:{sign}.{digits}f}"  # no -0.00


def cell(estimate: Sequence[float | None] | None, what: str, *, signed: bool = False) -> str:
    """ "19.10 [18.90, 19.31]"; without an interval where there is one seed, "-" where there is nothing."""
    if estimate is None:
        return "-"
    mean, low, high = (None if x is None else number(x, what, signed=signed) for x in estimate)
    unit = " %" if what.split("/")[0] in SHARES else ""
    return f"{mean}{unit}" if low is None else f"{mean} [{low}, {high}]{unit}"


def words(sign: str) -> str:
    """What one of SIGNS is called."""
    return _WORDS.get(sign, sign)


# ---------------------------------------------------------------------------------------------------------------- names


def measured(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(prompt set, reward) of what is reported: trained prompts first, the trained reward before the held-out one."""
    rewards = [name for name in (results["reward"], results["held_out"]) if name]
    return [(prompts, name) for prompts in (results["prompts"], *results["unseen"]) for name in rewards]


def telling_reward(results: Mapping[str, Any]) -> str:
    """A share of successes, unless the base model has them all; else the reward that is trained on."""
    for what in filter(None, (results["reward"], results["held_out"])):
        if what in SHARES and results["base"].get(results["prompts"], {}).get(what, 0.0) < 1.0:
            return what
    return results["reward"]


def bin_name(one: Mapping[str, Any]) -> str:
    if one["above"] is None:
        return "no image"
    return f"{100 * one['above']:.0f} to {100 * one['upto']:.0f} %"
