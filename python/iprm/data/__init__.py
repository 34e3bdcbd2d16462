"""Datasets by name. A dataset is a `MultimodalData` class, imported on first use."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iprm.errors import InputError, check_options, unknown

if TYPE_CHECKING:
    from .module import MultimodalData

#: name -> "module:class". A new dataset is one line here and one file beside this one.
DATASETS = {
    "digits": "iprm.data.datasets.digits:Digits",
    "av-digits": "iprm.data.datasets.av_digits:AvDigits",
    "features": "iprm.data.datasets.features:Features",
}


def dataset_class(name: str) -> type[MultimodalData]:
    """The data module class called `name`.

    Raises:
        InputError: no such dataset; the message suggests the closest.
    """
    if name not in DATASETS:
        raise InputError(unknown("dataset", name, DATASETS))
    module, _, attribute = DATASETS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of the constructor of `cls`, by name."""
    return dict(inspect.signature(cls).parameters)


def make_data(name: str, **options: Any) -> MultimodalData:
    """The dataset called `name`, with its options.

    Raises:
        InputError: no such dataset or option (the message suggests the closest), or a required option is missing.
    """
    return construct(dataset_class(name), name, options)


def construct(cls: type[MultimodalData], name: str, options: Mapping[str, Any]) -> MultimodalData:
    """The dataset of a class, called `name` in messages; see `make_data`."""
    check_options(f"dataset {name!r}", options, options_of(cls))
    return cls(**options)
