"""Converts options given as text, KEY=VALUE, and finds a dataset by its name, import path or configuration file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse

from iprm.configs import load_config, shipped
from iprm.data import DATASETS, construct, dataset_class, make_data, options_of
from iprm.data.module import MultimodalData
from iprm.errors import InputError, unknown

from .parser import one_line


def typed(owner: str, cls: type, known: Iterable[str], given: Mapping[str, str]) -> dict[str, Any]:
    """The values of `given`, converted to the types that `cls.__init__` declares.

    Raises:
        InputError: an option is not in `known` (the message suggests the closest), or a value has another type.
    """
    types = get_type_hints(cls.__init__)  # type: ignore[misc]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for name in known:
        parser.add_argument(f"--{name}", type=types.get(name, Any))
    for name in given:
        if name not in known:
            raise InputError(unknown(f"option of {owner}", name, known))
    try:
        values = parser.parse_args([f"--{name}={text}" for name, text in given.items()]).as_dict()
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{owner}: {one_line(str(error))}") from error
    return {name: values[name] for name in given}


def dataset_options(name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """The options of a dataset: those of its shipped configuration, overridden by `given`.

    Raises:
        InputError: no such dataset or option, or a value of another type.
    """
    cls = dataset_class(name)
    config = load_config(name) if name in shipped() else {}
    return dict(config.get("data", {}).get("init_args", {})) | typed(f"dataset {name!r}", cls, options_of(cls), given)


def dataset_of(name: str, given: Mapping[str, str]) -> MultimodalData:
    """The dataset called `name`, a key of `DATASETS` or a YAML file with a section `data`, with options overridden by `given`.

    Raises:
        InputError: there is no such dataset or file, or its section or an option cannot be used.
    """
    if name in DATASETS:
        return make_data(name, **dataset_options(name, given))
    if not Path(name).is_file():
        raise InputError(f"{unknown('dataset', name, DATASETS)}; nor is there such a file")
    section = load_config(name).get("data")
    path, options = (section.get("class_path"), section.get("init_args") or {}) if isinstance(section, dict) else (None, {})
    if not isinstance(path, str) or not isinstance(options, dict):
        raise InputError(f"{name}: expected a section 'data' with a class_path and init_args, as written by iprm fit")
    try:
        cls = imported_dataset(path)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    texts = {option: value if isinstance(value, str) else json.dumps(value) for option, value in options.items()}
    known = options_of(cls)
    return construct(cls, path, typed(f"dataset {path!r}", cls, known, texts | dict(given)))


def imported_dataset(path: str) -> type[MultimodalData]:
    """The dataset class at an import path.

    Raises:
        InputError: there is none (the message suggests the closest), or it is not a MultimodalData.
    """
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(unknown("dataset", path, [known.replace(":", ".") for known in DATASETS.values()])) from error
    if not (isinstance(cls, type) and issubclass(cls, MultimodalData)):
        raise InputError(f"expected the class_path of a MultimodalData, got {path}")
    return cls
