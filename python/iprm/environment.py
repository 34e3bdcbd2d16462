"""Versions of the packages that results depend on, read without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("iprm-kernels", "torch", "triton", "lightning", "torchmetrics", "jsonargparse", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """The version of Python and of each of `PACKAGES`, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
