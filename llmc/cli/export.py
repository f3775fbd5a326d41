"""`llmc export`: models in the formats of other programs."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from llmc.config.human import human_bytes

_FOLDER = click.Path(path_type=Path)


@click.group()
def export_group() -> None:
    """Write a model in the format of another program."""


@export_group.command("onnx")
@click.argument("model", type=_FOLDER)
@click.option("-o", "--out", type=_FOLDER, required=True, help="Folder to write: model.onnx, configuration and tokenizer files.")
@click.option("--dtype", default="float32", show_default=True, help="float32, or float16; of weights, activations and caches.")
@click.option("--max-model-len", type=int, default=None, help="Longest sequence; it decides between longrope's two sets of frequencies.")
@click.option("--force", is_flag=True, help="Replace an export that is at OUT.")
def onnx_command(model: Path, out: Path, dtype: str, max_model_len: int | None, force: bool) -> None:
    """Export the Hugging Face folder MODEL with standard attention and past keys and values, for onnxruntime (extra `onnx`).

    Inputs are input_ids, attention_mask, position_ids and past_key_values.LAYER.key and .value, outputs logits and present.LAYER.key
    and .value, all of symbolic batch and lengths; the past of a first step has length 0.
    """
    from llmc.compiler.onnx_export import export_onnx

    made = export_onnx(model, out, dtype=dtype, max_model_len=max_model_len, force=force)
    where = f"{made.path.name}.data" if made.external else made.path.name
    print(f"{made.path}: {made.num_nodes} nodes; weights {human_bytes(made.weights_bytes)} in {where}")
