"""The `slidetune` command. Each subcommand is a thin page over a function of `slidetune.api`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from slidetune import __version__
from slidetune.cli.console import err
from slidetune.cli.export import export
from slidetune.cli.fit import fit
from slidetune.cli.init import init
from slidetune.cli.lists import gpus, models, schema
from slidetune.cli.plan import plan
from slidetune.cli.profile import profile
from slidetune.cli.run import INTERRUPTED, run
from slidetune.cli.simulate import report, simulate
from slidetune.cli.train import train
from slidetune.cli.tune_loop import tune_loop
from slidetune.cli.validate import validate
from slidetune.errors import SlidetuneError

USER_ERROR = 2

app = typer.Typer(
    name="slidetune",
    help="Full-parameter fine-tuning on one GPU that cannot hold the model: predict the step, search the knobs, "
    "explain what limits it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """Say that Ctrl-C has ended a command; typer would end it without a word."""

    @functools.wraps(command)
    def wrapped(*args: Any, **values: Any) -> None:
        try:
            command(*args, **values)
        except KeyboardInterrupt:
            err.print("Stopped.")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


_COMMANDS = (
    *(init, train, export),
    *(plan, run, validate, tune_loop, profile, simulate, report, fit, gpus, models, schema),
)
for command in _COMMANDS:
    app.command()(_stoppable(command))


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. A user's mistake ends with a message and exit code 2, never with a traceback."""
    try:
        app()
    except SlidetuneError as error:
        err.print(f"[bold red]Error:[/] {_plain(error.message)}")
        if error.hint:
            err.print(_plain(error.hint))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        err.print("Stopped.")
        sys.exit(INTERRUPTED)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
