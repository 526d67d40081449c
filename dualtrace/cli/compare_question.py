"""The question of a comparison on a command line: four kinds, told apart by which options are given.

It knows how people write questions. It must not know sides, or how they are asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import (
    STDIN_OR_FILE,
    gather_inputs,
    one_input,
    parse_id_list,
    parse_ids,
    parse_prefix,
    read_items,
    text_input,
)
from dualtrace.cli.segments import SegmentsAsked, parse_read, read_segments
from dualtrace.problems import InvalidArgument, Reason

if TYPE_CHECKING:
    from dualtrace.questions.asked import (
        ForwardQuestion,
        LogprobItem,
        LogprobQuestion,
        MaskedForwardQuestion,
        NextTokenQuestion,
        RollingQuestion,
        ScoreQuestion,
    )
    from dualtrace.scorer import Scorer

Function = Callable[..., Any]

TOP_OF_TOKENS = 2  # of each token: enough to see the most likely one flip, and by which margin
TOP_OF_NEXT = 10
_TEXT = ("texts", "ids", "text_files")
_PAIR = ("prompt", "prompt_ids", "prompt_file", "completions", "completion_ids", "items_file")
_NEXT = ("next_prompts", "next_ids")
_SCORE = ("query", "query_ids", "items", "item_ids", "labels", "label_texts")
_FLAG = {"texts": "--text", "text_files": "--text-file", "items_file": "--items", "next_prompts": "--next",
         "completions": "--completion", "items": "--item", "label_texts": "--label"}  # fmt: skip


@dataclass(frozen=True)
class QuestionAsked:
    """The options as written."""

    texts: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    text_files: tuple[str, ...] = ()
    prompt: str | None = None
    prompt_ids: str | None = None
    prompt_file: str | None = None
    completions: tuple[str, ...] = ()
    completion_ids: tuple[str, ...] = ()
    items_file: str | None = None
    next_prompts: tuple[str, ...] = ()
    next_ids: tuple[str, ...] = ()
    query: str | None = None
    query_ids: str | None = None
    items: tuple[str, ...] = ()
    item_ids: tuple[str, ...] = ()
    labels: str | None = None
    label_texts: tuple[str, ...] = ()
    softmax: bool = False
    temperature: float | None = None
    item_first: bool = False
    boundary: str | None = None
    segment: tuple[str, ...] = ()
    segment_regex: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    max_tokens: int | None = None
    stride: int | None = None
    top_k: int | None = None
    prefix: str | None = None
    deterministic: bool = False

    @property
    def is_empty(self) -> bool:
        return not self._given(_TEXT + _PAIR + _NEXT + _SCORE)

    @property
    def files_from_stdin(self) -> int:
        return [*self.text_files, self.prompt_file, self.items_file].count("-")

    def _given(self, names: tuple[str, ...]) -> list[str]:
        empty: tuple[object, ...] = (None, ())
        return [name for name in names if getattr(self, name) not in empty]

    def read(self) -> ForwardQuestion:
        """The question, without what only a scorer can tell (label texts, regular expressions)."""
        kinds = {"text": _TEXT, "completion": _PAIR, "next": _NEXT, "score": _SCORE}
        found = {kind: given for kind, names in kinds.items() if (given := self._given(names))}
        if len(found) != 1:
            flags = " and ".join(_flag(given[0]) for given in found.values())
            message = f"{flags} ask different questions; ask one at a time"
            raise InvalidArgument(Reason.CONFLICT, message, field=flags)
        self._refuse_foreign(kind := next(iter(found)))
        match kind:
            case "text":
                return self._read_masked() if self._is_masked else self._read_rolling()
            case "completion":
                return self._read_pairs()
            case "next":
                return self._read_next()
            case _:
                return self._read_score()

    @property
    def _is_masked(self) -> bool:
        return bool(self.segment or self.segment_regex or self.reads)

    def _refuse_foreign(self, kind: str) -> None:
        """Options of another kind of question would be silently without effect."""
        owners = {"softmax": "score", "temperature": "score", "item_first": "score", "boundary": "completion",
                  "segment": "text", "segment_regex": "text", "reads": "text", "max_tokens": "text",
                  "stride": "text"}  # fmt: skip
        for name, owner in owners.items():
            if owner != kind and getattr(self, name) not in (None, (), False):
                message = f"{_flag(name)} belongs to another kind of question; leave it out"
                raise InvalidArgument(Reason.CONFLICT, message, field=_flag(name))
        if kind == "score" and (self.top_k is not None or self.prefix is not None):
            field = "--top-k" if self.top_k is not None else "--prefix"
            raise InvalidArgument(Reason.CONFLICT, f"a score question has no {field}; leave it out", field=field)

    def _read_rolling(self) -> RollingQuestion:
        from dualtrace.questions.asked import RollingQuestion

        inputs = gather_inputs(self.texts, self.ids, self.text_files, names=("--text", "--ids", "--text-file"))
        top_k = TOP_OF_TOKENS if self.top_k is None else self.top_k
        prefix = parse_prefix(self.prefix)
        return RollingQuestion(
            inputs, prefix, self.max_tokens, self.stride, top_k, deterministic=self.deterministic
        )  # fmt: skip

    def _read_masked(self) -> MaskedForwardQuestion:
        from dualtrace.questions.asked import MaskedForwardQuestion

        inputs = gather_inputs(self.texts, self.ids, self.text_files, names=("--text", "--ids", "--text-file"))
        if len(inputs) != 1 or self.max_tokens is not None or self.stride is not None:
            message = "segments and reads are of one text in one window; give one text, and no --max-tokens or --stride"
            raise InvalidArgument(Reason.CONFLICT, message, field="--segment")
        top_k = TOP_OF_TOKENS if self.top_k is None else self.top_k
        spans = tuple(parse_read(one) for one in self.reads)
        return MaskedForwardQuestion(
            inputs[0], (), (), spans, parse_prefix(self.prefix), top_k, deterministic=self.deterministic
        )  # fmt: skip

    def _read_pairs(self) -> LogprobQuestion:
        from dualtrace.questions.asked import LogprobQuestion
        from dualtrace.tokens import Boundary

        cut = None if self.boundary is None else Boundary(self.boundary.upper())
        top_k = TOP_OF_TOKENS if self.top_k is None else self.top_k
        return LogprobQuestion(
            self._pairs(), cut, parse_prefix(self.prefix), top_k, deterministic=self.deterministic
        )  # fmt: skip

    def _pairs(self) -> tuple[LogprobItem, ...]:
        from dualtrace.questions.asked import LogprobItem

        if self.items_file is not None:
            if len(self._given(_PAIR)) > 1:
                message = "--items holds prompts and completions itself; leave the other options out"
                raise InvalidArgument(Reason.CONFLICT, message, field="--items")
            return read_items(self.items_file)
        if not self.completions and not self.completion_ids:
            message = "nothing to score; give --completion, --completion-ids or --items"
            raise InvalidArgument(Reason.MISSING, message, field="--completion")
        names = ("--prompt", "--prompt-ids", "--prompt-file")
        prompt = one_input(self.prompt, self.prompt_ids, self.prompt_file, names=names)
        scored = [text_input(text, "--completion") for text in self.completions]
        scored += [parse_ids(ids, "--completion-ids") for ids in self.completion_ids]
        return tuple(LogprobItem(prompt, one) for one in scored)

    def _read_next(self) -> NextTokenQuestion:
        from dualtrace.questions.asked import NextTokenQuestion

        prompts = gather_inputs(self.next_prompts, self.next_ids, (), names=("--next", "--next-ids", ""))
        top_k = TOP_OF_NEXT if self.top_k is None else self.top_k
        return NextTokenQuestion(prompts, top_k, (), parse_prefix(self.prefix), deterministic=self.deterministic)

    def _read_score(self) -> ScoreQuestion:
        from dualtrace.questions.asked import ScoreQuestion

        if (self.labels is None) == (not self.label_texts):
            message = "give the labels once, as --labels IDS or as --label TEXT"
            raise InvalidArgument(Reason.CONFLICT if self.label_texts else Reason.MISSING, message, field="--labels")
        query = one_input(self.query, self.query_ids, None, names=("--query", "--query-ids", "--query-ids"))
        inputs = [text_input(text, "--item") for text in self.items]
        inputs += [parse_ids(ids, "--item-ids") for ids in self.item_ids]
        labels = None if self.labels is None else parse_id_list(self.labels, "--labels")
        return ScoreQuestion(
            query, tuple(inputs), labels, None, self.softmax, self.temperature, self.item_first,
            deterministic=self.deterministic,
        )  # fmt: skip

    @property
    def needs_tokenizer(self) -> str:
        """The option that only a tokenizer can read; "" where there is none."""
        return "--label" if self.label_texts else "--segment-regex" if self.segment_regex else ""

    def read_whole(self) -> ForwardQuestion:
        """The question, where nothing in it needs a tokenizer."""
        from dualtrace.masks.spec import SegmentName
        from dualtrace.questions.asked import MaskedForwardQuestion

        question = self.read()
        if not isinstance(question, MaskedForwardQuestion):
            return question
        ranges = read_segments(self.segment, ()).ranges
        return replace(question, segments=tuple((SegmentName(name), span) for name, span in ranges))

    async def complete(self, question: ForwardQuestion, scorer: Scorer, deadline: float | None) -> ForwardQuestion:
        """What needs a tokenizer, with the help of one side: label texts and regular expressions."""
        from dualtrace.cli.score import resolve_labels
        from dualtrace.questions.asked import MaskedForwardQuestion, ScoreQuestion

        if isinstance(question, ScoreQuestion) and self.label_texts:
            return replace(question, labels=await resolve_labels(scorer, self.label_texts, deadline, "--label"))
        if isinstance(question, MaskedForwardQuestion):
            asked: SegmentsAsked = read_segments(self.segment, self.segment_regex)
            return replace(question, segments=await asked.resolve(question.input, scorer, deadline))
        return question


def _flag(name: str) -> str:
    return _FLAG.get(name, "--read" if name == "reads" else f"--{name.replace('_', '-')}")


_OPTIONS: tuple[Callable[[Function], Function], ...] = (
    click.option("--text", "texts", multiple=True, help="Score every token of this text; repeat it for several."),
    click.option("--text-file", "text_files", multiple=True, type=STDIN_OR_FILE, help="The same from a file."),
    click.option("--ids", multiple=True, metavar="1,2,3", help="The same as token ids."),
    click.option("--prompt", help="Score --completion after this prompt."),
    click.option("--prompt-ids", metavar="1,2,3", help="The prompt as token ids."),
    click.option("--prompt-file", type=STDIN_OR_FILE, help="The prompt from a file."),
    click.option("--completion", "completions", multiple=True, help="What is scored; repeat it for several."),
    click.option("--completion-ids", multiple=True, metavar="4,5", help="A completion as token ids."),
    click.option("--items", "items_file", type=STDIN_OR_FILE, metavar="FILE.jsonl",
                 help="Prompts and completions, one JSON object a line, as for `dualtrace logprob`."),
    click.option("--next", "next_prompts", multiple=True, metavar="PROMPT",
                 help="Compare the distributions of the next token after this prompt; repeat it for several."),
    click.option("--next-ids", multiple=True, metavar="1,2,3", help="Such a prompt as token ids."),
    click.option("--query", help="Compare label scores after query and --item."),
    click.option("--query-ids", metavar="1,2,3", help="The query as token ids."),
    click.option("--item", "items", multiple=True, help="An item; repeat it for several."),
    click.option("--item-ids", multiple=True, metavar="4,5", help="An item as token ids."),
    click.option("--labels", metavar="12,34", help="Label token ids."),
    click.option("--label", "label_texts", multiple=True, metavar="TEXT",
                 help="A label as text, which must be one token on the left side; repeat it."),
    click.option("--softmax", is_flag=True, help="Softmax over the labels only."),
    click.option("--temperature", type=float, help="Divides the logprobs before --softmax."),
    click.option("--item-first", is_flag=True, help="The item stands before the query."),
    click.option("--boundary", type=click.Choice(["joint", "separate", "strict"]),
                 help="How prompt and completion become tokens; default: joint."),
    click.option("--segment", multiple=True, metavar="NAME=START:END",
                 help="Name tokens of the text, for masks that say query, item, prompt or completion."),
    click.option("--segment-regex", multiple=True, metavar="NAME=REGEX",
                 help="The same where a regular expression matches the text once."),
    click.option("--read", "reads", multiple=True, metavar="START:END",
                 help="Score these tokens of the text only, or a segment's name; repeat it."),
    click.option("--max-tokens", type=int, help="Inputs of one window of a long text."),
    click.option("--stride", type=int, help="Tokens from one window to the next."),
    click.option("--top-k", type=int, help=f"Most likely tokens to read; default: {TOP_OF_TOKENS} at each token, "
                 f"{TOP_OF_NEXT} with --next."),
    click.option("--prefix", metavar="none|bos|eos|ID", help="Token in front of the sequence."),
    click.option("--deterministic", is_flag=True, help="Ask for bit-equal numbers whatever else a server runs."),
)  # fmt: skip


def question_options(function: Function) -> Function:
    """The options of all kinds of question; the function gets one `asked`."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        names = QuestionAsked.__dataclass_fields__
        asked = QuestionAsked(**{name: given.pop(name) for name in names if name in given})
        return function(*args, asked=asked, **given)

    wrapped: Function = command
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
