"""`llmc compile --target list`."""

from __future__ import annotations


def show_targets() -> None:
    """Print every target: CPU levels with what this machine can run, then CUDA targets with what is known of them."""
    from rich.console import Console
    from rich.table import Table

    from llmc.kernels.cuda_targets import cuda_target, cuda_target_names
    from llmc.kernels.isa import LEVELS, TARGET_NAMES, runnable_levels

    console = Console()
    here = runnable_levels()
    cpu = Table(title="CPU targets", title_justify="left")
    cpu.add_column("--target", no_wrap=True)
    cpu.add_column("what it is")
    cpu.add_column("runs here")
    for name in TARGET_NAMES:
        level = LEVELS.get(name.removeprefix("cpu:"))
        if level is None:
            best = here[-1].name if here else "nothing: this machine is below x86-64-v3"
            cpu.add_row(name, f"the highest level of this machine: {best}", "yes" if here else "no")
        else:
            cpu.add_row(name, f"needs {len(level.cpu_features)} CPU features", "yes" if level in here else "no")
    console.print(cpu)
    cuda = Table(title="CUDA targets: compiled for on any machine, with triton installed", title_justify="left")
    cuda.add_column("--target", no_wrap=True)
    cuda.add_column("figures of")
    for column in ("capability", "SMs", "shared KiB/block", "L2 MiB", "GB/s"):
        cuda.add_column(column, justify="right")
    for name in cuda_target_names():
        t = cuda_target(name)
        capability = ".".join(map(str, t.compute_capability))
        shared = str(t.shared_memory_per_block_bytes >> 10)
        l2, bandwidth = str(t.l2_bytes >> 20), str(t.bandwidth_bytes_per_s // 10**9)
        cuda.add_row(name, t.device_name, capability, str(t.num_sms), shared, l2, bandwidth)
    console.print(cuda)
    console.print(
        "An architecture (cuda:sm_90) takes the figures of its typical product; code runs on that architecture alone.", soft_wrap=True
    )
