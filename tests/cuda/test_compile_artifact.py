"""`llmc compile --target cuda:*` from a model folder to an artifact that the runtime's reader takes, with no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs the cuda extra: pip install 'llmc[cuda]'")

from llmc.artifacts.plan import decode_plan
from llmc.artifacts.plan_check import check_plan
from llmc.artifacts.store import Store
from llmc.artifacts.verify import open_artifact, verify
from llmc.compiler.cuda.planner import PlannedProgram
from llmc.compiler.cuda.program import check_products, check_weights
from llmc.compiler.cuda.report import COLUMNS, table_rows
from llmc.compiler.driver import compile_model
from llmc.config.compile import CompileConfig
from llmc.errors import ArtifactError, InternalError, UnsupportedModel
from llmc.runtime.cuda.load import read_plans
from llmc.runtime.executors import step_entry
from tests.architectures import save_tiny_model
from tests.cuda.toy import aten, on_fake_cuda

SIZES = {"cudagraph_capture_sizes": (1, 4), "compile_sizes": (16,), "max_num_seqs": 4, "max_num_batched_tokens": 16}


def config(model: Path, out: Path) -> CompileConfig:
    return CompileConfig(model=model, out=out, target="cuda:sm_90", weights="external", **SIZES)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    return Store(folder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """A tiny qwen3 at three sizes."""
    folder = tmp_path_factory.mktemp("compiled")
    save_tiny_model("qwen3", folder / "model", torch.bfloat16, num_hidden_layers=3)
    compile_model(config(folder / "model", folder / "out"), store=store)
    return folder / "out"


def test_the_runtime_reads_what_was_compiled(artifact: Path) -> None:
    verify(artifact)
    with open_artifact(artifact) as opened:
        manifest = opened.manifest
        entry = step_entry(manifest)
        opened_plans = {plan.path: opened.read(plan.path) for plan in entry.plans}
        checked = read_plans(manifest, entry, {record.path: opened.fd(record.path) for record in manifest.files})
    assert (manifest.target.kind, manifest.target.isa) == ("cuda", "sm_90")
    assert manifest.requirements.cuda is not None and manifest.requirements.cuda.compute_capability == "9.0"
    shared = [kernel.shared_bytes for plan in entry.plans for kernel in decode_plan(opened_plans[plan.path], plan.path).kernels]
    assert max(shared) <= manifest.requirements.cuda.shared_memory_per_block_bytes < 232448, "what the kernels need, not what the GPU has"
    assert manifest.requirements.torch is None
    assert [(plan.decode, plan.num_tokens, plan.num_seqs) for plan in entry.plans] == [(True, 1, 1), (True, 4, 4), (False, 16, 4)]
    assert {plan.table_blocks for plan in entry.plans} == {512 // 16}
    names = {tensor.name for tensor in manifest.tensors}
    for plan in checked.plans:
        assert {region.name for region in plan.regions if region.kind == "weight"} == names == set(entry.constants)
        assert [output.name for output in plan.outputs] == ["logits", "next_tokens"] == [spec.name for spec in entry.outputs]
    images = [image.sha256 for plan in checked.plans for image in plan.images]
    assert len(images) > len(set(images)), "sizes share images"


def test_the_report_has_a_row_per_image_and_counts_every_launch(artifact: Path, store: Store, tmp_path: Path) -> None:
    result = compile_model(config(artifact.parent / "model", tmp_path / "again"), store=store)
    assert result.hit
    gpu = result.report["gpu"]
    with open_artifact(artifact) as opened:
        assert len(gpu["kernels"]) == len(opened.manifest.images)
    for plan in gpu["plans"]:
        assert plan["launches"] == sum(kernel["launches"].get(plan["size"], 0) for kernel in gpu["kernels"])
    assert all(kernel["spill_bytes"] <= gpu["spill_budget_bytes"] and kernel["registers"] > 0 for kernel in gpu["kernels"])
    assert all(len(row) == len(COLUMNS) for row in table_rows(gpu))
    page = (artifact / "report" / "report.html").read_text(encoding="utf-8")
    assert all(kernel["name"] in page for kernel in gpu["kernels"])


def test_other_weights_of_the_shape_find_the_code_in_the_cache(artifact: Path, store: Store, tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path / "model", torch.bfloat16, num_hidden_layers=3)
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\x00\x3f"
    weights.write_bytes(data)
    result = compile_model(config(tmp_path / "model", tmp_path / "out"), store=store)
    assert not result.hit
    assert "from the cache" in next(stage.detail for stage in result.stages if stage.name == "lower")
    assert sorted(os.listdir(tmp_path / "out" / "plans")) == sorted(os.listdir(artifact / "plans"))


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    """Cubins, plans and manifest, from the same input, with nothing kept from the first."""
    compile_model(config(artifact.parent / "model", tmp_path / "out"), store=None)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (artifact / "manifest.json").read_bytes()


def test_a_plan_whose_parameters_are_not_its_images_is_refused(artifact: Path) -> None:
    with ExitStack() as stack:
        opened = stack.enter_context(open_artifact(artifact))
        entry = step_entry(opened.manifest)
        plan = decode_plan(opened.read(entry.plans[0].path), "plan")
        images = {image.sha256: opened.read(image.path) for image in opened.manifest.images}
    check_plan(plan, images, "plan")
    plan.kernels[0].parameters.pop()
    with pytest.raises(ArtifactError, match="in its image and .* in the plan"):
        check_plan(plan, images, "plan")


class Products(nn.Module):
    """Matrix products that no pass has taken."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.register_buffer("weight", torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.product(x, self.weight),)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("aten.bmm.default", lambda x, w: aten.bmm.default(x, w)),
        ("aten.scaled_dot_product_attention.default", lambda x, w: aten.scaled_dot_product_attention.default(x, w, w)),
    ],
)
def test_a_product_that_is_not_ours_is_refused_by_name(name: str, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = on_fake_cuda(Products(product), torch.zeros(4, 8, 8))
    with pytest.raises(UnsupportedModel, match=f"{name}.*--target cpu"):
        check_products(graph)


def test_a_constant_that_a_plan_lacks_is_an_error(artifact: Path) -> None:
    with open_artifact(artifact) as opened:
        plan = decode_plan(opened.read(step_entry(opened.manifest).plans[0].path), "plan")
    program = PlannedProgram(plan=plan, images={}, sources=[])
    held = {region.name for region in plan.regions if region.kind == "weight"}
    check_weights(program, held, "decode 1")
    with pytest.raises(InternalError, match="first difference: another"):
        check_weights(program, held | {"another"}, "decode 1")
