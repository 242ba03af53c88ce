
// The page of a training log: curves over the steps, and by layer heat maps whose columns are the steps.

const COLOURS = ["first", "second", "third", "fourth"];

document.body.classList.add("broad");
for (const { title, log, series } of data.charts) {
  const coloured = series.map((one, index) => ({ ...one, name: one.name.replaceAll("_", " "), kind: COLOURS[index], dash: one.name === "eval_loss" }));
  lineChart(document.getElementById("curves"), { title, xLabel: "step", series: coloured, log });
}

const shade = (layer, depth) => {
  const step = 255 * (isDark() ? 0.45 + (0.5 * layer) / depth : 0.35 + (0.6 * layer) / depth);
  return `rgb(${tables().first[Math.round(step)].join(" ")})`;
};

document.getElementById("layers").hidden = !data.maps.length;
for (const { title, lines, x, y } of data.maps) {
  const place = document.getElementById("maps");
  const depth = Math.max(...y.map((layers) => layers.length));
  const rows = Array.from({ length: depth }, (_, layer) => y.map((layers) => layers[layer] ?? null));
  const layers = rows.map((_, layer) => layer);
  if (lines) {
    const series = rows.map((row, layer) => ({ name: `layer ${layer}`, x, y: row, tint: shade(layer, depth) }));
    const note = depth > 1 ? `one line per layer, from the ${isDark() ? "darkest" : "lightest"} for the first to layer ${depth - 1}` : "";
    const figure = lineChart(place, { title: `${title}, by layer`, xLabel: "step", series, legend: false, note });
    redraws.push(() => figure.querySelectorAll("path.line").forEach((path, layer) => { path.style.stroke = shade(layer, depth); }));
  }
  heatMap(place, { title, values: rows, rows: layers, columns: x, rowLabel: "layer", columnLabel: "step", kind: title.includes("λ") ? "second" : "first" });
}
document.body.dataset.ready = "yes";
