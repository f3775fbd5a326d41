"""`llmc compile`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from llmc.cli.differences import difference_lines
from llmc.cli.options import SettingsCommand, resolved, with_settings
from llmc.compiler.stages import Checked
from llmc.config.compile import CompileConfig, compile_config
from llmc.config.human import human_bytes
from llmc.config.resolve import Resolved
from llmc.errors import ArtifactError, ConfigError, InternalError

if TYPE_CHECKING:
    from rich.table import Table

    from llmc.artifacts.manifest import Manifest
    from llmc.artifacts.store import Store
    from llmc.compiler.cached import CompileResult
    from llmc.compiler.tokenizer_files import TextSide


class CompileCommand(SettingsCommand):
    settings_of = "compile"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--target list` is an answer of its own, like --help: it needs neither MODEL nor --out."""
        if "--target=list" in args or ("--target", "list") in pairwise(args):
            from llmc.cli.targets import show_targets

            show_targets()
            ctx.exit()
        if (explained := _explained(args)) is not None:
            from llmc.cli.explain import show_explanation

            show_explanation(explained)
            ctx.exit()
        return super().parse_args(ctx, args)


def _explained(args: list[str]) -> str | None:
    """PASS of `--explain PASS`, which needs neither MODEL nor --out."""
    given = [arg.removeprefix("--explain=") for arg in args if arg.startswith("--explain=")]
    given += [after for before, after in pairwise(args) if before == "--explain"]
    return given[0] if given else None


@click.command("compile", cls=CompileCommand)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=None, help="Folder of the artifact.")
@click.option("--force", is_flag=True, help="Replace an artifact that is at OUT.")
@click.option("--no-cache", is_flag=True, help="Neither look in the compile cache nor keep the result there.")
@click.option("--no-check", is_flag=True, help="Do not run the artifact on its canary prompts before it is published.")
@click.option("--dry-run", is_flag=True, help="Capture and run the passes, show what they do, write nothing.")
@click.option("--estimate", is_flag=True, help="Show what the artifact will need, write nothing.")
@click.option(
    "--explain", metavar="PASS", default=None, expose_value=False, help="Say what a pass does, and where; `all` lists every pass."
)
@click.option("--explain-cache", is_flag=True, help="Say why the cache hits or misses, write nothing.")
@with_settings("compile")
def compile_command(
    model: Path,
    out: Path | None,
    force: bool,
    no_cache: bool,
    no_check: bool,
    dry_run: bool,
    estimate: bool,
    explain_cache: bool,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Compile the Hugging Face folder MODEL into an artifact."""
    settings = resolved("compile", options, config_file)
    if out is None:
        if not (dry_run or estimate or explain_cache):
            raise ConfigError("where to? Name the artifact's folder: -o OUT")
        out = Path("artifact")  # nothing is written; the name is in no key
    config = compile_config(model, out, settings, force=force, use_cache=not no_cache, pooling=_pooling(model, settings))
    if explain_cache:
        _explain(config)
    elif dry_run or estimate:
        _preview(config, passes=dry_run)
    else:
        _compile(config, check=not no_check)


def _pooling(model: Path, settings: Resolved) -> tuple[str, bool] | None:
    """How the artifact pools, if it is to embed."""
    if settings["task"] == "generate":
        for name in ("pooling", "normalize"):
            if settings.given(name):
                raise ConfigError(f"--{name} is for --task embed; leave it out, or give both")
        return None
    from llmc.compiler.pooling import read_pooling

    facts = read_pooling(model, pooling=settings["pooling"], normalize=settings["normalize"])
    return facts.kind, facts.normalize


def _compile(config: CompileConfig, *, check: bool) -> None:
    from rich.console import Console

    from llmc.cli.stage_view import LiveStages, PlainStages
    from llmc.compiler.driver import compile_model

    console = Console(stderr=True)
    title = f"[bold]llmc compile[/] {config.model} -O{config.level} --target {config.target}"
    with LiveStages(console, title) if console.is_terminal else PlainStages() as view:
        result = compile_model(
            config,
            observer=view,
            text=text_side(config),
            check=_run_canaries if check else None,
            store=_store() if config.use_cache else None,
            time_decode=_time_decode,
        )
    _show(result, config)


def _store() -> Store:
    from llmc.artifacts.store import Store

    return Store()


def text_side(config: CompileConfig) -> TextSide:
    """What the compiler takes of the runtime."""
    from llmc.compiler.tokenizer_files import TextSide
    from llmc.runtime.text import choose_formats, stored_formats

    def formats(template: str | None) -> bytes:
        return stored_formats(choose_formats(reasoning=config.reasoning_parser, tools=config.tool_call_parser, template=template))

    return TextSide(render=_render, reply_formats=formats)


def _render(template: str, special: Mapping[str, str], messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """The runtime's chat template engine, as the compiler wants it for its comparison with Jinja2."""
    from llmc.errors import RequestRejected
    from llmc.runtime.text import ChatTemplate

    try:
        return ChatTemplate(template, dict(special)).render(messages, add_generation_prompt=add_generation_prompt)
    except (RequestRejected, ArtifactError) as error:
        raise ValueError(str(error)) from error


def _run_canaries(folder: Path) -> Checked:
    """Run the unpublished artifact in a process of its own: if it crashes there, the compile says so instead of dying with it."""
    from llmc.artifacts.requirements import check_requirements, this_machine
    from llmc.artifacts.verify import open_artifact

    with open_artifact(folder, check_machine=False) as artifact:
        manifest = artifact.manifest
    if not manifest.canaries:
        return Checked(detail="not run: no weights in the artifact")
    try:
        if manifest.target.kind == "cuda":
            _find_gpu(manifest)
        check_requirements(manifest.requirements, this_machine(), str(folder))
    except (ArtifactError, ConfigError) as error:
        return Checked(detail=f"not run here, but by `llmc serve` before it is ready: {error}")
    done = subprocess.run([sys.executable, "-m", "llmc.runtime.check_artifact", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise InternalError(f"the compiled artifact fails on its own canary prompts and was not published: {reason}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Checked(detail=f"{answer['compared']} canary tokens as the reference", startup_ms=answer["startup_ms"])


def _find_gpu(manifest: Manifest) -> None:
    """Check that this machine has the GPU an artifact was compiled for.

    Raises:
        ConfigError: no driver or no GPU. ArtifactError: another one.
    """
    from llmc.runtime.cuda.load import open_device

    open_device(manifest).close()


def _time_decode(folder: Path) -> list[float]:
    """Milliseconds of a decode step, from a process of its own."""
    done = subprocess.run([sys.executable, "-m", "llmc.runtime.time_decode", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
        raise InternalError(f"-O3 could not time a program it compiled: {reason}")
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def _show(result: CompileResult, config: CompileConfig) -> None:
    from rich.table import Table

    from llmc.cli.console import console as tables

    console = tables()
    table = Table(title=f"{config.model} -O{result.level} for {result.target}", title_justify="left", show_edge=True)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("", style="dim", overflow="fold")
    for stage in result.stages:
        table.add_row(stage.name, f"{stage.seconds:.2f}", stage.detail)
    table.add_section()
    total = sum(stage.seconds for stage in result.stages)
    sizes = f"weights {human_bytes(result.weights_bytes)}, code {human_bytes(result.code_bytes)}"
    table.add_row("[bold]all[/]", f"[bold]{total:.2f}[/]", f"{human_bytes(result.size_bytes)}: {sizes}")
    console.print(table)
    if result.report.get("gpu"):
        console.print(_gpu_kernels(result.report["gpu"]))
    report = config.report or config.out.with_name(config.out.name + ".report")
    source = "from the compile cache" if result.hit else f"report with times: {report / 'report.html'}"
    console.print(f"artifact  [bold]{result.out}[/] ({source})", soft_wrap=True)
    if (result.out / "tokenizer" / "tokenizer.json").is_file():
        console.print(f"next      [bold]llmc serve {shlex.quote(str(result.out))}[/]", soft_wrap=True)
    else:
        advice = "the model folder has no tokenizer.json: use llmc.LLM with token ids, or compile with --tokenizer DIR to serve text"
        console.print(f"next      {advice}", soft_wrap=True)


def _gpu_kernels(facts: Mapping[str, Any]) -> Table:
    """The kernel table of an artifact for a GPU."""
    from rich.table import Table

    from llmc.compiler.cuda.report import COLUMNS, table_rows

    title = f"{len(facts['plans'])} plans, {facts['layers']} layers, {facts['distinct_layers']} of them distinct"
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number in (0, len(COLUMNS) - 1) else "right", overflow="fold")
    for row in table_rows(facts):
        table.add_row(*row)
    return table


def _explain(config: CompileConfig) -> None:
    """Hit, or the nearest entry and the parts in which it differs."""
    from llmc.compiler.input_key import input_key
    from llmc.compiler.targets import find_target

    store = _store()
    key = input_key(config, find_target(config.target))
    if store.find(key) is not None:
        print(f"hit: {key.digest} is in the cache at {store.root}")
        return
    print(f"miss: {key.digest} is not in the cache at {store.root}")
    nearest = store.nearest(key)
    if nearest is None:
        print("there is no other artifact to compare with")
        return
    record, differences = nearest
    print(f"nearest: {record.key}, which differs in")
    for line in difference_lines(differences):
        print(f"  {line}")


def _preview(config: CompileConfig, *, passes: bool) -> None:
    from rich.table import Table

    from llmc.cli.console import console as tables
    from llmc.compiler.preview import preview
    from llmc.compiler.targets import find_target

    find_target(config.target)  # a target that a compile refuses has no preview either

    seen = preview(config)
    console = tables()
    if passes:
        table = Table(title=f"{seen.architecture}: {seen.nodes} nodes captured", title_justify="left")
        table.add_column("pass", no_wrap=True)
        for column in ("numerics", "matches", "nodes", "left alone, and why"):
            table.add_column(column, overflow="fold")
        for report in seen.passes:
            refused = "; ".join(f"{count} x {reason}" for reason, count in report.refusals.items())
            table.add_row(report.name, report.numerics, str(report.matches), f"{report.nodes_before} -> {report.nodes_after}", refused)
        console.print(table)
    else:
        table = Table(title=f"{seen.architecture}, {seen.dtype}: what the artifact will need", title_justify="left", show_header=False)
        table.add_row("weights in the artifact and in memory", human_bytes(seen.weights_bytes))
        table.add_row("KV cache of one token", human_bytes(seen.kv_bytes_per_token))
        table.add_row(f"KV cache of one sequence of {seen.max_model_len} tokens", human_bytes(seen.kv_bytes_per_token * seen.max_model_len))
        whole = seen.kv_bytes_per_token * seen.max_model_len * config.max_num_seqs
        table.add_row(f"KV cache of {config.max_num_seqs} such sequences", human_bytes(whole))
        console.print(table)
    console.print("nothing was written")
