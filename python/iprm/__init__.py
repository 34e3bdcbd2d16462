"""Probe-and-rebalance multimodal learning: the fusion module, and the trainer built around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iprm.fusion.output import FusionOutput
    from iprm.fusion.probe_rebalance import ProbeRebalance
    from iprm_kernels import __version__

__all__ = ["Balancer", "FusionOutput", "ProbeRebalance", "__version__"]

PLACES = {
    "Balancer": ".methods.balancer",
    "FusionOutput": ".fusion.output",
    "ProbeRebalance": ".fusion.probe_rebalance",
    "__version__": "iprm_kernels",
}


def __getattr__(name: str) -> Any:
    """The public names, with torch, when they are first asked for: `iprm report` and `iprm --help` need neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(PLACES[name], __name__)
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
