"""`llmc.LLM`: text in, text out, as vLLM's users know it."""

from __future__ import annotations

import numpy as np
import pytest

import llmc
from llmc import LLM, RequestRejected, SamplingParams
from llmc.errors import ConfigError
from tests.runtime.toy_artifact import EOS, WORDS, toy_greedy, write_toy_artifact

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(toy_folder, toy_weights):
    return write_toy_artifact(toy_folder / "text-artifact", toy_folder / "toy.so", toy_weights, text=True)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, threads=1, num_blocks=80) as llm:
        yield llm


def _words(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids if token != EOS)


def test_one_text_many_texts_and_token_ids_agree(llm, toy_weights):
    expected, _ = toy_greedy(toy_weights, [3, 4, 5], 6)
    (one,) = llm.generate("w3 w4 w5", GREEDY)
    assert one.prompt == "w3 w4 w5" and one.prompt_token_ids == [3, 4, 5] and one.finished
    assert one.outputs[0].token_ids == expected and one.outputs[0].finish_reason == "length"
    assert one.outputs[0].text.split() == _words(expected).split()
    many = llm.generate(["w3 w4 w5", "w7"], [GREEDY, GREEDY])
    assert [output.outputs[0].token_ids for output in many] == [expected, toy_greedy(toy_weights, [7], 6)[0]]
    assert llm.generate([[3, 4, 5], [7]], GREEDY)[1].outputs[0].token_ids == many[1].outputs[0].token_ids
    assert llm.generate([3, 4, 5], GREEDY)[0].outputs[0].token_ids == expected
    assert llm.generate([], GREEDY) == []


def test_streams_are_read_by_turns_and_texts_generated_between(llm):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[3, 4, 5], [7], [9, 9]]
    alone = [llm.generate([prompt], params)[0].outputs[0].text for prompt in prompts]
    first, second = llm.stream(prompts[0], params), llm.stream(prompts[1], params)
    read = [[next(first)], [next(second)]]
    (between,) = llm.generate([prompts[2]], params)  # for so many steps that both streams end meanwhile
    assert between.outputs[0].text == alone[2]
    for pieces, stream in zip(read, (first, second), strict=True):
        pieces += stream
    assert ["".join(pieces) for pieces in read] == alone[:2]
    left = llm.stream(prompts[0], params)
    next(left)
    left.close()
    assert not llm.engine.has_work()


def test_defaults_come_from_the_artifact_unless_told_otherwise(llm, folder, toy_weights):
    assert (llm.get_default_sampling_params().temperature, llm.get_default_sampling_params().max_tokens) == (0.0, 5)
    assert len(llm.generate([[3, 4]])[0].outputs[0].token_ids) <= 5
    with LLM(folder, threads=1, num_blocks=8, generation_config="llmc") as plain:
        assert plain.get_default_sampling_params() == SamplingParams()


def test_n_sequences_of_one_prompt(llm):
    params = SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=8, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([[3, 4, 5]], params)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    again = llm.generate([[9], [3, 4, 5]], params)[1]
    assert [one.token_ids for one in again.outputs] == [one.token_ids for one in output.outputs]


def test_logprobs_as_tables(llm, toy_weights):
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate([[3, 4, 5]], params)
    one = output.outputs[0]
    assert len(one.logprobs) == 3 and one.cumulative_logprob == pytest.approx(
        sum(table[token].logprob for table, token in zip(one.logprobs, one.token_ids, strict=True))
    )
    first = one.logprobs[0]
    assert len(first) == 2 and first[one.token_ids[0]].rank == 1 and first[one.token_ids[0]].decoded_token == WORDS[one.token_ids[0]]
    assert output.prompt_logprobs[0] is None and [next(iter(table)) for table in output.prompt_logprobs[1:]] == [4, 5]


def test_a_stop_string_ends_the_text_and_the_sequence(llm, toy_weights):
    ids = toy_greedy(toy_weights, [3, 4, 5], 6)[0]
    stop = WORDS[ids[3]]
    (output,) = llm.generate("w3 w4 w5", SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop=[stop]))
    one = output.outputs[0]
    assert one.finish_reason == "stop" and one.stop_reason == stop and stop not in one.text and len(one.token_ids) == 1 + ids.index(ids[3])
    assert not llm.engine.has_work()


def test_a_stop_token_is_reported_and_not_shown(llm, toy_weights):
    ids = toy_greedy(toy_weights, [3, 4, 5], 6)[0]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, stop_token_ids=[ids[2]])
    one = llm.generate([[3, 4, 5]], params)[0].outputs[0]
    assert one.stop_reason == ids[2] and one.token_ids[-1] == ids[2] and one.text.split() == _words(one.token_ids[:-1]).split()


def test_chat_and_stream(llm, toy_weights):
    (output,) = llm.chat([{"role": "user", "content": "w3 w4"}], GREEDY)
    assert output.prompt_token_ids == [3, 4, 2]
    both = llm.chat([[{"role": "user", "content": "w3 w4"}], [{"role": "user", "content": "w9"}]], GREEDY)
    assert [one.prompt_token_ids for one in both] == [[3, 4, 2], [9, 2]]
    assert "".join(llm.stream([3, 4, 2], GREEDY)) == output.outputs[0].text
    stream = llm.stream([3, 4, 2], GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.has_work()


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[3], [400]], GREEDY, "prompt holds 400"),
        (["w3"], SamplingParams(top_p=0.0), "top_p"),
        (["w3", "w4"], [GREEDY], "1 sampling_params for 2 prompts"),
        ([3.5], GREEDY, "a prompt is a text or a list of token ids"),
        (["w3"], SamplingParams(max_tokens=10_000), "max_tokens"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_nothing(llm, prompts, params, message):
    with pytest.raises(RequestRejected, match=message):
        llm.generate(prompts, params)
    assert not llm.engine.has_work()


def test_unknown_options_are_named(folder):
    with pytest.raises(ConfigError, match="no option 'gpus'"):
        LLM(folder, gpus=1)


def test_weights_from_a_checkpoint(toy_folder, toy_weights, tmp_path):
    from safetensors.numpy import save_file

    folder = write_toy_artifact(tmp_path / "artifact", toy_folder / "toy.so", toy_weights, external=True)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with pytest.raises(ConfigError, match="name the checkpoint"):
        LLM(folder, threads=1, num_blocks=40)
    with pytest.raises(ConfigError, match="holds no"):
        LLM(folder, threads=1, num_blocks=40, checkpoint=str(checkpoint))
    save_file({"model.embed": toy_weights["embed"].T.copy()}, checkpoint / "model.safetensors")
    with pytest.raises(llmc.ArtifactError, match="belongs to another model"):
        LLM(folder, threads=1, num_blocks=40, checkpoint=str(checkpoint))
    save_file({"model.embed": np.ascontiguousarray(toy_weights["embed"])}, checkpoint / "model.safetensors")
    with LLM(folder, threads=1, num_blocks=40, checkpoint=str(checkpoint)) as llm:
        assert llm.generate([[3, 4, 5]], GREEDY)[0].outputs[0].token_ids == toy_greedy(toy_weights, [3, 4, 5], 6)[0]


def test_the_public_names():
    assert set(llmc.__all__) <= {*dir(llmc)} and all(getattr(llmc, name) is not None for name in llmc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llmc.nothing  # noqa: B018
