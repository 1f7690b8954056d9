"""Where the config files are: configs/ of the repository, or the copy that an installed package brings along.

A config file is a program of the user's: it builds on the package, and the package imports it by name, here alone.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from diffexp_jax.errors import InputError, did_you_mean, first_line

# Folders that have configs/: the repository, and where setup.py puts it in an installed package
_PLACES = (Path(__file__).parents[1], Path(__file__).parent / "_installed")


def package() -> ModuleType:
    """The package `configs`, by which name config files import one another: also a user's own ones, in such a folder.

    Raises:
      InputError: there is none.
    """
    place = next((str(place) for place in _PLACES if (place / "configs" / "base.py").is_file()), None)
    if place is not None and place not in sys.path:
        sys.path.append(place)
        importlib.invalidate_caches()
    try:
        return importlib.import_module("configs")
    except ModuleNotFoundError:
        raise InputError("configs/: no such folder; wants the repository, or the package installed by pip") from None


def module(name: str) -> ModuleType:
    """configs/NAME.py.

    Raises:
      InputError: there is none.
    """
    package()
    try:
        return importlib.import_module(f"configs.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"configs.{name}":
            raise
        accepted = names()
        raise InputError(
            f"configs/{name}.py: no such file; accepted: {', '.join(accepted)}{did_you_mean(name, accepted)}"
        ) from None


@contextlib.contextmanager
def mistakes_in(config: str) -> Iterator[None]:
    """Makes one line of what config files and ml_collections say of an argument or a setting that is not there.

    Raises:
      InputError: it begins with `config`, what the user asked for.
    """
    try:
        yield
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{config}: {first_line(error)}") from None


def names() -> list[str]:
    """The config files that a run can start from: those with `get_config`."""
    return [path.stem for path in _files() if "\ndef get_config(" in path.read_text(encoding="utf-8")]


def located(config: str) -> str:
    """FILE:ARGUMENTS with the file's place; NAME, NAME.py and configs/NAME.py are found from any folder.

    What is no file of configs/ is given back as it is.
    """
    file, colon, arguments = config.partition(":")
    path = Path(file)
    if path.exists() or path.parent not in (Path("."), Path("configs")):
        return config
    found = {known.stem: known for known in _files()}.get(path.name.removesuffix(".py"))
    return f"{found}{colon}{arguments}" if found else config


def _files() -> list[Path]:
    """{name: the file that Python would take}."""
    files = {file.stem: file for folder in reversed(list(package().__path__)) for file in Path(folder).glob("*.py")}
    return sorted(files.values())
