"""What the headers of two sides say of one item, where no token may tell: counts, boundaries, prefixes, windows.

It knows item headers. It must not know tokens or figures.
"""

from __future__ import annotations

from dualtrace.questions.answers import ItemHeader, RollingWindows


def find_header_conflict(item: int, left: ItemHeader, right: ItemHeader) -> str | None:
    """Why the numbers of the two cannot mean the same, although no id that was told differs."""
    if left.token_count != right.token_count:
        return (
            f"item {item}: left read {left.token_count} tokens and right {right.token_count}: "
            "the sides tokenise it differently; ask both with the same token ids"
        )
    if left.prompt_tokens != right.prompt_tokens:
        return (
            f"item {item}: the prompt has {left.prompt_tokens} tokens on the left and {right.prompt_tokens} on the "
            "right: the sides part prompt and completion differently; ask both with the same token ids"
        )
    prefixes = left.prefix_token_id, right.prefix_token_id
    if None not in prefixes and prefixes[0] != prefixes[1]:
        return (
            f"item {item}: left put prefix token {prefixes[0]} before it and right {prefixes[1]}; "
            "ask with one prefix policy for both"
        )
    return _find_window_conflict(item, left.windows, right.windows)


def _find_window_conflict(item: int, left: RollingWindows | None, right: RollingWindows | None) -> str | None:
    """Windows change what a token was scored behind; a text that fits one window does not notice."""
    if left is None or right is None or max(left.count, right.count) < 2:
        return None
    if (left.max_tokens, left.stride) == (right.max_tokens, right.stride):
        return None
    told = [f"{one.count} windows of {one.max_tokens} by {one.stride}" for one in (left, right)]
    return (
        f"item {item}: left read it in {told[0]} tokens and right in {told[1]}: the same token is scored behind "
        "another context; ask both with the same max_tokens and stride"
    )
