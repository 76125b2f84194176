// Memory over the step: what a rank holds, stacked by what the bytes are, and the peak taken apart.

function memoryView(plan) {
  const { labels, at, held, calls, peak, budget } = plan.memory;
  if (!at.length) return h("p", {}, "Nothing runs.");
  const width = 1100, height = 360, margin = { left: 76, right: 12, top: 12, bottom: 34 };
  const totals = at.map((_, place) => sum(held.map((row) => row[place])));
  const x = d3.scaleLinear([at[0], at[at.length - 1] || 1], [margin.left, width - margin.right]);
  const y = d3.scaleLinear([0, Math.max(...totals) * 1.05], [height - margin.bottom, margin.top]);
  const order = [...labels.keys()].sort((a, b) => Math.max(...held[b]) - Math.max(...held[a]));
  const fills = new Map(order.map((label, place) => [label, `var(--part${place % 8})`]));
  const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "zoomed", tabindex: 0, role: "img",
    "aria-label": "Memory over the step. Comma and full stop move the mark, plus and minus zoom, arrows pan, 0 shows all." });
  const clip = s("clipPath", { id: `clip-${plan.number}` }, s("rect", { x: margin.left, y: 0, width: width - margin.left - margin.right, height }));
  const areas = s("g", { "clip-path": `url(#clip-${plan.number})` }), axis = s("g", { transform: `translate(0, ${height - margin.bottom})` });
  const mark = s("line", { y1: margin.top, y2: height - margin.bottom, stroke: "var(--text)", "stroke-dasharray": "3 3" });
  const left = s("g", { transform: `translate(${margin.left}, 0)` });
  svg.append(clip, areas, axis, left);
  const unit = 1024 ** Math.floor(Math.log2(y.domain()[1] || 1) / 10);
  d3.select(left).call(d3.axisLeft(y).tickValues(d3.ticks(0, y.domain()[1] / unit, 6).map((tick) => tick * unit)).tickFormat(bytes));
  let scale = x, chosen = totals.indexOf(Math.max(...totals));
  const told = h("div", { role: "status" });
  const tell = () => {
    mark.setAttribute("x1", scale(at[chosen])); mark.setAttribute("x2", scale(at[chosen]));
    told.replaceChildren(h("p", {}, `At ${seconds(at[chosen])}, ${calls[chosen]}: ${bytes(totals[chosen])}.`),
      h("div", { class: "legend" }, order.filter((label) => Math.max(...held[label])).map((label) =>
        h("span", {}, h("span", { class: "swatch", style: `background:${fills.get(label)}` }), `${labels[label]} ${bytes(held[label][chosen])}`))));
  };
  const draw = () => {
    const base = at.map(() => 0), made = [];
    for (const label of order) {
      const below = [...base];
      for (const place of base.keys()) base[place] += held[label][place];
      const above = [...base];
      const area = d3.area().x((_, place) => scale(at[place])).y0((_, place) => y(below[place])).y1((_, place) => y(above[place])).curve(d3.curveStepAfter);
      made.push(s("path", { d: area(at), fill: fills.get(label), stroke: "var(--text)", "stroke-width": 0.4 }, s("title", {}, labels[label])));
    }
    areas.replaceChildren(...made, mark);
    if (budget && budget < y.domain()[1]) areas.append(s("line", { x1: margin.left, x2: width, y1: y(budget), y2: y(budget), stroke: "var(--sum)", "stroke-width": 2 }, s("title", {}, "the bound")));
    d3.select(axis).call(d3.axisBottom(scale).ticks(8).tickFormat(seconds));
    tell();
  };
  const zoom = d3.zoom().scaleExtent([1, 400]).extent([[margin.left, 0], [width - margin.right, height]])
    .translateExtent([[margin.left, 0], [width - margin.right, height]])
    .on("zoom", (event) => { scale = event.transform.rescaleX(x); draw(); });
  d3.select(svg).call(zoom);
  zoomKeys(svg, zoom, 60);
  const pick = (place) => { chosen = Math.max(0, Math.min(place, at.length - 1)); tell(); };
  svg.addEventListener("keydown", (event) => {
    if (event.key === "," || event.key === ".") { pick(chosen + (event.key === "," ? -1 : 1)); event.preventDefault(); }
  });
  svg.addEventListener("pointermove", (event) => pick(d3.bisectLeft(at, scale.invert(d3.pointer(event, svg)[0]))));
  draw();
  const parts = peak.parts.map(([label, size]) => [label, bytes(size), `${(100 * size / peak.bytes).toFixed(0)}%`]);
  const owners = new Map();
  const walk = (record, path) => {
    if (record.peak) {
      const one = owners.get(patternOf(path)) || [0, 0];
      owners.set(patternOf(path), [one[0] + record.peak, one[1] + 1]);
    }
    for (const child of record.children || []) {
      for (const each of child.group || [child]) walk(each, path ? `${path}.${each.name}` : each.name);
    }
  };
  walk(plan.modules, "");
  const made = [...owners].sort((a, b) => b[1][0] - a[1][0]).slice(0, 15).map(([path, [size, times]]) =>
    [inModule(path), times > 1 ? `×${times}` : "", bytes(size), `${(100 * size / peak.bytes).toFixed(1)}%`]);
  return h("div", {}, h("p", {}, "What a rank holds while each call runs. Long steps are shown by the fullest moment of each stretch."), svg, told,
    h("h2", {}, "The peak"), h("p", {}, `${bytes(peak.bytes)}${budget ? ` of ${bytes(budget)}` : ""} in ${peak.phase}${peak.place ? `, at ${peak.place}` : ""}.`),
    h("div", { class: "pair" }, table("The peak by what the bytes are", ["what", "bytes", "share"], parts, [null, "number", "number"]),
      table("The peak by the module that made it", ["made in", "", "bytes", "share"], made, [null, "number", "number", "number"])));
}
