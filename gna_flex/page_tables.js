// Histogram, tables and proof: what holds for all query tiles.

const MOST_BARS = 12;
const MOST_SHAPES = 8;

/** The histogram as a few bars [lowest, highest, query tiles]. */
function bars(histogram) {
  const values = [...histogram.keys()].sort((a, b) => a - b);
  if (values.length <= MOST_BARS) return values.map((value) => [value, value, histogram.get(value)]);
  const [low, high] = [values[0], values[values.length - 1]];
  const width = ceilDiv(high - low + 1, MOST_BARS);
  const counts = new Map();
  for (const value of values) {
    const bar = Math.floor((value - low) / width);
    counts.set(bar, (counts.get(bar) ?? 0) + histogram.get(value));
  }
  return [...counts].map(([bar, many]) => [low + bar * width, Math.min(low + (bar + 1) * width - 1, high), many]);
}

function showHistogram(scene) {
  const { all } = scene;
  const found = bars(all.histogram);
  const most = Math.max(...found.map(([, , many]) => many));
  byId("histogram-note").textContent = `Key tiles visited by each of the ${number(all.queryTiles)} query tiles: `
    + `${decimal(all.mean)} on average, dense attention visits ${number(all.dense)}. `
    + "◆ marks the tile of the query above.";
  byId("histogram").replaceChildren(element("div", { class: "histogram" }, ...found.flatMap(([low, high, many]) => {
    const row = [
      element("span", { class: "low" }, low === high ? number(low) : `${number(low)}–${number(high)}`),
      element("i", { style: `width: ${(100 * many) / most}%` }),
      element("span", {}, number(many)),
    ];
    for (const cell of row) [cell.dataset.low, cell.dataset.high] = [low, high];
    return row;
  })));
}

/** Marks the bar of the query's own tile. */
function markHistogram(scene) {
  for (const cell of byId("histogram").querySelectorAll("[data-low]")) {
    const here = Number(cell.dataset.low) <= scene.seen.visited && scene.seen.visited <= Number(cell.dataset.high);
    cell.classList.toggle("here", here);
  }
}

function fillTable(id, columns, rows) {
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  byId(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

const cells = (...values) => values.map((value) => element("td", {}, value));
const yes = (perfect) => (perfect ? element("span", { class: "yes" }, "yes") : "no");

/** The best tile shapes; `choose` takes one. */
function showRanking(scene, choose) {
  byId("ranking-note").textContent = `For queries and keys alike, ${tilingName(scene)} tiling, fastest first. `
    + `Predicted: speed-up if a partial tile costs ${data.partial_cost} full ones. Click to try one.`;
  const rows = rankShapes(scene.head, scene.anchored).slice(0, MOST_SHAPES).map(({ tile, all, work }) => {
    const button = element("button", { type: "button" }, tile.join(" × "));
    button.addEventListener("click", () => choose(tile));
    const here = same(tile, scene.qTile) && same(tile, scene.kvTile);
    const [partial, fewer] = [percent(all.partial / all.visited), times(all.dense / all.mean)];
    return element("tr", here ? { class: "here" } : {},
      ...cells(button, number(product(tile)), partial, fewer, times(data.tokens ** 2 / work)));
  });
  fillTable("ranking", ["tile", "tokens", "partial", "fewer tiles", "predicted"], rows);
}

const tilesOf = (head) => `Tiles of ${byX(head.q_tile)} queries and ${byX(head.kv_tile)} keys`;

function showSimulations({ head }) {
  const bound = times(data.tokens ** 2 / head.kept_pairs);
  byId("buys-note").textContent = `${tilesOf(head)}, with which the page began. `
    + (head.simulations.flat
      ? "Flat: blocks of as many consecutive tokens, line by line, as attention without a tile order has them. "
      : "Flat tiles are left out: too many to count quickly. ")
    + `The mean speed-up is bound by the FLOPs, ${bound} fewer, but for rounding to whole tiles.`;
  const rows = Object.entries(head.simulations).map(([name, found]) => element("tr", {}, ...cells(
    name, number(found.visited_max), decimal(found.visited_mean), number(found.dense),
    percent(found.full / found.visited), times(found.speedup), times(found.mean_speedup),
    yes(found.perfectly_block_sparse))));
  const columns = ["tiling", "tiles, most", "mean", "dense", "full", "speed-up, least", "mean", "perfect"];
  fillTable("simulations", columns, rows);
}

/** The derivation line by line; `goTo` shows the tile that disproves it. */
function showProof(scene, goTo) {
  const { head } = scene;
  byId("proof-note").textContent = `${tilesOf(head)}, ${tilingName(scene)} tiling: an argument for every query tile, `
    + "made without trying them out.";
  const lines = head.proofs[tilingName(scene)].split("\n").map((line) => {
    const indent = line.length - line.trimStart().length;
    const kind = /^\[/.test(line) ? "cited" : indent ? "" : "main";
    return element("div", { class: kind, style: `padding-left: ${indent + 2}ch` }, line.trim() || "\u00a0");
  });
  byId("proof").replaceChildren(...lines);
  const witness = head.witnesses[tilingName(scene)];
  byId("show-witness").hidden = !witness;
  byId("show-witness").onclick = () => goTo(witness);
}
