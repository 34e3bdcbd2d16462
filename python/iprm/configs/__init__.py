"""Configurations shipped with the package: `--config digits` reads digits.yaml in this folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from iprm.errors import InputError, unknown


def shipped() -> list[str]:
    """The names of the shipped configurations."""
    return sorted(Path(entry.name).stem for entry in resources.files(__name__).iterdir() if entry.name.endswith(".yaml"))


def find_config(name: str) -> Path:
    """The file that `--config NAME` refers to: an existing path, or else a configuration shipped with the package.

    Raises:
        InputError: `name` is neither; the message suggests the closest shipped name.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).exists() and not Path(name).is_dir():
        raise InputError(f"{name}: expected a file, got a device or pipe")
    if name not in shipped():
        raise InputError(f"{unknown('configuration', name, shipped())}; nor is there such a file")
    return Path(str(resources.files(__name__) / f"{name}.yaml"))


def load_config(name: str) -> dict[str, Any]:
    """Loads a configuration.

    Raises:
        InputError: there is no such configuration, or it is not a YAML mapping.
    """
    import yaml

    path = find_config(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    return content
