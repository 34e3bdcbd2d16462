"""Every public operator with its arguments by name, so that each argument can be replaced by one that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import heads
import torch
import torch.nn.functional as F
from torch import Tensor

import iprm_kernels as ik

B, D, C = 3, 5, 4
MIXTURES = ("mix_heads[0]", "mix_heads[1]", "mix_heads[2]")
MODALITIES = ("heads[0]", "heads[1]", "heads[2]")


class Call(NamedTuple):
    """An operator and valid arguments, by the names that its errors use."""

    run: Callable[[dict[str, Any]], Any]
    arguments: dict[str, Any]

    def with_argument(self, name: str, value: Any) -> Callable[[], Any]:
        return lambda: self.run(self.arguments | {name: value})

    @property
    def names(self) -> tuple[str, ...]:
        """All argument names that an error may begin with."""
        return (*self.arguments, *{name.split(" ")[0] for name in self.arguments}, "features", "heads", "mix_heads")


def _head(of: dict[str, Any], name: str) -> tuple[Any, Any]:
    return of[f"{name} weight"], of[f"{name} bias"]


def _probe(of: dict[str, Any]) -> Any:
    return ik.probe_rebalance(
        of["x"], of["y"], of["logits_x"], of["logits_y"], of["head"], of["weight"], group=of["group"]
    )  # fmt: skip


def _options(of: dict[str, Any]) -> dict[str, Any]:
    return {name: of[name] for name in ("label_smoothing", "ignore_index", "group")}


def _step(of: dict[str, Any]) -> Any:
    three = (_head(of, name) for name in ("head_x", "head_y", "head_mix"))
    return ik.linear_probe_rebalance(of["x"], of["y"], *three, of["target"], of["weight"], **_options(of))


def _pairs(of: dict[str, Any]) -> Any:
    features = [of[f"features[{k}]"] for k in range(3)]
    own, mixing = ([_head(of, name) for name in names] for names in (MODALITIES, MIXTURES))
    return ik.linear_probe_rebalance_pairs(features, own, mixing, of["target"], of["weight"], pairs=of["pairs"], **_options(of))


def calls(dtype: torch.dtype) -> dict[str, Call]:
    """The operators with small ordinary arguments of `dtype`."""
    made = heads.inputs(B, D, C, dtype)
    x, y = made["x"], made["y"]
    p, q = cases.logit_pairs(B, C, dtype)
    weight, bias = made["weight_x"], made["bias_x"]
    options = {"target": made["target"], "weight": 0.3, "label_smoothing": 0.1, "ignore_index": -100, "group": None}

    def linear(*names: str) -> dict[str, Tensor]:
        return {f"{name} {what}": t for name in names for what, t in (("weight", weight), ("bias", bias))}

    def head(z: Tensor) -> Tensor:
        return F.linear(z, weight, bias)

    return {
        "normalize": Call(lambda of: ik.normalize(of["x"], eps=of["eps"]), {"x": x, "eps": 1e-12}),
        "geodesic_mixup": Call(
            lambda of: ik.geodesic_mixup(of["x"], of["y"], of["weight"], eps=of["eps"]),
            {"x": x, "y": y, "weight": torch.tensor(0.3, dtype=dtype), "eps": 1e-12},
        ),
        "batch_kl": Call(
            lambda of: ik.batch_kl(of["p_logits"], of["q_logits"], reduction=of["reduction"]),
            {"p_logits": p, "q_logits": q, "reduction": "mean"},
        ),
        "strength_weights": Call(lambda of: ik.strength_weights(of["kl"]), {"kl": p[0].abs()}),
        "probe_rebalance": Call(
            _probe, {"x": x, "y": y, "logits_x": p, "logits_y": q, "head": head, "weight": 0.3, "group": None}
        ),
        "linear_probe_rebalance": Call(_step, {"x": x, "y": y, **linear("head_x", "head_y", "head_mix"), **options}),
        "linear_probe_rebalance_pairs": Call(
            _pairs,
            {f"features[{k}]": t for k, t in enumerate((x, y, x))} | linear(*MODALITIES, *MIXTURES) | options | {"pairs": None},
        ),
    }
