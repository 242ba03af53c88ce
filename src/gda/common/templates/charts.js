"use strict";
// What pages draw with: lines as SVG, which takes its colours from the style sheet, and heat maps on canvas, which are
// drawn again when the colours change. Text goes into the page as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function digits(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replaceAll("-", "−");
  const places = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 4;
  return value.toFixed(places).replace("-", "−");
}

// ---------------------------------------------------------------------------------------------------------- colours

const redraws = [];
let printing = false;

function drawn(draw) {
  redraws.push(draw);
  draw();
}

function redrawAll() {
  for (const draw of redraws) draw();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", redrawAll);
addEventListener("beforeprint", () => { printing = true; redrawAll(); });
addEventListener("afterprint", () => { printing = false; redrawAll(); });

const RAMPS = {
  light: {
    first: [[255, 255, 255], [188, 216, 242], [84, 152, 214], [16, 88, 168], [6, 38, 92]],
    second: [[255, 255, 255], [251, 217, 178], [235, 150, 66], [178, 86, 8], [96, 40, 0]],
  },
  dark: {
    first: [[22, 27, 34], [22, 62, 110], [38, 112, 190], [112, 182, 250], [226, 242, 255]],
    second: [[22, 27, 34], [92, 50, 14], [176, 98, 24], [244, 166, 84], [255, 238, 214]],
  },
};
const ABSENT = { light: [233, 236, 239], dark: [44, 51, 60] };

function isDark() {
  return dark.matches && !printing;
}

function tables() {
  const ramps = RAMPS[isDark() ? "dark" : "light"];
  return Object.fromEntries(Object.entries(ramps).map(([name, stops]) => [name, ramp(stops)]));
}

function ramp(stops) {
  return Array.from({ length: 256 }, (_, step) => {
    const place = (step / 255) * (stops.length - 1);
    const index = Math.min(stops.length - 2, Math.floor(place));
    return stops[index].map((from, channel) =>
      Math.round(from + (stops[index + 1][channel] - from) * (place - index)));
  });
}

// Square roots, since most of what is drawn is small; what is negative takes the second ramp.
function colour(value, full, pair) {
  const step = Math.min(255, Math.round(255 * Math.sqrt(Math.abs(value) / full)));
  return (value < 0 ? pair.negative : pair.positive)[step];
}

function absent() {
  return ABSENT[isDark() ? "dark" : "light"];
}

// ------------------------------------------------------------------------------------------------------------ lines

function ticks(low, high, number) {
  const rough = (high - low) / number;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
  return { found, places: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// Powers of ten, and between few of them 2 and 5 times these; none where there would be fewer than two.
function logTicks(low, high) {
  const powers = Array.from({ length: Math.ceil(high) - Math.floor(low) + 1 }, (_, index) => Math.floor(low) + index);
  const inside = (tick) => Math.log10(tick) >= low - 1e-9 && Math.log10(tick) <= high + 1e-9;
  const all = powers.flatMap((power) => [1, 2, 5].map((factor) => factor * 10 ** power)).filter(inside);
  if (all.length < 2) return null;
  if (all.length <= 6) return all;
  const every = Math.ceil(powers.length / 6);
  return powers.filter((_, index) => index % every === 0).map((power) => 10 ** power).filter(inside);
}

// Where an axis from `low` to `high`, exponents of ten where it is logarithmic, has its lines.
function yTicksOf(log, low, high) {
  const found = log ? logTicks(low, high) : null;
  return found ? { found } : log ? ticks(10 ** low, 10 ** high, 4) : ticks(low, high, 4);
}

function short(value, places) {
  const size = Math.abs(value);
  if (size > 0 && (size >= 1e6 || size < 1e-4)) return value.toExponential(1).replace(".0e", "e").replace("e+", "e").replaceAll("-", "−");
  return (size < 1e-12 ? 0 : value).toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
}

// series: [{name, kind, x, y, dash, tint, range: {x, y}}]; y may hold nulls. `kind` is a colour of the style sheet, and
// `range`, between whose values those of y lie, is drawn pale behind them.
function lineChart(place, { title, xLabel, series, from = null, log = false, note = "", legend = true }) {
  const [width, height, left, right, top, bottom] = [560, 240, 56, 24, 10, 34];
  const usable = (y) => y !== null && Number.isFinite(y) && (!log || y > 0);
  const xs = series.flatMap((one) => one.x);
  const ys = series.flatMap((one) => [...one.y, ...(one.range ? one.range.y : [])]).filter(usable);
  const figure = element("figure", { class: "chart" }, element("h3", {}, title));
  place.append(figure);
  if (!ys.length) {
    figure.append(element("p", { class: "quiet" }, "no values"));
    return figure;
  }
  const scale = log ? Math.log10 : (y) => y;
  let [low, high] = ys.reduce(([a, b], y) => [Math.min(a, scale(y)), Math.max(b, scale(y))], [Infinity, -Infinity]);
  if (from !== null && !log) low = Math.min(low, from);
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { const pad = Math.abs(high) * 0.1 || 1; low -= from === low ? 0 : pad; high += pad; }
  const [first, last] = xs.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  const px = (x) => left + ((x - first) / (last - first || 1)) * (width - left - right);
  const py = (y) => height - bottom - ((scale(y) - low) / (high - low)) * (height - top - bottom);

  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const yTicks = yTicksOf(log, low, high);
  for (const tick of yTicks.found) {
    const y = py(tick);
    drawing.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
    const places = yTicks.places ?? Math.max(0, -Math.floor(Math.log10(tick) + 1e-9));
    drawing.append(shape("text", { class: "quiet", x: left - 6, y: y + 4, "text-anchor": "end" }, short(tick, places)));
  }
  const xTicks = ticks(first, last > first ? last : first + 1, 6);
  for (const tick of xTicks.found.filter((one) => Number.isInteger(one) && one <= last)) {
    const attributes = { class: "quiet", x: px(tick), y: height - bottom + 16, "text-anchor": "middle" };
    drawing.append(shape("text", attributes, short(tick, 0)));
  }
  drawing.append(shape("text", { class: "quiet", x: width - right, y: height - 3, "text-anchor": "end" }, xLabel));
  const pathOf = ({ x, y }) => {
    let pen = false;
    let path = "";
    x.forEach((at, index) => {
      if (usable(y[index])) path += `${pen ? "L" : "M"}${px(at).toFixed(1)} ${py(y[index]).toFixed(1)}`;
      pen = usable(y[index]);
    });
    return path;
  };
  for (const one of series) {
    const classes = `line ${one.kind || ""}${one.dash ? " dash" : ""}`;
    if (one.range) drawing.append(shape("path", { d: pathOf(one.range), class: `${classes} pale` }));
    const line = shape("path", { d: pathOf(one), class: classes });
    if (one.tint) { line.style.stroke = one.tint; line.style.strokeWidth = "1.2"; }
    drawing.append(line);
    const points = one.x.map((x, index) => [x, one.y[index]]);
    if (points.length < 80 && !one.tint) {
      for (const [x, y] of points.filter(([, y]) => usable(y))) {
        drawing.append(shape("circle", { cx: px(x), cy: py(y), r: 2.2, class: one.kind }));
      }
    }
  }
  const cursor = shape("line", { class: "cursor", y1: top, y2: height - bottom, x1: left, x2: left, visibility: "hidden" });
  drawing.append(cursor);
  const readout = element("p", { class: "readout small quiet" });
  const key = element("p", { class: "small" });
  if (legend) {
    for (const one of series) key.append(element("span", { class: `swatch ${one.kind}` }), one.name + (one.dash ? " (dashed)" : ""));
  }
  figure.append(drawing, key, readout);
  if (note) figure.append(element("figcaption", {}, note));
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = first + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - right)) * (last - first);
    const nearest = (one) => one.x.reduce((best, at, index) => (Math.abs(at - x) < Math.abs(one.x[best] - x) ? index : best), 0);
    const nearestPoints = series.filter((one) => one.x.length).map((one) => [one, nearest(one)]);
    const at = nearestPoints[0][0].x[nearestPoints[0][1]];
    cursor.setAttribute("x1", px(at));
    cursor.setAttribute("x2", px(at));
    cursor.setAttribute("visibility", "visible");
    const every = Math.ceil(nearestPoints.length / 12);
    const listed = nearestPoints.filter((_, index) => index % every === 0);
    readout.textContent = `${xLabel} ${at}: ` + listed.map(([one, index]) => `${one.name} ${digits(one.y[index])}`).join(", ");
  });
  drawing.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  return figure;
}

// ------------------------------------------------------------------------------------------------------- heat maps

// values: one list a row, nulls where there is none. Shade is linear in the
// absolute value, up to `full` or the largest; negative values take the other ramp.
function heatMap(place, { title, values, rows, columns, rowLabel, columnLabel, kind = "first", height = 220, full = null }) {
  const flat = values.flat().filter((value) => value !== null && Number.isFinite(value));
  const limit = full || flat.reduce((best, value) => Math.max(best, Math.abs(value)), 0) || 1;
  const canvas = element("canvas", { role: "img", "aria-label": title });
  const readout = element("p", { class: "readout small quiet" });
  const caption = element("figcaption", {}, `rows: ${rowLabel}, columns: ${columnLabel}; full colour at ${digits(limit)}`);
  place.append(element("figure", { class: "chart" }, element("h3", {}, title), canvas, caption, readout));
  const size = [values.length, Math.max(1, ...values.map((row) => row.length))];
  canvas.style.height = `${height}px`;
  drawn(() => {
    const pixels = new ImageData(size[1], size[0]);
    const colours = tables();
    const pair = { positive: colours[kind], negative: colours[kind === "first" ? "second" : "first"] };
    values.forEach((row, y) => {
      for (let x = 0; x < size[1]; x++) {
        const value = row[x];
        const known = value !== null && value !== undefined && Number.isFinite(value);
        const step = known ? Math.min(255, Math.round((255 * Math.abs(value)) / limit)) : 0;
        const shade = known ? (value < 0 ? pair.negative : pair.positive)[step] : absent();
        pixels.data.set([...shade, 255], 4 * (y * size[1] + x));
      }
    });
    paint(canvas, pixels);
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const [y, x] = [
      Math.min(size[0] - 1, Math.floor(((event.clientY - box.top) / box.height) * size[0])),
      Math.min(size[1] - 1, Math.floor(((event.clientX - box.left) / box.width) * size[1])),
    ];
    if (y >= 0 && x >= 0) readout.textContent = `${rowLabel} ${rows[y]}, ${columnLabel} ${columns[x]}: ${digits(values[y][x])}`;
  });
  canvas.addEventListener("pointerleave", () => { readout.textContent = ""; });
}

function paint(canvas, pixels) {
  const ratio = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 320, canvas.clientHeight || 220].map((side) => Math.round(side * ratio));
  [canvas.width, canvas.height] = [width, height];
  const small = new OffscreenCanvas(pixels.width, pixels.height);
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = pixels.width > width || pixels.height > height;
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
}

let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(redrawAll, 120);
});
