"""What the asking commands share: the target and its options, and texts, ids and items from flags, files and stdin.

It knows how people write inputs. It must not know what is asked with them. Nothing heavy is imported before a command
runs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import click

from dualtrace.cli.exits import DEBUG
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.questions.asked import Input, LogprobItem
    from dualtrace.targets import TargetOptions
    from dualtrace.tokens import Prefix

Function = Callable[..., Any]

MAX_FILE_BYTES = 64 << 20
_IDS = re.compile(r"[+-]?[0-9]{1,18}")
FILE = click.Path(dir_okay=False, exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
STDIN_OR_FILE = click.Path(dir_okay=False, exists=True, allow_dash=True)


@dataclass(frozen=True)
class Ask:
    """Whom to ask and how: what every asking command is given first."""

    target: str  # empty where a command needs none
    threads: int = 1
    dtype: str = ""
    device: str = ""
    adapters: tuple[str, ...] = ()  # NAME=DIR each
    tokenizer: Path | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_seconds: float | None = None
    as_json: bool = False

    def target_options(self) -> TargetOptions:
        from dualtrace.targets import TargetOptions

        return TargetOptions(
            threads=self.threads,
            dtype=self.dtype,
            device=self.device,
            adapters=parse_adapters(self.adapters),
            tokenizer=self.tokenizer,
            token=None if self.token_file is None else read_token(self.token_file),
            ca_file=self.ca_file,
            certificate_file=self.certificate,
            key_file=self.key,
        )


def command_options(function: Function) -> Function:
    """--json and --debug, which every command has."""

    def note_debug(context: click.Context, _option: click.Parameter, value: bool) -> None:
        context.meta[DEBUG] = context.meta.get(DEBUG, False) or value

    function = click.option(
        "--debug", is_flag=True, expose_value=False, callback=note_debug, help="Show the traceback of a failure."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Write JSON to standard output instead of tables.")(
        function
    )


@overload
def ask_options(function: Function) -> Function: ...
@overload
def ask_options(*, target_required: bool) -> Callable[[Function], Function]: ...
def ask_options(
    function: Function | None = None, *, target_required: bool = True
) -> Function | Callable[[Function], Function]:
    """TARGET and everything needed to reach it; the function's first argument becomes one `Ask`."""
    if function is None:
        return lambda function: _add_ask_options(function, target_required)
    return _add_ask_options(function, target_required)


def _add_ask_options(function: Function, target_required: bool) -> Function:
    @functools.wraps(function)
    def command(**given: Any) -> Any:
        names = Ask.__dataclass_fields__
        ask = Ask(**{name: given.pop(name) for name in names if name in given})
        return function(ask, **given)

    options: tuple[Callable[[Function], Function], ...] = (
        click.argument("target", required=target_required, default=None if target_required else ""),
        click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
                     help="Give up after so long; without it, wait as long as it takes."),
        click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Threads of an engine in this process."),
        click.option("--dtype", default="", help="Number type of an engine in this process; default: its own."),
        click.option("--device", default="", help="Where an engine in this process computes; default: cpu."),
        click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR",
                     help="PEFT adapter of an engine in this process, for views; repeat it for several."),
        click.option("--tokenizer", type=FOLDER, help="Folder with the tokenizer.json of a target that has none."),
        click.option("--token-file", type=FILE, help="File with the bearer token for grpc:// and grpcs://."),
        click.option("--ca-file", type=FILE, help="PEM file of the authority to trust, for grpcs://."),
        click.option("--certificate", type=FILE, help="PEM file of our own certificate, for mutual TLS."),
        click.option("--key", type=FILE, help="PEM file of that certificate's private key."),
    )  # fmt: skip
    wrapped: Function = command_options(command)
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def scoring_options(function: Function) -> Function:
    """Options of questions that run the model on a sequence with a prefix."""
    options: tuple[Callable[[Function], Function], ...] = (
        click.option("--prefix", default=None, metavar="none|bos|eos|ID",
                     help="Token in front of the sequence; default: what the tokenizer adds for text, none for ids."),
        click.option("--deterministic", is_flag=True, help="Ask for bit-equal numbers whatever else the server runs."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def parse_ids(text: str, option: str) -> Input:
    """`1,2,3` (or with spaces) as ids; an empty text is no ids, which is not the same as no input."""
    from dualtrace.engine import int_array
    from dualtrace.questions.asked import Input

    return Input(ids=int_array(parse_id_list(text, option)))


def parse_id_list(text: str, option: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    for part in parts:
        if not _IDS.fullmatch(part) or not -(2**31) <= int(part) < 2**31:
            message = f"{part!r:.40} is not a token id; write numbers joined by commas, like 1,2,3"
            raise InvalidArgument(Reason.MALFORMED, message, field=option)
    return tuple(int(part) for part in parts)


def text_input(text: str, option: str) -> Input:
    from dualtrace.questions.asked import Input
    from dualtrace.tokens import check_text

    check_text(text, option)
    return Input(text=text)


def gather_inputs(
    texts: Sequence[str], ids: Sequence[str], files: Sequence[str], *, names: tuple[str, str, str]
) -> tuple[Input, ...]:
    """All inputs of one kind of option: texts first, then ids, then files."""
    if list(files).count("-") > 1:
        raise InvalidArgument(Reason.DUPLICATE, "standard input can be read once", field=names[2])
    return (
        *(text_input(text, names[0]) for text in texts),
        *(parse_ids(one, names[1]) for one in ids),
        *(text_input(read_text(file, names[2]), names[2]) for file in files),
    )


def one_input(
    text: str | None, ids: str | None, file: str | None, *, names: tuple[str, str, str], default: Input | None = None
) -> Input:
    """Exactly one of three options, or the default."""
    given = [value for value in (text, ids, file) if value is not None]
    if len(given) > 1:
        raise InvalidArgument(Reason.CONFLICT, f"give one of {', '.join(names)}, not {len(given)}", field=names[0])
    if text is not None:
        return text_input(text, names[0])
    if ids is not None:
        return parse_ids(ids, names[1])
    if file is not None:
        return text_input(read_text(file, names[2]), names[2])
    if default is None:
        raise InvalidArgument(Reason.MISSING, f"give one of {', '.join(names)}", field=names[0])
    return default


def read_text(file: str, option: str) -> str:
    """A whole UTF-8 file, or standard input for `-`, exactly as it is: a last newline is part of the text."""
    if file == "-":
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    else:
        with Path(file).open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        message = f"{file} holds more than {MAX_FILE_BYTES >> 20} MiB; split it"
        raise InvalidArgument(Reason.TOO_MANY, message, field=option)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        message = f"{file} is not UTF-8: byte {error.start} is {content[error.start]:#04x}; convert it first"
        raise InvalidArgument(Reason.INVALID_TEXT, message, field=option) from None


def read_items(file: str) -> tuple[LogprobItem, ...]:
    """One JSON object a line: {"prompt", "completion"} or {"prompt_ids", "completion_ids"}."""
    lines = read_text(file, "--items").split("\n")
    found = tuple(_read_item(line, number) for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise InvalidArgument(Reason.EMPTY, f"{file} holds no item; write one JSON object a line", field="--items")
    return found


def _read_item(line: str, number: int) -> LogprobItem:
    from dualtrace.engine import int_array
    from dualtrace.questions.asked import Input, LogprobItem

    where = f"--items line {number}"
    wanted = '{"prompt": TEXT, "completion": TEXT} or {"prompt_ids": [...], "completion_ids": [...]}'
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(Reason.MALFORMED, f"it is not JSON ({error}); write {wanted}", field=where) from None
    match item:
        case {"prompt": str(prompt), "completion": str(completion), **rest} if not rest:
            return LogprobItem(text_input(prompt, where), text_input(completion, where))
        case {"prompt_ids": list(prompt_ids), "completion_ids": list(completion_ids), **rest} if not rest:
            if all(type(one) is int and -(2**31) <= one < 2**31 for one in prompt_ids + completion_ids):
                return LogprobItem(Input(ids=int_array(prompt_ids)), Input(ids=int_array(completion_ids)))
    raise InvalidArgument(Reason.MALFORMED, f"it is not an item; write {wanted}", field=where)


def parse_prefix(text: str | None) -> Prefix:
    from dualtrace.tokens import Prefix, PrefixKind

    if text is None:
        return Prefix()
    if text.upper() in PrefixKind.__members__:
        return Prefix(kind=PrefixKind[text.upper()])
    if not _IDS.fullmatch(text):
        message = f"prefix {text!r:.40} asked; write none, bos, eos or a token id"
        raise InvalidArgument(Reason.MALFORMED, message, field="--prefix", allowed="none, bos, eos, a token id")
    return Prefix(token_id=int(text))


def parse_adapters(given: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """`NAME=DIR` each. A colon would make a name that no --view can say."""
    found: list[tuple[str, Path]] = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or ":" in name:
            message = f"adapter {text!r:.80} is not understood; write NAME=DIR, the name without a colon"
            raise InvalidArgument(Reason.MALFORMED, message, field="--adapter")
        if name in dict(found):
            message = f"two adapters are named {name!r:.80}; give each its own name"
            raise InvalidArgument(Reason.DUPLICATE, message, field="--adapter")
        found.append((name, Path(folder)))
    return tuple(found)


def read_token(file: Path) -> str:
    """The bearer token: the file's only line."""
    lines = [line.strip() for line in read_text(os.fspath(file), "--token-file").splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].isascii() or not lines[0].isprintable():
        message = f"{file} must hold one line of printable ASCII: the token to send"
        raise InvalidArgument(Reason.MALFORMED, message, field="--token-file")
    return lines[0]
