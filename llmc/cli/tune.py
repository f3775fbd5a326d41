"""`llmc tune`."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from llmc.errors import ConfigError

if TYPE_CHECKING:
    from llmc.kernels.cuda_targets import CudaTarget
    from llmc.kernels.gpu_bench import Case
    from llmc.kernels.launch import Launch
    from llmc.kernels.tuned import AttentionTimer, Timer


@click.command("tune")
@click.option("--target", required=True, help="The GPU of this machine, as `llmc compile --target list` names it.")
@click.option("--matrix", "matrices", multiple=True, metavar="NxK", help="A weight's rows and columns; may be repeated.")
@click.option("--attention", "heads", multiple=True, metavar="QxKxD", help="Query heads, key heads and head_dim; may be repeated.")
@click.option("--artifact", type=click.Path(path_type=Path), default=None, help="Take the matrices that this GPU artifact multiplies.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Table to add to; default: the one that `llmc compile` reads.")
def tune_command(target: str, matrices: tuple[str, ...], heads: tuple[str, ...], artifact: Path | None, out: Path | None) -> None:
    """Measure tiles of the matrix products and ways to launch attention on this machine's GPU, for compiles anywhere.

    What is measured changes no bit of a result. Needs the GPU of --target and a CUDA build of torch.
    """
    from llmc.kernels.cuda_targets import cuda_target

    described = cuda_target(target)
    wanted = [_matrix(text) for text in matrices] + (_of_artifact(artifact) if artifact is not None else [])
    if not wanted and not heads:
        raise ConfigError("name what to measure: --matrix NxK, --attention QxKxD, or --artifact with one that was compiled for a GPU")
    shapes = [(pair, cache) for text in heads for pair in [_heads(text)] for cache in ("bfloat16", "uint8")]
    check_gpu(described)

    import torch

    from llmc.kernels.gpu_bench import machine
    from llmc.kernels.tuned import TABLE, AttentionShape, has_tma, tune, tune_attention, write_tuned

    table, asked = out or TABLE, [AttentionShape(*pair, cache) for pair, cache in shapes]
    if asked and not has_tma(described.name):
        raise ConfigError(f"--attention: before Hopper there is one way to launch it, so nothing can be chosen on {described.device_name}")

    def say(line: str) -> None:
        click.echo(line, err=True)

    torch.manual_seed(0)
    entries = tune(wanted, _timer(described), tma=has_tma(described.name), progress=say)
    launched = tune_attention(asked, _attention_timer(described), progress=say)
    measured = {"matrices": [list(pair) for pair in dict.fromkeys(wanted)], "attention": [list(astuple(shape)) for shape in asked]}
    write_tuned(described.name, entries, {**machine(), **measured}, table, attention=launched)
    click.echo(
        f"{table}: {len(entries)} tiles and {len(launched)} ways to attend for {described.name} are faster than those chosen by rule; "
        "compile again to use them"
    )


def check_gpu(target: CudaTarget) -> None:
    """Check that this machine has the GPU that is described.

    Raises:
        ConfigError: torch sees no GPU, or another one.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"llmc tune measures on the GPU itself, and torch sees none here: run it where {target.device_name} is, with a CUDA build of "
            "torch; `llmc compile` then uses its table anywhere"
        )
    found = torch.cuda.get_device_properties(0)
    if (found.major, found.minor) != target.compute_capability or found.multi_processor_count != target.num_sms:
        raise ConfigError(
            f"--target {target.name} is {target.device_name} with {target.num_sms} SMs of {target.architecture}; this machine has "
            f"{found.name} with {found.multi_processor_count} of sm_{found.major}{found.minor}; name that one"
        )


def _seconds(case: Case, target: CudaTarget) -> float:
    """Time of a case.

    Raises:
        RuntimeError: a kernel spills more than a compile takes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    from llmc.compiler.cuda.schedule import SPILL_BUDGET_BYTES
    from llmc.kernels.aot import compile_launch
    from llmc.kernels.gpu_bench import run_case

    launches: list[Launch] = []
    with FakeTensorMode():
        case.ours(*case.make(), launch=launches.append)
    for launch in launches:
        stack = compile_launch(launch, GPUTarget("cuda", target.capability_number, 32)).stack_bytes
        if stack > SPILL_BUDGET_BYTES:
            raise RuntimeError(f"{launch.kernel.__name__} spills {stack} bytes a thread")
    return float(run_case(case, 10)["llmc"]["us"]["median"]) / 1e6


def _timer(target: CudaTarget) -> Timer:
    from functools import partial

    from llmc.kernels.gpu_bench import Case
    from llmc.kernels.plain_linear.bench import arguments, check_bits
    from llmc.kernels.plain_linear.triton_impl import Tile, plain_linear

    def seconds(rows: int, n: int, k: int, tile: Tile) -> float:
        check_bits(rows, n, k, tile)
        moved = (rows * k + n * k + rows * n) * 2
        made = partial(arguments, rows, n, k)
        case = Case(name=f"{rows}x{n}x{k}", make=made, ours=partial(plain_linear, tile=tile), moved_bytes=moved, flop=2 * rows * n * k)
        return _seconds(case, target)

    return seconds


def _attention_timer(target: CudaTarget) -> AttentionTimer:
    from functools import partial

    from llmc.kernels.paged_attention.bench_cuda import check_bits, measured_case
    from llmc.kernels.paged_attention.triton_impl import Work
    from llmc.kernels.tuned import AttentionShape

    def seconds(shape: AttentionShape, decode: bool, work: Work) -> float:
        size = (shape.heads_per_kv, shape.head_dim, shape.cache == "uint8", decode)
        check_bits(*size, work)
        case = measured_case(*size)
        return _seconds(replace(case, ours=partial(case.ours, work=work)), target)

    return seconds


def _heads(text: str) -> tuple[int, int]:
    """(head_dim, query heads to a key head)."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(numbers) != 3 or 0 in numbers or numbers[0] % numbers[1] or numbers[0] // numbers[1] > 64 or numbers[2] > 256:
        raise ConfigError(f"--attention {text!r}: expected query heads, key heads and head_dim as in 32x8x128")
    return numbers[2], numbers[0] // numbers[1]


def _matrix(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and 0 < int(n) <= 1 << 24 and 0 < int(k) <= 1 << 24):
        raise ConfigError(f"--matrix {text!r}: expected rows and columns as in 4096x1024, the form [out_features, in_features]")
    return int(n), int(k)


def _of_artifact(path: Path) -> list[tuple[int, int]]:
    """(N, K) of the bf16 matrices that an artifact for a GPU holds, in order; a table that is only looked up is among them."""
    from llmc.artifacts.verify import open_artifact

    with open_artifact(path, check_machine=False) as opened:
        manifest = opened.manifest
    if manifest.target.kind != "cuda":
        raise ConfigError(f"--artifact {path}: was compiled for {manifest.target.name}; tiles are a GPU's")
    shapes = [tensor.shape for tensor in manifest.tensors if tensor.dtype == "bfloat16" and len(tensor.shape) == 2]
    return list(dict.fromkeys((n, k) for n, k in shapes if min(n, k) >= 64))
