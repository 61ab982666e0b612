/*
 * Controls of a replay page around the canvas of `canvas.js`.
 *
 * The page holds its frames as chunks: length of a JSON text, the text, and bytes that it names; compressed, in
 * base64. `PageModel` stands in for the kernel: the canvas reads its traits and writes them as in a notebook.
 */
import { bytesOf, element, renderCanvas } from "./canvas.js";

const PACE = 500; // milliseconds from frame to frame while playing: keyframes of nuScenes in real time

/** The traits of the canvas, without a kernel behind them. */
class PageModel {
  constructor(state) {
    this.state = state;
    this.listeners = new Map();
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    this.take({ [name]: value });
  }

  /** Several traits at once: all are set before anybody hears of it. */
  take(changes) {
    const changed = Object.keys(changes).filter((name) => this.state[name] !== changes[name]);
    Object.assign(this.state, changes);
    for (const name of changed) for (const listener of this.listeners.get(`change:${name}`) ?? []) listener();
  }

  on(event, listener) {
    this.listeners.set(event, [...(this.listeners.get(event) ?? []), listener]);
  }

  off(event, listener) {
    this.listeners.set(event, (this.listeners.get(event) ?? []).filter((one) => one !== listener));
  }

  save_changes() {}
}

const unpacked = (letters) => Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0));

const opened = new Map();

/** JSON and bytes of a chunk; each is unpacked once, when it is first needed. */
function open(name) {
  if (!opened.has(name)) opened.set(name, unpack(document.getElementById(`chunk-${name}`).textContent));
  return opened.get(name);
}

async function unpack(letters) {
  const stream = new Blob([unpacked(letters)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = bytesOf(await new Response(stream).arrayBuffer());
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const content = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  return { content, bytes: bytes.subarray(4 + length) };
}

/** A value with every place { $: [chunk, offset, length] } replaced by its bytes. */
function revived(value, chunks) {
  if (Array.isArray(value)) return value.map((one) => revived(one, chunks));
  if (value === null || typeof value !== "object") return value;
  if (value.$) {
    const [chunk, offset, length] = value.$;
    return chunks[chunk].bytes.subarray(offset, offset + length);
  }
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, revived(one, chunks)]));
}

const frames = new Map();

/** Everything that the page holds of a frame. */
async function frameOf(index) {
  if (!frames.has(index)) {
    const [shared, own] = await Promise.all([open("shared"), open(String(index))]);
    frames.set(index, revived(own.content, { shared, [index]: own }));
  }
  return frames.get(index);
}

// ------------------------------------------------------------------------------------------------------- controls

/** A labelled picker; it is hidden where there is nothing to pick. */
function picker(row, name, options, changed) {
  const label = element("label", "", row, name), select = element("select", "", label);
  for (const [value, text] of options) Object.assign(element("option", "", select, text), { value });
  label.hidden = options.length < 2;
  select.addEventListener("change", changed);
  return select;
}

/** A labelled threshold from 0 to 1. */
function threshold(row, name, value, changed) {
  const label = element("label", "", row, name), input = element("input", "", label);
  Object.assign(input, { type: "range", min: 0, max: 1, step: 0.01, value });
  const shown = element("output", "", label, value.toFixed(2));
  input.addEventListener("input", () => {
    shown.textContent = Number(input.value).toFixed(2);
    changed(Number(input.value));
  });
  return input;
}

function toggle(row, name, on, changed) {
  const label = element("label", "", row), input = element("input", "", label);
  Object.assign(input, { type: "checkbox", checked: on });
  label.append(name);
  input.addEventListener("change", changed);
  return input;
}

function button(row, text, name, pressed) {
  const made = element("button", "", row, text);
  made.type = "button";
  made.setAttribute("aria-label", name);
  made.title = name;
  made.addEventListener("click", pressed);
  return made;
}

/** Player: which frame, and going on by itself. */
function frameControls(row, page, show) {
  const player = { count: page.labels.length, timer: null };
  const label = element("label", "replay-frame", row), slider = element("input", "", label);
  Object.assign(slider, { type: "range", min: 0, max: player.count - 1, step: 1, value: 0 });
  slider.setAttribute("aria-label", "frame");
  const name = element("output", "replay-name", label);
  player.index = () => Number(slider.value);
  player.go = async (index) => {
    slider.value = (index + player.count) % player.count;
    name.textContent = page.labels[player.index()];
    await show();
  };
  const next = () => player.go(player.index() + 1).then(() => player.timer && player.play(true));
  player.play = (on) => {
    clearTimeout(player.timer);
    player.timer = on ? setTimeout(next, PACE) : null;
    player.button.textContent = on ? "❚❚" : "▶";
    player.button.setAttribute("aria-label", on ? "stop" : "play");
  };
  slider.addEventListener("input", () => player.go(player.index()));
  button(row, "◀|", "frame before", () => player.go(player.index() - 1));
  player.button = button(row, "▶", "play", () => player.play(!player.timer));
  button(row, "|▶", "next frame", () => player.go(player.index() + 1));
  row.append(label);
  row.hidden = player.count < 2;
  return player;
}

/** Build the page. */
function start() {
  const page = JSON.parse(document.getElementById("page").textContent), root = document.getElementById("replay");
  const palettes = Object.fromEntries(Object.entries(page.palettes).map(([name, table]) => [name, unpacked(table)]));
  const shownFirst = { boxes: true, points: false, mask: false, cameras: true };
  const model = new PageModel({
    ...page.state, palettes, panels: [], pictures: [], boxes: {}, points: null, mask: null, pixels: [], cell: [],
    min_score: 0.3, mask_threshold: 0.5, show: shownFirst, status: "", serial: 0, shown: 0, editable: false, key: "",
    label: "Bird's-eye-view maps",
  });
  const first = element("div", "replay-row", root), second = element("div", "replay-row", root);
  const third = element("div", "replay-row", root), controls = {};
  const show = () => showFrame(model, controls, controls.player.index());
  controls.player = frameControls(first, page, show);
  controls.stage = picker(second, "stage", page.stages.map((s) => [s, s]), show);
  controls.view = picker(second, "shown as", page.views.map((v) => [v, v]), show);
  const terms = page.terms.map((t) => [t, t === "all" ? "all terms" : t]);
  controls.term = picker(second, "term", terms.length ? [...terms, ["", "none"]] : [], show);
  controls.mask = picker(second, "mask", page.masks.length ? page.masks.map((m) => [m, m]) : [], show);
  threshold(third, "boxes: score from", 0.3, (value) => model.set("min_score", value));
  const limit = threshold(third, "mask: value from", 0.5, (value) => model.set("mask_threshold", value));
  limit.parentElement.hidden = !page.masks.length;
  const toggles = Object.entries(shownFirst).filter(([name]) => name !== "mask" || page.masks.length);
  const boxes = toggles.map(([name, on]) => [name, toggle(third, name, on, () => {
    model.set("show", Object.fromEntries(boxes.map(([of, box]) => [of, box.checked])));
  })]);
  renderCanvas({ model, el: root });
  element("p", "replay-help", root, "Keys, once a map has been clicked or reached with Tab: space plays and stops, " +
    "[ and ] step through the frames, arrows move the cell, Escape lets go of it, + and − zoom, 0 shows all.");
  model.on("change:key", () => followKey(model, controls.player));
  controls.player.go(0);
}

let wanted = 0;

/** Hand a frame to the canvas; one that was asked for earlier and comes late is dropped. */
async function showFrame(model, controls, index) {
  const turn = ++wanted, frame = await frameOf(index).catch((error) => ({ error }));
  if (turn !== wanted) return;
  if (frame.error) return void model.set("status", `Frame ${index} cannot be read: ${frame.error.message}`);
  const panels = [...(frame.maps[`${controls.stage.value}|${controls.view.value}`] ?? [])];
  const term = frame.terms[controls.term.value];
  if (term) panels.push(term);
  const mask = frame.masks[controls.mask.value] ?? null, { pictures, boxes, points } = frame;
  model.take({ panels, pictures, boxes, points, mask, status: "", serial: model.get("serial") + 1 });
}

function followKey(model, player) {
  const key = model.get("key").replace(/:\d+$/, "");
  if (key === "space") player.play(!player.timer);
  else if (key === "[" || key === "pageup") player.go(player.index() - 1);
  else if (key === "]" || key === "pagedown") player.go(player.index() + 1);
}

if (typeof DecompressionStream === "undefined") {
  const words = "This browser is too old to unpack the page; take one of 2023 or later.";
  element("p", "", document.getElementById("replay"), words);
} else {
  start();
}
