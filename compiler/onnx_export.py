"""`llmc export onnx`: a model with standard attention and past keys and values, as onnxruntime and its relatives take it.

    model folder -> OUT/model.onnx (+ model.onnx.data), configuration and tokenizer files

Inputs: input_ids, position_ids int64 [B, S]; attention_mask int64 [B, P + S]; past_key_values.<layer>.{key,value} [B, Hkv, P, D].
Outputs: logits [B, S, vocab]; present.<layer>.{key,value} [B, Hkv, P + S, D]. B, S and P are symbolic; P may be 0. These are the
names that Optimum's exporter gives (huggingface/optimum, `exporters/onnx`).

torch.onnx translates each op; one it has no translation for is named in the refusal.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from llmc.artifacts.filesystem import OS, explain_os_error, remove_tree
from llmc.artifacts.safetensors import Checkpoint
from llmc.artifacts.temporary_folder import make_locked_folder, make_parents, recover, remove_stale, swap_folders
from llmc.compiler import skeleton
from llmc.compiler.attention_hook import LayerFacts
from llmc.compiler.cached_attention import CachedAttention
from llmc.compiler.capture import probe_layers
from llmc.compiler.checkpoint_names import parameter_recipe
from llmc.compiler.model import TOKENIZER_FILES, ModelSource, read_model
from llmc.compiler.packing import dtype_name, fetcher
from llmc.errors import ConfigError, UnsupportedModel
from llmc.passes.weights import Constant

DTYPES = ("float32", "float16")
# A protobuf message ends at 2 GiB; a graph takes a few MiB of that.
EMBED_BYTES = (2 << 30) - (64 << 20)
_MODEL = "model.onnx"
_COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    path: Path  # of model.onnx
    num_nodes: int
    weights_bytes: int
    external: bool  # the weights lie in model.onnx.data


def export_onnx(
    model: Path, out: Path, *, dtype: str = "float32", force: bool = False, max_model_len: int | None = None, embed_bytes: int = EMBED_BYTES
) -> Exported:
    """Export a model folder. `out` appears whole or not at all.

    Args:
        model: a Hugging Face folder.
        out: the folder to write.
        dtype: of weights, activations and caches, one of DTYPES; onnxruntime's CPU kernels take no bfloat16.
        force: replace a folder that this command wrote before.
        max_model_len: decides between longrope's two sets of frequencies; None for the model's maximum.
        embed_bytes: weights of more bytes are written beside the graph.

    Raises:
        ConfigError: packages are missing, or `out` is in the way.
        UnsupportedModel: llmc cannot read the model, or ONNX has no form of one of its ops.
    """
    _check(out, dtype, force)
    source = read_model(model, dtype=dtype)
    length = source.max_position_embeddings if max_model_len is None else max_model_len
    if not 0 < length <= source.max_position_embeddings:
        raise ConfigError(f"--max-model-len {length}: {source.name} knows 1 to {source.max_position_embeddings} positions")
    module, layers = _module(source, length)
    files = sorted({tensor.file for tensor in source.tensors.values()})
    with Checkpoint([source.path / name for name in files]) as checkpoint:
        _fill(module, source, checkpoint)
        written = _translate(_capture(module, layers), layers)
        size = sum({id(p): p.nbytes for p in module.parameters()}.values())
        return _publish(written, source, out, weights_bytes=size, embed_bytes=embed_bytes, force=force)


def _check(out: Path, dtype: str, force: bool) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}; onnxruntime's CPU kernels take no bfloat16")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"llmc export onnx needs the extra onnx, of which {error.name} is missing: pip install 'llmc[onnx]'") from error
    _check_output(out, force)


def _check_output(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is not a folder; choose another --out")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise ConfigError(f"{out} is not empty; choose another --out, or --force to replace an export")
        if not (out / _MODEL).is_file():
            raise ConfigError(f"{out} holds no {_MODEL}, so it is no export; it is not replaced. Choose another --out")


def _module(source: ModelSource, max_model_len: int) -> tuple[nn.Module, list[LayerFacts]]:
    """The model without weights, attending through `CachedAttention`."""
    model = skeleton.build_on_meta(source.config, getattr(torch, source.dtype))
    skeleton.check_rope(model)
    layers = probe_layers(model)
    skeleton.compute_buffers(model)
    skeleton.fix_rope(model, max_model_len)
    return model, layers


def _fill(model: nn.Module, source: ModelSource, checkpoint: Checkpoint) -> None:
    """Replace meta parameters by the checkpoint's, tied ones by the same one. Mutates the model; plain tensors stay mapped files."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    constants = {}
    for tied in names.values():
        shape, dtype = tuple(parameters[tied[0]].shape), parameters[tied[0]].dtype
        prefix = str(getattr(model, "base_model_prefix", ""))
        recipe = parameter_recipe(
            tied,
            shape,
            dtype_name(dtype),
            model_type=source.model_type,
            base_prefix=prefix,
            tensors=source.tensors,
            stored=source.stored,
        )
        constants[tied[0]] = Constant(recipe=recipe, dtype=dtype, shape=shape)
    fetch = fetcher(constants, checkpoint)
    for tied in names.values():
        real = nn.Parameter(fetch(tied[0]), requires_grad=False)
        for name in tied:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = real


class _Cached(nn.Module):
    """The function that is exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        attention = CachedAttention(past=past, attention_mask=attention_mask)
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=None, use_cache=False, return_dict=True, llmc_paged=attention
        )
        return output.logits, attention.present


def _capture(model: nn.Module, layers: list[LayerFacts]) -> ExportedProgram:
    batch, new, past = 2, 3, 5
    dtype = next(model.parameters()).dtype
    heads = [torch.zeros(batch, layer.num_kv_heads, past, layer.head_dim, dtype=dtype) for layer in layers]
    ids = torch.zeros(batch, new, dtype=torch.int64)
    # each a tensor of its own: export takes one object in two places for one input
    arguments = (ids, torch.ones(batch, past + new, dtype=torch.int64), ids.clone(), [(h, h.clone()) for h in heads])
    step, cache = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    shapes = (step, step, step, [(cache, cache)] * len(layers))
    with torch.no_grad():
        return torch.export.export(_Cached(model), arguments, dynamic_shapes=shapes, strict=False)


def _translate(program: ExportedProgram, layers: list[LayerFacts]) -> Any:
    """torch.onnx's own program.

    Raises:
        UnsupportedModel: names the op it has no translation for.
    """
    pairs = [f"{{}}.{layer.layer}.{part}" for layer in layers for part in ("key", "value")]
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["input_ids", "attention_mask", "position_ids", *(p.format("past_key_values") for p in pairs)],
                output_names=["logits", *(p.format("present") for p in pairs)],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedModel(f"ONNX has no form of {_culprit(error)}; this model cannot be exported") from error
    assert translated is not None  # None is what torch.onnx.export returns when it writes the file itself
    _name_sizes(translated.model)
    return translated


def _culprit(error: BaseException) -> str:
    """The op that stopped the translation, from the innermost message that names one."""
    named, current = "", error
    while current is not None:
        found = re.findall(r"\b(?:aten|llmc|prims|higher_order)[.:]+\w+(?:\.\w+)?", str(current))
        named = found[0] if found else named
        current = current.__cause__  # type: ignore[assignment]
    return f"op {named}" if named else f"an op of this model ({' '.join(str(error).split())[:200]})"


def _name_sizes(model: Any) -> None:
    """Call the symbolic sizes by what they are. Mutates the ONNX model's inputs and outputs; sizes inside keep their derived names."""
    import onnx_ir as ir

    cache = ("batch", None, "past", None)
    present = ("batch", None, "past + sequence", None)
    wanted = {"input_ids": ("batch", "sequence"), "position_ids": ("batch", "sequence"), "attention_mask": ("batch", "past + sequence")}
    for value in (*model.graph.inputs, *model.graph.outputs):
        names: tuple[str | None, ...] = wanted.get(value.name) or (present if value.name.startswith("present.") else cache)
        if value.name == "logits":
            names = ("batch", "sequence", None)
        value.shape = ir.Shape([old if name is None else name for old, name in zip(value.shape, names, strict=True)])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and says which ops of torchvision it could not register; errors are raised either way."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _publish(program: Any, source: ModelSource, out: Path, *, weights_bytes: int, embed_bytes: int, force: bool) -> Exported:
    """Write into a hidden folder beside `out`, then give it that name. Until then, and if anything fails, an older export stays.

    Raises:
        ArtifactError: the system refused.
        ConfigError: something has taken the name meanwhile.
    """
    external = weights_bytes > embed_bytes
    out = Path(os.path.realpath(out))
    try:
        make_parents(OS, str(out.parent))
        recover(OS, out)
        remove_stale(OS, out)
        folder, lock = make_locked_folder(OS, out)
    except OSError as error:
        raise explain_os_error(error, "making a temporary folder", str(out.parent)) from error
    try:
        program.save(Path(folder) / _MODEL, external_data=external)
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, f"{folder}/{name}")
        folder = _take_name(folder, out, force)
    except OSError as error:
        raise explain_os_error(error, "writing the export", str(out), needed_bytes=weights_bytes) from error
    finally:
        remove_tree(OS, folder)
        os.close(lock)
    return Exported(path=out / _MODEL, num_nodes=len(list(program.model.graph)), weights_bytes=weights_bytes, external=external)


def _take_name(folder: str, out: Path, force: bool) -> str:
    """Returns the folder that is left to be deleted; one that is gone already does no harm there."""
    try:
        OS.rename(folder, str(out))  # replaces an empty folder, refuses any other
        return folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    _check_output(out, force)
    old = swap_folders(OS, folder, out)
    if old is None:
        raise ConfigError(f"{out} was removed while its replacement was being written; run again")
    return old
