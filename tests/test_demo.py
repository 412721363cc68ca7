import io
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from gna_flex import demo
from gna_flex.demo import Picture, load_image, run_demo


@pytest.fixture(scope="module")
def small():
    return run_demo(np.random.default_rng(0).random((96, 128, 3)), window=(5, 7), device="cpu")


def test_small_image_is_right(small):
    assert small.gna.layout == (12, 16)
    assert small.gna.window == (5, 7)
    assert small.passed
    assert 0 < small.error <= small.budget < 1e-4
    assert small.window_error <= small.budget
    assert small.weights.shape == (5, 7)
    assert small.weights.sum() == pytest.approx(1)
    assert small.output.shape == small.image.shape
    assert small.route.name == "reference"


def test_a_wrong_mask_fails(monkeypatch):
    from gna_flex import GNA, gna_mask

    def one_too_many(gna, **options):
        return gna_mask(GNA(gna.layout, gna.window[0] + 1), **options)

    monkeypatch.setattr(demo, "gna_mask", one_too_many)
    result = run_demo(np.random.default_rng(0).random((96, 96, 3)), window=5, device="cpu")
    assert not result.passed
    assert result.window_error > 1000 * result.budget


def test_a_wrong_result_fails(monkeypatch):
    right = demo.flex_attention
    monkeypatch.setattr(demo, "flex_attention", lambda *args, **options: right(*args, **options) * 1.001)
    assert not run_demo(np.random.default_rng(0).random((64, 64, 3)), window=5, device="cpu").passed


def test_uniform_image_comes_back():
    image = np.broadcast_to(np.array([0.2, 0.5, 0.7]), (64, 64, 3))
    result = run_demo(image, window=3, device="cpu")
    np.testing.assert_allclose(result.output, image, atol=1e-6)


def test_photograph_is_real_and_free_of_downloads():
    pytest.importorskip("skimage")
    image = load_image()
    assert image.shape == (512, 512, 3)
    assert image.max() <= 1


@pytest.mark.slow
def test_photograph(tmp_path):
    pytest.importorskip("skimage")
    result = run_demo(device="cpu")
    assert result.gna.tokens == 4096
    assert result.passed
    # The query is on the face: it looks at skin more than at the wall in the window's upper corner.
    assert result.weights[7, 7] > 10 * result.weights[0, 0]
    assert np.abs(result.output - result.image).mean() < 0.1
    console = Console(width=80, color_system=None, file=io.StringIO(), record=True)
    console.print(result)
    text = console.export_text()
    assert "◆" in text
    assert "right" in text
    assert "┌" in text
    assert "perfectly block-sparse" in text
    pytest.importorskip("matplotlib")
    result.save_png(tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 50_000


def test_bfloat16_has_its_own_budget():
    result = run_demo(np.random.default_rng(0).random((64, 64, 3)), window=5, device="cpu", dtype=torch.bfloat16)
    assert 1e-3 < result.budget < 0.5
    assert result.passed


def test_colored_picture_has_two_rows_a_line():
    console = Console(width=80, color_system="truecolor", force_terminal=True, file=io.StringIO(), record=True)
    image = np.zeros((5, 4, 3))
    image[0, 0] = 1
    console.print(Picture(image, (4, 3), None))
    text = console.export_text(styles=True)
    assert "38;2;255;255;255;48;2;0;0;0m▀" in text
    assert text.count("\n") == 3
    assert "◆" in text


def test_images_are_cropped_and_shrunk():
    assert demo._whole_patches(np.zeros((30, 50, 3))).shape == (24, 48, 3)
    assert demo._whole_patches(np.zeros((1200, 800, 3))).shape == (400, 264, 3)
    with pytest.raises(ValueError, match="no patch"):
        demo._whole_patches(np.zeros((4, 50, 3)))


def test_query_outside_is_refused():
    with pytest.raises(ValueError, match="outside"):
        run_demo(np.zeros((64, 64, 3)), window=3, query=(8, 0), device="cpu")


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"pip install gna-flex\[demo\]"):
        load_image()


def test_a_build_for_gpus_without_a_gpu_runs_on_the_cpu(monkeypatch):
    """Such a build names its accelerator even where there is none, unless it is asked to check."""

    def named(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert run_demo(np.random.default_rng(0).random((64, 64, 3)), window=3).device == "cpu"
