"""Log-mel spectrograms with numpy and torch alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LogMel:
    """Log-mel spectrogram of a fixed length: log(mel power + floor), standardised per recording.

    (samples,) -> (1, bands, frames). Windows of 25 ms, 10 ms apart; longer recordings are cut to `frames` windows, shorter
    ones are padded with silence. Mel scale: 2595 log10(1 + f/700), triangles of height 1.
    """

    sample_rate: int = 8000
    bands: int = 40
    frames: int = 64
    floor: float = 1e-6

    @property
    def window(self) -> int:
        return self.sample_rate // 40

    @property
    def hop(self) -> int:
        return self.sample_rate // 100

    @property
    def transform_size(self) -> int:
        return 1 << (self.window - 1).bit_length()

    @property
    def samples(self) -> int:
        """Samples that a spectrogram is made of."""
        return (self.frames - 1) * self.hop

    def __call__(self, samples: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(samples[: self.samples], (0, max(0, self.samples - len(samples))))
        spectrum = torch.stft(
            padded,
            self.transform_size,
            hop_length=self.hop,
            win_length=self.window,
            window=torch.hann_window(self.window),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        log_mel = (self.filterbank() @ spectrum.abs().square() + self.floor).log()
        return ((log_mel - log_mel.mean()) / log_mel.std().clamp(min=1e-6))[None]

    @functools.cache  # noqa: B019 - few, small instances per process
    def filterbank(self) -> Tensor:
        """The triangular mel filters.  (bands, transform_size / 2 + 1)"""
        top = 2595 * np.log10(1 + self.sample_rate / 2 / 700)
        edges = 700 * (10 ** (np.linspace(0, top, self.bands + 2) / 2595) - 1)  # hertz
        frequency = np.linspace(0, self.sample_rate / 2, self.transform_size // 2 + 1)
        rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
        return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))
