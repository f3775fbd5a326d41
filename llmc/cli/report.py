"""`llmc report`: the report of an artifact as a page or in a terminal, and two of them compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from llmc.bench.show import refuse_unwritable
from llmc.config.human import human_bytes
from llmc.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from llmc.compiler.report_compare import Difference

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)
_MAX_BYTES = 64 << 20


@click.command("report")
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER, required=False)
@click.option("--html", "html_file", type=_FILE, default=None, help="Write A's report as one self-contained page.")
@click.option("--kernels", type=_FILE, default=None, help="A --json file of `llmc bench kernels A`.")
@click.option("--levels", type=_FILE, default=None, help="A --json file of `llmc bench levels --passes`: what each pass brings.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def report_command(a: Path, b: Path | None, html_file: Path | None, kernels: Path | None, levels: Path | None, as_json: bool) -> int:
    """Show the report of artifact A, or how it differs from that of B; status 1 when they differ.

    Times of the compile are taken from A.report/ beside the artifact, where they belong to it.
    """
    if b is not None:
        if html_file or kernels or levels:
            raise ConfigError("--html, --kernels and --levels are for the report of one artifact; leave them or B out")
        return _compare(a, b, as_json)
    if html_file is not None:
        refuse_unwritable("--html", html_file)
    report = read_report(a)
    measured = dict(report.pop("measured", None) or {})
    if kernels is not None:
        measured["kernels"] = _kernels(kernels, a, report)
    if levels is not None:
        measured["pass_gain"], measured["pass_kl"] = _pass_gain(levels)
    if as_json:
        print(json.dumps({**report, "measured": measured or None}, indent=2, sort_keys=True))
    elif html_file is None:
        _show(a, report, measured)
    if html_file is not None:
        from llmc.compiler.report_page import render_html

        if (kernels or levels) and "stages" not in measured:
            raise ConfigError(f"{a}: has no {_beside(a)} with the times of its compile; --kernels and --levels are added to those")
        html_file.write_text(render_html(report, measured or None), encoding="utf-8")
        print(f"{html_file}: written")
    return 0


def read_report(artifact: Path) -> dict[str, Any]:
    """An artifact's report, with "measured" from the folder beside it if that is of the same compile.

    Raises:
        ArtifactError: it is damaged, or holds no report.
    """
    from llmc.artifacts.verify import open_artifact

    with open_artifact(artifact, check_machine=False) as opened:
        if not any(record.path == "report/report.json" for record in opened.manifest.files):
            raise ArtifactError(f"{artifact}: holds no report; compile it again with this llmc")
        report: dict[str, Any] = json.loads(opened.read("report/report.json"))
    beside = _beside(artifact)
    if beside.is_file():
        found = _json_file(beside)
        measured = found.pop("measured", None)
        if found == report:
            report["measured"] = measured
    return report


def _beside(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".report") / "report.json"


def _json_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {_MAX_BYTES} bytes, no report is")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def _kernels(path: Path, artifact: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What `llmc bench kernels` measured of this artifact's kernels."""
    from llmc.compiler.report_page import kernel_name

    found = _json_file(path)
    try:
        measured: dict[str, Any] = found["details"]["kernels"]
        names = {row["name"] for row in measured["rows"]}
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: is no --json file of `llmc bench kernels`") from None
    if foreign := sorted(names - {kernel_name(kernel) for kernel in report.get("kernels") or []}):
        raise ConfigError(f"{path}: has times of {foreign[0]}, and {artifact} has no such kernel; run llmc bench kernels {artifact}")
    return measured


def _pass_gain(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Pass -> gain in decode of one sequence, and pass -> mean KL it adds, as the page shows them."""
    found = _json_file(path)
    tables = found.get("tables", [])
    if found.get("benchmark") != "levels" or len(tables) < 2:
        raise ConfigError(f"{path}: is no --json file of `llmc bench levels --passes`")
    gains = {row["pass"]: row["decode 1"] for row in tables[1]["rows"]}
    added = {row["pass"]: f"{row['kl']:.1e}" if row["kl"] else "0" for row in tables[1]["rows"] if "kl" in row}
    return {name: f"{gain['median']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]" for name, gain in gains.items()}, added


def _compare(a: Path, b: Path, as_json: bool) -> int:
    from llmc.compiler.report_compare import compare

    found = compare(read_report(a), read_report(b))
    if as_json:
        print(json.dumps([asdict(one) | {"factor": one.factor} for one in found], indent=2))
    elif not found:
        print(f"{a} and {b}: the reports are equal")
    else:
        from rich.markup import escape
        from rich.table import Table

        from llmc.cli.console import console

        table = Table(title=f"{len(found)} {'difference' if len(found) == 1 else 'differences'}", title_justify="left")
        for column in ("", "what", str(a), str(b), "b / a"):
            table.add_column(escape(column), overflow="fold")
        part = ""
        for one in found:
            factor = f"{one.factor:.2f}" if one.factor is not None else ""
            table.add_row(one.part if one.part != part else "", escape(one.name), *(escape(_text(one, v)) for v in (one.a, one.b)), factor)
            part = one.part
        console().print(table)
    return 1 if found else 0


def _text(difference: Difference, value: Any) -> str:
    if value is None:
        return "-"
    named_bytes = "bytes" in difference.name and isinstance(value, int)
    return human_bytes(value) if named_bytes else str(value)


def _show(artifact: Path, report: dict[str, Any], measured: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from llmc.cli.console import console as tables
    from llmc.compiler.report_page import choice_text, kernel_name

    console = tables()
    model, target = report["model"], report["target"]
    console.print(f"[bold]{escape(model['name'])}[/] {escape(model['architecture'])} at {target['level']} for {escape(target['name'])}")
    passes = Table(title="passes", title_justify="left")
    gains: dict[str, str] = measured.get("pass_gain", {})
    passes.add_column("pass", no_wrap=True)
    for column in ("numerics", "matches", "nodes", *(["gain"] if gains else []), "left alone, and why"):
        passes.add_column(column, overflow="fold")
    for one in report["passes"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in one["refusals"].items())
        nodes = f"{one['nodes_before']} -> {one['nodes_after']}"
        gain = [escape(gains.get(one["name"], "not measured"))] if gains else []
        passes.add_row(one["name"], one["numerics"], str(one["matches"]), nodes, *gain, escape(reasons))
    console.print(passes)
    if report.get("choice"):
        console.print(choice_text(report["choice"], target["level"]), soft_wrap=True)
    if report.get("kernels"):
        kernels = Table(title="kernels, predicted", title_justify="left")
        for column in ("kernel", "calls a step", "reads, per step"):
            kernels.add_column(column, justify="left" if column == "kernel" else "right")
        for kernel in report["kernels"]:
            read = kernel["count"] * kernel["weight_bytes"] if kernel["flop_per_token"] else None
            kernels.add_row(kernel_name(kernel), str(kernel["count"]), human_bytes(read) if read is not None else "")
        console.print(kernels)
    if "kernels" in measured:
        timed = Table(title="kernels, measured", title_justify="left")
        for column in ("kernel", "rows", "one call (µs)", "of the limit (%)", "of a step's kernels (%)"):
            timed.add_column(column, justify="left" if column == "kernel" else "right")
        for row in measured["kernels"]["rows"]:
            timed.add_row(row["name"], str(row["rows"]), f"{row['us']:.1f}", f"{100 * row['of_limit']:.0f}", f"{100 * row['share']:.0f}")
        console.print(timed)
    for what, name in (("weights", "quantization"), ("KV cache", "kv_quantization")):
        if (cost := report.get(name)) and cost["mean_kl"] is not None:
            perplexity = f"perplexity {cost['reference_perplexity']} -> {cost['perplexity']}"
            console.print(f"{what} in {cost['scheme']}: {perplexity}, mean KL divergence {cost['mean_kl']} nats per token")
    if measured.get("seconds") is not None:
        console.print(f"compiled in {measured['seconds']:.1f} s, {human_bytes(measured['artifact_bytes'])}")
    console.print(f"page: {artifact / 'report' / 'report.html'}", soft_wrap=True)
