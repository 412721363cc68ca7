// The query dimension by dimension: planes of a 3-D layout, strips, and maps of all query tiles.

/** Which planes of a 3-D layout are in the window, above the slider that picks one. */
function showPlane(scene) {
  byId("planes").hidden = data.layout.length < 3;
  if (data.layout.length < 3) return;
  const { length } = scene.head.dims[0];
  const [width, gap] = [100 / length, length > 120 ? 0 : 0.1];
  const planes = planeRuns(scene, length).map(({ begin, end, kind, window }) => {
    const span = { x: `${begin * width}%`, width: `${(end - begin - gap) * width}%` };
    const mark = window ? [element("rect", { ...span, class: "s-window", y: 12, height: 4 })] : [];
    return [element("rect", { ...span, class: kind, height: 11 }), ...mark];
  });
  const here = element("rect", { class: "s-tile", x: `${scene.plane * width}%`, width: `${width}%`, height: 16 });
  byId("plane-strip").replaceChildren(...planes.flat(), here);
  const plane = planeAt(scene, scene.plane);
  const where = plane.query ? "the query's plane" : plane.window ? "in the window"
    : plane.visited ? "visited, not in the window" : "not visited";
  byId("plane").value = scene.plane;
  byId("plane-note").textContent = `plane ${scene.plane} of ${length}: ${where}`;
}

/** Planes with what they are to the query; alike neighbours are one if there are many. */
function planeRuns(scene, length) {
  const found = [];
  for (let t = 0; t < length; t++) {
    const { full, visited, window } = planeAt(scene, t);
    const kind = full ? "s-full" : visited ? "s-partial" : "s-ground";
    const last = found[found.length - 1];
    if (length > 120 && last && last.kind === kind && last.window === window) last.end = t + 1;
    else found.push({ begin: t, end: t + 1, kind, window });
  }
  return found;
}

function showStrips(scene) {
  byId("strips").replaceChildren(...scene.head.dims.map((dim, k) => stripRow(scene, dim, k)));
}

/** One dimension: what it is, the strip of the query, and the map of all query tiles. */
function stripRow(scene, dim, k) {
  const [axis, at] = [scene.seen.axes[k], place(dim, scene.query[k])];
  const options = [`window ${dim.window}`, `stride ${dim.stride}`]
    .concat(dim.dilation > 1 ? [`dilation ${dim.dilation}`] : [], dim.causal ? ["causal"] : []);
  const group = dim.dilation > 1 ? ` of dilation group ${at.group} (${plural(at.size, "token")})` : "";
  const note = `query ${at.position}${group} sees keys ${stretch(at.lo, at.hi - 1)}; `
    + `its tile ${stretch(axis.a, axis.b)} visits ${plural(axis.end - axis.first, "key tile")}, `
    + `${axis.fullEnd - axis.fullFirst} of them full`;
  return element("div", { class: "strip-row" },
    element("div", {}, element("b", {}, data.names[k]), ` ${plural(dim.length, "token")}`,
      element("small", {}, options.join(", "))),
    element("div", {}, drawStrip(axis, at, k), element("p", {}, note)),
    drawMap(scene, k, data.layout.length > 1 ? 92 : 240));
}

/** Query tile above, key tiles in the middle, the window below; positions of the dilation group from left to right. */
function drawStrip(axis, at, k) {
  const share = (x) => (100 * x) / at.size;
  const rect = (kind, begin, end, y, height) => element("rect",
    { class: kind, x: `${share(begin)}%`, width: `${Math.max(share(end - begin), 0.4)}%`, y, height });
  const tiles = (kind, first, end) =>
    (first < end ? [rect(kind, tileSpan(axis, first)[0], tileSpan(axis, end - 1)[1], 14, 18)] : []);
  const many = axis.end - axis.first;
  const lines = many > 150 ? [] : Array.from({ length: many + 1 }, (_, i) => {
    const x = `${share(Math.min(axis.origin + (axis.first + i) * axis.side, at.size))}%`;
    return element("line", { class: "s-line", x1: x, x2: x, y1: 14, y2: 32 });
  });
  return element("svg", { class: "strip", height: 44, "data-k": k, "aria-hidden": "true" },
    rect("s-ground", 0, at.size, 14, 18),
    ...tiles("s-partial", axis.first, Math.min(axis.fullFirst, axis.end)),
    ...tiles("s-full", axis.fullFirst, axis.fullEnd),
    ...tiles("s-partial", Math.min(axis.fullEnd, axis.end), axis.end),
    ...lines,
    rect("s-tile", axis.a, axis.b + 1, 2, 9),
    rect("s-query", at.position, at.position + 1, 0, 12),
    rect("s-window", at.lo, at.hi, 36, 6));
}

/** The mask of one dimension, for the dilation group of the query: query tiles down, keys across. */
function drawMap(scene, k, size) {
  const [dim, colors, ratio] = [scene.head.dims[k], palette(), devicePixelRatio || 1];
  const [at, qSide] = [place(dim, scene.query[k]), scene.qTile[k]];
  const pixels = Math.round(size * ratio);
  const label = `Key tiles visited by each query tile along ${data.names[k]}`;
  const map = element("canvas", { width: pixels, height: pixels, role: "img", "aria-label": label });
  map.style.width = map.style.height = `${size}px`;
  const context = map.getContext("2d");
  const many = ceilDiv(at.size, qSide);
  const height = pixels / Math.min(many, pixels);
  for (let y = 0; y < pixels - 0.5; y += height) {
    const tile = Math.min(Math.floor(((y + 0.01) * many) / pixels), many - 1);
    context.fillStyle = colors.skipped;
    context.fillRect(0, Math.floor(y), pixels, pixels);
    const axis = visits(dim, at.group, tile, qSide, scene.kvTile[k], scene.anchored);
    const kinds = [[colors.hatch, axis.first, axis.end], [colors.full, axis.fullFirst, axis.fullEnd]];
    for (const [color, first, end] of kinds) {
      if (first >= end) continue;
      const [from, to] = [tileSpan(axis, first)[0], tileSpan(axis, end - 1)[1]].map((x) => (x / at.size) * pixels);
      context.fillStyle = color;
      context.fillRect(from, Math.floor(y), Math.max(to - from, 1), Math.ceil(height) + 1);
    }
  }
  const here = Math.floor(at.position / qSide);
  context.strokeStyle = colors.ink;
  context.lineWidth = 1.5 * ratio;
  context.strokeRect(0.75 * ratio, (here * pixels) / many, pixels - 1.5 * ratio, Math.max(pixels / many, 2 * ratio));
  return map;
}
