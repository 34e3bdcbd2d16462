"""Methods by name: a fusion module, a rule for training it, and their options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from iprm.errors import InputError, check_options, unknown
from iprm.fusion.early import DGL, Concat, Weight
from iprm.fusion.late import Ensemble, Joint, Sum, Unimodal
from iprm.fusion.module import FusionModule, checked_modalities
from iprm.fusion.probe_rebalance import ProbeRebalance

from .mslr import MSLR
from .ogm import OGM
from .rule import Rule

IPRM = "Yang, Wu, Jiang, IJCAI 2025"


class Entry(NamedTuple):
    """The fusion modules and the rule of a named method.

    Attributes:
        fusion: name -> fusion module. If there are several, the option ``fusion`` selects one; the first is the default.
        rule: the training rule.
        fixed: options that the name fixes.
        paper: authors, place and year; empty for a plain baseline.
    """

    fusion: dict[str, type[FusionModule]]
    rule: type[Rule] = Rule
    fixed: Mapping[str, Any] = {}
    paper: str = ""

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options that a user may give, by name, with their defaults."""
        owners = [*self.fusion.values(), self.rule]
        parameters = [p for owner in owners for p in inspect.signature(owner).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return {p.name: p for p in parameters if p.name not in self.fixed}


METHODS = {
    "iprm": Entry({"probe-rebalance": ProbeRebalance}, paper=IPRM),
    "iprm-linear": Entry({"probe-rebalance": ProbeRebalance}, fixed={"mixup": "linear"}, paper=IPRM),
    "iprm-one-pass": Entry({"probe-rebalance": ProbeRebalance}, fixed={"passes": 1}, paper=IPRM),
    "iprm-no-ema": Entry({"probe-rebalance": ProbeRebalance}, fixed={"alpha": 0.0}, paper=IPRM),
    "unimodal": Entry({"unimodal": Unimodal}),
    "concat": Entry({"concat": Concat}),
    "sum": Entry({"sum": Sum}),
    "weight": Entry({"weight": Weight}, paper=IPRM),
    "joint": Entry({"joint": Joint}),
    "ensemble": Entry({"ensemble": Ensemble}),
    "dgl": Entry({"dgl": DGL}, paper="Wei, Luo, Luo, ICCV 2025"),
    "ogm": Entry({"concat": Concat, "sum": Sum}, OGM, {"noise": False}, "Peng et al., CVPR 2022"),
    "ogm-ge": Entry({"concat": Concat, "sum": Sum}, OGM, {"noise": True}, "Peng et al., CVPR 2022"),
    "mslr": Entry({"sum": Sum}, MSLR, paper="Yao and Mihalcea, Findings of ACL 2022"),
}


class Method(NamedTuple):
    """A fusion module and the rule that trains it."""

    fusion: FusionModule
    rule: Rule


def build(
    name: str,
    feature_dim: int | Mapping[str, int],
    num_classes: int,
    modalities: Sequence[str] = ("x", "y"),
    **options: Any,
) -> Method:
    """The fusion module and the rule of a method.

    Args:
        name: a key of `METHODS`, or "unimodal-<modality>".
        feature_dim: width of all modalities' features, or a mapping modality -> width.
        num_classes: C.
        modalities: the modalities of the data. The attribute ``modalities`` of the fusion module holds those that it reads.
        options: keyword arguments of the fusion module and of the rule, except those that the name fixes; and ``fusion``, the
            name of a fusion module, for methods that have several.

    Raises:
        InputError: an unknown method or option (the message suggests the closest), or a required option is missing.
        TypeError, ValueError: an argument of a wrong type or out of its range.
    """
    entry = _entry(name, checked_modalities(modalities, 1))
    chosen = next(iter(entry.fusion))
    if len(entry.fusion) > 1:
        chosen = options.pop("fusion", chosen)
        if chosen not in entry.fusion:
            raise InputError(unknown("fusion", chosen, entry.fusion))
    module = entry.fusion[chosen]
    for option in entry.fixed.keys() & options.keys():
        raise InputError(f"{option}: fixed at {entry.fixed[option]!r} by the method {name!r}, got {options[option]!r}")
    check_options(f"method {name!r}", options, entry.options)
    options = {**entry.fixed, **options}
    fusion = module(feature_dim, num_classes, modalities, **_of(module, options))
    return Method(fusion, entry.rule(fusion.modalities, **_of(entry.rule, options)))


def _entry(name: str, modalities: Sequence[str]) -> Entry:
    if not isinstance(name, str):
        raise TypeError(f"method: expected a name, got {name!r}")
    unimodal = {f"unimodal-{modality}": modality for modality in modalities}
    if name in unimodal:
        return METHODS["unimodal"]._replace(fixed={"modality": unimodal[name]})
    if name not in METHODS:
        raise InputError(f"method: {unknown('name', name, [*METHODS, *unimodal])}")
    return METHODS[name]


def _of(owner: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are parameters of `owner`."""
    parameters = inspect.signature(owner).parameters
    return {name: value for name, value in options.items() if name in parameters}


__all__ = ["METHODS", "Entry", "Method", "Rule", "build"]
