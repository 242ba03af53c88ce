
// The page of `gda attention`: a navigator over layers and groups, the maps of the chosen group, and charts.

const state = { layer: 0, group: 0, scope: "model", row: null, column: null, measure: 0, contrast: 2 };
const CONTRASTS = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01];
const SCOPES = ["model", "layer", "group"];
const differential = data.attention.noise !== null;
const byHead = differential && data.lambdaType !== "reparameterized"; // otherwise a layer has a single λ
const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const numbered = (count) => Array.from({ length: count }, (_, index) => index);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// ------------------------------------------------------------------------------------------------------ packed layers

const opened = new Map();

// (G, T) received and cancelled in float32, then for the maps and for the baseline's scales, then levels.
async function openLayer(layer) {
  if (opened.has(layer)) return opened.get(layer);
  const text = atob(byId(`layer-${layer}`).textContent);
  const packed = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const [groups, tokens] = [data.groups, data.tokens.length];
  let offset = 0;
  const floats = (count) => {
    const found = new Float32Array(bytes, offset, count);
    offset += 4 * count;
    return numbered(groups).map((group) => found.subarray((group * count) / groups, ((group + 1) * count) / groups));
  };
  const content = { received: floats(groups * tokens), cancelled: differential ? floats(groups * tokens) : null, maps: [] };
  if (data.mapped.includes(layer)) {
    const sets = [data.kinds, data.baselineKinds].filter((kinds) => kinds.length);
    const scales = sets.map((kinds) => floats(groups * kinds.length));
    const values = (data.size * (data.size + 1)) / 2;
    const levels = sets.map((kinds) => {
      const found = new Uint8Array(bytes, offset, groups * kinds.length * values);
      offset += found.length;
      return found;
    });
    content.maps = numbered(groups).map((group) =>
      sets.flatMap((kinds, index) => kinds.map((kind, place) => ({
        ...kind,
        scale: scales[index][group][place],
        levels: levels[index].subarray((group * kinds.length + place) * values, (group * kinds.length + place + 1) * values),
      }))));
  }
  if (opened.size > 4) opened.delete(opened.keys().next().value);
  opened.set(layer, content);
  return content;
}

function valueOf(map, row, column) {
  const level = map.levels[(row * (row + 1)) / 2 + column];
  const step = map.signed ? (level - 127) / 127 : level / 255;
  return Math.sign(step) * step * step * map.scale;
}

function errorOf(map, row, column) {
  const level = map.levels[(row * (row + 1)) / 2 + column];
  const most = map.signed ? 127 : 255;
  const step = map.signed ? Math.abs(level - 127) : level;
  return (map.scale * (step + 0.25)) / (most * most);
}

// -------------------------------------------------------------------------------------------------------- navigator

const MEASURES = [];
function measures() {
  const byGroup = (values) => values.map((row) => numbered(data.groups).map((group) => {
    const each = row.length / data.groups;
    return mean(row.slice(group * each, (group + 1) * each));
  }));
  const add = (name, values, kind = "first") => MEASURES.push({ name, values, kind });
  if (differential) {
    add("share cancelled", data.cancelledShare, "second");
    add("λ", byGroup(data.attention.lambda), "second");
  }
  for (const kind of ["signal", "noise", "difference"].filter((one) => data.attention[one])) {
    add(`entropy, ${kind}`, byGroup(data.attention[kind].entropy));
    add(`first token, ${kind}`, byGroup(data.attention[kind].first_token));
    if (kind === "difference") add("negative, difference", byGroup(data.attention[kind].negative), "second");
  }
  MEASURES.forEach((measure, index) => byId("measure").append(element("option", { value: index }, measure.name)));
  // Begin with a measure that shows something: where λ is 0, nothing is cancelled.
  state.measure = Math.max(0, MEASURES.findIndex((measure) => measure.values.flat().some((value) => value !== 0)));
  byId("measure").value = state.measure;
}

const CELL = { left: 24, top: 18 };

function drawNavigator() {
  const canvas = byId("navigator").firstElementChild;
  const height = Math.max(9, Math.min(20, 620 / data.layers));
  canvas.style.height = `${CELL.top + height * data.layers + 2}px`;
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth || 200;
  canvas.width = width * ratio;
  canvas.height = (CELL.top + height * data.layers + 2) * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const cell = (width - CELL.left - 2) / data.groups;
  const { values, kind, name } = MEASURES[state.measure];
  const largest = values.flat().reduce((best, value) => Math.max(best, Math.abs(value)), 0);
  const colours = tables();
  const pair = { positive: colours[kind], negative: colours[kind === "first" ? "second" : "first"] };
  const style = getComputedStyle(document.documentElement);
  context.font = "10px system-ui, sans-serif";
  context.fillStyle = style.getPropertyValue("--quiet");
  context.textAlign = "center";
  const everyGroup = Math.ceil(16 / cell);
  for (let group = 0; group < data.groups; group += everyGroup) context.fillText(group, CELL.left + (group + 0.5) * cell, 11);
  context.textAlign = "right";
  context.textBaseline = "middle";
  const every = height < 11 ? 5 : 1;
  for (let layer = 0; layer < data.layers; layer += every) context.fillText(layer, CELL.left - 5, CELL.top + (layer + 0.5) * height);
  values.forEach((row, layer) => row.forEach((value, group) => {
    const step = Math.round((255 * Math.abs(value)) / (largest || 1));
    context.fillStyle = `rgb(${(value < 0 ? pair.negative : pair.positive)[step].join(" ")})`;
    context.fillRect(CELL.left + group * cell, CELL.top + layer * height, cell - 1, height - 1);
  }));
  context.strokeStyle = style.getPropertyValue("--line");
  context.strokeRect(CELL.left - 0.5, CELL.top - 0.5, cell * data.groups, height * data.layers);
  context.strokeStyle = style.getPropertyValue("--mark");
  context.lineWidth = 2.5;
  context.strokeRect(CELL.left + state.group * cell - 0.5, CELL.top + state.layer * height - 0.5, cell, height);
  byId("navigator-scale").textContent = `${name} of this group: ${digits(values[state.layer][state.group])}; full colour at ${digits(largest)}`;
}

byId("navigator").addEventListener("click", (event) => {
  const canvas = byId("navigator").firstElementChild;
  const box = canvas.getBoundingClientRect();
  const height = (box.height - CELL.top - 2) / data.layers;
  const cell = (box.width - CELL.left - 2) / data.groups;
  choose(Math.floor((event.clientY - box.top - CELL.top) / height), Math.floor((event.clientX - box.left - CELL.left) / cell));
});

byId("measure").addEventListener("change", (event) => {
  state.measure = Number(event.target.value);
  drawNavigator();
  byId("navigator").focus(); // so that arrow keys continue to move through layers
});

// ------------------------------------------------------------------------------------------------------------- maps

let panels = [];

function headNames() {
  const first = state.group * data.heads;
  return data.heads === 1 ? `signal head ${first}` : `signal heads ${first} to ${first + data.heads - 1}`;
}

async function showGroup() {
  const [layer, group] = [state.layer, state.group];
  const content = await openLayer(layer);
  if (layer !== state.layer || group !== state.group) return;
  byId("place").textContent = `Layer ${layer}, group ${group}`;
  const numbers = [headNames()];
  if (differential) {
    const lambdas = data.attention.lambda[layer].slice(group * data.heads, (group + 1) * data.heads);
    numbers.push(`λ ${(byHead ? lambdas : lambdas.slice(0, 1)).map(digits).join(", ")}`);
    numbers.push(`cancelled ${percent(data.cancelledShare[layer][group])} of the signals' attention`);
  }
  byId("place-numbers").textContent = numbers.join(" · ");
  const maps = content.maps[group] || [];
  const place = byId("panels");
  const [above, below] = [0, 1].map((row) => maps.filter((map) => rowOf(map, maps.length) === row).length);
  place.style.setProperty("--columns", Math.max(above, below, 1));
  place.style.setProperty("--rows", below ? 2 : 1);
  place.replaceChildren();
  panels = maps.map((map) => {
    const canvas = element("canvas", { role: "img", "aria-label": titleOf(map) });
    const value = element("span");
    const panel = element("figure", { class: "panel", "data-map": map.name },
      element("figcaption", {}, element("b", {}, titleOf(map)), value), canvas);
    if (rowOf(map, maps.length)) panel.style.gridRow = "2";
    place.append(panel);
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (part, side) => Math.max(0, Math.min(data.size - 1, Math.floor((part / side) * data.size)));
      point(at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width));
    });
    return { map, canvas, value };
  });
  if (!maps.length) place.append(element("p", { class: "quiet" }, "This file has no maps of this layer (see --layers)."));
  drawMaps();
  tellCursor();
  showTokens();
}

// Up to four in a row; more in two, each difference under its signal and the baseline under the noise.
function rowOf(map, count) {
  return count > 4 && !/^(signal|noise)/.test(map.name) ? 1 : 0;
}

function titleOf(map) {
  const [kind, head] = map.name.split(" ");
  if (kind === "noise") return "noise";
  if (kind === "baseline") return data.baselineHeads > 1 ? `baseline, mean of ${data.baselineHeads} heads` : "baseline";
  const which = head === undefined ? (data.heads > 1 ? `, mean of ${data.heads} heads` : "") : ` ${state.group * data.heads + Number(head)}`;
  return (kind === "difference" ? "difference" : "signal") + which;
}

function drawMaps() {
  const colours = tables();
  const full = CONTRASTS[state.contrast];
  const blank = absent();
  for (const panel of panels) {
    const { map } = panel;
    const own = map.name === "noise" ? colours.second : colours.first;
    const pair = { positive: own, negative: colours.second };
    const shades = numbered(256).map((level) => {
      const step = map.signed ? (level - 127) / 127 : level / 255;
      return colour(Math.sign(step) * step * step * map.scale, full, pair);
    });
    const pixels = new ImageData(data.size, data.size);
    const target = pixels.data;
    let index = 0;
    for (let row = 0; row < data.size; row++) {
      for (let column = 0; column < data.size; column++) {
        const shade = column > row ? blank : shades[map.levels[index++]];
        const at = 4 * (row * data.size + column);
        [target[at], target[at + 1], target[at + 2], target[at + 3]] = [shade[0], shade[1], shade[2], 255];
      }
    }
    paint(panel.canvas, pixels);
    panel.clean = new OffscreenCanvas(panel.canvas.width, panel.canvas.height);
    panel.clean.getContext("2d").drawImage(panel.canvas, 0, 0);
    drawCursor(panel);
  }
  drawLegend(colours, full);
}

function drawLegend(colours, full) {
  const canvas = byId("legend");
  const pixels = new ImageData(canvas.width, 1);
  const pair = { positive: colours.first, negative: colours.second };
  for (let x = 0; x < canvas.width; x++) {
    const value = differential ? (2 * x) / (canvas.width - 1) - 1 : x / (canvas.width - 1);
    pixels.data.set([...colour(Math.sign(value) * value * value * full, full, pair), 255], 4 * x);
  }
  const context = canvas.getContext("2d");
  for (let y = 0; y < canvas.height; y++) context.putImageData(pixels, 0, y);
  byId("legend-text").textContent = differential ? `−${full} to ${full}, on a square-root scale; orange: noise and negative values` : `0 to ${full}, on a square-root scale`;
}

function drawCursor(panel) {
  const context = panel.canvas.getContext("2d");
  context.drawImage(panel.clean, 0, 0);
  if (state.row === null) return;
  const cell = panel.canvas.width / data.size;
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
  context.globalAlpha = 0.75;
  context.lineWidth = Math.max(1, devicePixelRatio || 1);
  context.beginPath();
  context.moveTo(0, (state.row + 0.5) * cell);
  context.lineTo(panel.canvas.width, (state.row + 0.5) * cell);
  context.moveTo((state.column + 0.5) * cell, 0);
  context.lineTo((state.column + 0.5) * cell, panel.canvas.height);
  context.stroke();
  context.globalAlpha = 1;
}

function point(row, column) {
  [state.row, state.column] = [row, column];
  panels.forEach(drawCursor);
  tellCursor();
}

// The token of a row or column of a map; several tokens if a value is the mean over them.
function tokensAt(index) {
  const first = index * data.pool;
  const last = Math.min(data.tokens.length, first + data.pool) - 1;
  const words = data.tokens.slice(first, last + 1).join("");
  return `${first === last ? first : `${first}–${last}`} “${words}”`;
}

// With as many digits as the error leaves certain.
function withError(value, error) {
  const places = Math.min(6, Math.max(0, Math.ceil(-Math.log10(error))));
  return `${value.toFixed(places).replace("-", "−")} ± ${error.toFixed(places)}`;
}

function tellCursor() {
  if (state.row === null) return;
  const { row, column } = state;
  const ahead = column > row;
  byId("cursor").textContent = `${tokensAt(row)} looks at ${tokensAt(column)}${ahead ? ", a later token" : ""}`;
  for (const { map, value } of panels) {
    value.textContent = ahead ? "" : withError(valueOf(map, row, column), errorOf(map, row, column));
  }
  for (const one of document.querySelectorAll("#text .at")) one.classList.remove("at");
  const spans = byId("text").children;
  for (const index of [row, column]) {
    for (let token = index * data.pool; token < Math.min(spans.length, (index + 1) * data.pool); token++) spans[token].classList.add("at");
  }
}

// ----------------------------------------------------------------------------------------------------------- tokens

async function showTokens() {
  const { layer, group, scope } = state;
  const content = scope === "model" ? null : await openLayer(layer);
  if (layer !== state.layer || group !== state.group || scope !== state.scope) return;
  const across = (groups) => numbered(data.tokens.length).map((token) => mean(groups.map((one) => one[token])));
  const pick = (name) => {
    if (scope === "model") return data[name];
    if (content[name] === null) return null;
    return scope === "group" ? Array.from(content[name][group]) : across(content[name]);
  };
  const [received, taken] = [pick("received"), pick("cancelled")];
  const cancelled = taken && taken.some((one) => one > 0) ? taken : null; // with λ = 0, tokens go by what they receive
  const ranked = cancelled || received;
  const order = numbered(data.tokens.length).filter((token) => ranked[token] > 0);
  order.sort((a, b) => ranked[b] - ranked[a] || a - b);
  const heads = ["token", "position", "attention", ...(cancelled ? ["cancelled", "fraction"] : [])];
  byId("token-table").tHead.replaceChildren(element("tr", {}, ...heads.map((name) => element("th", {}, name))));
  byId("token-table").tBodies[0].replaceChildren(...order.slice(0, 20).map((token) => {
    const cells = [token, digits(received[token])];
    if (cancelled) cells.push(digits(cancelled[token]), percent(cancelled[token] / received[token]));
    return element("tr", {}, element("td", { class: "token" }, data.tokens[token]), ...cells.map((cell) => element("td", {}, String(cell))));
  }));
  const where = { model: "all layers", layer: `layer ${layer}`, group: `layer ${layer}, group ${group}` }[scope];
  byId("tokens-about").textContent = cancelled
    ? `In ${where}. Attention: share of the signal maps on the token. Cancelled: the part of it that λ · noise cancels, the mean of min(a, λ · a_noise). In the text, a stronger colour means that a larger fraction is cancelled.`
    : `In ${where}. ${differential ? "Nothing is cancelled here. " : ""}Attention: share of the maps on the token. In the text, a stronger colour means more attention.`;
  for (const button of document.querySelectorAll("[data-scope]")) button.setAttribute("aria-pressed", button.dataset.scope === scope);
  const parts = received.map((share, token) => (cancelled ? (share > 0 ? cancelled[token] / share : 0) : share));
  shadeText(parts, (token) => `${token} “${data.tokens[token]}”: attention ${digits(received[token])}` + (cancelled ? `, cancelled ${digits(cancelled[token])}, ${percent(parts[token])} of it` : ""));
  tellCursor();
}

let textShades = null;

function shadeText(parts, tell) {
  textShades = { parts, tell };
  const text = byId("text");
  if (!text.children.length) {
    data.tokens.forEach((token, index) => {
      const shown = token.replaceAll("␣", " ").replaceAll("↵", "↵\n");
      text.append(element("span", { "data-token": index }, shown));
    });
    text.addEventListener("pointerover", (event) => {
      const token = event.target.dataset.token;
      byId("text-readout").textContent = token === undefined ? "" : textShades.tell(Number(token));
    });
  }
  const ranked = [...parts].sort((a, b) => a - b);
  const full = ranked[Math.floor(0.99 * (ranked.length - 1))] || 1;
  const shade = tables()[differential ? "second" : "first"];
  parts.forEach((part, index) => {
    const [red, green, blue] = shade[Math.min(150, Math.round((150 * part) / full))];
    text.children[index].style.backgroundColor = part > 0 ? `rgb(${red} ${green} ${blue})` : "";
  });
}

for (const button of document.querySelectorAll("[data-scope]")) {
  button.addEventListener("click", () => { state.scope = button.dataset.scope; showTokens(); });
}

// ----------------------------------------------------------------------------------------------------------- charts

const KINDS = { signal: "first", noise: "second", difference: "third" };
const TITLES = { entropy: "Entropy", first_token: "Share on the first token", negative: "Share that is negative" };

// One statistic of the kinds of map that have it, and of the baseline: a plain model's maps have no negative values.
function curvesOf(statistic) {
  const has = (attention, kind) => attention[kind] && (statistic !== "negative" || kind === "difference");
  const own = Object.keys(KINDS).filter((kind) => has(data.attention, kind));
  const found = own.map((kind) => ({ name: kind, kind: KINDS[kind], dash: false, rows: data.attention[kind][statistic] }));
  const theirs = ["difference", "signal"].find((kind) => data.baselineAttention && has(data.baselineAttention, kind));
  if (theirs) found.push({ name: data.baseline, kind: "fourth", dash: true, rows: data.baselineAttention[theirs][statistic] });
  return found;
}

function layerCharts() {
  const place = byId("by-layer");
  const line = (name, kind, rows, dash = false) => ({ name, kind, dash, x: numbered(rows.length), y: rows });
  if (differential) {
    const rows = data.attention.lambda;
    const series = [line(byHead ? "mean over tokens and heads" : "λ", "second", rows.map(mean))];
    if (byHead) {
      series.push(line("lowest head", "fourth", rows.map((row) => Math.min(...row)), true));
      series.push(line("highest head", "fourth", rows.map((row) => Math.max(...row)), true));
    }
    lineChart(place, { title: "λ", xLabel: "layer", series, from: 0 });
    const shares = data.cancelledShare;
    const cancelled = [line("mean of the groups", "second", shares.map(mean))];
    if (data.groups > 1) cancelled.push(line("highest group", "fourth", shares.map((row) => Math.max(...row)), true));
    lineChart(place, { title: "Share of the signals' attention that is cancelled", xLabel: "layer", series: cancelled, from: 0 });
  }
  for (const [name, title] of Object.entries(TITLES)) {
    const series = curvesOf(name).map((one) => line(one.name, one.kind, one.rows.map(mean), one.dash));
    if (series.length) lineChart(place, { title, xLabel: "layer", series, from: name === "entropy" ? null : 0 });
  }
}

function headMaps() {
  const size = { rows: numbered(data.layers), rowLabel: "layer", height: Math.max(120, Math.min(280, 8 * data.layers)) };
  const row = () => byId("by-head").appendChild(element("div", { class: "charts heads" }));
  for (const [name, title] of Object.entries(TITLES)) {
    const curves = curvesOf(name);
    if (!curves.length) continue;
    const full = Math.max(...curves.flatMap(({ rows }) => rows.flat())) || 1;
    const place = row();
    for (const { name: kind, rows: values } of curves) {
      heatMap(place, {
        ...size, title: `${title}: ${kind}`, values, full, rows: numbered(values.length), columns: numbered(values[0].length),
        columnLabel: kind === "noise" ? "noise map" : "head", kind: kind === "noise" || name === "negative" ? "second" : "first",
      });
    }
    if (name === "negative" && byHead) {
      const values = data.attention.lambda;
      heatMap(place, { ...size, title: "λ, the mean over tokens", values, columns: numbered(values[0].length), columnLabel: "head", kind: "second" });
    }
  }
}

function numbersTable() {
  const columns = [];
  if (differential) {
    columns.push(["λ", data.attention.lambda], ["cancelled", data.cancelledShare]);
  }
  for (const [name, title] of Object.entries(TITLES)) {
    for (const one of curvesOf(name)) columns.push([`${title.toLowerCase()}, ${one.name}`, one.rows]);
  }
  const table = byId("numbers");
  table.tHead.append(element("tr", {}, element("th", {}, "layer"), ...columns.map(([name]) => element("th", {}, name))));
  for (const layer of numbered(data.layers)) {
    const cells = columns.map(([, rows]) => element("td", {}, rows[layer] ? digits(mean(rows[layer])) : "–"));
    table.tBodies[0].append(element("tr", {}, element("td", {}, String(layer)), ...cells));
  }
}

// ------------------------------------------------------------------------------------------------------------- keys

function choose(layer, group) {
  state.layer = Math.max(0, Math.min(data.layers - 1, layer));
  state.group = Math.max(0, Math.min(data.groups - 1, group));
  try {
    history.replaceState(null, "", `#layer-${state.layer}-group-${state.group}`);
  } catch {
    // In a notebook the page is the srcdoc of a frame, which has no address.
  }
  drawNavigator();
  return showGroup();
}

function contrast(step) {
  state.contrast = Math.max(0, Math.min(CONTRASTS.length - 1, step));
  byId("contrast").value = state.contrast;
  drawMaps();
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, dialog[open]")) return;
  const arrow = ARROWS[event.key];
  const keys = {
    Home: () => choose(0, state.group),
    End: () => choose(data.layers - 1, state.group),
    "?": () => byId("help").showModal(),
    m: () => { state.measure = (state.measure + 1) % MEASURES.length; byId("measure").value = state.measure; drawNavigator(); },
    t: () => { state.scope = SCOPES[(SCOPES.indexOf(state.scope) + 1) % SCOPES.length]; showTokens(); },
    "[": () => contrast(state.contrast + 1),
    "]": () => contrast(state.contrast - 1),
  };
  if (arrow && event.shiftKey) {
    const step = (at, by) => Math.max(0, Math.min(data.size - 1, at + by));
    if (state.row === null) point(data.size - 1, 0);
    else point(step(state.row, arrow[0]), step(state.column, arrow[1]));
  } else if (arrow) {
    choose(state.layer + arrow[0], state.group + arrow[1]);
  } else if (keys[event.key]) {
    keys[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});

byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("help-close").addEventListener("click", () => byId("help").close());
byId("contrast").addEventListener("change", (event) => contrast(Number(event.target.value)));
CONTRASTS.forEach((full, index) => byId("contrast").append(element("option", { value: index }, String(full))));
byId("contrast").value = state.contrast;

document.body.classList.add("broad");
measures();
layerCharts();
headMaps();
numbersTable();
redraws.push(drawNavigator, drawMaps, () => textShades && shadeText(textShades.parts, textShades.tell));
const asked = location.hash.match(/^#layer-(\d+)-group-(\d+)$/);
choose(...(asked ? asked.slice(1).map(Number) : first())).then(() => { document.body.dataset.ready = "yes"; });

// Begin at the group that cancels most or, where none cancels, at the one with the most concentrated attention.
function first() {
  const { name, values } = MEASURES[state.measure];
  const sign = name.startsWith("entropy") ? -1 : 1;
  const best = [data.mapped[0] ?? 0, 0];
  values.forEach((row, layer) => row.forEach((value, group) => {
    if (data.mapped.includes(layer) && sign * value > sign * values[best[0]][best[1]]) [best[0], best[1]] = [layer, group];
  }));
  return best;
}
