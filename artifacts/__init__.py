"""The artifact: the only thing compiler and runtime share. What other rooms may use is listed here.

Importing this costs about 20 ms: msgspec, no numpy, no pydantic, no torch.
"""

from llmc.artifacts.manifest import Manifest
from llmc.artifacts.verify import OpenArtifact, open_artifact
from llmc.artifacts.version import FORMAT_VERSION, OLDEST_READABLE
from llmc.artifacts.weight_source import VerifyMode, WeightSource

__all__ = ["FORMAT_VERSION", "OLDEST_READABLE", "Manifest", "OpenArtifact", "VerifyMode", "WeightSource", "open_artifact"]
