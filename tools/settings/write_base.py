"""Writes configs/base.py and docs/use/settings.md: every setting with its default, meaning and unit. And
docs/use/configs.md: what the other files of configs/ set of them.

python tools/settings/write_base.py
"""

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # where the package is

from flax.traverse_util import flatten_dict

from configs.models import MODELS
from diffexp_jax import config_files
from diffexp_jax.limits import Number, Setting, settings_of
from diffexp_jax.settings import flat
from diffexp_jax.settings.settings import Settings, sections_of

WIDTH, INDENT = 120, "    "
HEAD = '''"""Every setting of a run, with its default, meaning and unit; the other configs start from `default()`.

Plain ml_collections: nothing in configs/ imports the package. Arguments choose structure (`arguments.py`); single
numbers are overridden by flags, e.g. `--config.optim.lr=3e-4`.

Written by tools/settings/write_base.py from the package, where each setting has its default, meaning and range in one
place (diffexp_jax/settings/, diffexp_jax/algorithms/): new ones are entered there.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def default() -> ml_collections.ConfigDict:
'''


def listing() -> str:
    """All of configs/base.py."""
    lines = ["config = ml_collections.ConfigDict()", *section_lines(Settings(), "config", {}), "return config"]
    return HEAD + "".join(f"{INDENT}{line}".rstrip() + "\n" for line in lines)


def section_lines(section: Any, prefix: str, explained: dict[str, str]) -> Iterator[str]:
    """The lines of a section's settings, and of its sections, in the order of its fields.

    Args:
      explained: key of the setting that each longer explanation stands at already: several methods share some.
    """
    settings, parts = dict(settings_of(section)), dict(sections_of(section))
    names = [name for part in dataclasses.fields(section) for name in _names(section, part.name)]
    after_section = False
    for name in (name for name in names if name in settings or name in parts):
        key = f"{prefix}.{name}"
        if name in parts:
            yield from ("", *comment(inspect.getdoc(type(parts[name]))), f"{key} = ml_collections.ConfigDict()")
            yield from section_lines(parts[name], key, explained)
        else:
            yield from [""] if after_section else []
            yield from setting_lines(key, settings[name], explained)
        after_section = name in parts


def _names(section: Any, field: str) -> list[str]:
    return list(section.methods) if field == "methods" else [field]


def setting_lines(key: str, known: Setting, explained: dict[str, str]) -> Iterator[str]:
    """The lines of one setting: what is to be known of it, and its default and meaning in a line."""
    meaning, before = known.meaning, explained.get(known.about)
    if before:
        meaning += f", see {before}"
    elif known.about:
        explained[known.about] = key.removeprefix("config.")
        yield from comment(known.about)
    line = f"{key} = {written(known)}"
    if len(INDENT + line) + len("  # " + meaning) <= WIDTH:
        yield f"{line}  # {meaning}"
    else:
        yield from (*comment(meaning[0].upper() + meaning[1:]), line)


def comment(text: str) -> Iterator[str]:
    """A text as comments, paragraph by paragraph."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        for line in textwrap.wrap(" ".join(paragraph.split()), WIDTH - len(INDENT + "# "), break_on_hyphens=False):
            yield f"# {line}"


def written(known: Setting) -> str:
    """A default as Python has it."""
    if known.default is None:
        return f"placeholder({known.kind.__name__})"
    if isinstance(known.default, float) and 0 < abs(known.default) < 1:
        digits, _, exponent = f"{known.default:e}".partition("e")
        return min(repr(known.default), f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}", key=len)
    return f'"{known.default}"' if isinstance(known.default, str) else repr(known.default).replace("'", '"')


# ---------------------------------------------------------------------------------------------------------------- page

NONSENSE = 1e4
PAGE = """# Settings

All settings of a run. Set one by a flag, `--config.optim.lr=3e-4`, or in a file of `configs/`.

Written by `python tools/settings/write_base.py` from the package, where each setting has its default, meaning and range
in one place.

"""


def page() -> str:
    """All of docs/use/settings.md."""
    return PAGE + "\n".join(page_lines(Settings(), "", {}))


def page_lines(section: Any, prefix: str, explained: dict[str, str]) -> Iterator[str]:
    """A section's settings as a table, and its sections under headings of their own; arguments as `section_lines`."""
    if prefix:
        yield from (f"## {prefix}", "", *paragraphs(linked(inspect.getdoc(type(section)))))
    yield from ('<div class="stacked" markdown>', "")  # on a phone: below each other (docs/site.css)
    yield from ("| setting | default | accepted | meaning |", "| --- | --- | --- | --- |")
    inside = f"{prefix}." if prefix else ""
    for name, known in settings_of(section):
        key, meaning = inside + name, known.meaning[0].upper() + known.meaning[1:]
        if before := explained.get(known.about):
            meaning += f", see `{before}`"
        elif known.about:
            explained[known.about] = key
            meaning += f". {' '.join(known.about.split())}".removesuffix(".")
        default = "None" if known.default is None else written(known)
        yield f"| `{key}` | `{default}` | {accepted(known)} | {cell(meaning)}. |"
    yield from ("", "</div>", "")
    for name, part in sections_of(section):
        yield from page_lines(part, inside + name, explained)


def accepted(known: Setting) -> str:
    """What a setting may be; "" where a function decides. Large upper ends only keep out nonsense and are not shown."""
    if isinstance(known.accepted, Number):
        low, high, above = known.accepted.low, known.accepted.high, known.accepted.above
        text = "any number" if low < -NONSENSE else f"more than {low:g}" if above else f"{low:g} or more"
        return text if high > NONSENSE else f"{known.accepted}"
    return ", ".join(map(str, known.accepted)) if isinstance(known.accepted, tuple) else ""


def cell(text: str) -> str:
    """A text that a table of Markdown shows as it stands; pages that it names are links."""
    return linked(text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*"))


def linked(text: str) -> str:
    """A text whose names of pages are links from docs/use/."""
    return re.sub(r"docs/([\w/-]+)\.md", r"[\1](../\1.md)", text)


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (*textwrap.wrap(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False), "")


# ------------------------------------------------------------------------------------------------------------- configs

CONFIGS = """# What the configs set

A run's settings are the defaults of [Settings](settings.md), what `model=` sets, what the method's file in `configs/`
sets, and your flags, in this order. Methods' rows are for Stable Diffusion and for the shipped models, whose runs take
minutes. So begin with `model=` of your model's size, also where `--config.model.path` names a file of your own.

Written by `python tools/settings/write_base.py` from `configs/`.

"""
SHIPPED, PUBLISHED = "emoji", "sd15"


def configs_page() -> str:
    """All of docs/use/configs.md."""
    return CONFIGS + "\n".join(configs_lines())


def configs_lines() -> Iterator[str]:
    """A table for the models, and one for each config file of a method."""
    yield from ("## model=", "", "| `model=` | sets |", "| --- | --- |")
    for model, changes in MODELS.items():
        values = ", ".join(f"`{key}={value!r}`" for key, value in changes.items())
        yield f"| `{model}` | {cell(values)} |"
    for name in config_files.names():
        if name == "paper":
            continue
        about = (config_files.module(name).__doc__ or "").partition("\n")[0]
        yield from ("", f"## {name}", "", about, "")
        yield from (f"| setting | `model={PUBLISHED}` | `model={SHIPPED}` |", "| --- | --- | --- |")
        changes = {model: set_by(name, model) for model in (PUBLISHED, SHIPPED)}
        usual = {model: {**flat(Settings()), **MODELS[model]} for model in (PUBLISHED, SHIPPED)}
        for key in dict.fromkeys((*changes[PUBLISHED], *changes[SHIPPED])):
            here = [f"`{changes[model].get(key, usual[model][key])!r}`" for model in (PUBLISHED, SHIPPED)]
            yield f"| `{key}` | {cell(here[0])} | {cell(here[1])} |"
    yield ""


def set_by(name: str, model: str) -> dict[str, Any]:
    """{dotted key: value} of what configs/NAME.py sets, besides what its model does."""
    of_model = {**flat(Settings()), **MODELS[model]}
    config = flatten_dict(config_files.module(name).get_config(f"model={model}").to_dict(), sep=".")
    return {key: value for key, value in config.items() if key in of_model and value != of_model[key]}


if __name__ == "__main__":
    (ROOT / "configs" / "base.py").write_text(listing())
    (ROOT / "docs" / "use" / "settings.md").write_text(page())
    (ROOT / "docs" / "use" / "configs.md").write_text(configs_page())
