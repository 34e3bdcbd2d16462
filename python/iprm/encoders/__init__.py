"""Encoders: the input of one modality in, its features (B, D) out."""
