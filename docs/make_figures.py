"""Write the README's table of figures from benchmarks/results/: `python docs/make_figures.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"S": "S: 8 layers, hidden 512, bf16", "M": "M: the shape of Qwen3-0.6B, bf16"}

MODES = {
    "decode": "decode, 1 sequence, tokens/s",
    "prefill": "prefill of 512 tokens, tokens/s",
    "concurrent": "decode, 8 sequences, tokens/s",
}


def load(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")))


def cell(ours: str, theirs: list[str]) -> str:
    return f"**{ours}** ({'; '.join(theirs)})"


def table() -> str:
    """The table, in Markdown."""
    start, decode = load("startup"), load("decode")
    lines = ["| | " + " | ".join(MODELS[m] for m in start["models"]) + " |", "|---|" + "---|" * len(start["models"])]
    row = "| process start to first token over HTTP"
    for figures in start["models"].values():
        theirs = [f"transformers, no server: {figures['transformers_s']['median']:.1f} s"]
        if "vllm_eager_s" in figures:
            theirs.append(f"vLLM eager: {figures['vllm_eager_s']['median']:.1f} s")
        row += " | " + cell(f"{figures['llmc_s']['median']:.2f} s", theirs)
    lines.append(row + " |")
    lines.append(
        "| memory, both processes (PSS) | " + " | ".join(f"{f['pss_mb']['median']:.0f} MB" for f in start["models"].values()) + " |"
    )
    names = {
        "decode": "decode, 1 sequence, tokens/s",
        "prefill": "prefill of 512 tokens, tokens/s",
        "concurrent": "decode, 8 sequences, tokens/s",
    }
    for mode, name in names.items():
        row = f"| {name}"
        for figures in decode["models"].values():
            mine = figures[mode]
            theirs = [f"transformers {mine['hf_tok_s']['median']:.0f}"]
            if "llama_cpp_tok_s" in mine:
                theirs.append(f"llama.cpp {mine['llama_cpp_tok_s']['median']:.0f}")
            row += " | " + cell(f"{mine['llmc_tok_s']['median']:.0f}", theirs)
        lines.append(row + " |")
    machine = decode["environment"]
    versions = machine["versions"]
    lines.append("")
    lines.append(
        f"{decode['threads']} threads on {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )
    return "\n".join(lines)


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = re.sub(
        r"<!-- figures -->.*?<!-- /figures -->", lambda _: f"<!-- figures -->\n{table()}\n<!-- /figures -->", text, flags=re.DOTALL
    )
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
