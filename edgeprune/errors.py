"""Every exception that edgeprune raises on purpose.

::

    EdgepruneError                       exit code
     ├ ConfigError (ValueError)          2   a file, name or option that cannot be used as it is
     │  ├ UnknownBoardError
     │  ├ DeviceFileError
     │  ├ TableFormatError                   corrupt, foreign or incomplete latency table
     │  ├ PlanError                          a plan file or plan that is not valid
     │  └ ManifestError                      an artifact whose manifest or files are not valid
     ├ ModelError (ValueError)           2   the model, its factory, its inputs or its task
     │  ├ FactoryError
     │  ├ InputError
     │  ├ TaskError
     │  ├ TraceError
     │  ├ ConstraintError
     │  ├ EmptyPlanError                     nothing to prune
     │  └ SurgeryError                       the cut model would not equal the masked one
     ├ BudgetInfeasibleError             4   best_ms says what can be reached
     ├ LatencyError                      4
     │  ├ TableMissingError
     │  │  └ TableFileMissingError       2   a path at which there is no such file
     │  ├ TableMismatchError                 table of another device, runtime or precision
     │  ├ UnsupportedKernelError
     │  ├ UnstableMeasurementError           the board was too noisy for a verdict
     │  ├ PowerUnavailableError              no power can be read, or not that of the whole board
     │  └ ShortWindowError                   too short, or too few readings, to tell the energy
     ├ BackendError                      4
     │  ├ BackendUnavailableError (ImportError)
     │  ├ WheelUnavailableError              no wheel of a runtime fits the board
     │  ├ ExportError
     │  └ CompileError
     ├ RemoteError                       3   board unreachable, or it refused
     │  ├ ConnectError
     │  ├ HostKeyError
     │  ├ AuthError
     │  ├ RemoteTimeoutError (TimeoutError)
     │  ├ CommandError
     │  │  └ RunnerEndedError                the program on the board ended, and gave no result
     │  ├ TransferError
     │  ├ BoardFullError                     no space left on the board
     │  ├ BoardBusyError                     another run holds the board
     │  └ UncertainBoardError                the link went as the board switched: it may run the new release, on trial
     └ DeployError
        ├ IncompatibleTargetError        4   field, needed, found
        ├ SignatureError                 5   not signed by somebody who may
        ├ ParityError                    5   gate failed, board untouched
        ├ LatencyGateError               5
        ├ HealthError                    6   rolled back
        └ InconsistentBoardError         7   rollback failed too

Each message is one sentence that says what must hold and what was found; `hint` is the next step. Nothing else prints
tracebacks to users: the command line turns these into one line on stderr and `exit_code`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class EdgepruneError(Exception):
    """Base of all errors that edgeprune raises on purpose.

    Args:
        message: One sentence: what must hold, and what was found.
        hint: The next step for the user, in a few words or as a command.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} Try: {self.hint}"


class ConfigError(EdgepruneError, ValueError):
    """A file, a name or an option cannot be used as it is."""

    exit_code = 2


class UnknownBoardError(ConfigError):
    """No board of that name is configured."""


class DeviceFileError(ConfigError):
    """A device type's TOML file is missing or not valid."""


class TableFormatError(ConfigError):
    """A latency table is corrupt, foreign, or incomplete."""


class PlanError(ConfigError):
    """A pruning plan is not valid, or does not belong to the model."""


class ManifestError(ConfigError):
    """An artifact's manifest or files are not valid."""


class ModelError(EdgepruneError, ValueError):
    """The model, its factory, its inputs or its task cannot be used."""

    exit_code = 2


class FactoryError(ModelError):
    """A `module:factory` does not import or does not return what it must."""


class InputError(ModelError):
    """Example inputs do not fit the model."""


class TaskError(ModelError):
    """A task's loader, loss or metric cannot be used."""


class TraceError(ModelError):
    """The model cannot be captured as a graph."""


class ConstraintError(ModelError):
    """A constraint matches nothing or contradicts the model."""


class EmptyPlanError(ModelError):
    """Nothing can be pruned."""


class SurgeryError(ModelError):
    """The cut model does not equal the masked one."""


class ReconstructionError(ModelError):
    """The layers of a cut model cannot be refitted from the dense one."""


class BudgetInfeasibleError(EdgepruneError):
    """No plan that was found meets the budget.

    Attributes:
        best_ms: The smallest latency that was found, milliseconds.
        widths: Units kept by channel group at that latency, where known.
    """

    exit_code = 4

    def __init__(
        self, message: str, *, best_ms: float, widths: Mapping[str, int] | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.best_ms = best_ms
        self.widths = None if widths is None else dict(widths)


class LatencyError(EdgepruneError):
    """Latency tables, predictors and measurements."""

    exit_code = 4


class TableMissingError(LatencyError):
    """There is no latency table for this device, runtime and precision."""


class TableFileMissingError(TableMissingError):
    """There is no file at the path that was given for a latency table, a predictor, or what one is made of."""

    exit_code = 2


class TableMismatchError(LatencyError):
    """A latency table was measured on another device, runtime or precision."""


class UnsupportedKernelError(LatencyError):
    """A kernel can neither be measured nor predicted."""


class UnstableMeasurementError(LatencyError):
    """The board was too noisy for a verdict."""


class EmulatedProcessorError(LatencyError):
    """The board's processor is emulated, so no latency of it means anything."""


class PowerUnavailableError(LatencyError):
    """No power of the board can be read, or not what was asked for."""


class ShortWindowError(LatencyError):
    """A window is too short, or holds too few readings, to tell the energy that was used in it."""


class BackendError(EdgepruneError):
    """A backend failed."""

    exit_code = 4


class BackendUnavailableError(BackendError, ImportError):
    """A backend is not installed; the hint is the install command."""


class WheelUnavailableError(BackendError):
    """There is no wheel of a runtime that fits the board, or the package index cannot be asked.

    Attributes:
        fitting: Versions that would fit, oldest first; None where the index could not be asked.
    """

    def __init__(self, message: str, *, hint: str | None = None, fitting: tuple[str, ...] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.fitting = fitting


class ExportError(BackendError):
    """A model cannot be exported to the backend's input format."""


class CompileError(BackendError):
    """A backend cannot compile the exported model.

    Attributes:
        log_tail: Last lines of the compiler's log, where there is one.
    """

    def __init__(self, message: str, *, hint: str | None = None, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.log_tail = tuple(log_tail)


class RemoteError(EdgepruneError):
    """A board is unreachable or refuses."""

    exit_code = 3


class ConnectError(RemoteError):
    """No connection to the board."""


class HostKeyError(RemoteError):
    """The board's host key is unknown, has changed, or is revoked."""


class AuthError(RemoteError):
    """The board does not accept the user's keys."""


class RemoteTimeoutError(RemoteError, TimeoutError):
    """The board did not answer in time."""


class CommandError(RemoteError):
    """A command on the board failed."""


class RunnerEndedError(CommandError):
    """The program on the board ended by itself, or was killed, before it gave a result."""


class TransferError(RemoteError):
    """A file could not be moved to or from the board."""


class BoardFullError(TransferError):
    """There is not enough free space on the board."""


class BoardBusyError(RemoteError):
    """Another run holds the board."""


class UncertainBoardError(RemoteError):
    """The link was lost while a board switched: it may have, and then goes back by itself."""


class DeployError(EdgepruneError):
    """A deployment did not go through."""

    exit_code = 5


class IncompatibleTargetError(DeployError):
    """The board cannot run the artifact.

    Args:
        field: Which requirement is not met, e.g. ``"architecture"``.
        needed: What the artifact needs.
        found: What the board has.
    """

    exit_code = 4

    def __init__(self, field: str, needed: str, found: str, *, hint: str | None = None) -> None:
        super().__init__(f"the artifact needs {field} {needed}, the board has {found}.", hint=hint)
        self.field, self.needed, self.found = field, needed, found


class SignatureError(DeployError):
    """An artifact is not signed by anybody who may sign it."""


class ParityError(DeployError):
    """The engine's outputs on the board differ from the golden outputs."""


class LatencyGateError(DeployError):
    """The engine is too slow on the board."""


class HealthError(DeployError):
    """The activated release failed, and the former one was put back."""

    exit_code = 6


class InconsistentBoardError(DeployError):
    """The activated release failed, and the former one could not be put back."""

    exit_code = 7
