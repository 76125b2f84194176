// The graph after a pass: one band a module, forward on the left side and backward on the right one.

const KINDS = ["operator", "collective", "input", "layers"];
const BOX = { width: 148, height: 34, across: 158, down: 52, head: 20 };

function graphView(plan) {
  const byName = new Map(plan.graphs.map((graph) => [graph.pass, graph])), names = [...byName.keys()];
  const pictureOf = (name) => { const graph = byName.get(name); return graph.same ? byName.get(graph.same) : graph; };
  const pane = (place, first) => {
    const holder = h("div", {}), id = `pass-${plan.number}-${place}`;
    const draw = (name) => {
      const graph = byName.get(name);
      holder.replaceChildren(graph.same ? h("p", { class: "soft" }, `${name} leaves the graph of ${graph.same}.`) : "", picture(pictureOf(name), name));
    };
    const select = h("select", { id, onchange: (event) => draw(event.target.value) }, names.map((name) => h("option", { value: name, selected: name === first }, name)));
    draw(first);
    return h("div", {}, h("div", { class: "bar" }, h("label", { for: id }, place ? "after" : "before"), select), holder);
  };
  const before = names.includes("assign") ? "assign" : names[0], after = names.includes("reshard") ? "reshard" : names.at(-1);
  return h("div", {}, h("p", {}, "The program as two passes left it. Forward runs down the left side of a band, backward up its right side. Of layers that are alike, one is drawn. ",
    "Scroll or press + and - to zoom, drag or press arrows to pan, press . and , to go from box to box."),
  h("div", { class: "legend" }, h("span", {}, "thin box: operator"), h("span", {}, "thick box: collective or local step"), h("span", {}, "dashed: parameter or input"), h("span", {}, "thick dashed: layers that are not drawn")),
  h("div", { class: "pair" }, pane(0, before), pane(1, after)));
}

function picture(graph, name) {
  const columns = (side) => 1 + Math.max(0, ...graph.boxes.filter((box) => box[3] === side).map((box) => box[5]));
  const tops = [], half = BOX.across * columns(0);
  let height = 8;
  for (const [, levels] of graph.bands) { tops.push(height); height += BOX.head + levels * BOX.down + 10; }
  const width = half + BOX.across * columns(1) + 40;
  const place = ([, , band, backward, level, column]) => [backward ? half + 30 + column * BOX.across : 10 + column * BOX.across,
    tops[band] + BOX.head + (backward ? graph.bands[band][1] - 1 - level : level) * BOX.down];
  const places = graph.boxes.map(place), told = h("p", { role: "status" }, `${graph.boxes.length} boxes after ${name}.`);
  const svg = s("svg", { class: "zoomed", viewBox: "0 0 640 760", tabindex: 0, role: "img", "aria-label": `Graph after ${name}` });
  const all = s("g", {});
  svg.append(all);
  for (const [band, [module]] of graph.bands.entries()) {
    all.append(s("rect", { class: "band", x: 2, y: tops[band], width: width - 4, height: BOX.head + graph.bands[band][1] * BOX.down + 4, rx: 4 }),
      s("text", { x: 8, y: tops[band] + 14, style: "font-weight:600" }, graph.modules[module] || "the model itself"),
      s("text", { x: half + 30, y: tops[band] + 14, style: "fill:var(--soft)" }, graph.boxes.some((box) => box[2] === band && box[3]) ? "backward" : ""));
  }
  const edges = [], reads = graph.boxes.map(() => []), readers = graph.boxes.map(() => []);
  for (let at = 0; at < graph.edges.length; at += 2) {
    const from = graph.edges[at], to = graph.edges[at + 1], [x0, y0] = places[from], [x1, y1] = places[to];
    const down = y1 > y0 ? 1 : 0, startY = y0 + (down ? BOX.height : 0), endY = y1 + (down ? 0 : BOX.height), bend = Math.min(60, Math.abs(endY - startY) / 2 + 12) * (down ? 1 : -1);
    const edge = s("path", { class: "edge", d: `M${x0 + BOX.width / 2},${startY}C${x0 + BOX.width / 2},${startY + bend} ${x1 + BOX.width / 2},${endY - bend} ${x1 + BOX.width / 2},${endY}` });
    edges.push(edge); reads[to].push([from, edge]); readers[from].push([to, edge]);
    all.append(edge);
  }
  let chosen = -1;
  const boxes = graph.boxes.map(([label, type, , backward, , , kind], number) => {
    const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text), [x, y] = places[number];
    const box = s("g", { class: `box ${KINDS[kind]} ${backward ? "backward" : ""}`, transform: `translate(${x},${y})`, "data-box": number, onclick: () => choose(number) },
      s("rect", { width: BOX.width, height: BOX.height, rx: kind === 2 ? 14 : 3 }), s("text", { x: 6, y: 14 }, short(graph.labels[label], 22)),
      s("text", { x: 6, y: 28, style: "font-size:9.5px" }, short(graph.types[type], 25)), s("title", {}, `${graph.labels[label]} ${graph.types[type]}`));
    all.append(box);
    return box;
  });
  const zoom = d3.zoom().scaleExtent([0.02, 6]).on("zoom", (event) => all.setAttribute("transform", event.transform));
  d3.select(svg).call(zoom).call(zoom.transform, d3.zoomIdentity.scale(640 / width));
  zoomKeys(svg, zoom, 90);
  const textOf = (number) => graph.labels[graph.boxes[number][0]];
  function choose(number) {
    for (const one of [...edges, ...boxes]) one.classList.remove("lit");
    chosen = number;
    boxes[number].classList.add("lit");
    for (const [, edge] of [...reads[number], ...readers[number]]) edge.classList.add("lit");
    const [label, type, band, backward] = graph.boxes[number];
    told.textContent = `${graph.labels[label]} ${graph.types[type]}, ${graph.modules[graph.bands[band][0]] || "the model itself"}, ${backward ? "backward" : "forward"}; reads ${reads[number].map(([from]) => textOf(from)).join(", ") || "nothing"}; read by ${readers[number].map(([to]) => textOf(to)).join(", ") || "nothing"}.`;
  }
  svg.addEventListener("keydown", (event) => {
    if (event.key !== "," && event.key !== ".") return;
    choose((chosen + (event.key === "." ? 1 : boxes.length - 1) + (chosen < 0 && event.key === "," ? 1 : 0)) % boxes.length);
    const [x, y] = places[chosen];
    d3.select(svg).call(zoom.translateTo, x + BOX.width / 2, y + BOX.height / 2);
    event.preventDefault();
  });
  return h("div", {}, svg, told);
}
