"""Encoders by name or import path: modules that map the input of a modality to features (B, D)."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from iprm.errors import InputError, check_options, check_whole, plain_number, plain_values, unknown

from . import small
from .description import Description, descriptions, each
from .named_modules import NamedModules
from .resnet import resnet18

Factory = Callable[..., nn.Module]
#: name -> a factory, called as ``factory(description, feature_dim, **options)``, which returns a module (B, ...) -> (B, D).
ENCODERS: dict[str, Factory] = {
    "auto": small.auto,
    "cnn": small.cnn,
    "mlp": small.mlp,
    "linear": small.linear,
    "identity": small.identity,
    "resnet18": resnet18,
}
#: Attributes of a module that state the width of its features.
WIDTHS = ("feature_dim", "out_features")


def build_encoders(
    inputs: Mapping[str, Any], feature_dim: int, encoders: Mapping[str, Any]
) -> tuple[NamedModules, dict[str, int]]:
    """One encoder per modality.

    Args:
        inputs: modality -> description of its input, as `description.plain` accepts it.
        feature_dim: width of the features of encoders that do not determine it themselves.
        encoders: modality -> a name of `ENCODERS`, the import path of a subclass of nn.Module, or
            ``{"class_path": either, "init_args": {...}}``. The default is "auto". A class is called with its init_args alone.

    Returns:
        The encoders, and the feature width of each: the first attribute of `WIDTHS` that is an integer, or else the width
        measured on a batch of zeros, in evaluation mode.

    Raises:
        InputError: an unknown modality, encoder or option (the closest is suggested), a class that cannot be imported or is
            not an nn.Module, an encoder that does not accept the input, or a width that cannot be determined.
    """
    feature_dim = check_whole("feature_dim", feature_dim, 1)
    described = descriptions(inputs)
    settings = canonical(encoders)
    for modality in settings:
        if modality not in described:
            raise InputError(unknown("modality in encoders", modality, described))
    built, widths = {}, {}
    for modality, description in described.items():
        try:
            path, options = _parts(settings.get(modality, "auto"))
            with _memory_of_its_own() if "." in path else contextlib.nullcontext():
                built[modality] = _build(description, feature_dim, path, options)
                widths[modality] = feature_width(built[modality], description)
        except InputError as error:
            raise InputError(f"encoder of modality {modality!r}: {error}") from error
    return NamedModules(built), widths


def canonical(encoders: Mapping[str, Any] | None) -> dict[str, Any]:
    """Encoder settings in canonical form: a name or import path, or with arguments a dict of class_path and init_args.

    Raises:
        InputError: a setting is neither, or an argument is not a plain value, as checkpoints require.
    """
    settings: dict[str, Any] = {}
    for modality, setting in (encoders or {}).items():
        given = {"class_path": setting} if isinstance(setting, str) else setting
        path = given.get("class_path") if isinstance(given, Mapping) and set(given) <= {"class_path", "init_args"} else None
        options = (given.get("init_args") or {}) if path else {}
        if not isinstance(path, str) or not isinstance(options, Mapping):
            raise InputError(
                f"encoder of modality {modality!r}: expected a name, an import path, or a mapping of class_path and init_args, "
                f"got {setting!r}"
            )
        try:
            options = json.loads(json.dumps(plain_values(options)))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"encoder of modality {modality!r}: expected init_args of plain values, got {options!r}"
            ) from error
        settings[modality] = {"class_path": path, "init_args": options} if options else path
    return settings


def imported_classes(encoders: Mapping[str, Any] | None) -> dict[str, str]:
    """modality -> import path, for encoders given by import path."""
    paths = {modality: _parts(setting)[0] for modality, setting in canonical(encoders).items()}
    return {modality: path for modality, path in paths.items() if "." in path}


def _parts(setting: Any) -> tuple[str, dict[str, Any]]:
    """Name or import path, and arguments, of a setting in canonical form."""
    return (setting, {}) if isinstance(setting, str) else (setting["class_path"], setting["init_args"])


def _build(description: Description, feature_dim: int, path: str, options: Mapping[str, Any]) -> nn.Module:
    if "." in path:
        cls = _imported(path)
        check_options(path, options, inspect.signature(cls).parameters)
        return cls(**options)
    if path not in ENCODERS:
        raise InputError(unknown("encoder", path, ENCODERS))
    check_options(path, options, dict(list(inspect.signature(ENCODERS[path]).parameters.items())[2:]))
    return ENCODERS[path](description, feature_dim, **options)


def _memory_of_its_own() -> contextlib.AbstractContextManager[Any]:
    """Builds on the CPU instead of the meta device: non-persistent buffers of a class are in no checkpoint."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else contextlib.nullcontext()


def _imported(path: str) -> type[nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{path} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"expected the import path of a subclass of torch.nn.Module, got {path}")
    return cls


def feature_width(module: nn.Module, description: Description) -> int:
    """The feature width D of an encoder: see `build_encoders`.

    Raises:
        InputError: it has no attribute of `WIDTHS`, and its output for a batch of zeros is not of shape (B, D).
    """
    for name in WIDTHS:
        width = getattr(module, name, None)
        if isinstance(number := plain_number(width), int):
            return number
    device = next((x.device for x in itertools.chain(module.parameters(), module.buffers())), None)
    with torch.no_grad(), evaluating(module):
        features = module(each(lambda spec: spec.zeros(2, device), description))
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"expected features (B, D) of a batch of 2 rows, got {found}")
    return features.shape[1]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Sets every submodule to evaluation mode within the context, and restores its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
