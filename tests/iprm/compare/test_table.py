"""The tables of a comparison, from folders made by hand."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
from iprm.compare.runs import read_runs
from iprm.compare.table import ABSENT, Comparison, Table, comparisons, markdown, write
from iprm.names import pair_names
from run_folders import course, write_comparison, write_metrics, write_run, write_test


def comparison(folder: Path) -> Comparison:
    return Comparison(folder, read_runs([folder]))


def cells(folder: Path, method: str) -> dict[str, str]:
    table = comparison(folder).tables[0]
    (row,) = [row for row in table.rows if row[0] == method]
    return dict(zip(table.head, row, strict=True))


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds(tmp_path):
    folder = write_comparison(tmp_path / "c")
    for seed, seconds in ((0, 0.5), (1, 0.7)):
        write_test(folder / f"iprm/seed={seed}", seconds, accuracy=0.8 + seed / 10, map=0.4, macro_f1=0.2, accuracy_audio=0.25)
    weight = course(("video", "audio"), 5, mixes=True)[-1]["weight"]
    assert cells(folder, "iprm") == {
        "method": "iprm",
        "accuracy": "85.0 ±7.1",  # 100 · 0.1 / √2
        "mAP": "40.0 ±0.0",
        "macro-F1": "20.0 ±0.0",
        "video head": ABSENT,
        "audio head": "25.0 ±0.0",
        "λ": f"{weight:.2f} ±0.00",
        "s/epoch": "0.60",
    }


def test_what_a_method_does_not_have_is_a_dash(tmp_path):
    folder = write_comparison(tmp_path / "c", ("unimodal-audio", "iprm"))
    row = cells(folder, "unimodal-audio")
    assert (row["video head"], row["λ"]) == (ABSENT, ABSENT)
    write_test(folder / "iprm/seed=0", None, accuracy=0.5)
    write_test(folder / "iprm/seed=1", None, accuracy=0.5)
    assert cells(folder, "iprm")["s/epoch"] == ABSENT, "a run resumed after its last epoch"


def test_a_single_seed_has_no_deviation(tmp_path):
    assert cells(write_comparison(tmp_path / "c", seeds=[0]), "iprm")["accuracy"] == "60.0"


def test_methods_keep_the_order_of_the_comparison_and_the_best_is_bold(tmp_path):
    table = comparison(write_comparison(tmp_path / "c", ("sum", "iprm", "concat"))).tables[0]
    assert [row[0] for row in table.rows] == ["sum", "iprm", "concat"]
    assert table.bold == {2}


def test_without_a_method_that_weighs_there_is_no_lambda(tmp_path):
    (table,) = comparison(write_comparison(tmp_path / "c", ("concat", "sum"))).tables
    assert "λ" not in table.head


def test_lambda_of_several_pairs_has_a_table_of_its_own_by_the_names_of_the_pairs(tmp_path):
    modalities = ("video", "audio", "text_a")  # a name that contains the separator of column names
    accuracies, weights = comparison(write_comparison(tmp_path / "c", ("sum", "iprm"), modalities=modalities)).tables
    assert "λ" not in accuracies.head
    assert weights.head == ["pair", "iprm"]
    assert [row[0] for row in weights.rows] == ["video × audio", "video × text_a", "audio × text_a"], "in their order"
    last = course(modalities, 5, mixes=True)[-1]
    assert weights.rows[1][1] == f"{last['weight_video_text_a']:.2f} ±0.00"


@pytest.mark.parametrize("recorded", [True, False])
def test_lambda_of_pairs_whose_names_are_escaped(tmp_path, recorded):
    modalities = ("a_b", "c", "a", "b_c")  # a_b and c would have the columns of a and b_c
    folder = write_comparison(tmp_path / "c", ("iprm",), modalities=modalities)
    weights = {f"weight_{name}": 0.01 * k for k, name in enumerate(pair_names(modalities))}
    for run in (folder / "iprm").iterdir():
        write_metrics(
            run / "metrics.csv",
            [{k: v for k, v in course(modalities, 1, mixes=True)[0].items() if "weight" not in k} | weights],
        )
        if not recorded:
            (run / "diagnostics.json").unlink()
    _, table, *_ = comparison(folder).tables
    pairs = [{*row[0].split(" × ")} for row in table.rows]
    assert len(pairs) == 6
    assert all(pair in pairs for pair in ({"a_b", "c"}, {"a", "b_c"}))


def test_of_twelve_modalities_every_pair_has_its_lambda(tmp_path):
    modalities = [f"m{k}" for k in range(12)]
    folder = write_comparison(tmp_path / "c", ("iprm", "iprm-linear"), modalities=modalities)
    _, weights = comparison(folder).tables
    pairs = [f"{a} × {b}" for a, b in itertools.combinations(modalities, 2)]
    assert [row[0] for row in weights.rows] == pairs
    assert weights.head == ["pair", "iprm", "iprm-linear"]
    assert ABSENT not in {cell for row in weights.rows for cell in row}
    write(comparison(folder))
    assert all(pair in (folder / "summary.md").read_text() for pair in pairs)


def test_a_measure_of_a_method_of_its_own_is_carried_by_its_name(tmp_path):
    folder = write_comparison(tmp_path / "c", ("concat", "ogm"))
    for run in (folder / "ogm").iterdir():
        write_metrics(run / "metrics.csv", [{"epoch": 0, "train_loss": 1, "lr-SGD": 0.1, "k_audio": 0.25, "val_accuracy": 0.5}])
    assert comparison(folder).tables[1].rows == [["k_audio", "0.25 ±0.00"]]


# λ at 0 or 1


def one_sided(folder: Path, modalities, **last: float) -> Path:
    """A comparison in which λ of some pairs ends at another value, in the run of seed 0."""
    write_comparison(folder, ("concat", "iprm"), modalities=modalities)
    rows = course(modalities, 5, mixes=True)
    rows[-1] |= last
    write_metrics(folder / "iprm/seed=0/metrics.csv", rows)
    return folder


def test_a_lambda_at_0_or_1_is_said_with_the_modality_that_is_left(tmp_path):
    last = {"weight_video_audio": 0.9951, "weight_video_text": 0.994, "weight_audio_text": 0.0}
    found = comparison(one_sided(tmp_path / "c", ("video", "audio", "text"), **last))
    (note,) = found.notes
    assert note.startswith(
        "iprm: λ ended at 0 or 1 for video × audio (video alone, 1 of 2 runs), audio × text (text alone, 1 of 2 runs)."
    )
    assert "alpha" in note
    write(found)
    assert f"Note: {note}\n" in (tmp_path / "c/summary.md").read_text()


def test_a_lambda_of_two_modalities_is_said_as_well_and_none_is_said_of_others(tmp_path):
    (note,) = comparison(one_sided(tmp_path / "c", ("video", "audio"), weight=0.001)).notes
    assert "video × audio (audio alone, 1 of 2 runs)" in note
    assert comparison(write_comparison(tmp_path / "d")).notes == []


def test_a_note_names_a_few_pairs_and_counts_the_others(tmp_path):
    modalities = [f"m{k}" for k in range(5)]
    last = {f"weight_{a}_{b}": 1.0 for a, b in itertools.combinations(modalities, 2)}
    (note,) = comparison(one_sided(tmp_path / "c", modalities, **last)).notes
    assert note.count("alone") == 6
    assert "4 more" in note


def test_runs_that_are_not_finished_or_failed_are_no_part_of_a_mean_and_are_counted(tmp_path):
    folder = write_comparison(tmp_path / "c", ("sum", "concat", "iprm"))
    (folder / "sum/seed=1/test.json").unlink()
    for seed in (0, 1):
        (folder / f"iprm/seed={seed}/test.json").unlink()
    (folder / "iprm/seed=1/failed.txt").write_text("NonFiniteError: training step 3\n\nTraceback ...")
    found = comparison(folder)
    assert found.title == "features: 2 seeds, 5 epochs; 3 of 6 runs"
    assert [row[:2] for row in found.tables[0].rows] == [["sum", "50.0"], ["concat", "60.5 ±0.7"], ["iprm", ABSENT]]
    assert found.failed == ["iprm, seed 1: NonFiniteError: training step 3"]
    write(found)
    assert "## Failed\n\n- iprm, seed 1: NonFiniteError: training step 3\n" in (folder / "summary.md").read_text()


def test_a_comparison_of_which_no_run_has_ended_has_a_table_of_dashes(tmp_path):
    folder = write_comparison(tmp_path / "c")
    for path in folder.glob("*/*/test.json"):
        path.unlink()
    assert comparison(folder).tables[0].rows == [[m, *[ABSENT] * 6] for m in ("concat", "iprm")]


def test_comparisons_and_single_runs_are_told_apart(tmp_path):
    for name in ("a", "b"):
        write_comparison(tmp_path / name)
    write_run(tmp_path / "digits/fit/version_0")
    assert [c.folder.name for c in comparisons(read_runs([tmp_path]))] == ["a", "b"]


def test_the_markdown_is_a_table():
    table = Table("t", ["method", "a|b"], [["x", "1.0 ±0.5"]])
    assert markdown(table).splitlines() == ["| method | a/b |", "| --- | ---: |", "| x | 1.0 ±0.5 |"]


# files


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_csv_files_hold_what_the_table_is_made_of(tmp_path):
    folder = write_comparison(tmp_path / "c", epochs=2)
    write(comparison(folder))
    runs = rows(folder / "runs.csv")
    assert [(r["method"], r["seed"], r["test_accuracy"], r["best_epoch"]) for r in runs] == [
        ("concat", "0", "0.5", "1"),
        ("concat", "1", "0.51", "1"),
        ("iprm", "0", "0.6", "1"),
        ("iprm", "1", "0.61", "1"),
    ]
    expected = course(("video", "audio"), 2, mixes=True)
    assert [r["weight"] for r in runs] == ["", "", *[str(expected[-1]["weight"])] * 2]
    history = rows(folder / "history.csv")
    assert [(r["method"], r["seed"], r["epoch"]) for r in history] == list(itertools.product(("concat", "iprm"), "01", "01"))
    assert [r["strength_audio"] for r in history[4:6]] == [str(row["strength_audio"]) for row in expected[1::2]]
    assert [r["val_loss"] for r in history[4:6]] == [str(row["val_loss"]) for row in expected[::2]]


def test_the_tables_of_before_are_replaced(tmp_path):
    folder = write_comparison(tmp_path / "c")
    for _ in range(2):
        write(comparison(folder))
    assert len((folder / "summary.md").read_text().splitlines()) == 2 + 2 + 2
    assert len(rows(folder / "runs.csv")) == 4
