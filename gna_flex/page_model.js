// The mask as data: windows come from the tables of the page, tiles from the windows of their first and last query.

const data = JSON.parse(document.getElementById("data").textContent);
const product = (values) => values.reduce((a, b) => a * b, 1);
const ceilDiv = (a, b) => Math.ceil(a / b);
const byX = (values) => values.join("x");

/** Integers from runs of equal steps. */
function unpack(runs, length) {
  const values = new Int32Array(length);
  let value = 0;
  for (let run = 0, at = 0; run < runs.length; run += 2) {
    for (let end = at + runs[run + 1]; at < end; at++) values[at] = value += runs[run];
  }
  return values;
}

function unpackTable(table) {
  const ends = ["lo", "hi", "leader"].map((name) => [name, unpack(table[name], table.length)]);
  return { ...table, ...Object.fromEntries(ends) };
}

const tables = data.tables.map(unpackTable);
const heads = data.heads.map((head) => ({ ...head, dims: head.dims.map((index) => tables[index]) }));

/** Tokens of dilation group `g`. */
const groupSize = (dim, g) => ceilDiv(dim.length - g, dim.dilation);

/** Where a coordinate is: dilation group, position in it, size of the group; and what the tables know of it. */
function place(dim, x) {
  const group = x % dim.dilation;
  return {
    group,
    position: Math.floor(x / dim.dilation),
    size: groupSize(dim, group),
    lo: dim.lo[x],
    hi: dim.hi[x],
    leader: dim.leader[x],
  };
}

/** Positions [begin, end) of the queries with the same leader as coordinate `x`. */
function strideGroup(dim, x) {
  const same = (y) => y >= 0 && y < dim.length && dim.leader[y] === dim.leader[x];
  let [begin, end] = [x, x];
  while (same(begin - dim.dilation)) begin -= dim.dilation;
  while (same(end + dim.dilation)) end += dim.dilation;
  return [Math.floor(begin / dim.dilation), Math.floor(end / dim.dilation) + 1];
}

/**
 * Key tiles that query tile `t` of dilation group `g` visits along one dimension: [first, end), of which
 * [fullFirst, fullEnd) are full; tile k begins at position origin + k * kvSide. Null if the tile has no query.
 * Both ends of a window never decrease, so the first and the last query of the tile tell all.
 */
function visits(dim, g, t, qSide, kvSide, anchored) {
  const size = groupSize(dim, g);
  const [a, b] = [t * qSide, Math.min((t + 1) * qSide, size) - 1];
  if (a > b) return null;
  const [x, y] = [g + a * dim.dilation, g + b * dim.dilation];
  const origin = anchored ? dim.lo[x] : 0;
  const first = Math.floor((dim.lo[x] - origin) / kvSide);
  const end = ceilDiv(dim.hi[y] - origin, kvSide);
  const fullFirst = ceilDiv(dim.lo[y] - origin, kvSide);
  // The last tile of a group may be cut: it is full if all keys that exist are kept.
  const fullEnd = dim.hi[x] >= size ? end : Math.floor((dim.hi[x] - origin) / kvSide);
  return { a, b, size, origin, side: kvSide, first, end, fullFirst, fullEnd: Math.max(fullEnd, fullFirst) };
}

/** Positions [begin, end) of key tile `k`. */
function tileSpan(axis, k) {
  const begin = axis.origin + k * axis.side;
  return [begin, Math.min(begin + axis.side, axis.size)];
}

/** Positions [begin, end) of all visited tiles, and how many they are. */
const visitedSpan = (axis) => [tileSpan(axis, axis.first)[0], tileSpan(axis, axis.end - 1)[1]];
const loadedAlong = (axis) => visitedSpan(axis)[1] - visitedSpan(axis)[0];

/** Share of the pairs in the visited tiles of a query tile that the mask keeps. */
function usefulShare({ head, query, seen }) {
  const kept = product(head.dims.map((dim, k) => {
    const [{ a, b }, { group }] = [seen.axes[k], place(dim, query[k])];
    const at = (i) => group + i * dim.dilation;
    return sum(Array.from({ length: b - a + 1 }, (_, i) => dim.hi[at(a + i)] - dim.lo[at(a + i)]));
  }));
  const queries = product(seen.axes.map((axis) => axis.b - axis.a + 1));
  const text = sum(data.text);
  return (kept / queries + text) / (product(seen.axes.map(loadedAlong)) + text);
}

/** Blocks of text before and after the grid. */
const textBlocks = (tile) => data.text.map((count) => ceilDiv(count, product(tile)));
const sum = (values) => values.reduce((a, b) => a + b, 0);

/** Tiles of the grid that hold any token. */
function gridTiles(head, tile) {
  return product(head.dims.map((dim, k) => {
    let tiles = 0;
    for (let g = 0; g < dim.dilation; g++) tiles += ceilDiv(groupSize(dim, g), tile[k]);
    return tiles;
  }));
}

/** Key tiles that dense attention visits for a query tile: it has no dilation groups. */
function denseTiles(tile) {
  return product(data.layout.map((length, k) => ceilDiv(length, tile[k]))) + sum(textBlocks(tile));
}

/** What the query tile of one query visits. */
function visitsOf(head, query, qTile, kvTile, anchored) {
  const axes = head.dims.map((dim, k) => {
    const { group, position } = place(dim, query[k]);
    return visits(dim, group, Math.floor(position / qTile[k]), qTile[k], kvTile[k], anchored);
  });
  const text = sum(textBlocks(kvTile));
  const visited = product(axes.map((axis) => axis.end - axis.first)) + text;
  const full = product(axes.map((axis) => axis.fullEnd - axis.fullFirst)) + text;
  return { axes, visited, full, partial: visited - full, dense: denseTiles(kvTile) };
}

/** Counts of one dimension over all its query tiles: how many visit how many key tiles, and sums. */
function countAxis(dim, qSide, kvSide, anchored) {
  const counts = new Map();
  let [visited, full] = [0, 0];
  for (let g = 0; g < dim.dilation; g++) {
    for (let t = 0; t * qSide < groupSize(dim, g); t++) {
      const axis = visits(dim, g, t, qSide, kvSide, anchored);
      const many = axis.end - axis.first;
      counts.set(many, (counts.get(many) ?? 0) + 1);
      visited += many;
      full += axis.fullEnd - axis.fullFirst;
    }
  }
  return { counts, visited, full };
}

/** Every product of two counts, with how often it occurs. */
function multiply(left, right) {
  const counts = new Map();
  for (const [a, often] of left) {
    for (const [b, times] of right) counts.set(a * b, (counts.get(a * b) ?? 0) + often * times);
  }
  return counts;
}

/** What all query tiles visit; `histogram` maps visited tiles to query tiles. `max` leaves text queries out. */
function summarise(head, qTile, kvTile, anchored) {
  const axes = head.dims.map((dim, k) => countAxis(dim, qTile[k], kvTile[k], anchored));
  const [text, textQueries] = [sum(textBlocks(kvTile)), sum(textBlocks(qTile))];
  const [gridQueries, everything] = [gridTiles(head, qTile), gridTiles(head, kvTile) + text];
  const grid = axes.map((axis) => axis.counts).reduce(multiply);
  const histogram = new Map([...grid].map(([visited, often]) => [visited + text, often]));
  const max = Math.max(...histogram.keys());
  // Text queries visit everything, and all queries visit all text.
  if (textQueries) histogram.set(everything, (histogram.get(everything) ?? 0) + textQueries);
  const ofText = textQueries * everything + gridQueries * text;
  const [visited, full] = ["visited", "full"].map((name) => product(axes.map((axis) => axis[name])) + ofText);
  const queryTiles = gridQueries + textQueries;
  return { histogram, queryTiles, dense: denseTiles(kvTile), visited, full, partial: visited - full, max,
    mean: visited / queryTiles };
}

/** Tile shapes with as many tokens as the chosen ones or another usual number, least work first. */
function rankShapes(head, anchored) {
  const ranked = head.tiles.map((tile) => {
    const all = summarise(head, tile, tile, anchored);
    const pairs = product(tile) ** 2;
    return { tile, all, work: (all.full + data.partial_cost * all.partial) * pairs };
  });
  return ranked.sort((a, b) => a.work - b.work || product(b.tile) - product(a.tile));
}
