"""The whole runtime on plans: an artifact, an engine, a stand-in for the driver. Neither a GPU nor Triton is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from llmc.artifacts.plan import Plan
from llmc.artifacts.verify import verify
from llmc.errors import ArtifactError, ConfigError, DeviceLost, InternalError, LlmcError
from llmc.runtime.engine import Engine, EngineConfig
from llmc.runtime.messages import GenerateRequest, SamplingParams, TokenEvent
from llmc.runtime.step import DeviceBatch
from tests.cuda.stand_in import StandIn
from tests.cuda.toy_cubin import toy_cubin
from tests.cuda.toy_plans import IMAGE, KERNELS, SAMPLING_IMAGE, SIZES, toy_plan, write_toy_plans
from tests.cuda.toy_sampling import sampling_plan
from tests.runtime.toy_artifact import toy_greedy, toy_kv, toy_logits, toy_manifest
from tests.runtime.toy_program import DIM, VOCAB

MakeStandIn = Callable[..., StandIn]
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def weights() -> Weights:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(VOCAB, DIM)).astype(np.float32) for name in ("embed", "head")}


@pytest.fixture(scope="module")
def artifact(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_plans(tmp_path_factory.mktemp("plans") / "toy", weights)


@pytest.fixture
def use(stand_in: MakeStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StandIn]]:
    """Make a stand-in with these knobs the driver of this process."""

    def choose(**knobs: int) -> StandIn:
        made = stand_in(**knobs)
        monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(made.path))
        return made

    yield choose


def config(artifact: Path, **changes: object) -> EngineConfig:
    return EngineConfig(artifact=str(artifact), **{"num_blocks": 64, "threads": 1, **changes})  # type: ignore[arg-type]


def generate(engine: Engine, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    events: dict[str, list[TokenEvent]] = {str(i): [] for i in range(len(prompts))}
    for name, prompt in zip(events, prompts, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=params))
    while engine.has_work():
        for event in engine.step():
            assert event.error is None, event.error
            events[event.request_id].append(event)
    return [[token for event in made for token in event.token_ids] for made in events.values()]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(2, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_an_engine_answers_as_the_program_says(artifact: Path, weights: Weights, use: MakeStandIn, order: int) -> None:
    driver = use(order=order)
    engine = Engine(config(artifact))
    assert engine.ready.startup_ms.keys() >= {"plans", "device", "load", "load.code", "load.weights", "kv", "canary"}
    prompts = prompts_of([1, 3, 9, 17, 40, 70, 2, 33])  # 70 comes in two chunks, beside others that decode
    assert generate(engine, prompts) == [toy_greedy(weights, prompt, 12)[0] for prompt in prompts]
    steps = driver.get("launches")
    assert steps > 0 and steps % (len(KERNELS) + 1) == 0  # and the check of the tokens
    assert driver.get("modules") == 2  # one image of the steps and one of sampling, however many plans
    engine.close()
    engine.close()
    assert (driver.get("live"), driver.get("graphs"), driver.get("modules")) == (0, 0, 0)


def _sampling_bytes(rows: int) -> tuple[int, int]:
    """Inputs and arena of the largest plan that samples."""
    plan = sampling_plan("full", rows, SAMPLING_IMAGE, "")
    inputs = [region.size_bytes or 0 for region in plan.regions if region.kind == "input" and region.name != "logits"]
    return sum(-(-size // 256) * 256 for size in inputs), plan.regions[-1].size_bytes or 0


def test_memory_is_that_of_the_largest_plan_not_of_all(artifact: Path, use: MakeStandIn) -> None:
    driver = use()
    engine = Engine(config(artifact, canary=False))
    plans = [toy_plan(decode, t, b, n) for decode, t, b, n in SIZES]
    arenas = [sum(region.size_bytes or 0 for region in plan.regions if region.kind == "arena") for plan in plans]
    kv = 2 * 64 * 16 * DIM * 4
    inputs = max(sum(-(-(region.size_bytes or 0) // 256) * 256 for region in plan.regions if region.kind == "input") for plan in plans)
    wishes, sampling = _sampling_bytes(16)
    expected = [2 * VOCAB * DIM * 4, inputs, max(arenas), wishes, sampling, kv]
    assert driver.get("live") == sum(-(-size // 512) * 512 + 512 for size in expected)
    assert driver.get("graphs") == 4 * len(plans)  # with three ways to sample; the check of greedy tokens is in the step's
    engine.close()


def test_the_cache_takes_its_share_of_the_free_memory(artifact: Path, use: MakeStandIn) -> None:
    block = 2 * 16 * DIM * 4
    use(memory=100_000 + 20 * block)
    engine = Engine(config(artifact, num_blocks=None, memory_utilization=0.5))
    assert 20 <= engine.ready.num_blocks <= 60
    engine.close()
    use(memory=40_000)
    with pytest.raises(ConfigError, match="memory_utilization=0.0001 of .* does not hold two KV blocks"):
        Engine(config(artifact, num_blocks=None, memory_utilization=0.0001))


def test_a_step_that_wants_more_rows_than_its_plan_has_is_run_again(artifact: Path, weights: Weights, use: MakeStandIn) -> None:
    driver = use()
    engine = Engine(config(artifact, canary=False))
    tokens = prompts_of([40])[0]
    batch = DeviceBatch(
        input_ids=np.array(tokens),
        positions=np.arange(40),
        logits_indices=np.arange(40),
        slot_mapping=16 + np.arange(40)[None],
        block_tables=np.array([[[1, 2, 3]]], dtype=np.int32),
        seq_lens=np.array([40], dtype=np.int32),
        query_start_loc=np.array([0, 40], dtype=np.int32),
    )
    found = engine._executor.run(batch).to_float32()
    assert driver.get("launches") == 3 * (len(KERNELS) + 1)  # 40 rows by 16
    expected = np.stack([toy_logits(weights, tokens[: end + 1]) for end in range(40)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InternalError, match="of 17 tokens in 17 sequences .* fits no plan"):
        engine._executor.run(
            DeviceBatch(
                input_ids=np.zeros(17, dtype=np.int64),
                positions=np.zeros(17, dtype=np.int64),
                logits_indices=np.zeros(17, dtype=np.int64),
                slot_mapping=np.zeros((1, 17), dtype=np.int64),
                block_tables=np.zeros((1, 17, 1), dtype=np.int32),
                seq_lens=np.ones(17, dtype=np.int32),
                query_start_loc=np.arange(18, dtype=np.int32),
            )
        )
    engine.close()


def test_a_row_without_a_finite_logit_is_an_error_of_its_sequence_alone(weights: Weights, use: MakeStandIn, tmp_path: Path) -> None:
    use()
    said = {tuple(prompt): toy_greedy(weights, prompt, 6)[0] for prompt in prompts_of([4] * 40)}
    bad, poison = next((list(p), made[1]) for p, made in said.items() if made[1] not in (*p, made[0]))
    good = next(list(p) for p, made in said.items() if poison not in (*p, *made))
    broken = {**weights, "embed": weights["embed"].copy()}
    broken["embed"][poison] = np.nan  # whoever reads this token has no logits; nobody else sees it
    engine = Engine(config(write_toy_plans(tmp_path / "out", broken, canary=False)))
    for name, prompt in (("good", good), ("bad", bad)):
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=params))
    events: dict[str, list[TokenEvent]] = {"good": [], "bad": []}
    while engine.has_work():
        for event in engine.step():
            events[event.request_id].append(event)
    assert [token for event in events["good"] for token in event.token_ids] == toy_greedy(weights, good, 6)[0]
    assert [token for event in events["bad"] for token in event.token_ids] == toy_greedy(weights, bad, 2)[0]
    assert "no usable logits" in (events["bad"][-1].error or "")
    engine.close()


# --- what the machine lacks -------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_driver(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", "libcuda-that-is-not-here.so.1")
    with pytest.raises(
        ConfigError, match="runs on an NVIDIA GPU and needs its driver, version for CUDA 12.4 or newer; install it, or comp"
    ):
        Engine(config(artifact))


def test_a_driver_that_lacks_a_function(artifact: Path, monkeypatch: pytest.MonkeyPatch, libcuda: Path) -> None:
    monkeypatch.setitem(__import__("llmc.runtime.cuda.api", fromlist=["api"]).FUNCTIONS, "cuGraphFromTheFuture", [])
    monkeypatch.setattr("llmc.runtime.cuda.driver.LIBRARY", str(libcuda))
    with pytest.raises(ConfigError, match="has no cuGraphFromTheFuture; install a driver for CUDA 12.0 or newer"):
        Engine(config(artifact))


@pytest.mark.parametrize(
    ("knobs", "kind", "says"),
    [
        ({"init": 100}, ConfigError, "cuInit gave CUDA_ERROR_NO_DEVICE .100.; the driver finds no GPU; check nvidia-smi"),
        ({"init": 999}, ConfigError, "cuInit gave CUDA_ERROR_UNKNOWN .999.; the driver failed for a reason it does not tell"),
        ({"driver": 12020}, ConfigError, "driver supports CUDA 12.2, this artifact needs 12.4; install a newer driver"),
        ({"gpus": 0}, ConfigError, "GPU 0 was asked for, the driver shows 0; check CUDA_VISIBLE_DEVICES"),
        ({"capability": 80}, ArtifactError, "compiled for sm_90, this GPU .stand-in. is sm_80; compile again with --target cuda:sm_80"),
        ({"shared": 65536}, ArtifactError, "needs 100000 bytes of shared memory per block, this GPU .stand-in. has 65536"),
        ({"memory": 4096}, ConfigError, "the weights: 0.0 MB of GPU memory are needed, 0.0 MB are free on stand-in"),
        ({"oom_at": 2}, ConfigError, "the inputs of a step: .* of GPU memory are needed"),
        ({"oom_at": 3}, ConfigError, "the memory of a step: .* of GPU memory are needed"),
        ({"oom_at": 4}, ConfigError, "what the rows of a step want: .* of GPU memory are needed"),
        ({"oom_at": 5}, ConfigError, "the memory of sampling: .* of GPU memory are needed"),
        ({"oom_at": 6}, ConfigError, "a KV cache of 64 blocks: 0.1 MB of GPU memory are needed"),
        ({"pinned_oom_at": 1}, ConfigError, "buffers for loading weights: .* of page-locked memory are needed"),
        ({"misalign_at": 3}, InternalError, "the driver gave address 0x.*10 for the memory of a step, expected a multiple of 256"),
        ({"illegal_at": 1}, DeviceLost, "a kernel accessed memory that it must not .cuStreamSynchronize gave CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
    ids=lambda value: "-".join(f"{k}_{v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_what_the_machine_lacks_is_one_sentence(
    artifact: Path, use: MakeStandIn, knobs: dict[str, int], kind: type[LlmcError], says: str
) -> None:
    driver = use(**knobs)
    with pytest.raises(kind, match=says) as caught:
        Engine(config(artifact))
    assert "\n" not in str(caught.value)
    if kind is not DeviceLost:  # after which nothing can be freed
        assert driver.get("live") == 0


def test_a_kernel_that_fails_in_service_ends_the_engine(artifact: Path, use: MakeStandIn) -> None:
    driver = use()
    engine = Engine(config(artifact, canary=False))
    driver.set(illegal_at=driver.get("launches") + 5)
    with pytest.raises(DeviceLost, match="a kernel accessed memory that it must not") as caught:
        generate(engine, prompts_of([5, 6]))
    assert caught.value.exit_code == 70
    engine.close()


# --- what an artifact may not hold ------------------------------------------------------------------------------------------------


def broken(change: Callable[[Plan], Plan]) -> list[tuple[bool, Plan]]:
    return [(decode, change(toy_plan(decode, t, b, n))) for decode, t, b, n in SIZES]


def renamed(plan: Plan, old: str, new: str) -> Plan:
    regions = [msgspec.structs.replace(region, name=new) if region.name == old else region for region in plan.regions]
    return msgspec.structs.replace(plan, regions=regions)


def resized(plan: Plan, name: str, factor: int) -> Plan:
    regions = [
        msgspec.structs.replace(region, size_bytes=factor * (region.size_bytes or 0)) if region.name == name else region
        for region in plan.regions
    ]
    return msgspec.structs.replace(plan, regions=regions)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: renamed(plan, "head", "tail"), "weight 'tail' is no tensor of the manifest"),
        (lambda plan: resized(plan, "head", 2), "weight 'head' has 4096 bytes, its tensor 2048"),
        (lambda plan: renamed(plan, "positions", "places"), "this runtime has no input 'places'"),
        (lambda plan: resized(plan, "positions", 2), "input positions has 16 bytes, int64 .1. needs 8"),
        (lambda plan: renamed(plan, "v_cache.0", "v_cache.1"), "'v_cache.1' is no KV cache of the manifest's entry"),
    ],
    ids=["weight", "weight size", "input", "input size", "cache"],
)
def test_plans_that_disagree_with_the_manifest(
    weights: Weights, use: MakeStandIn, tmp_path: Path, change: Callable[[Plan], Plan], says: str
) -> None:
    driver = use()
    out = write_toy_plans(tmp_path / "out", weights, plans=broken(change))
    with pytest.raises(ArtifactError, match=says):
        Engine(config(out))
    assert driver.get("live") == 0


def test_an_image_of_other_parameters_never_reaches_the_driver(weights: Weights, use: MakeStandIn, tmp_path: Path) -> None:
    other = toy_cubin({**KERNELS, "head": [8, 8, 8, 8]})
    driver = use()

    def swap(plan: Plan) -> Plan:
        from llmc.artifacts.chunks import sha256_hex
        from llmc.artifacts.plan import PlanImage

        return msgspec.structs.replace(plan, images=[PlanImage(sha256=sha256_hex(other), size_bytes=len(other))])

    out = write_toy_plans(tmp_path / "out", weights, plans=broken(swap), image=other)
    with pytest.raises(ArtifactError, match="head has parameters .* in its image and .* in the plan"):
        Engine(config(out))
    foreign = write_toy_plans(tmp_path / "foreign", weights, image=toy_cubin(KERNELS, architecture=80))
    with pytest.raises(ArtifactError, match="image .* is not there"):
        Engine(config(foreign))
    assert driver.get("allocations") == 0 and driver.get("modules") == 0


def with_kernel(plan: Plan, entry: str, **changes: int) -> Plan:
    kernels = [msgspec.structs.replace(kernel, **changes) if kernel.entry == entry else kernel for kernel in plan.kernels]
    return msgspec.structs.replace(plan, kernels=kernels)


def test_much_shared_memory_and_clusters_are_asked_for(weights: Weights, use: MakeStandIn, tmp_path: Path) -> None:
    use(shared=100_000)
    out = write_toy_plans(tmp_path / "out", weights, plans=broken(lambda plan: with_kernel(plan, "head", shared_bytes=90_000, cluster=2)))
    engine = Engine(config(out))
    prompts = prompts_of([5, 20])
    assert generate(engine, prompts) == [toy_greedy(weights, prompt, 12)[0] for prompt in prompts]
    engine.close()
    driver = use(shared=100_000)
    much = write_toy_plans(tmp_path / "much", weights, plans=broken(lambda plan: with_kernel(plan, "head", shared_bytes=150_000)))
    with pytest.raises(ArtifactError, match="head needs 150000 bytes of shared memory, a block of stand-in has 100000"):
        Engine(config(much))
    assert driver.get("live") == 0


def test_edges_that_leave_a_hazard_open_are_found_where_an_artifact_is_verified(weights: Weights, tmp_path: Path) -> None:
    verify(write_toy_plans(tmp_path / "good", weights))
    out = write_toy_plans(tmp_path / "out", weights, plans=broken(lambda plan: msgspec.structs.replace(plan, edges=plan.edges[1:])))
    with pytest.raises(ArtifactError, match=r"launches 0 \(remember\) and 1 \(answer\) touch the same bytes, and no edge orders them"):
        verify(out)


def test_caches_that_are_not_those_of_the_facts(
    weights: Weights, use: MakeStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = use()
    narrow = msgspec.structs.replace(toy_kv(), head_dim=[DIM // 2])
    monkeypatch.setattr("tests.cuda.toy_plans.toy_manifest", lambda **fields: toy_manifest(**{"kv": narrow, **fields}))
    out = write_toy_plans(tmp_path / "out", weights)
    with pytest.raises(ArtifactError, match=r"k_cache.0 is float32 .'NB', 1, 16, 16., the KV facts say float32 .'NB', 1, 16, 8."):
        Engine(config(out))
    assert driver.get("live") == 0


def test_plans_that_do_not_reach_the_limits(weights: Weights, use: MakeStandIn, tmp_path: Path) -> None:
    use()
    small = [(decode, toy_plan(decode, t, b, n)) for decode, t, b, n in SIZES[:3]]
    out = write_toy_plans(tmp_path / "out", weights, plans=small)
    with pytest.raises(ArtifactError, match="no plan for a step of 64 tokens of 16 sequences of up to 16 blocks"):
        Engine(config(out))


def test_a_damaged_weight_is_found_before_any_step(weights: Weights, use: MakeStandIn, tmp_path: Path) -> None:
    driver = use()
    out = write_toy_plans(tmp_path / "out", weights)
    file = out / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="are damaged, expected SHA-256"):
        Engine(config(out))
    assert driver.get("launches") == 0 and driver.get("live") == 0
    with pytest.raises(ConfigError, match="weights cannot be mapped; leave --weights-mmap out"):
        Engine(config(out, weights_mmap=True))


def test_the_image_is_the_toy_programs() -> None:
    from llmc.artifacts.cubin import read_cubin

    cubin = read_cubin(IMAGE, "toy")
    assert {name: [size for _, size in kernel.parameters] for name, kernel in cubin.kernels.items()} == KERNELS
