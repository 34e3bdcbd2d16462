"""The default backend by what was verified on the device, and the file that keeps it."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from verdicts import CPU, calls_of, choice, empty_cache, kept, passed

import iprm_kernels as ik
from iprm_kernels import verdict
from iprm_kernels.verdict import Case, Result


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


def test_the_fastest_that_passed_serves_by_type_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    kept(passed("normalize", "small", 0.5), passed("normalize", "small", 0.7, "cpp"), passed("normalize", "medium", 1.2))
    x = torch.ones(2, 3, requires_grad=True)
    ik.normalize(x).sum().backward()
    assert calls == ["normalize", "normalize_backward"]
    calls.clear()
    ik.normalize(torch.ones(256, 512))  # medium: it passed and is slower
    ik.normalize(torch.ones(2, 3).double())  # another type
    ik.batch_kl(torch.ones(2, 3), torch.ones(2, 3))  # another operator
    assert calls == []
    with ik.use_backend("triton"):
        ik.normalize(torch.ones(256, 512))
    assert calls == ["normalize"]


def test_a_kernel_that_failed_in_one_operator_serves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """geodesic_mixup's kernel is also called by probe_rebalance."""
    calls = calls_of(monkeypatch)
    bad = Result("triton", Case("probe_rebalance", "float32", "small"), "d x: not finite", None)
    kept(passed("geodesic_mixup", "small", 0.5), bad)
    ik.geodesic_mixup(torch.ones(2, 3), torch.ones(2, 3), 0.3)
    assert calls == []


def test_the_step_of_three_modalities_has_its_own_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    kept(passed("linear_probe_rebalance", "small", 0.5), passed("linear_probe_rebalance_pairs", "small", 1.5))
    x, head, target = torch.ones(2, 3), (torch.ones(4, 3), None), torch.zeros(2, dtype=torch.int64)
    ik.linear_probe_rebalance(x, x, head, head, head, target, 0.5)
    assert calls == ["head_forward"]
    ik.linear_probe_rebalance_pairs([x, x, x], [head] * 3, [head] * 3, target, 0.5)
    assert calls == ["head_forward"]


def test_on_the_cpu_a_slower_extension_makes_way_for_the_reference() -> None:
    status = ik.backends()["cpp"].operators["normalize"]
    if not status.available:
        pytest.skip(str(status))
    assert status.default_for == ("cpu",)
    kept(passed("normalize", "small", 1.5, "cpp"))
    assert ik.backends()["cpp"].operators["normalize"].default_for == ()
    assert ik.backends()["reference"].operators["normalize"].default_for == ("cpu",)


@pytest.mark.parametrize("name", ["device", "driver", "torch", pytest.param("triton", id="compiler"), "kernels"])
def test_a_verdict_of_another_machine_or_build_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    kept(passed("normalize", "small", 0.5))
    assert verdict.read(CPU)
    monkeypatch.setattr(verdict, "_made", {})
    assert verdict.read(CPU), "from the file"
    of = verdict.key(CPU)
    monkeypatch.setattr(verdict, "key", lambda device: {**of, name: "another"})
    assert verdict.read(CPU) is None
    (file,) = cache.iterdir()
    file.rename(verdict._file(verdict.key(CPU)))  # also if its name is the right one
    assert verdict.read(CPU) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: text.replace('"small"', '"tiny"'),
        lambda text: text.replace("0.5", "-1"),
        lambda text: text.replace("0.5", "NaN"),
        lambda text: text.replace("0.5", "1" + "0" * 400),
        lambda text: text.replace('"normalize"', "[]"),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "\x00\xff" + text,
        lambda text: text + " " * (2 << 20) + "x",
    ],
)
def test_a_damaged_verdict_counts_as_none(damage: object, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    calls = calls_of(monkeypatch)
    kept(passed("normalize", "small", 0.5))
    monkeypatch.setattr(verdict, "_made", {})
    (file,) = cache.iterdir()
    file.write_text(damage(file.read_text()), encoding="latin-1")  # type: ignore[operator]
    choice.forget()
    ik.normalize(torch.ones(2, 3))
    assert calls == []
    kept(passed("normalize", "small", 0.5))  # and is replaced
    ik.normalize(torch.ones(2, 3))
    assert calls == ["normalize"]


def test_a_folder_that_cannot_be_written_keeps_the_verdict_in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")  # also refused to root, who may write to folders without write permission
    monkeypatch.setenv("IPRM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    calls = calls_of(monkeypatch)
    assert "cannot be written: Not a directory" in verdict.keep(CPU, [passed("normalize", "small", 0.5)])
    choice.forget()
    ik.normalize(torch.ones(2, 3))
    assert calls == ["normalize"]


def test_writers_at_once_leave_a_whole_verdict(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    verdict.key(CPU)

    def write(number: int) -> None:
        for size in verdict.SIZES * 5:
            verdict.keep(CPU, [passed("normalize", size, 0.1 + number)])
            assert verdict._read(verdict._file(verdict.key(CPU)), verdict.key(CPU))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = cache.iterdir()  # no temporary file is left
    assert len(json.loads(file.read_text())["results"]) == 3


def test_a_process_that_verifies_for_long_is_not_waited_for(cache: Path) -> None:
    cache.mkdir()
    with (cache / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with verdict.alone(0.3):
            pass


def test_the_key_depends_on_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = shutil.copytree(verdict.FOLDER, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(verdict, "FOLDER", package)
    names = ("kernels/head.py", "convention.py", *(path.name for path in package.glob("_C*.so")))
    hashes = {verdict.kernels_hash.__wrapped__()}
    for name in names:
        with (package / name).open("ab") as file:
            file.write(b"\n")
        hashes.add(verdict.kernels_hash.__wrapped__())
    assert len(hashes) == 1 + len(names)


def test_without_a_verdict_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    ik.normalize(torch.ones(2, 3))
    assert calls == []


class TestOnAGpu:
    """The choice for a GPU, with kernels that run on CPU tensors in its place."""

    GPU = torch.device("cuda", 0)

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(verdict, "_capability", lambda device: "sm_90")
        choice._warn.cache_clear()
        return calls_of(monkeypatch, device="cuda")

    def normalize(self, count: int) -> None:
        x = torch.ones(count, 4)
        choice._select(None, self.GPU).normalize(x, 1e-12, torch.empty_like(x), torch.empty(count))

    def test_without_a_verdict_the_reference_serves_and_one_warning_names_the_command(
        self, calls: list[str], recwarn: pytest.WarningsRecorder
    ) -> None:
        with pytest.warns(UserWarning, match=r"a GPU.*once: python -m iprm_kernels verify$") as caught:
            self.normalize(2)
        self.normalize(2)
        choice._select(None, self.GPU).strength_weights(torch.ones(2), torch.empty(2))
        assert len(caught) == 1
        assert not recwarn.list
        assert calls == []

    def test_with_one_the_fastest_that_passed_serves_in_silence(
        self, calls: list[str], recwarn: pytest.WarningsRecorder
    ) -> None:
        verdict.keep(self.GPU, [passed("normalize", "small", 0.5), passed("normalize", "medium", 1.5)])
        choice.forget()
        self.normalize(2)
        assert calls == ["normalize"]
        self.normalize(1 << 17)
        assert calls == ["normalize"]
        assert not recwarn.list

    def test_one_that_was_made_on_another_gpu_does_not_count(self, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        verdict.keep(self.GPU, [passed("normalize", "small", 0.5)])
        choice.forget()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
        with pytest.warns(UserWarning, match="another GPU"):
            self.normalize(2)
        assert calls == []

    def test_a_failed_one_never_serves_and_its_status_says_why(self, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        bad = Result("triton", Case("normalize", "float32", "small"), "out, by row: error 3", None)
        verdict.keep(self.GPU, [bad])
        choice.forget()
        self.normalize(2)
        assert calls == []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        operators = ik.backends()["triton"].operators
        assert operators["normalize"].default_for == ()
        assert operators["normalize"].verified == {"cuda": "failed for float32 small: out, by row: error 3"}
        assert operators["batch_kl"].verified == {"cuda": "not verified on this device: python -m iprm_kernels verify"}
        assert "cuda" in ik.backends()["reference"].operators["batch_kl"].default_for


def test_a_compiled_function_selects_by_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch)
    kept(passed("normalize", "small", 0.5))
    torch.compile(ik.normalize, fullgraph=True, backend="aot_eager")(torch.ones(2, 3))
    assert calls == ["normalize"]
