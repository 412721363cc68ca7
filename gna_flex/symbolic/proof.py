"""What :func:`gna_flex.symbolic.prove` returns: the derivation as data, in words and in LaTeX."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
from sympy.logic.boolalg import Boolean

from gna_flex.neighborhood import GNA
from gna_flex.symbolic.conditions import Verdict, conjunction, disjunction
from gna_flex.symbolic.lemmas import LEMMAS, Condition, Lemma, Tiling
from gna_flex.symbolic.neighborhood import Number, SymbolicGNA, substitute
from gna_flex.words import by_x

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gna_flex.symbolic.remedies import Remedy
    from gna_flex.symbolic.witness import Witness


LONG_CONDITION = 120
"""Longer conditions (in characters) are not spelled out in the first line of a proof: the cases below it say it."""


@dataclass(frozen=True)
class Step:
    """A condition and the verdict on it: True, False or what remains undecided."""

    condition: Condition
    verdict: Verdict

    def __str__(self) -> str:
        if isinstance(self.verdict, bool):
            return self.condition.text(self.verdict)
        return f"{self.condition.text()}: left to check, {condition_text(self.verdict)}"


@dataclass(frozen=True)
class Branch:
    """A case of a dilation group: the lemma that settles it, where it applies, and what it comes down to."""

    lemma: str
    guards: tuple[Step, ...]
    steps: tuple[Step, ...]

    @property
    def guard(self) -> Verdict:
        """Whether the case applies."""
        return conjunction(step.verdict for step in self.guards)

    @property
    def verdict(self) -> Verdict:
        """Whether the case is met, its guards left out."""
        return conjunction(step.verdict for step in self.steps)


@dataclass(frozen=True)
class Group:
    """The dilation groups of one length: the cases that may apply (one, for numbers)."""

    length: Number
    starts: str
    branches: tuple[Branch, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether groups of this length are perfectly block-sparse."""
        if len(self.branches) == 1:
            return self.branches[0].verdict
        asking = [branch for branch in self.branches if branch.steps]
        shared = functools.reduce(operator.and_, ({*branch.steps} for branch in asking))
        rests = [(b.guard, conjunction(s.verdict for s in b.steps if s not in shared)) for b in asking]
        nothing_asked = disjunction(branch.guard for branch in self.branches if not branch.steps)
        if any(rest is True for _, rest in rests):
            # Exactly one case applies, so "one applies and is met" is "all that apply are met": shorter here.
            met = conjunction(disjunction([sympy.Not(guard), rest]) for guard, rest in rests)
        else:
            met = disjunction([nothing_asked, *(conjunction(pair) for pair in rests)])
        return conjunction([met, disjunction([nothing_asked, conjunction(step.verdict for step in shared)])])


@dataclass(frozen=True)
class Dimension:
    """What was shown of one dimension: its numbers, and its dilation groups by length."""

    axis: int
    length: Number
    window: Number
    stride: Number
    dilation: Number
    causal: bool
    q_tile: Number
    kv_tile: Number
    groups: tuple[Group, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the dimension is perfectly block-sparse."""
        return conjunction(group.verdict for group in self.groups)

    def __str__(self) -> str:
        parts = [f"length {self.length}", f"window {self.window}", f"stride {self.stride}"]
        parts += [f"dilation {self.dilation}"] if self.dilation != 1 else []
        parts += ["causal"] if self.causal else []
        return f"Dimension {self.axis}: {', '.join(parts)}, query tile {self.q_tile}, key tile {self.kv_tile}."


@dataclass(frozen=True)
class Argument:
    """What proofs and refutations share: the question, and the derivation dimension by dimension."""

    gna: GNA | SymbolicGNA
    q_tile: tuple[Number, ...]
    kv_tile: tuple[Number, ...]
    tiling: Tiling
    dimensions: tuple[Dimension, ...]

    @property
    def parts(self) -> tuple[GNA | SymbolicGNA, tuple[Number, ...], tuple[Number, ...], Tiling, tuple[Dimension, ...]]:
        """The fields, in order."""
        return self.gna, self.q_tile, self.kv_tile, self.tiling, self.dimensions

    @property
    def lemmas(self) -> tuple[Lemma, ...]:
        """The lemmas used, each once."""
        names = ["product"] if len(self.dimensions) > 1 else []
        names += ["groups"] if any(d.dilation != 1 for d in self.dimensions) else []
        names += [b.lemma for d in self.dimensions for g in d.groups for b in g.branches]
        names += ["text"] if self.gna.text_first or self.gna.text_last else []
        return tuple(LEMMAS[name] for name in dict.fromkeys(names))

    @property
    def question(self) -> str:
        """The neighborhood and the tiles in words."""
        tiles = f"query tile {by_x(self.q_tile)}, key tile {by_x(self.kv_tile)}"
        return f"{self.gna}; {tiles}, {self.tiling} tiling"

    def derivation(self) -> list[str]:
        """The argument line by line."""
        lines = []
        for dimension in self.dimensions:
            lines.append(str(dimension))
            for group in dimension.groups:
                if dimension.dilation != 1:
                    lines.append(f"  Dilation groups of {group.length} tokens:")
                lines += [f"  {group.starts}"] if group.starts else []
                for branch in group.branches:
                    when = ", ".join(str(step.condition) for step in branch.guards)
                    lines.append(f"  [{branch.lemma}] {when}.")
                    lines += [f"    {step}" for step in branch.steps]
        return lines

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        first, *rest = str(self).split("\n")
        lines = [Text(first, "bold")]
        for line in rest:
            lines.append(Text(line, "dim" if line.startswith("[") else "yellow" if " not " in line[:80] else ""))
        return Text("\n").join(lines)

    def _cited(self) -> list[str]:
        return [f"[{lemma.name}] {lemma.statement}" for lemma in self.lemmas]

    def _latex_lines(self) -> list[str]:
        lines = []
        for d in self.dimensions:
            for branch in (b for g in d.groups for b in g.branches):
                guards = ", ".join(step.condition.latex() for step in branch.guards)
                steps = ", ".join(step.condition.latex(step.verdict is not False) for step in branch.steps)
                implies = rf" \Rightarrow {{}}& {steps}" if steps else "&"
                lines.append(rf"\text{{dimension {d.axis} ({branch.lemma}): }}& {guards}{implies}")
        return lines

    def _shared_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "tiling": self.tiling,
            "q_tile": [_json(t) for t in self.q_tile],
            "kv_tile": [_json(t) for t in self.kv_tile],
            "dimensions": [_dimension_json(d) for d in self.dimensions],
            "lemmas": {lemma.name: lemma.statement for lemma in self.lemmas},
        }


@dataclass(frozen=True)
class Proof(Argument):
    """Perfectly block-sparse: always, or if and only if the conditions hold.

    ``bool(proof)`` is True for a proof without conditions; with conditions it is an error, as it has no answer.

    Attributes:
        conditions: SymPy conditions that remain; all of them together decide. Empty for numbers.
        holds_for, fails_for: legal values of the symbols for which the conditions hold, or do not, where one was found.
        values: all values for which they hold, if the symbols can have a few only; else ``None``.
        checked: how many legal values of the symbols there are, if the answer comes from checking each of them; else 0.
    """

    conditions: tuple[Boolean, ...] = ()
    holds_for: dict[sympy.Symbol, int] | None = field(default=None, hash=False)
    fails_for: dict[sympy.Symbol, int] | None = field(default=None, hash=False)
    values: tuple[dict[sympy.Symbol, int], ...] | None = field(default=None, hash=False)
    checked: int = 0

    @property
    def perfect(self) -> bool | None:
        """True without conditions, else unknown: ``None``."""
        return None if self.conditions else True

    @property
    def condition(self) -> Boolean:
        """All conditions as one SymPy expression."""
        return sympy.And(*self.conditions)

    def holds(self, values: dict[sympy.Symbol, int]) -> bool:
        """Whether the conditions hold for legal values of all symbols: the question, asked again with numbers.

        To substitute in the conditions themselves use ``xreplace``, all symbols at once: SymPy's ``subs`` may not end.
        """
        from gna_flex.symbolic.prove import prove

        gna = self.gna if isinstance(self.gna, GNA) else self.gna.subs(values)
        q_tile, kv_tile = (tuple(substitute(t, values) for t in tile) for tile in (self.q_tile, self.kv_tile))
        return bool(prove(gna, q_tile, kv_tile, self.tiling))

    @property
    def ragged(self) -> tuple[int, ...]:
        """Dimensions whose last key tile sticks out of the grid: kernels must ignore the places beyond its end."""
        found = []
        for dimension, group in ((d, g) for d in self.dimensions for g in d.groups):
            numbers = (group.length, dimension.window, dimension.kv_tile)
            if all(isinstance(number, int) for number in numbers):
                length, window, tile = numbers
                # Anchored key tiles end where a window ends: at the end of the grid only if they start at 0.
                fixed = self.tiling == "static" or window == length
                found += [dimension.axis] if fixed and length % tile else []
        return tuple(dict.fromkeys(found))

    def __bool__(self) -> bool:
        if self.conditions:
            raise TypeError(f"whether this is perfectly block-sparse depends on {self.condition}; see .conditions")
        return True

    def __str__(self) -> str:
        lines = [f"{'Perfectly block-sparse if and only if' if self.conditions else 'Proved'}: {self._claim()}"]
        lines += self.derivation()
        if self.checked:
            lines.append(f"The symbols have {self.checked:,} legal values; each was checked.")
        if self.values:
            shown = "; ".join(_assignment(v) for v in self.values[:8])
            lines.append(f"It holds for {len(self.values)} of them: {shown}{'; ...' if len(self.values) > 8 else ''}.")
        elif self.holds_for and self.fails_for:
            lines.append(f"It holds for {_assignment(self.holds_for)}, and fails for {_assignment(self.fails_for)}.")
        if not self.conditions:
            lines.append("Every visited key tile is wanted by all queries of the tile: no tile needs a mask.")
        for axis in self.ragged:
            lines.append(
                f"The last key tile of dimension {axis} sticks out of the grid: places beyond it hold no keys."
            )
        return "\n".join([*lines, "", *self._cited()])

    def _claim(self) -> str:
        if not self.conditions:
            return f"{self.question} is perfectly block-sparse."
        text = condition_text(self.condition)
        if len(text) > LONG_CONDITION:
            text = "in each dimension one of the cases below applies and its conditions hold"
        return f"{text} ({self.question})."

    def latex(self) -> str:
        """The derivation as a LaTeX ``aligned`` environment."""
        end = [rf"\text{{remaining: }}& {sympy.latex(self.condition)} &"] if self.conditions else []
        return _aligned([*self._latex_lines(), *end])

    def to_json(self) -> dict[str, Any]:
        """The proof as JSON takes it."""
        return (
            {"perfect": self.perfect}
            | self._shared_json()
            | {
                "conditions": [str(c) for c in self.conditions],
                "holds_for": _assignment_json(self.holds_for),
                "fails_for": _assignment_json(self.fails_for),
                "values": self.values and [_assignment_json(v) for v in self.values],
                "checked": self.checked,
                "ragged": list(self.ragged),
            }
        )


@dataclass(frozen=True)
class Refutation(Argument):
    """Not perfectly block-sparse, with the first tile that needs a mask and the nearest remedies. Falsy.

    Attributes:
        substitution: values of the symbols that the witness is for; no legal values are better. Empty without symbols,
            ``None`` where no legal values were found.
    """

    substitution: dict[sympy.Symbol, int] | None = field(default_factory=dict, hash=False)

    @property
    def perfect(self) -> bool:
        """False."""
        return False

    def __bool__(self) -> bool:
        return False

    @functools.cached_property
    def _numeric(self) -> tuple[GNA, tuple[int, ...], tuple[int, ...]] | None:
        """Neighborhood and tiles with numbers in place of the symbols."""
        if self.substitution is None:
            return None
        gna = self.gna if isinstance(self.gna, GNA) else self.gna.subs(self.substitution)
        q_tile, kv_tile = (
            tuple(substitute(t, self.substitution) for t in tile) for tile in (self.q_tile, self.kv_tile)
        )
        return gna, q_tile, kv_tile

    @functools.cached_property
    def witness(self) -> Witness | None:
        """The first query tile with a key tile that needs a mask, and a kept and a dropped pair in it.

        ``None`` only where no legal values of the symbols were found.
        """
        from gna_flex.symbolic.witness import first_witness

        return first_witness(*self._numeric, self.tiling) if self._numeric else None

    @functools.cached_property
    def remedies(self) -> tuple[Remedy, ...]:
        """The nearest changes of one argument (or of two, if one does not do) that make it perfect, each proved."""
        from gna_flex.symbolic.remedies import nearest_remedies

        return nearest_remedies(*self._numeric, self.tiling) if self._numeric else ()

    def __str__(self) -> str:
        lines = [f"Refuted: {self.question} is not perfectly block-sparse.", *self.derivation()]
        if self.substitution:
            lines.append(f"It fails for all values of the symbols, for instance {_assignment(self.substitution)}.")
        if self.witness:
            lines += [str(self.witness), "Nearest changes that make it perfect, each proved:"]
            lines += [f"  {remedy}" for remedy in self.remedies]
        return "\n".join([*lines, "", *self._cited()])

    def latex(self) -> str:
        """The derivation as a LaTeX ``aligned`` environment."""
        return _aligned(self._latex_lines())

    def to_json(self) -> dict[str, Any]:
        """The refutation as JSON takes it."""
        return (
            {"perfect": False}
            | self._shared_json()
            | {
                "substitution": _assignment_json(self.substitution),
                "witness": self.witness and self.witness.to_json(),
                "remedies": [remedy.to_json() for remedy in self.remedies],
            }
        )


def condition_text(condition: Verdict) -> str:
    """A SymPy condition as people write it.

    >>> T, w = sympy.symbols("T w", integer=True, positive=True)
    >>> condition_text(sympy.Eq(sympy.Mod(w, T), 0))
    'T divides w'
    """
    if isinstance(condition, sympy.And):
        return " and ".join(_bracketed(c) for c in sorted(condition.args, key=str))
    if isinstance(condition, sympy.Or):
        return " or ".join(_bracketed(c) for c in sorted(condition.args, key=str))
    if isinstance(condition, sympy.Eq):
        modulus, zero = (condition.lhs, condition.rhs) if condition.rhs == 0 else (condition.rhs, condition.lhs)
        if isinstance(modulus, sympy.Mod) and zero == 0:
            return f"{modulus.args[1]} divides {modulus.args[0]}"
        return f"{condition.lhs} = {condition.rhs}"
    return str(condition)


def _aligned(lines: list[str]) -> str:
    body = " \\\\\n".join(lines)
    return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"


def _bracketed(condition: Boolean) -> str:
    text = condition_text(condition)
    return f"({text})" if isinstance(condition, sympy.And | sympy.Or) else text


def _assignment(values: dict[sympy.Symbol, int]) -> str:
    return ", ".join(f"{symbol} = {value}" for symbol, value in values.items())


def _assignment_json(values: dict[sympy.Symbol, int] | None) -> dict[str, int] | None:
    return None if values is None else {str(symbol): value for symbol, value in values.items()}


def _dimension_json(d: Dimension) -> dict[str, Any]:
    def steps(found: tuple[Step, ...]) -> list[dict[str, Any]]:
        return [{"condition": s.condition.text(), "verdict": _json(s.verdict)} for s in found]

    numbers = {name: _json(getattr(d, name)) for name in ("length", "window", "stride", "dilation", "causal")}
    return {
        "axis": d.axis,
        **numbers,
        "q_tile": _json(d.q_tile),
        "kv_tile": _json(d.kv_tile),
        "verdict": _json(d.verdict),
        "groups": [
            {
                "length": _json(g.length),
                "starts": g.starts,
                "cases": [
                    {"lemma": b.lemma, "applies": steps(b.guards), "conditions": steps(b.steps)} for b in g.branches
                ],
            }
            for g in d.groups
        ],
    }


def _json(value: Any) -> Any:
    return value if isinstance(value, bool | int) else str(value)
