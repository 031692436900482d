// Values under the pointer or the arrow keys, and the other scale of an axis. Without this script the page lacks nothing else.
"use strict";
function bringToLife(root) {
  for (const figure of root.matches?.(".chart") ? [root] : root.querySelectorAll(".chart")) bringFigureToLife(figure);
}
function bringFigureToLife(figure) {
  const source = figure.querySelector("script");
  if (!source) return;
  const chart = JSON.parse(source.textContent);
  const plot = figure.querySelector(".plot");
  const area = figure.querySelector(".area");
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector(".values");
  const steps = [...new Set(chart.s.flatMap((series) => series.x))].sort((a, b) => a - b);
  let at = -1;

  // the scale of the vertical axis can be switched: the script holds the drawing on the other one
  if (chart.other) {
    const button = document.createElement("button");
    const paths = [...figure.querySelectorAll("svg path:not(.skip)")];
    const numbers = figure.querySelector(".ys");
    const name = () => { button.textContent = chart.scale === "log" ? "linear scale" : "log scale"; };
    button.type = "button";
    button.className = "scale";
    button.addEventListener("click", () => {
      const now = { d: paths.map((path) => path.getAttribute("d")), numbers: numbers.innerHTML };
      paths.forEach((path, i) => path.setAttribute("d", chart.other.d[i]));
      numbers.innerHTML = chart.other.numbers;
      chart.other = now;
      chart.scale = chart.scale === "log" ? "linear" : "log";
      button.dataset.switched = button.dataset.switched ? "" : "yes";
      name();
    });
    name();
    figure.querySelector("figcaption").append(button);
  }

  const nearest = (sorted, x) => {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
  };
  const written = (value) => {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(+value.toPrecision(4));
  };
  const show = (index) => {
    if (!steps.length) return;
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const x = steps[at];
    cursor.hidden = false;
    cursor.style.left = `${(100 * (x - chart.x[0])) / (chart.x[1] - chart.x[0])}%`;
    const parts = [document.createElement("b")];
    parts[0].textContent = `step ${x.toLocaleString("en")}`;
    for (const series of chart.s) {
      const i = nearest(series.x, x);
      const item = document.createElement("span");
      const key = document.createElement("i");
      key.className = `key line b${series.c}`;
      // a curve that has no point here tells where its nearest one stands
      const where = series.x[i] === x ? "" : ` (step ${series.x[i].toLocaleString("en")})`;
      item.append(key, `${series.l} ${written(series.y[i])}${where}`);
      parts.push(item);
    }
    if (chart.skip.includes(x)) {
      const item = document.createElement("span");
      item.textContent = "skipped";
      parts.push(item);
    }
    output.replaceChildren(...parts);
  };
  const hide = () => {
    cursor.hidden = true;
    output.replaceChildren();
    at = -1;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    show(nearest(steps, chart.x[0] + share * (chart.x[1] - chart.x[0])));
  });
  plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) hide(); });
  plot.addEventListener("focus", () => { if (at < 0) show(steps.length - 1); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const stride = event.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
    const moves = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: steps.length - 1, PageUp: at - Math.round(steps.length / 10), PageDown: at + Math.round(steps.length / 10) };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    } else if (event.key === "Escape") {
      hide();
    }
  });
}
bringToLife(document);
// what is folded away on the screen is printed
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });
