"""`llmc tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from llmc.errors import ConfigError

if TYPE_CHECKING:
    from llmc.kernels.cuda_targets import CudaTarget
    from llmc.kernels.tuned import Timer


@click.command("tune")
@click.option("--target", required=True, help="The GPU of this machine, as `llmc compile --target list` names it.")
@click.option("--matrix", "matrices", multiple=True, metavar="NxK", help="A weight's rows and columns; may be repeated.")
@click.option("--artifact", type=click.Path(path_type=Path), default=None, help="Take the matrices that this GPU artifact multiplies.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Table to add to; default: the one that `llmc compile` reads.")
def tune_command(target: str, matrices: tuple[str, ...], artifact: Path | None, out: Path | None) -> None:
    """Measure tiles of the matrix products on this machine's GPU, for compiles anywhere.

    What is measured changes no bit of a result. Needs the GPU of --target and a CUDA build of torch.
    """
    from llmc.kernels.cuda_targets import cuda_target

    described = cuda_target(target)
    wanted = [_matrix(text) for text in matrices] + (_of_artifact(artifact) if artifact is not None else [])
    if not wanted:
        raise ConfigError("name what to measure: --matrix NxK, or --artifact with one that was compiled for a GPU")
    check_gpu(described)

    import torch

    from llmc.kernels.gpu_bench import machine
    from llmc.kernels.tuned import TABLE, has_tma, tune, write_tuned

    table = out or TABLE
    torch.manual_seed(0)
    entries = tune(wanted, _timer(), tma=has_tma(described.name), progress=lambda line: click.echo(line, err=True))
    write_tuned(described.name, entries, {**machine(), "matrices": [list(pair) for pair in dict.fromkeys(wanted)]}, table)
    click.echo(f"{table}: {len(entries)} tiles for {described.name} are faster than those chosen by rule; compile again to use them")


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


def _timer() -> Timer:
    from functools import partial

    from llmc.kernels.gpu_bench import Case, run_case
    from llmc.kernels.plain_linear.bench import arguments, check_bits
    from llmc.kernels.plain_linear.triton_impl import Tile, plain_linear

    def seconds(rows: int, n: int, k: int, tile: Tile) -> float:
        check_bits(rows, n, k, tile)
        moved = (rows * k + n * k + rows * n) * 2
        made = partial(arguments, rows, n, k)
        case = Case(name=f"{rows}x{n}x{k}", make=made, ours=partial(plain_linear, tile=tile), moved_bytes=moved, flop=2 * rows * n * k)
        return float(run_case(case, 10)["llmc"]["us"]["median"]) / 1e6

    return seconds


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
