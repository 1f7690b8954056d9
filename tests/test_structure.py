"""What keeps the code readable, read from the code itself: who imports whom, settings that do something, equations."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from configs import alignprop, common, ddpo
from diffexp_jax.algorithms import METHODS
from diffexp_jax.prompts import PROMPTS

PACKAGE = ROOT / "diffexp_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part of the package (a file or a folder) and what of ours it may import: nothing points upwards, or around.
BELOW = {
    "backend": set(),
    "limits": {"InputError"},
    "exploration": set(),
    "state": set(),
    "parallel": set(),
    "metrics": set(),
    "process": {"process", "InputError"},
    "sampling": {"process"},
    "models": {"models", "process", "backend", "InputError"},
    "prompts": {"prompts", "InputError"},
    "rewards": {"rewards", "models", "emoji.names", "InputError", "RewardError"},
    "emoji": {"emoji", "rewards", "models", "prompts", "process", "InputError"},
    "algorithms": {"algorithms", "sampling", "process", "state", "backend", "limits", "InputError"},
    "command": {"InputError", "RewardError"},
    "report": {"metrics"},
    "checkpoint": {"command", "InputError"},
    "check": {"limits", "models.precision", "algorithms", "prompts", "sampling", "InputError"},
    "flops": set(),
    "programs": {"models.precision", "problem", "evaluation", "algorithms", "parallel", "check"},
    "dry_run": {
        "algorithms",
        "programs",
        "problem",
        "evaluation",
        "flops",
        "models",
        "rewards",
        "prompts",
        "parallel",
        "check",
    }
    | {"backend", "InputError"},
    "evaluation": {"algorithms", "sampling", "process", "models", "rewards", "parallel"},
    "problem": {"evaluation", "algorithms", "sampling", "process", "exploration", "models", "rewards", "prompts"}
    | {"parallel", "backend", "InputError"},
    "train": {
        "programs",
        "backend",
        "dry_run",
        "problem",
        "evaluation",
        "exploration",
        "models",
        "parallel",
        "check",
        "checkpoint",
    }
    | {"command", "metrics", "report", "InputError", "RewardError"},
    "__init__": set(),
}


def imported(path: Path) -> set[str]:
    """The dotted names of everything that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    allowed = BELOW[part_of(path)]  # a new part needs a line above: decide what it may know
    for name in imported(path):
        if name.split(".")[0] == "diffexp_jax":
            inner = name.removeprefix("diffexp_jax.")
            assert any(inner == item or inner.startswith(f"{item}.") for item in allowed), f"{path}: imports {name}"


def test_every_part_exists():
    assert {part_of(path) for path in FILES} == BELOW.keys()


def of(library: str) -> set[str]:
    """The parts of the package that import the library."""
    return {part_of(path) for path in FILES for name in imported(path) if f"{name}.".startswith(f"{library}.")}


def test_where_libraries_are_used():
    assert of("flax.linen") == {"models"}  # a port to another network library touches one folder
    assert of("ml_collections") == {
        "train",
        "problem",
        "programs",
        "dry_run",
    }  # library functions take keyword arguments
    assert of("orbax") == {"checkpoint"}
    for library in ("torch", "random", "diffusers"):
        assert of(library) == set(), library
    assert of("transformers") == {"models"}


def test_configs_import_nothing_of_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "configs", "re"}, path


# ------------------------------------------------------------------------------------------------------------- settings


def leaves(config, prefix="") -> set[str]:
    names = set()
    for key, value in config.items():
        names |= leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}"}
    return names


KEYS = leaves(common.default())


def dotted(node: ast.AST) -> str | None:
    """The source of a.b.c, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{before}.{node.attr}" if isinstance(node, ast.Attribute) and (before := dotted(node.value)) else None


def settings_read(path: Path) -> set[str]:
    """The keys that a file reads from a variable named config (or c), directly or by a name for a section of it."""
    read = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name == "check_config":  # checking is no use
            continue
        names = {"config": "", "c": ""}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                pair = node.targets[0], node.value
                tuples = all(isinstance(side, ast.Tuple) for side in pair)
                for target, value in zip(*(side.elts for side in pair), strict=True) if tuples else [pair]:
                    source = dotted(value) or ""
                    if isinstance(target, ast.Name) and source.startswith(("config.", "c.")):
                        names[target.id] = source.partition(".")[2] + "."
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (source := dotted(node)):
                first, _, rest = source.partition(".")
                if first in names:
                    read.add(names[first] + rest)
    return read


def settings_of_method(name: str) -> set[str]:
    """The keys that a method's file uses: as a parameter of its function, or as settings["KEY"] where it is made."""
    tree = ast.parse((PACKAGE / "algorithms" / f"{name}.py").read_text())
    used = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "check"):
        loaded = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if function.name == name:
            used |= {argument.arg for argument in function.args.kwonlyargs} & loaded
        for node in ast.walk(function):
            if isinstance(node, ast.Subscript) and dotted(node.value) == "settings":
                used.add(node.slice.value)
    return {f"{name}.{key}" for key in used}


def test_every_setting_is_used():
    used = set().union(*map(settings_read, FILES), *map(settings_of_method, METHODS))
    assert KEYS - used == set()


def test_every_setting_has_a_comment():
    source = (ROOT / "configs" / "common.py").read_text()
    (function,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "default")
    lines, commented = source.splitlines(), 0
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[-1], ast.Attribute):
            if "ConfigDict()" in ast.unparse(node.value):
                continue
            assert len(node.targets) == 1
            assert re.search(r"  # \S", lines[node.end_lineno - 1]), lines[node.lineno - 1]
            commented += 1
    assert commented == len(KEYS)


@pytest.mark.parametrize("config", [alignprop, ddpo])
@pytest.mark.parametrize("argument", ["", "model=sd15,reward=aesthetic:x,prompts=animals,explore=false"])
def test_the_configs_change_only_what_there_is(config, argument):
    assert leaves(config.get_config(argument)) == KEYS
    assert config.get_config(argument).exploration.enabled == (argument == "")


def test_the_configs_know_the_prompt_sets():
    assert common.PROMPTS == tuple(PROMPTS)


@pytest.mark.parametrize(
    "prompts", ["a.csv:Category=A b. |C", "prompts/a.txt", "a dolphin riding a bike", "prompt:cat"]
)
def test_the_configs_take_other_prompts(prompts):
    config = alignprop.get_config(f"model=sd15,prompts={prompts},explore=false")
    assert (config.prompts, config.exploration.enabled) == (prompts, False)


# ------------------------------------------------------------------------------------------------------------ equations


def table() -> list[tuple[str, str, str]]:
    """README's paper -> code: (equation, file, function)."""
    rows = re.findall(r"^\| (.+?) \| .+? \| `(.+?)`: `(.+?)` \|$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(rows) >= 7
    return rows


@pytest.mark.parametrize("equation, file, function", table())
def test_the_table_points_at_functions(equation, file, function):
    tree = ast.parse((ROOT / file).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    if equation.startswith("Eq."):
        assert f"DiffExp {equation}" in ast.get_docstring(found)


@pytest.mark.parametrize("equation", [equation for equation, _, _ in table() if equation.startswith("Eq.")])
def test_one_hit_for_every_equation(equation):
    tag = re.compile(rf"DiffExp {re.escape(equation)}(?![\d-])")
    hits = [path for path in FILES for _ in tag.findall(path.read_text())]
    assert len(hits) == 1, hits


def test_all_equations_are_in_the_table():
    tags = {tag for path in FILES for tag in re.findall(r"DiffExp (Eq\. [\d-]+)", path.read_text())}
    assert tags == {equation for equation, _, _ in table() if equation.startswith("Eq.")}
