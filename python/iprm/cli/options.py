"""Options that come as text, KEY=VALUE, and a dataset from its name or from a configuration."""

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


def typed(owner: str, cls: type, known: Iterable[str], given: Mapping[str, str]) -> dict[str, Any]:
    """The values of `given`, converted to the types that `cls.__init__` declares.

    Raises:
        InputError: an option that is none of `known` (the closest is suggested), or a value of another type.
    """
    types = get_type_hints(cls.__init__)  # type: ignore[misc]
    values = {}
    for name, text in given.items():
        if name not in known:
            raise InputError(unknown(f"option of {owner}", name, known))
        kind = types.get(name, Any)
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=kind)
        try:
            values[name] = parser.parse_args([f"--value={text}"]).as_dict()["value"]
        except jsonargparse.ArgumentError as error:
            raise InputError(f"{name}: expected {_type_name(kind)}, got {text!r}") from error
    return values


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def dataset_options(name: str, given: Mapping[str, str]) -> dict[str, Any]:
    """What the shipped configuration of a dataset says of its options, changed by `given`.

    Raises:
        InputError: no such dataset or option, or a value of another type.
    """
    cls = dataset_class(name)
    config = load_config(name) if name in shipped() else {}
    return dict(config.get("data", {}).get("init_args", {})) | typed(f"dataset {name!r}", cls, options_of(cls), given)


def dataset_of(name: str, given: Mapping[str, str]) -> MultimodalData:
    """The dataset that `name` means, a name of `DATASETS` or a YAML file with a section `data`, with its options changed by
    `given`.

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
        raise InputError(f"{name}: expected a section 'data' with a class_path and init_args, as iprm fit writes it")
    cls = _imported(name, path)
    texts = {option: value if isinstance(value, str) else json.dumps(value) for option, value in options.items()}
    known = options_of(cls)
    return construct(cls, path, typed(f"dataset {path!r}", cls, known, texts | dict(given)))


def _imported(file: str, path: str) -> type[MultimodalData]:
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        paths = [dataset.replace(":", ".") for dataset in DATASETS.values()]
        raise InputError(f"{file}: {unknown('dataset', path, paths)}") from error
    if not (isinstance(cls, type) and issubclass(cls, MultimodalData)):
        raise InputError(f"{file}: expected the class_path of a MultimodalData, got {path}")
    return cls
