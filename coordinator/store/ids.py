"""Ids of what is kept: a kind and 26 characters that sort by the time of making. It must not know what they name."""

from __future__ import annotations

import re
import secrets
import threading
import time

from dualtrace.problems import InvalidArgument, Reason

KINDS = {"run": "run", "cmp": "comparison", "job": "job"}
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's 32: none is taken for another
_BODY = re.compile(f"[0-7][{_LETTERS}]{{25}}")
_RANDOM_BITS = 80

_lock = threading.Lock()
_last = 0


def new_run_id() -> str:
    return _make("run")


def new_comparison_id() -> str:
    return _make("cmp")


def new_job_id() -> str:
    return _make("job")


def check_id(text: str, kind: str, field: str) -> str:
    """An id of this kind, or a refusal."""
    prefix, dash, body = text.partition("-")
    if prefix != kind or not dash or _BODY.fullmatch(body) is None:
        message = f"{text!r:.80} is no id of a {KINDS[kind]}; one is {kind}- and 26 digits and small letters"
        raise InvalidArgument(Reason.MALFORMED, message, field=field, allowed=f"{kind}-{_BODY.pattern}")
    return text


def _make(kind: str) -> str:
    """48 bits of milliseconds, 80 of chance. Never below the last of this process, even when the clock steps back."""
    global _last
    with _lock:
        drawn = int(time.time() * 1000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        # Within one millisecond chance would shuffle them: count on from the last instead.
        same_or_earlier = drawn >> _RANDOM_BITS <= _last >> _RANDOM_BITS
        _last = _last + 1 if same_or_earlier else drawn
        number = _last
    return f"{kind}-" + "".join(_LETTERS[number >> shift & 31] for shift in range(125, -1, -5))
