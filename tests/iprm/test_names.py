"""Modalities of any name that a column can have: in modules, files, columns and reports."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import iprm as package
import numpy as np
import pytest
import torch
from command import iprm
from feature_files import save
from hypothesis import given
from hypothesis import strategies as st
from iprm.data import make_data
from iprm.encoders.named_modules import NamedModules, modality_name, module_name
from iprm.errors import InputError
from iprm.methods import METHODS
from iprm.methods.balancer import Balancer
from iprm.names import check_modality, file_name, pair_names
from torch import nn

NAMES = (
    *("training", "type", "forward", "keys", "parameters", "_modules", "__class__", "T_destination"),
    *("a.b", "mfcc 13", "audio/left", "a\\b", "50%", "%2E", "..", "-", "3d", "ton\u00a0é", "音声", "🎧", "a,b;c", '"q"', "$x$"),
    *("rest", "all", "shared", "weight", "loss", "<b>", "[red]", "{name}"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_named_by_its_modality_and_back(name):
    registered = module_name(name)
    assert modality_name(registered) == name
    modules = NamedModules({name: nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    assert (list(modules), name in modules, len(modules)) == ([name, "other"], True, 2)
    assert [*modules.keys()] == [*dict(modules.items())] == [name, "other"]
    assert f"{registered}.weight" in modules.state_dict()
    assert modules.get_parameter(f"{registered}.weight") is modules[name].weight
    assert modules.pop(name) is not None
    assert name not in modules


TAKEN = frozenset(dir(nn.ModuleDict()))


@given(st.text(min_size=1) | st.sampled_from(sorted(TAKEN)))
def test_no_two_modalities_have_modules_or_files_of_one_name(name):
    registered = module_name(name)
    assert modality_name(registered) == name
    assert "." not in registered
    assert registered not in TAKEN
    assert "/" not in file_name(name)


@pytest.mark.parametrize("name", ["audio", "image_2", "x", "3d", "left-camera", "été"])
def test_ordinary_names_are_unchanged(name):
    assert module_name(name) == file_name(name) == name


@pytest.mark.parametrize("name", ["", " ", "mix", "fused", "a\nb", "\0", "\ud800", "\u2028", 3, None])
def test_what_cannot_be_a_name_is_refused(name):
    with pytest.raises(InputError, match="modality"):
        check_modality(name)


@given(st.lists(st.text("ab_%", min_size=1, max_size=4), min_size=2, max_size=5, unique=True))
def test_pairs_have_different_names(modalities):
    names = pair_names(modalities)
    measures = [f"{name}_{m}" for name, pair in zip(names, itertools.combinations(modalities, 2), strict=True) for m in pair]
    assert len({*names, *measures}) == 3 * len(names)


def test_ordinary_pairs_are_joined_by_an_underscore():
    assert pair_names(("image", "sound", "text")) == ["image_sound", "image_text", "sound_text"]
    assert pair_names(("a", "b_c", "a_b", "c"))[2] == "a_c"


@pytest.mark.parametrize("method", [name for name in METHODS if name != "unimodal"])
def test_every_method_trains_modalities_of_any_name(method):
    names = ("training", "a.b", "rest")
    names = names[: 2 if method.startswith("ogm") else 3]
    b = Balancer({name: nn.Linear(4, 6) for name in names}, 6, 3, method)
    x = {name: torch.randn(8, 4) for name in names}
    out = b.step(x, torch.arange(8) % 3)
    assert {name for name in out.logits_by if name not in ("mix", "fused")} == set(names)
    again = Balancer({name: nn.Linear(4, 6) for name in names}, 6, 3, method)
    again.load_state_dict(b.state_dict())
    b.model.eval()
    again.model.eval()
    torch.testing.assert_close(again.model(x).logits, b.model(x).logits)


def test_the_rate_of_a_modality_called_rest_is_its_own():
    b = Balancer({name: nn.Linear(4, 6) for name in ("rest", "other")}, 6, 3, "mslr", initial={"rest": 0.5})
    names = [group["name"] for group in b.optimizer.param_groups]
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_fusion_module_of_such_names_compiles_without_a_graph_break(training):
    fusion = package.ProbeRebalance(6, 3, ("training", "a.b")).train(training)
    x = {name: torch.randn(8, 6) for name in fusion.modalities}
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    assert compiled(x, torch.arange(8) % 3).loss.isfinite()


TWO = ("training", "mel 0.5/left")


def content(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    return {"y": y} | {f"x_{name}": rng.normal(size=(60, 4)) + y[:, None] for name in names}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    save(folder, content(*TWO))
    encoders = f'{{"{TWO[1]}": "linear", "{TWO[0]}": {{"class_path": "mlp"}}}}'
    arguments = ("--data.path", "features.npz", "--trainer.max_epochs", "1", "--trainer.default_root_dir", "here")
    outcome = iprm(folder, "fit", "--config", "features", *arguments, "--model.encoders", encoders)
    assert outcome.code == 0, outcome.err
    return folder


def checkpoint(folder: Path) -> str:
    return str(next(folder.rglob("checkpoints/*.ckpt")))


def test_columns_have_the_names(trained):
    with next(trained.rglob("metrics.csv")).open(newline="") as file:
        columns = csv.DictReader(file).fieldnames or []
    for name in TWO:
        assert {f"val_accuracy_{name}", f"train_loss_{name}", f"strength_{name}"} <= set(columns)


def test_checkpoints_are_tested(trained):
    config = str(next(trained.rglob("config.yaml")))
    assert iprm(trained, "test", "--config", config, "--ckpt_path", checkpoint(trained)).code == 0
    state = torch.load(checkpoint(trained), weights_only=True)["state_dict"]
    assert {"encoders.%74raining.1.weight", "encoders.mel 0%2E5/left.1.weight"} <= set(state)


def test_samples_are_predicted_from_archives_and_files(trained):
    arrays = content(*TWO)
    np.savez(trained / "new.npz", **arrays)
    (trained / "new").mkdir()
    np.save(trained / "new/training.npy", arrays["x_training"])
    np.save(trained / "new/mel 0.5%2Fleft.npy", arrays["x_mel 0.5/left"])
    for source in ("new.npz", "new"):
        options = ("--ckpt_path", checkpoint(trained), "--input", source, "--output", f"{source}.csv")
        outcome = iprm(trained, "predict", *options)
        assert outcome.code == 0, outcome.err
    one, other = ((trained / f"{source}.csv").read_text().splitlines() for source in ("new.npz", "new"))
    assert [line.partition(",")[2] for line in one] == [line.partition(",")[2] for line in other]


def test_the_report_has_the_names(trained):
    assert iprm(trained, "report", "here", "--output", "report.html").code == 0
    page = (trained / "report.html").read_text()
    for name in TWO:
        assert f"ω {name}" in page


@pytest.mark.slow
def test_the_model_is_exported(trained):
    assert iprm(trained, "export", "--ckpt_path", checkpoint(trained), "--output", "exported").code == 0
    model = torch.export.load(trained / "exported/model.pt2").module()
    assert model({name: torch.randn(7, 4) for name in TWO})["probabilities"].shape == (7, 3)


@pytest.mark.slow
def test_a_comparison_has_a_folder_per_method(trained):
    arguments = ("--data", "features", "--path", "features.npz", "--seeds", "1", "--epochs", "1", "--jobs", "1")
    outcome = iprm(trained, "compare", *arguments, "--output", "compared")
    assert outcome.code == 0, outcome.err
    assert (trained / "compared/unimodal-mel 0.5%2Fleft/seed=0/test.json").is_file()
    assert "unimodal-mel 0.5/left" in (trained / "compared/summary.md").read_text()


@pytest.mark.parametrize("name", ["", "mix", "fused", "a\nb"])
def test_a_file_with_a_modality_that_cannot_be_is_refused_by_name(tmp_path, name):
    path = save(tmp_path, content("audio") | {f"x_{name}": np.zeros((60, 2))})
    with pytest.raises(InputError, match=r"features\.npz: array .*: modality "):
        _ = make_data("features", path=path).splits


def test_a_name_too_long_for_a_file_is_shortened_to_one_of_its_own():
    names = ["音声" * 100 + end for end in ("", "a", "b")] + ["x" * 300]
    found = [file_name(f"unimodal-{name}") for name in names]
    assert len({*found}) == 4
    assert max(len(name.encode()) for name in found) <= 200
    assert file_name("x" * 200) == "x" * 200
