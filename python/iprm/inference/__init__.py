"""Trained models without Lightning: reading checkpoints, new samples, predictions, export."""
