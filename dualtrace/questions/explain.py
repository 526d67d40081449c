"""ExplainMask: what a mask allows over one sequence, and why; no rows, no forward. Pure."""

from __future__ import annotations

from dualtrace.masks import picture
from dualtrace.masks.arrays import npy_bytes
from dualtrace.masks.naive import may_see
from dualtrace.masks.picture import Cells
from dualtrace.masks.plan import MaskPlan, compile_mask
from dualtrace.masks.resolve import MaskContext, resolve
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.questions.answers import MaskAnswer, MaskExplanation
from dualtrace.questions.asked import ExplainMaskQuestion, MaskForm, MaskWhy
from dualtrace.questions.compose import Context, check_chars, check_one_window, check_tokens, with_prefix
from dualtrace.questions.masked_forward import check_segments
from dualtrace.questions.sight import describe_mask

MAX_WHY = 256
MAX_CELLS = 1536  # tokens of a picture or an NPY, with the opt-in: an answer is one message of at most 4 MiB
MAX_RUNS = 131_072  # runs of an answer: they must fit one message


def answer_explain(question: ExplainMaskQuestion, context: Context) -> MaskExplanation:
    check_chars([question.input], context.limits)
    if len(question.why) > MAX_WHY:
        message = f"{len(question.why)} entries of why asked; at most {MAX_WHY}"
        raise InvalidArgument(Reason.TOO_MANY, message, field="why", allowed=f"0-{MAX_WHY}")
    prefix_id = context.prefix_id(question.prefix, question.input, "input")
    tokens = context.tokens(question.input, "input")
    ids = with_prefix(prefix_id, tokens.ids)
    check_tokens(int(ids.size), context.limits)
    check_one_window(int(ids.size), context.limits, "input")
    mask_context = MaskContext(
        length=int(ids.size),
        geometry=context.geometry,
        prefix=0 if prefix_id is None else 1,
        starts=tokens.starts,
        ends=tokens.ends,
        characters=None if question.input.text is None else len(question.input.text),
        segments=check_segments(question.segments, int(tokens.ids.size)),
    )
    try:
        plan = compile_mask(resolve(question.mask, mask_context, context.fetch_array), allow_empty_rows=True)
    except Problem as problem:
        raise problem.at(under="mask") from None
    _check_place(question, plan)
    cells = _cells(question, plan) if {MaskForm.NPY, MaskForm.PNG} & set(question.forms) else None
    return MaskExplanation(
        metadata=describe_mask(question.mask, plan),
        tokens=tokens,
        leaking_rows=plan.leaks(),
        empty_rows=plan.rows_emptied(),
        rows=_runs(question, plan) if MaskForm.RUNS in question.forms else None,
        npy=None if cells is None or MaskForm.NPY not in question.forms else npy_bytes(cells == picture.SEEN),
        png=None
        if cells is None or MaskForm.PNG not in question.forms
        else picture.png_bytes(cells, allow_large=question.allow_large),
        answers=tuple(_why(plan, asked, index) for index, asked in enumerate(question.why)),
    )


def _check_place(question: ExplainMaskQuestion, plan: MaskPlan) -> None:
    if (question.layer is None) != (question.head is None):
        missing = "head" if question.head is None else "layer"
        message = "name a layer and a head, or neither for the union over all"
        raise InvalidArgument(Reason.MISSING, message, field=missing)
    for name, value, count in (("layer", question.layer, plan.layers), ("head", question.head, plan.heads)):
        if value is not None and not 0 <= value < count:
            message = f"{name} {value} asked; the model has {count} (0-{count - 1})"
            raise InvalidArgument(Reason.OUT_OF_RANGE, message, field=name, allowed=f"0-{count - 1}")


def _cells(question: ExplainMaskQuestion, plan: MaskPlan) -> Cells:
    picture.require_drawable(plan.length, allow_large=question.allow_large)
    if plan.length > MAX_CELLS:
        message = f"a square of {plan.length} tokens was asked; at most {MAX_CELLS} fit an answer; ask for RUNS"
        raise InvalidArgument(Reason.MASK_TOO_LARGE, message, field="forms", allowed=f"up to {MAX_CELLS} tokens")
    if question.layer is None or question.head is None:
        return picture.union_cells(plan)
    return picture.cells(plan, question.layer, question.head)


def _runs(question: ExplainMaskQuestion, plan: MaskPlan) -> tuple[tuple[tuple[int, int], ...], ...]:
    if question.layer is None or question.head is None:
        message = "run-length rows are those of one layer and head; name both"
        raise InvalidArgument(Reason.MISSING, message, field="layer")
    rows = tuple(plan.row_runs(question.layer, question.head, row) for row in range(plan.length))
    count = sum(len(row) for row in rows)
    if count > MAX_RUNS:
        message = f"the mask has {count} runs; at most {MAX_RUNS} fit an answer; ask for NPY"
        raise InvalidArgument(Reason.MASK_TOO_LARGE, message, field="forms", allowed=f"0-{MAX_RUNS}")
    return rows


def _why(plan: MaskPlan, asked: MaskWhy, index: int) -> MaskAnswer:
    try:
        decision = may_see(plan.resolved, asked.layer, asked.head, asked.query, asked.key)
    except Problem as problem:
        raise problem.at(under=f"why[{index}]") from None
    return MaskAnswer(decision.allowed, decision.rule)
