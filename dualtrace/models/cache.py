"""Where dualtrace keeps what it can make again: fetched models and digests of weights.

It knows one folder of the user. It must not know what the files in it mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """`$DUALTRACE_CACHE`, or `$XDG_CACHE_HOME/dualtrace`, or `~/.cache/dualtrace`. It need not exist yet."""
    environment = os.environ if environment is None else environment
    if own := environment.get("DUALTRACE_CACHE"):
        return Path(own).expanduser()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "dualtrace"
    return Path.home() / ".cache" / "dualtrace"
