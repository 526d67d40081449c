"""Where a model lies that was named by its folder or by its id on the Hugging Face hub.

It knows the layout of that hub's cache on this disk. Nothing is fetched, nothing is run: what is not here is refused
with the command that fetches it. It must not know what the files of a model mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dualtrace.problems import InvalidArgument, NotFound, Reason

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")  # a branch, a tag or a commit: never a way upwards
MAIN = "main"


@dataclass(frozen=True)
class FoundModel:
    """Where a model lies and how it is called."""

    directory: Path
    model_id: str
    revision: str  # of a hub's model the commit, else what was given


def find_model(name: Path | str, revision: str = "", environment: Mapping[str, str] | None = None) -> FoundModel:
    """The folder that was named, or the snapshot that the hub's cache holds under that id."""
    folder = Path(name)
    if os.path.isdir(folder):
        return FoundModel(folder, folder.resolve().name, revision)
    hub_id = folder.as_posix()
    if not HUB_ID.fullmatch(hub_id) or ".." in hub_id:
        message = f"{name} is not a directory; give the folder that holds config.json, or a model's id on the hub"
        raise NotFound(Reason.NOT_FOUND, message, field="model")
    if revision and not REVISION.fullmatch(revision):
        message = f"revision {revision!r} asked; it is the name of a branch or tag, or a commit"
        raise InvalidArgument(Reason.MALFORMED, message, field="revision")
    kept = hub_cache_directory(environment) / ("models--" + hub_id.replace("/", "--"))
    commit = _read_commit(kept, revision or MAIN)
    snapshot = kept / "snapshots" / commit
    if not kept.is_dir() or not snapshot.is_dir():
        _refuse(hub_id, revision, "is neither a directory nor in the hub cache of this machine")
    if not (snapshot / "config.json").is_file():
        _refuse(hub_id, revision, f"is in the hub cache of this machine without its config.json ({snapshot})")
    return FoundModel(snapshot, hub_id, commit)


def hub_cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """`$HF_HUB_CACHE`, or `$HF_HOME/hub`, or `$XDG_CACHE_HOME/huggingface/hub`, or `~/.cache/huggingface/hub`."""
    environment = os.environ if environment is None else environment
    if own := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(own).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    shared = environment.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "huggingface" / "hub"


def _read_commit(kept: Path, revision: str) -> str:
    """What a branch or tag stands for; a commit stands for itself."""
    try:
        commit = (kept / "refs" / revision).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return revision
    return commit if REVISION.fullmatch(commit) else revision


def _refuse(hub_id: str, revision: str, complaint: str) -> NoReturn:
    asked = f" at revision {revision}" if revision else ""
    command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    message = (
        f"{hub_id}{asked} {complaint}; nothing is fetched from the network here. Fetch it first with `{command}`, or "
        "give the folder that holds config.json"
    )
    raise NotFound(Reason.NOT_FOUND, message, field="model")
