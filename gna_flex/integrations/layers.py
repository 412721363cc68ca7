"""What all integrations share: which layers attend to what, and their masks for the tokens at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gna_flex.mask import GNABlockMask, gna_mask
from gna_flex.neighborhood import GNA, Ints, as_int

Parameters = Mapping[str, Ints]
"""``window``, ``stride`` and ``dilation`` of a layer, as far as they differ from those of all layers."""
Layers = slice | Iterable[int] | Mapping[int, Parameters | None] | Callable[[int], Parameters | None] | None
"""Which layers attend to neighborhoods; see :func:`neighborhoods`."""
Masks = tuple[GNABlockMask | None, ...]
"""A mask for every group of layers with the same neighborhood; ``None`` is dense attention."""

KEPT_MASKS = 64
"""Masks that a model keeps, for layouts that come back; the least recently used is dropped."""
TRACED = (
    "masks are built before each forward of a model, which torch.compile cannot trace: compile the model or its "
    "blocks, not a function that calls it"
)
"""What torch.compile says with ``fullgraph=True``."""


class Neighborhood(NamedTuple):
    """Parameters of a layer, each one value or one per dimension."""

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    dilation: int | tuple[int, ...]


class Tokens(NamedTuple):
    """Which tokens are where in a sequence: the grid, and how many text (or class) tokens are around it.

    ``valid`` says how many of the tokens after the grid count, ``[B]``; all if it is ``None``.
    """

    layout: tuple[int, ...]
    text_first: int = 0
    text_last: int = 0
    valid: Tensor | None = None


class Plan:
    """Neighborhoods of the layers of a model, and their masks.

    Attributes:
        layers: the neighborhood of each layer, ``None`` for dense ones.
        groups: neighborhoods that differ, in the order of the layers.
        clamp: whether windows shrink to layouts smaller than they are.
        tokens: where the tokens of the last forward were.
    """

    def __init__(self, layers: list[Neighborhood | None], clamp: bool) -> None:
        self.layers, self.clamp = layers, clamp
        self.groups = list(dict.fromkeys(entry for entry in layers if entry is not None))
        self.tokens: Tokens | None = None
        self._masks: OrderedDict[tuple[GNA, torch.device], GNABlockMask] = OrderedDict()

    def group(self, layer: int) -> int | None:
        """The number of the layer's group, ``None`` for a dense layer."""
        entry = self.layers[layer]
        return None if entry is None else self.groups.index(entry)

    def members(self, group: int) -> list[int]:
        """The layers of a group."""
        return [layer for layer, entry in enumerate(self.layers) if entry == self.groups[group]]

    def gna(self, group: int, tokens: Tokens) -> GNA:
        """The GNA of a group.

        Raises:
            ValueError: if the neighborhood does not fit the layout; the message also says which layers those are.
        """
        try:
            return GNA(
                tokens.layout,
                *self.groups[group],
                text_first=tokens.text_first,
                text_last=tokens.text_last,
                clamp=self.clamp,
            )
        except ValueError as error:
            raise ValueError(f"{error} (layers {spans(self.members(group))})") from None

    def masks(self, tokens: Tokens, device: torch.device) -> Masks:
        """The masks of all groups."""
        self.tokens = tokens._replace(valid=None)
        masks = (self._mask(self.gna(group, tokens), device) for group in range(len(self.groups)))
        return tuple(mask if tokens.valid is None else mask.with_valid_text(last=tokens.valid) for mask in masks)

    def _mask(self, gna: GNA, device: torch.device) -> GNABlockMask:
        key = gna, device
        if key not in self._masks:
            self._masks[key] = gna_mask(gna, device=device)
            if len(self._masks) > KEPT_MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key]


def neighborhoods(
    count: int, layers: Layers, window: Ints | None, stride: Ints, dilation: Ints
) -> list[Neighborhood | None]:
    """The neighborhood of each of ``count`` layers, ``None`` for dense ones.

    Args:
        count: how many layers there are.
        layers: the layers that attend to neighborhoods: all of them (``None``), a slice, or their numbers; a mapping
            from numbers to parameters that differ, or a function that returns these for a number. There ``None``, or a
            number left out, means a dense layer.
        window: of layers that name none themselves; likewise ``stride`` and ``dilation``.
        stride: see ``window``.
        dilation: see ``window``.

    Raises:
        ValueError: if there is no such layer or parameter, a window is missing, or no layer is chosen.

    >>> neighborhoods(3, {0: {"window": 5}, 2: {}}, window=(3, 4), stride=1, dilation=1)[0::2]
    [Neighborhood(window=5, stride=1, dilation=1), Neighborhood(window=(3, 4), stride=1, dilation=1)]
    """
    defaults: dict[str, Any] = {"window": window, "stride": stride, "dilation": dilation}
    result: list[Neighborhood | None] = [None] * count
    for number, parameters in _chosen(count, layers).items():
        if parameters is None:
            continue
        if unknown := set(parameters) - set(defaults):
            raise ValueError(f"layer {number} has {sorted(unknown)}: parameters of a layer are {', '.join(defaults)}")
        values = defaults | dict(parameters)
        if values["window"] is None:
            raise ValueError(f"window is missing for layer {number}: give one for all layers or one for this one")
        result[number] = Neighborhood(**{name: _frozen(value) for name, value in values.items()})
    if not any(result):
        raise ValueError(f"layers={layers!r} chooses none of the {count} layers")
    return result


def _chosen(count: int, layers: Layers) -> dict[int, Parameters | None]:
    """Parameters of the chosen layers, by number."""
    if callable(layers):
        return {number: layers(number) for number in range(count)}
    if layers is None or isinstance(layers, slice):
        return {number: {} for number in range(count)[layers or slice(None)]}
    given = layers if isinstance(layers, Mapping) else {number: {} for number in layers}
    chosen = {as_int("layers", number): parameters for number, parameters in given.items()}
    if unknown := [number for number in chosen if not -count <= number < count]:
        raise ValueError(f"layers={layers!r}: there is no layer {unknown[0]}, layers are 0 to {count - 1}")
    return {number % count: parameters for number, parameters in chosen.items()}


def _frozen(value: Ints) -> int | tuple[int, ...]:
    return tuple(value) if isinstance(value, Iterable) else value


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers as people write them.

    >>> spans([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
