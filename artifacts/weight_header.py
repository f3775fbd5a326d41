"""Whether a weight file's own header tells other tools the same as the manifest tells the runtime."""

from __future__ import annotations

from llmc.artifacts.manifest import TensorRecord
from llmc.artifacts.safetensors import read_header
from llmc.artifacts.weight_file import PADDING_PREFIX
from llmc.errors import ArtifactError


def check_weight_header(fd: int, tensors: list[TensorRecord], path: str, artifact: str) -> None:
    """Hold a weight file's safetensors header against the manifest's records.

    Args:
        fd: the open file, its bytes verified.
        tensors: all records; those of other files are skipped.
        path: the file's name inside the artifact.
        artifact: for messages.

    Raises:
        ArtifactError: the header is broken, or names other tensors, dtypes, shapes or places.
    """
    where = f"{artifact}/{path}"
    header = {name: entry for name, entry in read_header(fd, where).items() if not name.startswith(PADDING_PREFIX)}
    records = {record.name: record for record in tensors if record.file == path}
    if set(header) != set(records):
        odd = sorted(set(header) ^ set(records))[0]
        raise ArtifactError(f"{where}: tensor {odd[:200]!r} is not in both the file's header and the manifest; compile again")
    for name, record in records.items():
        entry = header[name]
        if (entry.dtype, list(entry.shape), entry.offset, entry.nbytes) != (record.dtype, record.shape, record.offset, record.nbytes):
            raise ArtifactError(
                f"{where}: tensor {name[:200]!r} is described differently by the file's header and the manifest; compile again"
            )
