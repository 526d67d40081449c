"""What a failed file operation means to whoever called: no room, no right, no folder. It must not know what is kept."""

from __future__ import annotations

import errno
from pathlib import Path

from dualtrace.problems import Exhausted, FailedPrecondition, Problem, Reason, Unavailable

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain_os_error(error: OSError, path: Path | str) -> Problem:
    """What a failed file operation means to whoever called."""
    if error.errno in _NO_ROOM:
        return Exhausted(Reason.STORAGE_FULL, f"no room is left for {path}; free some and ask again")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        message = f"{path} cannot be written ({error.strerror}); give this user the right to, or name another folder"
        return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
    if isinstance(error, NotADirectoryError | FileExistsError):
        message = f"{path} is no folder ({error.strerror}); name another one"
        return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
    return Unavailable(Reason.STORAGE_UNUSABLE, f"{path} cannot be used: {error}")
