"""`llmc bisect`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from llmc.errors import ConfigError


@click.command("bisect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(), required=True, help="Folder it was compiled from; artifacts hold no paths.")
@click.option("--prompt", default=None, help="Text to continue; needs a tokenizer in the artifact.")
@click.option("--prompt-ids", default=None, metavar="N,N,...", help="Token ids to continue, in place of text.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), default=16, show_default=True, help="Greedy tokens that are compared.")
def bisect_command(artifact: Path, model: str, prompt: str | None, prompt_ids: str | None, max_tokens: int) -> None:
    """Find the pass that changed what the model answers. The exit status is 1 if one did.

    The graph is run after each pass of ARTIFACT's list, by the plain torch meaning of its ops; then the artifact itself, where it runs.
    """
    from rich.console import Console

    from llmc.artifacts.verify import open_artifact

    console = Console(highlight=False)
    with open_artifact(artifact, check_machine=False) as opened:
        manifest = opened.manifest
    ids = _ids(artifact, prompt, prompt_ids)
    if any(not 0 <= token < manifest.model.vocab_size for token in ids):
        raise ConfigError(f"--prompt-ids: ids lie in 0 to {manifest.model.vocab_size - 1}")

    from llmc.compiler.bisect import bisect_artifact, recorded_model

    def tell(name: str, same: bool) -> None:
        console.print(f"  {'same tokens' if same else '[bold]other tokens[/]':12}  after {name}")

    console.print(f"{artifact}: {len(manifest.passes)} passes, {max_tokens} greedy tokens after a prompt of {len(ids)}", soft_wrap=True)
    found = bisect_artifact(manifest, recorded_model(manifest, model), ids, new_tokens=max_tokens, observer=tell)
    if found.changed_by is not None:
        assert found.found is not None and found.position is not None and found.margin is not None
        verdict = "rounding alone can turn such a choice" if found.margin <= found.tolerance else "more than rounding moves"
        console.print(f"[bold]{found.changed_by}[/] is the first pass that changes them: token {found.position + 1}", soft_wrap=True)
        console.print(f"  captured   {found.expected}\n  after it   {found.found}", soft_wrap=True)
        console.print(f"  the two best logits lie {found.margin:.4g} apart there ({verdict}; bound {found.tolerance:g})", soft_wrap=True)
        raise SystemExit(1)
    console.print("no pass changes them", soft_wrap=True)
    _compare_artifact(console, artifact, ids, found.expected)


def _ids(artifact: Path, prompt: str | None, prompt_ids: str | None) -> list[int]:
    if (prompt is None) == (prompt_ids is None):
        raise ConfigError("give the prompt once: --prompt TEXT or --prompt-ids N,N,...")
    if prompt_ids is not None:
        try:
            return [int(part) for part in prompt_ids.split(",")]
        except ValueError:
            raise ConfigError(f"--prompt-ids {prompt_ids!r}: expected integers with commas between them") from None
    file = artifact / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{artifact} has no tokenizer; give --prompt-ids")
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(file)).encode(prompt or "").ids)


def _compare_artifact(console: object, artifact: Path, ids: list[int], expected: list[int]) -> None:
    from rich.console import Console

    from llmc.errors import ArtifactError
    from llmc.runtime.llm import LLM
    from llmc.runtime.messages import SamplingParams

    assert isinstance(console, Console)
    try:
        llm = LLM(artifact, num_blocks=64, max_model_len=None)
    except ArtifactError as error:
        console.print(f"the artifact itself was not run here: {error}", soft_wrap=True)
        return
    with llm:
        params = SamplingParams(temperature=0.0, max_tokens=len(expected), ignore_eos=True)
        answered = list(llm.generate([ids], params)[0].outputs[0].token_ids)
    if answered == expected:
        console.print("and the artifact answers them too", soft_wrap=True)
        return
    console.print("but the artifact answers others, so lowering or a kernel is what changes them", soft_wrap=True)
    console.print(f"  captured   {expected}\n  artifact   {answered}", soft_wrap=True)
    raise SystemExit(1)
