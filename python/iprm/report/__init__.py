"""The HTML report of runs, made from their folders alone."""
