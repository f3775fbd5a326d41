"""A real server process over the fake engine: `python -m tests.server.serve_fake '{"settings": ..., "engine": ...}'`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmc.errors import LlmcError
from llmc.runtime.server.main import serve
from llmc.runtime.server.settings import ServerSettings
from tests.server.tiny_tokenizers import CHATML, byte_level_json


def load_model(settings: ServerSettings):
    from llmc.runtime.server.served_model import ServedModel, reply_formats
    from llmc.runtime.text import ChatTemplate, Tokenizer

    class FaultyTokenizer(Tokenizer):
        """Has a bug that some prompts reach."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            if "boom" in text:
                raise KeyError(text)
            return super().encode(text, add_special_tokens)

    return ServedModel(
        names=settings.served_model_names or ("tiny",),
        tokenizer=FaultyTokenizer.from_bytes(byte_level_json()),
        chat_template=ChatTemplate(settings.chat_template or CHATML, {}),
        vocab_size=400,
        generation_defaults={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 64, "eos_token_id": [2]},
        fingerprint="fp_test",
        replies=reply_formats(settings, settings.chat_template or CHATML),
        embeds=bool(settings.engine.get("embeds")),
    )


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in options["settings"].items()}
    command = (sys.executable, "-m", "tests.server.fake_engine")
    settings = ServerSettings(artifact="none", port=0, engine=options["engine"], engine_command=command, **fields)
    try:
        code = serve(settings, load_model=load_model)
    except LlmcError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    if options.get("modules_to"):
        Path(options["modules_to"]).write_text(json.dumps(sorted(sys.modules)))
    sys.exit(code)
