"""The tokenizer's part of an artifact: its files, and what the front process must know without transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from llmc.artifacts.manifest import TokenizerFacts
from llmc.compiler.model import read_json
from llmc.compiler.template_reference import reference_texts
from llmc.errors import UnsupportedModel

TOKENIZER_PATH = "tokenizer/tokenizer.json"
TEMPLATE_PATH = "tokenizer/chat_template.jinja"
REPLY_FORMATS_PATH = "tokenizer/reply_formats.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# (template source, special tokens, messages, add_generation_prompt) -> text; raises ValueError when the template does
Render = Callable[[str, Mapping[str, str], list[dict[str, Any]], bool], str]
# template source, or None -> the file that holds how the model writes reasoning and tool calls
ReplyFormats = Callable[[str | None], bytes]
Parity = Literal["same", "differs", "untested", "none"]


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """What a compile asks of the runtime's text side, which it may not import."""

    render: Render
    reply_formats: ReplyFormats


# Conversations on which the runtime's template engine is held against Jinja2.
PROBES: tuple[tuple[list[dict[str, Any]], bool], ...] = (
    ([{"role": "user", "content": "Hello"}], True),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What is 2 + 2?\n"}], True),
    (
        [
            {"role": "user", "content": "Grüße, 世界 <b>&amp;</b> {{ x }}"},
            {"role": "assistant", "content": "Hi.\n\n```python\nprint('{%')\n```"},
            {"role": "user", "content": ""},
        ],
        True,
    ),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False),
)


@dataclass(frozen=True, kw_only=True)
class TokenizerBundle:
    """Facts for the manifest, and the files by their name in the artifact."""

    facts: TokenizerFacts
    files: dict[str, bytes]

    @property
    def encode(self) -> Callable[[str], list[int]] | None:
        """Text to token ids, or None without a tokenizer."""
        if TOKENIZER_PATH not in self.files:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_buffer(self.files[TOKENIZER_PATH])
        return lambda text: list(tokenizer.encode(text).ids)


def read_tokenizer(
    folder: Path,
    *,
    eos_token_ids: tuple[int, ...],
    bos_token_id: int | None,
    pad_token_id: int | None,
    text: TextSide | None,
) -> TokenizerBundle:
    """Read the tokenizer of a model folder.

    Args:
        folder: with tokenizer.json and, for chat, a template in tokenizer_config.json, chat_template.jinja or chat_template.json.
        eos_token_ids, bos_token_id, pad_token_id: as the model's configuration states them.
        text: the runtime's template engine, to compare with Jinja2, and its formats of replies; None leaves both out and says so.

    A folder without tokenizer.json gives an artifact that serves token ids alone.

    Raises:
        UnsupportedModel: tokenizer.json is not one, there is only a tokenizer of a form that llmc does not read, or the chat
            template does not come to an end.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        other = [
            name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json") if (folder / name).is_file()
        ]
        if other:
            raise UnsupportedModel(
                f"{folder}: a tokenizer only as {other[0]}; llmc reads tokenizer.json, which "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes"
            )
        return TokenizerBundle(facts=_facts(None, None, "none", eos_token_ids, bos_token_id, pad_token_id, {}, 0), files={})
    data = path.read_bytes()
    num_tokens = _num_tokens(data, path)
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = _special_tokens(folder, config)
    template = _template(folder, config)
    files = {TOKENIZER_PATH: data}
    parity: Parity = "none"
    if template is not None:
        files[TEMPLATE_PATH] = template.encode("utf-8")
        parity = template_parity(template, special, text.render) if text is not None else "untested"
    if text is not None:
        files[REPLY_FORMATS_PATH] = text.reply_formats(template)
    facts = _facts(
        TOKENIZER_PATH,
        TEMPLATE_PATH if template is not None else None,
        parity,
        eos_token_ids,
        bos_token_id,
        pad_token_id,
        special,
        num_tokens,
    )
    if REPLY_FORMATS_PATH in files:
        facts = msgspec.structs.replace(facts, reply_formats=REPLY_FORMATS_PATH)
    return TokenizerBundle(facts=facts, files=files)


def template_parity(template: str, special: Mapping[str, str], render: Render) -> Parity:
    """Whether the runtime's template engine writes what Jinja2, as transformers sets it up, writes on PROBES.

    A conversation that both refuse (templates raise on roles they do not know) counts as the same.

    Raises:
        UnsupportedModel: Jinja2 does not come to an end with it.
    """
    ours = [_outcome(render, template, special, *probe) for probe in PROBES]
    return "same" if ours == reference_texts(template, special, PROBES) else "differs"


def _outcome(render: Render, template: str, special: Mapping[str, str], messages: list[dict[str, Any]], prompt: bool) -> str | None:
    try:
        return render(template, special, messages, prompt)
    except ValueError:
        return None


def _num_tokens(data: bytes, path: Path) -> int:
    from tokenizers import Tokenizer

    try:
        return int(Tokenizer.from_buffer(data).get_vocab_size(with_added_tokens=True))
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedModel(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    tables: list[Mapping[str, Any]] = [config]
    if (folder / "special_tokens_map.json").is_file():
        tables.append(read_json(folder / "special_tokens_map.json"))
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        for table in tables:
            value = table.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        config = read_json(folder / "chat_template.json")
    value = config.get("chat_template")
    if isinstance(value, list):  # several named ones; "default" is the chat's
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise UnsupportedModel(f"{folder}: chat_template is a {type(value).__name__}, expected text or a list with a template named default")


def _facts(
    tokenizer: str | None,
    template: str | None,
    parity: Parity,
    eos: tuple[int, ...],
    bos: int | None,
    pad: int | None,
    special: dict[str, str],
    num_tokens: int,
) -> TokenizerFacts:
    return TokenizerFacts(
        tokenizer_json=tokenizer,
        chat_template=template,
        template_parity=parity,
        bos_token_id=bos,
        eos_token_ids=list(eos),
        pad_token_id=pad,
        special_tokens=special,
        num_tokens=num_tokens,
    )


# What a request may ask for, and so what it may inherit: name -> (type, least, most, in words).
_RANGES: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0.0, 1e6, "a number from 0 to 1000000"),
    "top_p": (float, 1e-9, 1.0, "a number above 0, up to 1"),
    "top_k": (int, -1, 2**31 - 1, "an integer from -1"),
    "min_p": (float, 0.0, 1.0, "a number from 0 to 1"),
    "repetition_penalty": (float, 1e-9, 1e3, "a number above 0, up to 1000"),
    "max_new_tokens": (int, 1, 1 << 30, "a positive integer"),
}


def generation_defaults(generation: Mapping[str, Any]) -> dict[str, float | int | bool | list[int]]:
    """The sampling defaults of generation_config.json that a request inherits.

    `do_sample: false` becomes temperature 0, and then top_p and its like say nothing. max_new_tokens limits every answer.

    Raises:
        UnsupportedModel: a value that every request inheriting it would be refused for.
    """
    defaults: dict[str, float | int | bool | list[int]] = {}
    for name, (kind, least, most, words) in _RANGES.items():
        value = generation.get(name)
        if value is None:
            continue
        right = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not right or not least <= value <= most:
            raise UnsupportedModel(f"generation_config.json: {name} is {value!r}, expected {words}; correct or remove it")
        defaults[name] = value
    if generation.get("do_sample") is False:
        for name in ("top_p", "top_k", "min_p"):
            defaults.pop(name, None)
        defaults["temperature"] = 0.0
    return defaults
