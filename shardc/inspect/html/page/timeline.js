// When the rank computes, and when the links of each axis carry what. Drawn on a canvas: a deep model has many spans.

function timelineView(plan) {
  const line = plan.timeline, count = line.start.length, tall = 44, left = 92, bottom = 26;
  if (!count) return h("p", {}, "Nothing runs.");
  const height = line.lanes.length * (tall + 8) + bottom + 8;
  const canvas = h("canvas", { class: "zoomed", tabindex: 0, role: "img", style: `height:${height}px`,
    "aria-label": "Timeline of the step. Comma and full stop choose a span, plus and minus zoom, arrows pan, 0 shows all." });
  const told = h("p", { role: "status" }, "Scroll or press + to zoom, drag or press arrows to pan, point at a span or press . and , to read it.");
  const lanes = line.lanes.map(() => []);
  for (let span = 0; span < count; span += 1) lanes[line.lane[span]].push(span);
  const end = line.seconds || 1;
  let scale = null, chosen = -1, transform = d3.zoomIdentity;
  const text = (span) => {
    const [name, module, phase] = line.whats[line.what[span]];
    return `${name} in ${inModule(line.modules[module])}, ${phase}${line.lane[span] ? `, over ${line.lanes[line.lane[span]]}` : ""}: ${seconds(line.length[span] * line.tick)} from ${seconds(line.start[span] * line.tick)}`;
  };
  const draw = () => {
    const width = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
    const base = d3.scaleLinear([0, end], [left, width - 8]);
    scale = transform.rescaleX(base);
    const context = canvas.getContext("2d"), colors = { forward: color("part0"), backward: color("part3"), "": color("part7") };
    const ink = color("text"), soft = color("soft"), accent = color("accent");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "12px system-ui, sans-serif"; context.textBaseline = "middle";
    for (const [number, spans] of lanes.entries()) {
      const top = 6 + number * (tall + 8);
      context.save(); context.beginPath(); context.rect(left, top, width - left - 8, tall); context.clip();
      context.fillStyle = color("panel"); context.fillRect(left, top, width, tall);
      let painted = -1;
      for (const span of spans) {
        const from = scale(line.start[span] * line.tick), to = scale((line.start[span] + line.length[span]) * line.tick);
        if (to < left || from > width || (to - from < 0.5 && to < painted + 0.5 && span !== chosen)) continue;
        const wide = Math.max(to - from, 0.7), [name, module, phase] = line.whats[line.what[span]];
        context.fillStyle = colors[phase] || colors[""]; context.fillRect(from, top, wide, tall);
        if (wide > 3) { context.strokeStyle = soft; context.lineWidth = 0.6; context.strokeRect(from, top + 0.5, wide, tall - 1); }
        if (wide > 46) {
          context.save(); context.beginPath(); context.rect(from, top, wide - 4, tall); context.clip(); context.fillStyle = ink;
          const start = Math.max(from, left) + 4;
          context.fillText(name, start, top + 14); context.fillText(`${line.modules[module].split(".").slice(-3).join(".")} ${phase === "backward" ? "(backward)" : ""}`, start, top + 31); context.restore();
        }
        if (span === chosen) { context.strokeStyle = accent; context.lineWidth = 3; context.strokeRect(from, top + 1.5, wide, tall - 3); }
        painted = to;
      }
      context.restore();
      context.fillStyle = ink; context.fillText(line.lanes[number] ? `over ${line.lanes[number]}` : "compute", 8, top + tall / 2);
    }
    context.fillStyle = soft; context.textAlign = "center";
    for (const tick of scale.ticks(Math.max(2, Math.floor(width / 130)))) { if (scale(tick) >= left) { context.fillRect(scale(tick), height - bottom, 1, 5); context.fillText(seconds(tick), Math.min(scale(tick), width - 30), height - 9); } }
    context.textAlign = "left";
  };
  const zoom = d3.zoom().scaleExtent([1, 20000]).on("zoom", (event) => { transform = event.transform; draw(); });
  d3.select(canvas).call(zoom);
  const resized = () => {
    const width = canvas.clientWidth;
    zoom.extent([[left, 0], [width - 8, height]]).translateExtent([[left, 0], [width - 8, height]]);
    draw();
  };
  new ResizeObserver(resized).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  zoomKeys(canvas, zoom, 80);
  const at = (event) => {
    const [x, y] = d3.pointer(event, canvas), spans = lanes[Math.floor((y - 6) / (tall + 8))];
    if (!spans || !scale || x < left) return -1;
    const time = scale.invert(x) / line.tick, place = d3.bisector((span) => line.start[span]).right(spans, time) - 1;
    return place >= 0 && line.start[spans[place]] + line.length[spans[place]] >= time ? spans[place] : -1;
  };
  canvas.addEventListener("pointermove", (event) => { const span = at(event); if (span < 0) tip.hide(); else tip.show(text(span), event); });
  canvas.addEventListener("pointerleave", () => tip.hide());
  const choose = (span) => { chosen = span; if (span >= 0) told.textContent = text(span); draw(); };
  canvas.addEventListener("click", (event) => choose(at(event)));
  canvas.addEventListener("keydown", (event) => {
    if (event.key !== "," && event.key !== ".") return;
    choose(Math.max(0, Math.min(chosen + (event.key === "." ? 1 : -1), count - 1)));
    const from = line.start[chosen] * line.tick;
    if (scale && (scale(from) < left || scale(from) > canvas.clientWidth)) d3.select(canvas).call(zoom.translateTo, d3.scaleLinear([0, end], [left, canvas.clientWidth - 8])(from), 0);
    event.preventDefault();
  });
  const totals = d3.rollups([...line.start.keys()], (spans) => [sum(spans.map((span) => line.length[span])) * line.tick, spans.length],
    (span) => `${line.lane[span]}|${line.whats[line.what[span]][0]}|${line.whats[line.what[span]][2]}`).sort((a, b) => b[1][0] - a[1][0]).slice(0, 20);
  return h("div", {}, h("div", { class: "legend" }, [["forward", "part0"], ["backward", "part3"]].map(([word, part]) => h("span", {}, h("span", { class: "swatch", style: `background:var(--${part})` }), word))),
    canvas, told, h("h2", {}, "What takes longest"), table("What takes longest", ["what", "where", "phase", "times", "in all"],
      totals.map(([key, [time, times]]) => { const [lane, name, phase] = key.split("|"); return [name, Number(lane) ? `over ${line.lanes[lane]}` : "compute", phase, times, seconds(time)]; }), [null, null, null, "number", "number"]));
}
