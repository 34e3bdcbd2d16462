"""`iprm report`: what the file says of runs, whole ones and broken ones, and what it must not hold."""

from __future__ import annotations

import html
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from command import iprm
from hypothesis import given
from hypothesis import strategies as st
from iprm.html.charts import COLOURS, percent
from iprm.html.runs import read_runs
from iprm.html.svg import ticks
from iprm.suggest import InputError
from run_folders import course, write_metrics, write_run


def report(folder: Path, *runs: Path) -> str:
    """The file that `iprm report RUNS` writes in `folder`."""
    code, out, err = iprm(folder, "report", *map(str, runs))
    assert (code, err) == (0, "")
    assert out.endswith("report: report.html\n")
    return (folder / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def cards(page: str) -> list[tuple[str, str]]:
    """Title and content of every card with a title, in order."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL)
    return [(html.unescape(title), content) for title, content in found]


def card(page: str, title: str) -> str:
    (content,) = [content for name, content in cards(page) if name == title]
    return content


def titles(page: str) -> list[str]:
    return [title for title, _ in cards(page)]


def hovers(content: str) -> list[str]:
    """What is said of each place of a chart when it is pointed at."""
    svg = re.search(r"<svg viewBox.*?</svg>", content, re.DOTALL)[0]
    return [element.text for element in ElementTree.fromstring(svg).iter("title")]


def rows(content: str) -> list[list[str]]:
    """The cells of the rows of all tables."""
    found = re.findall(r"<tr>(.*?)</tr>", content, re.DOTALL)
    return [[html.unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in found]


def figures(page: str) -> dict[str, str]:
    """The figures at the head of a report of one run."""
    return {html.unescape(name): value for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)}


# one run


def test_the_head_says_how_the_run_went_at_its_best_epoch(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    row = course(("video", "audio"), 5, mixes=True)[-2:]
    assert figures(page) == {
        "method": "iprm",
        "seed": "0",
        "best epoch": "4",
        "val accuracy": percent(row[0]["val_accuracy"]),
        "video head": percent(row[0]["val_accuracy_video"]),
        "audio head": percent(row[0]["val_accuracy_audio"]),
        "mixture": percent(row[0]["val_accuracy_mix"]),
        "λ video × audio": f"{row[1]['weight']:.3f}",
        "last ω video × audio": f"{row[1]['strength_video']:.3f} / {row[1]['strength_audio']:.3f}",
        "epochs": "5",
        "data": "Features",
    }


def test_every_epoch_tells_the_values_of_every_head_in_validation_and_training(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    expected = course(("video", "audio"), 5, mixes=True)
    accuracy = hovers(card(page, "Accuracy"))
    assert len(accuracy) == 5
    for epoch, (validation, training) in enumerate(zip(expected[::2], expected[1::2], strict=True)):
        assert accuracy[epoch].splitlines() == [
            f"epoch {epoch}",
            *(
                f"{head}: {percent(validation[f'val_accuracy{suffix}'])} "
                f"(training {percent(training[f'train_accuracy{suffix}'])})"
                for suffix, head in (("", "fusion"), ("_video", "video head"), ("_audio", "audio head"), ("_mix", "mixture"))
            ),
        ]
        omega = [f"ω {name}: {training[f'strength_{name}']:.3f}" for name in ("video", "audio")]
        assert hovers(card(page, "λ and ω"))[epoch].splitlines()[1:] == [*omega, f"λ: {training['weight']:.3f}"]
        losses = f"loss: {validation['val_loss']:.3f} (training {training['train_loss']:.3f})"
        assert hovers(card(page, "Loss"))[epoch].splitlines()[1:] == [losses]


def test_the_confusion_matrix_has_a_cell_for_every_count_that_is_not_zero(tmp_path):
    content = card(report(tmp_path, write_run(tmp_path / "version_0")), "Confusion matrix")
    assert sorted(hovers(content)) == sorted(
        [f"{k} as {k}: 5 of 6 (83.3 %)" for k in range(4)] + [f"{k} as {(k + 1) % 4}: 1 of 6 (16.7 %)" for k in range(4)]
    )
    assert "Most often taken for another: 0 as 1 (1 of 6)" in content


def test_angles_and_strength_by_class_are_those_recorded(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    assert "60° to 65°\nvideo × audio: 24" in hovers(card(page, "Angle between the modalities"))
    assert "Mean 63.0°" in card(page, "Angle between the modalities")
    bars = hovers(card(page, "ω by class: video × audio"))
    assert bars[0] == "class 0 (6 samples)\nω video: 0.200\nω audio: 0.800"
    assert len(bars) == 4
    assert "20 of 24 samples right, with the weights best on validation (epoch 2)" in page


def test_of_three_modalities_every_pair_has_its_charts_in_the_order_of_the_modalities(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0", modalities=("video", "audio", "text")))
    pairs = ["video × audio", "video × text", "audio × text"]
    assert titles(page) == [
        "Accuracy",
        "Loss",
        *(f"λ and ω: {pair}" for pair in pairs),
        "Confusion matrix",
        "Angle between the modalities",
        *(f"ω by class: {pair}" for pair in pairs),
    ]
    assert "ω audio: 0.4" in hovers(card(page, "λ and ω: audio × text"))[0]


@pytest.mark.parametrize("method", ["concat", "unimodal-audio"])
def test_a_run_without_iprm_has_no_lambda(tmp_path, method):
    modalities = ("audio",) if method == "unimodal-audio" else ("audio", "video")
    page = report(tmp_path, write_run(tmp_path / "version_0", method=method, modalities=modalities))
    angles = ["Angle between the modalities"] if len(modalities) > 1 else []
    assert titles(page) == ["Accuracy", "Loss", "Confusion matrix", *angles]
    assert "λ" not in page
    assert "ω" not in page


def test_settings_and_environment_are_there_and_folded_away(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    details = [attributes for tag, attributes in Tags(page).elements if tag == "details"]
    assert details == [{}, {}]
    settings, environment = page.split("<details>")[1:]
    assert ["model.learning_rate", "0.01"] in rows(settings)
    assert {"versions.torch": "2.13.0", "platform": "Linux-of-the-tests", "backends.cpu": "cpp"}.items() <= dict(
        rows(environment)
    ).items()


def test_a_real_run_is_read_whole(tmp_path, features):
    assert iprm(tmp_path, "fit", "--config", "features", "--data.path", features, "--trainer.max_epochs", "2").code == 0
    run = tmp_path / "runs/features/fit/version_0"
    page = report(tmp_path, run)
    assert read_runs([run])[0].missing == []
    assert figures(page)["epochs"] == "2"
    assert titles(page) == [
        "Accuracy",
        "Loss",
        "λ and ω",
        "Confusion matrix",
        "Angle between the modalities",
        "ω by class: audio × text",
    ]


# several runs


def several(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "fit/version_0"),
        write_run(tmp_path / "fit/version_1", method="concat", settings={"learning_rate": 0.1}),
        write_run(tmp_path / "fit/version_2", seed=1, epochs=7),
    ]


def summary(page: str) -> list[dict[str, str]]:
    head, *body = rows(re.search(r'<table class="summary">.*?</table>', page, re.DOTALL)[0])
    return [dict(zip(head, row, strict=True)) for row in body]


def test_the_summary_has_a_row_a_run(tmp_path):
    table = summary(report(tmp_path, *several(tmp_path)))
    assert [row["run"] for row in table] == ["version_0", "version_1", "version_2"]
    assert [row["method"] for row in table] == ["iprm", "concat", "iprm"]
    assert [row["seed"] for row in table] == ["0", "0", "1"]
    assert [row["best epoch"] for row in table] == ["4", "4", "6"]
    assert [row["λ video × audio"] == "–" for row in table] == [False, True, False]
    assert [row["mixture"] == "–" for row in table] == [False, True, False]


def test_the_best_accuracy_on_the_same_data_is_in_bold_and_of_different_data_none_is(tmp_path):
    page = report(tmp_path, *several(tmp_path))
    best = percent(course(("video", "audio"), 7, mixes=True)[-2]["val_accuracy"])
    assert re.findall(r'<td class="number best">(.*?)</td>', page) == [best]
    other = write_run(tmp_path / "fit/version_3", data="iprm.data.digits.Digits")
    assert 'number best"' not in report(tmp_path, *several(tmp_path / "again"), other)


def test_runs_are_told_apart_by_colour_in_a_chart_a_quantity_and_have_their_own_matrix_and_angles(tmp_path):
    page = report(tmp_path, *several(tmp_path))
    assert titles(page) == [
        "Accuracy of the fusion",
        "Accuracy of the video head",
        "Accuracy of the audio head",
        "Accuracy of the mixture",
        "Loss",
        "λ of video, against audio",
        "ω of video, against audio",
        *("Confusion matrix", "Angle between the modalities", "ω by class: video × audio"),
        *("Confusion matrix", "Angle between the modalities"),
        *("Confusion matrix", "Angle between the modalities", "ω by class: video × audio"),
    ]
    fusion = card(page, "Accuracy of the fusion")
    assert {f"line c{run} d0{thin}" for run in range(3) for thin in ("", " thin")} == set(
        re.findall('class="(line.*?)"', fusion)
    )
    assert "concat · seed 0: " in hovers(fusion)[0]
    assert "Not in: concat · seed 0." in card(page, "Accuracy of the mixture")
    assert len(hovers(fusion)) == 7


def test_what_differs_in_the_settings_comes_first(tmp_path):
    settings = report(tmp_path, *several(tmp_path)).split("<details>")[1]
    differing, shared = settings.split("The same in all")
    assert rows(differing) == [
        ["", "iprm · seed 0", "concat · seed 0", "iprm · seed 1"],
        ["model.learning_rate", "0.01", "0.1", "0.01"],
        ["model.method", "iprm", "concat", "iprm"],
        ["seed_everything", "0", "0", "1"],
        ["trainer.max_epochs", "5", "5", "7"],
    ]
    assert ["data.init_args.batch_size", "64"] in rows(shared)


def test_runs_of_different_data_and_modalities_share_a_report(tmp_path):
    runs = [
        write_run(tmp_path / "digits/version_0", modalities=("image", "strip"), data="iprm.data.digits.Digits"),
        write_run(tmp_path / "features/version_0", modalities=("video", "audio", "text"), classes=70),
    ]
    page = report(tmp_path, *runs)
    table = summary(page)
    assert [row["run"] for row in table] == ["digits/version_0", "features/version_0"]
    assert [row["data"] for row in table] == ["Digits", "Features"]
    assert table[0]["text head"] == table[1]["strip head"] == "–"
    assert {"Accuracy of the strip head", "Accuracy of the text head", "λ of image, against strip"} <= set(titles(page))
    assert "iprm · seed 0 · digits/version_0" in page, "method and seed do not tell them apart"


def test_a_run_named_twice_is_shown_once(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert len(read_runs([run, run / "../version_0"])) == 1


def test_more_runs_than_colours_are_dashed(tmp_path):
    runs = [write_run(tmp_path / f"version_{k}", seed=k) for k in range(COLOURS + 2)]
    styles = re.findall('class="(line c. d.)"', card(report(tmp_path, *runs), "Accuracy of the fusion"))
    assert len(set(styles)) == len(runs)


# runs that are not whole


def without(name: str):
    return lambda run: (run / name).unlink()


def cut(run: Path) -> None:
    text = (run / "metrics.csv").read_text()
    lines = text.splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:5]) + lines[5][:20])


def rewritten(name: str, content: str):
    return lambda run: (run / name).write_text(content)


def recorded_otherwise(**values: object):
    def rewrite(run: Path) -> None:
        record = json.loads((run / "diagnostics.json").read_text())
        (run / "diagnostics.json").write_text(json.dumps(record | values))

    return rewrite


def no_checkpoint(run: Path) -> None:
    next((run / "checkpoints").iterdir()).unlink()


WANTING = {
    "no diagnostics": (without("diagnostics.json"), "No diagnostics.json, which is written at the end of training"),
    "no metrics": (without("metrics.csv"), "No metrics.csv: no epoch has ended yet."),
    "no config": (without("config.yaml"), "No config.yaml: method, seed and settings are not known."),
    "no checkpoint": (no_checkpoint, "No checkpoint in checkpoints/."),
    "a line that is being written": (cut, "The last line of metrics.csv is incomplete and left out."),
    "epochs to come": (cut, "2 of 5 epochs: still running, or stopped early."),
    "a header alone": (rewritten("metrics.csv", "epoch,step,val_loss\n"), "metrics.csv holds no epoch yet."),
    "an empty file": (rewritten("metrics.csv", ""), "metrics.csv holds no epoch yet."),
    "a config that is no YAML": (rewritten("config.yaml", "model: [\n"), "config.yaml cannot be read: "),
    "a config that is a list": (rewritten("config.yaml", "- 1\n"), "config.yaml holds no settings."),
    "half of the diagnostics": (rewritten("diagnostics.json", '{"num_cl'), "diagnostics.json cannot be read: JSONDecodeError"),
    "counts that do not add up": (
        recorded_otherwise(class_counts=[6, 6, 6, 7]),
        "diagnostics.json cannot be read: ValueError: confusion: its rows are expected to sum to class_counts",
    ),
    "another number of classes": (recorded_otherwise(num_classes=2), "diagnostics.json cannot be read: ValueError: confusion"),
    "angles without bins": (
        recorded_otherwise(angles=[{"pair": ["a", "b"], "counts": [], "mean": 1, "undirected": 0}]),
        "diagnostics.json cannot be read: ValueError: angles: expected some bins, got 0",
    ),
    "unknown weights": (recorded_otherwise(weights={}), "diagnostics.json cannot be read: KeyError: 'from'"),
    "other diagnostics": (rewritten("diagnostics.json", "[]"), "diagnostics.json cannot be read: TypeError"),
}


@pytest.mark.parametrize(("harm", "word"), WANTING.values(), ids=WANTING.keys())
def test_a_report_says_what_is_missing_alone_and_beside_another_run(tmp_path, harm, word):
    run = write_run(tmp_path / "version_0")
    harm(run)
    assert any(missing.startswith(word) for missing in read_runs([run])[0].missing)
    for runs in ([run], [run, write_run(tmp_path / "version_1")]):
        assert word in Tags(report(tmp_path, *runs)).text


def test_a_whole_run_misses_nothing(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert read_runs([run])[0].missing == []
    assert 'class="missing"' not in report(tmp_path, run)


def test_a_run_that_has_only_begun_gives_a_report(tmp_path):
    run = tmp_path / "version_0"
    run.mkdir()
    (run / "config.yaml").write_text("seed_everything: 3\nmodel: {method: iprm}\n")
    page = report(tmp_path, run)
    assert figures(page) == {"method": "iprm", "seed": "3", "best epoch": "–", "val accuracy": "–", "epochs": "0", "data": "–"}
    assert "No epoch yet." in page
    assert "Nothing recorded." in page


def test_one_epoch_is_drawn_as_dots(tmp_path):
    content = card(report(tmp_path, write_run(tmp_path / "version_0", epochs=1)), "Accuracy")
    assert len(re.findall("<circle", content)) == 8, "four heads, in validation and in training"
    assert len(hovers(content)) == 1


def test_three_modalities_without_diagnostics_have_pairs_by_number(tmp_path):
    run = write_run(tmp_path / "version_0", modalities=("video", "audio", "text"))
    (run / "diagnostics.json").unlink()
    assert [pair.name for pair in read_runs([run])[0].pairs] == [f"pair {n} first × pair {n} second" for n in range(3)], (
        "metrics.csv orders its columns by name, so the order of the modalities is lost"
    )


def test_an_epoch_that_is_not_validated_yet_is_drawn_of_training_alone(tmp_path):
    run = write_run(tmp_path / "version_0")
    write_metrics(run / "metrics.csv", [{"epoch": 0, "train_loss": 1.5}])
    assert hovers(card(report(tmp_path, run), "Loss")) == ["epoch 0\nloss: training 1.500"]


def test_a_run_that_iprm_fit_did_not_start_is_known_by_what_a_logger_writes(tmp_path):
    run = write_run(tmp_path / "version_0")
    (run / "config.yaml").unlink()
    (run / "hparams.yaml").write_text("method: iprm-linear\nlearning_rate: 0.5\n")
    (read,) = read_runs([run])
    assert (read.method, read.settings["model.learning_rate"]) == ("iprm-linear", 0.5)
    assert read.missing == ["No config.yaml: of the settings only the model's are known."]


def test_of_a_continued_run_the_epochs_before_it_count(tmp_path):
    run = write_run(tmp_path / "version_0", epochs=5)
    write_metrics(run / "metrics.csv", course(("video", "audio"), 5, mixes=True)[6:])
    assert figures(report(tmp_path, run))["epochs"] == "5"
    assert read_runs([run])[0].missing == []


def test_a_value_that_is_not_finite_is_left_out_and_a_later_row_of_an_epoch_is_the_one_that_counts(tmp_path):
    run = write_run(tmp_path / "version_0")
    write_metrics(
        run / "metrics.csv",
        [{"epoch": 0, "val_loss": 1.0}, {"epoch": 1, "val_loss": float("nan")}, {"epoch": 0, "val_loss": 2.0}],
    )
    assert read_runs([run])[0].courses == {"val_loss": {0: 2.0}}


# what the file must not hold

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"


def test_nothing_that_files_hold_becomes_part_of_the_page(tmp_path):
    names = (f"a{HOSTILE}", f"b{HOSTILE}")
    runs = [
        write_run(
            tmp_path / "<b>x" / f"version_{k}", method=method, data=HOSTILE, modalities=names, settings={HOSTILE: HOSTILE}
        )
        for k, method in enumerate((f"iprm{HOSTILE}", HOSTILE))
    ]
    plain = Tags(report(tmp_path, *(write_run(tmp_path / f"plain_{k}") for k in range(2))))
    for chosen in (runs[:1], runs):
        page = Tags(report(tmp_path, *chosen))
        assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"dl", "dt", "dd", "div"}
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert f"iprm{HOSTILE}" in page.text


def test_the_file_asks_for_nothing_from_elsewhere_and_forbids_it(tmp_path):
    page = report(tmp_path, *several(tmp_path))
    assert not re.search(r"https?:|//\w|url\(|@import|<script|src=", page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    links = [attributes["href"] for _, attributes in Tags(page).elements if "href" in attributes]
    assert all(link == "data:," or link.startswith("#run-") for link in links)


# size


@pytest.mark.parametrize("modalities", [("video", "audio"), ("video", "audio", "text")], ids=["two", "three"])
def test_ten_runs_of_100_epochs_and_31_classes_take_at_most_2_mb(tmp_path, modalities):
    size = {"epochs": 100, "classes": 31, "modalities": modalities}
    runs = [write_run(tmp_path / f"version_{k}", method="iprm-one-pass", seed=k, **size) for k in range(10)]
    every = [(target, prediction) for target in range(31) for prediction in range(31)]
    for run in runs:
        record = json.loads((run / "diagnostics.json").read_text())
        record["confusion"] = {
            "target": [target for target, _ in every],
            "prediction": [prediction for _, prediction in every],
            "count": [1234] * len(every),  # no cell is empty
        }
        record["class_counts"] = [31 * 1234] * 31
        (run / "diagnostics.json").write_text(json.dumps(record))
    report(tmp_path, *runs)
    assert (tmp_path / "report.html").stat().st_size <= 2e6


def test_of_1000_classes_the_most_confused_pairs_take_the_place_of_the_matrix(tmp_path):
    run = write_run(tmp_path / "version_0", classes=1000)
    record = json.loads((run / "diagnostics.json").read_text())
    record["confusion"]["count"][417] = record["confusion"]["count"][1000 + 417] = 3  # right, and taken for 418
    (run / "diagnostics.json").write_text(json.dumps(record))
    page = report(tmp_path, run)
    assert "Confusion matrix" not in titles(page)
    assert rows(card(page, "Most confused classes"))[:3] == [
        ["true", "predicted as", "samples", "of"],
        ["417", "418", "3", "6"],
        ["0", "1", "1", "6"],
    ]
    bars = hovers(card(page, "ω by class: video × audio"))
    assert len(bars) == 48
    assert bars[0].startswith("class 999 ")
    assert bars[-1].startswith("class 0 ")
    assert len(page) < 1e5


# the command


def test_the_output_goes_where_it_is_asked_for(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert iprm(tmp_path, "report", str(run), "--output", "new/page.html").out == "report: new/page.html\n"
    assert (tmp_path / "new/page.html").read_text().startswith("<!doctype html>")


def refused(folder: Path, *arguments: str) -> str:
    code, out, err = iprm(folder, "report", *arguments)
    assert (code, out) == (2, "")
    assert not (folder / "report.html").exists()
    return err.removeprefix("iprm: ").rstrip("\n")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/fit/versin_1", "runs/fit/version_1"),
        ("runs/fit/version_1/metrics.csv", "runs/fit/version_1"),
        ("runs/fit/version_1/checkpoints", "runs/fit/version_1"),
    ],
)
def test_the_run_that_was_meant_is_suggested(tmp_path, given, meant):
    for k in range(2):
        write_run(tmp_path / f"runs/fit/version_{k}")
    assert refused(tmp_path, given).endswith(f"; did you mean {meant}?")


def test_a_folder_above_runs_is_no_run_and_one_below_it_is_suggested(tmp_path):
    write_run(tmp_path / "runs/fit/version_0")
    assert refused(tmp_path, "runs") == (
        "runs: not a run of iprm fit: none of metrics.csv, config.yaml, diagnostics.json is in it; "
        "did you mean runs/fit/version_0?"
    )


def test_where_there_is_no_run_none_is_suggested(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty", "nothing") == "nothing: there is no such run"
    with pytest.raises(InputError, match="there is no such run"):
        read_runs([tmp_path / "empty/nothing"])


def test_no_run_at_all_is_refused(tmp_path):
    assert refused(tmp_path) == "the following arguments are required: RUN; try iprm report --help"


LIGHT = """
import sys
from iprm.cli import main

assert main(sys.argv[1:]) == 0
heavy = {"torch", "lightning", "jsonargparse", "matplotlib", "numpy", "iprm_kernels"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_report_loads_neither_torch_nor_lightning(tmp_path):
    run = write_run(tmp_path / "version_0")
    subprocess.run([sys.executable, "-c", LIGHT, "report", str(run)], check=True, cwd=tmp_path)


# colours

STYLE = resources.files("iprm.html").joinpath("style.css").read_text(encoding="utf-8")
LIGHT_SCHEME, DARK_SCHEME = (
    {name: [int(value[k : k + 2], 16) / 255 for k in (0, 2, 4)] for name, value in re.findall(r"--([\w-]+): #(\w{6})\b", block)}
    for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
)
PALETTE = [f"c{k}" for k in range(COLOURS)]

#: From linear RGB to what is seen with each kind of dichromacy: Machado, Oliveira, Fernandes, "A Physiologically-based Model
#: for Simulation of Color Vision Deficiency", IEEE TVCG 2009, severity 1.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def linear(colour: Sequence[float]) -> np.ndarray:
    c = np.array(colour)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """That of WCAG 2.2."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Sequence[float], vision: str) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    t = XYZ @ np.clip(np.array(VISIONS[vision]) @ linear(colour), 0, 1) / XYZ.sum(1)
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(scheme):
    for text, behind in (("ink", "page"), ("ink", "card"), ("ink", "notice"), ("soft", "page"), ("soft", "card")):
        assert contrast(scheme[text], scheme[behind]) >= 4.5, (text, behind)
    for line in PALETTE:
        assert contrast(scheme[line], scheme["card"]) >= 3, line


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [LIGHT_SCHEME, DARK_SCHEME], ids=["light", "dark"])
def test_colours_differ_whoever_sees_them(scheme, vision):
    for one, other in itertools.combinations(PALETTE, 2):
        assert np.linalg.norm(lab(scheme[one], vision) - lab(scheme[other], vision)) >= 20, (one, other)


# axes


@given(st.floats(-1e9, 1e9, allow_subnormal=False), st.floats(0, 1e9, allow_subnormal=False), st.integers(2, 9), st.booleans())
def test_ticks_are_few_distinct_and_enclose_the_values(low: float, span: float, count: int, whole: bool) -> None:
    high = low + span
    marks: Sequence[float] = ticks(low, high, count, whole)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert 2 <= len(marks) <= 2 * count + 2
    assert all(a < b for a, b in itertools.pairwise(marks))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert not whole or all(t == int(t) for t in marks)
