"""Source distribution and wheel: how they are built, their contents, and that they work outside this folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[1]
LEAVINGS = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_C*.so")
NO_COMPILER = "/nowhere/compiler"

pytest.importorskip("build")
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++").split()[0]), reason="needs a C++ compiler")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")

#: Printed by an import from another folder: the imported packages, what they can do, and the heavy modules they import.
PROBE = """
import json, sys, torch, iprm_kernels as ik, iprm, iprm.configs
from importlib.resources import files

try:
    with ik.use_backend("cpp"):
        refusal = ""
except ik.BackendUnavailableError as error:
    refusal = str(error)
z = ik.geodesic_mixup(torch.eye(2), torch.eye(2).flip(0), 0.5)
print(json.dumps({
    "folders": [str(module.__path__[0]) for module in (ik, iprm)],
    "version": ik.__version__,
    "extension": ik.build_info()["extension"],
    "refusal": refusal,
    "value": z.max().item(),
    "configs": sorted(path.name for path in files(iprm.configs).iterdir() if path.name.endswith(".yaml")),
    "heavy": sorted({"lightning", "sklearn", "matplotlib"} & set(sys.modules)),
}))
"""

Build = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree without anything built."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*LEAVINGS)))


def python(command: list[str], folder: Path, choice: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder` with IPRM_KERNELS_BUILD=choice; None leaves it unset."""
    inherited = {name: value for name, value in os.environ.items() if name != "IPRM_KERNELS_BUILD"}
    chosen = {} if choice is None else {"IPRM_KERNELS_BUILD": choice}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**inherited, **chosen, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds an "sdist" or a "wheel" from a folder into tmp_path/dist, without isolation and therefore without a network."""

    def run(kind: str, folder: Path, choice: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["-m", "build", f"--{kind}", "-nx", "--outdir", str(tmp_path / "dist"), str(folder)]
        return python(command, folder, choice, **environment)

    return run


def built(result: subprocess.CompletedProcess[str], tmp_path: Path, suffix: str) -> Path:
    assert result.returncode == 0, result.stdout[-4000:]
    (path,) = (tmp_path / "dist").glob(f"*{suffix}")
    return path


def install(wheel: Path, tmp_path: Path) -> Path:
    target = tmp_path / "installed"
    command = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return target


def probe(target: Path, tmp_path: Path) -> dict:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -S and explicit paths: an editable install's .pth file would find in this folder what the target lacks
    paths = [str(target), *(path for path in sys.path if path.endswith("-packages"))]
    environment = {name: value for name, value in os.environ.items() if name != "IPRM_KERNELS_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    output = subprocess.check_output([sys.executable, "-S", "-c", PROBE], cwd=elsewhere, env=environment, text=True)
    found = json.loads(output)
    assert found["folders"] == [str(target / "iprm_kernels"), str(target / "iprm")]
    assert found["value"] == pytest.approx(0.5**0.5)
    assert found["heavy"] == []
    return found


def files_of(folder: Path, *patterns: str) -> set[str]:
    paths = (path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder.parent).as_posix() for path in paths}


def package_files(source: Path) -> set[str]:
    """The files of a wheel except its extension."""
    operators = files_of(source / "iprm_kernels", "*.py", "py.typed")
    return operators | files_of(source / "python" / "iprm", "*.py", "*.yaml", "*.jinja", "*.css", "py.typed")


def quick_compiler(tmp_path: Path) -> str:
    """The compiler with a final -O0, which takes a third of the time: these tests concern the package, not the compiled
    code."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
@needs_compiler
def test_a_wheel_from_the_source_distribution_works_elsewhere(source: Path, build: Build, tmp_path: Path) -> None:
    archive = built(build("sdist", source), tmp_path, ".tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    contents = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert files_of(source / "csrc", "*") | files_of(source / "tests", "*.py") <= contents
    assert {"setup.py", "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md"} <= contents
    assert not {name for name in contents if name.endswith((".so", ".pyc"))}

    wheel = built(build("wheel", unpacked, "cpu", CXX=quick_compiler(tmp_path)), tmp_path, ".whl")
    with zipfile.ZipFile(wheel) as zipped:
        names = set(zipped.namelist())
        (metadata,) = (zipped.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    extension = {name for name in names if re.fullmatch(r"iprm_kernels/_C\..*\.(so|pyd)", name)}
    assert len(extension) == 1
    assert {name for name in names if ".dist-info/" not in name} == package_files(source) | extension
    assert not wheel.stem.endswith("-any")
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", metadata, re.MULTILINE)
    assert sorted(required) == ["numpy", "torch", "triton"]

    target = install(wheel, tmp_path)
    found = probe(target, tmp_path)
    assert (found["extension"], found["refusal"]) == ("cpu", "")
    assert f"\nVersion: {found['version']}\n" in metadata
    assert found["configs"] == sorted(path.name for path in (ROOT / "python" / "iprm" / "configs").glob("*.yaml"))
    if sys.platform == "linux":
        check_stable_abi(target / extension.pop())


def check_stable_abi(library: Path) -> None:
    """The library uses only the C shims of libtorch, which every torch from 2.10 on has: no C++ symbols, no other library."""
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True).split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [symbol for symbol in symbols if re.match(r"_Z\w*(?<!\d)(3c10|2at|5torch)", symbol)] == []
    needed = re.findall(r"NEEDED.*\[(lib(?:torch|c10)\w*)", subprocess.check_output(["readelf", "-d", library], text=True))
    assert needed == ["libtorch_cpu"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_extension_here_uses_the_stable_abi_alone() -> None:
    extension = pytest.importorskip("iprm_kernels._C", reason="the C++ extension is not built here")
    check_stable_abi(Path(extension.__file__))


def test_none_makes_a_pure_package_that_says_what_it_misses(source: Path, build: Build, tmp_path: Path) -> None:
    (source / "iprm_kernels" / "_C.left-by-an-earlier-build.so").touch()
    wheel = built(build("wheel", source, "none"), tmp_path, "py3-none-any.whl")
    target = install(wheel, tmp_path)
    with zipfile.ZipFile(wheel) as zipped:
        assert {name for name in zipped.namelist() if ".dist-info/" not in name} == package_files(source)
    found = probe(target, tmp_path)
    assert found["extension"] == "none"
    assert "the C++ extension cannot be imported" in found["refusal"]
    assert "IPRM_KERNELS_BUILD=cpu" in found["refusal"]


def test_none_takes_an_earlier_extension_out_of_an_editable_install(source: Path, tmp_path: Path) -> None:
    left = source / "iprm_kernels" / "_C.left-by-an-earlier-build.so"
    left.touch()
    hook = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    result = python(["-c", hook], source, "none")
    assert result.returncode == 0, result.stdout[-4000:]
    assert not left.exists()


def test_without_a_compiler_the_pure_package_is_built_with_a_warning(source: Path, build: Build, tmp_path: Path) -> None:
    result = build("wheel", source, CXX=NO_COMPILER)
    assert built(result, tmp_path, ".whl").name.endswith("py3-none-any.whl")
    assert f"no C++ compiler was found ({NO_COMPILER}" in result.stdout
    assert "installed without its C++ kernels" in result.stdout


@pytest.mark.parametrize(
    ("choice", "compiler", "message"),
    [
        ("gpu", "c++", "IPRM_KERNELS_BUILD: expected cpu, cuda or none, got 'gpu'"),
        ("cpu", NO_COMPILER, rf"IPRM_KERNELS_BUILD=cpu: no C\+\+ compiler was found \({NO_COMPILER}"),
        pytest.param(
            "cuda",
            "c++",
            f"IPRM_KERNELS_BUILD=cuda: .*torch {re.escape(torch.__version__)} is built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA"),
        ),
    ],
    ids=["unknown", "no compiler", "no CUDA"],
)
def test_what_cannot_be_built_is_refused(source: Path, build: Build, choice: str, compiler: str, message: str) -> None:
    result = build("wheel", source, choice, CXX=compiler)
    assert result.returncode != 0
    assert re.search(message, result.stdout), result.stdout[-4000:]


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """The function of setup.py, which is read without setting anything up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))["toolkit"]


def test_the_toolkit_of_an_nvcc_that_is_a_script(
    toolkit: Callable[[], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers have it: the nvcc on PATH runs that of a toolkit elsewhere, here one that prints what --dryrun prints."""
    real, wrapper = tmp_path / "toolkit" / "bin" / "nvcc", tmp_path / "bin" / "nvcc"
    scripts = {
        real: f"echo '#$ _HERE_={real.parent}' >&2; echo '#$ TOP={real.parent}/..' >&2; echo '#$ LIBRARIES=-Lx' >&2",
        wrapper: f'exec {real} "$@"',
    }
    for path, script in scripts.items():
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert toolkit() == str(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", "/given")
    assert toolkit() == "/given"


def test_no_toolkit_from_an_nvcc_that_names_none(
    toolkit: Callable[[], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolkit() is None
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert toolkit() is None


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_the_toolkit_here_has_the_runtime_library_to_link(toolkit: Callable[[], str | None]) -> None:
    home = toolkit()
    assert home is not None
    assert list(Path(home).glob("lib64/libcudart.so*"))


def test_an_unknown_choice_of_sanitizers_is_refused(source: Path, build: Build) -> None:
    result = build("wheel", source, "cpu", IPRM_KERNELS_SANITIZE="thread")
    assert result.returncode != 0
    assert "IPRM_KERNELS_SANITIZE: expected 0 or 1, got 'thread'" in result.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("choice", "instrumented"), [("1", True), *(pytest.param(off, False, marks=pytest.mark.grid) for off in ("0", ""))]
)
def test_sanitizers_come_and_optimisation_goes_by_one_variable(
    source: Path, tmp_path: Path, choice: str, instrumented: bool
) -> None:
    """Tested with a compiler that compiles nothing and records its arguments."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    real = os.environ.get("CXX", "c++")  # for torch, which queries the compiler's version
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) echo "$@" >> {calls}; exit 1;; *) exec {real} "$@";; esac\n')
    compiler.chmod(0o755)
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")]
    assert python(command, source, "cpu", CXX=str(compiler), IPRM_KERNELS_SANITIZE=choice).returncode != 0
    ours = calls.read_text().split("-std=c++20", 1)[1]
    settings = (source / "build" / "generated" / "build_settings.h").read_text()
    for text in (ours, settings):
        assert ("-fsanitize=address,undefined" in text) == instrumented
        assert ("-O1 -g" in text) == instrumented
    assert ("-O3" in settings) != instrumented


@needs_compiler
@pytest.mark.parametrize("choice", ["cpu", None])
def test_a_failed_compilation_is_an_error(source: Path, build: Build, choice: str | None) -> None:
    shutil.rmtree(source / "csrc" / "cpu")
    (source / "csrc" / "extension.cpp").write_text("#error this is broken on purpose\n")
    result = build("wheel", source, choice)
    assert result.returncode != 0
    assert "this is broken on purpose" in result.stdout


@needs_make
@pytest.mark.parametrize("target", ["demo", "install"])
def test_make_builds_again_after_any_change_to_a_source(source: Path, target: str) -> None:
    """Stamp files in .venv record what is installed; the last one of `demo` is .venv/installed."""
    stamps = [source / ".venv" / name for name in ("torch", "extension", "packages", "installed", "tools")]
    last = ".venv/installed" if target == "demo" else ".venv/tools"

    def is_current() -> bool:
        return subprocess.run(["make", "-q", last], cwd=source).returncode == 0

    stamps[0].parent.mkdir()
    now = time.time()
    for path in [path for path in source.rglob("*") if path.is_file()]:
        os.utime(path, (now - 10, now - 10))
    for age, stamp in zip((5, 4, 4, 3, 2), stamps, strict=True):
        stamp.touch()
        os.utime(stamp, (now - age, now - age))
    assert is_current()
    sources = [path for path in (source / "csrc").rglob("*") if path.is_file()]
    for path in (*sources, source / "setup.py", source / "pyproject.toml", source / "constraints.txt"):
        os.utime(path, (now, now))
        assert not is_current(), path
        os.utime(path, (now - 10, now - 10))
    assert is_current()


@needs_make
@pytest.mark.parametrize("failing", ["setup.py", "-e"])
def test_a_failure_of_either_job_of_the_installation_fails_the_target(source: Path, tmp_path: Path, failing: str) -> None:
    """The extension is compiled (setup.py) while pip downloads (-e); a Python and a pip that only record their calls."""
    calls = tmp_path / "calls"
    recorder = f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *{failing}*) exit 3;; esac\n'
    for name in ("python", "pip"):
        path = source / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recorder)
        path.chmod(0o755)
    done = subprocess.run(["make", ".venv/installed", "PYTHON=true"], cwd=source, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{failing} " in calls.read_text()
    assert not (source / ".venv" / "installed").exists()


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "fuzz", "sanitize", "bench", "clean"])
def test_make_names_files_that_exist(source: Path, target: str) -> None:
    recipe = subprocess.check_output(["make", "-n", target], cwd=source, text=True)
    for name in re.findall(r"(?:^|\s)((?:tests|benchmarks)/\S+|\S+\.(?:py|txt))", recipe):
        assert (source / name).exists(), f"{name}, named by: {recipe}"


@needs_make
def test_make_clean_leaves_the_sources_alone(source: Path) -> None:
    kept = {path for path in source.rglob("*") if path.is_file()}
    leavings = (".venv/installed", "build/lib/x.o", "dist/x.whl", "iprm_kernels.egg-info/x", "runs/x", "iprm_kernels/_C.x.so")
    for leaving in leavings:
        (source / leaving).parent.mkdir(parents=True, exist_ok=True)
        (source / leaving).touch()
    subprocess.run(["make", "-s", "clean"], cwd=source, check=True)
    assert {path for path in source.rglob("*") if path.is_file()} == kept
