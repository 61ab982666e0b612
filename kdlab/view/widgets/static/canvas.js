/*
 * kdlab's canvas: linked maps of the ground (bird's-eye view) and six cameras.
 *
 * One ES module without dependencies, used twice: as an anywidget in notebooks (its default export; the
 * traits are those of kdlab/view/widgets/canvas.py) and in replay pages (`replay.js`, with a small model of its own).
 *
 * How it works, from top to bottom of this file:
 *   bytes    what Python sends -> typed arrays
 *   maps     numbers -> colours, one small image per map (a pixel per cell)
 *   plane    metres <-> pixels of a map; x (forward) points up, y (left) to the left
 *   layers   points, mask, boxes, axes, ego: each draws on a 2D context
 *   panels   the layers, which all maps share, are drawn once on a hidden canvas; a map is its image, a copy of that
 *            canvas and what follows the pointer, all within one frame of the screen: nothing flickers
 *   cameras  pictures with projected boxes and marked pixels
 *   words    legend, readout, status
 *   input    mouse, drag, keys
 *   render   a message marks what is stale; the next animation frame draws the newest state, then reports `shown`
 *
 * `view` is one place on a page where the widget is shown: its elements, decoded maps and the pointer.
 */

const EGO = { length: 4.08, width: 1.73, rear: 1.0 }; // metres, as in kdlab/view/style.py
const MISSING = [184, 184, 184]; // a cell that is no number
const MARK = "#CC79A7";
const MASK = "#F0E442";
const LIGHT_PALETTES = new Set(["RdBu_r", "PuOr", "greys"]);
const MARGIN = { left: 42, right: 6, top: 4, bottom: 32 }; // CSS pixels around a map for ticks and axis names
const PANEL = { least: 235, most: 460, gap: 12 };
const ZOOM = { step: 1.5, jump: 3, most: 12 }; // a key's, a double click's, the largest
const CLICK = 4; // CSS pixels that a pointer may stray in a click

// ---------------------------------------------------------------------------------------------------------- bytes

/** Whatever a widget manager hands over (DataView, ArrayBuffer, Uint8Array) as a Uint8Array on the same memory. */
export function bytesOf(value) {
  if (!value) return new Uint8Array(0);
  if (value instanceof Uint8Array) return value;
  if (value instanceof ArrayBuffer) return new Uint8Array(value);
  return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
}

let halfTable = null;

/** The number of each of the 65536 half-precision floats. */
function halves() {
  if (halfTable) return halfTable;
  halfTable = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) halfTable[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent === 0) halfTable[bits] = sign * fraction * 2 ** -24;
    else halfTable[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return halfTable;
}

/** Single-precision bytes as floats. */
function singlesOf(value) {
  return new Float32Array(bytesOf(value).slice().buffer); // a copy begins where floats may begin
}

/** Half-precision bytes as floats. */
export function floatsOf(value) {
  const bytes = bytesOf(value), table = halves(), floats = new Float32Array(bytes.length >> 1);
  for (let i = 0; i < floats.length; i++) floats[i] = table[bytes[2 * i] | (bytes[2 * i + 1] << 8)];
  return floats;
}

// ----------------------------------------------------------------------------------------------------------- maps

/** A panel's numbers [H * W] in its own unit, NaN where there is none; null for a colour picture. */
export function valuesOf(panel) {
  if (panel.kind === "rgb") return null;
  if (panel.kind === "float16") return floatsOf(panel.values).map((v) => v * panel.scale);
  const span = panel.high - panel.low;
  return Float32Array.from(bytesOf(panel.values), (q) => (q ? panel.low + ((q - 1) / 254) * span : NaN));
}

/** Colours of a panel as an image with a pixel per cell: forward up, left to the left. */
function imageOf(panel, values, palettes) {
  const [rows, columns] = panel.shape;
  const image = new ImageData(rows, columns), out = new Uint32Array(image.data.buffer);
  const colour = values ? scalarColours(panel, values, palettes) : rgbColours(panel);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      out[(columns - 1 - column) * rows + (rows - 1 - row)] = colour(row * columns + column);
    }
  }
  return canvasOf(image);
}

const packed = (r, g, b) => (255 << 24) | (b << 16) | (g << 8) | r;

function scalarColours(panel, values, palettes) {
  const table = bytesOf(palettes[panel.palette] ?? palettes.viridis);
  const colours = Uint32Array.from({ length: 256 }, (_, i) => packed(table[3 * i], table[3 * i + 1], table[3 * i + 2]));
  const missing = packed(...MISSING), factor = 255.999 / (panel.high - panel.low || 1);
  return (cell) => {
    const step = (values[cell] - panel.low) * factor;
    return step !== step ? missing : colours[step < 0 ? 0 : step > 255 ? 255 : step | 0];
  };
}

function rgbColours(panel) {
  const bytes = bytesOf(panel.values);
  return (cell) => packed(bytes[3 * cell], bytes[3 * cell + 1], bytes[3 * cell + 2]);
}

/** An ImageData as something that can be drawn at any size. */
function canvasOf(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// ---------------------------------------------------------------------------------------------------------- plane

/** The part of the extent that is shown: all of it, or a window around where somebody zoomed in. */
function windowOf(view) {
  const [x0, x1, y0, y1] = view.model.get("extent"), { factor, x, y } = view.zoom;
  const span = (low, high, at) => {
    const length = (high - low) / factor, start = Math.max(low, Math.min(high - length, at - length / 2));
    return [start, start + length];
  };
  return [...span(x0, x1, x), ...span(y0, y1, y)];
}

/** Where the metres of a window lie in a panel of a width in CSS pixels. */
function planeOf([x0, x1, y0, y1], width) {
  const inner = width - MARGIN.left - MARGIN.right, scale = inner / (y1 - y0);
  return { x0, x1, y0, y1, left: MARGIN.left, top: MARGIN.top, width: inner, height: (x1 - x0) * scale, scale };
}

const toPixel = (plane, x, y) => [plane.left + (plane.y1 - y) * plane.scale, plane.top + (plane.x1 - x) * plane.scale];

/** Draw an image that covers the whole extent. */
function drawWhole(context, plane, extent, image) {
  const [left, top] = toPixel(plane, extent[1], extent[3]), [right, bottom] = toPixel(plane, extent[0], extent[2]);
  context.drawImage(image, left, top, right - left, bottom - top);
}

/** Metres of a pixel, or null outside the map. */
function toMetres(plane, px, py) {
  const x = plane.x1 - (py - plane.top) / plane.scale, y = plane.y1 - (px - plane.left) / plane.scale;
  return x >= plane.x0 && x < plane.x1 && y > plane.y0 && y <= plane.y1 ? { x, y: Math.min(y, plane.y1 - 1e-6) } : null;
}

/** Row and column of a place in metres on a grid of [rows, columns] over the extent. */
function cellAt(extent, [rows, columns], { x, y }) {
  const [x0, x1, y0, y1] = extent;
  const limit = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value)));
  return [limit(((y - y0) / (y1 - y0)) * rows, rows), limit(((x - x0) / (x1 - x0)) * columns, columns)];
}

/** The centre of a cell in metres. */
function centreOf(extent, [rows, columns], [row, column]) {
  const [x0, x1, y0, y1] = extent;
  return { x: x0 + ((column + 0.5) / columns) * (x1 - x0), y: y0 + ((row + 0.5) / rows) * (y1 - y0) };
}

/** The grid that `cell` counts on. */
function cellsOf(model) {
  const cells = model.get("cells");
  return cells?.length === 2 ? cells : model.get("panels")?.[0]?.shape ?? null;
}

/** Rows and columns of a mask of so many square cells over the extent. */
function maskShape(extent, count) {
  const [x0, x1, y0, y1] = extent;
  const columns = Math.round(Math.sqrt((count * (x1 - x0)) / (y1 - y0)));
  return [Math.round(count / columns), columns];
}

// --------------------------------------------------------------------------------------------------------- layers

/** Round tick places between two ends, about one for every 42 pixels. */
function ticksOf(low, high, pixels) {
  const least = ((high - low) * 42) / pixels;
  const step = [1, 2, 5, 10, 20, 25, 50, 100, 200].find((s) => s >= least) ?? 500;
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) ticks.push(tick);
  return ticks;
}

function drawAxes(context, plane, ink) {
  const bottom = plane.top + plane.height;
  context.save();
  context.strokeStyle = context.fillStyle = ink;
  context.font = "11px system-ui, sans-serif";
  context.lineWidth = 1;
  context.strokeRect(plane.left - 0.5, plane.top - 0.5, plane.width + 1, plane.height + 1);
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of ticksOf(plane.x0, plane.x1, plane.height)) {
    const py = Math.round(toPixel(plane, tick, 0)[1]) + 0.5;
    line(context, plane.left - 4, py, plane.left, py);
    context.fillText(signed(tick), plane.left - 6, py);
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const tick of ticksOf(plane.y0, plane.y1, plane.width)) {
    const px = Math.round(toPixel(plane, 0, tick)[0]) + 0.5;
    line(context, px, bottom, px, bottom + 4);
    const half = context.measureText(signed(tick)).width / 2; // the last label stays on the canvas
    context.fillText(signed(tick), Math.min(px, plane.left + plane.width + MARGIN.right - half), bottom + 5);
  }
  context.fillText("y, left (m)", plane.left + plane.width / 2, bottom + 18);
  context.translate(2, plane.top + plane.height / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("x, forward (m)", 0, 0);
  context.restore();
}

function line(context, ...places) {
  context.beginPath();
  for (let i = 0; i < places.length; i += 2) context.lineTo(places[i], places[i + 1]);
  context.stroke();
}

/** The ego vehicle to scale and an arrow along its heading. */
function drawEgo(context, plane) {
  const front = EGO.length - EGO.rear, half = EGO.width / 2;
  const head = 9 / plane.scale, tip = front + 14 / plane.scale;
  polygon(context, plane, [[-EGO.rear, half], [-EGO.rear, -half], [front, -half], [front, half]], "white", "black");
  const neck = tip - head;
  const arrow = [[0, -head / 8], [neck, -head / 8], [neck, -head / 2], [tip, 0], [neck, head / 2], [neck, head / 8]];
  polygon(context, plane, [...arrow, [0, head / 8]], "black", "white");
}

function polygon(context, plane, corners, fill, stroke) {
  context.beginPath();
  for (const [x, y] of corners) context.lineTo(...toPixel(plane, x, y));
  context.closePath();
  context.fillStyle = fill;
  context.strokeStyle = stroke;
  context.lineWidth = 1;
  context.fill();
  context.stroke();
}

/** Points as an image of a panel's size: light on dark maps, dark on light ones; the higher, the stronger. */
function pointImage(points, plane, ratio, dark) {
  const width = Math.round(plane.width * ratio), height = Math.round(plane.height * ratio);
  const image = new ImageData(width, height), out = new Uint32Array(image.data.buffer);
  const scale = plane.scale * ratio, side = Math.max(1, Math.round(1.4 * ratio)), shade = dark ? 0 : 0xffffff;
  for (let i = 0; i + 2 < points.length; i += 3) {
    const left = Math.floor((plane.y1 - points[i + 1]) * scale), top = Math.floor((plane.x1 - points[i]) * scale);
    const strength = Math.max(0.35, Math.min(1, 0.45 + 0.15 * points[i + 2])); // full from 3.7 m above the ground
    const colour = ((strength * 255) << 24) | shade;
    for (let dy = 0; dy < side; dy++) {
      for (let dx = 0; dx < side; dx++) {
        const px = left + dx, py = top + dy;
        if (px >= 0 && px < width && py >= 0 && py < height) out[py * width + px] = colour;
      }
    }
  }
  return canvasOf(image);
}

/** Draw points from an image that is kept until points or size change, so that moving a threshold costs little. */
function drawPoints(view, context, plane, dark) {
  const points = (view.points ??= floatsOf(view.model.get("points")));
  if (!points.length) return;
  if (!view.pointImages.has(dark)) view.pointImages.set(dark, pointImage(points, plane, devicePixelRatio || 1, dark));
  context.drawImage(view.pointImages.get(dark), plane.left, plane.top, plane.width, plane.height);
}

/** Which cells of the mask reach the threshold, as a dimming image and the outline of the region in cells. */
function maskLayer(view) {
  const { model } = view, bytes = bytesOf(model.get("mask"));
  if (!bytes.length) return null;
  const limit = Math.max(1, 255 * model.get("mask_threshold")), shape = maskShape(model.get("extent"), bytes.length);
  const [rows, columns] = shape, image = new ImageData(rows, columns), out = new Uint32Array(image.data.buffer);
  const inside = (row, column) => row >= 0 && row < rows && column >= 0 && column < columns &&
    bytes[row * columns + column] >= limit - 0.5;
  const edges = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const left = rows - 1 - row, top = columns - 1 - column;
      if (!inside(row, column)) {
        out[top * rows + left] = 0x73000000; // black, less than half opaque
        continue;
      }
      if (!inside(row + 1, column)) edges.push(left, top, left, top + 1);
      if (!inside(row - 1, column)) edges.push(left + 1, top, left + 1, top + 1);
      if (!inside(row, column + 1)) edges.push(left, top, left + 1, top);
      if (!inside(row, column - 1)) edges.push(left, top + 1, left + 1, top + 1);
    }
  }
  return { veil: canvasOf(image), edges, rows, columns };
}

function drawMask(view, context, plane) {
  const mask = view.mask === undefined ? (view.mask = maskLayer(view)) : view.mask;
  if (!mask) return;
  const extent = view.model.get("extent"), [x0, x1, y0, y1] = extent, path = new Path2D();
  drawWhole(context, plane, extent, mask.veil);
  const cell = [(y1 - y0) / mask.rows, (x1 - x0) / mask.columns];
  const place = (across, down) => toPixel(plane, x1 - down * cell[1], y1 - across * cell[0]);
  for (let i = 0; i < mask.edges.length; i += 4) {
    path.moveTo(...place(mask.edges[i], mask.edges[i + 1]));
    path.lineTo(...place(mask.edges[i + 2], mask.edges[i + 3]));
  }
  strokeTwice(context, path, MASK, [], 1.3, "rgba(0, 0, 0, 0.7)");
}

/** A line with a halo, so that it can be seen on any colour. */
function strokeTwice(context, path, colour, dash, width, halo = "rgba(255, 255, 255, 0.7)") {
  context.lineJoin = "round";
  context.setLineDash([]);
  context.strokeStyle = halo;
  context.lineWidth = width + 1.1;
  context.stroke(path);
  context.setLineDash(dash);
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke(path);
  context.setLineDash([]);
}

/** Sets of boxes that are to be drawn: [name, set]. */
function shownSets(model) {
  const show = model.get("show") ?? {};
  if (show.boxes === false) return [];
  return Object.entries(model.get("boxes") ?? {}).filter(([name]) => show[name] !== false);
}

const isShown = (set, score, model) => !set.scored || score >= model.get("min_score");

/** The corners of a box's footprint, counter-clockwise from the front left, moved by (dx, dy) metres. */
function cornersOf([x, y, l, w, yaw], dx = 0, dy = 0) {
  const cos = Math.cos(yaw), sin = Math.sin(yaw);
  const place = (a, b) => [x + dx + (a * l * cos - b * w * sin) / 2, y + dy + (a * l * sin + b * w * cos) / 2];
  return [place(1, 1), place(-1, 1), place(-1, -1), place(1, -1)];
}

/** Footprints with a tick from the centre out through the front, which shows the heading. */
function boxPath(rows, plane, dx = 0, dy = 0) {
  const path = new Path2D();
  for (const row of rows) {
    const [x, y, l, , yaw] = row, reach = l / 2 + Math.min(0.8, l / 2);
    cornersOf(row, dx, dy).forEach((corner, i) => path[i ? "lineTo" : "moveTo"](...toPixel(plane, ...corner)));
    path.closePath();
    path.moveTo(...toPixel(plane, x + dx, y + dy));
    path.lineTo(...toPixel(plane, x + dx + reach * Math.cos(yaw), y + dy + reach * Math.sin(yaw)));
  }
  return path;
}

function drawBoxes(view, context, plane) {
  for (const [name, set] of shownSets(view.model)) {
    const rows = set.rows.filter((row) => isShown(set, row[5], view.model));
    const width = name === "truth" ? 1.5 : 1.2;
    if (rows.length) strokeTwice(context, boxPath(rows, plane), set.colour, set.dash, width, "rgba(255, 255, 255, 0.6)");
  }
}

// --------------------------------------------------------------------------------------------------------- panels

/** The elements of one map. */
function panelElements(view) {
  const root = element("figure", "kdlab-panel");
  const head = element("figcaption", "kdlab-head", root);
  const panel = { root, title: element("span", "kdlab-title", head), value: element("output", "kdlab-value", head) };
  panel.canvas = element("canvas", "kdlab-map", root);
  const bar = element("div", "kdlab-bar", root);
  panel.low = element("span", "", bar);
  panel.ramp = element("span", "kdlab-ramp", bar);
  panel.high = element("span", "", bar);
  panel.unit = element("span", "kdlab-unit", bar);
  panel.bar = bar;
  listenPointer(view, panel);
  return panel;
}

/** An element of a class at the end of a parent. */
export function element(tag, name, parent, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

/** Take over new maps: numbers, colours, titles, colour bars. */
function readPanels(view) {
  const panels = view.model.get("panels") ?? [], palettes = view.model.get("palettes") ?? {};
  while (view.panels.length < panels.length) {
    view.panels.push(panelElements(view));
    view.maps.append(view.panels.at(-1).root);
  }
  while (view.panels.length > panels.length) view.panels.pop().root.remove();
  panels.forEach((data, i) => {
    const panel = view.panels[i];
    if (panel.data === data) return;
    panel.data = data;
    panel.values = valuesOf(data);
    panel.image = imageOf(data, panel.values, palettes);
    panel.title.textContent = panel.title.title = data.title;
    readBar(panel, palettes);
  });
  view.empty.hidden = panels.length > 0;
}

function readBar(panel, palettes) {
  const { data } = panel;
  panel.bar.style.visibility = data.kind === "rgb" ? "hidden" : "visible";
  if (data.kind === "rgb") return;
  const table = bytesOf(palettes[data.palette] ?? palettes.viridis), stops = [];
  for (let i = 0; i <= 16; i++) {
    const at = 3 * Math.min(255, i * 16);
    stops.push(`rgb(${table[at]},${table[at + 1]},${table[at + 2]})`);
  }
  panel.ramp.style.background = `linear-gradient(to right, ${stops})`;
  panel.low.textContent = number(data.low);
  panel.high.textContent = number(data.high);
  panel.unit.textContent = data.unit ?? "";
}

/** Share the width among the maps: as many side by side as fit, in rows of equal length. */
function layOut(view) {
  const width = view.root.clientWidth || 900, count = Math.max(1, view.panels.length);
  const fit = Math.max(1, Math.min(count, Math.floor((width + PANEL.gap) / (PANEL.least + PANEL.gap))));
  const columns = Math.ceil(count / Math.ceil(count / fit));
  view.width = Math.min(PANEL.most, Math.floor((width - PANEL.gap * (columns - 1)) / columns));
  view.laidOut = view.panels.length;
  view.maps.style.gridTemplateColumns = `repeat(${columns}, ${view.width}px)`;
  view.plane = planeOf(windowOf(view), view.width);
  view.pictureWidth = Math.min(380, Math.floor((width - 2 * 6) / 3));
}

/** Give a canvas a size in CSS pixels; its pixels are those of the screen. Returns a context in CSS pixels. */
function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1, w = Math.round(width * ratio), h = Math.round(height * ratio);
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

const mapHeight = (plane) => plane.height + MARGIN.top + MARGIN.bottom;

/** Run a drawing that must not leave the map's frame. */
function clipped(context, plane, draw) {
  context.save();
  context.beginPath();
  context.rect(plane.left, plane.top, plane.width, plane.height);
  context.clip();
  context.imageSmoothingEnabled = false;
  draw();
  context.restore();
}

/** Whether points are drawn dark: on a map of light colours. */
const isLight = (panel) => panel.values !== null && LIGHT_PALETTES.has(panel.data.palette);

/** What lies over every map and does not follow the pointer; on light maps the points are dark. */
function frontOf(view, light) {
  const { plane } = view, show = view.model.get("show") ?? {}, tone = Boolean(show.points && light);
  if (view.fronts.has(tone)) return view.fronts.get(tone);
  const front = document.createElement("canvas"), context = sized(front, view.width, mapHeight(plane));
  clipped(context, plane, () => {
    if (show.mask) drawMask(view, context, plane);
    if (show.points) drawPoints(view, context, plane, tone);
    drawBoxes(view, context, plane);
    drawEgo(context, plane);
  });
  drawAxes(context, plane, view.ink);
  view.fronts.set(tone, front);
  return front;
}

/** One whole map. */
function drawPanel(view, panel) {
  const { plane, model } = view, height = mapHeight(plane), context = sized(panel.canvas, view.width, height);
  context.clearRect(0, 0, view.width, height);
  clipped(context, plane, () => drawWhole(context, plane, model.get("extent"), panel.image));
  context.drawImage(frontOf(view, isLight(panel)), 0, 0, view.width, height);
  clipped(context, plane, () => {
    const cell = model.get("cell");
    if (cell?.length === 2) drawCell(view, context, cell);
    if (view.drag) drawDrag(view, context);
    else if (view.hover) drawCross(context, plane, view.hover);
  });
}

/** Lines through the place that the pointer is over, on every map. */
function drawCross(context, plane, place) {
  const [px, py] = toPixel(plane, place.x, place.y), path = new Path2D();
  path.moveTo(plane.left, py);
  path.lineTo(plane.left + plane.width, py);
  path.moveTo(px, plane.top);
  path.lineTo(px, plane.top + plane.height);
  strokeTwice(context, path, "rgba(0, 0, 0, 0.75)", [3, 3], 1, "rgba(255, 255, 255, 0.4)");
}

/** The chosen cell: a frame around it, at least big enough to be seen, and four ticks that point at it. */
function drawCell(view, context, cell) {
  const { plane, model } = view, shape = cellsOf(model);
  if (!shape) return;
  const [px, py] = toPixel(plane, ...Object.values(centreOf(model.get("extent"), shape, cell)));
  const [x0, x1] = model.get("extent"), path = new Path2D();
  const half = Math.max(4, ((x1 - x0) / shape[1] / 2) * plane.scale);
  path.rect(px - half, py - half, 2 * half, 2 * half);
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
    path.moveTo(px + dx * half, py + dy * half);
    path.lineTo(px + dx * (half + 7), py + dy * (half + 7));
  }
  strokeTwice(context, path, "white", [], 1.6, "rgba(0, 0, 0, 0.85)");
}

/** A line from where a drag began, and the outline of the box that it began in at its new place. */
function drawDrag(view, context) {
  const { plane } = view, { from, to } = view.drag, path = new Path2D();
  path.moveTo(...toPixel(plane, from.x, from.y));
  path.lineTo(...toPixel(plane, to.x, to.y));
  const row = boxesAt(view, from).find(([name]) => name === "truth")?.[1];
  if (row) path.addPath(boxPath([row], plane, to.x - from.x, to.y - from.y));
  strokeTwice(context, path, MARK, [5, 3], 2);
}

// -------------------------------------------------------------------------------------------------------- cameras

/** Decode the newest pictures; those that arrive meanwhile wait their turn, all but the last are skipped. */
async function readPictures(view) {
  if (view.decoding) return void (view.decodeAgain = true);
  view.decoding = true;
  do {
    view.decodeAgain = false;
    const pictures = view.model.get("pictures") ?? [];
    const images = await Promise.all(pictures.map(decodePicture));
    view.pictures.splice(0, Infinity, ...pictures.map((data, i) => ({ ...data, image: images[i] })));
  } while (view.decodeAgain && !view.gone);
  view.decoding = false;
  view.stale.add("cameras");
  if (!view.asked && !view.gone) drawStale(view); // the maps are drawn already: no need to wait for another frame
}

async function decodePicture(picture) {
  const blob = new Blob([bytesOf(picture.jpeg)], { type: "image/jpeg" });
  return createImageBitmap(blob).catch(() => null); // a broken picture stays grey
}

function drawCameras(view) {
  const { model } = view, visible = model.get("show")?.cameras !== false && view.pictures.length > 0;
  view.cameras.hidden = !visible;
  if (!visible) return;
  const columns = Math.min(3, view.pictures.length);
  view.cameras.style.gridTemplateColumns = `repeat(${columns}, ${view.pictureWidth}px)`;
  while (view.cameras.children.length < view.pictures.length) {
    const figure = element("figure", "kdlab-camera", view.cameras);
    element("canvas", "", figure);
    element("figcaption", "", figure);
  }
  while (view.cameras.children.length > view.pictures.length) view.cameras.lastChild.remove();
  view.pictures.forEach((picture, i) => drawPicture(view, picture, view.cameras.children[i]));
}

function drawPicture(view, picture, figure) {
  const width = view.pictureWidth, scale = width / picture.width, height = picture.height * scale;
  const [canvas, caption] = figure.children, context = sized(canvas, width, height);
  if (caption.textContent !== picture.name) caption.textContent = picture.name;
  context.fillStyle = `rgb(${MISSING})`;
  context.fillRect(0, 0, width, height);
  if (picture.image) context.drawImage(picture.image, 0, 0, width, height);
  for (const [name, set] of shownSets(view.model)) {
    const path = new Path2D();
    const lines = singlesOf(set.lines?.[picture.camera]);
    for (let i = 0; i < lines.length; i += 5) {
      if (!isShown(set, lines[i], view.model)) continue;
      path.moveTo(lines[i + 1] * scale, lines[i + 2] * scale);
      path.lineTo(lines[i + 3] * scale, lines[i + 4] * scale);
    }
    strokeTwice(context, path, set.colour, set.dash, name === "truth" ? 1.5 : 1.2, "rgba(255, 255, 255, 0.45)");
  }
  drawPixels(view, context, picture, scale);
}

/** Marked pixels; the area of a dot is its weight. */
function drawPixels(view, context, picture, scale) {
  const pixels = view.model.get("pixels") ?? [], most = Math.max(...pixels.map((p) => p[3]), 1e-12);
  context.lineWidth = 1;
  for (const [camera, u, v, weight] of pixels) {
    if (camera !== picture.camera) continue;
    context.beginPath();
    context.arc(u * scale, v * scale, Math.max(1.2, 7 * Math.sqrt(Math.max(0, weight) / most)), 0, 2 * Math.PI);
    context.fillStyle = MARK;
    context.strokeStyle = "black";
    context.globalAlpha = 0.85;
    context.fill();
    context.stroke();
    context.globalAlpha = 1;
  }
}

// ---------------------------------------------------------------------------------------------------------- words

/** A number in about three digits. */
export function number(value) {
  if (value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size && (size >= 1e4 || size < 1e-2)) return value.toExponential(1).replace("e+", "e").replaceAll("-", "−");
  return signed(size >= 100 ? Math.round(value) : Number(value.toPrecision(3)));
}

const signed = (value) => String(value).replace("-", "−");

/** Boxes over a place, smallest first: [set's name, row]. */
function boxesAt(view, { x, y }) {
  const found = [];
  for (const [name, set] of shownSets(view.model)) {
    for (const row of set.rows) {
      const cos = Math.cos(row[4]), sin = Math.sin(row[4]), dx = x - row[0], dy = y - row[1];
      const inside = Math.abs(dx * cos + dy * sin) <= row[2] / 2 && Math.abs(dy * cos - dx * sin) <= row[3] / 2;
      if (inside && isShown(set, row[5], view.model)) found.push([name, row, set]);
    }
  }
  return found.sort((a, b) => a[1][2] * a[1][3] - b[1][2] * b[1][3]);
}

/** The value of a map at a place in metres, undefined for colours. */
function valueAt(view, panel, place) {
  const [row, column] = cellAt(view.model.get("extent"), panel.data.shape, place);
  return panel.values?.[row * panel.data.shape[1] + column];
}

/** Where the readout reads: under the pointer, else at the chosen cell. */
function readPlace(view) {
  const cell = view.model.get("cell"), shape = cellsOf(view.model);
  if (view.hover) return view.hover;
  return cell?.length === 2 && shape ? centreOf(view.model.get("extent"), shape, cell) : null;
}

/** Every map's value at the pointer or the chosen cell, without asking the kernel. */
function drawReadout(view) {
  const place = readPlace(view), shape = cellsOf(view.model);
  for (const panel of view.panels) {
    panel.value.textContent = place && panel.values ? number(valueAt(view, panel, place)) : "";
  }
  if (!place || !shape) {
    view.readout.textContent =
      "Point at a map to read it; click or the arrow keys choose a cell; double click, + and − zoom.";
    return;
  }
  const names = view.model.get("names") ?? [], [row, column] = cellAt(view.model.get("extent"), shape, place);
  const metres = `x ${signed(place.x.toFixed(1))} m, y ${signed(place.y.toFixed(1))} m`;
  const words = [metres, `row ${row}, column ${column}`];
  for (const [name, box, set] of boxesAt(view, place).slice(0, 3)) {
    const kind = (names[box[6]] ?? "box").replaceAll("_", " ");
    words.push(`${name}: ${kind}${set.scored ? ` ${box[5].toFixed(2)}` : ""}`);
  }
  view.readout.textContent = words.join(" · ");
}

/** Tell a screen reader about the chosen cell. */
function announce(view) {
  const cell = view.model.get("cell"), shape = cellsOf(view.model);
  if (cell?.length !== 2 || !shape) return void (view.voice.textContent = "no cell chosen");
  const place = centreOf(view.model.get("extent"), shape, cell);
  const values = view.panels.filter((p) => p.values).map((p) => `${p.data.title} ${number(valueAt(view, p, place))}`);
  view.voice.textContent = [`x ${place.x.toFixed(1)} metres, y ${place.y.toFixed(1)} metres`, ...values].join(", ");
}

/** What the lines stand for and how many boxes there are. */
function drawLegend(view) {
  const { model } = view, parts = [];
  for (const [name, set] of shownSets(model)) {
    const count = set.rows.filter((row) => isShown(set, row[5], model)).length;
    const limit = set.scored ? `, score ≥ ${Number(model.get("min_score").toFixed(2))}` : "";
    parts.push(legendEntry(set.colour, set.dash, `${name} (${count}${limit})`));
  }
  const show = model.get("show") ?? {};
  if (show.mask && view.mask) {
    parts.push(legendEntry(MASK, [], `mask ≥ ${Number(model.get("mask_threshold").toFixed(2))}`));
  }
  if (model.get("pixels")?.length) parts.push(legendEntry(MARK, [0], "pixels that feed the cell (area: weight)", 7));
  view.legend.replaceChildren(...parts);
}

function legendEntry(colour, dash, text, width = 3) {
  const entry = element("span", "kdlab-entry"), space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), stroke = document.createElementNS(space, "line");
  const set = (node, values) => Object.entries(values).forEach(([key, value]) => node.setAttribute(key, value));
  set(svg, { width: 26, height: 8, "aria-hidden": "true" });
  set(stroke, { x1: 2, x2: 24, y1: 4, y2: 4, stroke: colour, "stroke-width": width });
  // A dot is a line without length and with round ends.
  if (dash[0] === 0) set(stroke, { x1: 13, x2: 13.01, "stroke-linecap": "round" });
  else set(stroke, { "stroke-dasharray": dash.join(" ") });
  svg.append(stroke);
  entry.append(svg, text);
  return entry;
}

/** Progress ends in "…"; anything else is something to read. */
function drawStatus(view) {
  const text = view.model.get("status") ?? "";
  view.status.textContent = text;
  view.status.classList.toggle("kdlab-busy", /(…|\.\.\.)$/.test(text));
  view.status.classList.toggle("kdlab-notice", text !== "" && !/(…|\.\.\.)$/.test(text));
}

// ---------------------------------------------------------------------------------------------------------- input

function send(view, name, value) {
  view.model.set(name, value);
  view.model.save_changes();
}

function chooseCell(view, cell) {
  send(view, "cell", cell);
  const place = cell.length ? centreOf(view.model.get("extent"), cellsOf(view.model), cell) : null;
  const { x0, x1, y0, y1 } = view.plane;
  if (place && (place.x < x0 || place.x > x1 || place.y < y0 || place.y > y1)) zoomTo(view, view.zoom.factor, place);
  request(view, "pointer", "voice");
}

/** Show a window around a place, or all of the map for a factor of 1. */
function zoomTo(view, factor, place) {
  view.zoom = { factor: Math.max(1, Math.min(ZOOM.most, factor)), x: place?.x ?? 0, y: place?.y ?? 0 };
  request(view, "layout");
}

/** Metres under a pointer on a panel; `clamped` pulls a place outside the map to its edge. */
function placeOf(view, panel, event, clamped = false) {
  const box = panel.canvas.getBoundingClientRect(), { plane } = view;
  let px = event.clientX - box.left, py = event.clientY - box.top;
  if (clamped) {
    px = Math.max(plane.left, Math.min(plane.left + plane.width - 0.01, px));
    py = Math.max(plane.top + 0.01, Math.min(plane.top + plane.height, py));
  }
  return toMetres(plane, px, py);
}

function listenPointer(view, panel) {
  const { canvas } = panel;
  canvas.addEventListener("pointerdown", (event) => {
    const place = event.button === 0 ? placeOf(view, panel, event) : null;
    view.press = place && { place, x: event.clientX, y: event.clientY };
    if (place && view.model.get("editable")) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const { press } = view, editable = view.model.get("editable");
    const far = press && Math.hypot(event.clientX - press.x, event.clientY - press.y) > CLICK;
    if (editable && far) view.drag = { from: press.place, to: placeOf(view, panel, event, true) };
    view.pointer = { panel, clientX: event.clientX, clientY: event.clientY };
    view.hover = placeOf(view, panel, event);
    request(view, "pointer");
  });
  canvas.addEventListener("pointerup", (event) => release(view, panel, event));
  canvas.addEventListener("dblclick", (event) => {
    const place = placeOf(view, panel, event);
    if (place) zoomTo(view, view.zoom.factor > 1 ? 1 : ZOOM.jump, place);
  });
  for (const name of ["pointerleave", "pointercancel"]) {
    canvas.addEventListener(name, () => {
      view.hover = view.pointer = null;
      if (name === "pointercancel") view.drag = view.press = null;
      request(view, "pointer");
    });
  }
}

/** The end of a click or a drag. */
function release(view, panel, event) {
  const { press, drag } = view;
  view.press = view.drag = null;
  if (drag) {
    const { from, to } = drag;
    send(view, "dragged", [from.x, from.y, to.x, to.y]);
    return request(view, "pointer");
  }
  const place = placeOf(view, panel, event), shape = cellsOf(view.model);
  if (!press || !place || !shape || Math.hypot(event.clientX - press.x, event.clientY - press.y) > CLICK) return;
  chooseCell(view, cellAt(view.model.get("extent"), shape, place));
}

const ARROWS = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [1, 0], ArrowRight: [-1, 0] }; // rows = y, columns = x

const ZOOMS = { "+": ZOOM.step, "=": ZOOM.step, "-": 1 / ZOOM.step, 0: 0 };

/**
 * Arrow keys move the chosen cell, with Shift by five; Escape lets go of it; +, - and 0 zoom; other keys go to Python
 * as `key`.
 */
function onKey(view, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || ["Tab", "Shift"].includes(event.key)) return;
  const shape = cellsOf(view.model);
  event.stopPropagation();
  event.preventDefault();
  if (event.key in ARROWS) {
    if (!shape) return;
    const cell = view.model.get("cell"), start = cell?.length === 2 ? cell : shape.map((n) => n >> 1);
    const step = event.shiftKey ? 5 : 1, by = ARROWS[event.key];
    chooseCell(view, start.map((n, i) => Math.max(0, Math.min(shape[i] - 1, n + step * by[i]))));
  } else if (event.key in ZOOMS) {
    zoomTo(view, view.zoom.factor * ZOOMS[event.key], readPlace(view) ?? view.zoom);
  } else if (event.key === "Escape" && view.drag) {
    view.drag = view.press = null;
    request(view, "pointer");
  } else if (event.key === "Escape") {
    chooseCell(view, []);
  } else {
    view.keys = (view.keys ?? 0) + 1;
    send(view, "key", `${event.key === " " ? "space" : event.key.toLowerCase()}:${view.keys}`);
  }
}

// --------------------------------------------------------------------------------------------------------- render

/** What each trait makes stale: "maps" (numbers), "layers" and "cameras" (what is drawn of boxes), and so on. */
const STALE = {
  panels: ["maps"], extent: ["maps", "layout"], cells: ["pointer"], pictures: [], boxes: ["layers", "cameras"],
  points: ["points", "layers"], mask: ["mask", "layers"], mask_threshold: ["mask", "layers"], pixels: ["cameras"],
  min_score: ["layers", "cameras"], show: ["layers", "cameras"], status: ["status"], names: ["pointer"],
  cell: ["pointer"], editable: ["editable"], label: ["editable"], serial: [],
};

const ON_MAPS = ["maps", "layout", "points", "mask", "layers", "pointer"]; // what of it is seen on the maps

/** Draw what is stale with the next frame of the screen, however many messages come before it. */
function request(view, ...parts) {
  for (const part of parts) view.stale.add(part);
  view.asked ??= requestAnimationFrame(() => {
    view.asked = null;
    if (!view.gone) drawStale(view);
  });
}

function drawStale(view) {
  const { stale } = view;
  view.stale = new Set();
  if (stale.has("maps")) readPanels(view);
  if (view.panels.length !== view.laidOut) stale.add("layout"); // another number of maps gives each another width
  if (stale.has("layout")) layOut(view);
  if (stale.has("points") || stale.has("layout")) view.pointImages.clear();
  if (stale.has("points")) view.points = null;
  if (stale.has("mask") || stale.has("layout")) view.mask = undefined;
  if (stale.has("layers") || stale.has("layout")) view.fronts.clear();
  if (stale.has("layout") && view.pointer) view.hover = placeOf(view, view.pointer.panel, view.pointer);
  if (stale.has("editable")) readEditable(view);
  if (ON_MAPS.some((part) => stale.has(part))) for (const panel of view.panels) drawPanel(view, panel);
  if ((stale.has("cameras") || stale.has("layout")) && !view.decoding) drawCameras(view);
  drawStatus(view);
  drawLegend(view);
  drawReadout(view);
  if (stale.has("voice")) announce(view);
  reportShown(view);
}

/** Write the serial back once the frame that holds it is on the screen: the next frame begins after that paint. */
function reportShown(view) {
  const serial = view.model.get("serial") ?? 0;
  if (view.decoding || view.reported === serial) return;
  view.reported = serial;
  requestAnimationFrame(() => {
    if (view.gone) return;
    view.root.dataset.shown = serial;
    view.root.dataset.cost = (performance.now() - view.since).toFixed(1);
    send(view, "shown", serial);
  });
}

function readEditable(view) {
  const editable = Boolean(view.model.get("editable"));
  view.maps.classList.toggle("kdlab-editable", editable);
  const words = [view.model.get("label") ?? "Bird's-eye-view maps"];
  words.push("arrow keys move the chosen cell, Escape lets go of it, plus and minus zoom");
  if (editable) words.push("drag an object to move it");
  view.maps.setAttribute("aria-label", words.join("; "));
}

/** Colours that the page's theme decides. */
function readTheme(view) {
  view.ink = getComputedStyle(view.root).color;
  request(view, "layers");
}

function buildElements(el) {
  const root = element("div", "kdlab-canvas", el);
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own keys (such as x: cut the cell) stay away
  const view = { root, status: element("div", "kdlab-status", root), maps: element("div", "kdlab-maps", root) };
  view.empty = element("p", "kdlab-empty", view.maps, "No maps yet.");
  view.readout = element("div", "kdlab-readout", root);
  view.legend = element("div", "kdlab-legend", root);
  view.cameras = element("div", "kdlab-cameras", root);
  view.voice = element("div", "kdlab-voice", root);
  view.status.setAttribute("role", "status");
  view.voice.setAttribute("aria-live", "polite");
  view.maps.tabIndex = 0;
  view.maps.setAttribute("role", "application");
  return view;
}

/** Watch the width, the theme and the screen's pixels. Returns what stops it. */
function watchPage(view) {
  const theme = () => readTheme(view), again = () => {
    const seen = `${view.root.clientWidth} ${devicePixelRatio}`; // its height follows from what is drawn
    if (seen !== view.seen) {
      readTheme(view); // a notebook attaches the element after it was made
      request(view, "layout");
    }
    view.seen = seen;
  };
  const size = new ResizeObserver(again), look = new MutationObserver(theme);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  size.observe(view.root);
  look.observe(document.body, { attributes: true });
  look.observe(document.documentElement, { attributes: true });
  scheme.addEventListener("change", theme);
  window.addEventListener("resize", again); // zooming changes devicePixelRatio
  return () => {
    size.disconnect();
    look.disconnect();
    scheme.removeEventListener("change", theme);
    window.removeEventListener("resize", again);
  };
}

/** Show the model in an element, as anywidget asks. Returns what takes it down again. */
export function renderCanvas({ model, el }) {
  const view = Object.assign(buildElements(el), {
    model, panels: [], pictures: [], pointImages: new Map(), fronts: new Map(), stale: new Set(), asked: null, since: 0,
    zoom: { factor: 1, x: 0, y: 0 },
  });
  const stop = watchPage(view), listeners = [];
  for (const [name, parts] of Object.entries(STALE)) {
    const listener = () => {
      if (!view.stale.size && !view.decoding) view.since = performance.now();
      if (name === "pictures") readPictures(view);
      else request(view, ...parts);
    };
    model.on(`change:${name}`, listener);
    listeners.push(() => model.off(`change:${name}`, listener));
  }
  view.maps.addEventListener("keydown", (event) => onKey(view, event));
  view.since = performance.now();
  readTheme(view);
  request(view, "maps", "layout", "editable");
  readPictures(view);
  return () => {
    view.gone = true;
    stop();
    for (const remove of listeners) remove();
    view.root.remove();
  };
}

export default { render: renderCanvas };
