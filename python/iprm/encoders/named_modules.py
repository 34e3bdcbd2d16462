"""Modules by the name of a modality, which may be any text: `torch.nn.ModuleDict` allows neither dots nor names of its own."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView
from typing import Any

from torch import nn

#: Names that `nn.ModuleDict` uses itself, such as "training", "type" and "forward", and what they are registered as.
_TAKEN = {name: f"%{ord(name[0]):02X}{name[1:]}" for name in dir(nn.ModuleDict())}
_NAMES = {registered: name for name, registered in _TAKEN.items()}


def module_name(modality: str) -> str:
    """The name that the module of a modality is registered by: the first part of the names of its parameters.

    Dots and percent signs are percent-encoded (``a.b``: ``a%2Eb``), and so is the first letter of a name that
    `torch.nn.ModuleDict` uses itself (``training``: ``%74raining``). Any other name is unchanged.
    """
    # no regular expression and no cache, which torch.compile cannot trace
    return _TAKEN.get(modality) or modality.replace("%", "%25").replace(".", "%2E")


def modality_name(registered: str) -> str:
    """The reverse of `module_name`."""
    return _NAMES.get(registered) or registered.replace("%2E", ".").replace("%25", "%")


class NamedModules(nn.ModuleDict):
    """`torch.nn.ModuleDict` whose keys may be any text. Parameters are named ``<module_name(key)>.*``."""

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(module_name(key))

    def __setitem__(self, key: str, module: nn.Module) -> None:
        super().__setitem__(module_name(key), module)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(module_name(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().__contains__(module_name(key))

    def keys(self) -> KeysView[str]:
        return self._by_name().keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return self._by_name().items()

    def _by_name(self) -> dict[str, Any]:
        return {modality_name(registered): module for registered, module in super().items()}
