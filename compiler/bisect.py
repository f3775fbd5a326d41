"""`llmc bisect`: which pass changed an answer. The graph is run after every pass, by the ops' references, and its greedy tokens compared.

    captured graph -> tokens;  + pass 1 -> tokens;  + pass 1, 2 -> tokens;  ...  the first that differ name the pass

If no prefix of the list changes them, the passes are innocent, and what the artifact itself answers tells whether lowering is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from llmc.artifacts.manifest import Manifest
from llmc.artifacts.safetensors import Checkpoint
from llmc.compiler.canary import TOLERANCE, FetchConstant, Reference, empty_caches, step_inputs
from llmc.compiler.capture import TracedModel, capture
from llmc.compiler.model import ModelSource, read_model
from llmc.compiler.packing import fetcher
from llmc.compiler.pipeline import pipeline
from llmc.errors import ConfigError
from llmc.passes.base import Pass, PassContext
from llmc.passes.runner import run_passes
from llmc.passes.weights import Constant

# the constants a graph reads -> how to get each
MakeFetch = Callable[[Mapping[str, Constant]], FetchConstant]
# told of each pass when it has been judged: its name and whether the tokens are still those of the captured graph
Observer = Callable[[str, bool], None]


@dataclass(frozen=True, kw_only=True)
class Bisected:
    """What was found.

    expected: greedy tokens of the captured graph. changed_by: the first pass after which they differ, None if none does.
    found: the tokens after that pass. position: of the first that differs. margin: between the captured graph's two best logits there.
    tolerance: a margin below it is one that rounding alone can turn, so a CLOSE pass is not at fault.
    """

    expected: list[int]
    passes: list[str]
    tolerance: float
    changed_by: str | None = None
    found: list[int] | None = None
    position: int | None = None
    margin: float | None = None


def bisect(
    traced: TracedModel, passes: Sequence[Pass], make_fetch: MakeFetch, prompt: list[int], *, new_tokens: int, observer: Observer
) -> Bisected:
    """Find the first of `passes` after which the greedy continuation of `prompt` is another.

    Args:
        traced: as captured; its graph is left as it is.
        make_fetch: gives the real tensors of a table's constants.
        new_tokens: how many tokens are compared.
        observer: told of each pass as it is judged.

    Raises:
        ConfigError: the prompt is empty or does not fit.
    """
    if not prompt or len(prompt) + new_tokens > traced.max_model_len:
        raise ConfigError(f"the prompt has {len(prompt)} tokens; with {new_tokens} new ones 1 to {traced.max_model_len} are possible")
    weights = traced.weight_table()
    expected, margins = greedy(traced, make_fetch(weights.constants), prompt, new_tokens)
    tolerance = TOLERANCE[str(traced.outputs[0].dtype)]
    graph = traced.untouched().graph
    context = PassContext(weights=weights, max_positions=traced.max_model_len)
    names = [applied.name for applied in passes]
    for applied in passes:
        (report,) = run_passes(graph, [applied], context)
        if not report.result.changed:
            observer(applied.name, True)
            continue
        found, _ = greedy(replace(traced, graph=graph), make_fetch(weights.constants), prompt, new_tokens)
        observer(applied.name, found == expected)
        if found != expected:
            at = next(i for i, (want, have) in enumerate(zip(expected, found, strict=True)) if want != have)
            return Bisected(
                expected=expected, passes=names, tolerance=tolerance, changed_by=applied.name, found=found, position=at, margin=margins[at]
            )
    return Bisected(expected=expected, passes=names, tolerance=tolerance)


def greedy(traced: TracedModel, fetch: FetchConstant, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The tokens after `prompt` and the margin of each choice, by the graph on the ops' references."""
    reference = Reference(traced.graph, fetch)
    size = traced.kv.block_size
    blocks = -(-(len(prompt) + new_tokens) // size)
    caches = empty_caches(traced.kv, 1 + blocks)
    sequence, done, margins = list(prompt), 0, []
    with torch.no_grad():
        for _ in range(new_tokens):
            inputs = step_inputs([sequence], [done], size, blocks, len(traced.kv.groups))
            best = reference.logits(*inputs, *caches)[0].float().topk(2, dim=-1)
            done = len(sequence)
            sequence.append(int(best.indices[0, 0]))
            margins.append(float(best.values[0, 0] - best.values[0, 1]))
    return sequence[len(prompt) :], margins


def bisect_artifact(manifest: Manifest, model: ModelSource, prompt: list[int], *, new_tokens: int, observer: Observer) -> Bisected:
    """`bisect` with the passes and settings that an artifact was compiled with.

    Args:
        model: the checkpoint it was compiled from, see `recorded_model`.

    Raises:
        ConfigError: -O0 has no passes; this llmc has other passes than the artifact's compiler had.
    """
    settings = manifest.settings
    if manifest.quantization is not None and manifest.quantization.calibration is not None:
        raise ConfigError(
            "the artifact's integers were fitted (--calibration) and the model folder has others; compile it without and bisect that"
        )
    if not manifest.passes:
        raise ConfigError("the artifact was compiled at -O0, with no pass that could change an answer; bisect one of -O1 or -O2")
    if manifest.lora is not None:
        raise ConfigError("the artifact was compiled with --enable-lora, which bisect does not run; compile it without and bisect that")
    quantization, chosen = settings.get("quantization"), settings.get("passes") or ""
    passes = pipeline(
        manifest.level,
        str(quantization) if quantization is not None else None,
        group=settings.get("quantization_group_size"),  # type: ignore[arg-type]  # an integer or null, as compiling wrote it
        kind=manifest.target.kind,
        passes=str(chosen),
        backend=str(settings.get("backend") or "inductor"),
    )
    ours, theirs = [p.name for p in passes], [record.name for record in manifest.passes]
    if ours != theirs:
        differing = next((name for name in [*theirs, *ours] if name not in ours or name not in theirs), theirs[0])
        raise ConfigError(f"the artifact was compiled with another list of passes than this llmc has ({differing}); compile it again")
    traced = capture(
        model, block_size=manifest.kv.block_size, kv_dtype=manifest.kv.dtype, max_model_len=manifest.limits.max_model_len, hidden=False
    )
    with Checkpoint([model.path / name for name in sorted({tensor.file for tensor in model.tensors.values()})]) as checkpoint:
        return bisect(traced, passes, lambda c: fetcher(c, checkpoint), prompt, new_tokens=new_tokens, observer=observer)


def recorded_model(manifest: Manifest, folder: str) -> ModelSource:
    """Read the model folder that an artifact was compiled from.

    Raises:
        ConfigError: it holds another model.
    """
    source = read_model(folder, dtype=str(manifest.settings.get("dtype", "auto")))
    facts = manifest.model
    for what, theirs, mine in (
        ("architecture", facts.architecture, source.architecture),
        ("dtype", facts.dtype, source.dtype),
        ("number of layers", facts.num_layers, source.num_layers),
        ("vocabulary", facts.vocab_size, source.vocab_size),
    ):
        if theirs != mine:
            raise ConfigError(f"{folder}: the artifact's {what} is {theirs}, this model's is {mine}; name the folder it was compiled from")
    return source
