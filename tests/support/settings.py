"""The names of all settings."""

from configs import base


def leaves(config, prefix="") -> set[str]:
    names = set()
    for key, value in config.items():
        names |= leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}"}
    return names


KEYS = leaves(base.default())
