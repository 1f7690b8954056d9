"""What keeps the code readable, read from the code itself: who imports whom, settings that do something, equations."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs import alignprop, ddpo
from diffexp_jax.settings import Settings, by_key
from tests.support import ROOT
from tests.support.settings import KEYS, leaves

PACKAGE = ROOT / "diffexp_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room of the package (a folder, or a file at its top), from the ground up, and the rooms below that it may know
# besides errors and itself: nothing points upwards, or around.
BELOW = {
    "errors": set(),
    "version": set(),
    "backend": set(),
    "output": set(),
    "exploration": set(),
    "limits": set(),
    "paths": set(),
    "formats": {"paths", "limits"},
    "parallel": {"formats.json_text", "limits", "backend"},
    "models": {"formats", "backend", "paths", "limits", "parallel.Part", "parallel.by_parts", "parallel.waiting"},
    "sampling": {"formats.config_keys", "limits"},
    "prompts": {"formats", "paths"},
    "pipelines": {"models", "formats", "sampling", "prompts", "exploration", "paths"},
    "rewards": {"models", "formats", "emoji.names", "parallel", "paths", "limits"},
    "emoji": {"rewards", "pipelines", "models", "formats", "prompts", "sampling"},
    "algorithms": {"sampling", "parallel.AXIS", "backend", "limits"},
    "settings": {"algorithms", "pipelines", "prompts", "models.precision", "models.lora", "sampling", "formats"}
    | {"parallel", "rewards", "exploration", "limits", "backend", "paths"},
    "config_files": set(),
    "command": {"settings", "output", "paths", "config_files"},
    "sampler": {"settings", "pipelines", "models.blocks", "prompts", "exploration", "sampling", "parallel", "backend"},
    "run": {"settings", "algorithms", "command", "parallel", "formats", "limits", "paths"},
    "task": {"sampler", "pipelines", "rewards", "prompts"},
    "chosen_rewards": {"settings", "algorithms", "rewards", "paths"},
    "experiment": {"settings", "sampler", "algorithms", "pipelines", "models.lora", "rewards", "prompts", "parallel"}
    | {"run.fingerprint", "task", "chosen_rewards", "sampling"},
    "programs": {"experiment", "algorithms", "exploration", "pipelines", "rewards", "sampling", "parallel"},
    "evaluator": {"programs", "experiment", "sampler", "settings", "rewards", "prompts", "pipelines", "models.lora"}
    | {"task", "sampling", "formats.lora_files", "run.checkpoint", "parallel"},
    "cost": {"programs", "experiment", "settings", "algorithms", "models", "parallel", "backend", "command", "limits"},
    "report": {"experiment", "run", "settings", "exploration", "prompts", "formats", "parallel", "backend"}
    | {"version"},
    "train": {"programs", "evaluator", "experiment", "settings", "cost", "algorithms", "sampling", "models.lora"}
    | {"parallel", "backend", "run", "report", "command", "paths"},
    "__init__": {"errors", "version"},
}
BELOW |= dict.fromkeys(("api", "sweeps", "cli"), set(BELOW) - {"__init__"})  # what people type: all of it


@functools.cache
def imported(path: Path) -> set[str]:
    """The dotted names of everything that a file imports, at its top or in a function; not those of `__main__`."""
    names, tree = set(), ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
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
    part = part_of(path)
    allowed = BELOW[part] | {part, "errors"}  # a new room needs a line above: decide what it may know
    for name in imported(path):
        if name.split(".")[0] == "diffexp_jax":
            inner = name.removeprefix("diffexp_jax.")
            assert any(inner == item or inner.startswith(f"{item}.") for item in allowed), f"{path}: imports {name}"


def test_every_room_exists_and_knows_only_rooms_below():
    assert {part_of(path) for path in FILES} == BELOW.keys()
    seen = set()
    for room, known in BELOW.items():
        assert {name.partition(".")[0] for name in known} - {"emoji"} <= seen, room  # emoji.names is a list of words
        seen.add(room)


TOP = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
TOP |= {"LICENSE", "README.md", "configs", "diffexp_jax", "docs", "examples", "mkdocs.yml", "pyproject.toml"}
TOP |= {"requirements.txt", "requirements-test.txt", "scripts", "setup.py", "tests", "tools"}


def test_what_lies_at_the_top_level():
    """Nothing that a program left there by mistake is committed, and scripts/ is what a user types, nothing else."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no git checkout")
    files = [Path(name) for name in found.stdout.split("\0") if name]
    assert {file.parts[0] for file in files} <= TOP
    scripts = {file.stem for file in files if file.parts[0] == "scripts" and file.suffix == ".py"}
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("tools/*/*.py"), *FILES]:
        assert not {name.split(".")[0] for name in imported(path)} & (scripts - {"report"}), path


def test_what_is_imported_is_declared():
    """By pyproject.toml, or by name as an option."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    declared = {re.split(r"[<>=\[]", name)[0].replace("-", "_") for name in wanted}
    modules = {"absl": "absl_py", "PIL": "pillow", "orbax": "orbax_checkpoint"}
    found = {name.split(".")[0] for path in FILES for name in imported(path)} - {"diffexp_jax", "configs"}
    found -= set(sys.stdlib_module_names)
    assert {modules.get(name, name) for name in found} <= declared


def of(library: str) -> set[str]:
    """The parts of the package that import the library."""
    return {part_of(path) for path in FILES for name in imported(path) if f"{name}.".startswith(f"{library}.")}


def test_where_libraries_are_used():
    assert of("flax.linen") == {"models"}  # a port to another network library touches one folder
    # the rest takes values
    assert of("ml_collections") == {"settings", "train", "sweeps", "cli", "api"}
    assert of("orbax") == {"run"}
    for library in ("torch", "random", "diffusers"):
        assert of(library) == set(), library
    assert of("transformers") == {"formats", "emoji"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_short_functions_and_files(path):
    """Functions of at most 60 lines, files of at most 300; train.py of 200."""
    text = path.read_text()
    assert len(text.splitlines()) <= (200 if path == PACKAGE / "train.py" else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_tests_share_is_in_support(path):
    """No test imports another one's file, or asks for more than 520 lines to be read."""
    assert len(path.read_text().splitlines()) <= 520
    shared = {"support", "conftest", "users"}
    for name in imported(path):
        assert not name.startswith("tests.") or name.split(".")[1] in shared, name


def test_tests_are_where_their_subjects_are():
    """Each folder is a room of the package, or what is beside it."""
    folders = {path.parent.name for path in TESTS if path.name.startswith("test_")} - {"tests"}
    assert folders <= BELOW.keys() | {"scripts", "tools"}


def test_configs_import_nothing_of_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {
            "ml_collections",
            "configs",
            *sys.stdlib_module_names,
        }, path


# ------------------------------------------------------------------------------------------------------------- settings


def test_every_setting_is_described_and_used():
    """It is read by its name somewhere in the package; what overrides a model's scheduler is a key of its file."""
    used = {
        node.attr if isinstance(node, ast.Attribute) else node.value
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Constant) and part_of(path) == "sampling")
    }
    for key, known, _ in by_key(Settings()):
        assert len(known.meaning.split()) > 1 and not known.meaning.endswith("."), key
        assert key.rpartition(".")[2] in used, key


@pytest.mark.parametrize("config", [alignprop, ddpo])
@pytest.mark.parametrize("argument", ["", "model=sd15,reward=aesthetic:x,prompts=animals,explore=false"])
def test_the_configs_change_only_what_there_is(config, argument):
    assert leaves(config.get_config(argument)) == KEYS
    assert config.get_config(argument).exploration.enabled == (argument == "")


@pytest.mark.parametrize(
    "prompts", ["a.csv:Category=A b. |C", "prompts/a.txt", "a dolphin riding a bike", "prompt:cat"]
)
def test_the_configs_take_other_prompts(prompts):
    config = alignprop.get_config(f"model=sd15,prompts={prompts},explore=false")
    assert (config.prompts, config.exploration.enabled) == (prompts, False)


# ------------------------------------------------------------------------------------------------------------ equations


def table() -> list[tuple[str, str, str]]:
    """docs/understand/paper.md's table: (equation, file, function)."""
    text = (ROOT / "docs" / "understand" / "paper.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+? \| `(.+?)`: `(.+?)` \|$", text, flags=re.M)
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


def test_no_helper_of_the_tests_is_named_as_a_module_of_python():
    """A program in the same folder would import it in that one's place."""
    assert not {path.stem for path in ROOT.glob("tests/*/*.py")} & sys.stdlib_module_names - {"__init__"}
