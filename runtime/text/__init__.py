"""Everything that knows text: tokenizer, incremental detokenizer, stop strings, chat template.

Nothing here imports transformers or torch. The engine knows token ids only; the front process, `llmc run` and
`llmc.LLM` turn text into ids and back with these.
"""

from llmc.runtime.text.channel_reply import ChannelReply
from llmc.runtime.text.chat_template import ChatTemplate
from llmc.runtime.text.detokenizer import Detokenizer
from llmc.runtime.text.forced_reply import ForcedReply
from llmc.runtime.text.reply import Piece, Reply, ReplyParser
from llmc.runtime.text.reply_formats import (
    ChannelFormat,
    ReasoningFormat,
    ReplyFormats,
    ToolFormat,
    choose_formats,
    read_stored_formats,
    stored_formats,
)
from llmc.runtime.text.stop import StopMatcher
from llmc.runtime.text.tagged_reply import TaggedReply
from llmc.runtime.text.text_stream import TextStream
from llmc.runtime.text.tokenizer import Tokenizer

__all__ = [
    "ChannelFormat",
    "ChannelReply",
    "ChatTemplate",
    "Detokenizer",
    "ForcedReply",
    "Piece",
    "ReasoningFormat",
    "Reply",
    "ReplyFormats",
    "ReplyParser",
    "StopMatcher",
    "TaggedReply",
    "TextStream",
    "Tokenizer",
    "ToolFormat",
    "choose_formats",
    "read_stored_formats",
    "stored_formats",
]
