import pytest

from gna_flex import GNA
from gna_flex.presets import PRESETS, preset

FLOP_SPEEDUPS = {
    "hunyuan-video": 11.11,
    "hunyuan-video-sliding": 11.11,
    "hunyuan-video-text": 10.63,
    "hunyuan-video-129f": 10.97,
    "flux-4k": 10.24,
    "cosmos": 2.29,
    "cosmos-predict2-98": 55.0,
    "cosmos-predict2-95": 18.33,
    "cosmos-predict2-92": 12.22,
    "cosmos-predict2-77": 4.4,
    "cosmos-predict2-55": 2.24,
    "lm-32k": 16.52,
    "lm-32k-strided": 16.0,
    "dense-32k": 1.0,
    "ltx-2.5-decoder-5": 2234.18,
}


@pytest.mark.parametrize("name", FLOP_SPEEDUPS)
def test_flop_speedup(name):
    gna = preset(name).gna
    assert gna.tokens**2 / gna.kept_pairs() == pytest.approx(FLOP_SPEEDUPS[name], abs=0.006)


@pytest.mark.parametrize("share", [98, 95, 92, 77, 55])
def test_cosmos_predict2_layers_are_named_by_what_they_skip(share):
    gna = preset(f"cosmos-predict2-{share}").gna
    assert 100 * (1 - gna.kept_pairs() / gna.tokens**2) == pytest.approx(share, abs=0.6)


def test_published_parameters():
    assert preset("hunyuan-video").gna == GNA((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert preset("hunyuan-video-129f").gna.tokens == 33 * 45 * 80 + 256
    assert preset("hunyuan-video-text").gna == GNA((30, 48, 80), (18, 24, 24), (16, 8, 8), text_last=256)
    assert preset("flux-4k-text").gna == GNA((256, 256), 80, 16, text_first=512)
    assert preset("flux-4k-sliding-text").gna == GNA((256, 256), 80, text_first=512)
    assert preset("lm-32k-strided").gna == GNA(32768, 2048, 256)
    assert preset("cosmos").gna == GNA((16, 44, 80), (16, 32, 48), (1, 16, 16))
    assert preset("ltx-2.5-decoder-5-1080p").gna.tokens == 15_797_760
    assert preset("dinov2-518").gna.tokens == 5 + 37 * 37


def test_every_preset_says_what_and_where_from():
    for name, entry in PRESETS.items():
        assert entry.name == name
        assert entry.note
        assert entry.source
        assert entry.heads > 0
        assert entry.head_dim % 16 == 0


@pytest.mark.parametrize(
    ("name", "near"), [("hunyan-video", "hunyuan-video"), ("FLUX-4K-slidin", "flux-4k-sliding"), ("wan", "wan-720p")]
)
def test_unknown_name_lists_near_ones(name, near):
    with pytest.raises(ValueError, match="did you mean") as caught:
        preset(name)
    assert near in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", "qqqq"])
def test_unlike_any_name_lists_all(name):
    with pytest.raises(ValueError, match="presets are") as caught:
        preset(name)
    assert all(known in str(caught.value) for known in PRESETS)
