"use strict";
// Draws the charts of the page's data, and again whenever something is chosen. What is
// chosen stands in the address's hash, so that a page that loads itself again keeps it.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 7;
const colour = (run) => `var(--run-${run % COLOURS})`;

// ---- What is chosen.

const chosen = { x: "step", smooth: 3, log: new Set(), hidden: new Set() };

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("x")) chosen.x = given.get("x");
  if (given.has("smooth")) chosen.smooth = Number(given.get("smooth")) || 0;
  const list = (name) => (given.get(name) || "").split(",").filter(Boolean);
  chosen.log = new Set(list("log"));
  chosen.hidden = new Set(list("hidden").map(Number));
}

function choose() {
  const now = new URLSearchParams({ x: chosen.x, smooth: chosen.smooth });
  if (chosen.log.size) now.set("log", [...chosen.log]);
  if (chosen.hidden.size) now.set("hidden", [...chosen.hidden]);
  history.replaceState(null, "", "#" + now);
  drawAll();
}

// ---- Numbers.

function words(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  for (const [least, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= least) {
      return `${Number((value / (letter === "k" ? 1e3 : least)).toPrecision(4))}${letter}`;
    }
  }
  if (size < 1e-3) {
    return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-12); n++) {
    found.push(Number((n * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high, most) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const n of [1, 2, 5]) found.push(n * 10 ** power);
  }
  const inside = (values) => values.filter((v) => v >= low && v <= high);
  const all = inside(found);
  if (all.length < 2) return ticks(low, high, most).filter((v) => v > 0);
  const tens = inside(found.filter((_, at) => at % 3 === 0));
  if (all.length <= 2 * most || tens.length < 2) return all;
  const every = Math.ceil(tens.length / most);
  return tens.filter((_, at) => at % every === 0);
}

/** Steps that a smoothed point is of: as many in all runs, a part of the longest. */
function windowSteps() {
  const lengths = data.runs.map(({ along: { steps } }) =>
    steps.length ? steps.at(-1) - steps[0] + 1 : 0);
  return Math.floor((Math.max(...lengths) * chosen.smooth) / 100);
}

/** The mean over a centred window, which narrows at both ends, as in loss.png. */
function smoothed(values, points) {
  const half = Math.floor(points / 2);
  if (!half) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, at) => {
    const reach = Math.min(half, at, values.length - 1 - at);
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1);
  });
}

/** The first place of a value that is no less; else the last place. */
function place(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function nearest(sorted, value) {
  const at = place(sorted, value);
  return at && value - sorted[at - 1] < sorted[at] - value ? at - 1 : at;
}

/** Where a step of a run stands on the axis that is chosen; null: it is not known. */
function along(run, step) {
  if (chosen.x === "step") return step;
  const { steps, [chosen.x]: values } = data.runs[run].along;
  if (!values) return null;
  const at = place(steps, step);
  if (at === 0) return (values[0] * step) / Math.max(steps[0], 1);
  const part = Math.min(1, (step - steps[at - 1]) / (steps[at] - steps[at - 1]));
  return values[at - 1] + part * (values[at] - values[at - 1]);
}

// ---- Drawing.

const SVG = "http://www.w3.org/2000/svg";

function add(parent, name, attributes = {}, text) {
  const made = name in { div: 1, span: 1, b: 1, br: 1, small: 1, button: 1 }
    ? document.createElement(name)
    : document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

/** The curves of a chart that are to be seen, with their place on the x axis. */
function curvesOf(chart) {
  const found = [];
  data.runs.forEach((run, index) => {
    if (chosen.hidden.has(index)) return;
    const laid = (curve) => curve && { ...curve, x: curve.steps.map((s) => along(index, s)) };
    const curve = laid(run.curves[chart.field]);
    const dots = laid(run.curves[chart.dots]);
    if (curve && curve.x[0] !== null) found.push({ index, run, curve, dots });
  });
  return found;
}

function draw(figure, chart) {
  figure.querySelectorAll("svg.chart, .tip, .none").forEach((each) => each.remove());
  const curves = curvesOf(chart);
  const log = chosen.log.has(chart.field);
  figure.querySelector("button").setAttribute("aria-pressed", log);
  if (!curves.length) {
    add(figure, "div", { class: "none faint" }, "nothing to draw of the runs chosen");
    return;
  }
  const width = Math.max(280, figure.clientWidth);
  const height = chart.wide ? Math.max(260, Math.min(400, width * 0.42)) : 220;
  const box = { left: 58, right: width - 14, top: 22, bottom: height - 24 };
  const fits = (value) => !log || value > 0;

  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const { curve, dots } of curves) {
    for (const each of [curve, dots]) {
      if (!each) continue;
      for (const x of each.x) [x0, x1] = [Math.min(x0, x), Math.max(x1, x)];
      for (const list of [each.mean, each.least || [], each.greatest || []]) {
        for (const y of list) {
          if (fits(y)) [y0, y1] = [Math.min(y0, y), Math.max(y1, y)];
        }
      }
    }
  }
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  if (y0 > y1) [y0, y1] = [1, 10];
  if (log) {
    const room = Math.max((y1 / y0) ** 0.04, 1.02);
    [y0, y1] = [y0 / room, y1 * room];
  } else {
    // Nothing here is below zero but what its curve takes there.
    const room = (y1 - y0) * 0.04 || Math.abs(y1) * 0.05 || 1;
    [y0, y1] = [y0 < 0 ? y0 - room : Math.max(0, y0 - room), y1 + room];
  }
  const X = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
  const scale = log ? Math.log10 : (y) => y;
  const part = (y) => (scale(y) - scale(y0)) / (scale(y1) - scale(y0));
  const Y = (y) => box.bottom - part(y) * (box.bottom - box.top);

  const svg = add(figure, "svg", {
    class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${chart.title}: ${curves.map(({ run, curve }) =>
      `${run.name} from ${words(curve.mean[0])} to ${words(curve.mean.at(-1))}`).join("; ")}`,
  });
  const most = Math.max(3, Math.floor((box.bottom - box.top) / 36));
  for (const y of log ? logTicks(y0, y1, most) : ticks(y0, y1, most)) {
    add(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: Y(y), y2: Y(y) });
    add(svg, "text", { x: box.left - 7, y: Y(y) + 4, "text-anchor": "end" }, words(y));
  }
  for (const x of ticks(x0, x1, Math.max(2, Math.floor(width / 110)))) {
    if (chosen.x !== "hours" && x % 1) continue;
    add(svg, "text", { x: X(x), y: height - 6, "text-anchor": "middle" }, words(x));
  }
  if (chart.wide) marks(svg, X, box, x0, x1);

  const path = (xs, ys) => {
    let text = "";
    let pen = "M";
    ys.forEach((y, at) => {
      if (!fits(y)) return;
      text += `${pen}${X(xs[at]).toFixed(1)},${Y(y).toFixed(1)}`;
      pen = "L";
    });
    return text;
  };
  for (const { index, curve, dots } of curves) {
    const of = { "data-run": index };
    if (curve.least) {
      const low = curve.least.map((y) => (fits(y) ? y : y0));
      const there = path(curve.x, curve.greatest);
      const back = path([...curve.x].reverse(), low.reverse()).replace("M", "L");
      add(svg, "path", { ...of, class: "band", d: `${there}${back}Z`, fill: colour(index) });
    }
    const smooth = chart.exact ? curve.mean : smoothed(curve.mean, windowSteps() / curve.rows);
    if (smooth !== curve.mean && !curve.least) {
      add(svg, "path", { ...of, class: "raw", d: path(curve.x, curve.mean), stroke: colour(index) });
    }
    add(svg, "path", {
      ...of, class: `line run-${index % COLOURS}`, d: path(curve.x, smooth),
      stroke: colour(index), "data-points": curve.x.length,
    });
    if (curve.x.length === 1) {
      add(svg, "circle", { class: "dot", cx: X(curve.x[0]), cy: Y(curve.mean[0]), r: 4, fill: colour(index) });
    }
    if (dots) {
      add(svg, "path", { ...of, class: "validation", d: path(dots.x, dots.mean), stroke: colour(index) });
      if (dots.x.length <= 100) {
        dots.mean.forEach((y, at) => fits(y) && add(svg, "circle", {
          ...of, class: "dot", cx: X(dots.x[at]), cy: Y(y), r: 4, fill: colour(index),
        }));
      }
    }
  }
  hover(figure, svg, chart, curves, X, Y, box, fits);
}

/** Resumes, skipped batches and spikes, each at its step. */
function marks(svg, X, box, x0, x1) {
  const taken = []; // signs stand beside each other, lines at their step
  data.runs.forEach((run, index) => {
    if (chosen.hidden.has(index)) return;
    for (const mark of run.marks) {
      const at = along(index, mark.step);
      if (at === null || at < x0 || at > x1) continue;
      const group = add(svg, "g", { class: "mark", stroke: colour(index), "data-kind": mark.kind });
      const x = X(at);
      add(group, "line", { x1: x, x2: x, y1: box.top, y2: box.bottom });
      let sign = x;
      while (taken.some((each) => Math.abs(each - sign) < 12)) sign += 1;
      taken.push(sign);
      add(group, "path", { d: data.marks[mark.kind], transform: `translate(${sign},11)` });
    }
  });
}

function hover(figure, svg, chart, curves, X, Y, box, fits) {
  const cross = add(svg, "g");
  const tip = add(figure, "div", { class: "tip", hidden: "" });
  const leave = () => {
    cross.replaceChildren();
    tip.replaceChildren();
    tip.hidden = true;
  };
  const move = (event) => {
    const shape = svg.getBoundingClientRect();
    const at = ((event.clientX - shape.left) * svg.viewBox.baseVal.width) / shape.width;
    leave();
    if (at < box.left - 8 || at > box.right + 8) return;
    const aim = Math.min(Math.max(at, box.left), box.right);
    let line = null;
    curves.forEach(({ index, run, curve, dots }) => {
      const near = nearest(curve.x.map(X), aim);
      const x = X(curve.x[near]);
      if (Math.abs(x - aim) > Math.max(12, (box.right - box.left) / curve.x.length)) return;
      line ??= x;
      if (fits(curve.mean[near])) {
        add(cross, "circle", { cx: x, cy: Y(curve.mean[near]), r: 3.5, fill: colour(index) });
      }
      const row = add(tip, "div");
      add(row, "span", { class: "swatch" }).style.background = colour(index);
      const step = curve.steps[near];
      const first = curve.rows > 1 && near ? `${(curve.steps[near - 1] + 1).toLocaleString("en")} to ` : "";
      row.append(` ${run.name}, step ${first}${step.toLocaleString("en")}: `);
      add(row, "b", {}, words(curve.mean[near]));
      if (curve.least) {
        row.append(` (${words(curve.least[near])} to ${words(curve.greatest[near])})`);
      }
      const dot = dots && nearest(dots.x.map(X), aim);
      if (dots && Math.abs(X(dots.x[dot]) - aim) < 12) {
        row.append(`; validation at ${dots.steps[dot].toLocaleString("en")}: `);
        add(row, "b", {}, words(dots.mean[dot]));
      }
      if (!chart.wide) return;
      const close = run.marks.filter((mark) => Math.abs(X(along(index, mark.step)) - aim) < 6);
      for (const mark of close.slice(0, 3)) {
        add(tip, "div", { class: "faint" }, `step ${mark.step.toLocaleString("en")}: ${mark.text}`);
      }
    });
    if (line === null) return;
    add(cross, "line", { class: "cross", x1: line, x2: line, y1: box.top, y2: box.bottom });
    tip.hidden = false;
    const shown = (line * shape.width) / svg.viewBox.baseVal.width;
    const left = shown > shape.width / 2 ? shown - tip.offsetWidth - 14 : shown + 14;
    tip.style.left = `${Math.max(0, Math.min(left, shape.width - tip.offsetWidth))}px`;
    const above = shape.top - figure.getBoundingClientRect().top;
    tip.style.top = `${above + box.top + 6}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}

// ---- The page.

const figures = [];

function drawAll() {
  const steps = Math.max(1, windowSteps());
  document.getElementById("window").textContent = `over ${steps.toLocaleString("en")} steps`;
  for (const [figure, chart] of figures) draw(figure, chart);
}

function start() {
  readHash();
  const charts = document.getElementById("charts");
  for (const chart of data.charts) {
    const figure = document.createElement("figure");
    figure.dataset.chart = chart.field;
    if (chart.wide) figure.className = "wide";
    const caption = document.createElement("figcaption");
    caption.append(chart.title);
    add(caption, "small", {}, chart.unit);
    const button = add(caption, "button", { type: "button", title: "logarithmic or linear" }, "log");
    button.addEventListener("click", () => {
      if (!chosen.log.delete(chart.field)) chosen.log.add(chart.field);
      choose();
    });
    figure.append(caption);
    charts.append(figure);
    figures.push([figure, chart]);
  }
  const x = document.getElementById("x");
  x.value = chosen.x;
  if (x.selectedIndex < 0) x.value = chosen.x = "step";
  x.addEventListener("change", () => {
    chosen.x = x.value;
    choose();
  });
  const smooth = document.getElementById("smooth");
  smooth.value = chosen.smooth;
  smooth.addEventListener("input", () => {
    chosen.smooth = Number(smooth.value);
    choose();
  });
  document.querySelectorAll("#legend input").forEach((box, index) => {
    box.checked = !chosen.hidden.has(index);
    box.addEventListener("change", () => {
      if (!chosen.hidden.delete(index)) chosen.hidden.add(index);
      choose();
    });
  });
  drawAll();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's bars come and go
    width = window.innerWidth;
    drawAll();
  });
  if (data.refresh_seconds) follow();
}

/** Loads the page again and again, and says so where nobody writes it any more. */
function follow() {
  const since = document.getElementById("since");
  const say = () => {
    const seconds = Math.max(0, Math.round(Date.now() / 1000 - data.written_unix));
    const late = seconds > 3 * data.refresh_seconds + 30;
    since.textContent = late
      ? `, ${seconds} s ago: is --follow still at work?`
      : `, ${seconds} s ago; refreshed every ${data.refresh_seconds} s`;
    since.className = late ? "failed" : "";
  };
  say();
  setInterval(say, 1000);
  setTimeout(() => location.reload(), 1000 * data.refresh_seconds);
}

window.addEventListener("error", (event) => {
  const said = document.createElement("p");
  said.className = "failed";
  said.textContent = `This browser could not draw the page: ${event.message}`;
  document.getElementById("charts").before(said);
});
start();
