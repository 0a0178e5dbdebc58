"""The page is one file that runs under its own strict policy."""

from __future__ import annotations

import re

import pytest

from rlkv_vllm.serving.page import _FILE, page

HTML = _FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("needs_key", "is_gated"), [(True, False), (False, True)])
def test_the_policy_allows_the_pages_own_script_and_style_only(
    needs_key: bool, is_gated: bool
) -> None:
    response = page(needs_key, is_gated)
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[name])
    assert "unsafe" not in response.headers["content-security-policy"]


def test_nothing_inline_that_the_policy_would_block() -> None:
    body = re.sub(r"<(script|style)>.*?</\1>", "", HTML, flags=re.DOTALL)
    assert not re.search(r"\sstyle=", body)
    assert not re.search(r"\son[a-z]+=", body)
    assert HTML.count("<script") == HTML.count("<script>") == 1
    assert HTML.count("<style") == HTML.count("<style>") == 1


def test_nothing_comes_from_elsewhere() -> None:
    assert re.findall(r"https?://[^\s'\"]+", HTML) == ["http://www.w3.org/2000/svg"]
    assert "innerHTML" not in HTML


def test_every_element_that_the_script_asks_for_is_there() -> None:
    ids = set(re.findall(r'\sid="([^"]+)"', HTML))
    asked = set(re.findall(r'\$\("([^"]+)"\)', HTML)) | set(re.findall(r'for="([^"]+)"', HTML))
    asked |= set(re.findall(r'aria-labelledby="([^"]+)"', HTML))
    assert asked <= ids
