"""The command line. Commands are imported when they are called, so `llmc --help` imports nothing but click."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import rich_click as click
from click.exceptions import Exit as ClickExit

from llmc.errors import ConfigError, InternalError, LlmcError

# The extra `compile`: what a machine that serves does without.
COMPILE_PACKAGES = ("torch", "transformers", "safetensors")

# command -> (module, attribute, one line of help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "compile": ("llmc.cli.compile", "compile_command", "Compile a Hugging Face folder into an artifact."),
    "serve": ("llmc.cli.serve", "serve_command", "Serve an artifact with an OpenAI-compatible API."),
    "top": ("llmc.cli.top", "top_command", "Watch a running server in the terminal."),
    "run": ("llmc.cli.run", "run_command", "Generate from a prompt in this process."),
    "inspect": ("llmc.cli.artifact", "inspect_command", "Show what an artifact holds."),
    "verify": ("llmc.cli.artifact", "verify_command", "Check every byte of an artifact, and its signature."),
    "diff": ("llmc.cli.artifact", "diff_command", "Show how two artifacts differ."),
    "sign": ("llmc.cli.artifact", "sign_command", "Sign an artifact with a private key."),
    "oci": ("llmc.cli.oci", "oci_group", "Put artifacts into OCI image layouts, and take them out."),
    "report": ("llmc.cli.report", "report_command", "Show the report of an artifact, or compare two."),
    "export": ("llmc.cli.export", "export_group", "Write a model in the format of another program (ONNX)."),
    "tune": ("llmc.cli.tune", "tune_command", "Measure matrix products on this GPU, for compiles anywhere."),
    "bench": ("llmc.cli.bench", "bench_group", "Measure levels, artifacts, servers and kernels."),
    "bisect": ("llmc.cli.bisect", "bisect_command", "Find the pass that changed an answer."),
    "why": ("llmc.cli.cache", "why_command", "Say which part of a cache key differs."),
    "cache": ("llmc.cli.cache", "cache_group", "List or shrink the compile cache."),
    "config": ("llmc.cli.config", "config_group", "Show settings and where each value comes from."),
    "doctor": ("llmc.cli.doctor", "doctor_command", "Check that this machine can compile and serve."),
}


class LazyGroup(click.RichGroup):
    """A group whose commands are imported on use; names and help lines stand in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """For the list in `llmc --help`: the name and its line, nothing imported."""
        return click.RichCommand(name=name, help=COMMANDS[name][2]) if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """For running: the real command."""
        if args and args[0] in COMMANDS:
            module, attribute, _ = COMMANDS[args[0]]
            command = getattr(import_module(module), attribute)
            assert isinstance(command, click.Command)
            return args[0], command, args[1:]
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="llmc", prog_name="llmc")
def cli() -> None:
    """Compile language models ahead of time, and serve what was compiled."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `llmc` program. Returns the exit status; errors are one sentence on standard error."""
    try:
        result = cli.main(args=argv, prog_name="llmc", standalone_mode=False)
    except ClickExit as stop:
        return int(stop.exit_code)
    except click.Abort:
        print("llmc: interrupted", file=sys.stderr)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except InternalError as error:
        print(f"llmc: internal error: {error}\nThis is a fault of llmc; please report it with the command line.", file=sys.stderr)
        return error.exit_code
    except LlmcError as error:
        print(f"llmc: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in COMPILE_PACKAGES:
            raise
        print(f"llmc: this command needs {missing}, which is not installed; pip install 'llmc[compile]' brings it", file=sys.stderr)
        return ConfigError.exit_code
    except BrokenPipeError:  # `llmc inspect OUT | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more when it ends
        return 141  # as a shell reports the signal SIGPIPE
    except OSError as error:
        print(f"llmc: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
