"use strict";
/* Draws the figures of the page with uPlot: hover, keys, zoom, and each as PNG, SVG or CSV.
   A figure is what mtl/report/figures.py makes. */

const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#8a32e2", "#735926", "#e755e7"],
  dark: ["#56b4e9", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#f0e442"],
};
const DASHES = [[], [7, 4], [2, 3]];
const HEIGHT = 270;
const charts = new Map();  // a figure's id -> {figure, plot, ticks}
const figures = JSON.parse(document.getElementById("figures").textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const theme = () => document.documentElement.dataset.theme;
const color = series => PALETTE[theme()][series.color % PALETTE[theme()].length];
const faded = (hex, part) => hex + Math.round(255 * part).toString(16).padStart(2, "0");
const number = v => v == null ? "-" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3)
  ? v.toExponential(2) : String(+v.toPrecision(4));

/* Rows for uPlot: x, then each series; of stacked ones the sum so far, the last on top. */
function rows(figure) {
  const below = figure.x.map(() => 0);
  const sums = figure.series.map(one => figure.kind !== "area" ? one.y : one.y.map((v, i) => v == null ? null : below[i] += v));
  const edges = figure.series.flatMap(one => one.low ? [one.low, one.high] : []);
  return [figure.x, ...sums, ...edges];
}

function options(figure, width, ticks) {
  const area = figure.kind === "area";
  const count = figure.series.length;
  const sharp = figure.x.length < 2;
  const series = figure.series.map((one, i) => ({
    label: one.name,
    stroke: () => color(one),
    fill: area ? () => faded(color(one), .55) : undefined,
    width: area ? 1 : 2,
    dash: DASHES[one.dash],
    spanGaps: true,
    points: {show: sharp},
    value: (u, v, s, at) => number(at == null ? null : one.y[at]),
  }));
  const bands = area ? figure.series.slice(1).map((_, i) => ({series: [i + 2, i + 1]})) : [];
  let edge = count;
  for (const one of figure.series) {
    if (!one.low) continue;
    const hidden = {class: "edge", label: one.name, width: 0, spanGaps: true, points: {show: false}};
    series.push({...hidden}, {...hidden});
    bands.push({series: [edge + 2, edge + 1], fill: () => faded(color(one), .18)});
    edge += 2;
  }
  const axis = {
    stroke: () => style("--faint"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
    grid: {stroke: () => style("--rule"), width: 1}, ticks: {stroke: () => style("--rule"), width: 1},
  };
  const kept = (u, splits, i) => (ticks[i] = splits.map(v => [v, number(v)])).map(one => one[1]);
  return {
    width, height: HEIGHT, series: [{label: "step", value: (u, v) => v == null ? "-" : String(v)}, ...series], bands,
    padding: [14, 12, 0, 0],
    scales: {x: {time: false, range: (u, low, high) => low === figure.x[0] && high === figure.x.at(-1) ? figure.span : [low, high]}, y: {range: area ? (u, low, high) => [0, high || 1] : undefined}},
    axes: [{...axis, values: kept, label: "optimizer steps", labelSize: 20, size: 34},
           {...axis, values: kept, label: figure.unit, labelSize: 20, size: 62}],
    cursor: {y: false, points: {size: 7}, sync: figure.group === "" && figures.length < 2 ? undefined
      : {key: "group " + figure.group, setSeries: false}},
    focus: {alpha: 1},
    hooks: {draw: [u => decorate(u, figure)]},
  };
}

/* Dots at marked places, lines at marked steps. */
function decorate(u, figure) {
  const {ctx, bbox} = u, ratio = uPlot.pxRatio;
  ctx.save();
  ctx.beginPath(); ctx.rect(bbox.left - 6 * ratio, 0, bbox.width + 12 * ratio, bbox.top + bbox.height); ctx.clip();
  ctx.font = `${12 * ratio}px system-ui, sans-serif`;
  for (const [x, text] of figure.lines) {
    const left = u.valToPos(x, "x", true);
    if (left < bbox.left || left > bbox.left + bbox.width) continue;
    ctx.strokeStyle = ctx.fillStyle = style("--ink");
    ctx.setLineDash([4 * ratio, 3 * ratio]); ctx.lineWidth = ratio;
    ctx.beginPath(); ctx.moveTo(left, bbox.top); ctx.lineTo(left, bbox.top + bbox.height); ctx.stroke();
    ctx.textAlign = left > bbox.left + bbox.width / 2 ? "right" : "left";
    ctx.fillText(text, left + (ctx.textAlign === "right" ? -4 : 4) * ratio, bbox.top - 3 * ratio);
  }
  ctx.setLineDash([]);
  for (const [s, at] of figure.marks) {
    if (!u.series[s + 1].show || figure.series[s].y[at] == null) continue;
    ctx.fillStyle = color(figure.series[s]); ctx.strokeStyle = style("--paper"); ctx.lineWidth = 1.5 * ratio;
    ctx.beginPath();
    ctx.arc(u.valToPos(figure.x[at], "x", true), u.valToPos(figure.series[s].y[at], "y", true), 5 * ratio, 0, 2 * Math.PI);
    ctx.fill(); ctx.stroke();
  }
  ctx.restore();
}

function draw(figure) {
  const place = document.getElementById(figure.id);
  if (place.closest("details:not([open])") || charts.has(figure.id)) return;  // folded, or there
  const tools = document.createElement("div"), chart = document.createElement("div"), ticks = [];
  tools.className = "tools"; chart.className = "chart"; chart.tabIndex = 0;
  chart.setAttribute("role", "group");
  chart.setAttribute("aria-label", `${figure.title}. ${figure.about} Arrow keys read values, Home and End jump.`);
  place.append(chart, tools);
  const plot = new uPlot(options(figure, place.clientWidth, ticks), rows(figure), chart);
  for (const cell of plot.root.querySelectorAll(".u-legend .u-series th")) {
    cell.tabIndex = 0; cell.setAttribute("role", "button"); cell.title = "show or hide";
    cell.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); cell.click(); } });
  }
  charts.set(figure.id, {figure, plot, ticks});
  chart.addEventListener("keydown", e => key(e, figure, plot));
  for (const [kind, make] of Object.entries({PNG: png, SVG: svg, CSV: csv})) {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = kind;
    button.setAttribute("aria-label", `Save ${figure.title} as ${kind}`);
    button.addEventListener("click", async () => save(`${figure.id}.${kind.toLowerCase()}`, await make(figure.id)));
    tools.append(button);
  }
}

/* The cursor by keys, in every chart of the group; what is there is spoken. */
function key(event, figure, plot) {
  if (event.target !== event.currentTarget) return;
  const last = figure.x.length - 1, at = plot.cursor.idx;
  const to = {ArrowLeft: at == null ? last : Math.max(at - 1, 0), ArrowRight: at == null ? 0 : Math.min(at + 1, last),
              Home: 0, End: last, Escape: null}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const x = to === null ? null : figure.x[to];
  for (const other of charts.values()) {
    if (other.figure.group !== figure.group) continue;
    const left = x === null ? -10 : other.plot.valToPos(x, "x");
    other.plot.setCursor({left, top: x === null ? -10 : 5});
  }
  document.getElementById("spoken").textContent = x === null ? "" :
    `step ${x}: ` + figure.series.map(one => `${one.name} ${number(one.y[to])}`).join(", ");
}

/* --- export */

const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);

/* The chart as it stands (zoom, hidden curves), with title and legend, on white. */
function svg(id) {
  const {figure, plot, ticks} = charts.get(id), pick = one => PALETTE.light[one.color % PALETTE.light.length];
  const box = {left: 70, top: 46, width: plot.over.clientWidth, height: plot.over.clientHeight};
  const {x: sx, y: sy} = plot.scales;
  const px = v => box.left + (v - sx.min) / (sx.max - sx.min) * box.width;
  const py = v => box.top + (sy.max - v) / (sy.max - sy.min) * box.height;
  const point = (v, i) => `${px(figure.x[i]).toFixed(2)},${py(v).toFixed(2)}`;
  const there = row => row.map((v, i) => v == null ? null : point(v, i)).filter(p => p);
  const width = box.left + box.width + 14, out = [];
  for (const [v, text] of ticks[0] ?? []) if (v >= sx.min && v <= sx.max)
    out.push(`<path d="M${px(v)} ${box.top}v${box.height}" stroke="#ddd"/><text x="${px(v)}" y="${box.top + box.height + 16}" text-anchor="middle">${text}</text>`);
  for (const [v, text] of ticks[1] ?? []) if (v >= sy.min && v <= sy.max)
    out.push(`<path d="M${box.left} ${py(v)}h${box.width}" stroke="#ddd"/><text x="${box.left - 6}" y="${py(v) + 4}" text-anchor="end">${text}</text>`);
  const curves = [], all = rows(figure).slice(1), zero = figure.x.map(() => 0);
  figure.series.forEach((one, s) => {
    if (!plot.series[s + 1].show) return;
    const stroke = `stroke="${pick(one)}" stroke-dasharray="${DASHES[one.dash].join(" ")}"`;
    const filled = (above, below, part) => curves.push(
      `<polygon points="${[...there(above), ...there(below).reverse()].join(" ")}" fill="${pick(one)}" fill-opacity="${part}"/>`);
    if (figure.kind === "area") filled(all[s], s ? all[s - 1] : zero, .55);
    if (one.low) filled(one.high, one.low, .18);
    curves.push(`<polyline points="${there(all[s]).join(" ")}" fill="none" ${stroke} stroke-width="${figure.kind === "area" ? 1 : 2}"/>`);
  });
  for (const [x, text] of figure.lines) if (x >= sx.min && x <= sx.max)
    out.push(`<path d="M${px(x)} ${box.top}v${box.height}" stroke="#000" stroke-dasharray="4 3"/><text x="${px(x)}" y="${box.top - 4}" text-anchor="${px(x) > width / 2 ? "end" : "start"}">${escaped(text)}</text>`);
  for (const [s, at] of figure.marks) if (plot.series[s + 1].show && figure.series[s].y[at] != null)
    curves.push(`<circle cx="${px(figure.x[at])}" cy="${py(figure.series[s].y[at])}" r="5" fill="${pick(figure.series[s])}" stroke="#fff"/>`);
  let left = box.left, line = box.top + box.height + 58;
  for (const one of figure.series) {
    const needed = 40 + 7.2 * one.name.length;
    if (left + needed > width && left > box.left) { left = box.left; line += 18; }
    out.push(`<path d="M${left} ${line - 4}h22" stroke="${pick(one)}" stroke-width="3" stroke-dasharray="${DASHES[one.dash].join(" ")}"/><text x="${left + 28}" y="${line}">${escaped(one.name)}</text>`);
    left += needed;
  }
  const height = line + 14, middle = box.top + box.height / 2;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12">
<title>${escaped(figure.title)}</title><desc>${escaped(figure.about)}</desc>
<rect width="100%" height="100%" fill="#fff"/><clipPath id="box"><rect x="${box.left}" y="${box.top - 6}" width="${box.width + 6}" height="${box.height + 6}"/></clipPath>
<text x="${box.left}" y="20" font-size="15" font-weight="bold">${escaped(figure.title)}</text>
<text x="${box.left + box.width / 2}" y="${box.top + box.height + 36}" text-anchor="middle">optimizer steps</text>
<text transform="translate(14 ${middle}) rotate(-90)" text-anchor="middle">${escaped(figure.unit)}</text>
${out.join("\n")}
<g clip-path="url(#box)">${curves.join("\n")}</g>
</svg>`;
}

async function png(id) {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg(id));
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * image.width; canvas.height = 2 * image.height;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

function csv(id) {
  const {figure} = charts.get(id);
  const quoted = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const columns = figure.series.flatMap(one => [[one.name, one.y], ...(one.low ? [[one.name + " lowest", one.low], [one.name + " highest", one.high]] : [])]);
  const lines = figure.x.map((x, i) => [x, ...columns.map(one => one[1][i] ?? "")].join(","));
  return [["step", ...columns.map(one => quoted(one[0]))].join(","), ...lines].join("\n") + "\n";
}

function save(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: name.endsWith("svg") ? "image/svg+xml" : "application/octet-stream"}));
  link.download = name; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/* --- theme, size, print */

function dress(name) {
  if (name !== theme()) {
    document.documentElement.dataset.theme = name;
    for (const {plot} of charts.values()) plot.redraw();
  }
  for (const {figure, plot} of charts.values())  // uPlot colors a legend once
    plot.root.querySelectorAll(".u-series:not(.edge) .u-marker").forEach((marker, i) => {
      if (i === 0) return;  // the steps'
      const one = figure.series[i - 1];
      marker.style.borderBottom = `3px ${["solid", "dashed", "dotted"][one.dash]} ${color(one)}`;
      marker.style.background = "none";
    });
}
function size(width) {
  for (const {plot} of charts.values()) {
    const wide = width ?? plot.root.parentElement.clientWidth;
    if (wide && wide !== plot.width) plot.setSize({width: wide, height: HEIGHT});
  }
}
function show() { figures.forEach(draw); dress(theme()); }

const dark = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => dress(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => dress(theme() === "dark" ? "light" : "dark"));
document.querySelectorAll("details").forEach(one => one.addEventListener("toggle", show));
addEventListener("resize", () => size());
let before = null;
addEventListener("beforeprint", () => { before = theme(); dress("light"); size(680); });
addEventListener("afterprint", () => { dress(before); size(); });
show();
