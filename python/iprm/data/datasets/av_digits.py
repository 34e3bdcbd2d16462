"""`av-digits`: spoken digits, each paired with a noisy scan of the same digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from iprm.data.module import MultimodalData
from iprm.data.split import Split, check_fractions, stratified
from iprm.errors import check_number, check_whole

from .digits import scanned_digits
from .recordings import Recordings, default_cache_dir, load_recordings
from .spectrogram import LogMel

#: Recordings with index 0 to 4 of every speaker and digit are the test split of the Free Spoken Digit Dataset.
TEST_INDICES = 5


class AvDigits(MultimodalData):
    """Modality `audio` (1, 40, 64): log-mel spectrogram of a recording. Modality `image` (1, 8, 8): one of scikit-learn's
    scanned digits of the same class, pixels in 0..1 with Gaussian noise added.

    Recordings with index 0 to 4 are the test split, as in the Free Spoken Digit Dataset; validation recordings are drawn from
    the others. Scans are divided in the same proportions before pairing, so that no scan occurs in two splits.

    Args:
        path: the folder of recordings, ``{digit}_{speaker}_{index}.wav``.
        batch_size: rows per step.
        seed: determines the splits, the pairs and the noise.
        noise: standard deviation of the noise on the pixels.
        val_fraction: fraction of the recordings outside the test split that becomes the validation split.
        sample_rate: of the recordings, in hertz.
        cache_dir: folder of cached spectrograms; None for ``iprm`` in the user's cache folder.
        predict_split: split that `iprm predict` predicts: "train", "val" or "test".
        num_workers: processes that prefetch batches; data in memory needs none.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        seed: int = 0,
        noise: float = 0.8,
        val_fraction: float = 0.1,
        sample_rate: int = 8000,
        cache_dir: str | None = None,
        predict_split: str = "test",
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, predict_split=predict_split, num_workers=num_workers)
        self.val_fraction, _ = check_fractions(val_fraction, 0.25)
        self.path, self.noise = Path(path), check_number("noise", noise)
        self.log_mel = LogMel(check_whole("sample_rate", sample_rate, 1))
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()

    def prepare_data(self) -> None:
        load_recordings(self.path, self.log_mel, self.cache_dir)

    def read(self) -> dict[str, Split]:
        return self._paired(load_recordings(self.path, self.log_mel, self.cache_dir))

    def inspect(self, faults: list[str]) -> dict[str, Split]:
        return self._paired(load_recordings(self.path, self.log_mel, self.cache_dir, faults))

    def _paired(self, recordings: Recordings) -> dict[str, Split]:
        pixels, labels = scanned_digits()
        splitter, image_splitter, pairer, noiser = (np.random.default_rng([self.seed, stream]) for stream in range(4))
        audio_rows = self._audio_split(recordings.digits, recordings.indices, splitter)
        # scans are divided in the proportions of the recordings, with at least a tenth for each held-out split
        shares = {name: len(audio_rows[name]) / len(recordings.digits) for name in ("test", "val")}
        fractions = {name: min(0.4, max(0.1, share)) for name, share in shares.items()}
        image_rows = stratified(labels, fractions, image_splitter)

        def split(name: str) -> Split:
            rows = audio_rows[name]
            digits = recordings.digits[rows]
            pairs = np.empty(len(rows), np.int64)
            for digit in np.unique(digits):
                candidates = image_rows[name][labels[image_rows[name]] == digit]
                pairs[digits == digit] = pairer.choice(candidates, size=int((digits == digit).sum()))
            noise = noiser.normal(0, self.noise, size=(len(rows), *pixels.shape[1:]))
            images = (pixels[pairs] + noise).astype(np.float32)[:, None]
            inputs = {"audio": torch.from_numpy(recordings.spectrograms[rows]), "image": torch.from_numpy(images)}
            origin = {"audio": torch.from_numpy(rows), "image": torch.from_numpy(pairs)}
            return Split(inputs, torch.from_numpy(digits), origin)

        return {name: split(name) for name in ("train", "val", "test")}

    def _audio_split(self, digits: np.ndarray, indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        test, others = np.flatnonzero(indices < TEST_INDICES), np.flatnonzero(indices >= TEST_INDICES)
        rest = stratified(digits[others], {"val": self.val_fraction}, rng)
        return {"train": others[rest["train"]], "val": others[rest["val"]], "test": test}
