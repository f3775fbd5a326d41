"""Measured tiles: what a search keeps, what a table may hold, and that a plan uses it. Times are planted; no GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

import llmc.kernels.ops  # noqa: F401  (registers the ops)
from llmc.artifacts.plan import Pointer, Span
from llmc.artifacts.plan_check import check_plan
from llmc.cli import main
from llmc.compiler.cuda import planner
from llmc.compiler.cuda.cross import cross_cuda
from llmc.compiler.cuda.own_kernels import KernelCache
from llmc.errors import ConfigError
from llmc.kernels.cuda_targets import cuda_target
from llmc.kernels.launch import Launch
from llmc.kernels.paged_attention.triton_impl import Work
from llmc.kernels.plain_linear.triton_impl import Tile, plain_linear, tile_for
from llmc.kernels.plain_linear.tuning import candidates
from llmc.kernels.tuned import ROWS, TABLE, AttentionShape, TunedTiles, read_tuned, row_class, tune, tune_attention, write_tuned

N, K = 512, 256
TARGET = "cuda:h200"
MEASURED = {"device": "planted", "matrices": [[N, K]]}


def likes_few_stages(rows: int, n: int, k: int, tile: Tile) -> float:
    """Every candidate but the default is faster the fewer stages it has; the widest do not compile."""
    if tile.block_n == 256:
        raise RuntimeError("out of resource: shared memory")
    if tile.tma:
        return 1e-6
    return 1e-5 if tile == tile_for(rows, torch.bfloat16) else 1e-6 * (tile.num_stages + tile.block_t / 1000)


def test_a_search_keeps_the_fastest_that_compiles() -> None:
    entries = tune([(N, K), (N, K)], likes_few_stages)
    assert [(e["n"], e["k"], e["rows"]) for e in entries] == [(N, K, rows) for rows in ROWS]
    assert all(e["num_stages"] == 3 and e["block_n"] != 256 and e["default_us"] == 10 for e in entries)
    assert not any(e["tma"] for e in entries)
    loaded = {e["rows"]: e["tma"] for e in tune([(N, K)], likes_few_stages, tma=True)}
    assert loaded == {16: False, 32: False, 64: False, 512: True, 2048: True}, "decode reads a weight once, through pointers"
    assert {e["block_k"] for e in entries} == {64}, "the step along K decides a row's bits and is never searched"


def test_what_gains_little_stays_with_the_rule() -> None:
    assert tune([(N, K)], lambda rows, n, k, tile: 1e-5 if tile == tile_for(rows, torch.bfloat16) else 0.99e-5) == []


def test_a_default_that_cannot_run_is_no_finding() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"):
        tune([(N, K)], lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image")))


def test_a_table_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_tuned(TARGET, tune([(N, K)], likes_few_stages), MEASURED, path)
    first = path.read_bytes()
    write_tuned(TARGET, tune([(N, K)], likes_few_stages), MEASURED, path)
    assert path.read_bytes() == first, "measuring the same matrices again replaces them"
    write_tuned(TARGET, tune([(N, 2 * K)], likes_few_stages), MEASURED | {"matrices": [[N, 2 * K]]}, path)
    table = read_tuned(TARGET, path)
    assert len(table.tiles) == 2 * len(ROWS) == table.facts()["entries"]
    for rows in (1, 17, 64, 65, 513, 9000):
        found = table.tile(N, K, torch.bfloat16, rows)
        assert found is not None and found in set(candidates(row_class(rows))) and found.num_stages == 3
    assert table.tile(N, K, torch.float32, 1) is None and table.tile(N + 16, K, torch.bfloat16, 1) is None
    assert read_tuned("cuda:sm_80", path) == TunedTiles()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_k": 128}, "none that keeps a row's bits"),
        ({"rows": 100}, "none that keeps a row's bits"),
        ({"dtype": "float32"}, "none that keeps a row's bits"),
        ({"num_warps": "many"}, "is damaged"),
        ({"tma": True}, "none that keeps a row's bits"),  # of 16 rows
    ],
)
def test_a_table_that_would_change_bits_is_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_tuned(TARGET, [tune([(N, K)], likes_few_stages)[0] | change], MEASURED, path)
    with pytest.raises(ConfigError, match=says):
        read_tuned(TARGET, path)


def test_tma_is_for_gpus_that_have_it(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    entries = tune([(N, K)], likes_few_stages, tma=True)
    for target in (TARGET, "cuda:sm_86"):
        write_tuned(target, entries, MEASURED, path)
    found = read_tuned(TARGET, path).tile(N, K, torch.bfloat16, 2000)
    assert found is not None and found.tma
    with pytest.raises(ConfigError, match="none that keeps a row's bits"):
        read_tuned("cuda:sm_86", path)


def test_a_plan_gives_tma_the_memory_it_takes() -> None:
    """128 bytes a descriptor, two descriptors a program, in the arena, at the pointer that Triton puts behind the arguments."""
    target = cuda_target(TARGET)
    builder = planner._Builder(target=target, own=KernelCache(target))
    tile = next(t for t in candidates(512, tma=True) if t.tma)
    launches: list[Launch] = []
    with cross_cuda(target), torch._subclasses.fake_tensor.FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(rows, K, dtype=torch.bfloat16, device="cuda:0") for rows in (130, N))
        builder.memory.add(x, "x", "input")
        builder.memory.add(weight, "weight", "weight")
        result = plain_linear(x, weight, None, tile=tile, launch=launches.append)
        planner._own_launch(builder, launches[0])
        plan = planner._plan(builder, {"y": result}, {})
    check_plan(plan, builder.images, "the plan")
    (launch,) = plan.launches
    *_, scratch, profile = launch.arguments
    assert isinstance(scratch, Pointer) and profile == planner._NULL
    span = Span(region=scratch.region, start=scratch.offset, stop=scratch.offset + 256 * launch.grid[0])
    assert span in launch.writes and span not in launch.reads and scratch.offset % 256 == 0 and launch.grid[0] > 1
    assert plan.regions[scratch.region].kind == "arena"
    (kernel,) = builder.own._known.values()
    assert kernel.read == {"x", "weight"} and kernel.written == {"out"}


HEADS = AttentionShape(128, 4)


def likes_low_prefill(shape: AttentionShape, decode: bool, work: Work) -> float:
    """One stage decodes fastest and does not work with fp8; 64 rows prefill fastest."""
    if decode and work.decode_stages == 1 and shape.cache == "uint8":
        raise RuntimeError("out of resource: shared memory")
    return 1e-6 * (work.decode_stages if decode else work.prefill_rows + work.prefill_stages)


def test_attention_is_searched_by_decode_and_prefill_apart() -> None:
    fp8 = AttentionShape(128, 4, "uint8")
    entries = tune_attention([HEADS, fp8, HEADS], likes_low_prefill)
    assert [(e["cache"], e["decode_stages"], e["prefill_rows"], e["prefill_warps"], e["prefill_stages"]) for e in entries] == [
        ("bfloat16", 1, 64, 4, 1), ("uint8", 2, 64, 4, 1)
    ]  # fmt: skip
    assert entries[0]["decode_us"] < entries[0]["default_decode_us"] == 3
    assert tune_attention([HEADS], lambda shape, decode, work: 1e-5) == []


def test_ways_to_attend_come_back_as_written(tmp_path: Path) -> None:
    path, measured = tmp_path / "tiles.json", {"device": "planted", "matrices": [], "attention": [[128, 4, "bfloat16"]]}
    entries = tune_attention([HEADS], likes_low_prefill)
    for _ in range(2):
        write_tuned(TARGET, [], measured, path, attention=entries)
    write_tuned(TARGET, tune([(N, K)], likes_few_stages), MEASURED, path)
    table = read_tuned(TARGET, path)
    assert table.work(128, 4, torch.bfloat16, torch.bfloat16) == Work(decode_stages=1, prefill_rows=64, prefill_warps=4, prefill_stages=1)
    assert table.work(128, 4, torch.bfloat16, torch.uint8) is table.work(128, 4, torch.float32, torch.float32) is None
    assert table.facts()["entries"] == 1 + len(ROWS)
    write_tuned("cuda:sm_86", [], measured, path, attention=entries)
    with pytest.raises(ConfigError, match="none that keeps a row's bits"):
        read_tuned("cuda:sm_86", path)
    for change, says in (({"prefill_warps": 8}, "none that keeps a row's bits"), ({"cache": "int8"}, "is damaged")):
        write_tuned(TARGET, [], measured | {"attention": [[128, 4, "bfloat16"], [128, 4, "int8"]]}, path, attention=[])
        held = json.loads(path.read_text())
        held["targets"][TARGET]["attention"] = [entries[0] | change]
        path.write_text(json.dumps(held))
        with pytest.raises(ConfigError, match=says):
            read_tuned(TARGET, path)
        path.unlink()


def test_a_plan_attends_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    own = KernelCache(cuda_target(TARGET))
    work = Work(decode_stages=4, prefill_rows=64, prefill_warps=4, prefill_stages=2)
    own.__dict__["tuned"] = TunedTiles(attention={HEADS: work})
    launched: list[Launch] = []
    monkeypatch.setattr(planner, "_own_launch", lambda builder, launch: launched.append(launch))
    graph = torch.fx.Graph()
    names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    given = [graph.placeholder(name) for name in names]
    call = graph.call_function(torch.ops.llmc.paged_attend.default, (*given, 0, 0, 0.1, 0, 0.0, None))
    builder = planner._Builder(target=own.target, own=own)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        for heads in (8, 16):
            cache, ints = torch.empty(4, 2, 16, 128, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
            values = [torch.empty(9, heads, 128, dtype=torch.bfloat16), cache, cache, torch.empty(1, 3, 8, dtype=torch.int32), ints]
            planner._own_op(builder, call, dict(zip(given, [*values, torch.empty(4, dtype=torch.int32)], strict=True)), False)
    found = [(launch.num_warps, launch.num_stages) for launch in launched if "TILE" in launch.constants]
    assert found == [(4, 4), (4, 2), (4, 3), (8, 3)]  # decode and prefill: 4 heads to a key head, then 8, of which nothing is known


@pytest.mark.parametrize("text", ["{", '{"format": 2, "targets": {}}', '{"format": 1}', "[]"])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="llmc tune"):
        read_tuned(TARGET, path)


def test_the_table_of_this_llmc_can_be_read() -> None:
    for target in json.loads(TABLE.read_text())["targets"]:
        assert read_tuned(target).tiles


def test_a_plan_is_made_with_the_measured_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    own = KernelCache(cuda_target(TARGET))
    tile = next(t for t in candidates(16) if t.num_warps == 8)
    own.__dict__["tuned"] = TunedTiles(tiles={(N, K, "bfloat16", 16): tile})
    launched = []
    monkeypatch.setattr(planner, "_own_launch", lambda builder, launch: launched.append(launch))
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    call = graph.call_function(torch.ops.llmc.plain_linear.default, (x, weight, None))
    builder = planner._Builder(target=own.target, own=own)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        for rows in (2, 40):
            values = {x: torch.empty(rows, K, dtype=torch.bfloat16), weight: torch.empty(N, K, dtype=torch.bfloat16)}
            planner._own_op(builder, call, values, True)
    products = [launch for launch in launched if "BLOCK_K" in launch.constants]
    assert [(p.constants["BLOCK_N"], p.num_warps) for p in products] == [(tile.block_n, 8), (64, 4)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_command_says_where_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "tiles.json"
    assert main(["tune", "--target", TARGET, "--matrix", "4096x1024", "--out", str(table)]) == ConfigError.exit_code
    assert "run it where NVIDIA H200 is" in " ".join(capsys.readouterr().err.split()) and not table.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name what to measure"),
        (["--matrix", "4096"], "expected rows and columns"),
        (["--matrix", "0x4"], "expected rows and columns"),
        (["--attention", "32x8"], "expected query heads, key heads and head_dim"),
        (["--attention", "30x8x128"], "expected query heads, key heads and head_dim"),
    ],
)
def test_the_command_names_what_it_lacks(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--target", TARGET, *arguments]) == ConfigError.exit_code
    assert says in " ".join(capsys.readouterr().err.split())
