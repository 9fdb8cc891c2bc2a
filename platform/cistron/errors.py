"""Every error that Cistron raises on purpose.

Each class also inherits the standard exception that it refines, so callers may catch either. Each is built from one
message string, which keeps it picklable: Ray moves exceptions between processes.

    CistronError
    ├── ConfigError            (ValueError)         a setting is misspelt, out of range or contradicts another
    ├── UnknownNameError       (LookupError)        no model, format or layer of that name
    ├── InputError             (ValueError)         a sequence, file or request that cannot be used
    │   └── SequenceError                           a letter outside the alphabet, an empty or over-long sequence
    ├── CheckpointError        (ValueError)         a checkpoint whose content is not what its config says
    │   └── CheckpointNotFoundError (FileNotFoundError)
    └── CapabilityError        (RuntimeError)       this hardware or installation cannot do what was asked
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CistronError(Exception):
    """The root of all errors raised on purpose."""


class ConfigError(CistronError, ValueError):
    """A setting is misspelt, out of range, or contradicts another one."""


class UnknownNameError(CistronError, LookupError):
    """No model, checkpoint format or layer has the given name."""


class InputError(CistronError, ValueError):
    """A sequence, file or request that cannot be used."""


class SequenceError(InputError):
    """A sequence is empty, too long, or holds a letter outside the alphabet."""


class CheckpointError(CistronError, ValueError):
    """A checkpoint whose content is not what its configuration or manifest says."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or one of its files, does not exist."""


class CapabilityError(CistronError, RuntimeError):
    """This hardware or installation cannot do what was asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest known name, or an empty string when none is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def own_error(error: BaseException) -> BaseException:
    """Return the error of ours that Ray's wrappers hold, or `error` itself when there is none.

    What is inside keeps its first line: our messages are one line there, and Ray adds its advice on retries.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, CistronError) and type(inner).__module__ == __name__:
            return inner if inner is error else type(inner)(str(inner).partition("\n")[0])
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
