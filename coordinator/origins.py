"""By which names the HTTP face may be called, and from which pages.

A page of anybody's can point a name of its own at this machine, and then a browser takes what the page asks for the
page's own (DNS rebinding). Only names that no stranger can point anywhere are let in. It knows headers. It must not
know what is served.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

Headers = Sequence[tuple[bytes, bytes]]
LOCAL = "localhost"


class Names:
    """`find_fault` says why a request is not let in."""

    def __init__(self, host: str, listed: Iterable[str], *, is_guarded: bool) -> None:
        """`host`: where we listen. `listed`: more names of ours. `is_guarded`: by a token, which a page of a
        stranger's has not, or by a certificate, which its name is not in."""
        self._listed = frozenset(_bare(name) for name in listed)
        self._host = _bare(host)
        self._is_guarded = is_guarded

    def find_fault(self, headers: Headers) -> str | None:
        host = _find(headers, b"host")
        if host is not None and not self._is_guarded and not self._is_safe(_name_of(host)):
            return (
                f"host {host!r:.120} is no name of this coordinator; call it by localhost, by an IP address, by its "
                "setting `host`, or list the name in `http_names`"
            )
        origin = _find(headers, b"origin")
        if origin is not None and not self._is_own_page(origin, host):
            return (
                f"a page of {origin!r:.120} asked, and {host or ''!r:.120} serves no other's; serve the page from "
                "the same origin, or list its name in `http_names`"
            )
        return None

    def _is_safe(self, name: str) -> bool:
        return name == LOCAL or name.endswith(f".{LOCAL}") or _is_address(name) or name in {self._host, *self._listed}

    def _is_own_page(self, origin: str, host: str | None) -> bool:
        try:
            authority = urlsplit(origin).netloc
        except ValueError:
            return False
        if not authority:  # "null": of a file, or of a frame that has none
            return False
        return (host is not None and _authority(authority) == _authority(host)) or _name_of(authority) in self._listed


def _find(headers: Headers, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in headers if name == wanted), None)


def _authority(text: str) -> str:
    """Without the port that a browser leaves out."""
    return text.lower().removesuffix(":80").removesuffix(":443")


def _name_of(authority: str) -> str:
    name, colon, port = authority.rpartition(":")
    return _bare(name if colon and port.isdigit() and (":" not in name or name.endswith("]")) else authority)


def _bare(name: str) -> str:
    return name.strip().lower().removesuffix(".").removeprefix("[").removesuffix("]")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
