"""The checkpoints that figures are given for: random weights from a fixed seed, bf16, with a tokenizer that fills the vocabulary.

S     Qwen3 architecture, hidden 512, 8 layers, vocabulary 4096
M     the shape of Qwen3-0.6B
0.6B  the same for contexts up to 40960, 8B  the shape of Qwen3-8B: for GPUs; their weights repeat one block of random numbers
T     hidden 64, 2 layers: for a GPU's stand-in

python -m benchmarks.models S M --out DIR
"""

from __future__ import annotations

import argparse
import json
import struct
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Qwen3 configuration; tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096


SHAPES = {
    "S": Shape(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
               num_key_value_heads=4, head_dim=64),
    "M": Shape(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
               num_key_value_heads=8, head_dim=128),
    "T": Shape(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=16),
    "0.6B": Shape(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128, max_position_embeddings=40960),
    "8B": Shape(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, max_position_embeddings=40960),
}  # fmt: skip
REPEATED = ("0.6B", "8B")  # 16 GB of distinct random numbers would take minutes, and no time depends on them


def make_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write checkpoint `name` into `folder`/`name`, unless a whole one is there. Returns its path."""
    out = folder / name
    if (out / "complete").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape.__dict__,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}) + "\n")
    _write_tokenizer(out, shape.vocab_size)
    _write_weights(out / "model.safetensors", shape, seed, repeated=name in REPEATED)
    (out / "complete").write_text("")
    return out


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    heads, kv, size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape.vocab_size, hidden))]
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors += [
            (prefix + "input_layernorm.weight", (hidden,)),
            (prefix + "self_attn.q_proj.weight", (heads * size, hidden)),
            (prefix + "self_attn.k_proj.weight", (kv * size, hidden)),
            (prefix + "self_attn.v_proj.weight", (kv * size, hidden)),
            (prefix + "self_attn.o_proj.weight", (hidden, heads * size)),
            (prefix + "self_attn.q_norm.weight", (size,)),
            (prefix + "self_attn.k_norm.weight", (size,)),
            (prefix + "post_attention_layernorm.weight", (hidden,)),
            (prefix + "mlp.gate_proj.weight", (inner, hidden)),
            (prefix + "mlp.up_proj.weight", (inner, hidden)),
            (prefix + "mlp.down_proj.weight", (hidden, inner)),
        ]
    return [*tensors, ("model.norm.weight", (hidden,))]


def _write_weights(path: Path, shape: Shape, seed: int, *, repeated: bool = False) -> None:
    """Normal with deviation 0.02, norms one; streamed, so that a large model needs little memory."""
    tensors = _tensors(shape)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors:
        nbytes = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.Generator(np.random.Philox(seed))
    block = _bf16(random.standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)) if repeated else None
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dims in tensors:
            if len(dims) == 1:
                file.write(_bf16(np.ones(dims, dtype=np.float32)).tobytes())
            elif block is not None:
                for start in range(0, int(np.prod(dims)), len(block)):
                    file.write(block[: int(np.prod(dims)) - start].tobytes())
            else:
                file.write(_bf16(random.standard_normal(dims, dtype=np.float32) * np.float32(0.02)).tobytes())


def _bf16(values: np.ndarray) -> np.ndarray:
    """fp32 truncated to bf16's bits: the numbers are random anyway."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_tokenizer(out: Path, vocab_size: int) -> None:
    """A byte-level BPE of about 3000 merges, the rest of the vocabulary filled with words that no merge reaches.

    So every token id of the model decodes to text, and no corpus is needed but the standard library.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    trainer = trainers.BpeTrainer(
        vocab_size=3500, special_tokens=SPECIALS, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(path) for path in sources], trainer)
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    for number in range(vocab_size - len(vocabulary)):
        vocabulary[f"Ġzz{number:x}"] = len(vocabulary)
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["S", "M"], metavar="S|M")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name in args.names:
        print(make_model(name, args.out))


if __name__ == "__main__":
    main()
