"""The linear head step held to the error budget: all outputs and all gradients of one shape and type."""

from __future__ import annotations

import functools
from collections.abc import Callable

import error_budget
import head_oracle
import heads
import pytest
import torch
from error_budget import Truth
from heads import LEAVES, Step
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.convention import EPS
from iprm_kernels.reference.geodesic import slerp_weight


def step_of(inputs: dict, call: Callable[..., ik.StepResult] = heads.call) -> Step:
    return heads.run(inputs, call=call, label_smoothing=0.1, through=("loss", "logits_mix"))


@functools.cache
def truth_of(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[dict, dict[str, Truth]]:
    """Inputs on the CPU, and their expected results."""
    inputs = heads.inputs(batch, width, classes, dtype)
    return inputs, head_oracle.linear_probe_rebalance(inputs, 0.1, heads.weights((batch, classes), dtype).double().numpy())


def magnitudes(
    inputs: dict, truth: dict[str, Truth], through: tuple[str, ...] = ("loss", "logits_mix"), ignore_index: int = -100
) -> dict[str, Tensor]:
    """The size of the terms of each row of each result, to which rounding errors are proportional.

    Losses are sums of logits; rounding of the logits moves a KL by Σ|∂KL/∂logits|, and log ω as much as log KL. through: the
    outputs that were differentiated, weighted by `heads.weights`.
    """
    biases = {name: torch.zeros(len(inputs["weight_x"])) for name in ("bias_x", "bias_y", "bias_mix") if inputs[name] is None}
    inputs = inputs | biases
    i = {name: t.double() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    logits = {m: truth[f"logits_{m}"].high for m in ("mix", "x", "y")}
    batch, classes = logits["mix"].shape
    norms = {m: i[m].norm(dim=1).clamp(min=EPS) for m in "xy"}
    live = {m: torch.where(i[m].norm(dim=1) > EPS, norms[m], torch.inf) for m in "xy"}
    cosine = sum((i["x"] / norms["x"][:, None] * i["y"] / norms["y"][:, None]).T)
    unit = sum(
        slerp_weight(truth["strength"].high[k].expand(batch), cosine)[:, None] * i[m].abs() / norms[m][:, None]
        for k, m in enumerate("xy")
    )
    terms = {m: i[m].abs() @ i[f"weight_{m}"].abs().T + i[f"bias_{m}"].abs() for m in "xy"}
    terms["mix"] = unit @ i["weight_mix"].abs().T + i["bias_mix"].abs()
    rows = {m: value.amax(1) for m, value in terms.items()}

    # |∂/∂logits| by element: a softmax and a label over the batch, and the upstream gradient of the logits
    counted = inputs["target"] != ignore_index
    label = torch.nn.functional.one_hot(torch.where(counted, inputs["target"], 0), classes)
    of_losses = dict(zip(("mix", "x", "y"), heads.weights((3,), torch.float64) * ("losses" in through), strict=True))
    grads = {
        m: (of_losses[m] + ("loss" in through)) * counted[:, None] * (value.softmax(1) + label) / counted.sum()
        + heads.weights((batch, classes), torch.float64) * (f"logits_{m}" in through)
        for m, value in logits.items()
    }
    kl = truth["kl"].high[:, 0]
    kl_terms = torch.stack([(kl[k] / batch).sqrt() * (rows[m] + rows["mix"]).sum() + kl[k] for k, m in enumerate("xy")])
    strength = truth["strength"].high[:, 0]
    means = torch.stack([rows[m].mean() for m in ("mix", "x", "y")])
    return {
        **{f"logits_{m}": value for m, value in rows.items()},
        "loss": means.sum()[None],
        "losses": means,
        "kl": kl_terms,
        "strength": (strength.prod() * (kl_terms / kl).sum() + strength),
        **{m: grads["mix"].norm(dim=1) * i["weight_mix"].norm() / live[m] + (grads[m] @ i[f"weight_{m}"].abs()).amax(1)
           for m in "xy"},
        **{f"weight_{m}": (grads[m].T @ i[m].abs()).amax(1) for m in "xy"},
        "weight_mix": (grads["mix"].T @ unit).amax(1),
        **{f"bias_{m}": grads[m].sum(0) for m in ("mix", "x", "y")},
    }  # fmt: skip


def assert_within_budget(batch: int, width: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """The backend in use against plain torch in two passes and an oracle with more digits."""
    if dtype == torch.float64 and not head_oracle.EXTENDED:
        pytest.skip("long double is double here, too narrow as the truth for float64")
    inputs, truth = truth_of(batch, width, classes, dtype)
    baseline = step_of(inputs, heads.two_pass)
    step = step_of({name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    for name, magnitude in magnitudes(inputs, truth).items():
        kind = "gradients" if name in LEAVES else "outputs"
        value, plain = (getattr(s, kind)[name].reshape(len(magnitude), -1) for s in (step, baseline))
        error_budget.assert_within_budget(name, value, plain, truth[name], magnitude)


def assert_step_within_budget(step: Step) -> None:
    """A step that was run, with its own inputs, options and outputs differentiated, against plain torch in two passes.

    For float64 the truth is the step in long double, which has only the outputs "loss" and "logits_mix".
    """
    inputs = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in step.inputs.items()}
    options, dtype = dict(step.options), inputs["x"].dtype
    through = options.pop("through")
    options.pop("needed")
    baseline = heads.run(inputs, call=heads.two_pass, **step.options)
    if dtype == torch.float64:
        if not head_oracle.EXTENDED:
            pytest.skip("long double is double here, too narrow as the truth for float64")
        assert set(through) <= {"loss", "logits_mix"}
        assert "loss" in through
        upstream = heads.weights(step.outputs["logits_mix"].shape, dtype).numpy() * ("logits_mix" in through)
        truth = head_oracle.linear_probe_rebalance(inputs, options.pop("label_smoothing", 0.0), upstream, **options)
    else:
        double = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}
        exact = heads.run(double, call=heads.two_pass, **step.options)
        values = exact.outputs | {name: t for name, t in exact.gradients.items() if t is not None}
        truth = {name: Truth.of(t.reshape(len(t) if t.dim() else 1, -1)) for name, t in values.items()}
    sizes = magnitudes(inputs, truth, through, options.get("ignore_index", -100))
    for name, size in sizes.items():
        kind = "gradients" if name in LEAVES else "outputs"
        value, plain = getattr(step, kind)[name], getattr(baseline, kind)[name]
        if value is None:
            assert plain is None
            continue
        value, plain = (t.cpu().reshape(len(size), -1) for t in (value, plain))
        untouched = size == 0  # a gradient without elements or rows
        assert (value[untouched] == 0).all(), f"{name}: a gradient where there should be none"
        if not untouched.all():
            error_budget.assert_within_budget(
                name,
                value[~untouched],
                plain[~untouched],
                Truth(truth[name].high.reshape(len(size), -1)[~untouched], truth[name].low.reshape(len(size), -1)[~untouched]),
                size[~untouched],
            )


PAIRS = ((0, 1), (0, 2), (1, 2))


@functools.cache
def three_modalities(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[dict, ...]:
    """Inputs of the steps of all pairs of three modalities, which share features and heads."""
    one, other = heads.inputs(batch, width, classes, dtype), heads.inputs(batch, width, classes, dtype)
    third = {"features": other["x"].flip(0), "weight": -other["weight_y"], "bias": other["bias_x"].flip(0)}
    modalities = (*({"features": one[m], "weight": one[f"weight_{m}"], "bias": one[f"bias_{m}"]} for m in "xy"), third)
    steps = []
    for k, pair in enumerate(PAIRS):
        step = {"target": one["target"], "weight": 0.3 + 0.2 * k}
        step |= {"weight_mix": one["weight_mix"].roll(k, 0), "bias_mix": one["bias_mix"].roll(k, 0)}
        for name, m in zip("xy", pair, strict=True):
            step |= {name: modalities[m]["features"]}
            step |= {f"{what}_{name}": modalities[m][what] for what in ("weight", "bias")}
        steps.append(step)
    return tuple(steps)


def assert_pairs_within_budget(batch: int, width: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """The step of three modalities, whose truth is the sum of three steps of one pair each. Each modality is in two of these,
    so the losses of the modalities count twice."""
    if dtype == torch.float64 and not head_oracle.EXTENDED:
        pytest.skip("long double is double here, too narrow as the truth for float64")
    steps = three_modalities(batch, width, classes, dtype)
    upstream = heads.weights((batch, classes), dtype)
    truths = [head_oracle.linear_probe_rebalance(step, 0.1, upstream.double().numpy()) for step in steps]
    sizes = [magnitudes(step, truth) for step, truth in zip(steps, truths, strict=True)]
    plain = [step_of(step, heads.two_pass) for step in steps]

    def leaves(of: dict, *names: str) -> list[Tensor]:
        return [of[name].detach().to(device).requires_grad_() for name in names]

    first, last = steps[0], steps[2]  # pairs (0, 1) and (1, 2)
    modalities = [leaves(of, m, f"weight_{m}", f"bias_{m}") for of, m in ((first, "x"), (first, "y"), (last, "y"))]
    mixtures = [leaves(step, "weight_mix", "bias_mix") for step in steps]
    probing = torch.tensor([step["weight"] for step in steps], dtype=torch.float64, device=device)
    result = ik.linear_probe_rebalance_pairs(
        [m[0] for m in modalities], [(m[1], m[2]) for m in modalities], [(m[0], m[1]) for m in mixtures],
        first["target"].to(device), probing, label_smoothing=0.1,
    )  # fmt: skip
    (
        2 * result.losses.sum() + result.mix_losses.sum() + (torch.stack(result.mix_logits) * upstream.to(device)).sum()
    ).backward()

    def check(name: str, value: Tensor, baseline: Tensor, truth: Truth, size: Tensor) -> None:
        value, baseline = (t.detach().cpu().reshape(len(size), -1) for t in (value, baseline))
        error_budget.assert_within_budget(name, value, baseline, truth, size)

    for k, (i, j) in enumerate(PAIRS):
        outputs = {
            "logits_mix": result.mix_logits[k], "logits_x": result.logits[i], "logits_y": result.logits[j],
            "kl": result.kl[k], "strength": result.strength[k],
            "losses": torch.stack([result.mix_losses[k], result.losses[i], result.losses[j]]),
        }  # fmt: skip
        for name, value in outputs.items():
            check(f"{name} of pair {k}", value, plain[k].outputs[name], truths[k][name], sizes[k][name])
        for name, leaf in zip(("weight_mix", "bias_mix"), mixtures[k], strict=True):
            check(f"{name} of pair {k}", leaf.grad, plain[k].gradients[name], truths[k][name], sizes[k][name])
    for m, own in enumerate(modalities):
        (k, side), (k2, side2) = ((k, "xy"[pair.index(m)]) for k, pair in enumerate(PAIRS) if m in pair)
        for prefix, leaf in zip(("", "weight_", "bias_"), own, strict=True):
            a, b = prefix + side, prefix + side2
            baseline = plain[k].gradients[a] + plain[k2].gradients[b]
            check(f"{prefix}{m}", leaf.grad, baseline, truths[k][a] + truths[k2][b], sizes[k][a] + sizes[k2][b])
