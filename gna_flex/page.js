// The page itself: what is shown, its controls, the numbers, and a link to every view.

const scene = { zoom: 0, compact: false, anchored: false };
let view = null;

function chooseHead(index) {
  scene.head = heads[index];
  [scene.qTile, scene.kvTile] = [scene.head.q_tile, scene.head.kv_tile];
  for (const [id, tile] of [["q-tile", scene.qTile], ["kv-tile", scene.kvTile]]) fillTiles(byId(id), tile);
}

function fillTiles(select, chosen) {
  const blocks = [...new Set(scene.head.tiles.map(product))].sort((a, b) => a - b);
  select.replaceChildren(...blocks.map((tokens) => {
    const shapes = scene.head.tiles.filter((tile) => product(tile) === tokens);
    return element("optgroup", { label: `${number(tokens)} tokens` },
      ...shapes.map((tile) => element("option", { value: byX(tile) }, tile.join(" × "))));
  }));
  select.value = byX(chosen);
}

function moveTo(query) {
  scene.query = query.map((x, k) => Math.max(0, Math.min(x, data.layout[k] - 1)));
  scene.plane = scene.query[0];
  show();
}

const moveAlong = (k, x) => moveTo(scene.query.map((old, other) => (other === k ? x : old)));

/** Draws everything that depends on the query. */
function show() {
  scene.seen = visitsOf(scene.head, scene.query, scene.qTile, scene.kvTile, scene.anchored);
  view = drawLayout(scene, view);
  showPlane(scene);
  showNumbers(scene);
  showStrips(scene);
  markHistogram(scene);
  writeLink();
}

/** A query that does not see all keys of a tile that it visits, in the tiles that the page began with. */
function goToWitness(query) {
  setTiles(scene.head.q_tile, scene.head.kv_tile);
  syncControls();
  showAll();
  moveTo(query);
  byId("controls").scrollIntoView({ behavior: "smooth" });
}

/** Draws everything that depends on the tiles, too. */
function showAll() {
  scene.all = summarise(scene.head, scene.qTile, scene.kvTile, scene.anchored);
  view = null;
  byId("order").hidden = !isDilated(scene);
  scene.compact &&= isDilated(scene);
  showVerdict(scene);
  showHistogram(scene);
  showRanking(scene, (tile) => { setTiles(tile, tile); syncControls(); showAll(); });
  showSimulations(scene);
  showProof(scene, goToWitness);
  showLegend(scene);
  showHelp(scene);
  showText(scene);
  show();
}

/** Calls `move(event, element)` while the pointer is held down on what matches the selector inside the container. */
function onDrag(container, selector, move) {
  let held = null;
  container.addEventListener("pointerdown", (event) => {
    held = event.target.closest(selector);
    if (!held) return;
    container.setPointerCapture(event.pointerId);
    move(event, held);
  });
  container.addEventListener("pointermove", (event) => held && move(event, held));
  for (const end of ["pointerup", "pointercancel"]) container.addEventListener(end, () => { held = null; });
}

function moveAlongStrip(event, strip) {
  const k = Number(strip.dataset.k);
  const box = byId("strips").querySelectorAll(".strip")[k].getBoundingClientRect();
  const [dim, at] = [scene.head.dims[k], place(scene.head.dims[k], scene.query[k])];
  const position = Math.floor(((event.clientX - box.left) / box.width) * at.size);
  const inside = Math.max(0, Math.min(position, at.size - 1));
  moveAlong(k, at.group + inside * dim.dilation);
}

function moveOnCanvas(event) {
  const box = canvas.getBoundingClientRect();
  const [column, row] = [event.clientX - box.left - MARGIN.left, event.clientY - box.top - MARGIN.top];
  const query = [...scene.query];
  query[view.columns.k] = coordinate(view.columns, view.left + column / view.scale, scene);
  if (view.rows.k >= 0) query[view.rows.k] = coordinate(view.rows, view.top + row / view.scaleY, scene);
  if (query.length === 3) query[0] = scene.plane;
  moveTo(query);
}

/** Steps of the keys: which dimension from the last, and in which direction. */
const KEYS = {
  ArrowLeft: [1, -1], ArrowRight: [1, 1], ArrowUp: [2, -1], ArrowDown: [2, 1], PageUp: [3, -1], PageDown: [3, 1],
};

function onKey(event) {
  const zooms = { "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: () => zoomTo(1) };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (zooms[event.key]) zooms[event.key]();
  else if (KEYS[event.key] && KEYS[event.key][0] <= scene.query.length) {
    const [fromLast, direction] = KEYS[event.key];
    const k = scene.query.length - fromLast;
    const dilation = scene.head.dims[k].dilation;
    const step = event.shiftKey ? scene.qTile[k] * dilation : scene.compact ? dilation : 1;
    moveAlong(k, scene.query[k] + direction * step);
  } else return;
  event.preventDefault();
}

function zoomTo(zoom) {
  scene.zoom = zoom;
  view = null;
  show();
}

const zoomBy = (factor) => zoomTo(Math.max(1, (view.scale / view.whole) * factor));

/** The view as the part of the address after "#", and back. */
function link() {
  const parts = [`q=${scene.query}`, `tile=${byX(scene.qTile)}`];
  if (!same(scene.qTile, scene.kvTile)) parts.push(`kv=${byX(scene.kvTile)}`);
  parts.push(`tiling=${scene.anchored ? "anchored" : "static"}`);
  if (scene.query.length === 3) parts.push(`t=${scene.plane}`);
  if (heads.length > 1) parts.push(`head=${heads.indexOf(scene.head)}`);
  if (scene.compact) parts.push("draw=group");
  if (scene.zoom) parts.push(`zoom=${Math.round(100 * scene.zoom) / 100}`);
  return `#${parts.join("&")}`;
}

let writing = 0;
/** Not for every step of a drag: browsers refuse to change the address too often. */
function writeLink() {
  clearTimeout(writing);
  writing = setTimeout(() => history.replaceState(null, "", link()), 200);
}

/** Shows the view of a link; what it does not tell, or tells wrongly, is as in the beginning. */
function readLink(address) {
  clearTimeout(writing);
  const given = new URLSearchParams(new URL(address).hash.slice(1));
  const numbers = (name) => (given.get(name) ?? "").split(",").map(Number);
  chooseHead(Math.min(Math.max(Math.trunc(numbers("head")[0]) || 0, 0), heads.length - 1));
  const known = (text, otherwise) => scene.head.tiles.find((tile) => byX(tile) === text) ?? otherwise;
  scene.qTile = known(given.get("tile"), scene.qTile);
  scene.kvTile = known(given.get("kv"), given.has("tile") ? scene.qTile : scene.kvTile);
  scene.anchored = given.get("tiling") === "anchored";
  scene.compact = given.get("draw") === "group";
  scene.zoom = Math.max(numbers("zoom")[0] || 0, 0);
  const query = numbers("q");
  const inside = (x, k) => x >= 0 && x < data.layout[k] && x % 1 === 0;
  const fits = given.has("q") && query.length === data.layout.length && query.every(inside);
  scene.query = fits ? query : data.layout.map((length) => Math.floor(length / 2));
  const plane = given.has("t") ? Math.trunc(numbers("t")[0]) : -1;
  scene.plane = plane >= 0 && plane < data.layout[0] ? plane : scene.query[0];
  syncControls();
  showAll();
}

function syncControls() {
  byId("head").value = heads.indexOf(scene.head);
  byId("q-tile").value = byX(scene.qTile);
  byId("kv-tile").value = byX(scene.kvTile);
  const controls = byId("controls").elements;
  controls.tiling.value = scene.anchored ? "anchored" : "static";
  controls.draw.value = scene.compact ? "group" : "layout";
}

/** A new query tile brings the same key tile along, unless they differed. */
function readControls(event) {
  const tile = (id) => scene.head.tiles.find((shape) => byX(shape) === byId(id).value);
  if (event.target.id === "head") chooseHead(Number(event.target.value));
  else if (event.target.id === "q-tile" && same(scene.qTile, scene.kvTile)) setTiles(tile("q-tile"), tile("q-tile"));
  else setTiles(tile("q-tile"), tile("kv-tile"));
  scene.anchored = byId("controls").elements.tiling.value === "anchored";
  scene.compact = byId("controls").elements.draw.value === "group";
  syncControls();
  showAll();
}

function setTiles(qTile, kvTile) {
  [scene.qTile, scene.kvTile] = [qTile, kvTile];
}

function headName({ heads: indices, label }) {
  if (data.heads.length === 1) return label;
  const many = indices.length > 6 ? `${indices.slice(0, 5).join(", ")} … (${indices.length})` : indices.join(", ");
  return `${many}: ${label}`;
}

function setUp() {
  byId("head").replaceChildren(...heads.map((head, k) => element("option", { value: k }, headName(head))));
  byId("head-label").hidden = heads.length === 1;
  byId("place").replaceChildren(...data.layout.map((length, k) => {
    const input = element("input", { type: "number", min: 0, max: length - 1, "aria-label": `query ${data.names[k]}` });
    input.addEventListener("change", () => moveAlong(k, Math.trunc(Number(input.value)) || 0));
    return element("label", {}, data.names[k], input);
  }));
  byId("plane-name").textContent = data.names[0];
  byId("plane").max = data.layout[0] - 1;
  byId("plane").addEventListener("input", (event) => { scene.plane = Number(event.target.value); show(); });
  byId("controls").addEventListener("change", readControls);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("zoom-in").addEventListener("click", () => zoomBy(1.5));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  byId("zoom-all").addEventListener("click", () => zoomTo(1));
  canvas.addEventListener("keydown", onKey);
  onDrag(byId("strips"), ".strip", moveAlongStrip);
  onDrag(canvas, "canvas", moveOnCanvas);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", show);
  new ResizeObserver(() => { view = drawLayout(scene, view); }).observe(canvas.parentElement);
  addEventListener("hashchange", (event) => readLink(event.newURL));
}

/** What is shown, in numbers: for tests, and for whoever opens the console. */
function state() {
  const { head, query, seen, all } = scene;
  const ats = head.dims.map((dim, k) => place(dim, query[k]));
  const { visited, full, partial, dense } = seen;
  return {
    head: heads.indexOf(head), query, plane: scene.plane, q_tile: scene.qTile, kv_tile: scene.kvTile,
    tiling: scene.anchored ? "anchored" : "static", draw: scene.compact ? "group" : "layout",
    visited, full, partial, dense,
    group: ats.map((at) => at.group), window: ats.map((at) => [at.lo, at.hi]), leader: ats.map((at) => at.leader),
    stride_group: head.dims.map((dim, k) => strideGroup(dim, query[k])),
    all: { ...all, histogram: [...all.histogram].sort(([a], [b]) => a - b) },
    link: link(),
  };
}

/** Where a token of the shown plane is, in pixels of the window. */
function locate(query) {
  const box = canvas.getBoundingClientRect();
  const at = ({ k, dim }) => (k < 0 ? 0 : Math.floor(query[k] / (scene.compact ? dim.dilation : 1))) + 0.5;
  return {
    x: box.left + MARGIN.left + (at(view.columns) - view.left) * view.scale,
    y: box.top + MARGIN.top + (at(view.rows) - view.top) * view.scaleY,
  };
}

setUp();
readLink(location.href);
window.gnaPage = { state, locate };
