"""Graph changes: what a pass is, the runner, one file per pass. See README.md."""

from llmc.passes.base import FusionPass, NodePass, Numerics, Pass, PassContext, PassResult, Reject
from llmc.passes.runner import PassReport, dump_directory, run_passes
from llmc.passes.text import graph_text
from llmc.passes.tolerances import TOLERANCES, Tolerance
from llmc.passes.weights import Constant, WeightTable

__all__ = [
    "TOLERANCES",
    "Constant",
    "FusionPass",
    "NodePass",
    "Numerics",
    "Pass",
    "PassContext",
    "PassReport",
    "PassResult",
    "Reject",
    "Tolerance",
    "WeightTable",
    "dump_directory",
    "graph_text",
    "run_passes",
]
