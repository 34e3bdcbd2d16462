"""The `av-digits` dataset: recordings, their cache, and the pairs."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from iprm.data import make_data
from iprm.data.datasets import recordings
from iprm.data.datasets.spectrogram import LogMel
from iprm.encoders.description import InputSpec
from iprm.errors import InputError

RATE = 8000


def tone(hertz: float, seconds: float = 0.3) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten digits, one speaker, indices 0 to 8: 50 test recordings and 40 others."""
    place = tmp_path / "recordings"
    place.mkdir()
    for digit in range(10):
        for index in range(9):
            soundfile.write(place / f"{digit}_ann_{index}.wav", tone(200 + 150 * digit + 3 * index), RATE)
    return place


def data_of(folder: Path, **options):
    return make_data("av-digits", path=str(folder), cache_dir=str(folder.parent / "cache"), val_fraction=0.25, **options)


def test_recordings_are_paired_with_noisy_scans_of_their_class(folder):
    quiet = data_of(folder, noise=0.0)
    assert quiet.inputs == {"audio": InputSpec((1, 40, 64)), "image": InputSpec((1, 8, 8))}
    pixels, labels = recordings_free_digits()
    for split in quiet.splits.values():
        assert split.target.equal(torch.from_numpy(labels)[split.origin["image"]])
        np.testing.assert_array_equal(split.inputs["image"][:, 0].numpy(), pixels[split.origin["image"]])
    noisy = data_of(folder, noise=0.8).splits["train"]
    added = noisy.inputs["image"][:, 0].numpy() - pixels[noisy.origin["image"]]
    assert added.std() == pytest.approx(0.8, rel=0.1)


def recordings_free_digits() -> tuple[np.ndarray, np.ndarray]:
    from iprm.data.datasets.digits import scanned_digits

    return scanned_digits()


def test_test_is_index_0_to_4_and_no_recording_or_scan_is_in_two_splits(folder):
    data = data_of(folder)
    names = sorted(file.name for file in folder.iterdir())
    test_names = {names[row] for row in data.splits["test"].origin["audio"]}
    assert test_names == {name for name in names if int(name[:-4].split("_")[2]) < 5}
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 30, "val": 10, "test": 50}
    for modality in ("audio", "image"):
        seen = [set(split.origin[modality].tolist()) for split in data.splits.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_seed_gives_the_same_data_again(folder):
    one, same, other = (data_of(folder, seed=seed).splits["train"] for seed in (1, 1, 2))
    assert one.inputs["image"].equal(same.inputs["image"])
    assert not one.inputs["image"].equal(other.inputs["image"])


def test_spectrograms_are_computed_once(folder, monkeypatch):
    first = data_of(folder).splits["test"].inputs["audio"]
    monkeypatch.setattr(recordings, "_compute", lambda *_: pytest.fail("computed again"))
    assert data_of(folder).splits["test"].inputs["audio"].equal(first)


def _touch(folder: Path) -> None:
    os.utime(folder / "3_ann_2.wav", ns=(1, 1))


def _replace(folder: Path) -> None:
    soundfile.write(folder / "3_ann_2.wav", tone(50, 0.5), RATE)


def _add(folder: Path) -> None:
    soundfile.write(folder / "3_bob_2.wav", tone(50), RATE)


@pytest.mark.parametrize("change", [_touch, _replace, _add])
def test_a_changed_folder_is_computed_anew_in_the_same_cache_file(folder, monkeypatch, change):
    _ = data_of(folder).splits
    change(folder)
    calls = []
    compute = recordings._compute
    monkeypatch.setattr(recordings, "_compute", lambda *a: calls.append(1) or compute(*a))
    _ = data_of(folder).splits
    _ = data_of(folder).splits
    assert calls == [1]
    assert len(list((folder.parent / "cache").iterdir())) == 1


def test_other_parameters_and_versions_are_computed_anew(folder, monkeypatch):
    cache = folder.parent / "cache"
    one = recordings.load_recordings(folder, LogMel(RATE), cache).spectrograms
    two = recordings.load_recordings(folder, LogMel(RATE, bands=20), cache).spectrograms
    assert (one.shape[2], two.shape[2]) == (40, 20)
    monkeypatch.setattr(recordings, "CACHE_VERSION", recordings.CACHE_VERSION + 1)
    monkeypatch.setattr(recordings, "_compute", lambda files, _: np.zeros((len(files), 1, 1, 1), np.float32))
    assert recordings.load_recordings(folder, LogMel(RATE, bands=20), cache).spectrograms.shape[2] == 1


def forged(**arrays: np.ndarray) -> Callable[[bytes], bytes]:
    """A cache with the same key and other arrays."""

    def change(content: bytes) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **(dict(np.load(io.BytesIO(content))) | arrays))
        return stream.getvalue()

    return change


def flipped(text: bytes, place: int) -> Callable[[bytes], bytes]:
    """One bit flipped, `place` bytes after the first `text`."""

    def change(content: bytes) -> bytes:
        at = content.index(text) + place
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return change


DAMAGED = {
    "a part": lambda content: content[:1000],
    "nothing": lambda content: b"",
    "no archive": lambda content: b"PK" + bytes(5000),
    "a flipped bit of a number": flipped(b"spectrograms", 500),
    "a flipped bit of the shape": flipped(b"shape': (", 9),
    "a flipped bit of the type": flipped(b"'<f4'", 3),
    "a flipped bit of the version of the format": flipped(b"\x93NUMPY", 6),
    "a flipped bit of the key": flipped(b"<U64", 200),
    "a lost page": lambda content: content[:4096] + bytes(4096) + content[8192:],
    "no key": lambda content: content.replace(b"key.npy", b"kez.npy"),
    "a key of several": forged(key=np.array(["a", "b"])),
    "numbers of another type": forged(spectrograms=np.zeros((90, 1, 40, 64))),
    "fewer recordings": forged(spectrograms=np.zeros((3, 1, 40, 64), np.float32)),
    "numbers that are not finite": forged(spectrograms=np.full((90, 1, 40, 64), np.nan, np.float32)),
    "text": forged(spectrograms=np.array("text")),
    "objects": forged(spectrograms=np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_cache_is_named_and_made_anew(folder, caplog, damage):
    whole = data_of(folder).splits["val"].inputs["audio"]
    (cache,) = (folder.parent / "cache").iterdir()
    sound = cache.read_bytes()
    cache.write_bytes(damage(sound))
    assert cache.read_bytes() != sound
    assert data_of(folder).splits["val"].inputs["audio"].equal(whole)
    assert [str(cache) in record.getMessage() and "made anew" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    assert data_of(folder).splits["val"].inputs["audio"].equal(whole)
    assert caplog.records == [], "it is whole again"


def test_a_broken_recording_is_named(folder):
    (folder / "4_ann_1.wav").write_bytes(b"RIFF but no more")
    with pytest.raises(InputError, match=r"4_ann_1\.wav: not a readable recording"):
        _ = data_of(folder).splits


def test_an_empty_recording_is_named(folder):
    soundfile.write(folder / "4_ann_1.wav", np.zeros(0), RATE)
    with pytest.raises(InputError, match=r"4_ann_1\.wav: the recording is empty"):
        _ = data_of(folder).splits


def test_a_foreign_file_is_named(folder):
    (folder / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes\.txt: a foreign file"):
        _ = data_of(folder).splits


def test_another_sample_rate_is_named(folder):
    soundfile.write(folder / "4_ann_1.wav", tone(300), 16000)
    with pytest.raises(InputError, match=r"4_ann_1\.wav: expected 8000 samples a second, got 16000"):
        _ = data_of(folder).splits


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        _ = data_of(tmp_path / "nowhere").splits
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):
        _ = data_of(tmp_path / "empty").splits


def test_a_tone_is_loudest_in_the_band_that_holds_it():
    log_mel = LogMel(RATE)
    spectrogram = log_mel(torch.from_numpy(tone(1000.0, 1.0)).float())
    bank = log_mel.filterbank()
    bin_of_tone = round(1000 / RATE * log_mel.transform_size)
    assert spectrogram.shape == (1, 40, 64)
    assert spectrogram[0, :, 20].argmax() == bank[:, bin_of_tone].argmax()


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_recording_of_which_a_part_is_lost_is_named_with_what_is_left(folder):
    _half(folder / "4_ann_1.wav")
    with pytest.raises(InputError, match=r"4_ann_1\.wav: truncated: its header declares 2400 frames, and the file has 1189"):
        _ = data_of(folder).splits


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT", "ULAW"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "RIFX"])
def test_the_header_of_every_kind_of_wav_declares_its_frames(tmp_path, subtype, kind):
    file = tmp_path / "0_ann_0.wav"
    form, endian = ("WAV", "BIG") if kind == "RIFX" else (kind, "FILE")
    soundfile.write(file, np.stack([tone(300), tone(400)], 1), RATE, format=form, subtype=subtype, endian=endian)
    assert recordings._spectrogram(file, LogMel(RATE)).shape == (1, 40, 64)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(InputError, match="truncated: its header declares 2400 frames"):
        recordings._spectrogram(file, LogMel(RATE))


def test_a_recording_written_to_a_pipe_declares_no_length(tmp_path):
    """Such a header has the size 0xFFFFFFFF, as ffmpeg writes it."""
    file = tmp_path / "0_ann_0.wav"
    soundfile.write(file, tone(300), RATE)
    content = bytearray(file.read_bytes())
    place = content.index(b"data") + 4
    content[4:8] = content[place : place + 4] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    assert recordings._spectrogram(file, LogMel(RATE)).shape == (1, 40, 64)
