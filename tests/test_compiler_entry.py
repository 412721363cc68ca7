"""The backend "gna_flex" by its name, ``recognise_masks`` inside of Inductor, and ``compile_report``."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_masks import CAUSAL, MASK, STYLES, assert_right, block_mask, compiled, linear_bias, only, plain, tensors

import gna_flex
from gna_flex import compile_report, recognise_masks, reference_attention
from gna_flex.dynamo.backend import gna_flex_backend

pytestmark = pytest.mark.usefixtures("fresh_compiler", "no_reports")

ROOT = Path(gna_flex.__file__).parent.parent


def test_report(route, caplog):
    assert str(compile_report()) == "no FlexAttention call was compiled"
    qkv = tensors()
    with caplog.at_level(logging.DEBUG, "gna_flex"):
        compiled(plain)(*qkv, MASK)
        compiled(plain)(*qkv, MASK, linear_bias)
    result = compile_report()
    assert (len(result.graphs), result.routed) == (2, 1)
    text = str(result)
    assert re.search(r"foreign_masks\.py:\d+ +layout 64, window 64, causal.* hopper +for a test", text), text
    assert re.search(r"left alone +it has a score_mod", text), text
    assert "1 of 2 FlexAttention calls take our routes" in text
    assert json.loads(json.dumps(result.to_json()))["routed"] == 1
    assert len(compile_report(last=1).calls) == 1
    assert len(compile_report(last=9).calls) == 2
    assert "1 of 1 FlexAttention calls" in caplog.text
    assert "it has a score_mod" in caplog.text
    with pytest.raises(ValueError, match="last=-1"):
        compile_report(last=-1)


SCRIPT = """
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
assert "gna_flex" in torch._dynamo.list_backends()
import sys
assert "gna_flex" not in sys.modules
mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu")
qkv = [torch.randn(1, 1, 64, 16) for _ in range(3)]
expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
given = {}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_fusion_size": 8}}
for count, options in enumerate(given, 1):
    torch._dynamo.reset()
    model = torch.compile(lambda *qkv: flex_attention(*qkv, block_mask=mask), backend="gna_flex", **options)
    torch.testing.assert_close(model(*qkv), expected)
    import gna_flex
    calls = gna_flex.compile_report().calls
    assert len(calls) == count
    assert "nothing of ours is better here" in calls[-1].reason, calls
"""


@pytest.mark.slow
def test_the_name_is_found_without_an_import(tmp_path):
    """An installation is a folder with metadata beside the package."""
    (tmp_path / "gna_flex").symlink_to(ROOT / "gna_flex")
    metadata = tmp_path / "gna_flex-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gna-flex\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + entry_point() + "\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def entry_point():
    """The line of pyproject.toml as metadata have it."""
    toml = (ROOT / "pyproject.toml").read_text()
    name, target = re.search(r'\[project\.entry-points\.torch_dynamo_backends\]\n(\w+) = "(.*)"', toml).groups()
    return f"{name} = {target}"


def test_entry_point():
    name, target = entry_point().split(" = ")
    module, function = target.split(":")
    assert name == "gna_flex"
    assert getattr(sys.modules[module], function) is gna_flex_backend


@pytest.mark.parametrize("given", [{}, {"mode": "reduce-overhead"}, {"options": {"x": 1}}])
def test_options_reach_inductor(monkeypatch, given):
    seen = []

    def inductor(mode, options):
        seen.append((mode, options))
        return lambda graph, inputs: graph

    monkeypatch.setattr("gna_flex.dynamo.backend.inductor", inductor)
    torch.compile(torch.sin, backend=gna_flex_backend, **given)(torch.zeros(2))
    assert seen == [(given.get("mode"), given.get("options"))]


def config():
    from torch._inductor import config

    return config.pre_grad_custom_pass


def test_recognise_masks_is_undone():
    before = config()
    with recognise_masks():
        assert config() is not before
        with recognise_masks():
            pass
    assert config() is before
    with pytest.raises(KeyError), recognise_masks():
        raise KeyError
    assert config() is before


@pytest.mark.slow
def test_recognise_masks(route):
    from torch._inductor import config

    mod, gna = STYLES["clamped"]
    qkv = tensors()
    graphs = []
    with config.patch(pre_grad_custom_pass=graphs.append), recognise_masks():
        function = torch.compile(lambda *args: plain(*args).relu(), fullgraph=True)
        out = function(*qkv, block_mask(mod))
    torch.testing.assert_close(out, reference_attention(*qkv, mod)[0].relu())
    assert (only().gna, only().route) == (gna, "hopper")
    assert graphs
    mask = block_mask(mod)
    mask.kv_num_blocks[..., 1] = 1
    with pytest.raises(RuntimeError, match="have changed"):
        function(*qkv, mask)


@pytest.mark.slow
def test_backend_inside_of_recognise_masks(route):
    qkv = tensors()
    with recognise_masks():
        out = torch.compile(plain, backend=gna_flex_backend)(*qkv, MASK)
    assert_right(out, qkv, CAUSAL)
    assert only().route == "hopper"
