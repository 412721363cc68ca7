"""The HTML page in a headless browser: it shows what the dense rule says."""

import importlib.util
import itertools
import random
import shutil

import numpy as np
import pytest
from helpers import dense_mask, dim_mask, gna_id

from gna_flex import GNA
from gna_flex.page import page_data, save_page
from gna_flex.presets import preset
from gna_flex.simulate import simulate

CASES = [
    (GNA(200, 17), 16, None),
    (GNA(131, 40, 12, causal=True), (32,), (16,)),
    (GNA(150, 9, 4, dilation=7), (8,), (4,)),
    (GNA(70, 20, 7, text_first=9, text_last=33), (8,), (16,)),
    (GNA((20, 26), (9, 8), (1, 4)), (4, 8), (4, 4)),
    (GNA((24, 24), 8, 8, text_first=70), (8, 8), None),
    (GNA((19, 30), (3, 4), (2, 3), (4, 3), text_last=5), (2, 4), (3, 2)),
    (GNA((16, 21), (5, 7), (2, 1), causal=(True, False)), (4, 4), (2, 8)),
    (GNA((7, 9, 11), (3, 5, 4), (1, 3, 2)), (2, 4, 4), None),
    (GNA((6, 8, 10), (3, 2, 5), (3, 2, 1), (1, 3, 2), (True, False, False), text_first=3), (2, 2, 2), (1, 3, 2)),
]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
browser_needed = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER and importlib.util.find_spec("selenium")),
    reason="needs selenium, Chromium and chromedriver",
)

VISIT = """
const [links, done] = [arguments[0], arguments[1]];
const states = [];
function next() {
  if (states.length === links.length) return done(states);
  addEventListener("hashchange", () => { states.push(gnaPage.state()); next(); }, { once: true });
  location.hash = links[states.length] + "&step=" + states.length;
}
next();
"""


class Browser:
    """A headless Chromium that opens pages and complains about whatever it logs or loads."""

    def __init__(self, folder):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        self.driver.set_script_timeout(60)
        self.file = folder / "page.html"

    def open(self, gna, link="", width=1200, **options):
        self.resize(width)
        save_page(self.file, gna, **options)
        self.driver.get("about:blank")
        self.driver.get(self.file.as_uri() + link)
        return self.state()

    def resize(self, width):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def state(self):
        return self.run("return gnaPage.state()")

    def visit(self, links):
        """The state after each of the links."""
        return self.driver.execute_async_script(VISIT, links)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def mouse(self, *places, held=False):
        """Presses at the first place, drags to the others and lets go; places are queries."""
        for step, query in enumerate(places):
            at = self.run("return gnaPage.locate(arguments[0])", query)
            kinds = (["mousePressed"] if step == 0 else []) + ["mouseMoved"] * (step > 0)
            for kind in kinds:
                self._pointer(kind, at)
        if not held:
            self._pointer("mouseReleased", at)

    def _pointer(self, kind, at):
        event = {"type": kind, "button": "left", "buttons": 1, "clickCount": 1, **at}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def keys(self, *keys, on="#grid"):
        self.find(on).send_keys(*keys)

    def complaints(self):
        loaded = self.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        return [entry["message"] for entry in self.driver.get_log("browser")] + loaded


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("page"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    yield chromium
    assert chromium.complaints() == []


def labels(gna, kv_block, kv_tile, origins):
    """The key tile of every token: dilation group and tile per dimension, or a block of text."""
    grid = []
    for x, (length, _, _, dilation, _), side, origin in zip(
        np.indices(gna.layout).reshape(gna.ndim, -1), gna.dims(), kv_tile, origins, strict=True
    ):
        assert x.max() == length - 1
        grid += [x % dilation, (x // dilation - origin) // side]
    columns = np.stack(grid, 1)
    texts = [
        np.stack([np.full(count, -9 - side)] + [np.arange(count) // kv_block] * (columns.shape[1] - 1), 1)
        for side, count in enumerate((gna.text_first, gna.text_last))
    ]
    return np.concatenate([texts[0], columns, texts[1]])


def queries_of_tile(gna, query, q_tile):
    """Tokens of the query tile of one query."""
    axes = []
    for q, (length, _, _, dilation, _), side in zip(query, gna.dims(), q_tile, strict=True):
        group = range(q % dilation, length, dilation)
        axes.append([x for x in group if x // dilation // side == q // dilation // side])
    tokens = [int(np.ravel_multi_index(each, gna.layout)) for each in itertools.product(*axes)]
    return [each[0] for each in axes], [gna.text_first + token for token in tokens]


def counted(gna, keep, query, q_tile, kv_tile, tiling):
    """Full and partial key tiles of the query tile of one query, from the dense mask."""
    first, tokens = queries_of_tile(gna, query, q_tile)
    origins = [0] * gna.ndim
    if tiling == "anchored":
        origins = [int(dim_mask(*dim)[x].argmax()) // dim[3] for dim, x in zip(gna.dims(), first, strict=True)]
    _, tile = np.unique(labels(gna, int(np.prod(kv_tile)), kv_tile, origins), axis=0, return_inverse=True)
    kept = keep[tokens]
    some, every = np.bincount(tile.ravel(), kept.any(0)), np.bincount(tile.ravel(), kept.all(0))
    full = int((every == np.bincount(tile.ravel())).sum())
    return full, int((some > 0).sum()) - full


def by_x(tile):
    return "x".join(map(str, tile))


@browser_needed
@pytest.mark.parametrize(("gna", "q_tile", "kv_tile"), CASES, ids=gna_id)
def test_counts_are_those_of_the_dense_rule(browser, gna, q_tile, kv_tile):
    start = browser.open(gna, q_tile=q_tile, kv_tile=kv_tile)
    rng = random.Random(repr(gna))
    q_tile, kv_tile = tuple(start["q_tile"]), tuple(start["kv_tile"])
    corners = [(0,) * gna.ndim, tuple(n - 1 for n in gna.layout)]
    queries = corners + [tuple(rng.randrange(n) for n in gna.layout) for _ in range(10)]
    wanted = [(query, tiling) for query in queries for tiling in ("static", "anchored")]
    tiles = f"tile={by_x(q_tile)}&kv={by_x(kv_tile)}"
    links = [f"#q={','.join(map(str, query))}&{tiles}&tiling={tiling}" for query, tiling in wanted]
    keep = dense_mask(gna)
    for (query, tiling), state in zip(wanted, browser.visit(links), strict=True):
        assert (tuple(state["query"]), state["tiling"]) == (query, tiling)
        full, partial = counted(gna, keep, query, q_tile, kv_tile, tiling)
        assert (state["full"], state["partial"], state["visited"]) == (full, partial, full + partial), (query, tiling)
        for k, (x, dim) in enumerate(zip(query, gna.dims(), strict=True)):
            lo, hi = state["window"][k]
            assert [j * dim[3] + x % dim[3] for j in range(lo, hi)] == np.flatnonzero(dim_mask(*dim)[x]).tolist()


@browser_needed
@pytest.mark.parametrize(("gna", "q_tile", "kv_tile"), CASES, ids=gna_id)
@pytest.mark.parametrize("tiling", ["static", "anchored"])
def test_sums_are_those_of_the_simulation(browser, gna, q_tile, kv_tile, tiling):
    browser.open(gna, q_tile=q_tile, kv_tile=kv_tile)
    start = browser.state()
    link = f"#tile={by_x(start['q_tile'])}&kv={by_x(start['kv_tile'])}&tiling={tiling}"
    (state,) = browser.visit([link])
    found = simulate(gna, q_tile, kv_tile, tiling=tiling)
    every = state["all"]
    assert [tuple(pair) for pair in every["histogram"]] == list(found.histogram)
    assert (every["visited"], every["full"], every["max"]) == (found.visited, found.full, found.visited_max)
    assert (every["queryTiles"], every["dense"]) == (found.query_tiles, found.dense)
    assert every["mean"] == pytest.approx(found.visited_mean)


@browser_needed
def test_stride_groups_and_leaders(browser):
    browser.open(GNA((20, 21), (9, 6), (4, 6), (1, 2)))
    states = browser.visit([f"#q={y},{x}" for y, x in [(0, 0), (17, 20), (19, 13), (7, 5)]])
    found = [(state["stride_group"], state["leader"]) for state in states]
    # Odd columns have 10 tokens, so their second group has 4.
    assert found == [
        ([[0, 4], [0, 6]], [2, 3]),
        ([[16, 20], [6, 11]], [18, 9]),
        ([[16, 20], [6, 10]], [18, 9]),
        ([[4, 8], [0, 6]], [6, 3]),
    ]


@browser_needed
@pytest.mark.parametrize("gna", [GNA(4000, 50), GNA((48, 64), 24), GNA((30, 48, 80), (18, 24, 24))], ids=gna_id)
def test_pointer_and_keys_move_the_query(browser, gna):
    from selenium.webdriver.common.keys import Keys

    start = browser.open(gna)["query"]
    near, far = [*start], [*start]
    near[-1] += 3
    far[-1] -= 5
    browser.mouse(near)
    assert browser.state()["query"] == near
    browser.mouse(near, start, far)
    assert browser.state()["query"] == far
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert browser.state()["query"][-1] == far[-1] + 1
    if gna.ndim > 1:
        browser.keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_DOWN)
        assert browser.state()["query"][-2] == start[-2] - 2
    browser.keys(Keys.HOME, "+", "+", "-", "0", Keys.SHIFT + Keys.ARROW_LEFT)
    state = browser.state()
    assert state["query"][-1] == far[-1] + 1 - state["q_tile"][-1]


@browser_needed
def test_a_query_beyond_the_edge_stays_inside(browser):
    from selenium.webdriver.common.keys import Keys

    browser.open(GNA((12, 14), 5), "#q=0,13")
    browser.keys(Keys.ARROW_UP, Keys.ARROW_RIGHT)
    assert browser.state()["query"] == [0, 13]


@browser_needed
def test_slider_picks_the_plane_and_the_query_stays(browser):
    from selenium.webdriver.common.keys import Keys

    start = browser.open(GNA((30, 24, 24), (9, 8, 8)))
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, on="#plane")
    state = browser.state()
    assert (state["plane"], state["query"]) == (17, start["query"])
    assert "in the window" in browser.text("#plane-note")
    browser.keys(Keys.END, on="#plane")
    assert browser.state()["plane"] == 29
    assert "not visited" in browser.text("#plane-note")
    browser.mouse([29, 3, 4])
    assert browser.state()["query"] == [29, 3, 4]
    browser.keys(Keys.PAGE_UP)
    assert (browser.state()["query"], browser.state()["plane"]) == ([28, 3, 4], 28)


@browser_needed
def test_strips_move_one_coordinate(browser):
    browser.open(GNA((40, 60), 9, dilation=(1, 2)), "#q=20,31")
    strip = browser.find("#strips [data-k='1']")
    box = browser.run("arguments[0].scrollIntoView(); return arguments[0].getBoundingClientRect().toJSON()", strip)
    at = {"x": box["x"] + 0.99 * box["width"], "y": box["y"] + 20}
    browser._pointer("mousePressed", at)
    browser._pointer("mouseReleased", at)
    assert browser.state()["query"] == [20, 59]


@browser_needed
def test_numbers_can_be_typed(browser):
    browser.open(GNA((40, 60), 9))
    field = browser.find("#place label:nth-child(2) input")
    field.clear()
    field.send_keys("7\n")
    assert browser.state()["query"] == [20, 7]


@browser_needed
def test_controls_choose_tiles_tiling_and_head(browser):
    from selenium.webdriver.support.ui import Select

    heads = [GNA((48, 64), 24, 8), GNA((48, 64), 12, dilation=2)]
    browser.open(heads)
    Select(browser.find("#q-tile")).select_by_value("8x8")
    state = browser.state()
    assert state["q_tile"] == state["kv_tile"] == [8, 8]
    assert browser.text("#verdict") == "Perfectly block-sparse"
    Select(browser.find("#kv-tile")).select_by_value("16x16")
    assert browser.state()["q_tile"] == [8, 8]
    assert browser.state()["kv_tile"] == [16, 16]
    assert browser.text("#verdict") == "Not perfectly block-sparse"
    browser.run("document.querySelector('[value=anchored]').click()")
    assert browser.state()["tiling"] == "anchored"
    assert not browser.find("#order").is_displayed()
    Select(browser.find("#head")).select_by_index(1)
    assert browser.state()["head"] == 1
    browser.run("document.querySelector('[value=group]').click()")
    assert browser.state()["draw"] == "group"
    browser.mouse([10, 12])
    assert browser.state()["query"] == [10, 12]
    browser.find("#ranking tbody tr:nth-child(3) button").click()
    state = browser.state()
    assert list(map(str, state["q_tile"])) == browser.text("#ranking tr.here button").split()[::2]


@browser_needed
@pytest.mark.parametrize("tiling", ["static", "anchored"])
def test_the_witness_of_the_proof_is_shown(browser, tiling):
    gna = GNA((20, 30), (9, 8), (1, 4), (1, 2))
    browser.open(gna, f"#tiling={tiling}&tile=8x8", q_tile=4)
    (head,) = page_data(gna, q_tile=4)["heads"]
    assert browser.text("#proof").splitlines()[0] == head["proofs"][tiling].splitlines()[0]
    browser.run("document.getElementById('show-witness').click()")
    state = browser.state()
    assert state["query"] == head["witnesses"][tiling]
    assert state["q_tile"] == [4, 4]
    assert state["partial"] > 0
    browser.open(GNA((24, 32), 8, 8), q_tile=(8, 8))
    assert not browser.find("#show-witness").is_displayed()


@browser_needed
def test_links_bring_a_view_back(browser):
    gna = [GNA((10, 16, 16), 5, dilation=(1, 2, 1)), GNA((10, 16, 16), 5, 2)]
    link = "#q=3,4,5&tile=4x4x4&kv=2x8x4&tiling=anchored&t=6&head=0&draw=group&zoom=2"
    state = browser.open(gna, link)
    assert state["link"] == link
    assert (state["plane"], state["q_tile"], state["kv_tile"]) == (6, [4, 4, 4], [2, 8, 4])
    browser.run("document.querySelector('[value=static]').click()")
    browser.driver.execute_async_script("setTimeout(arguments[0], 350)")
    assert browser.run("return location.hash") == link.replace("anchored", "static")


@browser_needed
@pytest.mark.parametrize("link", ["#q=99,1", "#q=1", "#q=a,b&tile=0x0&head=7&t=x&zoom=-1", "#q=1.5,2&tiling=e", "#&&="])
def test_wrong_links_show_the_beginning(browser, link):
    gna = GNA((16, 20), 5)
    beginning = browser.open(gna)
    assert browser.open(gna, link) == beginning


@browser_needed
@pytest.mark.parametrize("width", [400, 700, 1400])
@pytest.mark.parametrize("name", ["hunyuan-video-129f", "flux-4k-text", "lm-32k", "cosmos-predict2-98"])
def test_page_fits_its_width(browser, name, width):
    gna = preset(name).gna
    dense = GNA.dense(gna.layout, text_first=gna.text_first, text_last=gna.text_last)
    browser.open([gna, dense], width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    browser.resize(1000)
    assert browser.run("return document.documentElement.scrollWidth") <= 1000


@browser_needed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_full_and_partial_tiles_have_their_colours(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.open(GNA((48, 64), 24), "#q=20,40&tile=8x8")
    script = """
      const color = getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim();
      const grid = document.getElementById("grid");
      const [at, box] = [gnaPage.locate(arguments[1]), grid.getBoundingClientRect()];
      const copy = document.createElement("canvas").getContext("2d");
      copy.drawImage(grid, box.x - at.x, box.y - at.y);
      const pixel = [...copy.getImageData(0, 0, 1, 1).data.slice(0, 3)];
      return [color, "#" + pixel.map((c) => c.toString(16).padStart(2, "0")).join("")];
    """
    for name, query in (("--full", [20, 44]), ("--skipped", [45, 3])):
        color, pixel = browser.run(script, name, query)
        assert pixel == color
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@browser_needed
def test_large_layouts_answer_quickly(browser):
    browser.open(GNA((121, 360, 368), (61, 101, 101)))
    took = browser.run("""
      const start = performance.now();
      const grid = document.getElementById("grid");
      for (let step = 0; step < 20; step++) grid.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      return (performance.now() - start) / 20;
    """)
    assert took < 150
