"""The page at ``/rlkv``: one HTML file that includes its style and script."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from fastapi import Response

_FILE = Path(__file__).with_name("page.html")


def page(needs_key: bool, is_gated: bool) -> Response:
    """The page, with headers that allow its own script and style and nothing else.

    Args:
        needs_key: the JSON routes need an API key, so the page asks for it first.
        is_gated: the server is in gated mode, so the page shows gates and no split.
    """
    html, policy = _page(needs_key, is_gated)
    return Response(
        html,
        media_type="text/html; charset=utf-8",
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


@functools.cache
def _page(needs_key: bool, is_gated: bool) -> tuple[bytes, str]:
    html = _FILE.read_text(encoding="utf-8")
    if needs_key:
        html = html.replace('data-key="open"', 'data-key="needed"')
    if is_gated:
        html = html.replace('data-mode="split"', 'data-mode="gated"')
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def _hashes(html: str, tag: str) -> str:
    """CSP sources of the inline elements of that tag."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
