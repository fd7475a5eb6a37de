"""The errors that end a command, each with its exit code (README, "Exit codes")."""


class DcdetError(Exception):
    """Base of every error that dcdet raises on purpose; `exit_code` is the command's exit code."""

    exit_code = 1


class UserError(DcdetError):
    """A mistake in a config, a data set, a checkpoint or an argument.

    The message reads `WHERE: WHAT (HINT)`; `where` is FILE, FILE:LINE or a field, `hint` says how
    to mend it.
    """

    exit_code = 2

    def __init__(self, where: object, what: str, hint: str = "") -> None:
        self.where, self.what, self.hint = str(where), what, hint
        super().__init__(f"{where}: {what}" + (f" ({hint})" if hint else ""))


class DivergedError(DcdetError):
    """Training produced non-finite losses or gradients too many times in a row."""

    exit_code = 3


class MachineError(DcdetError):
    """Disk full, out of memory, a worker or a rank lost: nothing the config could mend."""

    exit_code = 4


def require(holds: bool, key: str, wanted: str, got: object) -> None:
    """Raise ValueError unless a constructor's value `holds` what it must.

    Where the value came from a config, the registry adds the line of `key`.
    """
    if not holds:
        raise ValueError(f"{key}: must be {wanted}, got {got!r}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
