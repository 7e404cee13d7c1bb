"""`expe-edge`: the group of commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from expe_edge import __version__
from expe_edge.cli.analyze import analyze
from expe_edge.cli.bench import bench
from expe_edge.cli.build_kernels import build_kernels
from expe_edge.cli.compare import compare
from expe_edge.cli.evaluate import evaluate
from expe_edge.cli.export import export
from expe_edge.cli.flags import with_flags
from expe_edge.cli.generate import generate
from expe_edge.cli.inspect import inspect
from expe_edge.cli.plan import plan
from expe_edge.cli.probe import probe
from expe_edge.cli.quantize import quantize
from expe_edge.cli.reproduce import reproduce
from expe_edge.cli.sensitivity import sensitivity
from expe_edge.cli.serve import serve
from expe_edge.cli.train import train
from expe_edge.cli.web import web
from expe_edge.errors import ExPEEdgeError, one_line, reason_of, wording

#: Exit codes: a fault of ours, bad input, and Ctrl-C (128 + SIGINT).
INTERNAL = 1
BAD_INPUT = 2
INTERRUPTED = 130
#: Set to anything, it lets a fault of ours end in its traceback.
DEBUG = "EXPE_EDGE_DEBUG"


class CleanGroup(click.Group):
    """A group whose commands turn the project's errors into one line on standard error."""

    def main(self, args: Any = None, *others: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Do as click does, but say of Ctrl-C while click itself is at work what is said of it later."""
        if not standalone_mode:
            return super().main(args, *others, standalone_mode=False, **options)  # type: ignore[call-overload]
        try:
            code = super().main(args, *others, standalone_mode=False, **options)  # type: ignore[call-overload]
        except click.Abort:
            _interrupted()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        sys.exit(code or 0)

    def invoke(self, ctx: click.Context) -> object:
        before = wording.set(lambda message: with_flags(message, self.commands, ctx.invoked_subcommand))
        try:
            return super().invoke(ctx)
        except ExPEEdgeError as error:
            self._fail(wording.get()(str(error)))
        except ModuleNotFoundError as error:
            self._fail(f"{error.name} is not installed; pip install 'expe-edge[{_extra_for(ctx, error)}]'")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has seen enough; click ends quietly
                raise
            if error.errno == errno.ENOSPC:
                self._fail("no space left on the device; free some or change --out")
            self._fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:
            _interrupted()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            fault = f"{type(error).__name__}: {reason_of(error)}; a fault of expe-edge, {DEBUG}=1 shows where"
            click.echo(f"Error: {fault}", err=True)
            sys.exit(INTERNAL)
        finally:
            wording.reset(before)

    def _fail(self, message: str) -> NoReturn:
        click.echo(f"Error: {one_line(message)}", err=True)
        sys.exit(BAD_INPUT)


def _interrupted() -> NoReturn:
    click.echo("interrupted", err=True)
    sys.exit(INTERRUPTED)


def _extra_for(ctx: click.Context, error: ModuleNotFoundError) -> str:
    if error.name == "lm_eval":
        return "evaluate"
    if ctx.invoked_subcommand == "serve":
        return "serve"
    if ctx.invoked_subcommand == "reproduce":
        return "study"
    return "export" if ctx.invoked_subcommand in ("export", "quantize", "sensitivity") else "train"


def prepare_streams() -> None:
    """Let output go nowhere where a standard stream is closed, and replace what a terminal's encoding cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # for as long as the process lives
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@click.group(cls=CleanGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="expe-edge")
def main() -> None:
    """Small language models with ExPE positions: train, export to int8 ONNX, generate and compare far past the
    training length."""
    prepare_streams()


for command in (
    train,
    export,
    quantize,
    sensitivity,
    inspect,
    plan,
    generate,
    serve,
    bench,
    build_kernels,
    web,
    compare,
    probe,
    analyze,
    evaluate,
    reproduce,
):
    main.add_command(command)
