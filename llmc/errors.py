"""The errors llmc raises. Every message says what was expected, what was found, where, and what to do next."""


class LlmcError(Exception):
    """Base of everything llmc raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(LlmcError):
    """A setting is wrong or two disagree; tells which, and the accepted values."""

    exit_code = 2


class UnsupportedModel(LlmcError):
    """The model asks for what llmc does not compile; tells the op, the module path or the missing piece."""

    exit_code = 3


class ArtifactError(LlmcError):
    """A file is damaged, foreign, too new or needs another machine; tells the file, what was expected and found."""

    exit_code = 4


class RequestRejected(LlmcError):
    """This request cannot run; the engine goes on. Becomes that client's HTTP error.

    Args:
        message: one sentence for the client.
        status: the HTTP status it becomes.
        param: the request field at fault, if one is.
        code: a stable machine-readable word, if there is one.
    """

    exit_code = 5

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class InternalError(LlmcError):
    """llmc broke its own promise; asks for a report."""

    exit_code = 70


class DeviceLost(InternalError):
    """A GPU kernel failed, or a rank ended. Nothing can run in this process any more: the engine ends, and the front starts another."""


class PassError(InternalError):
    """A pass failed; names it, the passes before it and where the graph was dumped."""
