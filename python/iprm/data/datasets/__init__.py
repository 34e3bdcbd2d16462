"""Datasets, one file each; the shared readers of recordings and spectrograms beside them."""
