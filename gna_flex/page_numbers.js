// Words and numbers: the verdict on the tiles, one query and its tile, the legend, text tokens.

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const decimal = (value) => number(Math.round(value * 10) / 10);
const same = (a, b) => byX(a) === byX(b);
const plural = (many, what) => `${number(many)} ${what}${many === 1 ? "" : "s"}`;
const tilingName = ({ anchored }) => (anchored ? "anchored" : "static");
const isDilated = ({ head }) => head.dims.some((dim) => dim.dilation > 1);
const SVG = ["svg", "rect", "line", "path", "circle"];

/** A factor with the digits that matter. */
function times(factor) {
  return `${factor >= 1000 ? number(Math.round(factor)) : factor.toFixed(factor < 100 ? 2 : 1)}×`;
}

/** A share that tells little from none, and much from all. */
function percent(share) {
  if (share === 0 || share === 1) return `${100 * share}%`;
  return share < 0.01 ? `${Number((100 * share).toPrecision(2))}%` : `${(100 * share).toFixed(share > 0.99 ? 2 : 1)}%`;
}

/** An element with attributes and children; text is never read as HTML. */
function element(name, attributes = {}, ...children) {
  const made = SVG.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function showVerdict(scene) {
  const { all, head } = scene;
  const [pairs, partial] = [head.kept_pairs / data.tokens ** 2, all.partial / all.visited];
  const title = byId("verdict");
  title.className = partial === 0 && pairs < 1 ? "perfect" : "";
  title.textContent = pairs === 1 ? "Dense attention"
    : partial === 0 ? "Perfectly block-sparse" : "Not perfectly block-sparse";
  byId("mask").textContent = data.title === head.label ? head.label : `${data.title} · ${head.label}`;
  byId("lead").textContent = pairs === 1 ? "The mask keeps every pair: there is nothing to skip."
    : leadOf(scene, partial);
  const figures = [
    [number(data.tokens), "tokens"],
    [percent(pairs), "of the pairs kept"],
    [times(1 / pairs), "fewer FLOPs: the bound"],
    [times(all.dense / all.max), "fewer tiles at worst"],
    [times(all.dense / all.mean), "fewer tiles on average"],
    [percent(1 - partial), "of visited tiles full", partial === 0],
  ];
  byId("figures").replaceChildren(...figures.map(([value, label, good]) =>
    element("div", {}, element("dt", {}, label), element("dd", good ? { class: "good" } : {}, value))));
}

function leadOf(scene, partial) {
  const tiles = same(scene.qTile, scene.kvTile) ? byX(scene.qTile)
    : `${byX(scene.qTile)} queries and ${byX(scene.kvTile)} keys`;
  return `With ${tilingName(scene)} tiles of ${tiles}, ` + (partial === 0
    ? "every tile that is visited is full: no mask is evaluated, and the tiles skip all that the mask skips."
    : `${percent(partial)} of the visited tiles are partial: the mask is evaluated there, and some work is in vain.`);
}

/** Values of each dimension with its name. */
function spelled(values) {
  return values.map((value, k) => (data.names.length > 1 ? `${data.names[k]} ${value}` : value)).join(", ");
}

const stretch = (first, last) => (first === last ? `${first}` : `${first}–${last}`);

/** Coordinates of the keys of a query along one dimension. */
function coordinates(dim, at) {
  const [first, last] = [at.lo, at.hi - 1].map((i) => at.group + i * dim.dilation);
  return stretch(first, last) + (dim.dilation > 1 && first < last ? ` step ${dim.dilation}` : "");
}

/** With whom the query shares its window. */
function sharing({ head, query }) {
  const groups = head.dims.map((dim, k) => strideGroup(dim, query[k]));
  const members = number(product(groups.map(([begin, end]) => end - begin)));
  const leader = head.dims.map((dim, k) => (query[k] % dim.dilation) + dim.leader[query[k]] * dim.dilation);
  if (members === "1") return "It is its own leader: its stride group holds no other query.";
  const causal = head.dims.some((dim) => dim.causal);
  const what = causal ? "The start of its window is that of" : "It shares its window with";
  return `${what} its stride group: ${members} queries, leader (${leader.join(", ")}).`;
}

function showNumbers(scene) {
  const { head, query, seen } = scene;
  const ats = head.dims.map((dim, k) => place(dim, query[k]));
  const [text, keys] = [sum(data.text), product(ats.map((at) => at.hi - at.lo)) + sum(data.text)];
  byId("place").querySelectorAll("input").forEach((input, k) => { input.value = query[k]; });
  const window = spelled(head.dims.map((dim, k) => coordinates(dim, ats[k])));
  const seenText = text ? `, and ${plural(text, "text token")}` : "";
  byId("query-note").textContent =
    `It sees ${number(keys)} of ${number(data.tokens)} keys: ${window}${seenText}. ${sharing(scene)}`;
  byId("facts").replaceChildren(
    ...fact("", "key tiles visited", number(seen.visited), `of ${number(seen.dense)}`),
    ...fact("full", "full", number(seen.full)),
    ...fact("partial", "partial", number(seen.partial)),
    ...fact("", "keys loaded", number(product(seen.axes.map(loadedAlong)) + text)),
    ...fact("", "seen by this query", number(keys)),
    ...fact("", "computed pairs that count", percent(usefulShare(scene))),
  );
  const group = isDilated(scene) ? ` of dilation group (${ats.map((at) => at.group).join(", ")})` : "";
  byId("tile-note").textContent = `Queries ${spelled(seen.axes.map((axis) => stretch(axis.a, axis.b)))}${group}. `
    + (seen.partial ? "Partial tiles hold keys that some of these queries do not see." : "No mask is needed for them.");
  byId("live").textContent = `Query ${query.join(", ")}: ${keys} keys; its tile visits ${seen.visited} key tiles, `
    + `${seen.full} full and ${seen.partial} partial, of ${seen.dense}.`;
  canvas.setAttribute("aria-label", `Layout ${byX(data.layout)} with the query at ${query.join(", ")}`);
  showBar(seen);
}

function fact(kind, label, value, extra = "") {
  const mark = kind ? [swatch(kind)] : [];
  return [element("dt", {}, ...mark, label), element("dd", {}, value, extra && element("small", {}, ` ${extra}`))];
}

/** Shares of full, partial and skipped tiles, of those of dense attention. */
function showBar(seen) {
  const part = (kind, many) => element("i", { class: kind, style: `flex: ${many} 0 0` });
  const rest = Math.max(seen.dense - seen.visited, 0);
  byId("bar").replaceChildren(part("full", seen.full), part("partial", seen.partial), part("", rest));
  byId("bar").setAttribute("aria-label", `${percent(seen.visited / seen.dense)} of the key tiles are visited`);
}

const WHOLE = { width: 18, height: 14, rx: 2 };
const FRAME = { x: 1, y: 1, width: 16, height: 12 };
const SWATCHES = {
  full: [["rect", { class: "s-full", ...WHOLE }]],
  partial: [["rect", { class: "s-partial", ...WHOLE }]],
  pale: [
    ["path", { class: "s-full", opacity: 0.5, d: "M0 0H18L0 14Z" }],
    ["path", { class: "s-partial", opacity: 0.6, d: "M18 0V14H0Z" }],
  ],
  skipped: [["rect", { class: "s-ground", ...WHOLE }]],
  window: [["rect", { class: "s-frame", x: 2, y: 2, width: 14, height: 10 }]],
  keys: [["rect", { class: "s-window", x: 5, y: 3, width: 8, height: 8 }]],
  tile: [["rect", { class: "s-tile", ...FRAME }]],
  stride: [["rect", { class: "s-stride", ...FRAME }]],
  query: [["path", { class: "s-query", d: "M9 0 16 7 9 14 2 7Z" }]],
  leader: [["circle", { class: "s-leader", cx: 9, cy: 7, r: 5 }]],
};

/** A small picture of a sign of the drawing. */
function swatch(kind) {
  const shapes = SWATCHES[kind].map(([name, attributes]) => element(name, attributes));
  return element("svg", { width: 18, height: 14, "aria-hidden": "true" }, ...shapes);
}

function showLegend(scene) {
  const parted = isDilated(scene) && !scene.compact;
  const strided = scene.head.dims.some((dim) => dim.stride > 1);
  const entries = [
    ["query", "query"],
    [parted ? "keys" : "window", "its window: the keys it sees"],
    ...(strided ? [["stride", "stride group"], ["leader", "leader"]] : []),
    ["tile", "query tile"], ["full", "full key tile"], ["partial", "partial key tile"],
    ...(parted ? [] : [["pale", "paler: loaded, but outside of its window"]]),
    ["skipped", "skipped"],
  ];
  byId("legend").replaceChildren(...entries.map(([kind, label]) => element("li", {}, swatch(kind), label)));
}

function showHelp({ compact }) {
  const keys = data.layout.length === 1 ? "the left and right keys" : "the arrow keys";
  const planes = data.layout.length === 3 ? ", Page Up and Page Down for planes" : "";
  byId("help").textContent = `Click or drag to move the query, or use ${keys}${planes} (Shift: a whole tile).`
    + (compact ? " Only the query's dilation group is drawn, numbered by position in it." : "");
}

function showText(scene) {
  const blocks = textBlocks(scene.kvTile);
  ["text-first", "text-last"].forEach((id, side) => {
    const [tokens, where] = [plural(data.text[side], "text token"), side ? "after" : "before"];
    const note = `${tokens} ${where} the grid: every query visits ${plural(blocks[side], "full tile")} of text`;
    byId(id).hidden = !data.text[side];
    byId(id).replaceChildren(element("i", { style: `width: ${14 * Math.min(blocks[side], 8) - 2}px` }), note);
  });
}
