"""`iprm export`: the exported model needs only torch, and gives the predictions of its checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from checkpoints import CLASSES, THREE, TWO, checkpoint, inputs_of
from command import iprm
from iprm.inference import export
from iprm.inference.model import load_inference
from iprm.methods import METHODS
from safetensors.torch import load_file

import iprm_kernels as ik

FILES = ["model.json", "model.pt2", "model.safetensors"]
METHOD_NAMES = [*(name for name in METHODS if name != "unimodal"), "unimodal-image", "unimodal-sound"]
#: One method with a mixture, one without, and one whose modalities share a head.
DEFAULT_TIER = ("iprm", "joint", "concat")
#: Two modalities with a CNN and an MLP; three with the other encoders as well, of different widths.
MODELS = {"two modalities": (TWO, {}), "three modalities": (THREE, {"encoders": {"sound": "linear", "text": "identity"}})}


def predicted(model, shapes, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs_of(shapes, rows)).logits


@pytest.mark.parametrize(
    ("shapes", "options"),
    [pytest.param(*model, id=name, marks=[pytest.mark.grid] if model[0] == THREE else []) for name, model in MODELS.items()],
)
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in DEFAULT_TIER else [pytest.mark.grid]) for name in METHOD_NAMES]
)
def test_every_method_is_exported_as_plain_operators_that_predict_as_it_does_at_any_batch_size(
    tmp_path, method, shapes, options
):
    path, model = checkpoint(tmp_path, shapes, method, **options)
    export.export(load_inference(path), tmp_path)
    program = torch.export.load(tmp_path / "model.pt2")
    operators = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert operators == {"aten"}
    for rows in (1, 2, 5, 64):
        inputs = inputs_of(shapes, rows)
        output = program.module()({name: inputs[name] for name in model.fusion.modalities})
        with torch.no_grad():
            expected = model(inputs)
        torch.testing.assert_close(output["logits"], expected.logits, rtol=0, atol=export.BOUND)
        torch.testing.assert_close(output["probabilities"], expected.logits.softmax(1), rtol=0, atol=export.BOUND)
        assert list(output["logits_by"]) == list(expected.logits_by)
        for head, logits in expected.logits_by.items():
            torch.testing.assert_close(output["logits_by"][head], logits, rtol=0, atol=export.BOUND)


@pytest.mark.parametrize(
    "options", [{"pairs": "random", "shared_mix_head": True}, pytest.param({"ema_start": "released"}, marks=pytest.mark.grid)]
)
def test_the_options_of_the_method_are_exported_with_it(tmp_path, options):
    path, model = checkpoint(tmp_path, THREE, method_options=options)
    export.export(load_inference(path), tmp_path)
    output = torch.export.load(tmp_path / "model.pt2").module()(inputs_of(THREE, 4))
    torch.testing.assert_close(output["logits"], predicted(model, THREE, 4), rtol=0, atol=export.BOUND)


BARE = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("iprm", "iprm_kernels", "lightning", "safetensors"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch

inputs, expected = torch.load(sys.argv[2], weights_only=True)
output = torch.export.load(sys.argv[1]).module()(inputs)
assert (output["logits"] - expected).abs().max() <= float(sys.argv[3])
print(*output)
"""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of an exported model of two modalities, and that model."""
    folder = tmp_path_factory.mktemp("two")
    path, model = checkpoint(folder)
    export.export(load_inference(path), folder)
    return folder, model


def test_a_process_that_can_import_torch_alone_predicts_with_it(of_two):
    folder, model = of_two
    torch.save((inputs_of(TWO, 9), predicted(model, TWO, 9)), folder / "expected.pt")
    command = [sys.executable, "-c", BARE, "model.pt2", "expected.pt", str(export.BOUND)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "logits probabilities logits_by\n"), run.stderr


def test_the_command_writes_three_files_again_if_asked_and_prints_how_near_they_are(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    code, out, err = iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", "new/folder")
    assert (code, err) == (0, "")
    first, last = out.splitlines()
    assert first.startswith("largest difference from the checkpoint's logits, at 1, 2, 17 rows: ")
    assert 0 <= float(first.split()[-1]) <= export.BOUND
    assert last == "exported: new/folder"
    assert sorted(file.name for file in (tmp_path / "new/folder").iterdir()) == FILES
    monkeypatch.setattr("iprm.cli.export.export", lambda *_: 0.0)
    assert iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", "new/folder").code == 0


def test_the_command_replaces_no_files_but_its_own(tmp_path):
    checkpoint(tmp_path)
    for name in FILES:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        code, _, err = iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", folder.name)
        where = f"{folder.name}/{name}"
        message = f"iprm: {where}: this file was not written by this command, and is not replaced; choose another --output\n"
        assert (code, err) == (2, message)
        assert [file.read_text() for file in folder.iterdir()] == ['{"mine": 1}']


def test_the_description_says_what_goes_in_what_comes_out_and_the_sum_of_both_files(tmp_path):
    path, model = checkpoint(tmp_path, THREE, method_options={"alpha": 0.5})
    export.export(load_inference(path), tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    assert content["modalities"] == ["image", "sound", "text"]
    assert content["inputs"] == {name: {"shape": shape, "dtype": "float32"} for name, shape in THREE.items()}
    assert (content["classes"], content["method"], content["method_options"]) == (CLASSES, "iprm", {"alpha": 0.5})
    assert content["weight"] == model.fusion.eval_weight.tolist()
    assert content["versions"]["torch"] == version("torch")
    for name, digest in content["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert sorted(content["sha256"]) == FILES[1:]


def test_the_weights_are_those_of_the_checkpoint_that_the_prediction_depends_on(of_two):
    folder, model = of_two
    weights, state = load_file(folder / "model.safetensors"), model.state_dict()
    assert all(state[name].equal(value) for name, value in weights.items())
    left_out = {"fusion.weight", "fusion.strength", "fusion.steps"}
    assert set(weights) == {name for name in state if name not in left_out and not name.endswith("num_batches_tracked")}


def test_a_model_of_one_modality_takes_that_one_alone(tmp_path):
    path, _ = checkpoint(tmp_path, method="unimodal-sound")
    export.export(load_inference(path), tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["inputs"] == {"sound": {"shape": [6], "dtype": "float32"}}
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "image" in name]


def test_a_checkpoint_in_bfloat16_is_exported_in_float32(tmp_path):
    path, model = checkpoint(tmp_path, precision="bf16")
    export.export(load_inference(path), tmp_path)
    output = torch.export.load(tmp_path / "model.pt2").module()(inputs_of(TWO, 3))
    assert output["logits"].dtype == torch.float32
    torch.testing.assert_close(output["logits"], predicted(model.float(), TWO, 3), rtol=0, atol=export.BOUND)


def test_the_files_name_no_place_of_the_machine_that_they_were_written_on(of_two):
    folder, _ = of_two
    content = (folder / "model.pt2").read_bytes()
    assert str(Path(export.__file__).parent).encode() not in content
    assert str(folder).encode() not in content


def test_a_graph_that_predicts_otherwise_is_not_written(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    table, operator = ik.decompositions(), torch.ops.iprm.geodesic_mixup.default
    plain = table[operator]

    def other(x, y, weight, eps):
        return plain(x, y, weight + 0.01, eps)

    monkeypatch.setattr(ik, "decompositions", lambda: {**table, operator: other})
    code, out, err = iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", "new")
    assert (code, out) == (2, "")
    assert "iprm: the exported graph differs from the checkpoint's logits by" in err
    assert not list((tmp_path / "new").iterdir())


# checkpoints that cannot be read


def refused(folder: Path, change) -> str:
    path, _ = checkpoint(folder)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    code, out, err = iprm(folder, "export", "--ckpt_path", "model.ckpt", "--output", "new")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert not (folder / "new").exists()
    return err


CHANGES = {
    "no weights": (lambda c: c.pop("state_dict"), "not a checkpoint of iprm fit"),
    "no settings": (lambda c: c.pop("hyper_parameters"), "not a checkpoint of iprm fit"),
    "no inputs": (lambda c: c["hyper_parameters"].pop("inputs"), "cannot be made: .*inputs"),
    "an unknown method": (lambda c: c["hyper_parameters"].update(method="iprmm"), "did you mean 'iprm'"),
    "inputs that are none": (lambda c: c["hyper_parameters"].update(inputs=3), "cannot be made: inputs: expected a mapping"),
    "sizes without end": (lambda c: c["hyper_parameters"].update(feature_dim=2**44), "cannot be made"),
    "a weight too few": (lambda c: c["state_dict"].popitem(), "cannot be made: .*Missing key"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_whose_settings_and_weights_are_not_of_one_model_is_refused(tmp_path, change, message):
    assert re.search(message, refused(tmp_path, change), re.DOTALL)


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path):
    message = refused(tmp_path, lambda content: content["hyper_parameters"].update(encoders=Harm()))
    assert "not a checkpoint of iprm fit" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content", [b"\x80\x020.", b"\x80\x02}}}s.", b"\x80\x02K\x01Q."], ids=["of nothing", "of no key", "of no tensor"]
)
def test_a_checkpoint_whose_pickle_is_broken_is_refused(tmp_path, content):
    path, _ = checkpoint(tmp_path)
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as broken:
        for name, part in parts.items():
            broken.writestr(name, content if name.endswith("data.pkl") else part)
    err = iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", "new")[2]
    assert err.startswith("iprm: model.ckpt: not a checkpoint of iprm fit, or a part of one")
    assert err.count("\n") == 1


def test_a_missing_checkpoint_is_named(tmp_path):
    assert iprm(tmp_path, "export", "--ckpt_path", "no.ckpt", "--output", "new")[2] == (
        "iprm: no.ckpt: there is no such checkpoint\n"
    )
