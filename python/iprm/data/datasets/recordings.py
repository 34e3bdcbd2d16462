"""Spectrograms of a folder of spoken digits, ``{digit}_{speaker}_{index}.wav``, computed once and cached."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from iprm.data.npz import Archive
from iprm.errors import InputError
from iprm.files import reading, replacing

from .riff import declared_frames
from .spectrogram import LogMel

NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d{1,18})\.wav")  # the index fits 64 bits
#: Formats of libsndfile that are WAV. It would also read others, whatever the name of the file.
FORMATS = ("WAV", "WAVEX", "RF64")
#: Incremented whenever a change of the code changes the spectrograms of the same files and parameters.
CACHE_VERSION = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recordings:
    """Spectrograms (N, 1, bands, frames) float32, and digit and index of each recording, (N,) int64, in order of file name."""

    spectrograms: np.ndarray
    digits: np.ndarray
    indices: np.ndarray


def default_cache_dir() -> Path:
    """``iprm`` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache; a path that begins with ~ if there is no home."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "iprm")


def load_recordings(folder: Path, log_mel: LogMel, cache_dir: Path, faults: list[str] | None = None) -> Recordings:
    """Reads the folder, or the cache if files (name, size, modification time) and parameters are unchanged.

    There is one cache file per folder, which is replaced when anything changes, so the cache does not grow.

    Args:
        folder: of the recordings.
        log_mel: the spectrogram to compute.
        cache_dir: folder of cached spectrograms.
        faults: skip foreign and broken files, and append their errors to this list.

    Raises:
        InputError: there is no such folder, it has no recordings, or without `faults` a file is foreign or broken; the message
            names the file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder of recordings")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: the folder is empty; expected recordings named {{digit}}_{{speaker}}_{{index}}.wav")
    stats = [(file.name, *_size_and_time(file)) for file in files]
    key = hashlib.sha256(repr((CACHE_VERSION, astuple(log_mel), stats)).encode()).hexdigest()
    cache = cache_dir / f"recordings-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.npz"
    try:
        for file in files:
            _check_file(file)
        spectrograms = _cached(cache, key, (len(files), 1, log_mel.bands, log_mel.frames))
        if spectrograms is None:
            spectrograms = _compute(files, log_mel)
            _store(cache, key, spectrograms)
    except InputError:  # names the first invalid file only, so check each
        if faults is None:
            raise
        count, files = len(files), [file for file in files if _is_readable(file, log_mel, faults)]
        if not files:
            raise InputError(f"{folder}: none of its {count} files is a recording that can be read") from None
        spectrograms = _compute(files, log_mel)
    names = [NAME.fullmatch(file.name) for file in files]
    digits, indices = ([int(match[part]) for match in names if match] for part in ("digit", "index"))
    return Recordings(spectrograms, np.array(digits, np.int64), np.array(indices, np.int64))


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:  # `_check_file` names the cause
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _check_file(file: Path) -> None:
    """Raises InputError unless the file has the name of a recording and can be a file of one."""
    if not NAME.fullmatch(file.name):
        raise InputError(f"{file}: a foreign file; expected recordings named {{digit}}_{{speaker}}_{{index}}.wav alone")
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if file.is_symlink():
            raise InputError(f"{file}: a link to {os.readlink(file)}, which cannot be read: {error.strerror}") from error
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):  # reading a pipe would wait for its writer
        raise InputError(f"{file}: expected a file, got a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}")


def _is_readable(file: Path, log_mel: LogMel, faults: list[str]) -> bool:
    try:
        _check_file(file)
        _spectrogram(file, log_mel)
    except InputError as error:
        faults.append(str(error))
        return False
    return True


def _cached(cache: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The spectrograms of a cache, or None if it has others or, after a warning that names it, is damaged."""
    try:
        if not cache.is_file():
            return None
        with Archive(cache) as archive:  # an array is read as a whole, whereby its checksum is verified
            arrays = archive.arrays(("key", "spectrograms"))
            if arrays["key"].read().item() != key:
                return None
            found = arrays["spectrograms"].read()
        if (found.shape, found.dtype) != (shape, np.float32) or not np.isfinite(found).all():
            raise InputError(f"{cache}: expected finite numbers of shape {shape}, got {found.dtype} of shape {found.shape}")
    except Exception as error:  # the file may hold anything
        log.warning(
            "%s; the cache is damaged, and is made anew", error if isinstance(error, InputError) else f"{cache}: {error}"
        )
        return None
    return found


def _store(cache: Path, key: str, spectrograms: np.ndarray) -> None:
    try:
        if cache.parts[0] == "~":
            raise FileNotFoundError("there is no home folder")
        if os.path.lexists(cache) and not stat.S_ISREG(cache.lstat().st_mode):  # a pipe would wait, a link lead anywhere
            raise FileExistsError("expected a file, got a link, folder, device or pipe")
        with replacing(cache, "wb") as file:
            np.savez(file, key=np.array(key), spectrograms=spectrograms)
    except OSError as error:
        log.warning("%s: the spectrograms cannot be cached: %s", cache, error)


def _compute(files: list[Path], log_mel: LogMel) -> np.ndarray:
    return np.stack([_spectrogram(file, log_mel) for file in track(files, "Spectrograms", transient=True)])


def _spectrogram(file: Path, log_mel: LogMel) -> np.ndarray:
    import soundfile

    try:
        # as bytes, where names of files are: soundfile would encode a name that is not UTF-8
        with soundfile.SoundFile(os.fsencode(file) if os.name == "posix" else file) as recording:
            rate, frames = recording.samplerate, recording.frames
            if recording.format not in FORMATS:
                raise InputError(f"{file}: expected a WAV file, got {recording.format}")
            if rate != log_mel.sample_rate:
                raise InputError(f"{file}: expected {log_mel.sample_rate} samples a second, got {rate}")
            # libsndfile allocates as many samples as it is asked for, and a header may declare any number
            samples = recording.read(min(frames, log_mel.samples), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        with reading(file):
            raise InputError(f"{file}: not a readable recording: {error}") from error
    found = frames if len(samples) == min(frames, log_mel.samples) else len(samples)
    declared = max(frames, declared_frames(file) or 0)
    if found < declared:
        raise InputError(f"{file}: truncated: its header declares {declared} frames, and the file has {found}")
    if len(samples) == 0:
        raise InputError(f"{file}: the recording is empty")
    if not np.isfinite(samples).all():
        raise InputError(f"{file}: the recording has samples that are not finite")
    return log_mel(torch.from_numpy(samples.mean(axis=1))).numpy()
