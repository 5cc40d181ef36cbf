"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table below its title, or only that there is nothing. The last column wraps."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=240)
    if not rows:
        console.print(f"{title}: (none)")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(head))
    for index, column in enumerate(head):
        last = index == len(head) - 1
        table.add_column(column, overflow="fold", no_wrap=not last)
    for row in rows:
        table.add_row(*row)
    console.print(title)
    console.print(table)
