"""Tokenize: text to tokens, ids to pieces. No rows, no forward. Pure."""

from __future__ import annotations

from dualtrace.problems import Problem
from dualtrace.questions.answers import TokenizeAnswer
from dualtrace.questions.asked import Input, TokenizeQuestion
from dualtrace.questions.compose import Context, check_chars, check_count, check_tokens, placed
from dualtrace.tokens import Tokens


def answer_tokenize(question: TokenizeQuestion, context: Context) -> TokenizeAnswer:
    check_count(len(question.inputs), context.limits, "inputs", least=0)
    check_chars(question.inputs, context.limits)
    context.need_tokenizer("inputs")
    results = tuple(_one(given, index, question, context) for index, given in enumerate(question.inputs))
    check_tokens(sum(len(result) for result in results if isinstance(result, Tokens)), context.limits)
    return TokenizeAnswer(results)


def _one(given: Input, index: int, question: TokenizeQuestion, context: Context) -> Tokens | Problem:
    try:
        return context.tokens(given, f"inputs[{index}]", special_tokens=question.special_tokens)
    except Problem as problem:
        return placed(problem, index)
