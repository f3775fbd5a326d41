"""The tokenizer of an artifact: `tokenizer/tokenizer.json`, run by the `tokenizers` library."""

from __future__ import annotations

import re
from functools import lru_cache

import msgspec
import tokenizers

from llmc.errors import ArtifactError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Config(msgspec.Struct):
    """What of a tokenizer.json is read here, beside the library."""

    decoder: object = None


class Tokenizer:
    """Text to token ids and back. Stateless after construction, safe to use from several threads."""

    def __init__(self, inner: tokenizers.Tokenizer, decoder_kinds: frozenset[str]) -> None:
        self._inner = inner
        self._decoder_kinds = decoder_kinds
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)  # ids whose spelling is their text
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Build from the bytes of a tokenizer.json, already verified against the manifest.

        Raises:
            ArtifactError: the bytes are not a tokenizer this version of `tokenizers` reads.
        """
        try:
            inner = tokenizers.Tokenizer.from_buffer(data)
            config = msgspec.json.decode(data, type=_Config)  # what is left out is skipped: a vocabulary is most of the file
        except Exception as error:  # tokenizers raises bare Exception from Rust
            raise ArtifactError(
                f"tokenizer/tokenizer.json: expected a tokenizer that tokenizers {tokenizers.__version__} reads, "
                f"found {str(error)[:200]}; compile the model again with this version of llmc"
            ) from error
        # A file may carry the padding and truncation of its training; a server must see every token of the prompt.
        inner.no_padding()
        inner.no_truncation()
        return cls(inner, _decoder_kinds(config.decoder))

    @property
    def num_tokens(self) -> int:
        """Number of ids the tokenizer knows, added tokens included. May differ from the width of the logits."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` lets the file's post-processor add bos and the like."""
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids the tokenizer does not know (padding of the logits' width) give no text."""
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact spelling in the vocabulary, or None."""
        return self._inner.token_to_id(token)

    def added_tokens(self) -> dict[int, tuple[str, bool]]:
        """Tokens beside the vocabulary proper: id -> (text, whether decoding skips it)."""
        return {token_id: (self.token_bytes(token_id).decode("utf-8", "replace"), token_id in self._special) for token_id in self._added}

    def special_ids(self, texts: tuple[str, ...]) -> dict[int, str]:
        """Those of `texts` that are special tokens, which decoding skips: id -> text."""
        found = {self._inner.token_to_id(text): text for text in texts}
        return {token_id: text for token_id, text in found.items() if token_id in self._special}

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, as shown in log-probabilities; a token holding half a character shows U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes one token adds, exact also where a token holds a part of a character."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if "ByteLevel" in self._decoder_kinds:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
        if "ByteFallback" in self._decoder_kinds and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if "▁" in token:  # SentencePiece writes a space so; decode() of one token would drop the leading one
            return token.replace("▁", " ").encode()
        return self._inner.decode([token_id], skip_special_tokens=False).encode()


def _decoder_kinds(decoder: object) -> frozenset[str]:
    """Names of the decoder steps in a tokenizer.json."""
    if not isinstance(decoder, dict):
        return frozenset()
    kinds = {str(decoder.get("type"))}
    for step in decoder.get("decoders") or []:
        kinds |= _decoder_kinds(step)
    return frozenset(kinds)


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """Character -> byte, the reversible mapping byte-level BPE uses so that every byte has a printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
