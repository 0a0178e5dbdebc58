"""Tables and text on stdout."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rlkv_vllm.files import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def new_table(*columns: str) -> Table:
    """A table with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def print_plain(content: Table | str) -> None:
    """Print without interpreting markup or control codes.

    Text is not wrapped, nor are long cells in pipes.
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    console = Plain(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    console.print(content, soft_wrap=isinstance(content, str))


def print_next(*words: str, lead: str = "next") -> None:
    """The last line of a command: what to run next, after `rlkv`; empty words are left out."""
    print_plain(f"{lead}: {shlex.join(['rlkv', *filter(None, words)])}")
