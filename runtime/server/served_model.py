"""What the front knows of the model: names, tokenizer, chat template, defaults. Read from the verified artifact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from llmc.artifacts.verify import open_artifact
from llmc.errors import ArtifactError, ConfigError
from llmc.runtime.server.settings import ServerSettings
from llmc.runtime.text import ChatTemplate, ReplyFormats, Tokenizer, choose_formats, read_stored_formats


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """Complete when made; shared by all requests."""

    names: tuple[str, ...]  # the first is shown in answers
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    vocab_size: int  # width of the logits
    generation_defaults: dict[str, float | int | bool | list[int]]
    fingerprint: str  # names the artifact, same for equal artifacts
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... as the template sees them
    replies: ReplyFormats = field(default_factory=ReplyFormats)  # how it writes reasoning and tool calls
    embeds: bool = False  # gives vectors and no text

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def reply_marks(self) -> dict[int, str]:
        """Marks of a reply's parts that are special tokens of the tokenizer: id -> text."""
        return self.tokenizer.special_ids(self.replies.markers)


def reply_formats(settings: ServerSettings, template: str | None, own: ReplyFormats | None = None) -> ReplyFormats:
    """The formats the settings name, or the artifact's own, or those that are certain from the chat template.

    Raises:
        ConfigError: an unknown name, formats that exclude each other, or no tool format where one is asked for.
    """
    formats = choose_formats(reasoning=settings.reasoning_parser, tools=settings.tool_call_parser, template=template, own=own)
    if settings.enable_auto_tool_choice and formats.tools is None:
        raise ConfigError(
            "enable_auto_tool_choice needs a tool-call format, and the chat template shows none for certain; add --tool-call-parser"
        )
    return formats


def load_served_model(settings: ServerSettings) -> ServedModel:
    """Open the artifact, verify what the front uses of it, and close it again.

    Raises:
        ArtifactError: it is damaged or foreign, or holds no tokenizer.
        ConfigError: a signature is required and no key is given to check it.
    """
    trust = Path(settings.trust) if settings.trust is not None else None
    with open_artifact(settings.artifact, require_signature=settings.require_signature, trust=trust) as artifact:
        manifest = artifact.manifest
        facts = manifest.tokenizer
        if facts.tokenizer_json is None:
            raise ArtifactError(
                f"{settings.artifact}: expected a tokenizer to serve text, found none; compile from a folder with tokenizer.json"
            )
        tokenizer = Tokenizer.from_bytes(artifact.read(facts.tokenizer_json))
        source = settings.chat_template
        if source is None and facts.chat_template is not None:
            source = artifact.read(facts.chat_template).decode()
        own = None
        if facts.reply_formats is not None and settings.chat_template is None:  # they were chosen for the artifact's template
            own = read_stored_formats(artifact.read(facts.reply_formats), f"{settings.artifact}/{facts.reply_formats}")
        replies = reply_formats(settings, source, own)
        return ServedModel(
            names=settings.served_model_names or (manifest.model.name,),
            tokenizer=tokenizer,
            chat_template=ChatTemplate(source, facts.special_tokens) if source is not None else None,
            vocab_size=manifest.model.vocab_size,
            generation_defaults=manifest.generation_defaults if settings.generation_config == "auto" else {},
            fingerprint="fp_" + hashlib.sha256(artifact.digest.encode()).hexdigest()[:16],
            special_tokens=dict(facts.special_tokens),
            replies=replies,
            embeds=manifest.pooling is not None,
        )
