"""Functions generated so that every number in them is a literal.

torch.compile turns integers that it finds in closures or attributes into symbolic sizes once it has seen two of them
(or at once with ``dynamic=True``): kernels then divide by run-time values, and variants pile up. Literals stay
constants.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any, cast


def literal_function(name: str, lines: list[str], names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``name`` that ``lines`` define, with ``names`` as its globals.

    The source is registered, so that tracebacks and ``inspect.getsource`` show it.

    >>> literal_function("twice", ["def twice(x):", "    return 2 * x"], {})(4)
    8
    """
    source = "\n".join(lines) + "\n"
    filename = f"<gna_flex {name} {abs(hash(source)):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)
    return cast(Callable[..., Any], namespace[name])
