"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const rate = (value) => value.toExponential().replace("e+", "e");

function element(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const node = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Light and dark: the system's choice until the button says otherwise.

const isDark = () =>
  (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
});

// Curves

const chart = { group: 0, hidden: new Set(), lines: [] };
const margin = { top: 12, right: 14, bottom: 38, left: 46 };

function smoothed(values, radius) {
  return values.map((_, i) => {
    const window = values.slice(Math.max(0, i - radius), i + radius + 1);
    return window.reduce((sum, value) => sum + value, 0) / window.length;
  });
}

function visibleLines() {
  const radius = Number(byId("smoothing").value);
  const lines = [];
  for (const row of data.groups[chart.group].rows) {
    if (chart.hidden.has(row.optimizer)) continue;
    const files = byId("others").checked ? [...row.records, ...row.others] : row.records;
    const seeds = new Set(files.map((file) => data.records[file].seed));
    for (const file of files) {
      const record = data.records[file];
      const { step, "train/loss": loss } = record.curve;
      if (step.length === 0) continue;
      const isOther = row.others.includes(file);
      const details = [isOther && `lr ${rate(record.config.optimizer.lr)}`, seeds.size > 1 && `seed ${record.seed}`];
      const dashes = row.dashes.map((length) => 2 * length); // a line is 2 wide
      const label = [row.optimizer, ...details.filter(Boolean)].join(", ");
      lines.push({ file, label, colour: row.colour, dashes, isOther, steps: step, losses: smoothed(loss, radius) });
    }
  }
  return lines;
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high + 1e-9; i++) found.push(i * size);
  return { values: found, digits: Math.max(0, -Math.floor(Math.log10(size))) };
}

function drawChart() {
  const plot = byId("plot");
  const { clientWidth: width, clientHeight: height } = plot;
  const lines = (chart.lines = visibleLines());
  plot.replaceChildren();
  if (lines.length === 0) return;
  const lastStep = Math.max(...lines.map((line) => line.steps.at(-1)));
  // Outliers of diverging runs would press everything else flat.
  const sorted = lines.flatMap((line) => line.losses).sort((a, b) => a - b);
  const low = sorted[0];
  const high = sorted[Math.floor(0.995 * (sorted.length - 1))];
  const pad = 0.06 * (high - low || 1);
  const x = (step) => margin.left + (step / lastStep) * (width - margin.left - margin.right);
  const y = (loss) =>
    margin.top + (1 - (loss - low + pad) / (high - low + 2 * pad)) * (height - margin.top - margin.bottom);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Training loss over steps" });

  const ofLoss = ticks(low - pad, high + pad, 5);
  for (const value of ofLoss.values) {
    svg.append(
      element("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) }),
      element("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(ofLoss.digits)),
    );
  }
  for (const value of ticks(0, lastStep, Math.max(2, width / 110)).values) {
    svg.append(element("text", { x: x(value), y: height - 18, "text-anchor": "middle" }, value.toLocaleString("en")));
  }
  svg.append(element("text", { x: width - margin.right, y: height - 2, "text-anchor": "end" }, "step"));

  for (const line of lines) {
    const points = line.steps.map((step, i) => `${x(step).toFixed(1)},${Math.max(margin.top, y(line.losses[i])).toFixed(1)}`);
    const d = "M" + points.join("L");
    const drawn = element("path", { d, stroke: line.colour, "stroke-dasharray": line.dashes, class: line.isOther ? "other" : "" });
    const target = element("path", { d, class: "target" });
    target.addEventListener("click", () => (location.hash = `run=${line.file}`));
    svg.append(drawn, target);
  }
  const cursor = element("line", { class: "cursor", y1: margin.top, y2: height - margin.bottom, visibility: "hidden" });
  const tip = element("div", { class: "tip", hidden: "" });
  svg.append(cursor);
  plot.append(svg, tip);
  svg.addEventListener("pointermove", (event) => {
    const position = event.clientX - svg.getBoundingClientRect().left;
    const step = Math.round(((position - margin.left) / (width - margin.left - margin.right)) * lastStep);
    if (step < 0 || step > lastStep) return;
    cursor.setAttribute("x1", position);
    cursor.setAttribute("x2", position);
    cursor.setAttribute("visibility", "visible");
    showTip(tip, lines, step);
    const isRight = position > width / 2;
    tip.style.left = isRight ? "" : `${position + 14}px`;
    tip.style.right = isRight ? `${width - position + 14}px` : "";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    tip.hidden = true;
  });
}

function showTip(tip, lines, step) {
  const rows = lines
    .filter((line) => step <= line.steps.at(-1))
    .map((line) => ({ ...line, loss: line.losses[line.steps.findIndex((s) => s >= step)] }))
    .sort((a, b) => a.loss - b.loss)
    .slice(0, 12);
  tip.hidden = rows.length === 0;
  tip.replaceChildren(element("b", {}, `step ${step.toLocaleString("en")}`));
  for (const row of rows) {
    const dot = element("i", { class: "dot", style: `background: ${row.colour}` });
    tip.append(element("div", {}, dot, `${row.loss.toFixed(3)}  ${row.label}`));
  }
}

function toggle(label, isPressed, onClick, ...before) {
  const button = element("button", { type: "button", "aria-pressed": isPressed }, ...before, label);
  button.addEventListener("click", onClick);
  return button;
}

function drawControls() {
  const group = data.groups[chart.group];
  byId("groups").replaceChildren(
    ...data.groups.map((each, i) =>
      toggle(each.name, i === chart.group, () => {
        chart.group = i;
        chart.hidden.clear();
        redraw();
      }),
    ),
  );
  byId("chips").replaceChildren(
    ...group.rows.map((row) =>
      toggle(
        row.optimizer,
        !chart.hidden.has(row.optimizer),
        () => {
          if (!chart.hidden.delete(row.optimizer)) chart.hidden.add(row.optimizer);
          redraw();
        },
        element("i", { class: "dot", style: `background: ${row.colour}` }),
      ),
    ),
  );
  byId("others-label").hidden = group.rows.every((row) => row.others.length === 0);
}

function redraw() {
  drawControls();
  drawChart();
}

if (data.groups.length > 0) {
  byId("smoothing").addEventListener("input", drawChart);
  byId("others").addEventListener("change", drawChart);
  new ResizeObserver(drawChart).observe(byId("plot"));
  redraw();
}

// The record behind a number: #run=<file> opens it, so that it can be linked to.

function asText(value, indent = "") {
  return Object.entries(value)
    .map(([name, inner]) =>
      inner !== null && typeof inner === "object" && !Array.isArray(inner)
        ? `${indent}${name}:\n${asText(inner, indent + "  ")}`
        : `${indent}${name}: ${Array.isArray(inner) ? JSON.stringify(inner) : inner}\n`,
    )
    .join("");
}

function formatted(name, value) {
  if (typeof value !== "number") return String(value);
  if (name.endsWith("_bytes")) return value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${(value / 2 ** 20).toFixed(1)} MiB`;
  if (name.endsWith("_s")) return `${value.toFixed(1)} s`;
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
}

function pairs(values) {
  const list = element("dl");
  for (const [name, value] of Object.entries(values)) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, formatted(name, value))));
  }
  return list;
}

function copyable(text) {
  const button = element("button", { type: "button" }, "copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  });
  return element("div", { class: "copy" }, element("pre", {}, text), button);
}

function related(file) {
  for (const group of data.groups) {
    for (const row of group.rows) {
      const files = [...row.records, ...row.others];
      if (files.includes(file)) return files;
    }
  }
  return [file];
}

function showRun(file) {
  const record = data.records[file];
  const { gpu, cpu, num_threads: threads, precision } = record.hardware;
  const commit = (record.git_commit ?? "unknown") + (record.git_dirty ? ", with uncommitted changes" : "");
  const links = related(file).map((each) => {
    const other = data.records[each];
    const label = `lr ${rate(other.config.optimizer.lr)}, seed ${other.seed}`;
    return toggle(label, each === file, () => (location.hash = `run=${each}`));
  });
  const title = element("h3", { id: "run-title" }, `${record.optimizer} on ${record.model}, ${record.task}`);
  byId("run-body").replaceChildren(
    title,
    element("div", { class: "caption", style: "margin-top: 0" },
      `${record.status} ${record.finished_at.slice(0, 10)} · ${record.scale} scale · data: ${record.data_source} · weights: ${record.model_source}`),
    ...(links.length > 1 ? [element("h4", {}, "Runs of this row"), element("div", { class: "pills" }, ...links)] : []),
    element("h4", {}, "Repeat it"),
    copyable(record.command),
    element("h4", {}, "Metrics"),
    pairs(record.metrics),
    element("h4", {}, "Made by"),
    pairs({ commit, hardware: gpu ?? `${cpu}, ${threads} threads`, precision, ...record.versions }),
    element("h4", {}, `Config · results/records/${file}`),
    element("pre", {}, asText(record.config)),
  );
  if (!byId("run").open) byId("run").showModal();
  byId("run").scrollTop = 0;
}

function followHash() {
  const file = decodeURIComponent(location.hash).match(/^#run=(.*)$/)?.[1];
  if (file in data.records) showRun(file);
  else if (byId("run").open) byId("run").close();
}

byId("run").addEventListener("click", (event) => {
  if (event.target === byId("run")) byId("run").close();
});
byId("run").addEventListener("close", () => {
  if (location.hash.startsWith("#run=")) history.replaceState(null, "", location.pathname + location.search);
});
addEventListener("hashchange", followHash);
followHash();
