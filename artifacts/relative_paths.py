"""Which names a file inside an artifact may have. A manifest is foreign input: none of its names may lead outside."""

from __future__ import annotations

import re

from llmc.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "signature.sig"  # detached, the one file that no manifest lists

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
_MAX_PARTS = 8


def check_relative_path(path: str, where: str) -> None:
    """Refuse every name that is not plain, relative and below the artifact's folder.

    Raises:
        ArtifactError: absolute, "..", hidden, empty or over-long parts, odd characters, or a reserved name.
    """
    if path in (MANIFEST_NAME, SIGNATURE_NAME):
        raise ArtifactError(f"{where}: the name {path!r} is reserved and cannot be listed as a file of the artifact")
    parts = path.split("/")
    if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
        raise ArtifactError(
            f"{where}: the file name {path[:200]!r} is not allowed; names are relative, without '.' and '..' parts, "
            f"at most {_MAX_PARTS} parts of letters, digits and '_.+-'"
        )
