"""Output in encodings that lack letters, and to readers that end before it does."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from iprm import streams
from iprm.cli import main as cli
from iprm.cli.main import COMMANDS, main


def written(monkeypatch, encoding: str, write, errors: str = "strict") -> bytes:
    """What `write` writes to standard output and error of this encoding, one after the other."""
    out, err = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, errors))
        patch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding, errors))
        write()
        sys.stdout.flush()
        sys.stderr.flush()
        return out.getvalue() + err.getvalue()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"lambda 0.4 +-0.1, \\xe9\\u6620\\U0001f600, 3 x 4"),
        ("latin-1", b"lambda 0.4 \xb10.1, \xe9\\u6620\\U0001f600, 3 \xd7 4"),
        ("cp1252", b"lambda 0.4 \xb10.1, \xe9\\u6620\\U0001f600, 3 \xd7 4"),
        ("utf-8", "λ 0.4 ±0.1, é映😀, 3 × 4".encode()),
    ],
)
def test_letters_that_an_encoding_lacks_are_spelled_out(monkeypatch, encoding, shown):
    def write() -> None:
        streams.write_any_text()
        print("λ 0.4 ±0.1, é映😀, 3 × 4", end="")

    assert written(monkeypatch, encoding, write) == shown


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "lambda +-"), ("latin-1", "lambda ±"), ("utf-8", "λ ±")])
def test_the_width_of_a_text_is_that_of_what_is_shown(monkeypatch, encoding, shown):
    def write() -> None:
        assert streams.printable("λ ±") == shown

    written(monkeypatch, encoding, write)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert streams.printable("λ ±") == "λ ±"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_of_a_file_name_that_are_no_text_are_written_as_they_are(monkeypatch, encoding):
    def write() -> None:
        streams.write_any_text()
        print(os.fsdecode(b"run\xff"), end="")

    assert written(monkeypatch, encoding, write) == b"run\xff"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_the_help_of_every_command_can_be_written(monkeypatch, encoding, command):
    arguments = ["--help"] if command is None else [command, "--help"]
    assert b"usage: iprm" in written(monkeypatch, encoding, lambda: main(arguments))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_error_about_any_name_can_be_written(monkeypatch, encoding):
    assert b"unknown command" in written(monkeypatch, encoding, lambda: main(["λ映像"]))


@pytest.fixture
def unread() -> int:
    """A pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["fit", "--help"], ["nonsense"]])
def test_without_a_reader_a_command_ends_quietly_with_the_code_of_sigpipe(monkeypatch, unread, arguments):
    with open(os.dup(unread), "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "stderr", pipe)
        assert main(arguments) == 141
        pipe.write("more")  # is lost


def test_the_process_ends_quietly_as_well(unread):
    done = subprocess.run([sys.executable, "-m", "iprm", "--help"], stdout=unread, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_rich_that_exits_without_a_reader_is_such_an_end(monkeypatch, unread):
    from rich.console import Console

    monkeypatch.setattr(cli, "_dispatch", lambda _: Console().print("text"))
    with open(os.dup(unread), "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main([]) == 141


def test_another_broken_pipe_is_an_error_in_one_line(monkeypatch, capsys):
    def fail(_) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main([]) == 2
    assert capsys.readouterr().err == "iprm: [Errno 32] Broken pipe\n"


def test_a_full_disk_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "iprm", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "iprm: [Errno 28] No space left on device\n")


def test_a_closed_output_is_no_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["--help"]) == 0
