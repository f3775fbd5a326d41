"""The version this server reports: the installed package's, read once, when it is first asked for."""

from __future__ import annotations

from functools import cache


@cache
def installed_version() -> str:
    """As pip knows it."""
    from importlib.metadata import PackageNotFoundError, version  # it brings the parser of e-mail along, which no start needs

    try:
        return version("llmc")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
