"""Training with Lightning: the module, metrics, checkpoints and callbacks."""
