"""Train the demo model: a Qwen3-architecture model of about two million parameters.

Text: the standard library of the Python that runs this script, its sources, its documentation strings (as short chats) and
pydoc's topics, so nothing is downloaded. Deterministic for one Python version, torch version and thread count. At most 30
minutes on two cores.

    python examples/train_demo_model.py --out examples/demo_model

Why trained at all: random weights give near-flat logits, where a wrong answer and a right one look alike; a parity test on
them proves little.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 2048
# Word pieces with an optional leading space, single digits, runs of punctuation, and white space.
PRE_TOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QUESTIONS = [
    "What does {} do?",
    "Explain {}.",
    "What is {}?",
    "Tell me about {}.",
    "Describe {} in a few words.",
]
SEQUENCE_LENGTH = 256
SKIP_DIRS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo", "config-3", "ensurepip"}


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Yield (dotted module name, source) of the standard library, tests left out, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in SKIP_DIRS or part.startswith("config-") for part in relative.parts) or path.stat().st_size > 300_000:
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        yield name, path.read_text(encoding="utf-8", errors="ignore")


def first_paragraph(doc: str) -> str:
    """The first paragraph of a documentation string on one line, at most 300 characters."""
    paragraph = re.split(r"\n\s*\n", doc.strip())[0]
    return re.sub(r"\s+", " ", paragraph)[:300].strip()


def documented(name: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, first paragraph) of every documented module, class and function."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return  # a few files of the library hold code for other interpreters

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        doc = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else None
        if doc and len(paragraph := first_paragraph(doc)) > 15:
            yield prefix, paragraph
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                yield from walk(child, f"{prefix}.{child.name}")

    yield from walk(tree, name)


def topics() -> Iterator[tuple[str, str]]:
    """Yield (topic, text) of the language reference that pydoc carries."""
    from pydoc_data.topics import topics as table

    for name in sorted(table):
        yield name, table[name]


def chat(user: str, assistant: str) -> str:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"


def corpus(rng: random.Random) -> tuple[list[str], list[str]]:
    """Return (chats, plain texts)."""
    chats, plain = [], []
    for name, source in stdlib_sources():
        plain.append(source)
        for qualified, paragraph in documented(name, source):
            for question in rng.sample(QUESTIONS, 2):
                chats.append(chat(question.format(qualified), paragraph))
    for name, text in topics():
        plain.append(text)
        chats.append(chat(QUESTIONS[0].format(name), first_paragraph(text.split("\n", 3)[-1])))
    for greeting in ("Hello", "Hi", "Hello!", "Who are you?", "What are you?"):
        chats.extend([chat(greeting, "I am a very small model, trained on the Python standard library. Ask me about a module.")] * 20)
    return chats, plain


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32)


def config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def train(tokens_chat: torch.Tensor, tokens_plain: torch.Tensor, *, steps: int, batch_size: int, seed: int) -> Qwen3ForCausalLM:
    """Three quarters of each batch are chats, one quarter is source text. AdamW, one cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3ForCausalLM(config()).train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95), fused=True
    )
    num_chat = batch_size * 3 // 4
    offsets = torch.arange(SEQUENCE_LENGTH + 1)
    started = time.perf_counter()
    for step in range(steps):
        rate = 3e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = []
        for stream, count in ((tokens_chat, num_chat), (tokens_plain, batch_size - num_chat)):
            starts = torch.randint(0, len(stream) - SEQUENCE_LENGTH - 1, (count, 1), generator=generator)
            rows.append(stream[starts + offsets])
        batch = torch.cat(rows).long()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCAB_SIZE), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - started:6.0f} s", flush=True)
    return model.eval()


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.dtype = "bfloat16"
    model.config.save_pretrained(out)
    tensors = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(dict(sorted(tensors.items())), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 2048,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
            sort_keys=True,
        )
        + "\n"
    )
    (out / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0}, indent=2, sort_keys=True) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo_model")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(args.seed)
    chats, plain = corpus(rng)
    print(f"{len(chats)} chats, {sum(map(len, chats)) / 1e6:.1f} MB; {len(plain)} texts, {sum(map(len, plain)) / 1e6:.1f} MB", flush=True)
    tokenizer = train_tokenizer(chats[::2] + plain[::4])
    rng.shuffle(chats)
    tokens_chat, tokens_plain = token_stream(tokenizer, chats), token_stream(tokenizer, plain)
    print(f"{len(tokens_chat) / 1e6:.2f} M chat tokens, {len(tokens_plain) / 1e6:.2f} M source tokens", flush=True)
    model = train(tokens_chat, tokens_plain, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    save(model, tokenizer, args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters -> {args.out}")


if __name__ == "__main__":
    main()
