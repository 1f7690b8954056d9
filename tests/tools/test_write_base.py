"""configs/base.py and docs/use/settings.md are what the package's settings are, in their order."""

import importlib

import pytest

from configs import base
from diffexp_jax.settings import Settings, parsed
from diffexp_jax.settings.settings import by_key
from tests.support import ROOT


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "settings")
    return importlib.import_module("write_base")


def test_base_is_written_from_the_package(tool):
    """Where it is not: python tools/settings/write_base.py."""
    assert (ROOT / "configs" / "base.py").read_text() == tool.listing()
    assert parsed(base.default()) == Settings()
    page = (ROOT / "docs" / "use" / "settings.md").read_text()
    assert page == tool.page()
    for key, known, _ in by_key(Settings()):
        assert f"| `{key}` | `{tool.written(known) if known.default is not None else None}` | " in page, key


def test_what_the_configs_set_is_written_from_them(tool):
    """Where it is not: python tools/settings/write_base.py."""
    page = (ROOT / "docs" / "use" / "configs.md").read_text()
    assert page == tool.configs_page()
    assert "| `optim.lr` | `0.001` | `0.01` |" in page and "\n## ddpo\n" in page


@pytest.mark.parametrize(
    "default, kind, expected",
    [
        (3e-4, float, "3e-4"),
        (0.75, float, "0.75"),
        (600.0, float, "600.0"),
        ("", str, '""'),
        (("a", "b"), tuple, '("a", "b")'),
        ((), tuple, "()"),
        (None, int | None, "placeholder(int)"),
        (True, bool, "True"),
    ],
)
def test_defaults_as_python_has_them(tool, default, kind, expected):
    assert tool.written(tool.Setting(default, kind, "", None, "")) == expected


def test_a_setting_in_lines(tool):
    """What is to be known stands above; a meaning too where the line would be too long; what was said is not again."""
    explained = {}
    known = tool.Setting(1, int, "how many", None, "\n  Some\n  words.\n  ")
    assert list(tool.setting_lines("config.a.b", known, explained)) == ["# Some words.", "config.a.b = 1  # how many"]
    assert list(tool.setting_lines("config.c.b", known, explained)) == ["config.c.b = 1  # how many, see a.b"]
    (*above, line) = tool.setting_lines("config.d", known._replace(meaning="many " * 30, about=""), explained)
    assert line == "config.d = 1" and above[0].startswith("# Many many") and len(above) == 2
