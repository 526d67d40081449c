"""Page sizes and page tokens: a token names the last row of a page, and is taken only where it was given.

It knows keys as text. It must not know tables.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass

from dualtrace.problems import InvalidArgument, Reason

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
_MAC_BYTES = 16
_MAX_TOKEN_CHARS = 1000


@dataclass(frozen=True)
class PageRequest:
    """One page of a list under some filters. `secret` is the store's own, so that no other store's token passes."""

    secret: bytes
    list_name: str
    filters: tuple[str, ...]
    size: int
    after: str | None  # the last key of the page before; None: the first page

    def token_after(self, key: str) -> str:
        raw = key.encode() + _mac(self.secret, self.list_name, self.filters, key)
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def open_page(secret: bytes, list_name: str, filters: tuple[str, ...], page_size: int, page_token: str) -> PageRequest:
    """Check what was asked for."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        message = f"page_size {page_size} asked; a page holds 1 to {MAX_PAGE_SIZE} entries"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="page_size", allowed=f"1-{MAX_PAGE_SIZE}")
    after = _read_token(secret, list_name, filters, page_token) if page_token else None
    return PageRequest(secret, list_name, filters, page_size, after)


def _read_token(secret: bytes, list_name: str, filters: tuple[str, ...], token: str) -> str:
    if len(token) <= _MAX_TOKEN_CHARS:
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            key = raw[:-_MAC_BYTES].decode()
        except (binascii.Error, ValueError):
            key, raw = "", b""
        if hmac.compare_digest(raw[-_MAC_BYTES:], _mac(secret, list_name, filters, key)):
            return key
    message = f"page_token is none that this list gave for these filters; start again without one: {token!r:.60}"
    raise InvalidArgument(Reason.MALFORMED, message, field="page_token")


def _mac(secret: bytes, list_name: str, filters: tuple[str, ...], key: str) -> bytes:
    parts = (list_name, *filters, key)
    # Lengths first: without them ("a", "bc") and ("ab", "c") would be one.
    told = "".join(f"{len(part)}:{part}" for part in parts).encode(errors="surrogatepass")
    return hmac.digest(secret, told, "sha256")[:_MAC_BYTES]
