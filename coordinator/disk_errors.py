"""What a failed file operation means to whoever called: no room, no right, no folder. It must not know what is kept.

A caller is not told where things are kept, or what the system said: that is for the log.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from dualtrace.problems import Exhausted, FailedPrecondition, Problem, Reason, Unavailable

log = logging.getLogger(__name__)

DATA_FOLDER = "the data folder"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def tell_os_error(error: OSError, path: Path | str) -> Problem:
    """For a caller; the log has the path."""
    log.error("%s: %s", path, error)
    return explain_os_error(error, DATA_FOLDER)


def explain_os_error(error: OSError, path: Path | str) -> Problem:
    """For whoever may know the path: the one who starts the coordinator."""
    why = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _NO_ROOM:
        return Exhausted(Reason.STORAGE_FULL, f"no room is left for {path}; free some and ask again")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        message = f"{path} cannot be written ({why}); give this user the right to, or name another folder"
        return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
    if isinstance(error, NotADirectoryError | FileExistsError):
        message = f"{path} is no folder ({why}); name another one"
        return FailedPrecondition(Reason.STORAGE_UNUSABLE, message)
    return Unavailable(Reason.STORAGE_UNUSABLE, f"{path} cannot be used ({why}); the coordinator's log says more")
