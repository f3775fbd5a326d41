"""Whether a manifest agrees with itself: every name it uses exists, every offset lies inside its file.

Run by the writer before publishing (a failure is our bug) and by the reader before any file is opened (a failure is theirs).
"""

from __future__ import annotations

import re

from llmc.artifacts.chunks import digest_of_chunks
from llmc.artifacts.element_sizes import nbytes_of
from llmc.artifacts.manifest import Entry, FileRecord, Manifest, TensorRecord, WeightFile
from llmc.artifacts.relative_paths import check_relative_path
from llmc.errors import ArtifactError

ALIGNMENT = 64  # bytes; a cache line, and what the kernels' aligned loads need
MAX_FILES = 10_000
MAX_TENSORS = 1_000_000
MAX_CHUNK_BYTES = 1 << 30
MAX_RANKS = 16
MAX_LORAS, MAX_LORA_RANK = 256, 512
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check_manifest(manifest: Manifest, where: str) -> None:
    """Hold a manifest's parts against each other.

    Args:
        manifest: what was parsed, or is about to be written.
        where: how messages call the file.

    Raises:
        ArtifactError: one sentence about the first thing that is wrong.
    """
    if len(manifest.files) > MAX_FILES or len(manifest.tensors) > MAX_TENSORS:
        raise ArtifactError(
            f"{where}: lists {len(manifest.files)} files and {len(manifest.tensors)} tensors, "
            f"more than a manifest may have ({MAX_FILES} and {MAX_TENSORS})"
        )
    files = _check_files(manifest.files, where)
    _check_images(manifest, files, where)
    weights = _check_weights(manifest.weights, files, where)
    names = _check_tensors(manifest.tensors, weights, where)
    _check_entries(manifest, files, names, where)
    _check_lora(manifest, where)
    for path in (manifest.tokenizer.tokenizer_json, manifest.tokenizer.chat_template, manifest.tokenizer.reply_formats):
        if path is not None:
            _known(path, files, where, "tokenizer")


def _check_files(records: list[FileRecord], where: str) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for record in records:
        check_relative_path(record.path, where)
        if record.path in files:
            raise ArtifactError(f"{where}: lists {record.path} twice")
        if record.size_bytes < 0 or not _SHA256.fullmatch(record.sha256):
            raise ArtifactError(f"{where}: the record of {record.path} has no valid size and SHA-256")
        files[record.path] = record
    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise ArtifactError(f"{where}: {'/'.join(parts[:depth])} is listed both as a file and as the folder of {path}")
    return files


def _check_images(manifest: Manifest, files: dict[str, FileRecord], where: str) -> None:
    for image in manifest.images:
        record = _known(image.path, files, where, "images")
        folder, _, name = image.path.rpartition("/")
        if folder != "images" or name.split(".")[0] != image.sha256 or record.sha256 != image.sha256:
            raise ArtifactError(f"{where}: image {image.path} is not named images/<its SHA-256>.<extension>")
    if len({image.path for image in manifest.images}) != len(manifest.images):
        raise ArtifactError(f"{where}: lists an image twice")


def _check_weights(weights: list[WeightFile], files: dict[str, FileRecord], where: str) -> dict[str, WeightFile]:
    found: dict[str, WeightFile] = {}
    for weight in weights:
        record = _known(weight.path, files, where, "weights")
        if weight.path in found:
            raise ArtifactError(f"{where}: lists weight file {weight.path} twice")
        if not 0 < weight.chunk_bytes <= MAX_CHUNK_BYTES or weight.chunk_bytes % 4096:
            raise ArtifactError(f"{where}: chunk_bytes {weight.chunk_bytes} of {weight.path} is not a multiple of 4096 up to 1 GiB")
        if weight.size_bytes != record.size_bytes:
            raise ArtifactError(f"{where}: {weight.path} has two sizes, {weight.size_bytes} and {record.size_bytes} bytes")
        expected = -(-weight.size_bytes // weight.chunk_bytes)
        if len(weight.chunks) != expected or not all(_SHA256.fullmatch(chunk) for chunk in weight.chunks):
            raise ArtifactError(
                f"{where}: {weight.path} needs {expected} chunk digests, {len(weight.chunks)} are there or one is not SHA-256"
            )
        if digest_of_chunks(weight.chunks) != record.sha256:
            raise ArtifactError(f"{where}: the digest of {weight.path} is not that of its chunk digests")
        found[weight.path] = weight
    return found


def _check_tensors(tensors: list[TensorRecord], weights: dict[str, WeightFile], where: str) -> set[str]:
    names: set[str] = set()
    spans: dict[str, list[tuple[int, int, str]]] = {path: [] for path in weights}
    for tensor in tensors:
        label = f"{where}: tensor {tensor.name[:200]!r}"
        if tensor.name in names:
            raise ArtifactError(f"{label} is listed twice")
        names.add(tensor.name)
        if any(dim < 0 for dim in tensor.shape) or len(tensor.shape) > 16:
            raise ArtifactError(f"{label} has shape {tensor.shape[:20]}, expected at most 16 sizes of 0 or more")
        if tensor.nbytes != nbytes_of(tensor.dtype, tensor.shape):
            raise ArtifactError(
                f"{label} has {tensor.nbytes} bytes, but {tensor.dtype} {tensor.shape} needs {nbytes_of(tensor.dtype, tensor.shape)}"
            )
        if tensor.file is None:
            continue
        if tensor.file not in weights:
            raise ArtifactError(f"{label} lies in {tensor.file[:200]!r}, which is not a weight file")
        size = weights[tensor.file].size_bytes
        if tensor.offset < 0 or tensor.offset % ALIGNMENT or tensor.offset + tensor.nbytes > size:
            raise ArtifactError(
                f"{label} takes bytes {tensor.offset} to {tensor.offset + tensor.nbytes} of {tensor.file}, "
                f"expected a start divisible by {ALIGNMENT} and an end within {size}"
            )
        spans[tensor.file].append((tensor.offset, tensor.offset + tensor.nbytes, tensor.name))
    for path, taken in spans.items():
        _check_no_overlap(taken, f"{where}: {path}")
    return names


def _check_no_overlap(spans: list[tuple[int, int, str]], where: str) -> None:
    end, owner = 0, ""
    for start, stop, name in sorted(span for span in spans if span[0] != span[1]):
        if start < end:
            raise ArtifactError(f"{where}: tensors {owner!r} and {name!r} overlap")
        end, owner = stop, name


def _check_entries(manifest: Manifest, files: dict[str, FileRecord], tensors: set[str], where: str) -> None:
    images = {image.path for image in manifest.images if image.role == "model"}
    names = [entry.name for entry in manifest.entries]
    if len(set(names)) != len(names):
        raise ArtifactError(f"{where}: two entries share a name ({', '.join(names)})")
    ranks = manifest.tensor_parallel_size
    if not 1 <= ranks <= MAX_RANKS or (ranks > 1 and names != ["step", *(f"step.rank{i}" for i in range(1, ranks))]):
        raise ArtifactError(f"{where}: {ranks} ranks with the entries {', '.join(names)[:200]}, expected one for each rank, in order")
    for entry in manifest.entries:
        _known(entry.program, files, where, f"entry {entry.name}")
        if entry.executor in ("aoti", "tvm") and entry.program not in images:
            raise ArtifactError(f"{where}: entry {entry.name} runs {entry.program}, which is not an image of role model")
        _check_plans(entry, files, f"{where}: entry {entry.name}")
        _check_sampling(entry, files, f"{where}: entry {entry.name}")
        missing = sorted(set(entry.constants.values()) - tensors)
        if missing:
            raise ArtifactError(f"{where}: entry {entry.name} uses tensor {missing[0][:200]!r}, which is not listed")


def _check_lora(manifest: Manifest, where: str) -> None:
    """That every module's matrices lie inside an adapter's elements, apart from each other, and that the program asks for them."""
    facts = manifest.lora
    if facts is None:
        return
    if not (0 < facts.max_loras <= MAX_LORAS and 0 < facts.max_rank <= MAX_LORA_RANK and facts.dtype in ("float32", "float16", "bfloat16")):
        raise ArtifactError(f"{where}: lora has {facts.max_loras} adapters of rank {facts.max_rank} in {facts.dtype}")
    end = 0
    for module in sorted(facts.modules, key=lambda module: module.offset):
        if min(module.in_features, module.out_features) < 1 or module.offset < end:
            raise ArtifactError(f"{where}: lora module {module.name[:200]!r} has no size, or overlaps the one before it")
        end = module.offset + facts.max_rank * (module.in_features + module.out_features)
    if end > facts.slot_elements or len({module.name for module in facts.modules}) != len(facts.modules) or not facts.modules:
        raise ArtifactError(f"{where}: the modules of lora end at {end} of {facts.slot_elements} elements, or one is listed twice")
    for entry in manifest.entries:
        shapes = {spec.name: (spec.dtype, spec.shape) for spec in entry.inputs}
        wanted = {"lora_slots": ("int32", ["T"]), "lora_pool": (facts.dtype, [facts.max_loras, facts.slot_elements])}
        if any(shapes.get(name) != shape for name, shape in wanted.items()):
            raise ArtifactError(f"{where}: entry {entry.name} does not take the adapters that lora speaks of")


def _check_plans(entry: Entry, files: dict[str, FileRecord], where: str) -> None:
    """Paths, sizes and order of an entry's plans; what is in the files is judged by plan_check.py."""
    if (entry.executor == "plans") != bool(entry.plans):
        raise ArtifactError(f"{where}: executor {entry.executor!r} with {len(entry.plans)} plans")
    for plan in entry.plans:
        record = _known(plan.path, files, where, "plans")
        if plan.path != f"plans/{record.sha256}.json":
            raise ArtifactError(f"{where}: plan {plan.path} is not named plans/<its SHA-256>.json")
        sizes = (plan.num_tokens, plan.num_seqs, plan.num_logits, plan.table_blocks)
        if min(sizes) < 1 or (plan.decode and plan.num_tokens != plan.num_seqs):
            raise ArtifactError(f"{where}: plan {plan.path} has sizes {sizes} of tokens, sequences, logits and table columns")
    order = [(not plan.decode, plan.num_tokens) for plan in entry.plans]
    if order != sorted(set(order)):
        raise ArtifactError(f"{where}: its plans are not in order, decode plans first, from the smallest to the largest, no size twice")
    if len({plan.table_blocks for plan in entry.plans}) > 1:
        raise ArtifactError(f"{where}: its plans differ in the width of the block tables")
    if entry.plans and entry.program != entry.plans[0].path:
        raise ArtifactError(f"{where}: its program {entry.program[:200]!r} is not the first of its plans")


def _check_sampling(entry: Entry, files: dict[str, FileRecord], where: str) -> None:
    """Paths and sizes of the plans that sample."""
    for plan in entry.sampling:
        record = _known(plan.path, files, where, "sampling")
        if plan.path != f"plans/{record.sha256}.json":
            raise ArtifactError(f"{where}: plan {plan.path} is not named plans/<its SHA-256>.json")
        if plan.num_logits < 1 or min(plan.num_touched, plan.num_top) < (1 if plan.kind == "full" else 0):
            raise ArtifactError(
                f"{where}: plan {plan.path} samples {plan.num_logits} rows with {plan.num_touched} touched tokens and {plan.num_top} "
                "log-probabilities"
            )
    kinds = [(plan.kind, plan.num_logits) for plan in entry.sampling]
    if len(set(kinds)) != len(kinds):
        raise ArtifactError(f"{where}: two of its plans sample as many rows in the same way")
    if entry.sampling and not entry.plans:
        raise ArtifactError(f"{where}: plans that sample without plans that compute logits")


def _known(path: str, files: dict[str, FileRecord], where: str, user: str) -> FileRecord:
    if path not in files:
        raise ArtifactError(f"{where}: {user} names the file {path[:200]!r}, which is not listed in files")
    return files[path]
