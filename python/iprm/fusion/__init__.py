"""Fusion modules: features of several modalities in, `FusionOutput` out."""
