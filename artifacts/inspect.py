"""Looking at artifacts: what one holds, and how two differ. Nothing of them is run; the machine's fitness is not asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llmc.artifacts.kv_bytes import block_bytes
from llmc.artifacts.manifest import Manifest
from llmc.artifacts.requirements import check_requirements, this_machine
from llmc.artifacts.verify import open_artifact
from llmc.errors import ArtifactError

_NAMED_BY = {
    "files": "path",
    "images": "role",
    "weights": "path",
    "tensors": "name",
    "entries": "name",
    "passes": "name",
    "inputs": "name",
    "outputs": "name",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One place where two manifests differ; None on the side that has nothing there."""

    path: str  # "tensors[embed].dtype"
    a: Any
    b: Any


def describe(path: str | Path) -> dict[str, Any]:
    """The facts of an artifact, for people and as JSON. All but the weights' bytes is verified on the way.

    Returns:
        Sections in reading order; values are plain JSON data.

    Raises:
        ArtifactError: the artifact is damaged or foreign.
    """
    with open_artifact(path, check_machine=False) as artifact:
        manifest, signed = artifact.manifest, artifact.signature_fd is not None
        digest = artifact.digest
    weights_bytes = sum(weight.size_bytes for weight in manifest.weights)
    total = sum(record.size_bytes for record in manifest.files)
    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    return {
        "artifact": {
            "path": str(path),
            "digest": digest,
            "format_version": manifest.format_version,
            "llmc_version": manifest.llmc_version,
            "level": manifest.level,
            "total_bytes": total,
            "weights_bytes": weights_bytes,
            "weights": "embedded" if manifest.weights else "external" if manifest.tensors else "none",
            "signed": signed,
            "runs_here": _runs_here(manifest),
        },
        "model": plain["model"],
        "target": plain["target"] | {"requires": _requires(manifest)},
        "limits": plain["limits"],
        "kv": {
            "block_size": manifest.kv.block_size,
            "dtype": manifest.kv.dtype,
            "quantization": plain["kv_quantization"],
            "windows": [group.window for group in manifest.kv.groups],
            "block_bytes": block_bytes(manifest.kv),
        },
        "entries": [
            {
                "name": entry.name,
                "executor": entry.executor,
                "program": entry.program,
                "inputs": len(entry.inputs),
                "constants": len(entry.constants),
            }
            for entry in manifest.entries
        ],
        "passes": plain["passes"],
        "op_implementations": plain["op_implementations"],
        "tokenizer": plain["tokenizer"],
        "generation_defaults": plain["generation_defaults"],
        "canaries": {"count": len(manifest.canaries), "tolerance": manifest.canary_tolerance},
        "toolchain": plain["toolchain"],
        "settings": plain["settings"],
        "files": [{"path": record.path, "size_bytes": record.size_bytes, "sha256": record.sha256} for record in manifest.files],
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": "x".join(map(str, t.shape)), "nbytes": t.nbytes, "file": t.file}
            for t in manifest.tensors
        ],
    }


def diff(a: str | Path, b: str | Path) -> list[Difference]:
    """How artifact `b` differs from artifact `a`; empty if they are the same, byte for byte.

    Records are matched by name (tensors, files, passes, entries), not by their place in a list.

    Raises:
        ArtifactError: one of them is damaged or foreign.
    """
    with open_artifact(a, check_machine=False) as first, open_artifact(b, check_machine=False) as second:
        one, other = first.manifest, second.manifest
    found: list[Difference] = []
    _compare("", msgspec.to_builtins(one), msgspec.to_builtins(other), found)
    return [difference for difference in found if difference.path != "manifest_sha256"]


def _compare(path: str, a: Any, b: Any, found: list[Difference]) -> None:
    if a == b and type(a) is type(b):
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            _compare(f"{path}.{key}" if path else str(key), a.get(key), b.get(key), found)
        return
    if isinstance(a, list) and isinstance(b, list):
        named_a, named_b = _by_name(path, a), _by_name(path, b)
        if named_a is not None and named_b is not None:
            for key in [*named_a, *(k for k in named_b if k not in named_a)]:
                _compare(f"{path}[{key}]", named_a.get(key), named_b.get(key), found)
            if list(named_a) != list(named_b) and set(named_a) == set(named_b):
                found.append(Difference(path=f"{path} (order)", a=list(named_a), b=list(named_b)))
            return
    found.append(Difference(path=path, a=a, b=b))


def _by_name(path: str, items: list[Any]) -> dict[str, Any] | None:
    """A list of records by the field that names them; None if it is not such a list, or names repeat."""
    field = _NAMED_BY.get(path.rsplit(".", 1)[-1])
    if field is None or not all(isinstance(item, dict) and field in item for item in items):
        return None
    named = {str(item[field]): item for item in items}
    return named if len(named) == len(items) else None


def _runs_here(manifest: Manifest) -> str:
    try:
        check_requirements(manifest.requirements, this_machine(), "it")
    except ArtifactError as error:
        return f"no: {error}"
    return "yes"


def _requires(manifest: Manifest) -> str:
    needs = manifest.requirements
    torch = f", torch {needs.torch}" if needs.torch else ""
    return f"{needs.machine}, CPU features {' '.join(needs.cpu_features) or 'none'}{torch}, format {needs.min_format}"
