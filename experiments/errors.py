"""The one exception whose message is meant for the user, and the checks that raise it."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ExperimentError(Exception):
    """Something the user can fix: the message names the cause, its value and the remedy.

    ``run.py`` prints only the message, without a traceback, and exits with 2.
    """


@contextmanager
def reported(when_interrupted: str = "") -> Iterator[None]:
    """Ends a command whose block fails with a sentence instead of a traceback, as run.py does.

    Args:
        when_interrupted: what to add after Ctrl-C, such as how to resume.

    Raises:
        SystemExit: with 2 after an `ExperimentError`, with 130 after Ctrl-C.
    """
    try:
        yield
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("; ".join(filter(None, ["\ninterrupted", when_interrupted])), file=sys.stderr)
        sys.exit(130)


def reason(error: Exception) -> str:
    """The first line of another library's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def resume_hint() -> str:
    """How to resume an interrupted run.py."""
    without = " without force=true" if "force=true" in sys.argv else ""
    return f"run the same command again{without} to resume"


def require(is_valid: bool, name: str, value: object, remedy: str) -> None:
    if not is_valid:
        raise ExperimentError(f"{name}={value}: {remedy}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Each named value must be greater than 0 or None."""
    for name in names:
        value = getattr(config, name)
        is_valid = value is None or 0 < value < math.inf
        require(is_valid, f"{section}.{name}", value, "must be greater than 0, and finite")


def require_choice(name: str, value: str, *choices: str) -> None:
    require(value in choices, name, value, f"choose one of {', '.join(choices)}")
