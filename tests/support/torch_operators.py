"""The operators of torch that run inside a block of code, and that on a GPU each launch something."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class TorchOperators(TorchDispatchMode):
    """Lists the operators of torch that compute. A mode sees nothing inside the operators that it sees: to list those inside
    ours too, make `registration.unobserved` true, so that ours are called past the dispatcher."""

    ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in self.ALLOCATE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
