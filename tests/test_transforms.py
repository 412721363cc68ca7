"""torch.func, second derivatives, export: for the reference, and for the kernel's operator, which a CPU has as well."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from gna_flex import GNA, backend, flex_attention, gna_mask, reference_attention, routing
from gna_flex.reference_backward import reference_backward

NEAR = GNA((6, 5), (3, 2), text_last=3)
MASK = gna_mask(NEAR, device="cpu")
ROUTES = ("reference", "hopper")


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Every call takes this route; nothing stands in the way of the kernel."""
    monkeypatch.setattr(routing, "_kernel_obstacle", lambda name, facts: "")
    routing._choose.cache_clear()
    with backend(request.param):
        yield request.param
    routing._choose.cache_clear()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, block_mask=MASK, enable_gqa=True)


def inputs(*sizes: int) -> list[Tensor]:
    """Query with four heads, key and value with two, double precision; ``sizes`` come before the batch."""
    return [torch.randn(*sizes, 2, heads, NEAR.tokens, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def close(got, wanted) -> None:
    """The operator's log-sum-exp, from which its backward takes the weights, is float32."""
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    out = reference_attention(*tensors, MASK.mask_mod)[0]
    return torch.autograd.grad(out.pow(3).sum(), tensors)


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).pow(3).sum()


def test_grad(route):
    tensors = inputs()
    grads = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    close(grads, gradients(*tensors))


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, None), (1, 0, 2), (None, 3, 0)])
def test_vmap(route, dims):
    tensors = inputs()
    several = [
        x if d is None else inputs(5)[i].movedim(0, d) for i, (x, d) in enumerate(zip(tensors, dims, strict=True))
    ]
    out = torch.func.vmap(attend, in_dims=dims)(*several)
    for i in range(5):
        one = [x if d is None else x.select(d, i) for x, d in zip(several, dims, strict=True)]
        torch.testing.assert_close(out[i], attend(*one))


def test_gradients_of_every_sample(route):
    tensors = inputs(5)
    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*tensors)
    for i in range(5):
        wanted = gradients(*(x[i] for x in tensors))
        close(tuple(grad[i] for grad in grads), wanted)


def test_jacobian(route):
    q, k, v = inputs()

    def few(q: Tensor) -> Tensor:
        return attend(q, k, v)[0, 0, :3, 0]

    jacobian = torch.func.jacrev(few)(q)
    query = q.clone().requires_grad_()
    exact = reference_attention(query, k, v, MASK.mask_mod)[0][0, 0, :3, 0]
    rows = [torch.autograd.grad(one, query, retain_graph=True)[0] for one in exact]
    close(jacobian, torch.stack(rows))


def test_lengths_of_text_under_vmap(route):
    tensors = inputs(5)
    mask = MASK.with_valid_text(last=[0, 2])
    out = torch.func.vmap(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))(*tensors)
    for i in range(5):
        one = [x[i] for x in tensors]
        torch.testing.assert_close(out[i], reference_attention(*one, mask.mask_mod)[0])


def test_second_derivatives_are_right_or_refused(route):
    q, k, v = (x.requires_grad_() for x in inputs())
    (grad,) = torch.autograd.grad(attend(q, k, v).pow(3).sum(), q, create_graph=True)
    # Beside another term torch alone would not notice that a part is missing.
    total = grad.square().sum() + q.sum()
    if route == "hopper":
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            torch.autograd.grad(total, (q, k, v))
        return
    (wanted,) = torch.autograd.grad(reference_attention(q, k, v, MASK.mask_mod)[0].pow(3).sum(), q, create_graph=True)
    exact = torch.autograd.grad(wanted.square().sum() + q.sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(total, (q, k, v)), exact)


def test_forward_mode_is_right_or_refused(route):
    q, k, v = inputs()
    tangent = torch.randn_like(q)

    def directly() -> Tensor:
        with forward_ad.dual_level():
            out = attend(forward_ad.make_dual(q, tangent), k, v)
            return forward_ad.unpack_dual(out).tangent

    ways = (lambda: torch.func.jvp(lambda q: attend(q, k, v), (q,), (tangent,))[1], directly)
    for way in ways:
        if route == "hopper":
            with pytest.raises(NotImplementedError, match="jvp"):
                way()
        else:
            step = 1e-6
            wanted = (attend(q + step * tangent, k, v) - attend(q - step * tangent, k, v)) / (2 * step)
            torch.testing.assert_close(way(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("of_lse", [True, False], ids=["with a gradient of the log-sum-exp", "without"])
@pytest.mark.parametrize("lengths", [None, [[0, 3], [0, 1]]])
def test_the_operators_backward(lengths, of_lse):
    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    mask = MASK if valid is None else MASK.counting(valid)
    tensors = [x.requires_grad_() for x in inputs()]
    out, lse, _ = reference_attention(*tensors, mask.mask_mod, scale=0.3)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if of_lse else None
    wanted = torch.autograd.grad((out, lse)[: 1 + of_lse], tensors, (grad_out, grad_lse)[: 1 + of_lse])
    arguments = (*tensors, out, lse, grad_out, grad_lse, *mask.lists, 0.3, valid)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.testing.assert_close(torch.ops.gna_flex.attention_backward(*plain), wanted)
    torch.library.opcheck(torch.ops.gna_flex.attention_backward, plain)


class Backwards(TorchDispatchMode):
    """Notes which gradients the operator's backward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.gna_flex.attention_backward.default:
            grad_out, grad_lse = args[5:7]
            self.given.append((bool(grad_out.any()), grad_lse is not None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)], ids=["out", "lse", "both"])
@pytest.mark.usefixtures("fresh_compiler")
def test_results_that_nobody_uses_have_no_gradients(used, compiled):
    tensors = [x.requires_grad_() for x in inputs()]
    weights = torch.randn(2, 4, NEAR.tokens, dtype=torch.float64)

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        terms = ((out.sum(-1) * weights).sum(), (lse * weights).sum())
        return sum(term for term, wanted in zip(terms, used, strict=True) if wanted)

    def attention(*x: Tensor) -> Tensor:
        return loss(*torch.ops.gna_flex.attention(*x, *MASK.lists, 0.3))

    found = (torch.compile(attention, backend="aot_eager") if compiled else attention)(*tensors)
    with Backwards() as backwards:
        grads = torch.autograd.grad(found, tensors)
    wanted = loss(*reference_attention(*tensors, MASK.mask_mod, scale=0.3)[:2])
    close(grads, torch.autograd.grad(wanted, tensors, materialize_grads=True))
    assert backwards.given == [used]


class Layer(nn.Module):
    """A layer of a model: projections around attention."""

    def __init__(self, door):
        super().__init__()
        self.qkv, self.door = nn.Linear(16, 48), door

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        return self.door(q, k, v, block_mask=MASK).transpose(1, 2).flatten(2)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("door", [flex_attention, torch_flex_attention])
def test_export_round_trip(route, door, strict):
    # torch's front end refuses tensors on a CPU that want gradients.
    layer = Layer(door).requires_grad_(False)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        layer, (torch.randn(2, NEAR.tokens, 16),), strict=strict, dynamic_shapes=({0: batch},)
    )
    operators = [node.target for node in program.graph.nodes if "gna_flex" in str(node.target)]
    assert operators == ([torch.ops.gna_flex.attention.default] if route == "hopper" else [])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, NEAR.tokens, 16)
    torch.testing.assert_close(torch.export.load(file).module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch 2.11 for CUDA crashes while loading packages for a CPU")
@pytest.mark.usefixtures("fresh_compiler")
def test_ahead_of_time_compilation(route, tmp_path):
    layer = Layer(flex_attention).requires_grad_(False)
    x = torch.randn(2, NEAR.tokens, 16)
    program = torch.export.export(layer, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), layer(x))


def test_reference_backward_of_a_query_that_sees_nothing():
    tensors = [x.requires_grad_() for x in inputs()]
    gone = lambda b, h, q, k: (q != 4) & MASK.mask_mod(b, h, q, k)  # noqa: E731
    out, lse, _ = reference_attention(*tensors, gone)
    grad_out = torch.randn_like(out)
    wanted = torch.autograd.grad(out, tensors, grad_out)
    plain = [x.detach() for x in (*tensors, out, lse, grad_out, torch.zeros_like(lse))]
    grads = reference_backward(*plain, gone, 8**-0.5)
    torch.testing.assert_close(grads, wanted)
