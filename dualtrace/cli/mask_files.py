"""Mask files: the JSON form of a mask, in which an array may also be named by the path of an NPY file.

`{"array": {"file": "m.npy"}}` is a convenience of the command line alone: here it becomes an array inside the mask
while that is small, or an artifact that is sent ahead and named by its digest. It knows files and JSON. It must not
know targets.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtrace.cli.inputs import read_text
from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason, rebuild

if TYPE_CHECKING:
    from dualtrace.masks.arrays import BoolArray
    from dualtrace.masks.spec import MaskSpec


@dataclass(frozen=True, eq=False)
class MaskFile:
    """A mask that has been read and is well formed."""

    path: str
    document: dict[str, Any]  # as it stands in the file
    spec: MaskSpec  # its NPY files named by their digests
    arrays: dict[str, bytes]  # digest -> the NPY file that the mask names by path

    @property
    def label(self) -> str:
        return Path(self.path).name if self.path != "-" else "stdin"

    @property
    def array_bytes(self) -> int:
        return sum(len(data) for data in self.arrays.values())

    def inline(self) -> MaskSpec:
        """The mask with its files' arrays inside."""
        return _parse(self.path, _replace_files(self.document, self.path, _as_base64)) if self.arrays else self.spec

    def usual(self) -> MaskSpec:
        """As a request holds it that holds nothing else: what its digest is taken of."""
        from dualtrace.masks.limits import DEFAULT_LIMITS

        return self.inline() if self.array_bytes <= DEFAULT_LIMITS.inline_bytes else self.spec

    def fetch(self, digest: str) -> BoolArray:
        """An array of this mask by its digest, for compiling it without any server."""
        from dualtrace.masks.arrays import read_npy

        if digest not in self.arrays:
            message = (
                f"the mask names the stored artifact {digest}, and nothing is stored here; give a TARGET that has it"
            )
            raise NotFound(Reason.NOT_FOUND, message, field="artifact_digest")
        return read_npy(self.arrays[digest]).content


def read_mask(path: str) -> MaskFile:
    """Read and check a mask file; a mistake is named with the file and the path of the field."""
    from dualtrace.artifacts import digest_of
    from dualtrace.masks.limits import DEFAULT_LIMITS
    from dualtrace.records import parse_json

    text = read_text(path, "--mask")
    if len(text) > DEFAULT_LIMITS.json_bytes:
        message = f"{path} has {len(text)} characters; a mask has at most {DEFAULT_LIMITS.json_bytes}"
        raise InvalidArgument(Reason.MASK_TOO_LARGE, message, field="--mask")
    document = _placed(path, lambda: parse_json(text, "the mask"))
    arrays: dict[str, bytes] = {}

    def keep(data: bytes) -> dict[str, str]:
        digest = digest_of(data)
        arrays[digest] = data
        return {"artifact_digest": digest}

    spec = _parse(path, _replace_files(document, path, keep))
    return MaskFile(path, document, spec, arrays)


def _parse(path: str, document: Any) -> MaskSpec:
    from dualtrace.masks.json_form import parse_json

    spec: MaskSpec = _placed(path, lambda: parse_json(document))
    return spec


def _placed(path: str, work: Callable[[], Any]) -> Any:
    """Problems get the file's name before the path of the field."""
    try:
        return work()
    except Problem as problem:
        detail = problem.detail
        field = f"{path}: {detail.field}" if detail.field else path
        raise rebuild(problem.code, replace(detail, field=field)) from None


def _replace_files(document: Any, path: str, how: Callable[[bytes], dict[str, str]]) -> Any:
    if not isinstance(document, dict) or "base" not in document:
        return document  # the parser will say what is wrong with it
    from dualtrace.masks.limits import MAX_DEPTH

    folder = Path(path).parent if path != "-" else Path()
    return {**document, "base": _replace(document["base"], "base", folder, path, how, MAX_DEPTH)}


def _replace(
    node: Any, where: str, folder: Path, path: str, how: Callable[[bytes], dict[str, str]], levels: int
) -> Any:
    """The same expression with NPY files replaced; what is no expression is left for the parser to refuse."""
    if not isinstance(node, dict) or levels == 0:
        return node

    def below(term: Any, step: str) -> Any:
        return _replace(term, f"{where}.{step}", folder, path, how, levels - 1)

    match node:
        case {"all": list(terms)} | {"any": list(terms)} if len(node) == 1:
            name = next(iter(node))
            return {name: [below(term, f"{name}[{index}]") for index, term in enumerate(terms)]}
        case {"not": term} if len(node) == 1:
            return {"not": below(term, "not")}
        case {"minus": {"from": source, "take": take, **rest}} if len(node) == 1 and not rest:
            return {"minus": {"from": below(source, "minus.from"), "take": below(take, "minus.take")}}
        case {"array": {"file": name, **rest}} if len(node) == 1 and not rest:
            return {"array": _placed(path, lambda: how(_read_array(folder, name, f"{where}.array.file")))}
        case _:
            return node


def _read_array(folder: Path, name: object, where: str) -> bytes:
    """The bytes of an NPY file, checked whole: a broken one is refused here, before anything is sent."""
    from dualtrace.masks.arrays import read_npy
    from dualtrace.masks.limits import DEFAULT_LIMITS

    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidArgument(Reason.MALFORMED, "file must be the path of an NPY file", field=where)
    file = folder / name  # meant from where the mask file stands
    try:
        with file.open("rb") as stream:
            data = stream.read(DEFAULT_LIMITS.array_bytes + 1)
    except OSError as error:
        message = f"cannot read {file}: {error.strerror or error}"
        raise InvalidArgument(Reason.NOT_FOUND, message, field=where) from None
    try:
        read_npy(data)
    except Problem as problem:
        raise problem.at(under=where) from None
    return data


def _as_base64(data: bytes) -> dict[str, str]:
    return {"npy": base64.b64encode(data).decode("ascii")}
