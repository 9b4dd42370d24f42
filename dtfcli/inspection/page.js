"use strict";
// Everything shown is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const text = data.text || null;
const T = text ? text.pieces.length : 0;
const layers = text ? text.layers : [];
const L = layers.length;
const TOP = 16; // levels of a ramp, counted from 0
const $ = (id) => document.getElementById(id);
const NAMES = text ? { selected: "routed", ...text.labels } : {}; // of the figures of a layer
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
  const fill = (rows) => body.replaceChildren(...rows.map((row) => {
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

// ---- what the colors mean

const state = { measure: "depth", layer: 0, at: 0, hits: [] };
const chosen = layers.map((layer) => layer.selected);
const at = (l, name, t) => (name === "selected" ? Number(chosen[l][t]) : layers[l].measures[name][t]);
const ranks = new Map();
/** Rank in [0, 1] of every token's value; ties share their first rank, tokens without a value get null. */
function rankOf(id, values) {
  if (!ranks.has(id)) {
    const order = values.map((v, i) => [v, i]).filter(([v]) => v !== null).sort((a, b) => a[0] - b[0]);
    const result = new Array(values.length).fill(null);
    let first = 0;
    order.forEach(([v, i], k) => {
      if (k && order[k - 1][0] !== v) first = k;
      result[i] = order.length > 1 ? first / (order.length - 1) : 0;
    });
    ranks.set(id, result);
  }
  return ranks.get(id);
}
const ENDS = text ? { selected: [text.skipping, "routed"], ...text.ends } : {}; // of figures between 0 and 1
/** For the measure in force: a class for each token, and the legend's ends. */
function coloring() {
  const { measure, layer } = state;
  if (measure === "depth") return { of: (t) => "c" + Math.round((TOP * text.depth[t]) / Math.max(1, L)), ends: ["0", String(L)], steps: L <= 8 ? L : 0 };
  if (measure === "loss") {
    const rank = rankOf("loss", text.loss);
    return { of: (t) => level(rank[t]), ends: ["well predicted", "badly"] };
  }
  if (measure in ENDS) {
    return { of: (t) => level(Math.min(1, Math.max(0, at(layer, measure, t)))), ends: ENDS[measure], steps: measure === "selected" ? 1 : 0 };
  }
  const values = layers[layer].measures[measure];
  const rank = rankOf(measure + layer, values);
  const order = values.filter((v) => v !== null).sort((a, b) => a - b);
  return { of: (t) => level(rank[t]), ends: [number(order[0]), number(order[order.length - 1])], note: "by rank" };
}
const level = (share) => (share === null ? "plain" : "c" + Math.round(TOP * share));

// ---- the text

const spans = []; // of each token, its pieces on the page
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
    const span = make("span", content, "t" + (name ? " " + name : ""));
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
let painted = [];
function paint() {
  const { of, ends, steps, note } = coloring();
  for (let t = 0; t < T; t++) {
    const name = of(t);
    if (painted[t] === name) continue;
    for (const span of spans[t]) {
      if (painted[t]) span.classList.remove(painted[t]);
      span.classList.add(name);
    }
    painted[t] = name;
  }
  const ramp = make("span", null, "ramp");
  if (steps) {
    for (let i = 0; i <= steps; i++) ramp.append(make("i", steps > 1 ? String(i) : "", "wide c" + Math.round((TOP * i) / steps)));
  } else for (let i = 0; i <= TOP; i++) ramp.append(make("i", null, "c" + i));
  const inner = steps > 1 ? [make("span", "layers"), ramp] : [make("span", ends[0]), ramp, make("span", ends[1])];
  if (note) inner.push(make("span", note));
  $("legend").replaceChildren(...inner);
  const perLayer = state.measure in NAMES;
  $("measure").value = state.measure;
  $("layer").value = String(perLayer ? state.layer : -1);
  $("lower").disabled = perLayer && state.layer === 0;
  $("upper").disabled = perLayer && state.layer === L - 1;
}
function moveTo(t, scroll) {
  t = Math.max(0, Math.min(T - 1, t));
  for (const span of spans[state.at]) span.classList.remove("at");
  state.at = t;
  for (const span of spans[t]) span.classList.add("at");
  if (scroll && spans[t].length) spans[t][0].scrollIntoView({ block: "nearest", inline: "nearest" });
  drawDetail();
  requestDraw();
}
function drawDetail() {
  const t = state.at, box = $("detail");
  const list = document.createElement("dl");
  const row = (name, value) => list.append(make("dt", name), make("dd", value));
  row("token", t + " of " + T + " · id " + text.ids[t]);
  row("class", text.classNames[text.classes[t]]);
  row("depth", text.depth[t] + " of " + L + (sinks.has(t) ? " (a sink, always routed)" : ""));
  row("loss", text.loss[t] === null ? "– (nothing before it)" : number(text.loss[t]) + " nats");
  const table = document.createElement("table");
  const measures = figuresOf(0), withThreshold = layers[0].threshold !== null;
  const head = document.createElement("tr");
  ["layer", "", ...measures.map((name) => NAMES[name])].forEach((name) => head.append(make("th", name)));
  if (withThreshold) head.insertBefore(make("th", "threshold"), head.children[3] || null);
  const body = layers.map((layer, l) => {
    const tr = document.createElement("tr");
    const mark = make("td", chosen[l][t] === "1" ? "●" : "○");
    mark.setAttribute("aria-label", way(l, t));
    tr.append(make("td", layer.layer), mark);
    measures.forEach((name) => tr.append(make("td", brief(at(l, name, t)))));
    if (withThreshold) tr.insertBefore(make("td", brief(layer.threshold)), tr.children[3] || null);
    return tr;
  });
  const thead = document.createElement("thead"), tbody = document.createElement("tbody");
  thead.append(head);
  tbody.append(...body.reverse());
  table.append(thead, tbody);
  const scroll = make("div", null, "scroll");
  scroll.append(table);
  box.replaceChildren(make("p", quoted(t), "token"), list, scroll, make("p", "● routed   ○ " + text.skipping, "note"));
}
const brief = (value) => (value === null ? "–" : value === 0 ? "0" : Number(value.toPrecision(3)).toString());
const way = (l, t) => (chosen[l][t] === "1" ? "routed" : text.skipping);
/** The figures that a layer has, in the order of their labels. */
const figuresOf = (l) => Object.keys(text.labels).filter((name) => name in layers[l].measures);
const sinks = new Set(text ? text.sinks : []);

// ---- the heat map

const shade = { c: [], line: "", ink: "", soft: "", focus: "", font: "" };
function readColors() {
  const style = getComputedStyle(document.documentElement);
  for (let i = 0; i <= TOP; i++) shade.c[i] = style.getPropertyValue("--c" + i).trim();
  for (const name of ["line", "ink", "soft", "focus"]) shade[name] = style.getPropertyValue("--" + name).trim();
  shade.font = "11px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
}
function surface(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px";
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}
const LEFT = 30, CELL = 14;
const rowHeight = () => Math.max(10, Math.min(20, Math.floor(280 / L)));
const view = { first: 0, count: 0 };
/** Level of a cell of the close view: nothing where the token passed by, else by the rank of its score. */
function heat(l, t) {
  return chosen[l][t] === "1" ? 6 + Math.round(10 * rankOf("score" + l, layers[l].score)[t]) : 0;
}
let overviewImage = null;
function drawOverview() {
  const canvas = $("overview"), height = Math.max(48, 6 * L);
  const [pen, width] = surface(canvas, height);
  const room = width - LEFT, columns = Math.min(T, Math.floor(room));
  const version = columns + "/" + height + "/" + shade.c.join();
  if (!overviewImage || overviewImage.version !== version) {
    const image = document.createElement("canvas");
    image.width = columns, image.height = L;
    const brush = image.getContext("2d");
    for (let l = 0; l < L; l++) for (let x = 0; x < columns; x++) {
      const first = Math.floor((x * T) / columns), stop = Math.max(first + 1, Math.floor(((x + 1) * T) / columns));
      let routed = 0;
      for (let t = first; t < stop; t++) routed += chosen[l][t] === "1";
      brush.fillStyle = shade.c[Math.round((TOP * routed) / (stop - first))];
      brush.fillRect(x, L - 1 - l, 1, 1);
    }
    overviewImage = { version, image };
  }
  pen.imageSmoothingEnabled = false;
  pen.drawImage(overviewImage.image, LEFT, 0, room, height);
  pen.strokeStyle = shade.focus, pen.lineWidth = 2;
  pen.strokeRect(LEFT + (room * view.first) / T + 1, 1, Math.max(3, (room * view.count) / T - 2), height - 2);
}
function drawClose() {
  const canvas = $("close"), high = rowHeight(), labels = 74;
  const [pen, width] = surface(canvas, L * high + labels);
  view.count = Math.min(T, Math.floor((width - LEFT) / CELL));
  view.first = Math.max(0, Math.min(T - view.count, state.at - (view.count >> 1)));
  pen.font = shade.font, pen.textBaseline = "middle";
  for (let l = 0; l < L; l++) {
    const y = (L - 1 - l) * high;
    pen.fillStyle = shade.soft, pen.textAlign = "right";
    if (high >= 11 || l % 2 === 0) pen.fillText(layers[l].layer, LEFT - 7, y + high / 2);
    for (let i = 0; i < view.count; i++) {
      pen.fillStyle = shade.c[heat(l, view.first + i)];
      pen.fillRect(LEFT + i * CELL, y, CELL - 1, high - 1);
    }
  }
  const x = LEFT + (state.at - view.first) * CELL;
  pen.strokeStyle = shade.focus, pen.lineWidth = 2;
  pen.strokeRect(x, 1, CELL - 1, L * high - 2);
  pen.textAlign = "right";
  for (let i = 0; i < view.count; i++) {
    const t = view.first + i;
    pen.save();
    pen.translate(LEFT + i * CELL + CELL / 2, L * high + 6);
    pen.rotate(-Math.PI / 3);
    pen.fillStyle = t === state.at ? shade.ink : shade.soft;
    const label = text.pieces[t] === "" ? "…" : quoted(t);
    pen.fillText(Array.from(label).slice(0, 11).join(""), 0, 0);
    pen.restore();
  }
}
let drawing = false;
function requestDraw() {
  if (drawing || !L) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawClose(); drawOverview(); });
}
function listenToMaps() {
  const close = $("close"), overview = $("overview"), tip = $("tip");
  close.addEventListener("mousemove", (event) => {
    const t = view.first + Math.floor((event.offsetX - LEFT) / CELL), l = L - 1 - Math.floor(event.offsetY / rowHeight());
    if (event.offsetX < LEFT || t >= view.first + view.count || l < 0 || l >= L) return;
    const figures = figuresOf(l).map((name) => NAMES[name] + " " + number(at(l, name, t)));
    if (layers[l].threshold !== null) figures.push("threshold " + number(layers[l].threshold));
    tip.hidden = false;
    tip.textContent = "token " + t + "  " + quoted(t) + "   layer " + layers[l].layer + "  " + way(l, t) + "   " + figures.join("  ");
  });
  close.addEventListener("click", (event) => moveTo(view.first + Math.floor((event.offsetX - LEFT) / CELL), true));
  let held = false;
  const jump = (event) => moveTo(Math.floor(((event.offsetX - LEFT) / (overview.clientWidth - LEFT)) * T), true);
  overview.addEventListener("mousedown", (event) => { held = true; jump(event); });
  overview.addEventListener("mousemove", (event) => held && jump(event));
  addEventListener("mouseup", () => { held = false; });
  new ResizeObserver(requestDraw).observe(close);
}

// ---- every token in a table

function drawTokenTable() {
  const columns = [{ name: "token", kind: "count" }, { name: "text", kind: "text" }, { name: "class", kind: "text" }, { name: "depth", kind: "number" }, { name: "loss", kind: "number" }, { name: "next loss", kind: "number" }];
  const leads = text.leading in layers[0].measures;
  if (leads) columns.push({ name: "mean " + NAMES[text.leading], kind: "number" });
  const count = new Map();
  text.ids.forEach((id) => count.set(id, (count.get(id) || 0) + 1));
  columns.push({ name: "times", kind: "count" });
  const rows = text.ids.map((id, t) => {
    const row = [t, quoted(t), text.classNames[text.classes[t]], text.depth[t], text.loss[t], t + 1 < T ? text.loss[t + 1] : null];
    if (leads) row.push(layers.reduce((sum, layer) => sum + layer.measures[text.leading][t], 0) / L);
    row.push(count.get(id));
    return row;
  });
  let shown = 25, now = rows;
  const body = document.createElement("tbody");
  const fill = () => {
    body.replaceChildren(...now.slice(0, shown).map((row) => {
      const tr = document.createElement("tr");
      row.forEach((value, i) => {
        const td = cell(columns[i].kind, value);
        if (i === 1) td.classList.add("glyphs");
        if (i === 3) td.replaceChildren(make("span", value, "t c" + Math.round((TOP * value) / Math.max(1, L))));
        tr.append(td);
      });
      tr.addEventListener("click", () => moveTo(row[0], true));
      return tr;
    }));
    $("more").hidden = shown >= rows.length;
    $("token-note").textContent = Math.min(shown, rows.length) + " of " + rows.length + "; sort by depth for the most and the least routed";
  };
  $("token-table").append(heading(columns, (i, direction) => { now = ordered(rows, i, direction); fill(); }), body);
  $("more").addEventListener("click", () => { shown += 200; fill(); });
  fill();
  $("token-panel").hidden = false;
}

// ---- finding, keys, theme

function search() {
  for (const t of state.hits) for (const span of spans[t]) span.classList.remove("hit");
  state.hits = [];
  const query = $("search").value.toLowerCase();
  if (query) {
    const starts = [];
    let whole = "";
    for (let t = 0; t < T; t++) { whole += text.gaps[t]; starts.push(whole.length); whole += text.pieces[t]; }
    const lower = whole.toLowerCase();
    // A few characters change their length in lower case; then only the tokens themselves are searched.
    if (lower.length === whole.length) {
      let t = 0;
      for (let place = lower.indexOf(query); place >= 0; place = lower.indexOf(query, place + query.length)) {
        while (t + 1 < T && starts[t + 1] <= place) t++;
        if (state.hits[state.hits.length - 1] !== t) state.hits.push(t);
      }
    } else for (let t = 0; t < T; t++) if (text.pieces[t].toLowerCase().includes(query)) state.hits.push(t);
    for (const t of state.hits) for (const span of spans[t]) span.classList.add("hit");
  }
  $("hits").textContent = query ? state.hits.length + " found" : "";
}
function nextHit(direction) {
  if (!state.hits.length) return;
  const ahead = direction > 0 ? state.hits.find((t) => t > state.at) : state.hits.findLast((t) => t < state.at);
  moveTo(ahead ?? (direction > 0 ? state.hits[0] : state.hits[state.hits.length - 1]), true);
}
function stepLayer(step) {
  if (!L) return;
  if (!(state.measure in NAMES)) state.measure = "selected";
  else state.layer = Math.max(0, Math.min(L - 1, state.layer + step));
  paint();
}
/** The token of the line above or below that is nearest to the cursor. */
function byLine(step) {
  const here = spans[state.at][0].getBoundingClientRect();
  const middle = here.left + here.width / 2;
  let best = null, row = null;
  for (let t = state.at + step; t >= 0 && t < T; t += step) {
    if (!spans[t].length) continue;
    const box = spans[t][step > 0 ? 0 : spans[t].length - 1].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < here.height / 2) continue;
    if (row === null) row = box.top;
    if (Math.abs(box.top - row) > here.height / 2) break;
    const gap = Math.abs(box.left + box.width / 2 - middle);
    if (best === null || gap < best.gap) best = { t, gap };
  }
  if (best) moveTo(best.t, true);
}
function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  readColors();
  requestDraw();
}
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && typing) return event.target.blur();
  if (typing) return;
  const reading = document.activeElement === $("reading");
  const actions = { "?": () => $("help").showModal(), t: toggleTheme };
  if (text) {
    Object.assign(actions, {
      ArrowLeft: () => moveTo(state.at - 1, true), ArrowRight: () => moveTo(state.at + 1, true),
      "[": () => stepLayer(-1), "]": () => stepLayer(1),
      d: () => { state.measure = "depth"; paint(); },
      "/": () => { $("search").focus(); $("search").select(); },
    });
    if (reading) Object.assign(actions, { ArrowUp: () => byLine(-1), ArrowDown: () => byLine(1), Home: () => moveTo(0, true), End: () => moveTo(T - 1, true) });
  }
  const action = actions[event.key];
  if (action) event.preventDefault(), action();
}
function listen() {
  addEventListener("keydown", onKey);
  $("theme").addEventListener("click", toggleTheme);
  $("help-button").addEventListener("click", () => $("help").showModal());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColors(); requestDraw(); });
  if (!text) return;
  $("measure").addEventListener("change", (event) => { state.measure = event.target.value; paint(); });
  $("layer").addEventListener("change", (event) => {
    const value = Number(event.target.value);
    if (value < 0) state.measure = "depth";
    else {
      state.layer = value;
      if (!(state.measure in NAMES)) state.measure = "selected";
    }
    paint();
  });
  $("lower").addEventListener("click", () => stepLayer(-1));
  $("upper").addEventListener("click", () => stepLayer(1));
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1); });
  const token = (event) => event.target.closest("[data-t]");
  $("reading").addEventListener("mouseover", (event) => { const span = token(event); if (span) moveTo(Number(span.dataset.t), false); });
  $("reading").addEventListener("click", (event) => { const span = token(event); if (span) moveTo(Number(span.dataset.t), false); });
  listenToMaps();
}
function offer(select, value, label) {
  const option = make("option", label);
  option.value = value;
  select.append(option);
}
function drawControls() {
  const measure = $("measure"), layer = $("layer");
  offer(measure, "depth", "depth: routed layers");
  if (text.loss.some((v) => v !== null)) offer(measure, "loss", "loss of the token");
  offer(layer, "-1", "all layers");
  layers.forEach((entry, l) => offer(layer, String(l), "layer " + entry.layer));
  ["selected", ...figuresOf(0)].forEach((name) => offer(measure, name, NAMES[name] + " of a layer"));
}

readColors();
drawHead();
if (text) {
  drawControls();
  drawText();
  $("textual").hidden = false;
  paint();
  moveTo(0, false);
  drawTokenTable();
}
$("tables").append(...data.tables.map(drawTable));
listen();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
