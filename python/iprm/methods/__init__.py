"""All fusion methods by name, with one interface: `build`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from iprm.fusion.early import Concat, Weight
from iprm.fusion.late import Joint, Sum, Unimodal
from iprm.fusion.module import FusionModule, checked_modalities
from iprm.fusion.probe_rebalance import ProbeRebalance


class Method(NamedTuple):
    """A fusion module and the options that make it this method."""

    module: type[FusionModule]
    options: dict[str, Any]


METHODS = {
    "iprm": Method(ProbeRebalance, {}),
    "iprm-linear": Method(ProbeRebalance, {"mixup": "linear"}),
    "iprm-one-pass": Method(ProbeRebalance, {"passes": 1}),
    "iprm-no-ema": Method(ProbeRebalance, {"alpha": 0.0}),
    "unimodal": Method(Unimodal, {}),
    "concat": Method(Concat, {}),
    "sum": Method(Sum, {}),
    "weight": Method(Weight, {}),
    "joint": Method(Joint, {}),
}


def build(
    name: str,
    feature_dim: int | Mapping[str, int],
    num_classes: int,
    modalities: Sequence[str] = ("x", "y"),
    **options: Any,
) -> FusionModule:
    """The fusion module of a method.

    Args:
        name: a key of `METHODS`, or "unimodal-<modality>".
        feature_dim: width of all modalities' features, or a mapping modality -> width.
        num_classes: C.
        modalities: the modalities of the data. The module's own ``modalities`` are those it reads.
        options: keyword arguments of the method's module, less those that its name fixes.

    Raises:
        ValueError: an unknown method, or an argument out of its range.
        TypeError: an option that the method does not take or is missing.
    """
    if not isinstance(name, str):
        raise TypeError(f"method: expected a name, got {name!r}")
    unimodal = {f"unimodal-{modality}": modality for modality in checked_modalities(modalities, 1)}
    if name in unimodal:
        method = Method(Unimodal, {"modality": unimodal[name]})
    elif name in METHODS:
        method = METHODS[name]
    else:
        raise ValueError(f"method: {_unknown(name, [*METHODS, *unimodal])}")
    parameters = inspect.signature(method.module).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in method.options]
    for option in options:
        if option in method.options:
            raise TypeError(f"{option}: fixed at {method.options[option]!r} by the method {name!r}, got {options[option]!r}")
        if option not in [p.name for p in keywords]:
            raise TypeError(f"option of {name!r}: {_unknown(option, [p.name for p in keywords])}")
    for keyword in keywords:
        if keyword.default is keyword.empty and keyword.name not in options:
            raise TypeError(f"{keyword.name}: {name!r} needs this option")
    return method.module(feature_dim, num_classes, modalities, **method.options, **options)


def _unknown(value: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(value, known, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected one of {', '.join(known) or 'none'}, got {value!r}{suggestion}"


__all__ = ["METHODS", "Concat", "Joint", "Method", "Sum", "Unimodal", "Weight", "build"]
