"""Roofline arithmetic, the Pareto front, and the kernels of an artifact whose shapes are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmc.bench.figure import figure
from llmc.bench.kernels import KernelsConfig, against_limits
from llmc.bench.show import html
from llmc.bench.sweep import Measured, SweepConfig, pareto, summarised
from llmc.cli import main
from llmc.errors import ConfigError, InternalError


def row(name: str, rows: int, us: float, moved: int, flop: int, count: int = 1) -> dict[str, object]:
    return {"name": name, "rows": rows, "us": us, "bytes": moved, "flop": flop, "count": count}


def test_the_limit_is_the_slower_of_reading_and_computing() -> None:
    found = against_limits(
        {
            "bandwidth_gb_s": 10.0,  # 10 kB a microsecond
            "peak_gflop_s": 100.0,  # 100 000 flop a microsecond
            "rows": [
                row("reads", 1, 20.0, 100_000, 1000, count=3),  # ten microseconds at least
                row("computes", 1, 40.0, 1000, 2_000_000),  # twenty
                row("computes", 8, 80.0, 1000, 4_000_000),
            ],
        }
    )["rows"]
    assert [one["of_limit"] for one in found] == [0.5, 0.5, 0.5]
    assert [one["share"] for one in found] == [0.6, 0.4, 1.0]  # of the kernels with as many rows, calls counted


def test_calls_that_follow_each_other_are_one_sample() -> None:
    from llmc.bench.kernel_worker import Taken

    slow_for_a_while = [1e-6] * 95 + [9e-6] * 5
    assert Taken.of(slow_for_a_while).as_row() == {"us": 1.0, "us_samples": [1.0] * 9, "timed_calls": 100}
    assert [round(us) for us in Taken.of([1e-6, 3e-6]).us_samples] == [1, 3]


def test_what_is_timed_fits_the_artifact() -> None:
    from llmc.artifacts.manifest import Limits

    limits = Limits(max_model_len=256, max_num_seqs=128, max_num_batched_tokens=1024)
    config = KernelsConfig(artifact="a")  # type: ignore[arg-type]
    assert config.within(limits) == ((1, 8), 256)
    for wrong, message in (
        ({"rows": (1, 1025)}, "at most 1024 tokens"),
        ({"rows": (257,)}, "is one prompt, and this artifact takes 256"),
        ({"context": 257}, "at most 256 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(config, **wrong).within(limits)  # type: ignore[arg-type]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (1.5, 3.0), (3.0, 4.0), (3.0, 1.0), (0.5, 5.0)]
    assert pareto(points) == [0, 3]  # (2, 4) loses to (3, 4), (0.5, 5) to (1, 5)
    assert pareto([(1.0, 1.0)]) == [0] and pareto([]) == []
    for index, (x, y) in enumerate(points):
        beaten = any((a >= x and b >= y) and (a, b) != (x, y) for a, b in points)
        assert (index in pareto(points)) != beaten


def test_a_sweep_is_a_table_and_a_plot(tmp_path: object) -> None:
    found = [
        Measured(name="batch 1", each=figure([100, 110]), together=figure([100, 110])),
        Measured(name="batch 8", each=figure([50, 52]), together=figure([400, 410])),
        Measured(name="batch 8, int4", each=figure([40, 42]), together=figure([300, 310])),
    ]
    result = summarised(SweepConfig(model="m", batches=(1, 8)), found)  # type: ignore[arg-type]
    assert [row["front"] for row in result.tables[0].rows] == ["yes", "yes", ""]
    assert [point.marked for point in result.charts[0].points] == [True, True, False]
    assert list(result.charts[0].line) == [(51, 405), (105, 105)]
    assert html(result).count("<circle") == 3


def test_a_sweep_runs_every_combination_and_the_baseline_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from llmc.bench import sweep

    asked: list[tuple[object, ...]] = []

    def rows(name: object, *given: object, threads: int, seed: int, **options: object) -> dict[str, object]:
        asked.append((name, threads, seed))
        modes: list[sweep.Mode] = given[-1]  # type: ignore[assignment]
        return {"modes": {mode.name: [{"step_ms": [2.0, 2.0], "decode_tok_s": 500.0 * mode.batch}] for mode in modes}}

    def compiled(model: object, variant: sweep.Variant, out: object) -> SimpleNamespace:
        limits = SimpleNamespace(max_model_len=192, max_num_seqs=8)
        return SimpleNamespace(
            name=variant.name, artifact=variant.name, manifest=SimpleNamespace(limits=limits, model=SimpleNamespace(dtype="d"))
        )

    for name, function in (("compile_variant", compiled), ("engine_rows", rows), ("hf_rows", rows)):
        monkeypatch.setattr(sweep, name, function)
    settings: dict[str, object] = {"model": "m", "quantizations": ("none", "int8"), "batches": (1, 8), "threads": (1, 2), "rounds": 2}
    result = sweep.bench_sweep(SweepConfig(**settings, baseline_hf=True), lambda text: None)  # type: ignore[arg-type]
    assert asked == [(name, threads, seed) for seed in (0, 1000) for threads in (1, 2) for name in ("-O2", "-O2 int8", "m")]
    names = [str(row["name"]) for row in result.tables[0].rows]
    assert names[:2] == ["-O2, batch 1, 1 thread", "-O2, batch 8, 1 thread"] and "transformers, batch 8, 2 threads" in names
    assert len(names) == 12 and result.tables[0].rows[1]["together"].samples == (4000, 4000)  # type: ignore[union-attr]
    for wrong, message in (({"prompt_tokens": 129}, "are above the artifact's 192"), ({"batches": (1, 9)}, "runs 8 sequences at once")):
        with pytest.raises(ConfigError, match=message):
            sweep.bench_sweep(SweepConfig(**{**settings, **wrong}), lambda text: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KernelsConfig(artifact="a", rows=()),  # type: ignore[arg-type]
        lambda: KernelsConfig(artifact="a", rows=(0, 1)),  # type: ignore[arg-type]
        lambda: KernelsConfig(artifact="a", seconds=float("nan")),  # type: ignore[arg-type]
        lambda: SweepConfig(model="m", batches=()),  # type: ignore[arg-type]
        lambda: SweepConfig(model="m", threads=(0,)),  # type: ignore[arg-type]
    ],
)
def test_settings_that_make_no_run(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_commands_say_what_is_wrong(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", str(tmp_path)]) == 4
    assert main(["bench", "sweep", str(tmp_path), "--batch", "x"]) == 2
    assert "--batch 'x': expected integers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "group", "num_scales"), [(192, 32, 6), (192, 128, 2), (1024, 128, 8), (3072, 32, 96), (96, 96, 1), (100, 32, 4)]
)
def test_the_group_of_a_kernel_follows_from_its_bytes(columns: int, group: int, num_scales: int) -> None:
    import torch

    from llmc.bench.kernel_worker import group_of

    padded = -(-columns // 32) * 32
    for dtype, integers in (("int8", 48 * padded), ("uint8", 24 * padded)):
        kernel = {"op": "quantized_linear", "dtype": dtype, "rows": 40, "columns": columns, "kv_bytes_per_token": 0}
        found = group_of({**kernel, "weight_bytes": integers + 48 * num_scales * 2}, torch.bfloat16)
        assert -(-columns // found) == num_scales and (found == group or columns == 96)
        with pytest.raises(InternalError, match="no integers with scales"):
            group_of({**kernel, "weight_bytes": integers + 7}, torch.bfloat16)


def test_the_worker_times_the_shapes_of_a_report() -> None:
    """Small shapes by the machine's own kernels: times are positive, and the bytes are those of the shapes."""
    import torch

    from llmc.artifacts.stamps import cache_root
    from llmc.bench.kernel_worker import _case, time_attention, time_experts, time_linear
    from llmc.kernels.build import build_kernels
    from llmc.kernels.isa import resolve_target
    from llmc.kernels.native import NativeKernels

    built = build_kernels(resolve_target("cpu").isa, cache_root() / "kernels", 2)
    native, request = NativeKernels(built.kernels_so, 1), {"megabytes": 1, "seconds": 0.01, "threads": 1}
    for op, dtype, stored in (("linear", "bfloat16", 6144), ("quantized_linear", "int8", 3168), ("quantized_linear", "uint8", 1728)):
        shape = {"op": op, "dtype": dtype, "rows": 48, "columns": 64, "weight_bytes": stored, "kv_bytes_per_token": 0}
        taken = time_linear(native, shape, 3, torch.bfloat16, request)
        assert taken.timed_calls >= len(taken.us_samples) >= 1 and all(math.isfinite(us) and us > 0 for us in taken.us_samples)
    layer = {"op": "grouped_linear", "rows": 48, "columns": 64, "experts": 4, "choices": 2}
    taken, chosen = time_experts(native, layer, 1, torch.bfloat16, request)
    assert min(taken.us_samples) > 0 and chosen == 2
    assert 2 <= time_experts(native, layer, 3, torch.bfloat16, request)[1] <= 4
    kernel = {"rows": 4, "columns": 32, "kv_bytes_per_token": 2 * 2 * 32 * 2}
    decode, prefill = (_case(kernel, m, 40, 16, torch.bfloat16) for m in (2, 65))
    assert (decode.batch, decode.queries, decode.context, decode.num_kv_heads) == (2, 1, 40, 2)
    assert (prefill.batch, prefill.queries, prefill.context) == (1, 65, 65)
    assert decode.kv_bytes == 2 * 40 * kernel["kv_bytes_per_token"]
    for op in ("paged_attention", "paged_attend"):
        assert min(time_attention(built.kernels_so, op, decode, request).us_samples) > 0
