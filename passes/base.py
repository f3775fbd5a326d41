"""What a pass is. A pass is a small frozen object: a name, a promise about numerics, and three methods the runner calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

from torch.fx import GraphModule, Node

from llmc.passes import graph as G
from llmc.passes import patterns
from llmc.passes.tolerances import TOLERANCES
from llmc.passes.weights import WeightTable

Match = TypeVar("Match")


class Numerics(Enum):
    """What a pass promises about the numbers.

    EXACT: the same bits, given ops whose bits depend on values alone, as llmc's kernels promise (torch's vectorised kernels may round
    the last bit otherwise for another stride or row). CLOSE: within `Pass.tolerance` per dtype.
    """

    EXACT = "exact"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a match was not rewritten. `reason` is a fixed short text, counted in the report; `detail` is for people."""

    reason: str
    detail: Any = None


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass may read besides the graph, and the one thing it may change besides it, the weight table.

    max_positions: values of the graph input `positions` lie in [0, max_positions) (the artifact's max_model_len).
    """

    weights: WeightTable
    max_positions: int


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """The truth about a run. The runner fills in what it counts: nodes, and launches and bytes as `cost.py` predicts them."""

    changed: bool
    matches: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    nodes_before: int = 0
    nodes_after: int = 0
    launches_saved: int = 0
    bytes_saved: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Pass(ABC):
    """A graph change. Subclasses are frozen dataclasses whose fields are their settings."""

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    changes_inputs: ClassVar[bool] = False  # the one that divides KV caches among ranks does
    tolerance: ClassVar[dict[Any, Any]] = TOLERANCES  # what CLOSE means, per dtype; EXACT passes ignore it

    def requires(self, gm: GraphModule) -> str | None:
        """What the graph lacks for this pass to run, as one sentence; None if nothing."""
        return None

    @abstractmethod
    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite `gm` in place. Leaves metadata right on every node and no dead code behind."""

    def ensures(self, gm: GraphModule) -> str | None:
        """What is still wrong with the graph after the pass, as one sentence; None if its promise holds."""
        return None


@dataclass(frozen=True)
class FusionPass(Pass):
    """A pass written as pattern, condition and replacement, three functions with the same parameters.

    `pattern` and `replacement` are plain functions of ops; their parameters stand for any value. `applies` gets the fake tensors
    (or plain numbers) those parameters matched. Nothing else may read a value inside the match, its result excepted.
    """

    @abstractmethod
    def pattern(self, *values: Any) -> Any:
        """The ops looked for. Returns one value."""

    @abstractmethod
    def applies(self, *values: Any) -> Reject | None:
        """Whether the match may be rewritten; a Reject says why not."""

    @abstractmethod
    def replacement(self, *values: Any) -> Any:
        """The ops written instead. Returns one value of the same shape and dtype."""

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        wanted, written = patterns.trace(self.pattern), patterns.trace(self.replacement)
        refusals: Counter[str] = Counter()
        matches = 0
        for node in list(gm.graph.nodes):
            found = patterns.match(wanted, node)
            if found is None:
                continue
            values = [v.meta["val"] if isinstance(v, Node) else v for v in found]
            reject = self.applies(*values)
            if reject is not None:
                refusals[reject.reason] += 1
                continue
            with gm.graph.inserting_before(node):
                new = patterns.instantiate(gm, written, found)
            G.substitute(gm, node, new)
            matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)


@dataclass(frozen=True)
class NodePass(Pass, Generic[Match]):
    """A pass that looks at each node once: what it is the root of, whether that may be rewritten, and the rewriting.

    For matches that have no fixed pattern: optional casts, chains of views, operands in either order.
    """

    @abstractmethod
    def find(self, node: Node, ctx: PassContext) -> Match | Reject | None:
        """What `node` is the root of; None if nothing this pass looks for; a Reject if that may not be rewritten."""

    @abstractmethod
    def rewrite(self, gm: GraphModule, ctx: PassContext, match: Match) -> None:
        """Replace a match. Dead code is erased after the last one."""

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        refusals: Counter[str] = Counter()
        matches = 0
        for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
            found = self.find(node, ctx)
            if isinstance(found, Reject):
                refusals[found.reason] += 1
            elif found is not None:
                self.rewrite(gm, ctx, found)
                matches += 1
        if matches:
            G.erase_dead(gm)
        return PassResult(changed=matches > 0, matches=matches, refusals=refusals)
