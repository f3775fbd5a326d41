"""The flags of tests/data/flags.toml, one by one: each acts with the stated name, aliases, type and default, or is refused by name."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmc.cli.options import refused_flags, rewrite
from llmc.config.human import human_int, human_int_or_auto
from llmc.config.resolve import resolve
from llmc.config.settings import BY_NAME, SETTINGS, Setting
from llmc.errors import ConfigError

SPEC = tomllib.loads((Path(__file__).parents[1] / "data" / "flags.toml").read_text(encoding="utf-8"))
FLAGS = {flag["name"]: flag for flag in SPEC["flag"]}
TIER_1 = [name for name, flag in FLAGS.items() if flag["tier"] == 1]
# Tier-1 flags that are turned away by name; docs/flags.md says what to use instead.
REFUSED_TIER_1 = {"--model", "--enforce-eager"}
# Spread into the flags that its keys stand for; tests/cli/test_compilation_config.py.
SPREAD = {"--compilation-config"}
# Where a default differs on purpose; docs/flags.md lists each with its reason.
OTHER_DEFAULTS = {"--shutdown-timeout": 30.0, "--enable-prefix-caching": True, "--enable-chunked-prefill": True, "--block-size": 16}
# Settings of ours that act in fewer commands than the specification's stage.
COMPILE_ONLY = {"--tokenizer", "--performance-mode"}


def setting_of(name: str) -> Setting | None:
    return BY_NAME.get(name[2:].replace("-", "_"))


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_acts_or_is_refused_by_name(name: str) -> None:
    setting = setting_of(name)
    reasons = refused_flags()
    assert (setting is None) == (name in reasons)
    if setting is None:
        for spelling in (name, *FLAGS[name]["aliases"]):
            for command in ("compile", "serve"):
                with pytest.raises(ConfigError, match=spelling.replace("+", r"\+")) as caught:
                    rewrite(command, ["artifact", spelling, "1"])
                assert reasons[name] in str(caught.value)


@pytest.mark.parametrize("name", [n for n in TIER_1 if n not in REFUSED_TIER_1 | SPREAD])
def test_tier_1_flags_keep_name_aliases_type_and_default(name: str) -> None:
    flag, setting = FLAGS[name], setting_of(name)
    assert setting is not None, f"{name} is tier 1 and not built"
    assert set(flag["aliases"]) <= {*setting.aliases, "--no-" + name[2:]}
    assert setting.is_flag == (flag["type"] == "bool")
    assert setting.many == (flag["type"].startswith("list") or name == "--api-key")
    if name in OTHER_DEFAULTS:
        assert setting.default == OTHER_DEFAULTS[name]
    elif "default" in flag:
        assert setting.default == flag["default"]
    else:
        assert setting.default is None
    if flag["stage"] in ("compile", "both"):
        assert "compile" in setting.commands or flag["stage"] == "both"
    if flag["stage"] in ("serve", "both") and name not in COMPILE_ONLY:
        assert "serve" in setting.commands


def sample(flag: dict[str, Any]) -> str:
    """A value of the flag's type that is accepted."""
    if flag["name"] == "--block-size":
        return "32"
    if flag["name"] == "--quantization":
        return "int8"
    if "choices" in flag:
        return str(flag["choices"][0])
    return {"int": "7", "human_int": "4k", "float": "0.5", "list[int]": "1,2", "list[str]": "a", "str": "auto"}[flag["type"]]


@pytest.mark.parametrize("name", [n for n in TIER_1 if n not in REFUSED_TIER_1 | SPREAD])
def test_tier_1_flags_take_a_value_from_each_place(name: str, tmp_path: Path) -> None:
    setting = setting_of(name)
    assert setting is not None
    command = sorted(setting.commands)[0]
    text: Any = "true" if setting.is_flag else sample(FLAGS[name])
    expected = setting.parse(text)
    expected = [expected] if setting.many and not isinstance(expected, list) else expected
    by_flag = resolve(command, {setting.name: text}, environ={})
    by_env = resolve(command, {}, environ={setting.env: text})
    file = tmp_path / "llmc.toml"
    file.write_text(f'[{command}]\n{setting.name} = "{text}"\n')
    by_file = resolve(command, {}, config_file=file, environ={})
    assert by_flag[setting.name] == by_env[setting.name] == by_file[setting.name] == expected
    assert by_flag.origins[setting.name] == "command line"
    assert setting.env in by_env.origins[setting.name]
    assert str(file) in by_file.origins[setting.name]


TIER_2 = [name for name, flag in FLAGS.items() if flag["tier"] == 2 and setting_of(name) is not None]
# Their values are structured or files; the tests of what they do give real ones.
SAMPLES = {
    "--override-generation-config": '{"temperature": 0.5}',
    "--speculative-config": '{"method": "ngram", "num_speculative_tokens": 2}',
    "--pooler-config": "{}",
}


@pytest.mark.parametrize("name", TIER_2)
def test_tier_2_flags_that_are_built_keep_aliases_and_type(name: str, tmp_path: Path) -> None:
    flag, setting = FLAGS[name], setting_of(name)
    assert setting is not None
    assert setting.is_flag == (flag["type"] == "bool")
    assert {alias for alias in flag["aliases"] if not alias.startswith("--no-")} <= set(setting.aliases)
    for value in flag.get("choices", []):  # each is taken, or turned away with its own reason
        try:
            setting.parse(str(value))
        except ConfigError as error:
            assert len(str(error)) > 30 and repr(value) in str(error)
    accepted = list(setting.choices) or ([] if "choices" in flag else [SAMPLES.get(name, "")])
    for text in [value for value in accepted if value] or ["1" if flag["type"] in ("int", "bool", "float") else "x"]:
        command = sorted(setting.commands)[0]
        assert (
            resolve(command, {setting.name: text}, environ={})[setting.name]
            == resolve(command, {}, environ={setting.env: text})[setting.name]
        )


@pytest.mark.parametrize("name", [n for n, flag in FLAGS.items() if flag["tier"] <= 2 and setting_of(n) is None])
def test_refusals_of_tiers_1_and_2_say_more_than_no(name: str) -> None:
    reason = refused_flags()[name]
    assert len(reason) > 10 and reason != "not built yet", reason


CASES = [
    (case["input"], case["int"]) for rule in SPEC["syntax"] if rule["name"] == "human-int" for case in rule["cases"] + rule["implied_cases"]
]


@pytest.mark.parametrize(("text", "value"), CASES)
def test_human_integers(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["25.6K", "1.5", "", "k", "1kk", "0x10", "1e3", "1.2345k"])
def test_bad_integers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="integer|suffix|whole"):
        human_int(text)


@pytest.mark.parametrize("text", ["-1", "auto"])
def test_auto_lengths(text: str) -> None:
    assert human_int_or_auto(text) == -1


def test_several_values_after_one_flag() -> None:
    spread = rewrite("serve", ["artifact", "--served-model-name", "a", "b", "--port", "1"])
    assert spread == ["artifact", "--served-model-name", "a", "--served-model-name", "b", "--port", "1"]


def test_a_flag_of_the_other_command_says_where_it_acts() -> None:
    with pytest.raises(ConfigError, match=r"--dtype acts in `llmc compile`, not in `llmc serve`"):
        rewrite("serve", ["artifact", "--dtype", "bfloat16"])


def test_dotted_keys_of_a_refused_flag_are_refused() -> None:
    with pytest.raises(ConfigError, match="-ac"):
        rewrite("compile", ["model", "-ac.backend=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = 99999999\n", "port.*out of range"),
        ("portt = 1\n", "no setting"),
        ("[serve]\ndtype = 'bfloat16'\n", "acts in compile"),
        ("[serve\n", "not valid TOML"),
        ("port = [1.5]\n", "list was found"),
    ],
)
def test_bad_configuration_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve("serve", {}, config_file=file, environ={})


def test_the_later_place_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("port = 1\n[serve]\nport = 2\n")
    assert resolve("serve", {}, config_file=file, environ={})["port"] == 2
    assert resolve("serve", {}, config_file=file, environ={"LLMC_PORT": "3"})["port"] == 3
    assert resolve("serve", {"port": "4"}, config_file=file, environ={"LLMC_PORT": "3"})["port"] == 4


def test_parser_names_are_those_of_the_formats() -> None:
    from llmc.runtime.text.reply_formats import NONE, format_names

    reasoning, tools = format_names()
    assert sorted(BY_NAME["reasoning_parser"].choices) == sorted([*reasoning, NONE])
    assert sorted(BY_NAME["tool_call_parser"].choices) == sorted([*tools, NONE])
    assert (BY_NAME["reasoning_parser"].default, BY_NAME["tool_call_parser"].default) == (FLAGS["--reasoning-parser"]["default"], None)


def test_a_backend_is_one_of_two() -> None:
    assert [BY_NAME["backend"].parse(name) for name in ("inductor", "tvm")] == ["inductor", "tvm"]
    with pytest.raises(ConfigError, match="'xla' is not known; accepted: inductor, tvm"):
        BY_NAME["backend"].parse("xla")


def test_settings_have_one_name_each() -> None:
    spellings = [s for setting in SETTINGS for s in (setting.flag, *setting.aliases)]
    assert len(spellings) == len(set(spellings))
    assert not set(spellings) & set(refused_flags())


def test_the_flag_page_is_what_the_tables_say() -> None:
    docs = Path(__file__).parents[2] / "docs"
    namespace = runpy.run_path(str(docs / "make_flags.py"))
    assert (docs / "flags.md").read_text(encoding="utf-8") == namespace["text"](), "run python docs/make_flags.py"
