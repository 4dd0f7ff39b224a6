"""The root command, and what becomes of errors."""

from __future__ import annotations

import _thread
import inspect
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, NoReturn

import typer

from fullrank._version import __version__
from fullrank.cli import adapters, bench, demo, methods, order, see, serve, shrink, train
from fullrank.core.errors import FullrankError

# What leaves FULLRANK_DEBUG off, as for any switch of the command line.
_OFF = ("", "0", "false", "f", "no", "n", "off")
# What a shell reports for a command that Ctrl-C ended.
_INTERRUPTED = 130

app = typer.Typer(
    name="fullrank",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rank in both senses: matrix rank ([bold]see[/], [bold]train[/], [bold]shrink[/] a model) "
    "and order ([bold]order[/]: search, rerank, evaluate).",
    epilog="Start with [bold]fullrank demo[/]: a search engine over the documentation on this "
    "machine, measured, tuned in little memory, looked into, shrunk and served.",
)
app.add_typer(see.app, name="see")
app.add_typer(train.app, name="train")
app.command("shrink")(shrink.shrink)
app.add_typer(order.app, name="order")
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("methods")(methods.methods)


def _reflow(group: typer.Typer) -> None:
    """Let the terminal wrap the paragraphs of every command's help, not the source.

    Paragraphs with indented lines stay as they are written.
    """
    for command in group.registered_commands:
        text = command.help or inspect.getdoc(command.callback) or ""
        paragraphs = [
            paragraph if "\n  " in paragraph else paragraph.replace("\n", " ")
            for paragraph in text.split("\n\n")
        ]
        command.help = "\n\n".join(paragraphs)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            _reflow(inner.typer_instance)


_reflow(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fullrank {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error.", envvar="FULLRANK_DEBUG"),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set up what holds for every command."""


def main() -> NoReturn:
    """Run the command line: errors that a user can act on become one line and exit code 2."""
    debug = "--debug" in sys.argv[1:] or (os.environ.get("FULLRANK_DEBUG", "").lower() not in _OFF)
    # Accepted anywhere on the line, not just before the command.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        with _no_interrupt_lost(), nullcontext() if debug else _plain_warnings():
            returned = app(args=arguments, prog_name="fullrank", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except Exception as error:
        if debug:
            raise
        code = _report(error)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    # Typer may have turned Ctrl-C into this code already.
    if code == _INTERRUPTED:
        typer.echo("interrupted; what was finished is kept, run the command again", err=True)
    sys.exit(code)


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise a Ctrl-C again that came where Python cannot raise it.

    In a destructor or a callback of a weak reference Python prints the exception and drops it:
    the command would go on as if nothing had been pressed.
    """
    usual = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _interrupt_main)
            again.daemon = True
            again.start()
        else:
            usual(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings for the user as a line without the place in the code that gave them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _interrupt_main() -> None:
    """Send the main thread a signal, which also wakes it where it waits."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def _report(error: Exception) -> int:
    """Say what went wrong in one line; return the exit code."""
    if type(error).__name__ == "Abort":
        return _INTERRUPTED
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe left; nothing more can be printed, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, (FullrankError, OSError)):
        typer.echo(f"fullrank: {error}", err=True)
        return 2
    typer.echo(
        f"fullrank: unexpected {type(error).__name__}: {error}\n"
        "This is a bug: please report it with the traceback that --debug shows.",
        err=True,
    )
    return 1
