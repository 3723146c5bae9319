"""Entry point of the command line: every way to end is one line and one exit code.

Only the standard library is imported at the top: a Ctrl-C while typer, torch or pandas are still being imported must
end in the same one line as any other.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

INTERRUPTED = 130
BROKEN_PIPE = 141

_FREE_SPACE = "free space on this machine, then the same command again"


class _Interrupts:
    """Whether Ctrl-C was pressed, for libraries that turn a KeyboardInterrupt into some error of their own."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if _is_importing_a_library(frame):
            _again_soon()
        else:
            raise KeyboardInterrupt

    def install(self) -> None:
        if (
            signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        ):  # started with nohup or in the background: leave it so
            signal.signal(signal.SIGINT, self)
        sys.unraisablehook = self._unraisable

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        # A Ctrl-C inside a destructor or a C callback would be printed and lost. Deliver it once more, a moment later:
        # raised in here it would be lost again.
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _again_soon()
        else:
            sys.__unraisablehook__(unraisable)


def _is_importing_a_library(frame: FrameType | None) -> bool:
    """Whether an installed package is being imported: raised into the C++ that runs then, an exception ends the process."""
    inner = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith("<frozen importlib"):
            inner = path
        elif not inner or "site-packages" in inner or "dist-packages" in inner:
            return True
        frame = frame.f_back
    return False


def _again_soon() -> None:
    """Deliver the interrupt once more, a moment later."""
    import threading

    again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: Without the program's name; ``sys.argv`` by default.

    Returns:
        0 ok, 2 usage or input, 3 board unreachable or refused, 4 incompatible or infeasible, 5 a gate failed and the
        board is untouched, 6 rolled back, 7 inconsistent, 130 interrupted, 1 anything that edgeprune did not expect.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    interrupts = _Interrupts()
    interrupts.install()
    try:
        code = _invoke(words, interrupts)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        return _leave_broken_pipe()
    except BaseException:
        if not interrupts.seen:
            raise  # to the except hook: one line, or the traceback with --verbose
        code = INTERRUPTED
    finally:
        # From here on only the interpreter's own clean-up is left; a second Ctrl-C must not litter it with tracebacks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        _report_interrupt("--json" in words)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_broken_pipe()
    return code


def _invoke(words: list[str], interrupts: _Interrupts) -> int:
    from edgeprune.cli import quiet

    json_mode, verbose = "--json" in words, "--verbose" in words
    quiet.install(verbose=verbose)
    if not verbose:
        sys.excepthook = _one_line_hook(json_mode)

    import typer

    from edgeprune.cli.commands import root
    from edgeprune.cli.console import report_error, reserve_stdout
    from edgeprune.cli.hints import next_step
    from edgeprune.errors import DeployError, EdgepruneError

    # click's UsageError; typer carries its own copy of click since 0.26, so it is found through a name that both have.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    if json_mode:
        reserve_stdout()
    try:
        code = root().main(args=words, prog_name="edgeprune", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (EdgepruneError, usage_error, OSError) as error:
        if interrupts.seen and not isinstance(error, DeployError):
            # Some library took the interrupt for a failure. What became of a board is told all the same.
            return INTERRUPTED
        hint: str | None
        if isinstance(error, EdgepruneError):
            message, hint, exit_code = error.message, next_step(error, words), error.exit_code
        elif isinstance(error, OSError):
            where = f" {os.fspath(error.filename)!r}" if error.filename else ""
            message, exit_code = f"the system refused{where}: {error.strerror or error}.", 1
            hint = _FREE_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        else:
            message, hint = _usage(error)
            exit_code = 2
            if not message:  # called without arguments: the help was printed
                return exit_code
        kind = "UsageError" if isinstance(error, usage_error) else type(error).__name__
        report_error(kind, message, hint=hint, exit_code=exit_code, json_mode=json_mode)
        return exit_code
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> tuple[str, str | None]:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return "", None
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    command = getattr(context, "command_path", "edgeprune") if context is not None else "edgeprune"
    return message, f"{command} --help"


def _report_interrupt(json_mode: bool) -> None:
    try:
        from edgeprune.cli.console import current_step, report_error
    except ImportError:  # the interrupt hit the import of this very module
        sys.stderr.write("interrupted: run the same command again to go on\n")
        return
    during = f" during {step!r}" if (step := current_step()) else ""
    report_error(
        "Interrupted",
        f"interrupted{during}: run the same command again to go on",
        hint=None,
        exit_code=INTERRUPTED,
        json_mode=json_mode,
        prefix="",
    )


def _leave_broken_pipe() -> int:
    # Whoever read our output has gone (`| head`): nothing may be written any more, not even by the interpreter's exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _one_line_hook(json_mode: bool):  # type: ignore[no-untyped-def]
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from edgeprune.cli.console import report_error

        report_error(
            kind.__name__,
            f"edgeprune failed in a way it did not expect: {kind.__name__}: {error}.",
            hint="the same command with --verbose, and report what it prints",
            exit_code=1,
            json_mode=json_mode,
        )

    return hook
