"""All plans of an artifact checked in full, the order of their launches too, without a device."""

from __future__ import annotations

from collections.abc import Callable

from llmc.artifacts.cubin import Cubin
from llmc.artifacts.manifest import Manifest
from llmc.artifacts.plan import decode_plan
from llmc.artifacts.plan_check import check_plan


def check_plan_files(manifest: Manifest, read: Callable[[str], bytes]) -> None:
    """Check the plans of every entry against themselves and their images.

    Args:
        read: gives a verified file's bytes by its path.

    Raises:
        ArtifactError: one sentence about the first thing that is wrong.
    """
    paths = [record.path for entry in manifest.entries for record in entry.plans]
    paths += [record.path for entry in manifest.entries for record in entry.sampling]
    if not paths:
        return
    images = {image.sha256: read(image.path) for image in manifest.images if image.role == "cubin"}
    cubins: dict[str, Cubin] = {}
    for path in dict.fromkeys(paths):
        check_plan(decode_plan(read(path), path), images, path, cubins)
