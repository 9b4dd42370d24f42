"use strict";
// Everything shown is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const text = data.text || null;
const T = text ? text.pieces.length : 0;
const layers = text ? text.layers : [];
const L = layers.length;
const TOP = 16; // levels of a ramp, counted from 0
const ROWS = 200; // of a table of tokens
const $ = (id) => document.getElementById(id);
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;

function visible(value) {
  return value.replace(UNSEEN, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "\u2421" : "⟨" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
  });
}
function quoted(t) {
  const piece = text.pieces[t];
  return piece === "" ? "… (part of a character)" : visible(piece).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
}
function make(tag, content, name) {
  const element = document.createElement(tag);
  if (content !== undefined && content !== null) element.textContent = content;
  if (name) element.className = name;
  return element;
}
function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
}
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + "%");

// ---- head

function drawHead() {
  $("model").textContent = data.title;
  $("rule").textContent = data.rule;
  const badge = (label, kind) => $("badges").append(make("span", label, "badge" + (kind ? " " + kind : "")));
  badge(data.name);
  badge(data.routing + (data.causal ? " · causal" : " · NOT causal: sees the whole text"), data.causal ? "good" : "bad");
  data.badges.forEach((label) => badge(visible(label)));
  for (const { name, value, note } of data.figures) {
    const box = document.createElement("div"), shown = make("dd", value);
    shown.append(make("small", note));
    box.append(make("dt", name), shown);
    $("tiles").append(box);
  }
}

// ---- tables: click or press a heading to sort

function cell(kind, value) {
  const [v, error] = Array.isArray(value) ? value : [value, undefined];
  const element = make("td", null, kind === "text" ? "text" : "");
  if (kind === "share") {
    element.classList.add("share");
    element.style.setProperty("--fill", Math.min(100, 100 * (v || 0)).toFixed(1) + "%");
    element.textContent = percent(v);
    if (error) element.append(make("small", " ±" + (100 * error).toFixed(1)));
    return element;
  }
  element.textContent = kind === "text" ? visible(String(v ?? "–")) : kind === "count" ? (v === null ? "–" : v.toLocaleString("en")) : number(v);
  if (kind === "difference" && v > 0) element.textContent = "+" + element.textContent;
  if (error) element.append(make("small", " ±" + number(error)));
  return element;
}
const key = (value) => (Array.isArray(value) ? value[0] : value);
function ordered(rows, column, direction) {
  const rank = (x) => (x === null || x === undefined ? 1 : 0);
  return rows.slice().sort((p, q) => {
    const a = key(p[column]), b = key(q[column]);
    if (rank(a) || rank(b)) return rank(a) - rank(b);
    return direction * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  });
}
function heading(columns, onSort) {
  const row = document.createElement("tr");
  columns.forEach((column, i) => {
    const th = make("th", null, column.kind === "text" ? "text" : "");
    th.scope = "col";
    const button = make("button", column.name);
    button.type = "button";
    button.addEventListener("click", () => {
      const before = th.getAttribute("aria-sort");
      const first = column.kind === "text" || column.kind === "count" ? "ascending" : "descending";
      const now = before === null ? first : before === "ascending" ? "descending" : "ascending";
      row.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", now);
      onSort(i, now === "ascending" ? 1 : -1);
    });
    th.append(button);
    row.append(th);
  });
  const head = document.createElement("thead");
  head.append(row);
  return head;
}
function drawTable(table) {
  const panel = make("section", null, "panel");
  panel.append(make("h2", table.title));
  const element = document.createElement("table");
  element.dataset.key = table.key;
  const body = document.createElement("tbody");
  const fill = (rows) => body.replaceChildren(...rows.slice(0, ROWS).map((row) => {
    const tr = document.createElement("tr");
    tr.append(...row.map((value, i) => cell(table.columns[i].kind, value)));
    return tr;
  }));
  element.append(heading(table.columns, (i, direction) => fill(ordered(table.rows, i, direction))), body);
  fill(table.rows);
  const scroll = make("div", null, "scroll");
  scroll.append(element);
  panel.append(scroll, make("p", table.note, "note"));
  return panel;
}
function tokenTable() {
  const columns = [{ name: "token", kind: "count" }, { name: "text", kind: "text" }, { name: "class", kind: "text" }, { name: "depth", kind: "number" }, { name: "loss", kind: "number" }];
  const rows = text.ids.map((_, t) => [t, quoted(t), text.classNames[text.classes[t]], text.depth[t], text.loss[t]]);
  return { key: "tokens", title: "Tokens", note: "At most " + ROWS + "; sort by depth for the most and the least routed.", columns, rows };
}

// ---- the text, colored by depth

const spans = []; // of each token, its pieces on the page
const shadeOf = (t) => "c" + Math.round((TOP * text.depth[t]) / Math.max(1, L));
function drawText() {
  const reading = $("reading");
  if (text.code) reading.classList.add("code");
  const special = new Set(text.special), windows = new Set(text.windows.slice(1));
  const page = document.createDocumentFragment();
  let line;
  const newLine = () => {
    line = make("div", null, "line");
    line.dir = "auto";
    page.append(line);
  };
  newLine();
  const add = (t, content, name) => {
    const span = make("span", content, "t " + shadeOf(t) + (name ? " " + name : ""));
    span.dataset.t = t;
    spans[t].push(span);
    line.append(span);
  };
  const plain = (content) => content.split("\n").forEach((part, i) => {
    if (i) newLine();
    if (part) line.append(visible(part));
  });
  for (let t = 0; t < T; t++) {
    spans[t] = [];
    if (windows.has(t)) {
      page.append(make("div", "a new window: the model sees nothing of what stands above", "window"));
      newLine();
    }
    plain(text.gaps[t]);
    if (special.has(t)) add(t, visible(text.pieces[t]), "special");
    else if (text.pieces[t] === "") add(t, "", "part");
    else {
      text.pieces[t].split("\n").forEach((part, i, parts) => {
        if (part) add(t, visible(part));
        if (i < parts.length - 1) add(t, "⏎", "end"), newLine();
      });
    }
  }
  plain(text.tail);
  reading.append(page);
}
function drawLegend() {
  const ramp = make("span", null, "ramp");
  for (let i = 0; i <= TOP; i++) ramp.append(make("i", null, "c" + i));
  $("legend").append(make("span", "layers that computed a token: 0"), ramp, make("span", L));
}

// ---- the cursor, and the figures of the token under it

let cursor = 0;
function moveTo(t, scroll) {
  for (const span of spans[cursor]) span.classList.remove("at");
  cursor = Math.max(0, Math.min(T - 1, t));
  for (const span of spans[cursor]) span.classList.add("at");
  if (scroll && spans[cursor].length) spans[cursor][0].scrollIntoView({ block: "nearest", inline: "nearest" });
  drawDetail(cursor);
  requestAnimationFrame(drawMap);
}
function drawDetail(t) {
  const list = document.createElement("dl");
  const row = (name, value) => list.append(make("dt", name), make("dd", value));
  row("token", t + " of " + T + " · id " + text.ids[t]);
  row("class", text.classNames[text.classes[t]]);
  row("depth", text.depth[t] + " of " + L + (text.sinks.includes(t) ? " (a sink, always routed)" : ""));
  row("loss", text.loss[t] === null ? "– (nothing before it)" : number(text.loss[t]) + " nats");
  const measures = Object.keys(text.labels).filter((name) => name in layers[0].measures);
  const head = document.createElement("tr"), thead = document.createElement("thead"), tbody = document.createElement("tbody");
  head.append(...["layer", "", ...measures.map((name) => text.labels[name]), "threshold"].map((name) => make("th", name)));
  thead.append(head);
  for (const layer of layers.slice().reverse()) {
    const tr = document.createElement("tr"), routed = layer.selected[t] === "1";
    const mark = make("td", routed ? "●" : "○");
    mark.setAttribute("aria-label", routed ? "routed" : text.skipping);
    const figures = [...measures.map((name) => layer.measures[name][t]), layer.threshold];
    tr.append(make("td", layer.layer), mark, ...figures.map((value) => make("td", brief(value))));
    tbody.append(tr);
  }
  const table = document.createElement("table"), scroll = make("div", null, "scroll");
  table.append(thead, tbody);
  scroll.append(table);
  $("detail").replaceChildren(make("p", quoted(t), "token"), list, scroll, make("p", "● routed   ○ " + text.skipping, "note"));
}
const brief = (value) => (value === null ? "–" : value === 0 ? "0" : Number(value.toPrecision(3)).toString());

// ---- the heat map: layers × the tokens around the cursor

const LEFT = 30, CELL = 14, LABELS = 74;
const high = Math.max(10, Math.min(20, Math.floor(280 / L)));
const view = { first: 0, count: 0 };
/** Levels of a layer's tokens: nothing where one passed by, else by the rank of its score. */
function levels(layer) {
  const order = layer.score.map((score, t) => [score, t]).sort((a, b) => a[0] - b[0]);
  const result = new Array(T).fill(0);
  order.forEach(([, t], rank) => { if (layer.selected[t] === "1") result[t] = 6 + Math.round((10 * rank) / Math.max(1, T - 1)); });
  return result;
}
const heat = layers.map(levels);
function drawMap() {
  const canvas = $("map"), ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = L * high + LABELS;
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio), canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d"), style = getComputedStyle(canvas), color = (name) => style.getPropertyValue("--" + name).trim();
  pen.scale(ratio, ratio);
  view.count = Math.min(T, Math.floor((width - LEFT) / CELL));
  view.first = Math.max(0, Math.min(T - view.count, cursor - (view.count >> 1)));
  pen.font = "11px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
  pen.textBaseline = "middle", pen.textAlign = "right";
  const shades = Array.from({ length: TOP + 1 }, (_, i) => color("c" + i)), soft = color("soft"), ink = color("ink");
  for (let l = 0; l < L; l++) {
    const y = (L - 1 - l) * high;
    pen.fillStyle = soft;
    if (high >= 11 || l % 2 === 0) pen.fillText(layers[l].layer, LEFT - 7, y + high / 2);
    for (let i = 0; i < view.count; i++) {
      pen.fillStyle = shades[heat[l][view.first + i]];
      pen.fillRect(LEFT + i * CELL, y, CELL - 1, high - 1);
    }
  }
  pen.strokeStyle = color("focus"), pen.lineWidth = 2;
  pen.strokeRect(LEFT + (cursor - view.first) * CELL, 1, CELL - 1, L * high - 2);
  for (let i = 0; i < view.count; i++) {
    const t = view.first + i;
    pen.save();
    pen.translate(LEFT + i * CELL + CELL / 2, L * high + 6);
    pen.rotate(-Math.PI / 3);
    pen.fillStyle = t === cursor ? ink : soft;
    pen.fillText(Array.from(text.pieces[t] === "" ? "…" : quoted(t)).slice(0, 11).join(""), 0, 0);
    pen.restore();
  }
}

// ---- pointer and keys

function onKey(event) {
  const target = { ArrowLeft: cursor - 1, ArrowRight: cursor + 1, Home: 0, End: T - 1 }[event.key];
  if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moveTo(target, true);
}
function listen() {
  const reading = $("reading"), map = $("map");
  const ofText = (event) => { const span = event.target.closest("[data-t]"); if (span) moveTo(Number(span.dataset.t), false); };
  for (const kind of ["mouseover", "click"]) reading.addEventListener(kind, ofText);
  for (const place of [reading, map]) place.addEventListener("keydown", onKey);
  const ofMap = (event) => Math.max(0, Math.min(T - 1, view.first + Math.floor((event.offsetX - LEFT) / CELL)));
  map.addEventListener("mousemove", (event) => drawDetail(ofMap(event)));
  map.addEventListener("mouseleave", () => drawDetail(cursor));
  map.addEventListener("click", (event) => moveTo(ofMap(event), true));
  new ResizeObserver(() => requestAnimationFrame(drawMap)).observe(map);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
}

drawHead();
if (text) {
  drawLegend();
  drawText();
  $("textual").hidden = false;
  moveTo(0, false);
  listen();
}
const tables = text ? [...data.tables, tokenTable()] : data.tables;
$("tables").append(...tables.map(drawTable));
document.documentElement.dataset.ready = String(Math.round(performance.now()));
