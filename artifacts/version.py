"""The format version: the number that says how to read an artifact.

History, one dated line per version:
    1  2026-01  first format: manifest.json, images by hash, packed weights hashed per chunk, tokenizer files, detached signature.
"""

from __future__ import annotations

FORMAT_VERSION = 1  # what this llmc writes
OLDEST_READABLE = 1  # what it still reads
