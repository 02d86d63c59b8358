"""The `jlora` command: its commands together, what it exits with, how it fails."""

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click
import jax

from ..errors import JloraError
from ._output import tell
from ._show import diff, inspect, show_plan, validate
from ._write import convert, extract, merge, quantize

# Begins the message of an error that is a fault of jlora itself.
UNEXPECTED = "an error that jlora did not expect, please report it: "


def main() -> None:
    """Runs the `jlora` command and exits."""
    for stream in (sys.stdout, sys.stderr):  # names may hold what they cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Files are looked at on the host; a GPU's memory would be taken for nothing.
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Returns the exit code of `jlora` with these arguments.

    The code is 0 if all is fine, 1 if a problem was found, and 2 for a wrong call.

    Args:
      arguments: words of the command line, without `jlora` itself.

    Examples:
      >>> run(["inspect", "--help"])
      Usage: jlora inspect [OPTIONS] ADAPTER
      ...
      0
    """
    # Orbax logs a traceback of what it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _warn
            return commands.main(list(arguments), "jlora", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "jlora"
        tell(f"{place}: {error.format_message()} See `{place} --help`.")
        return 2
    except (click.Abort, KeyboardInterrupt):
        tell("jlora: interrupted")
        return 130
    except BrokenPipeError:
        sys.stdout = None  # nobody reads it any more
        return 0
    except JloraError as error:
        tell(f"jlora: {error}")
        return 1
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename!r}: "
        tell(f"jlora: {place}{error.strerror or error}.")
        return 1
    except Exception as error:  # a line for scripts, whatever happens
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        tell(f"jlora: {UNEXPECTED}{type(error).__name__}: {error} ({where}).")
        return 1


def _warn(message: Warning | str, *rest: object, **more: object) -> None:
    tell(f"jlora: warning: {message}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jlora", prog_name="jlora")
def commands() -> None:
    """LoRA adapters and models on disk.

    An ADAPTER is a file of jlora.save, a directory of Hugging Face PEFT, or one of
    jlora.checkpoint. A MODEL is a safetensors file, a directory with its shards, or an
    Orbax checkpoint of parameters. The command finds out which it is given.
    """


for _command in (inspect, show_plan, quantize, merge, convert, diff, extract, validate):
    commands.add_command(_command)
