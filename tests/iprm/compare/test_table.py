"""The report of a comparison from results made by hand."""

from __future__ import annotations

import csv

import pytest
from iprm.compare.figures import plot
from iprm.compare.run import Result
from iprm.compare.table import ABSENT, Summary, rich_table, write_report
from matplotlib.figure import Figure
from rich.console import Console


def result(method: str, seed: int, accuracy: float, seconds: float = 0.5, **last) -> Result:
    """One run of two epochs; what was logged in the second is `last`, in the first half of it."""
    test = {"accuracy": accuracy, "map": accuracy / 2, "macro_f1": accuracy / 4, "accuracy_x": 0.25}
    if not method.startswith("unimodal"):
        test["accuracy_y"] = 0.5
    history = [{"epoch": epoch} | {name: value / (2 - epoch) for name, value in last.items()} for epoch in (0, 1)]
    return Result(method, seed, test, 1, seconds, history)


RESULTS = [
    result("unimodal-x", 0, 0.5),
    result("unimodal-x", 1, 0.7, seconds=0.7),
    result("iprm", 0, 0.8, weight=0.25, strength_x=0.3, strength_y=0.7),
    result("iprm", 1, 0.9, weight=0.35, strength_x=0.4, strength_y=0.6),
]


def summary(results=RESULTS) -> Summary:
    return Summary(results, ("x", "y"))


def cells(method: str, results=RESULTS) -> dict[str, str]:
    table = summary(results)
    return dict(zip(table.columns, table.cells(method), strict=True))


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds():
    assert cells("iprm") == {
        "accuracy": "85.0 ±7.1",  # 100 · 0.1 / √2
        "mAP": "42.5 ±3.5",
        "macro-F1": "21.2 ±1.8",
        "x head": "25.0 ±0.0",
        "y head": "50.0 ±0.0",
        "λ": "0.30 ±0.07",
        "s/epoch": "0.50",
    }


def test_what_a_method_does_not_have_is_a_dash():
    row = cells("unimodal-x")
    assert (row["y head"], row["λ"]) == (ABSENT, ABSENT)
    assert row["s/epoch"] == "0.60"


def test_a_single_seed_has_no_deviation():
    assert cells("iprm", RESULTS[2:3])["accuracy"] == "80.0"
    assert cells("iprm", RESULTS[2:3])["λ"] == "0.25"


def test_lambda_of_several_pairs_has_a_column_each():
    pairs = [result("iprm", 0, 0.8, weight_0=0.1, weight_1=0.2, weight_2=0.3)]
    assert [name for name in summary(pairs).columns if name.startswith("λ")] == ["λ 0", "λ 1", "λ 2"]
    assert cells("iprm", pairs)["λ 2"] == "0.30"


def test_without_a_method_that_weighs_there_is_no_column_of_lambda():
    assert "λ" not in summary(RESULTS[:2]).columns


def test_methods_keep_their_order_and_the_best_is_bold():
    table = rich_table(summary(), "title")
    assert [row.style for row in table.rows] == [None, "bold"]
    console = Console(width=100, record=True)
    console.print(table)
    text = console.export_text()
    assert text.index("unimodal-x") < text.index("iprm")
    assert "85.0 ±7.1" in text


@pytest.fixture
def report(tmp_path):
    write_report(tmp_path / "deep/report", RESULTS, ("x", "y"), {"data": "none"}, "title")
    return tmp_path / "deep/report"


def test_the_markdown_is_a_table_under_its_title(report):
    assert (report / "summary.md").read_text(encoding="utf-8").splitlines() == [
        "# title",
        "",
        "| method | accuracy | mAP | macro-F1 | x head | y head | λ | s/epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| unimodal-x | 60.0 ±14.1 | 30.0 ±7.1 | 15.0 ±3.5 | 25.0 ±0.0 | – | – | 0.60 |",
        "| iprm | 85.0 ±7.1 | 42.5 ±3.5 | 21.2 ±1.8 | 25.0 ±0.0 | 50.0 ±0.0 | 0.30 ±0.07 | 0.50 |",
    ]


def test_the_csv_files_hold_what_the_table_is_made_of(report):
    with (report / "runs.csv").open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["test_accuracy"], row["weight"]) for row in runs] == [
        ("unimodal-x", "0", "0.5", ""),
        ("unimodal-x", "1", "0.7", ""),
        ("iprm", "0", "0.8", "0.25"),
        ("iprm", "1", "0.9", "0.35"),
    ]
    with (report / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    unweighted, weighted = [("0", ""), ("1", "")] * 2, [("0", "0.35"), ("1", "0.7"), ("0", "0.3"), ("1", "0.6")]
    assert [(row["epoch"], row["strength_y"]) for row in history] == unweighted + weighted


def test_a_second_report_replaces_the_first(report):
    write_report(report, RESULTS[:1], ("x", "y"), {"data": "none"}, "again")
    assert (report / "summary.md").read_text(encoding="utf-8").startswith("# again\n")
    assert len((report / "runs.csv").read_text(encoding="utf-8").splitlines()) == 2


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws results -> the two panels of the plot."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def draw(results):
        plot(tmp_path / "plot.png", summary(results), results, "title")
        return figures.pop().axes

    return draw


def test_the_plot_has_the_accuracy_of_every_method_and_the_course_of_lambda_and_omega(drawn):
    scores, course = drawn(RESULTS)
    assert [label.get_text() for label in scores.get_yticklabels()] == ["unimodal-x", "iprm"]
    drawn_seeds = [list(line.get_xdata()) for line in scores.lines if line.get_label().startswith("_child")]
    assert [50, 70] in drawn_seeds
    assert [80, 90] in drawn_seeds
    lines = {line.get_label(): list(line.get_ydata()) for line in course.lines}
    assert list(lines) == ["iprm: λ", "iprm: ω x", "iprm: ω y"]
    assert lines["iprm: λ"] == pytest.approx([0.15, 0.3])
    assert lines["iprm: ω y"] == pytest.approx([0.325, 0.65])


def test_without_a_method_that_weighs_the_plot_says_so(drawn):
    _, course = drawn(RESULTS[:2])
    assert [text.get_text() for text in course.texts] == ["none of these methods weighs modalities"]
