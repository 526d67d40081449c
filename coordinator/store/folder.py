"""The folder where a coordinator keeps everything: where it is by default, and that one coordinator at a time has it.

It knows files and locks. It must not know what is in them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from coordinator.disk_errors import explain_os_error
from dualtrace.problems import Reason, Unavailable

LOCK_FILE = "lock"


def default_data_folder(environment: Mapping[str, str] | None = None) -> Path:
    """`$DUALTRACE_DATA`, or `$XDG_DATA_HOME/dualtrace`, or `~/.local/share/dualtrace`. It need not exist yet."""
    environment = os.environ if environment is None else environment
    if own := environment.get("DUALTRACE_DATA"):
        return Path(own).expanduser()
    if shared := environment.get("XDG_DATA_HOME"):
        return Path(shared).expanduser() / "dualtrace"
    return Path.home() / ".local" / "share" / "dualtrace"


class FolderLock:
    """Held for the life of the process: the system lets it go when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise explain_os_error(error, folder) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._file, 40, 0).decode(errors="replace").strip()
            os.close(self._file)
            message = f"another coordinator (process {owner or 'unknown'}) uses {folder}; end it or name another folder"
            raise Unavailable(Reason.STORAGE_BUSY, message) from None
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise explain_os_error(error, folder) from error

    def release(self) -> None:
        """Harmless when done before."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
