"""The package's version, which pyproject.toml reads here."""

VERSION = "0.2.0"
