// The layout on a canvas: tiles, window, stride group and query, in token coordinates or those of a dilation group.

const MARGIN = { left: 34, top: 20 };
const LINE_HEIGHT = 110; // of the one row of a 1-D layout, and the least of several
const BIGGEST_CELL = 34;
const TICKS_APART = 44;
const canvas = document.getElementById("grid");

/** Colours of the style sheet, so that light and dark follow it. */
function palette() {
  const style = getComputedStyle(document.documentElement);
  const names = ["page", "ink", "muted", "skipped", "other", "full", "partial", "hatch", "window", "query"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** One drawn dimension: maps positions of the query's dilation group to places along the canvas. */
function drawnAxis(k, scene) {
  if (k < 0) return { k, length: 1, spread: 1, offset: 0 };
  const dim = scene.head.dims[k];
  const at = place(dim, scene.query[k]);
  const spread = scene.compact ? 1 : dim.dilation;
  return { k, dim, at, length: scene.compact ? at.size : dim.length, spread, offset: scene.compact ? 0 : at.group };
}

/** Tokens that are interesting around a query, along one dimension. */
function reach(axis, scene) {
  if (axis.k < 0) return 1;
  const { k, dim, spread } = axis;
  return Math.min(axis.length, (dim.window + scene.qTile[k] + scene.kvTile[k]) * spread);
}

/** Size of a cell and of the canvas; `zoom` 0 picks the whole layout, or the surroundings if these are a small part. */
function frame(scene, room) {
  const n = scene.query.length;
  const columns = drawnAxis(n - 1, scene);
  const rows = drawnAxis(n > 1 ? n - 2 : -1, scene);
  const [width, height] = [room.width - MARGIN.left - 2, room.height - MARGIN.top - 2];
  const flat = rows.k < 0;
  const fit = (a, b) => Math.min(width / a, flat ? Infinity : height / b, BIGGEST_CELL);
  const whole = fit(columns.length, rows.length);
  const [c, r] = [reach(columns, scene), reach(rows, scene)];
  const small = Math.max(columns.length / c, rows.length / r) > 6;
  const close = small ? Math.max(whole, fit(Math.min(3 * c, columns.length), Math.min(3 * r, rows.length))) : whole;
  const scale = Math.max(whole, Math.min((scene.zoom ? whole * scene.zoom : close), Math.max(whole, BIGGEST_CELL)));
  // A layout of few long rows would be a thread: its cells are taller than wide.
  const scaleY = flat ? LINE_HEIGHT : Math.max(scale, Math.min(BIGGEST_CELL, LINE_HEIGHT / rows.length));
  return {
    rows, columns, scale, scaleY, whole, flat,
    width: Math.min(width, columns.length * scale),
    height: Math.min(height, rows.length * scaleY),
  };
}

/** First visible token along an axis: unmoved while the query is in view, else centred on it. */
function scrollTo(axis, old, shown, scene) {
  const most = Math.max(axis.length - shown, 0);
  const at = axis.k < 0 ? 0 : axis.offset + axis.at.position * axis.spread;
  const inView = old !== null && at >= old && at + 1 <= old + shown;
  return Math.min(Math.max(inView ? old : at - shown / 2, 0), most);
}

/** Places along an axis of positions [begin, end): one stretch, or token by token if dilation parts them. */
function stretches(axis, begin, end) {
  if (axis.k < 0) return [[0, 1]];
  if (axis.spread === 1) return begin < end ? [[begin, end]] : [];
  return Array.from({ length: Math.max(end - begin, 0) }, (_, i) => {
    const x = axis.offset + (begin + i) * axis.spread;
    return [x, x + 1];
  });
}

/** Visited tiles along an axis as stretches that know whether they are full; tiny neighbours are drawn as one. */
function tileStretches(axis, seen, scale) {
  if (axis.k < 0) return [{ begin: 0, end: 1, full: true }];
  const tiny = axis.spread === 1 && seen.side * scale < 3;
  const found = [];
  for (let k = seen.first; k < seen.end; k++) {
    const full = k >= seen.fullFirst && k < seen.fullEnd;
    const last = found[found.length - 1];
    for (const [begin, end] of stretches(axis, ...tileSpan(seen, k))) {
      if (tiny && last && last.full === full && last.end === begin) last.end = end;
      else found.push({ begin, end, full });
    }
  }
  return found;
}

/** What the shown plane of a 3-D layout is to the query: is it in the window, in visited tiles, in the query tile? */
function planeOf(scene) {
  const all = { group: true, window: true, visited: true, full: true, tile: true, stride: true, query: true };
  if (scene.query.length < 3) return all;
  const [plane, dim] = [planeAt(scene, scene.plane), scene.head.dims[0]];
  return { ...plane, stride: plane.group && dim.leader[scene.plane] === dim.leader[scene.query[0]] };
}

function planeAt(scene, t) {
  const [dim, seen] = [scene.head.dims[0], scene.seen.axes[0]];
  const [at, here] = [place(dim, scene.query[0]), place(dim, t)];
  const group = at.group === here.group;
  const inside = (begin, end) => group && here.position >= begin && here.position < end;
  const k = Math.floor((here.position - seen.origin) / seen.side);
  return {
    group,
    window: inside(at.lo, at.hi),
    visited: group && k >= seen.first && k < seen.end,
    full: group && k >= seen.fullFirst && k < seen.fullEnd,
    tile: inside(seen.a, seen.b + 1),
    query: t === scene.query[0],
  };
}

/** A pen in token coordinates. */
function makePen(context, view) {
  const x = (column) => MARGIN.left + (column - view.left) * view.scale;
  const y = (row) => MARGIN.top + (row - view.top) * view.scaleY;
  const box = (row, column) => [x(column[0]), y(row[0]), x(column[1]) - x(column[0]), y(row[1]) - y(row[0])];
  const visible = ([left, top, width, height]) =>
    left < MARGIN.left + view.width && left + width > MARGIN.left
    && top < MARGIN.top + view.height && top + height > MARGIN.top;
  return { context, view, x, y, box, visible };
}

/** Diagonal lines: partial tiles differ from full ones without colour too. */
function hatch(context, colors) {
  const size = 9;
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const pen = tile.getContext("2d");
  pen.fillStyle = colors.partial;
  pen.fillRect(0, 0, size, size);
  pen.strokeStyle = colors.hatch;
  pen.lineWidth = 1.5;
  pen.beginPath();
  for (const shift of [-size, 0, size]) {
    pen.moveTo(shift - 1, size + 1);
    pen.lineTo(shift + size + 1, -1);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

function drawGround(pen, colors, scene, plane) {
  const { context, view } = pen;
  const { rows, columns } = view;
  const parted = rows.spread > 1 || columns.spread > 1;
  context.fillStyle = parted || !plane.group ? colors.other : colors.skipped;
  context.fillRect(MARGIN.left, MARGIN.top, view.width, view.height);
  if (!parted || !plane.group) return;
  context.fillStyle = colors.skipped;
  const everything = (axis) => stretches(axis, 0, axis.k < 0 ? 1 : axis.at.size);
  fillBoxes(pen, everything(rows), everything(columns));
}

function fillBoxes(pen, rows, columns, inset = 0) {
  for (const row of rows) {
    for (const column of columns) {
      const [left, top, width, height] = pen.box(row, column);
      if (!pen.visible([left, top, width, height])) continue;
      pen.context.fillRect(left + inset, top + inset, width - 2 * inset, height - 2 * inset);
    }
  }
}

function strokeBoxes(pen, rows, columns, inset = 0) {
  for (const row of rows) {
    for (const column of columns) {
      const [left, top, width, height] = pen.box(row, column);
      if (!pen.visible([left, top, width, height])) continue;
      const side = (length) => Math.max(length - 2 * inset, 1);
      pen.context.strokeRect(left + inset, top + inset, side(width), side(height));
    }
  }
}

function drawTiles(pen, colors, scene, plane) {
  if (!plane.visited) return;
  const { context, view } = pen;
  const axes = scene.seen.axes;
  const pattern = hatch(context, colors);
  const across = tileStretches(view.columns, axes[view.columns.k], view.scale);
  const down = tileStretches(view.rows, axes[view.rows.k], view.scaleY);
  for (const row of down) {
    for (const column of across) {
      const box = pen.box([row.begin, row.end], [column.begin, column.end]);
      if (!pen.visible(box)) continue;
      context.fillStyle = plane.full && row.full && column.full ? colors.full : pattern;
      context.fillRect(...box);
    }
  }
}

/** Pales the tiles outside of the window: they are loaded, but this query does not see them. */
function drawFade(pen, colors, scene, plane) {
  const { context, view } = pen;
  if (!plane.visited || view.rows.spread > 1 || view.columns.spread > 1) return;
  const box = (span) => pen.box(...[view.rows, view.columns].map((axis) => (axis.k < 0 ? [0, 1] : span(axis))));
  context.beginPath();
  context.rect(...box((axis) => visitedSpan(scene.seen.axes[axis.k])));
  if (plane.window) context.rect(...box((axis) => [axis.at.lo, axis.at.hi]));
  context.globalAlpha = 0.5;
  context.fillStyle = colors.page;
  context.fill("evenodd");
  context.globalAlpha = 1;
}

/** A line across `axis` at place `at`, between the places `from` and `to` of the other axis. */
function drawLine(pen, vertical, at, [from, to]) {
  const { context } = pen;
  const end = (along) => (vertical ? [pen.x(at), pen.y(along)] : [pen.x(along), pen.y(at)]);
  context.beginPath();
  context.moveTo(...end(from));
  context.lineTo(...end(to));
  context.stroke();
}

/** Lines between tokens and, stronger, between tiles. */
function drawLines(pen, colors, scene, plane) {
  const { rows, columns } = pen.view;
  pen.context.strokeStyle = colors.page;
  for (const [axis, other, vertical] of [[columns, rows, true], [rows, columns, false]]) {
    if (axis.k < 0) continue;
    drawTokenLines(pen, axis, other, vertical);
    drawTileLines(pen, axis, other, vertical, scene, plane);
  }
}

function drawTokenLines(pen, axis, other, vertical) {
  const { context, view } = pen;
  const [scale, from, shown] = vertical ? [view.scale, view.left, view.width] : [view.scaleY, view.top, view.height];
  if (scale < 3) return;
  const last = Math.min(axis.length, Math.floor(from) + Math.ceil(shown / scale) + 1);
  context.lineWidth = 1;
  context.globalAlpha = Math.min(0.4, (scale - 1) / 24);
  for (let x = Math.floor(from); x <= last; x++) drawLine(pen, vertical, x, [0, other.length]);
  context.globalAlpha = 1;
}

/** Static tiles cover the layout; anchored ones exist only where they are visited. */
function drawTileLines(pen, axis, other, vertical, scene, plane) {
  const seen = scene.seen.axes[axis.k];
  const scale = vertical ? pen.view.scale : pen.view.scaleY;
  if (axis.spread > 1 || seen.side * scale < 4 || (scene.anchored && !plane.visited)) return;
  const across = scene.anchored && other.k >= 0 ? visitedSpan(scene.seen.axes[other.k]) : [0, other.length];
  const [first, end] = scene.anchored ? [seen.first, seen.end] : [0, ceilDiv(seen.size, seen.side)];
  pen.context.lineWidth = 2;
  for (let k = first; k <= end; k++) {
    drawLine(pen, vertical, Math.min(seen.origin + k * seen.side, seen.size), across);
  }
}

function drawWindow(pen, colors, scene, plane) {
  const { context, view } = pen;
  const spans = [view.rows, view.columns].map((axis) => stretches(axis, axis.at?.lo, axis.at?.hi));
  const parted = view.rows.spread > 1 || view.columns.spread > 1;
  if (parted) {
    context.fillStyle = colors.window;
    if (plane.window) fillBoxes(pen, ...spans, view.scale > 6 ? view.scale * 0.22 : 0);
    return;
  }
  context.strokeStyle = colors.window;
  context.lineWidth = plane.window ? 3.5 : 1.5;
  context.setLineDash(plane.window ? [] : [3, 5]);
  strokeBoxes(pen, ...spans, plane.window ? 0.5 : 0);
  context.setLineDash([]);
}

function drawQueries(pen, colors, scene, plane) {
  const { context, view } = pen;
  const axes = [view.rows, view.columns];
  const parted = axes.some((axis) => axis.spread > 1);
  const spans = (range) => axes.map((axis) => (axis.k < 0 ? [[0, 1]] : stretches(axis, ...range(axis))));
  context.setLineDash([]);
  if (plane.tile) {
    context.strokeStyle = colors.ink;
    context.lineWidth = parted ? 1.2 : 2;
    strokeBoxes(pen, ...spans((axis) => [scene.seen.axes[axis.k].a, scene.seen.axes[axis.k].b + 1]));
  }
  if (plane.stride && scene.head.dims.some((dim) => dim.stride > 1)) {
    context.strokeStyle = colors.query;
    context.lineWidth = 2;
    context.setLineDash([5, 3]);
    strokeBoxes(pen, ...spans((axis) => strideGroup(axis.dim, scene.query[axis.k])), 2.5);
    context.setLineDash([]);
    drawMark(pen, colors, spans((axis) => [axis.at.leader, axis.at.leader + 1]), "leader");
  }
  drawMark(pen, colors, spans((axis) => [axis.at.position, axis.at.position + 1]), plane.query ? "query" : "elsewhere");
}

/** A diamond for the query (hollow if it is in another plane), a ring for the leader. */
function drawMark(pen, colors, [[row], [column]], kind) {
  const { context } = pen;
  const [left, top, width, height] = pen.box(row, column);
  if (!pen.visible([left, top, width, height])) return;
  const [x, y] = [left + width / 2, top + height / 2];
  const size = Math.min(Math.max(Math.min(width, height) * 0.42, 7), 11);
  context.beginPath();
  if (kind === "leader") context.arc(x, y, size * 0.85, 0, 2 * Math.PI);
  else {
    for (const [dx, dy] of [[0, -size], [size, 0], [0, size], [-size, 0]]) context.lineTo(x + dx, y + dy);
    context.closePath();
  }
  if (kind === "query") {
    context.fillStyle = colors.query;
    context.fill();
  }
  context.strokeStyle = kind === "query" ? colors.page : colors.query;
  context.lineWidth = kind === "query" ? 1.5 : 2;
  context.stroke();
}

/** Coordinates along the upper and the left edge. */
function drawTicks(pen, colors, scene) {
  const { context, view } = pen;
  context.fillStyle = colors.muted;
  context.font = "11px system-ui, sans-serif";
  const ticks = (axis, start, shown, scale) => {
    const round = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((each) => each * scale >= TICKS_APART);
    const step = round ?? 10 ** Math.ceil(Math.log10(TICKS_APART / scale));
    const first = Math.ceil(start / step) * step;
    const many = Math.floor((Math.min(start + shown, axis.length) - first - 0.01) / step) + 1;
    return Array.from({ length: Math.max(many, 0) }, (_, i) => first + i * step);
  };
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (const x of ticks(view.columns, view.left, view.width / view.scale, view.scale)) {
    context.fillText(x, pen.x(x + 0.5), MARGIN.top - 6);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  if (view.flat) return;
  for (const y of ticks(view.rows, view.top, view.height / view.scale, view.scaleY)) {
    context.fillText(y, MARGIN.left - 6, pen.y(y + 0.5));
  }
}

/** Draws the plane that is shown and returns the view, which tells where tokens are. */
function drawLayout(scene, old) {
  const room = { width: canvas.parentElement.clientWidth, height: Math.max(300, Math.min(620, innerHeight * 0.68)) };
  const view = frame(scene, room);
  const same = old && old.scale === view.scale && old.width === view.width;
  view.left = scrollTo(view.columns, same ? old.left : null, view.width / view.scale, scene);
  view.top = view.flat ? 0 : scrollTo(view.rows, same ? old.top : null, view.height / view.scaleY, scene);
  const [width, height] = [view.width + MARGIN.left + 2, view.height + MARGIN.top + 2];
  const ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const [colors, plane, pen] = [palette(), planeOf(scene), makePen(context, view)];
  drawTicks(pen, colors, scene);
  context.save();
  context.beginPath();
  context.rect(MARGIN.left - 1, MARGIN.top - 1, view.width + 2, view.height + 2);
  context.clip();
  const layers = [drawGround, drawTiles, drawFade, drawLines, drawWindow, drawQueries];
  for (const draw of layers) draw(pen, colors, scene, plane);
  context.restore();
  return view;
}

/** Coordinate of a place along an axis. */
function coordinate(axis, at, scene) {
  const x = Math.max(0, Math.min(Math.floor(at), axis.length - 1));
  return scene.compact ? axis.at.group + x * axis.dim.dilation : x;
}

