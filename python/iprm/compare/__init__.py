"""Comparisons: methods x seeds on one dataset, the table and the figure."""
