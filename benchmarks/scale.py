"""What the method costs at scale: modelled (scale_model.py), simulated, and measured on this machine as far as it goes.

Writes scale.json and scale.png, and prints tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import baselines
import gloo_run
import scale_model as model
import torch
from context import context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_epoch import Encoder, Setting, _seconds, fused, training_step
from timing import gradients_of, side_by_side

VARIATIONS = (0.0, 0.005, 0.01, 0.02, 0.05)
CORRELATIONS = (0.0, 0.5, 0.9, 1.0)
#: Channels of the four stages of a ResNet-18 on this machine.
WIDTHS = ((4, 8, 16, 32), (8, 16, 32, 64), (16, 32, 64, 128), (32, 64, 128, 256))
ROUNDS = 12


def all_reduce() -> dict[str, Any]:
    """Modelled: microseconds by ranks."""
    trees = {name: [model.tree_latency(n, links) for n in model.RANKS] for name, links in model.NETWORKS.items()}
    return {
        "kind": "modelled",
        "ranks": model.RANKS,
        "tree": trees,
        "ring": [model.ring_latency(n) for n in model.RANKS],
        "links": {name: links._asdict() for name, links in model.NETWORKS.items()},
        "ring_links": model.RING._asdict(),
        "added": {  # to a step of 128 ranks, by encoder
            name: {
                str(shape): [model.added_by_processes(shape, p, times[model.RANKS.index(128)]) for p in model.PARAMETERS]
                for shape in model.SHAPES
            }
            for name, times in trees.items()
        },
    }


def waiting() -> dict[str, Any]:
    """Simulated: relative cost of a second wait, by correlation, then ranks, then variation."""
    found = {
        str(correlation): {n: model.second_wait(n, VARIATIONS, correlation=correlation) for n in model.RANKS}
        for correlation in CORRELATIONS
    }
    return {"kind": "simulated", "variations": VARIATIONS, "cost": found, "forward": 1 / 3, "trials": 2000, "seed": 0}


def head_step() -> dict[str, Any]:
    """Modelled: the head step's part of a step, and what it takes beyond sum fusion."""
    rows = {}
    for shape in model.SHAPES:
        shares = [model.head_share(shape, parameters) for parameters in model.PARAMETERS]
        extra = [model.beyond_sum(shape, parameters) for parameters in model.PARAMETERS]
        rows[str(shape)] = {"share": shares, "beyond_sum": extra, "seconds": model.head_seconds(*shape)}
    machine = model.H100._asdict()
    return {"kind": "modelled", "parameters": model.PARAMETERS, "tokens": model.TOKENS, "machine": machine, "shapes": rows}


def encoders_measured() -> dict[str, Any]:
    """Measured: steps with real encoders of several widths, by sum fusion, by the released step and by ours."""
    rows = []
    for hidden in WIDTHS:
        setting = Setting(64, list(hidden), (1, 65, 126), (1, 3, 56, 56), 1, ROUNDS)
        losses = {"sum": baselines.naive, "released": baselines.released, "ours": fused}
        steps = {name: training_step(loss, setting) for name, loss in losses.items()}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(-1, ROUNDS):
            for name, run in steps.items():
                seconds = _seconds(run, setting.steps) / setting.steps
                if turn >= 0:
                    taken[name].append(1e3 * seconds)
        parameters = sum(p.numel() for channels in (1, 3) for p in Encoder(channels, list(hidden)).parameters())
        ratio = {name: _spread([t / s for t, s in zip(times, taken["sum"], strict=True)]) for name, times in taken.items()}
        medians = {name: statistics.median(times) for name, times in taken.items()}
        head = head_alone(hidden[-1])
        row = {"hidden": hidden, "parameters": parameters, "ms": medians, "ratio": ratio, "head_ms": head}
        rows.append(row | {"head_share": head / medians["ours"]})
    return {"kind": "measured", "batch": 64, "classes": 6, "rows": rows}


def head_alone(width: int) -> float:
    """Milliseconds of the head step, forward and backward, at batch 64 and 6 classes."""
    x, y = (torch.randn(64, width, requires_grad=True) for _ in "xy")
    pairs = [(head.weight, head.bias) for head in (torch.nn.Linear(width, 6) for _ in range(3))]
    leaves = [x, y, *(parameter for pair in pairs for parameter in pair)]
    step = gradients_of(fused, leaves, x, y, *pairs, torch.randint(6, (64,)), torch.tensor(0.5))
    return side_by_side({"ours": step}, seconds=2.0)["ours"].p50 / 1e3


def processes_measured() -> dict[str, Any]:
    """Measured: gloo on the cores of this machine, which is no network."""
    return {"kind": "measured", "processes": {n: gloo_run.run_processes(n) for n in (2, 4)}}


def _spread(values: list[float]) -> list[float]:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[1], statistics.median(values), deciles[7]]


def draw(found: dict[str, Any], picture: Path) -> None:
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    _draw_all_reduce(axes[0], found["all_reduce"])
    _draw_waiting(axes[1], found["waiting"], "0.0")
    _draw_waiting(axes[2], found["waiting"], "0.9")
    for name, row in found["head_step"]["shapes"].items():
        axes[3].plot(found["head_step"]["parameters"], row["share"], marker="o", label=name)
    axes[3].set(title="head step's part of a step on an H100 (modelled)", xscale="log", yscale="log", xlabel="parameters")
    rows = found["encoders"]["rows"]
    for name in ("released", "ours"):
        low, middle, high = zip(*(row["ratio"][name] for row in rows), strict=True)
        at = [row["parameters"] for row in rows]
        axes[4].plot(at, middle, marker="o", label=name)
        axes[4].fill_between(at, low, high, alpha=0.2)
    axes[4].axhline(1, color="black", linewidth=0.8)
    axes[4].set(title="a step over one of sum fusion, CPU (measured)", xscale="log", xlabel="parameters")
    processes = found["processes"]["processes"]
    for place, name in enumerate(("all-reduce", "all-reduce, count and share", "step without", "step with")):
        bars = [processes[n][name][1] / 1e3 for n in processes]
        axes[5].bar([n + 0.2 * (place - 1.5) for n in range(len(bars))], bars, width=0.2, label=name)
    axes[5].set(title="gloo on two cores (measured)", ylabel="milliseconds", yscale="log")
    axes[5].set_xticks(range(len(processes)), [f"{n} processes" for n in processes])
    for one in axes:
        one.legend(fontsize=7)
        one.tick_params(labelsize=7)
    figure.savefig(picture, dpi=120)


def _draw_all_reduce(axes: Axes, found: dict[str, Any]) -> None:
    for name, times in found["tree"].items():
        axes.plot(found["ranks"], times, marker="o", label=f"tree, {name}")
    axes.plot(found["ranks"], found["ring"], marker="s", linestyle="--", label="ring, NCCL's constants")
    axes.set(title="all-reduce of 12 bytes (modelled)", xscale="log", yscale="log", xlabel="ranks", ylabel="microseconds")
    axes.set_xticks(found["ranks"], [str(n) for n in found["ranks"]])


def _draw_waiting(axes: Axes, found: dict[str, Any], correlation: str) -> None:
    cost = {int(ranks): row for ranks, row in found["cost"][correlation].items()}
    for place, variation in enumerate(found["variations"]):
        axes.plot(list(cost), [100 * row[place] for row in cost.values()], marker="o", label=f"variation {variation:.1%}")
    axes.set(title=f"a second wait, correlation {correlation} (simulated)", xscale="log", xlabel="ranks", ylabel="% of a step")
    axes.set_xticks(list(cost), [str(n) for n in cost])


def tables(found: dict[str, Any]) -> list[str]:
    """In Markdown, as NOTES.md has them."""
    ranks = found["all_reduce"]["ranks"]
    lines = [_row("µs (modelled)", ranks), _rule(ranks)]
    lines += [_row(f"tree, {name}", [f"{t:.0f}" for t in times]) for name, times in found["all_reduce"]["tree"].items()]
    lines += [_row("ring, NCCL's constants", [f"{t:.0f}" for t in found["all_reduce"]["ring"]]), ""]
    for correlation, cost in found["waiting"]["cost"].items():
        lines += [_row(f"% (simulated), correlation {correlation}", ranks), _rule(ranks)]
        for place, variation in enumerate(found["waiting"]["variations"]):
            lines.append(_row(f"variation {variation:.1%}", [f"{100 * row[place]:.2f}" for row in cost.values()]))
        lines.append("")
    parameters = [f"{p:.0e}" for p in found["head_step"]["parameters"]]
    lines += [_row("share; beyond sum fusion (modelled)", parameters), _rule(parameters)]
    for name, row in found["head_step"]["shapes"].items():
        cells = [f"{100 * s:.2f} %; {100 * e:+.3f} %" for s, e in zip(row["share"], row["beyond_sum"], strict=True)]
        lines.append(_row(name, cells))
    lines += ["", _row("added by the sums of 128 ranks (modelled)", parameters), _rule(parameters)]
    for network, by_shape in found["all_reduce"]["added"].items():
        lines += [_row(f"{network}, {s}", [f"{100 * a:.2f} %" for a in row]) for s, row in by_shape.items()]
    lines += ["", str(found["encoders"]), str(found["processes"])]
    return lines


def _row(name: str, cells: Any) -> str:
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def _rule(cells: Any) -> str:
    return "|---|" + "---:|" * len(cells)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "context": context(),
        "all_reduce": all_reduce(),
        "waiting": waiting(),
        "head_step": head_step(),
        "encoders": encoders_measured(),
        "processes": processes_measured(),
    }
    (folder / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, folder / "scale.png")
    print("\n".join(tables(found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parent / "results", help="of scale.json and scale.png"
    )
    main(parser.parse_args().folder)
