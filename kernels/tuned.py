"""Measured tiles of plain_linear and ways to launch attention, by GPU: found by `llmc tune` there, read by compiles everywhere.

    tuned_tiles.json   {"format": 1, "targets": {"cuda:h200": {"measured": {...}, "tiles": [{"n", "k", "dtype", "rows", ...}, ...],
                                                               "attention": [{"head_dim", "heads_per_kv", "cache", ...}, ...]}}}

A row's bits must not depend on how many rows there are, nor on whether a table exists. So an entry chooses only what no bit depends on:
the columns and rows of a tile, its warps, how far its loads run ahead, and whether TMA does them. The step along K, the parts of K and
the kind of instruction follow from N, K and dtype alone. A matrix that is not in the table takes `tile_for`'s tile; of attention,
kernels/paged_attention/tuning.py says what may be chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmc.errors import ConfigError

from .cuda_targets import cuda_target
from .paged_attention.triton_impl import Work, work_for
from .paged_attention.tuning import decode_candidates, prefill_candidates
from .plain_linear.triton_impl import Tile
from .plain_linear.tuning import TMA_CAPABILITY, candidates

TABLE = Path(__file__).with_name("tuned_tiles.json")
FORMAT = 1
DTYPE = "bfloat16"
ROWS = (16, 32, 64, 512, 2048)  # a class each: up to so many rows, the last one: more than the one before. Measured at these numbers
WORTH = 0.98  # of the default's time: what gains less stays with it

Timer = Callable[[int, int, int, Tile], float]  # rows, N, K, tile -> seconds; raises where a tile does not compile
CACHES = (DTYPE, "uint8")  # of keys and values; uint8: fp8
_WORK = ("decode_stages", "prefill_rows", "prefill_warps", "prefill_stages")


@dataclass(frozen=True, order=True)
class AttentionShape:
    """What attention is measured for. cache: one of CACHES."""

    head_dim: int
    heads_per_kv: int
    cache: str = DTYPE

    @property
    def default(self) -> Work:
        """What is launched where nothing was measured, from Hopper on."""
        return work_for(self.head_dim, self.heads_per_kv, torch.bfloat16, getattr(torch, self.cache))


AttentionTimer = Callable[[AttentionShape, bool, Work], float]  # shape, whether it decodes, work -> seconds; raises as a Timer


@dataclass(frozen=True, kw_only=True)
class TunedTiles:
    """What was measured for one target. measured: what `llmc tune` wrote of the machine; empty: nothing was measured."""

    tiles: Mapping[tuple[int, int, str, int], Tile] = field(default_factory=dict)
    attention: Mapping[AttentionShape, Work] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def work(self, head_dim: int, heads_per_kv: int, dtype: torch.dtype, cache: torch.dtype) -> Work | None:
        """How to launch attention; None: `work_for` decides."""
        if str(dtype).removeprefix("torch.") != DTYPE:
            return None
        return self.attention.get(AttentionShape(head_dim, heads_per_kv, str(cache).removeprefix("torch.")))

    def tile(self, n: int, k: int, dtype: torch.dtype, rows: int) -> Tile | None:
        """The tile for a matrix [N, K] times so many rows; None: `tile_for` decides."""
        return self.tiles.get((n, k, str(dtype).removeprefix("torch."), row_class(rows)))

    def facts(self) -> dict[str, Any]:
        """For the artifact's report."""
        entries = len(self.tiles) + len(self.attention)
        return {"entries": entries, "measured": dict(self.measured), "elsewhere": "by number of rows, as tile_for says"}


def row_class(rows: int) -> int:
    """The number of rows that stands for `rows`."""
    return next((most for most in ROWS[:-1] if rows <= most), ROWS[-1])


def read_tuned(target: str, path: Path = TABLE) -> TunedTiles:
    """The table of a target.

    Raises:
        ConfigError: the file is damaged, or holds a tile that would change a row's bits.
    """
    targets = _targets(path)
    found = targets.get(target)
    if found is None:
        return TunedTiles()
    try:
        tiles = {_key(entry): _tile(entry) for entry in found["tiles"]}
        attention = {_shape(entry): Work(**{name: int(entry[name]) for name in _WORK}) for entry in found["attention"]}
        measured = dict(found["measured"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {target} is damaged ({type(error).__name__}: {error}); write it again with `llmc tune`") from None
    tma = has_tma(target)
    for (n, k, dtype, rows), tile in tiles.items():
        if dtype != DTYPE or rows not in ROWS or tile not in set(candidates(rows, tma=tma)):
            raise ConfigError(
                f"{path}: {target} has for {rows} rows of {n}x{k}, {dtype}, {tile}, which is none that keeps a row's bits; "
                "write it again with `llmc tune`"
            )
    for shape, work in attention.items():
        if not tma or work not in _works(shape):  # before Hopper one shape alone does not spill
            raise ConfigError(
                f"{path}: {target} has for attention of {shape} {work}, which is none that keeps a row's bits; "
                "write it again with `llmc tune`"
            )
    return TunedTiles(tiles=tiles, attention=attention, measured=measured)


def has_tma(target: str) -> bool:
    """Whether a target's GPU has the tensor memory accelerator."""
    return cuda_target(target).capability_number >= TMA_CAPABILITY


def tune(
    matrices: Iterable[tuple[int, int]], timer: Timer, *, tma: bool = False, progress: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Measure every candidate for every matrix and class of rows, and keep what is faster than the default.

    Args:
        matrices: (N, K) each.
        timer: seconds of one product; a tile for which it raises RuntimeError or ValueError is out, the default excepted.
        tma: whether to try tiles that TMA loads; the GPU must have it.

    Returns:
        Entries of the table, with the times in microseconds.
    """
    entries = []
    for n, k in dict.fromkeys(matrices):
        for rows in ROWS:
            default, *others = candidates(rows, tma=tma)
            times = {default: timer(rows, n, k, default)}
            for tile in others:
                try:
                    times[tile] = timer(rows, n, k, tile)
                except (RuntimeError, ValueError):  # does not fit this GPU; a finding of the search, not a failure of it
                    continue
            best = min(times, key=lambda tile: times[tile])
            progress(f"{rows} x {n}x{k}: {times[default] * 1e6:.1f} us, best of {len(times)} tiles {times[best] * 1e6:.1f} us")
            if times[best] < WORTH * times[default]:
                entries.append(_entry(n, k, rows, best, times[best], times[default]))
    return entries


def tune_attention(
    shapes: Iterable[AttentionShape], timer: AttentionTimer, *, progress: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Measure every way to launch attention, of decode and of prefill by themselves, and keep what is faster than the default.

    Args:
        shapes: of a GPU from Hopper on.
        timer: as `tune`'s.

    Returns:
        Entries of the table, with the times in microseconds.
    """
    entries = []
    for shape in dict.fromkeys(shapes):
        chosen = shape.default
        times: dict[str, float] = {}
        for decode in (True, False):
            label = "decode" if decode else "prefill"
            first, *others = decode_candidates(chosen) if decode else prefill_candidates(chosen, shape.head_dim)
            found = {first: timer(shape, decode, first)}
            for work in others:
                try:
                    found[work] = timer(shape, decode, work)
                except (RuntimeError, ValueError):  # does not fit this GPU; a finding of the search, not a failure of it
                    continue
            best = min(found, key=lambda work: found[work])
            chosen = best if found[best] < WORTH * found[first] else first
            times |= {f"{label}_us": round(found[chosen] * 1e6, 2), f"default_{label}_us": round(found[first] * 1e6, 2)}
            progress(f"{label} of {shape}: {found[first] * 1e6:.1f} us, best of {len(found)} {found[best] * 1e6:.1f} us")
        if chosen != shape.default:
            entries.append({**asdict(shape), **asdict(chosen), **times})
    return entries


def _works(shape: AttentionShape) -> set[Work]:
    """Every choice that `tune_attention` can make."""
    return {work for decode in decode_candidates(shape.default) for work in prefill_candidates(decode, shape.head_dim)}


def write_tuned(
    target: str,
    entries: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    path: Path = TABLE,
    *,
    attention: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Put a target's entries into the table, in place of those of the same matrices and heads; everything else stays.

    Args:
        measured: the machine, with "matrices", (N, K) each, and "attention", the fields of an `AttentionShape` each.

    Raises:
        ConfigError: the file is damaged or cannot be written.
    """
    targets = _targets(path)
    again = {(n, k) for n, k in measured["matrices"]}
    before = targets.get(target, {"tiles": [], "attention": []})
    kept = [entry for entry in before["tiles"] if (entry["n"], entry["k"]) not in again]
    ordered = sorted([*kept, *entries], key=lambda entry: (entry["n"], entry["k"], entry["rows"]))
    heads = {AttentionShape(*fields) for fields in measured.get("attention", [])}
    launched = sorted([*(entry for entry in before["attention"] if _shape(entry) not in heads), *attention], key=_shape)
    targets[target] = {"measured": dict(measured), "tiles": ordered, "attention": launched}
    text = json.dumps({"format": FORMAT, "targets": targets}, indent=1, sort_keys=True) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None


def _targets(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise ConfigError(f"{path}: format {held['format']}, this llmc reads {FORMAT}; write it again with `llmc tune`")
        return dict(held["targets"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: is no table of tiles ({type(error).__name__}: {error}); write it again with `llmc tune`") from None


def _key(entry: Mapping[str, Any]) -> tuple[int, int, str, int]:
    return int(entry["n"]), int(entry["k"]), str(entry["dtype"]), int(entry["rows"])


def _shape(entry: Mapping[str, Any]) -> AttentionShape:
    """Raises ValueError for a cache that attention has no measured way for."""
    if entry["cache"] not in CACHES:
        raise ValueError(f"a cache of {entry['cache']!r}")
    return AttentionShape(int(entry["head_dim"]), int(entry["heads_per_kv"]), str(entry["cache"]))


def _tile(entry: Mapping[str, Any]) -> Tile:
    names = ("block_n", "block_t", "block_k", "num_warps", "num_stages")
    return Tile(**{name: int(entry[name]) for name in names}, tma=bool(entry["tma"]))


def _entry(n: int, k: int, rows: int, tile: Tile, seconds: float, default_seconds: float) -> dict[str, Any]:
    return {
        "n": n, "k": k, "dtype": DTYPE, "rows": rows, "block_n": tile.block_n, "block_t": tile.block_t, "block_k": tile.block_k,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, "tma": tile.tma, "us": round(seconds * 1e6, 2),
        "default_us": round(default_seconds * 1e6, 2),
    }  # fmt: skip
