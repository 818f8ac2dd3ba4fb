"""The version of the installed package."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    """Return the version of the installed package; "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("graphcomp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
