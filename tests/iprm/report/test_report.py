"""`iprm report`: the content of the file, what it must not contain, and its size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command import iprm
from html_page import Tags, card, figures, pictures, report, rows, said, titles
from iprm.compare.runs import read_runs
from iprm.report.figures import PALETTE, percent
from run_folders import course, write_comparison, write_metrics, write_run

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
        "last ω audio": f"{row[1]['strength_audio']:.3f}",
        "last ω video": f"{row[1]['strength_video']:.3f}",
        "last λ": f"{row[1]['weight']:.3f}",
        "epochs": "5",
        "data": "Features",
    }


def test_figures_say_the_values_of_the_last_epoch(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    validation, training = course(("video", "audio"), 5, mixes=True)[-2:]
    heads = (("", "fusion"), ("_video", "video head"), ("_audio", "audio head"), ("_mix", "mixture"))
    accuracies = [f"{name}: {percent(validation[f'val_accuracy{suffix}'])} in epoch 4" for suffix, name in heads]
    assert said(card(page, "Accuracy")) == ("Accuracy", "; ".join(accuracies))
    assert said(card(page, "Loss")) == ("Loss", f"loss: {validation['val_loss']:.3f} in epoch 4")
    omega = [f"ω {name}: {training[f'strength_{name}']:.3f} in epoch 4" for name in ("audio", "video")]
    assert said(card(page, "λ and ω"))[1] == "; ".join([*omega, f"λ: {training['weight']:.3f} in epoch 4"])


def test_the_confusion_matrix_has_a_number_for_every_count_that_is_not_zero(tmp_path):
    content = card(report(tmp_path, write_run(tmp_path / "version_0")), "Confusion matrix")
    (picture,) = pictures(content)
    numbers = [text.text for text in picture.iter("text")]
    assert [numbers.count("5"), numbers.count("1")] == [4, 4 + 2], "each axis also has a 1"
    assert "Most often confused: 0 as 1 (1 of 6)" in content


def test_what_was_recorded_is_said(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0"))
    assert "Mean 63.0°" in card(page, "Angle between the modalities")
    assert "1: all weight on video. 0: on audio." in card(page, "ω by class: video × audio")
    assert "20 of 24 samples are classified correctly, with the weights best on validation (epoch 2)" in page


def test_of_three_modalities_every_pair_has_its_charts_in_the_order_of_the_modalities(tmp_path):
    page = report(tmp_path, write_run(tmp_path / "version_0", modalities=("video", "audio", "text")))
    pairs = ["video × audio", "video × text", "audio × text"]
    assert titles(page) == [
        "Accuracy",
        "Loss",
        "ω",
        "λ",
        "Confusion matrix",
        "Angle between the modalities",
        *(f"ω by class: {pair}" for pair in pairs),
    ]
    assert "ω audio (audio × text): 0.6" in said(card(page, "ω"))[1]
    assert "λ audio × text: 0.6" in said(card(page, "λ"))[1]


def test_twelve_modalities_make_a_page_that_can_be_read(tmp_path):
    modalities = [f"m{k}" for k in range(12)]
    runs = [write_run(tmp_path / f"version_{k}", modalities=modalities, seed=k) for k in range(2)]
    one, two = report(tmp_path, runs[0]), report(tmp_path, *runs)
    assert titles(one)[2:4] == ["ω", "λ"]
    assert "Named: the 12 of 66 that end farthest from 0.5." in card(one, "λ")
    assert len(re.findall("<li>", card(one, "λ"))) == 12
    assert len([title for title in titles(one) if title.startswith("ω by class")]) == 6
    assert "Shown: the first 6 of 66." in card(one, "Angle between the modalities")
    assert len([title for title in titles(two) if title[:1] in "λω" and "class" not in title]) == 12
    assert "Shown: the first 12 of 198." in two
    assert max(len(one), len(two)) < 6e5


def test_a_comparison_has_a_table_of_lambda_by_pair_and_says_where_it_is_0_or_1(tmp_path):
    modalities = ("video", "audio", "text")
    folder = write_comparison(tmp_path / "c", modalities=modalities)
    runs = course(modalities, 5, mixes=True)
    runs[-1]["weight_audio_text"] = 1.0
    for seed in (0, 1):
        write_metrics(folder / f"iprm/seed={seed}/metrics.csv", runs)
    page = report(tmp_path, folder)
    assert ["audio × text", "1.00 ±0.00"] in rows(page)
    assert page.count("iprm: λ ended at 0 or 1 for audio × text (audio alone, 2 of 2 runs).") == 1
    one = report(tmp_path, folder / "iprm/seed=0")
    assert one.count("iprm: λ ended at 0 or 1 for audio × text (audio alone, 1 of 1 runs).") == 1


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
    head, *body = rows(re.search(r'<section class="card tabular summary">.*?</section>', page, re.DOTALL)[0])
    return [dict(zip(head, row, strict=True)) for row in body]


def test_the_summary_has_a_row_a_run(tmp_path):
    table = summary(report(tmp_path, *several(tmp_path)))
    assert [row["run"] for row in table] == ["version_0", "version_1", "version_2"]
    assert [row["method"] for row in table] == ["iprm", "concat", "iprm"]
    assert [row["seed"] for row in table] == ["0", "0", "1"]
    assert [row["best epoch"] for row in table] == ["4", "4", "6"]
    assert [row["last λ"] == "–" for row in table] == [False, True, False]
    assert [row["mixture"] == "–" for row in table] == [False, True, False]


def test_runs_are_told_apart_by_colour_in_a_chart_a_quantity_and_have_their_own_matrix_and_angles(tmp_path):
    page = report(tmp_path, *several(tmp_path))
    assert titles(page) == [
        "Accuracy of the fusion",
        "Accuracy of the video head",
        "Accuracy of the audio head",
        "Accuracy of the mixture",
        "Loss",
        *("ω audio", "ω video", "λ"),
        *("Confusion matrix", "Angle between the modalities", "ω by class: video × audio"),
        *("Confusion matrix", "Angle between the modalities"),
        *("Confusion matrix", "Angle between the modalities", "ω by class: video × audio"),
    ]
    fusion = card(page, "Accuracy of the fusion")
    assert [f"var(--c{run})" in fusion for run in range(4)] == [True, True, True, False]
    assert "concat · seed 0: " in said(fusion)[1]


def test_seeds_of_the_same_settings_are_one_line_and_the_first_of_them_is_shown(tmp_path):
    folder = write_comparison(tmp_path / "c", ("concat", "iprm"), range(3))
    page = report(tmp_path, folder)
    assert titles(page)[0] == "Test accuracy by method"
    assert "concat: 51.0 ±1.0 %; iprm: 61.0 ±1.0 %" in page
    assert "<h1>features: 3 seeds, 5 epochs</h1>" in page
    assert len(summary(page)) == 6
    assert [row["test accuracy"] for row in summary(page)] == [f"{v}.0 %" for v in (50, 51, 52, 60, 61, 62)]
    assert re.match("concat: .*; iprm: ", said(card(page, "Accuracy of the fusion"))[1])
    assert "Mean and range over the seeds." in card(page, "Loss")
    assert titles(page).count("Confusion matrix") == 2
    assert "shows one of the 4 other runs" in page


def test_a_comparison_and_a_run_beside_it_share_a_report(tmp_path):
    folder = write_comparison(tmp_path / "c")
    single = write_run(tmp_path / "fit/version_0", settings={"learning_rate": 0.5})
    page = report(tmp_path, folder, single)
    assert [row["run"] for row in summary(page)][-1] == "fit/version_0"
    assert "Test accuracy by method" in titles(page)
    assert "Test accuracy by method" not in titles(report(tmp_path, folder / "iprm/seed=0")), "one run is no comparison"


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
    assert {"Accuracy of the strip head", "Accuracy of the text head", "λ"} <= set(titles(page))
    assert "iprm · seed 0 · digits/version_0" in page, "both runs have this method and seed"


def test_a_run_named_twice_is_shown_once(tmp_path):
    run = write_run(tmp_path / "version_0")
    assert len(read_runs([run, run / "../version_0"])) == 1


def test_more_runs_than_colours_are_dashed(tmp_path):
    runs = [write_run(tmp_path / f"version_{k}", settings={"learning_rate": 0.1 + k}) for k in range(len(PALETTE) + 2)]
    page = report(tmp_path, *runs)
    dashed = re.findall("stroke-dasharray", card(page, "Accuracy of the fusion"))
    assert len(dashed) == 2 * 2, "in validation and in training"
    assert len(set(re.findall(r'class="(swatch c\d d\d)"', page))) == len(runs)


# what the file must not contain

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
    page = re.sub(r'"data:image/png;base64,[\w+/=\s]*"', "", report(tmp_path, *several(tmp_path)))
    assert not re.search(r"https?:|//\w|url\(|@import|<script|src=", page)
    assert all(link.startswith("#") for link in re.findall('xlink:href="(.*?)"', page))
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
    assert "Shown: the 24 classes at each end." in card(page, "ω by class: video × audio")
    assert len(page) < 1e5
