"""The one reader of json: what it refuses, and that everything that reads json from files does so through it."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.json_text import parse_json, read_text
from diffexp_jax.models.lora import load_lora
from diffexp_jax.prompts import load_prompts
from diffexp_jax.report import grids
from diffexp_jax.run import lease_files
from diffexp_jax.run.metrics import read_metrics
from tests.support import ROOT

# What Python's reader fails in with other errors than ValueError, or reads and something fails in later
HOSTILE = {
    "deep": ("[" * 100_000, "more than 64 levels of brackets"),
    "deep and closed": ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels of brackets"),
    "many digits": ("9" * 5000, "a number of 5000 digits"),
    "no float's": ("1" + "0" * 300, "a number of 301 digits"),
    "surrogate": ('["\\ud800 a dog"]', "surrogates not allowed"),
    "surrogate as a key": ('{"\\ud800": 1}', "surrogates not allowed"),
    "a key twice": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice, with different values"),
}
NOT_FINITE = {
    "NaN": ("[NaN]", "NaN is no number of json"),
    "Infinity": ("-Infinity", "-Infinity is no number of json"),
    "too large": ("-1e999", "the number -1e999 is too large"),
}


@pytest.mark.parametrize("name", [*HOSTILE, *NOT_FINITE])
def test_what_is_refused(name, tmp_path):
    text, says = (HOSTILE | NOT_FINITE)[name]
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=rf"a\.json: not readable as json \(.*{says}") as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_what_is_read():
    good = {"a": [1, -2.5e300, None, True, "é\U0001f600"], "b": {}, "c": 10**30}
    assert parse_json(json.dumps(good)) == good
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1}
    assert parse_json('{"a":' * 64 + "1" + "}" * 64)
    a, b, c = parse_json("[NaN, Infinity, -1e999]", finite=False)
    assert a != a and (b, c) == (float("inf"), -float("inf"))


def test_a_file_is_not_read_beyond_its_limit(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="a.json: not readable as json .'utf-8' codec can't decode byte 0xff"):
        read_json(tmp_path / "a.json")
    assert read_text(ROOT / "README.md", most=10**6)
    with pytest.raises(ValueError, match="longer than 16 MB"):
        read_text(Path("/dev/zero"))


def test_nothing_else_reads_json():
    """json.loads is in the reader, and where a program reads what it has just written itself."""
    own = {"json_text.py", "lora.py", "benchmark.py", "analyse.py", "fault_runs.py"}
    for path in [*(ROOT / "diffexp_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        calls = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert path.name in own or not calls & {"json.load", "json.loads"}, path


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_in_other_files(name, tmp_path):
    """Prompts, a LoRA's header, a lease, metrics, a grid's text: one line, or as if it were not there."""
    text, says = HOSTILE[name]
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError, match=r"p\.json: ") as error:
        load_prompts(str(tmp_path / "p.json"))
    assert "\n" not in str(error.value)
    save_file({"a": np.zeros(1)}, tmp_path / "l.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(InputError, match=r"l\.safetensors: not a readable LoRA file"):
        load_lora(tmp_path / "l.safetensors", {})
    (tmp_path / "lease.json").write_text(text)
    assert lease_files.read(tmp_path / "lease.json").owner == {}
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 0}}\n{text}\n{{"iteration": 1}}\n')
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]
    with pytest.raises(OSError, match=rf"g\.png: .*{says}"):
        grids.read_grid(write_grid(tmp_path / "g.png", text))


# ---------------------------------------------------------------------------------------------------------------- grids


def write_grid(path, text: str):
    """A picture of 40 x 60 pixels that says this of itself."""
    about = PngInfo()
    about.add_itxt("diffexp_jax grid", text)
    Image.new("RGB", (40, 60)).save(path, pnginfo=about)
    return path


GRID = {"columns": 1, "scale": 2, "size": [8, 8], "captions": ["a"]}


def test_a_grid_that_fits_its_picture(tmp_path):
    grid = grids.read_grid(write_grid(tmp_path / "g.png", json.dumps(GRID)))
    assert grid.captions == ("a",) and grid.images[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in GRID for value in (0, -1, None, "a", [], [0, 8], [[8, 8]], {"a": 1})),
        {"size": [8, 8, 8]},
        {"size": [8, 37]},
        {"scale": 3},
        {"captions": ["a"] * 3},
        {"captions": ["a", 3]},
    ],
)
def test_a_grid_that_lies_is_an_error(tmp_path, change):
    with pytest.raises(OSError, match=r"g\.png: what it says of its pictures"):
        grids.read_grid(write_grid(tmp_path / "g.png", json.dumps(GRID | change)))


@pytest.mark.parametrize("text", ["[]", "3", "{}", '"a"'])
def test_a_grid_that_says_something_else(tmp_path, text):
    with pytest.raises(OSError, match=r"g\.png: what it says of its pictures is not what a grid says"):
        grids.read_grid(write_grid(tmp_path / "g.png", text))
