"""vLLM's `-cc`/`--compilation-config`: JSON or `-cc.key=value`, key by key to a flag of llmc, or refused by key."""

from __future__ import annotations

import json
from typing import Any

from llmc.errors import ConfigError

FLAG = "--compilation-config"
MAX_CHARACTERS = 1 << 16

# key -> the flag of `llmc compile` that does the same
FLAGS = {
    "mode": "--optimization-level",
    "cudagraph_capture_sizes": "--cudagraph-capture-sizes",
    "max_cudagraph_capture_size": "--max-cudagraph-capture-size",
    "compile_sizes": "--compile-sizes",
}

_INDUCTOR = "Inductor's settings decide the artifact's bits and are llmc's own"
_CACHE = "the compile cache has a place of its own: LLMC_CACHE_DIR, and --no-cache"
_GRAPHS = "an artifact's plans are graphs built node by node when it is served; nothing is captured, so there is nothing to set"
_SHAPES = "the compiler decides which sizes stay open"
# key -> why it is refused
REFUSED = {
    "level": "vLLM's old name of mode; use -O",
    "debug_dump_path": "set LLMC_DUMP_DIR to a folder to get the graph after every pass",
    "cache_dir": _CACHE,
    "local_cache_dir": _CACHE,
    "compile_cache_save_format": _CACHE,
    "backend": "say --backend inductor or --backend tvm",
    "custom_ops": "which ops are fused is a matter of passes: --passes +name,-name",
    "ir_enable_torch_wrap": _INDUCTOR,
    "splitting_ops": "the graph is compiled whole, attention being an op in it",
    "compile_mm_encoder": "multimodal input is not built",
    "cudagraph_mm_encoder": "multimodal input is not built",
    "encoder_cudagraph_token_budgets": "multimodal input is not built",
    "encoder_cudagraph_max_images_per_batch": "multimodal input is not built",
    "compile_ranges_endpoints": _SHAPES,
    "inductor_compile_config": _INDUCTOR,
    "inductor_passes": "Python code from the command line is not run",
    "cudagraph_mode": _GRAPHS,
    "cudagraph_num_of_warmups": _GRAPHS,
    "cudagraph_copy_inputs": _GRAPHS,
    "cudagraph_specialize_lora": "adapters are for CPUs, which capture nothing",
    "use_inductor_graph_partition": _INDUCTOR,
    "pass_config": "passes are chosen by name: --passes +name,-name; `llmc compile --explain all` lists them",
    "dynamic_shapes_config": _SHAPES,
    "fast_moe_cold_start": "experts are known when the model is compiled",
    "static_all_moe_layers": "experts are known when the model is compiled",
}


def arguments(spelling: str, value: str) -> list[str]:
    """The flags that a `-cc` argument stands for.

    Args:
        spelling: the argument up to its `=`: "-cc", "--compilation-config", "-cc.mode", ...
        value: what follows: JSON, or a level alone, as `-cc 3`; for a dotted spelling the value of that key.

    Raises:
        ConfigError: a key that llmc refuses or does not know, or a value that is no JSON.
    """
    name, _, key = spelling.partition(".")
    if len(value) > MAX_CHARACTERS:
        raise ConfigError(f"{name}: {len(value)} characters, at most {MAX_CHARACTERS} are read")
    if key:
        return _flag(name, key, _json_or_text(value))
    given = _json_or_text(value)
    if isinstance(given, int) and not isinstance(given, bool):
        return _flag(name, "mode", given)
    if not isinstance(given, dict):
        raise ConfigError(f'{name}: expected JSON such as {{"mode": 2}} or a level, found {value[:80]!r}')
    return [part for key, item in given.items() for part in _flag(name, key, item)]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _flag(name: str, key: str, value: Any) -> list[str]:
    head = key.split(".", 1)[0]
    if head in REFUSED:
        raise ConfigError(f"{name}: {head}: {REFUSED[head]}")
    if key not in FLAGS:
        raise ConfigError(f"{name}: {key[:80]!r} is no key of it; llmc takes {', '.join(FLAGS)}")
    if value is None:
        return []  # unset, as vLLM writes it
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        raise ConfigError(f"{name}: {key}: expected a number or a list of numbers, found {json.dumps(value)[:80]}")
    return [f"{FLAGS[key]}={','.join(map(str, items))}"]
