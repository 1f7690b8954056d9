"""What follows the colon of a config: `configs/ddpo.py:model=sd15,reward=aesthetic:PATH,prompts=animals,explore=false`.

model is a name of models.py; reward and prompts are what `config.reward` and `config.prompts` take (base.py); explore
is true or false.
"""

import difflib
from collections.abc import Iterable

import ml_collections

from configs import base
from configs.models import MODELS

ARGUMENTS = {"model": "emoji", "reward": "emoji_pickscore", "prompts": "animal_activities", "explore": "true"}


def parse(argument: str | None) -> dict[str, str]:
    """ "model=emoji,explore=false" -> all of ARGUMENTS, with errors that list what is accepted."""
    chosen = dict(ARGUMENTS)
    for item in filter(None, (argument or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or key not in ARGUMENTS:
            accepted = ", ".join(f"{k}=..." for k in ARGUMENTS)
            raise ValueError(f"config argument {item!r}: accepted: {accepted}{did_you_mean(key, ARGUMENTS)}")
        chosen[key] = value
    for key, accepted in (("model", MODELS), ("explore", ("true", "false"))):
        if chosen[key] not in accepted:
            near = did_you_mean(chosen[key], accepted)
            raise ValueError(f"config argument {key}={chosen[key]!r}: accepted: {', '.join(accepted)}{near}")
    return chosen


def structured(
    argument: str | None, *, guidance: float | None = None
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """`base.default()` with what the argument chooses filled in, and the parsed argument.

    `guidance` is the method's published scale, which models have that have none of their own.
    """
    chosen = parse(argument)
    config = base.default()
    if guidance is not None:
        config.sampling.guidance = guidance
    config.update_from_flattened_dict(MODELS[chosen["model"]])
    config.reward, config.prompts = chosen["reward"], chosen["prompts"]
    config.exploration.enabled = chosen["explore"] == "true"
    return config, chosen


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about a word: the nearest two of the known ones, if they are near."""
    near = difflib.get_close_matches(word, list(known), 2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
