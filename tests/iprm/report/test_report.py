"""`iprm report`: what the file says of runs, what it must not hold, and how large it may be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import iprm
from html_page import Tags, card, figures, hovers, report, rows, titles
from iprm.report.charts import COLOURS, percent
from iprm.report.runs import read_runs
from run_folders import course, write_run

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
    other = write_run(tmp_path / "fit/version_3", data="iprm.data.datasets.digits.Digits")
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
        write_run(tmp_path / "digits/version_0", modalities=("image", "strip"), data="iprm.data.datasets.digits.Digits"),
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
