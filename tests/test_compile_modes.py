"""Every mode of torch, forward and backward: right against float64, or the error that is written here.

``TABLE`` is the README's table. Where there is a GPU the tests run on it, in bfloat16.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_within_budget, dense_attention, dense_mask
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils.checkpoint import checkpoint

from gna_flex import GNA, compile_report, flex, flex_attention, gna_mask, kernels, recognise_masks
from gna_flex.dynamo.backend import gna_flex_backend

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0) and not kernels.missing()
# On a CPU, Inductor takes minutes for what other modes show as well.
QUICK = "inductor" if ON_GPU else "aot_eager"

WORKS = "works"
TABLE = {
    # mode: (masks of gna_mask, other masks with the backend "gna_flex")
    "eager": (WORKS, "torch's own, dense"),
    "`torch.compile`": (WORKS, "works inside of `recognise_masks`"),
    '`backend="gna_flex"`': (WORKS, WORKS),
    "`fullgraph=True`": (WORKS, WORKS),
    "batch sizes change": (WORKS, WORKS),
    "lengths change": (WORKS, "works, left to torch"),
    '`mode="reduce-overhead"`': (WORKS, WORKS),
    "`torch.export`, saved and loaded": (WORKS, "error: torch cannot save its operator"),
    "checkpoint, autocast, `inference_mode`": (WORKS, WORKS),
}
EAGER, COMPILE, BACKEND, FULLGRAPH, BATCHES, LENGTHS, CUDA_GRAPHS, EXPORT, CONTEXTS = TABLE
BACKWARD_ON_CPU = "FlexAttention does not support backward on CPU"
"""torch's own function refuses gradients on a CPU, whatever the mode."""
NOT_SAVED = "Failed serializing node flex_attention"
DYNAMIC_LENGTH = "the number of tokens is dynamic"

COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    # mode: (what compiles in the end, further options of torch.compile)
    COMPILE: ("inductor", {}),
    BACKEND: ("inductor", {}),
    FULLGRAPH: (QUICK, {"fullgraph": True}),
    BATCHES: (QUICK, {"fullgraph": True}),
    LENGTHS: (QUICK, {"fullgraph": True}),
    CUDA_GRAPHS: ("inductor", {"mode": "reduce-overhead"}),
}
SIZES = {BATCHES: [(2, 320), (3, 320), (5, 320), (7, 320)], LENGTHS: [(2, 320), (2, 400), (2, 512)]}
"""Batch and tokens of successive calls; CUDA graphs are recorded at the second call and replayed from then on."""


class Door(NamedTuple):
    """A function to call, with the GNA and the mask for a number of tokens."""

    attend: Callable[..., Tensor]
    gna: Callable[[int], GNA]
    mask: Callable[[GNA], BlockMask]


def grid(tokens: int) -> GNA:
    return GNA((tokens // 16, 16), (5, 6), (2, 1))


def sliding(tokens: int) -> GNA:
    return GNA(tokens, 64, causal=True)


def our_mask(gna: GNA) -> BlockMask:
    return gna_mask(gna, device=DEVICE)


def foreign_mask(gna: GNA) -> BlockMask:
    """A causal sliding window as anybody writes it."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < 64)

    return create_block_mask(mask_mod, None, None, gna.tokens, gna.tokens, device=DEVICE)


DOORS = {
    "ours": Door(flex_attention, grid, our_mask),
    "torchs": Door(torch_flex_attention, grid, our_mask),
    "foreign": Door(torch_flex_attention, sliding, foreign_mask),
}
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
EVERY_DOOR = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
OUR_MASKS = pytest.mark.parametrize("door", [DOORS["ours"], DOORS["torchs"]], ids=["ours", "torchs"])


def inputs(batch: int, tokens: int, backward: bool, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    shape = (batch, 2, tokens, 32)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=backward) for _ in range(3)]


def check(run: Callable[..., Tensor], qkv: list[Tensor], gna: GNA, dtype: torch.dtype = DTYPE) -> None:
    """Output and gradients are as near to float64 as a plain run in ``dtype``, the type to compute in."""
    keep = torch.from_numpy(dense_mask(gna)).to(DEVICE)
    backward = qkv[0].requires_grad
    plain, exact = ([x.detach().to(dtype).to(t).requires_grad_(backward) for x in qkv] for t in (dtype, torch.float64))
    outs = [run(*qkv), *(dense_attention(*leaves, keep).out for leaves in (exact, plain))]
    assert outs[0].dtype == dtype
    assert_within_budget("out", *outs)
    if backward:
        upstream = torch.randn_like(outs[2])
        pairs = zip(outs, (qkv, exact, plain), strict=True)
        gradients = [torch.autograd.grad(out, leaves, upstream.to(out.dtype)) for out, leaves in pairs]
        for name, *three in zip("qkv", *gradients, strict=True):
            assert_within_budget(f"d{name}", *three)


def refusal(door: Door, backward: bool) -> Any:
    """Expects the error of torch's own function where it does not train."""
    refuses = backward and not ON_GPU and door.attend is torch_flex_attention
    return pytest.raises(Exception, match=BACKWARD_ON_CPU) if refuses else contextlib.nullcontext()


def assert_rewritten(left: str = "") -> None:
    """The calls of foreign masks take our kernel where there is one; ``left`` is why the last one does not."""
    *before, last = compile_report().calls
    for call in before if left else (*before, last):
        assert call.route == ("hopper" if ON_HOPPER else call.route), call.reason
        assert ON_GPU or "it needs an NVIDIA Hopper GPU" in call.reason
    assert last.gna is not None or left
    assert left in last.reason


@pytest.fixture(autouse=True)
def no_flex_attention_on_hopper() -> Any:
    """Where our kernel runs, FlexAttention's forward is never compiled by us, in any mode."""
    yield
    assert not (ON_HOPPER and flex._compiled)


def test_readme_has_the_table() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.split("\n## torch.compile\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE)[1:]
    assert {mode: (ours, others) for mode, ours, others in rows} == TABLE
    assert f"`{BACKWARD_ON_CPU}`" in section


@EVERY_DOOR
@BACKWARD
def test_eager(door: Door, backward: bool) -> None:
    qkv, gna = inputs(2, 320, backward), door.gna(320)
    mask = door.mask(gna)
    with refusal(door, backward):
        check(lambda *x: door.attend(*x, block_mask=mask), qkv, gna)


def recognising(inner: str) -> Any:
    """The backend "gna_flex" around another one."""
    return gna_flex_backend if inner == "inductor" else functools.partial(gna_flex_backend, inner=inner)


@EVERY_DOOR
@BACKWARD
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] * (inner != QUICK)) for mode, (inner, _) in COMPILED.items()]
)
def test_compiled(mode: str, door: Door, backward: bool) -> None:
    inner, options = COMPILED[mode]
    foreign = door.mask is foreign_mask
    backend = recognising(inner) if mode == BACKEND or (foreign and mode != COMPILE) else inner
    attend = torch.compile(lambda q, k, v, mask: door.attend(q, k, v, block_mask=mask), backend=backend, **options)
    sizes = SIZES.get(mode, [(2, 320)] * 4)
    if mode == LENGTHS and not foreign:
        sizes = sizes[:2]  # which have a graph each
    counters.clear()
    with refusal(door, backward), recognise_masks() if foreign and mode == COMPILE else contextlib.nullcontext():
        for batch, tokens in sizes:
            gna = door.gna(tokens)
            mask = door.mask(gna)
            torch.compiler.cudagraph_mark_step_begin()
            check(lambda *x, mask=mask: attend(*x, mask), inputs(batch, tokens, backward), gna)
        if foreign:
            assert_rewritten(DYNAMIC_LENGTH if mode == LENGTHS else "")
        if mode != LENGTHS:
            # One for one batch size and one for all; an analysis that torch restarts counts twice.
            assert 1 <= counters["stats"]["unique_graphs"] <= (3 if mode == BATCHES else 1)
        if mode == CUDA_GRAPHS and ON_GPU:
            assert counters["inductor"]["cudagraph_skips"] == 0


class Attend(nn.Module):
    """A model with a mask."""

    def __init__(self, door: Door, tokens: int) -> None:
        super().__init__()
        self.attend, self.mask = door.attend, door.mask(door.gna(tokens))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(query, key, value, block_mask=self.mask)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@EVERY_DOOR
@BACKWARD
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(door: Door, backward: bool, strict: bool) -> None:
    """Gradients go through the exported module."""
    if door is DOORS["torchs"] and not (strict or backward or ON_GPU):
        pytest.skip("torch takes half a minute to trace its own function, with the reference inside of it, this way")
    model, qkv = Attend(door, 320), inputs(2, 320, backward)
    with refusal(door, backward):
        program = torch.export.export(model, tuple(qkv), strict=strict)
        check(program.module(), qkv, door.gna(320))
        if door.mask is foreign_mask:
            with pytest.raises(Exception, match=NOT_SAVED):
                saved_and_loaded(program)
        else:
            check(saved_and_loaded(program).module(), qkv, door.gna(320))


@pytest.mark.gpu
def test_what_is_not_for_our_kernel_cannot_be_saved() -> None:
    """It is FlexAttention's operator then, as in any model of torch."""
    qkv = inputs(2, 320, False, torch.float32)
    program = torch.export.export(Attend(DOORS["ours"], 320), tuple(qkv), strict=True)
    with pytest.raises(Exception, match=NOT_SAVED):
        saved_and_loaded(program)


def checkpointed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: checkpoint(attend, *args, use_reentrant=False)


def autocast(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return attend(*args)

    return run


def unchanged(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return attend


# What is inside of the compiled function, what is around it, and whether there are gradients.
AROUND = {
    "checkpoint": (checkpointed, unchanged, True),
    "autocast": (autocast, unchanged, False),
    "autocast-backward": (autocast, unchanged, True),
    "inference_mode": (unchanged, torch.inference_mode(), False),
}


@EVERY_DOOR
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
@pytest.mark.parametrize(("inside", "outside", "backward"), AROUND.values(), ids=AROUND)
def test_contexts(
    door: Door, compiled: bool, inside: Callable[..., Any], outside: Callable[..., Any], backward: bool
) -> None:
    gna = door.gna(320)
    mask = door.mask(gna)
    given, dtype = (torch.float32, torch.bfloat16) if inside is autocast else (DTYPE, DTYPE)
    run = inside(lambda q, k, v: door.attend(q, k, v, block_mask=mask))
    foreign = door.mask is foreign_mask
    if compiled:
        run = torch.compile(run, fullgraph=True, backend=recognising(QUICK) if foreign else QUICK)
    with refusal(door, backward):
        check(outside(run), inputs(2, 320, backward, given), gna, dtype)
        if compiled and foreign:
            assert_rewritten()


TWENTY = [GNA((16, 20), (rows, columns)) for rows in range(2, 12, 2) for columns in range(3, 7)]
"""More than torch compiles one function for."""


@OUR_MASKS
def test_twenty_masks_in_eager_code(door: Door) -> None:
    """None is compiled for: the kernel takes them as numbers, and a CPU takes the reference."""
    for gna in TWENTY:
        mask = our_mask(gna)
        check(lambda *x, mask=mask: door.attend(*x, block_mask=mask), inputs(1, 320, False), gna)
    assert not flex._compiled or (ON_GPU and not ON_HOPPER)


@pytest.mark.slow
@OUR_MASKS
def test_twenty_masks_in_one_compiled_function(door: Door) -> None:
    """Past torch's limit the function runs uncompiled, and attention takes the route that it has in eager code."""
    counter = CompileCounterWithBackend(QUICK)
    attend = torch.compile(lambda q, k, v, mask: door.attend(q, k, v, block_mask=mask), backend=counter)
    masks = [our_mask(gna) for gna in TWENTY]
    with torch._dynamo.config.patch(recompile_limit=3):
        for gna, mask in zip(TWENTY, masks, strict=True):
            check(lambda *x, mask=mask: attend(*x, mask), inputs(1, 320, False), gna)
    assert counter.frame_count >= 3
    if ON_HOPPER and door is DOORS["ours"]:
        assert all(mask.launchers for mask in masks[-10:]), "the kernel took these calls outside of graphs"


@OUR_MASKS
def test_one_graph_for_too_many_masks_is_an_error(door: Door) -> None:
    attend = torch.compile(lambda q, k, v, mask: door.attend(q, k, v, block_mask=mask), backend="eager", fullgraph=True)
    qkv = inputs(1, 320, False)
    with torch._dynamo.config.patch(recompile_limit=3):
        for gna in TWENTY[:3]:
            check(lambda *x, gna=gna: attend(*x, our_mask(gna)), qkv, gna)
        with pytest.raises(FailOnRecompileLimitHit):
            attend(*qkv, our_mask(TWENTY[3]))


class Stack(nn.Module):
    """Layers with a mask each, which take away what is near by."""

    def __init__(self, attend: Callable[..., Tensor], masks: list[BlockMask]) -> None:
        super().__init__()
        self.attend, self.masks = attend, masks

    def forward(self, query: Tensor, key: Tensor, x: Tensor) -> Tensor:
        for mask in self.masks:
            x = x - self.attend(query, key, x, block_mask=mask)
        return x


def check_stack(run: Callable[..., Tensor]) -> None:
    """Against the layers one by one, in float64 and in the type of the test."""
    qkv = inputs(1, 320, False)
    results = []
    for dtype in (torch.float64, DTYPE):
        query, key, x = (tensor.to(dtype) for tensor in qkv)
        for gna in TWENTY:
            x = x - dense_attention(query, key, x, torch.from_numpy(dense_mask(gna)).to(DEVICE)).out
        results.append(x)
    assert_within_budget("out", run(*qkv), *results)


@pytest.mark.slow
@OUR_MASKS
def test_twenty_masks_in_one_graph(door: Door) -> None:
    counter = CompileCounterWithBackend("inductor" if ON_GPU else "eager")
    run = torch.compile(Stack(door.attend, [our_mask(gna) for gna in TWENTY]), backend=counter, fullgraph=True)
    for _ in range(2):
        check_stack(run)
        assert counter.frame_count == 1


@pytest.mark.slow
def test_twenty_foreign_masks_in_one_graph() -> None:
    """Masks of ours that do not route themselves stand for those of others."""
    counter = CompileCounterWithBackend(recognising("inductor" if ON_GPU else "eager"))
    masks = [our_mask(gna).plain for gna in TWENTY]
    run = torch.compile(Stack(torch_flex_attention, masks), backend=counter, fullgraph=True)
    for _ in range(2):
        check_stack(run)
        assert counter.frame_count == 1
    assert [call.gna for call in compile_report().calls] == TWENTY
    assert_rewritten()
