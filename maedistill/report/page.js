"use strict";
const all = (query, root = document) => [...root.querySelectorAll(query)];
const plots = () => (window.Bokeh ? Bokeh.documents.flatMap((one) => one.roots()) : []);
const shown = { over: "epoch", scale: "linear" };

function fit(plot) { // set the vertical axis to what the visible lines need
  const log = shown.scale === "log" && plot.tags[0] === "curve";
  let low = Infinity, high = -Infinity, peak = -Infinity;
  for (const renderer of plot.renderers.filter((one) => one.visible)) {
    const top = log ? Infinity : renderer.tags[1] ?? Infinity; // the losses of its start are cut off
    for (const name of ["y", "top1", "low", "high"])
      for (const value of renderer.data_source.data[name] ?? [])
        if (Number.isFinite(value) && (!log || value > 0)) {
          low = Math.min(low, value);
          high = Math.max(high, Math.min(value, top));
          peak = Math.max(peak, value);
        }
  }
  const cut = peak > high;
  if (low > high) [low, high] = [1, 10]; // nothing to show, or nothing above 0
  else if (log) { const room = Math.max((high / low) ** 0.06, 1.02); low /= room; high *= room; }
  else { const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1; low -= room; high += room; }
  const place = document.querySelector(`[data-root-id="${plot.id}"]`);
  place.parentElement.querySelector("figcaption").classList.toggle("cut", cut);
  plot.y_range.setv({ start: low, end: high, reset_start: low, reset_end: high });
}

function scale(plot) { // linear or logarithmic
  const log = shown.scale === "log", kind = log ? "Log" : "Linear", axis = plot.left[0];
  const ticker = new (Bokeh.Models.get(log ? "LogTicker" : "BasicTicker"))();
  plot.y_scale = new (Bokeh.Models.get(`${kind}Scale`))();
  axis.ticker = ticker;
  for (const grid of plot.center.filter((one) => one.dimension === 1)) grid.ticker = ticker;
}

function over(plot) { // epochs or minutes
  for (const renderer of plot.renderers) renderer.glyph.x = { field: shown.over };
  plot.below[0].axis_label = shown.over === "epoch" ? "epoch" : "minutes of training";
}

function paint() { // the colors of the page, light or dark
  const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
  const soft = color("--soft"), line = color("--line");
  const colors = { axis_label_text_color: soft, major_label_text_color: soft, axis_line_color: line, major_tick_line_color: line };
  for (const plot of plots()) {
    for (const axis of [...plot.left, ...plot.below]) axis.setv({ ...colors, minor_tick_line_color: null });
    for (const grid of plot.center) grid.grid_line_color = line;
  }
}

function ready() {
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  for (const plot of plots()) {
    fit(plot);
  }
  for (const box of all("[data-run]")) box.addEventListener("change", () => {
    for (const other of all(`[data-run="${box.dataset.run}"]`)) other.checked = box.checked; // in other sections
    for (const plot of plots()) {
      for (const renderer of plot.renderers.filter((one) => one.tags[0] === Number(box.dataset.run))) renderer.visible = box.checked;
      fit(plot);
    }
  });
  for (const button of all("[data-set]")) button.addEventListener("click", () => {
    shown[button.dataset.set] = button.value;
    for (const other of all(`[data-set="${button.dataset.set}"]`)) other.setAttribute("aria-pressed", other.value === button.value);
    for (const plot of plots().filter((one) => one.tags[0] === "curve")) {
      plot.x_range.have_updated_interactively = false; // after a zoom, it would keep its epochs as minutes
      button.dataset.set === "over" ? over(plot) : scale(plot);
      fit(plot);
    }
  });
  document.documentElement.dataset.ready = "yes";
}

for (const knob of all("input[type=range]")) knob.addEventListener("input", () => {
  const sheet = knob.closest(".sheet"), at = Number(knob.value);
  knob.parentElement.querySelector("output").value = knob.dataset.epochs.split(" ")[at];
  for (const strip of all(".scroll", sheet))
    if (strip.children.length > 1) [...strip.children].forEach((image, i) => image.classList.toggle("at", i !== at));
});
for (const part of all("section")) part.querySelector("details")?.setAttribute("open", ""); // the first one
for (const button of all(".command button")) button.addEventListener("click", async () => {
  const code = button.parentElement.querySelector("code");
  getSelection().selectAllChildren(code);
  const done = await navigator.clipboard?.writeText(code.textContent).then(() => true, () => false);
  button.textContent = done || document.execCommand("copy") ? "Copied" : "Press Ctrl-C";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
for (const box of all(".live input")) {
  box.checked = location.hash === "#live";
  box.addEventListener("change", () => (location.hash = box.checked ? "live" : ""));
  setInterval(() => box.checked && location.reload(), 30000);
}
function start(tries) { // Bokeh draws after this script has run
  if (plots().length === all("[data-root-id]").length) ready();
  else if (tries) setTimeout(start, 50, tries - 1);
}
start(200);
