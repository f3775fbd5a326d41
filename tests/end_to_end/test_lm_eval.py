"""lm-eval's local-completions against `llmc serve`, and the same log-likelihoods by Hugging Face.

LLMC_TEST_CLIENTS may name another Python that has lm-eval.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.server.test_clients import importable

if TYPE_CHECKING:
    from tests.end_to_end.workshop import Workshop

# Beginnings, and two ways each may go on; the first is the right one.
DOCUMENTS = [
    {"text": "def fibonacci(n):\n    if n < 2:\n        return", "choices": [" n", " import"], "label": 0},
    {"text": "import os\nimport", "choices": [" sys", " 77"], "label": 0},
    {"text": "for i in", "choices": [" range(10):", " else"], "label": 0},
    {"text": "class Point:\n    def __init__(self, x, y):\n        self.x =", "choices": [" x", " y\n", " self"], "label": 0},
    {"text": "with open(path) as", "choices": [" file:", " while"], "label": 0},
]
TASK = """task: llmc_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
arguments = f"model=demo_model,base_url={sys.argv[1]}/v1/completions,tokenizer_backend=remote,num_concurrent=1,max_retries=1"
found = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=["llmc_choices"], log_samples=True,
                                task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False), bootstrap_iters=0)
samples = sorted(found["samples"]["llmc_choices"], key=lambda sample: sample["doc_id"])
print(json.dumps({"acc": found["results"]["llmc_choices"]["acc,none"], "found": [s["filtered_resps"] for s in samples]}))
"""


def log_likelihood(model: Any, tokenizer: Any, text: str, choice: str) -> tuple[float, bool]:
    """Of `choice` after `text`, in nats, and whether greedy decoding would say it."""
    whole, start = tokenizer(text + choice)["input_ids"], len(tokenizer(text)["input_ids"])
    logits = model(torch.tensor([whole])).logits[0, start - 1 : -1].float()
    target = torch.tensor(whole[start:])
    return float(logits.log_softmax(-1)[torch.arange(len(target)), target].sum()), bool((logits.argmax(-1) == target).all())


@pytest.mark.slow
def test_the_same_log_likelihoods_as_hugging_face(workshop: Workshop, tmp_path: Path) -> None:
    python = importable("lm_eval", reason="lm-eval is not installed")
    import transformers

    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=json.dumps(str(data))))
    artifact = workshop.artifact("demo", level=0)
    command = [sys.executable, "-m", "llmc", "serve", str(artifact), "--port", "0", "--enable-tokenizer-info-endpoint"]
    with subprocess.Popen([*command, "--served-model-name", "demo_model"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = re.search(r"llmc ready at (\S+) ", server.stdout.readline())
        assert ready is not None, server.wait(10)
        client = [python, "-c", PROGRAM, ready[1], str(tmp_path)]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(client, capture_output=True, text=True, timeout=300, check=False, env=environment)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    model = workshop.reference("demo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(workshop.folder("demo"))
    expected = [[log_likelihood(model, tokenizer, d["text"], c) for c in d["choices"]] for d in DOCUMENTS]
    for ours, theirs in zip(found["found"], expected, strict=True):
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    right = [choices[0][0] == max(value for value, _ in choices) for choices in expected]
    assert found["acc"] == pytest.approx(sum(right) / len(right))
