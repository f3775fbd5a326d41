"""The manifest: the only contract between the compiler and the runtime.

Plain data, written by the compiler, checked by `artifacts.verify` before the runtime believes a word of it.
Unknown fields are refused (msgspec `forbid_unknown_fields`), so an addition raises `FORMAT_VERSION` (version.py).
msgspec and not pydantic: the manifest is parsed on the start path of two processes, and msgspec imports in 10 ms.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "float8_e4m3fn", "bool"]
Role = Literal["kernels", "aoti_shim", "tensor_runtime", "model", "cubin"]  # of an image; "tensor_runtime" and "cubin" since version 3


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every manifest record."""


class FileRecord(_Record, frozen=True):
    """One file of the artifact. Every file but manifest.json and the detached signature has one."""

    path: str  # relative, "/"-separated, no "." or ".." parts
    size_bytes: int
    sha256: str  # hex, of the whole file; for weight files of the chunk digests' raw bytes one after another, see WeightFile


class TensorSpec(_Record, frozen=True):
    """A graph input or output. A dimension is a size, or the name of a symbolic one ("T", "B", "N", "M", "NB")."""

    name: str
    dtype: Dtype
    shape: list[int | str]


class Image(_Record, frozen=True):
    """A shared object or cubin, stored as images/<sha256>.<ext> and named by its hash."""

    sha256: str
    path: str
    role: Role


class PlanRecord(_Record, frozen=True):
    """One plan of an entry (docs/plan_format.md). A step runs on a plan with room for it, the rest filled up; see `Entry`."""

    path: str  # plans/<SHA-256 of the file>.json
    decode: bool  # every sequence has at most one token, so T == B; off: any mixture of prefill and decode
    num_tokens: int  # T
    num_seqs: int  # B
    num_logits: int  # N
    table_blocks: int  # M, columns of block_tables; the same in every plan of an entry


class SamplingRecord(_Record, frozen=True):
    """A plan that turns the logits which a step's plan left into tokens, for one number of rows (docs/plan_format.md, "Sampling")."""

    path: str  # plans/<SHA-256 of the file>.json
    kind: Literal["check", "draw", "truncate", "full"]
    num_logits: int  # N
    num_touched: int  # kind "full": tokens of a row that a bias or penalty may touch; else 0
    num_top: int  # kind "full": log-probabilities a row; else 0


class Entry(_Record, frozen=True):
    """One compiled program.

    executor "nodes": `program` is a JSON node list (docs/node_list.md) run over torch.ops.
    executor "aoti":  `program` is the path of a model image with the AOTInductor C ABI.
    executor "tvm":   (since version 3) `program` is the path of a model image that TVM compiled, with the C functions llmc_tvm_open,
        _set, _run and _close; it runs over TVM's runtime library. `constants` are named by their place behind the inputs: "0", "1", ...
    executor "plans": `program` is the path of the first of `plans`, which go from the smallest step to the largest, decode plans
        first. Every plan has the entry's inputs, constants and outputs under their names, each at its own sizes. What fills a step
        up to a plan's sizes: tokens with slot -1 at the end, sequences with seq_lens 0 whose query_start_loc repeats the last value,
        logits_indices 0, block ids 0.
    """

    name: str
    executor: Literal["nodes", "aoti", "plans", "tvm"]
    program: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    constants: dict[str, str]  # the program's own name for a constant -> name in `Manifest.tensors`
    plans: list[PlanRecord] = []  # since version 3
    sampling: list[SamplingRecord] = []  # since version 3; none: the host samples from the logits


class KVGroup(_Record, frozen=True):
    """Layers that share one block table. Layers with the same sliding window stand in the same group."""

    layers: list[int]
    window: int  # tokens a query sees, itself included; 0 = all


class KVFacts(_Record, frozen=True):
    """How the paged KV cache is cut. Per layer two tensors, K and V, each [num_blocks, num_kv_heads, block_size, head_dim].

    dtype int8 (since version 3): integers with a float32 scale per token and head, the last dimension is head_dim + 4. uint8 (since
    version 3): the bytes of fp8 e4m3.
    """

    block_size: int  # tokens per block
    dtype: Dtype
    num_kv_heads: list[int]  # per layer
    head_dim: list[int]  # per layer
    groups: list[KVGroup]


class ModelFacts(_Record, frozen=True):
    """What the runtime needs to know of the model; it never asks transformers."""

    name: str  # for people and for the API's default model name
    architecture: str  # e.g. "Qwen3ForCausalLM"
    model_type: str
    dtype: Dtype
    num_layers: int
    hidden_size: int
    vocab_size: int  # width of the logits; token ids are checked against it
    max_position_embeddings: int
    num_parameters: int


class Limits(_Record, frozen=True):
    """What the artifact was compiled for. The scheduler's own limits may be lower, never higher."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


class CudaRequirements(_Record, frozen=True):
    """What the GPU and its driver must be."""

    compute_capability: str  # "9.0"; exactly this: machine code runs on no other
    driver_version: int  # at least, as cuDriverGetVersion counts: 12000 for CUDA 12.0
    shared_memory_per_block_bytes: int  # at least, opted in
    num_sms: int  # what grids and parts of sums were made for; a GPU with another number runs them too, not as fast


class Requirements(_Record, frozen=True):
    """Superset check before load: what the machine must have."""

    machine: str  # platform.machine(), "x86_64"
    cpu_features: list[str]  # names as in /proc/cpuinfo flags, sorted
    torch: str | None  # minor version whose AOTInductor C ABI the image was built against, e.g. "2.13"; None: no torch needed
    min_format: int
    cuda: CudaRequirements | None = None  # since version 3; None: no GPU
    tvm: str | None = None  # since version 3; minor version of apache-tvm whose runtime library runs the code, e.g. "0.27"; None: none


class Gpu(_Record, frozen=True):
    """The description a CUDA target was compiled from; figures of the product, or of the architecture's typical one."""

    device_name: str
    num_sms: int
    shared_memory_per_block_bytes: int
    registers_per_sm: int
    l2_bytes: int
    memory_bytes: int
    bandwidth_bytes_per_s: int
    bf16_flops: int


class Target(_Record, frozen=True):
    name: str  # "cpu:x86-64-v4", "cpu:native(<features>)" resolved, "cuda:sm_90", "cuda:h200"
    kind: Literal["cpu", "cuda"]
    isa: str  # kernel level: "x86-64-v3" | "x86-64-v4" | "x86-64-v4+bf16" | "x86-64-v4+bf16+amx", or an architecture, "sm_90"
    gpu: Gpu | None = None  # since version 3; for CUDA targets


class WeightFile(_Record, frozen=True):
    """A safetensors file, hashed per chunk so that hashing runs in parallel with reading. Chunks tile the file."""

    path: str
    size_bytes: int
    chunk_bytes: int
    chunks: list[str]  # sha256 hex per chunk


class TensorRecord(_Record, frozen=True):
    """One packed tensor: where its bytes lie and how they were made from the checkpoint.

    `recipe` is a small expression tree (artifacts/recipes.py). file None: weights are external, the recipe is
    applied when a checkpoint is bound.
    """

    name: str
    dtype: Dtype
    shape: list[int]
    file: str | None
    offset: int  # bytes from the start of the file, 64-byte aligned
    nbytes: int
    recipe: dict[str, Any]


class PassRecord(_Record, frozen=True):
    name: str
    numerics: Literal["exact", "close"]
    matches: int
    refusals: dict[str, int]  # reason -> count
    nodes_before: int
    nodes_after: int


class TokenizerFacts(_Record, frozen=True):
    """Files under tokenizer/ and what the front process must know without transformers."""

    tokenizer_json: str | None  # path in the artifact
    chat_template: str | None  # path in the artifact
    template_parity: Literal["same", "differs", "untested", "none"]  # minijinja against jinja2 on the probe conversations
    bos_token_id: int | None
    eos_token_ids: list[int]
    pad_token_id: int | None
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as the template sees them
    num_tokens: int  # tokenizer's own length, may differ from the width of the logits
    reply_formats: str | None = None  # path in the artifact; since version 3; null: read off the chat template


class Canary(_Record, frozen=True):
    """Prompt with the reference's greedy continuation and the margin (top1 - top2 logit) at each step."""

    prompt_token_ids: list[int]
    expected_token_ids: list[int]
    margins: list[float]
    # Since version 3. Per step the ids whose logit is within canary_tolerance of the best, that one among them: an artifact may choose
    # any of these. None of them: more than a canary holds, the step is not compared. Null: only steps with a greater margin are.
    close_token_ids: list[list[int]] | None = None


class CalibrationFacts(_Record, frozen=True):
    """How integers were fitted to a text, and what rounding the same model to nearest would have cost, measured as the rest is."""

    method: Literal["awq", "signround"]
    library: str  # with its version
    text: str  # "built-in", or the sha256 of the file
    tokens: int
    rounded_perplexity: float
    rounded_mean_kl: float  # nats per token


class QuantizationFacts(_Record, frozen=True):
    """How weights were made smaller, and what it cost, measured at compile time on the calibration text.

    The reference is the captured graph on the checkpoint's weights, the other side the same graph on the dequantised ones. Where
    nothing was measured (external weights) `calibration_tokens` is 0 and the rest is null.
    """

    scheme: Literal["int8", "int4", "fp8"]  # fp8 (since version 3): e4m3
    group: int  # inputs that share a scale; 0: all of a row
    tensors: dict[str, int]  # name of a tensor of small numbers -> its bits
    calibration_tokens: int  # predicted; the measure is over each one's distribution
    reference_perplexity: float | None
    perplexity: float | None
    mean_kl: float | None  # nats per token, of the reference from the quantised
    calibration: CalibrationFacts | None = None  # since version 3; null: rounded to nearest


class KVQuantizationFacts(_Record, frozen=True):
    """A KV cache of eight bits, and what the artifact's answers cost against the checkpoint's weights and a cache of the model's dtype.

    Weights quantised besides are in the cost. Nothing is measured with external weights: `calibration_tokens` is 0, the rest null.
    """

    scheme: Literal["int8", "fp8"]
    calibration_tokens: int
    reference_perplexity: float | None
    perplexity: float | None
    mean_kl: float | None  # nats per token


PoolingKind = Literal["mean", "last", "cls"]


class PoolingFacts(_Record, frozen=True):
    """How a sequence's hidden states become one vector: their mean, the last token's, or the first's; then perhaps length 1."""

    kind: PoolingKind
    normalize: bool


class LoraModule(_Record, frozen=True):
    """A linear that adapters may change. In an adapter's elements its A [max_rank, in_features] begins at `offset`; B [max_rank,
    out_features], transposed and scaled, stands right behind it. A smaller rank is filled up with zeros."""

    name: str  # the checkpoint's, "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int
    offset: int  # elements


class LoraFacts(_Record, frozen=True):
    """Adapters a step may use: the entry reads them from its input `lora_pool` [max_loras, slot_elements] of `dtype`, and from
    `lora_slots` int32 [T] which one each token uses, -1 for none (docs/lora.md)."""

    max_loras: int
    max_rank: int
    dtype: Dtype
    slot_elements: int
    modules: list[LoraModule]


class Manifest(_Record, frozen=True):
    """See docs/artifact_format.md for the page a reader of this file can be written from."""

    format_version: int
    llmc_version: str
    model: ModelFacts
    target: Target
    requirements: Requirements
    level: int
    limits: Limits
    kv: KVFacts
    entries: list[Entry]
    images: list[Image]
    weights: list[WeightFile]
    tensors: list[TensorRecord]
    passes: list[PassRecord]
    op_implementations: dict[str, str]  # op -> implementation chosen at compile time
    tokenizer: TokenizerFacts
    generation_defaults: dict[str, float | int | bool | list[int]]
    canaries: list[Canary]
    canary_tolerance: float  # logits that differ by no more may change places
    toolchain: dict[str, str]  # "torch", "transformers", "g++", ... -> version
    settings: dict[str, str | int | float | bool | None]  # resolved compile settings
    files: list[FileRecord]
    quantization: QuantizationFacts | None = None  # since version 2
    kv_quantization: KVQuantizationFacts | None = None  # since version 3; null: K and V are kept in the model's dtype
    pooling: PoolingFacts | None = None  # since version 3; the task is to embed, and the entry gives hidden states; null: to generate
    tensor_parallel_size: int = 1  # since version 3; ranks: entry "step" is rank 0's, "step.rank<i>" rank i's; `kv` is of one rank
    lora: LoraFacts | None = None  # since version 3; null: compiled without --enable-lora
    manifest_sha256: str = ""  # set when the manifest is encoded (manifest_json.py); finds damage, the signature finds malice
