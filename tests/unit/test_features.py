"""The table of features: nothing in it that no test and no refusal backs."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import chain

from rlkv_vllm.engine.support import LAYER_REFUSALS, REFUSALS
from rlkv_vllm.serving.preflight import SERVER_REFUSALS
from tests.support import ROOT
from tests.support.features import FEATURES, State, page

ROWS = tuple(chain.from_iterable(FEATURES.values()))
NAMED = {test for row in ROWS for test in row.tests}


def test_the_page_is_that_of_the_table() -> None:
    assert (ROOT / "docs" / "features.md").read_text() == page(), "run `make docs`"


def test_every_row_says_what_it_rests_on() -> None:
    for row in ROWS:
        assert (row.state is State.UNMEASURED) or row.tests, row.name
        assert row.state is State.REFUSED or not row.refusal, row.name
        assert "|" not in row.name + row.meaning
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_refusal_has_a_row_and_every_row_its_refusal() -> None:
    """Of a server's modes only those that are features of vLLM have a row."""
    refused = {row.refusal for row in ROWS if row.refusal}
    must = {refusal.what for refusal in REFUSALS} | set(LAYER_REFUSALS.values())
    assert must <= refused
    assert refused <= must | set(SERVER_REFUSALS)


def test_every_named_test_exists() -> None:
    """By the names in the files: collecting would import vLLM and take longer than all of these."""
    for test in sorted(NAMED):
        file, *names = test.split("::")
        scope: Sequence[ast.stmt] = ast.parse((ROOT / file).read_text()).body
        for name in names:
            found = {
                node.name: node.body
                for node in scope
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            }
            assert name in found, test
            scope = found[name]
        assert names[-1].startswith("test_")
