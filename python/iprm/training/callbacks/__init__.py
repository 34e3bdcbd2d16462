"""Lightning callbacks and loggers of a run: state, best checkpoint, progress, diagnostics, metrics.csv."""
