"""Numbers as people read them, and tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def by_x(values: Iterable[Any]) -> str:
    """Sizes as people write them.

    >>> by_x((2, 8, 8))
    '2x8x8'
    """
    return "x".join(map(str, values))


def amount(number: int) -> str:
    """A number of blocks, in millions if it is long.

    >>> amount(72900), amount(15485313600)
    ('72,900', '15,485.3M')
    """
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.1f}M"


def percent(share: float) -> str:
    """A share as a percentage that tells little from none, and much from all.

    >>> percent(0.5), percent(0.00048), percent(0.99952)
    ('50.0%', '0.048%', '99.95%')
    """
    if 0 < share < 0.01:
        return f"{100 * share:.2g}%"
    return f"{share:.2%}" if 0.99 < share < 1 else f"{share:.1%}"


def times(factor: float) -> str:
    """A factor with the digits that matter.

    >>> times(11.1111), times(0.945), times(11869.1)
    ('11.11x', '0.94x', '11,869x')
    """
    return f"{factor:,.0f}x" if factor >= 1000 else f"{factor:.{2 if factor < 100 else 1}f}x"


def plain_text(result: RenderableType, width: int = 100) -> str:
    """What a console without colours shows."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(result)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))
