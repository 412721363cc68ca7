"""NATTEN's names on top of gna_flex: signatures, values, gradients, modules, errors, compiled callers."""

import ast
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Exact, assert_within_budget, dense_attention, dense_mask, exact_attention, gna_id
from torch import Tensor

from gna_flex import GNA, kept, natten
from gna_flex.natten import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, na1d, na2d, na3d

OPERATIONS = (na1d, na2d, na3d)
MODULES = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
CASES = [
    GNA(33, 7),
    GNA(40, 12, 5, 3, causal=True),
    GNA((9, 11), (4, 5)),
    GNA((12, 10), (6, 3), (4, 3), (2, 3)),
    GNA((8, 9), (8, 4), (3, 2), causal=(False, True)),
    GNA((5, 6, 7), (3, 4, 5)),
    GNA((6, 8, 5), (3, 2, 5), (2, 1, 4), (2, 3, 1), causal=(True, False, False)),
]
GRID = GNA((6, 9), (3, 4), (2, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EXTRA = pytest.mark.parametrize("extra", [None, 0, 1, 7])


def arguments(gna: GNA) -> dict[str, Any]:
    return {"kernel_size": gna.window, "stride": gna.stride, "dilation": gna.dilation, "is_causal": gna.causal}


def inputs(
    gna: GNA, extra: int | None = None, heads: int = 4, kv_heads: int = 2, dtype=torch.float32, value_dim: int = 8
) -> list[Tensor]:
    """Query, key, value and, unless ``extra`` is None, additional keys and values."""
    shapes = [(*gna.layout, heads, 16), (*gna.layout, kv_heads, 16), (*gna.layout, kv_heads, value_dim)]
    shapes += [] if extra is None else [(extra, kv_heads, 16), (extra, kv_heads, value_dim)]
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


def call(gna: GNA, tensors: list[Tensor], **options: Any) -> Any:
    names = ("query", "key", "value", "additional_keys", "additional_values")
    return OPERATIONS[gna.ndim - 1](**dict(zip(names, tensors, strict=False)), **arguments(gna), **options)


def dense(gna: GNA, tensors: list[Tensor], attention: Any = exact_attention, **options: Any) -> Exact:
    """The same by explicit softmax, heads last."""
    query, key, value = (x.flatten(1, gna.ndim) for x in tensors[:3])
    key, value = (torch.cat([x, *more], 1) for x, more in zip((key, value), (tensors[3:4], tensors[4:]), strict=True))
    text = key.shape[1] - gna.grid_tokens
    keep = dense_mask(GNA(gna.layout, gna.window, gna.stride, gna.dilation, gna.causal, text_last=text))
    results = attention(*(x.transpose(1, 2) for x in (query, key, value)), keep[: gna.grid_tokens], **options)
    return Exact(*(x.transpose(1, 2).unflatten(1, gna.layout) for x in results))


def assert_same(name: str, found: Any, gna: GNA, tensors: list[Tensor], **options: Any) -> None:
    """Output and log-sum-exp are those of explicit softmax."""
    exact, plain = (dense(gna, tensors, f, **options) for f in (exact_attention, dense_attention))
    for part, x, truth, rough in zip(("out", "lse"), found, exact, plain, strict=False):
        assert_within_budget(f"{name} {part}", x, truth, rough)


def assert_trains(gna: GNA, tensors: list[Tensor], function: Any, device: str = "cpu") -> None:
    """Output, log-sum-exp, and the gradients of all inputs through both, are those of explicit softmax."""
    tensors = [x.requires_grad_() for x in tensors]
    out, lse = (x.to("cpu") for x in function(gna, [x.to(device) for x in tensors], return_lse=True))
    assert_same("training", (out, lse), gna, tensors)
    weights = torch.randn_like(out), torch.randn_like(lse)

    def gradients(out: Tensor, lse: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            (out, lse), wanted, [w.to(x.dtype) for w, x in zip(weights, (out, lse), strict=True)]
        )

    wide = [x.detach().double().requires_grad_() for x in tensors]
    found = gradients(out, lse, tensors)
    exact = gradients(*dense(gna, wide)[:2], wide)
    plain = gradients(*dense(gna, tensors, dense_attention)[:2], tensors)
    for name, x, truth, rough in zip(("dq", "dk", "dv", "dk+", "dv+"), found, exact, plain, strict=False):
        if x.numel():
            assert_within_budget(name, x, truth, rough)


class TestOperations:
    @EXTRA
    @pytest.mark.parametrize("gna", CASES, ids=gna_id)
    def test_output_and_statistics(self, gna, extra):
        tensors = inputs(gna, extra)
        out, lse = call(gna, tensors, return_lse=True)
        assert out.shape == (*tensors[0].shape[:-1], 8)
        assert lse.shape == tensors[0].shape[:-1]
        assert_same("with statistics", (out, lse), gna, tensors)
        assert torch.equal(call(gna, tensors), out)

    @EXTRA
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
    def test_types_and_heads(self, dtype, heads, extra):
        tensors = inputs(GRID, extra, *heads, dtype=dtype)
        out, lse = call(GRID, tensors, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        assert_same(str(dtype), (out, lse), GRID, tensors)

    @EXTRA
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("gna", CASES[::2], ids=gna_id)
    def test_gradients_of_output_and_statistics(self, gna, dtype, extra):
        assert_trains(gna, inputs(gna, extra, dtype=dtype), call)

    @EXTRA
    def test_inputs_of_any_strides(self, extra):
        tensors = [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in inputs(GRID, extra)]
        tensors[0] = tensors[0].flip(1).contiguous().flip(1)
        tensors[1] = torch.cat([tensors[1], tensors[1]], 2)[:, :, : GRID.layout[1]]
        assert_same("strided", call(GRID, tensors, return_lse=True), GRID, tensors)

    @pytest.mark.parametrize("extra", [None, 3])
    def test_results_are_contiguous(self, extra):
        out, lse = call(GRID, inputs(GRID, extra), return_lse=True)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        out.view(2, 6, 9, -1)

    @pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
    def test_scale(self, scale):
        tensors = inputs(GRID, 2)
        assert_same("scaled", call(GRID, tensors, scale=scale, return_lse=True), GRID, tensors, scale=scale)

    def test_one_value_lists_and_none(self):
        tensors = inputs(GRID)
        expected = na2d(*tensors, (3, 3), (1, 1), (1, 1), (False, False))
        for options in (
            {"kernel_size": 3},
            {"kernel_size": [3, 3], "stride": [1, 1]},
            {"kernel_size": torch.Size((3, 3)), "stride": None, "dilation": None, "is_causal": None},
        ):
            assert torch.equal(na2d(*tensors, **options), expected)

    def test_windows_that_natten_refuses(self):
        tensors = inputs(GRID)
        assert torch.equal(na2d(*tensors, (1, 1)), tensors[2].repeat_interleave(2, -2))
        assert_same("dense", [na2d(*tensors, -1)], GNA.dense(GRID.layout), tensors)

    def test_autocast(self):
        tensors = inputs(GRID, 3)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(GRID, tensors)
        assert out.dtype == torch.bfloat16
        assert_same("autocast", [out], GRID, [x.bfloat16() for x in tensors])


@pytest.fixture(scope="module", autouse=True)
def quiet_natten():
    os.environ.setdefault("NATTEN_LOG_LEVEL", "error")


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
class TestBesidesNatten:
    @pytest.mark.parametrize("name", natten.__all__)
    def test_signatures(self, name):
        import natten as original

        ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (natten, original))
        assert [(x.name, x.kind, x.default) for x in ours] == [(x.name, x.kind, x.default) for x in theirs]

    # NATTEN on a CPU takes values of the head dim of queries only, and additional keys by its FlexAttention backend.
    @pytest.mark.parametrize("extra", [None, 1, 7])
    @pytest.mark.parametrize("gna", CASES, ids=gna_id)
    def test_output_and_statistics(self, gna, extra):
        import natten as original

        names = ("query", "key", "value", "additional_keys", "additional_values")
        tensors = inputs(gna, extra, value_dim=16)
        given = {**dict(zip(names, tensors, strict=False)), **arguments(gna), "return_lse": True}
        operation = getattr(original, f"na{gna.ndim}d")
        theirs = operation(**given, backend="flex-fna", attention_kwargs={"backend": "flex-fmha"} if extra else None)
        assert_same("natten's", theirs, gna, tensors)
        assert_same("ours", OPERATIONS[gna.ndim - 1](**given, backend="flex-fna"), gna, tensors)

    @pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "qk_scale": 0.5}], ids=["defaults", "options"])
    @pytest.mark.parametrize("gna", CASES, ids=gna_id)
    def test_modules_load_checkpoints(self, gna, options):
        import natten as original

        theirs, ours = (
            getattr(module, f"NeighborhoodAttention{gna.ndim}D")(64, 4, **arguments(gna), **options)
            for module in (original, natten)
        )
        assert ours.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        x = torch.randn(2, *gna.layout, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
        names = ("na_dim", "embed_dim", "num_heads", "head_dim", "scale", *arguments(gna))
        assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


class TestModules:
    @pytest.mark.parametrize("gna", CASES, ids=gna_id)
    def test_output_and_gradients(self, gna):
        module = MODULES[gna.ndim - 1](64, 4, **arguments(gna), qk_scale=0.2).double()
        x = torch.randn(2, *gna.layout, 64, dtype=torch.float64, requires_grad=True)
        out = module(x)
        qkv = (x @ module.qkv.weight.T + module.qkv.bias).split(64, -1)
        attended = dense(gna, [part.unflatten(-1, (4, 16)) for part in qkv], scale=0.2).out
        expected = attended.flatten(-2) @ module.proj.weight.T + module.proj.bias
        torch.testing.assert_close(out, expected)
        wanted = [x, *module.parameters()]
        found, exact = (torch.autograd.grad(y.square().sum(), wanted) for y in (out, expected))
        torch.testing.assert_close(found, exact)

    def test_keys_of_the_checkpoint(self):
        assert list(NeighborhoodAttention2D(8, 2, 3).state_dict()) == [
            *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
        ]
        assert list(NeighborhoodAttention2D(8, 2, 3, qkv_bias=False).state_dict())[1] == "proj.weight"

    def test_dropout_of_the_projection(self):
        module = NeighborhoodAttention1D(16, 2, 3, proj_drop=1.0)
        x = torch.randn(1, 8, 16)
        assert not module(x).any()
        assert module.eval()(x).any()

    def test_repr(self):
        shown = repr(NeighborhoodAttention3D(32, 2, (3, 3, 5), is_causal=(True, False, False)))
        assert "kernel_size=(3, 3, 5), stride=(1, 1, 1), dilation=(1, 1, 1), is_causal=(True, False, False)" in shown

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_heads": 3}, r"num_heads=3 must divide embed_dim=32"),
            ({"kernel_size": 0}, r"kernel_size=0 in dimension 0: kernel_size must be at least 1, or -1"),
            ({"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\) has 3 values; give one, or one for each of 2"),
            ({"stride": 4}, r"stride=4 in dimension 0: stride must not exceed the kernel_size 3"),
            ({"dilation": (1, 0)}, r"dilation=0 in dimension 1: dilation must be at least 1"),
        ],
    )
    def test_refused_when_made(self, options, message):
        with pytest.raises(ValueError, match=message):
            NeighborhoodAttention2D(**{"embed_dim": 32, "num_heads": 2, "kernel_size": 3, **options})

    def test_refused_types_when_made(self):
        with pytest.raises(TypeError, match=r"kernel_size takes integers, .* but got 3.0"):
            NeighborhoodAttention2D(32, 2, 3.0)
        with pytest.raises(TypeError, match=r"is_causal takes True or False, .* but got 1"):
            NeighborhoodAttention2D(32, 2, 3, is_causal=1)

    def test_refused_inputs(self):
        module = NeighborhoodAttention2D(32, 2, 5, dilation=2)
        with pytest.raises(ValueError, match=r"x must be \[batch, X, Y, embed_dim=32\], but is \(1, 64, 32\)"):
            module(torch.randn(1, 64, 32))
        with pytest.raises(ValueError, match=r"kernel_size=5 in dimension 1 of layout \(10, 9\).* must not exceed 9"):
            module(torch.randn(1, 10, 9, 32))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"kernel_size": (3, 5), "dilation": 2},
                r"^kernel_size=5 in dimension 1 of layout \(6, 9\): "
                r"kernel_size \* dilation = 5 \* 2 = 10 must not exceed 9$",
            ),
            (
                {"kernel_size": 3, "stride": 4},
                r"^stride=4 in dimension 0 of layout \(6, 9\): stride must not exceed the kernel_size 3",
            ),
            ({"kernel_size": 0}, r"^kernel_size=0 in dimension 0 of layout \(6, 9\): kernel_size must be at least 1"),
            ({"kernel_size": 3, "dilation": 0}, r"^dilation=0 in dimension 0 of layout \(6, 9\): dilation must be"),
            ({"kernel_size": (3, 3, 3)}, r"^kernel_size=\(3, 3, 3\) has 3 values, but layout \(6, 9\) has 2"),
        ],
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            na2d(*inputs(GRID), **options)

    def test_kinds(self):
        with pytest.raises(TypeError, match=r"^kernel_size takes integers, .* but got 3.0"):
            na2d(*inputs(GRID), 3.0)
        with pytest.raises(TypeError, match=r"^is_causal takes True or False, .* but got 1"):
            na2d(*inputs(GRID), 3, is_causal=1)
        with pytest.raises(TypeError, match=r"na2d\(\) got an unexpected keyword argument 'rel_pos_bias'"):
            na2d(*inputs(GRID), 3, rel_pos_bias=None)

    @pytest.mark.parametrize("extra", [None, 3])
    def test_shapes(self, extra):
        q, k, v, *more = inputs(GRID, extra)
        given = dict(zip(("additional_keys", "additional_values"), more, strict=False))
        for (query, key, value), message in {
            (q.flatten(1, 2), k, v): r"na2d takes tensors \[batch, X, Y, heads, head dim\], but got query \(2, 54, 4,",
            (q, k[:, :5], v): r"must have one batch size and layout, but got .* key \(2, 5, 9, 2, 16\)",
            (q[:1], k, v): r"must have one batch size and layout, but got query \(1, 6, 9, 4, 16\)",
            (q, k[..., :8], v): r"query and key must have the same head dim",
            (q[..., :3, :], k, v): r"heads of key and value must be equal and divide the heads of query",
            (q, k, v[..., :1, :]): r"heads of key and value must be equal",
            (q, k, v.double()): r"query is torch.float32 on cpu and value torch.float64 on cpu",
            (q, k.to("meta"), v): r"query is torch.float32 on cpu and key torch.float32 on meta",
        }.items():
            with pytest.raises(ValueError, match=message):
                na2d(query, key, value, 3, **given)

    def test_additional_tokens(self):
        q, k, v, a, b = inputs(GRID, 3)
        with pytest.raises(ValueError, match="give both additional_keys and additional_values, or neither"):
            na2d(q, k, v, 3, additional_keys=a)
        for keys, values in ((a[:1], b), (a, b[:, :2]), (a[:, :, :1], b), (a, b[..., :4]), (a[0], b), (a[..., :4], b)):
            with pytest.raises(ValueError, match=r"additional_keys and additional_values must be \[batch, tokens"):
                na2d(q, k, v, 3, additional_keys=keys, additional_values=values)
        with pytest.raises(ValueError, match=r"and additional_values torch\.float16 on cpu"):
            na2d(q, k, v, 3, additional_keys=a, additional_values=b.half())

    def test_operations_of_another_rank(self):
        with pytest.raises(ValueError, match="na3d takes tensors"):
            na3d(*inputs(GRID), 3)


def test_arguments_about_kernels_have_no_effect_and_one_line(caplog):
    natten._say_ignored.cache_clear()
    caplog.set_level(logging.DEBUG, "gna_flex")
    tensors = inputs(GRID)
    expected = na2d(*tensors, 3)
    assert not caplog.records
    tuning = {"backend": "hopper-fna", "q_tile_shape": (8, 8), "kernel_schedule": "pp", "run_persistent_kernel": False}
    for _ in range(3):
        assert torch.equal(na2d(*tensors, 3, **tuning), expected)
        assert torch.equal(na2d(*tensors, 3, attention_kwargs={"backend": "hopper-fmha"}), expected)
    lines = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert lines == ["backend, q_tile_shape, run_persistent_kernel, kernel_schedule", "attention_kwargs"]


class TestMasks:
    def test_are_kept(self):
        kept.kept_mask.cache_clear()
        tensors = inputs(GRID)
        for kernel_size in (3, (3, 3), [3, 3], 3):
            na2d(*tensors, kernel_size)
        assert kept.kept_mask.cache_info().misses == 1

    def test_kept_masks_do_not_blur_kinds(self):
        na2d(*inputs(GRID), 1)
        with pytest.raises(TypeError, match="kernel_size takes integers"):
            na2d(*inputs(GRID), True)

    def test_first_call_in_inference_mode(self):
        kept.kept_mask.cache_clear()
        tensors = [x.requires_grad_() for x in inputs(GRID, 3)]
        with torch.inference_mode():
            call(GRID, tensors)
        mask = kept.kept_mask(GNA(GRID.layout, GRID.window, GRID.stride, text_last=3), torch.device("cpu"))
        assert kept.kept_mask.cache_info().misses == 1
        assert not mask.kv_indices.is_inference()
        call(GRID, tensors).sum().backward()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.parametrize(
        ("backend", "dynamic"),
        [
            ("aot_eager", None),
            pytest.param("eager", True, marks=pytest.mark.slow),
            pytest.param("inductor", None, marks=pytest.mark.slow),
        ],
    )
    def test_operations(self, backend, dynamic):
        def two_layers(q, k, v, a, b, kernel_size):
            out, lse = na2d(q * 2, k, v, kernel_size, additional_keys=a, additional_values=b, return_lse=True)
            return na2d(q, k, out.relu(), (2, 5), dilation=2, is_causal=(True, False)).relu(), lse

        compiled = torch.compile(two_layers, fullgraph=True, backend=backend, dynamic=dynamic)
        calls = ((6, 10), 3, 3), ((8, 11), 3, 3), ((6, 10), 0, [3, 4]), ((6, 10), 3, 3)
        # A graph for each size; generated code takes long.
        for layout, extra, kernel_size in calls[:1] if backend == "inductor" else calls[:2] if dynamic else calls:
            tensors = [x.requires_grad_() for x in inputs(GNA(layout, 2), extra, kv_heads=4)]
            found, expected = (f(*tensors, kernel_size) for f in (compiled, two_layers))
            torch.testing.assert_close(found, expected)
            found, expected = (torch.autograd.grad(x[0].sum() + x[1].cos().sum(), tensors) for x in (found, expected))
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("gna", CASES[::3], ids=gna_id)
    def test_modules(self, gna):
        module = MODULES[gna.ndim - 1](32, 2, **arguments(gna))
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = torch.randn(2, *gna.layout, 32)
            torch.testing.assert_close(compiled(x), module(x))

    def test_graphs_keep_their_masks(self):
        compiled = torch.compile(lambda q, k, v: na2d(q, k, v, 3), fullgraph=True, backend="eager")
        tensors = inputs(GRID)
        expected = compiled(*tensors)
        kept.kept_mask.cache_clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(*tensors), expected)
        before = len(vars(kept.masks_of_graphs))
        torch._dynamo.reset()
        assert torch.equal(compiled(*tensors), expected)
        assert len(vars(kept.masks_of_graphs)) == before

    def test_errors_name_the_argument(self):
        compiled = torch.compile(lambda q, k, v: na2d(q, k, v, 7), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"kernel_size=7 in dimension 0 of layout \(6, 9\)"):
            compiled(*inputs(GRID))


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
class TestOnGPU:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("extra", [None, 7])
    @pytest.mark.parametrize("gna", CASES[::2], ids=gna_id)
    def test_training(self, gna, extra, compiled):
        function = torch.compile(call, fullgraph=True) if compiled else call
        assert_trains(gna, inputs(gna, extra, dtype=torch.bfloat16, value_dim=16), function, "cuda")


def test_natten_is_not_imported():
    tree = ast.parse(Path(natten.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] == "natten"]
