"""`vllm-sae inspect-sae`: what an SAE is, read from its files."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from sae.card import SAECard
from sae.errors import SAEError
from sae.source import parse_source
from server.saes_at_start import check_reference


def inspect_sae(text: str, console: Console | None = None) -> int:
    """Print the card of `SOURCE[,hook=..]` after scanning all of it; the exit code, 0 or 1."""
    try:
        checked = check_reference(parse_source(text), scan_limit=None)
    except SAEError as error:
        print(f"vllm-sae: {error}", file=sys.stderr)
        return 1
    (console or Console()).print(card_table(checked.card))
    return 0


def card_table(card: SAECard) -> Table:
    """The card as a table of two columns."""
    table = Table(title=f"SAE {card.id}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in card.to_json().items():
        if key not in ("id", "object"):
            table.add_row(key, "-" if value is None else str(value))
    return table
