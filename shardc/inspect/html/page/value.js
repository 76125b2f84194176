// The panel of one value: which part every rank holds, why, and what other layouts would cost.

function quoted(text, shell) {
  return shell ? `'${text.replaceAll("'", "'\\''")}'` : JSON.stringify(text);
}

function askWhy(plan, value) {
  const { command: start, shell } = plan.asking;
  return shell ? `${start} --why ${quoted(value, true)}` : `print(${start}.why(${quoted(value, false)}))`;
}

function askWhyNot(plan, value, layout) {
  const { command: start, shell } = plan.asking;
  return shell ? `${start} --why ${quoted(value, true)} --layout ${quoted(layout, true)}`
    : `print(${start}.why_not(${quoted(value, false)}, ${quoted(layout, false)}))`;
}

const patternOf = (name) => name.replace(/\.\d+(?=\.|$)/g, ".*");

function answerFor(plan, name, typed) {
  return plan.answers.find((one) => one.value === name)
    || plan.answers.find((one) => one.pattern === patternOf(name) && one.layout === typed);
}

const valuePanel = {
  open(plan, name) {
    const panel = document.getElementById("value");
    if (panel.hidden) this.opener = document.activeElement;
    const tensor = plan.tensors.find((one) => one[1] === name);
    const answer = answerFor(plan, name, tensor ? plan.typed(tensor) : null);
    const layout = plan.layouts[tensor ? tensor[3] : answer.picture];
    const dtype = tensor ? tensor[2] : answer.layout.slice(0, answer.layout.indexOf("["));
    panel.replaceChildren(
      h("button", { type: "button", class: "close", onclick: () => this.close() }, "close (Esc)"),
      h("h2", { id: "value-name" }, name),
      h("p", {}, h("span", { class: "soft" }, tensor ? tensor[0] : "value"), " ", h("code", {}, dtype + layout.text)),
      tensor ? h("p", {}, `A rank holds ${bytes(tensor[5])} of ${bytes(tensor[4])}.`) : "",
      axisTable(plan, layout), partsOf(plan, layout), this.why(plan, name, answer), this.others(plan, name, layout, dtype, answer));
    panel.hidden = false;
    panel.scrollTop = 0;
    panel.focus();
  },
  close() {
    const panel = document.getElementById("value");
    if (panel.hidden) return;
    panel.hidden = true;
    const row = this.opener && !this.opener.isConnected ? document.querySelector('[role="row"][tabindex="0"]') : this.opener;
    if (row) row.focus();
  },
  why(plan, name, answer) {
    if (!answer) return h("section", {}, h("h3", {}, "Why"), h("p", {}, "Not asked beforehand. This command tells:"), command(askWhy(plan, name)));
    const other = answer.value === name ? "" : h("p", { class: "soft" }, `Asked of ${answer.value}, which lies the same in a layer like this one.`);
    const compared = answer.why.some((line) => line.startsWith("  next best"));
    return h("section", {}, h("h3", {}, "Why"), other, h("pre", { tabindex: 0, "aria-label": "Why it lies so" }, answer.why.join("\n")),
      compared ? "" : [h("p", {}, "The next best layout was not searched for; this command does:"), command(askWhy(plan, name))]);
  },
  others(plan, name, layout, dtype, answer) {
    const result = h("div", { role: "status", id: "other-layout" });
    const now = dtype + layout.text;
    const tell = (text) => {
      const cost = answer && answer.instead[text];
      result.replaceChildren(h("p", {}, h("code", {}, text), text === now ? ": that is the plan." : cost ? `: ${cost}` : ": not priced beforehand. This command searches for the best plan with it:"),
        text !== now && !cost ? command(askWhyNot(plan, name, text)) : "");
    };
    const known = answer ? Object.entries(answer.instead) : [];
    const rows = known.map(([text, cost]) => [h("code", {}, text),
      cost || h("button", { type: "button", class: "link", onclick: () => tell(text) }, "show the command")]);
    return h("section", {}, h("h3", {}, "Another layout?"),
      known.length ? table("Other layouts and their cost", ["layout", "instead of the plan"], rows) : "",
      layoutForm(plan, layout, dtype, tell), result);
  },
};

// One choice an axis; axes can also be dragged onto the dims.
function layoutForm(plan, layout, dtype, tell) {
  const selects = new Map(), inner = layout.text.slice(1, layout.text.indexOf("]"));
  const written = inner ? inner.split(/, (?![^(]*\))/) : [], sums = new Map([...layout.text.matchAll(/\+\w+@(\w+)/g)].map((found) => [found[1], found[0]]));
  const chosen = () => {
    const dims = layout.shape.map((size, dim) => {
      const axes = plan.mesh.map(([axis]) => axis).filter((axis) => selects.get(axis).value === String(dim)), now = plan.dims[layout.dims[dim]].axes;
      if (axes.length === now.length && axes.every((axis) => now.includes(axis))) return written[dim]; // with its order and pieces
      return axes.length ? `${size}@${axes.length > 1 ? `(${axes.join(",")})` : axes[0]}` : String(size);
    });
    const partial = plan.mesh.filter(([axis]) => selects.get(axis).value === "partial").map(([axis]) => ` ${sums.get(axis)}`);
    tell(`${dtype}[${dims.join(", ")}]${partial.join("")}`);
  };
  const fields = plan.mesh.map(([axis, size]) => {
    const placed = layout.dims.findIndex((dim) => plan.dims[dim].axes.includes(axis));
    const select = h("select", { id: `axis-${axis}`, onchange: chosen }, h("option", { value: "" }, "broadcast"),
      sums.has(axis) ? h("option", { value: "partial", selected: true }, "partial") : "",
      layout.shape.map((extent, dim) => h("option", { value: dim, selected: dim === placed }, `splits dim ${dim} (${extent})`)));
    selects.set(axis, select);
    return h("span", { class: "bar" }, h("label", { for: `axis-${axis}`, class: "chip split", draggable: "true",
      ondragstart: (event) => event.dataTransfer.setData("text/plain", axis) }, `${axis} (${size})`), select);
  });
  const drops = ["", ...layout.shape.keys()].map((dim) => h("span", { class: "chip", "data-dim": dim,
    ondragover: (event) => event.preventDefault(),
    ondrop: (event) => {
      event.preventDefault();
      const select = selects.get(event.dataTransfer.getData("text/plain"));
      if (select) { select.value = String(dim); chosen(); }
    } }, dim === "" ? "broadcast" : `dim ${dim} (${layout.shape[dim]})`));
  return h("div", {}, h("p", { class: "soft" }, "Choose what each axis does, or drag an axis onto a dim:"), h("div", { class: "bar" }, fields),
    h("div", { class: "bar", "aria-hidden": "true" }, drops));
}

function axisTable(plan, layout) {
  const rows = layout.axes.map(([axis, word, sentence]) => [axis, h("span", { class: `chip ${word}` }, word), sentence.slice(word.length + 2)]);
  return rows.length ? table("What each axis of the mesh does", ["axis", "", "what it does"], rows) : "";
}

// Coordinates of a rank, and the part of a dim that it holds.
function coordinates(plan, rank) {
  const places = {};
  for (const [axis, size] of [...plan.mesh].reverse()) { places[axis] = rank % size; rank = Math.floor(rank / size); }
  return places;
}

function partOf(plan, dim, places) {
  const sizes = Object.fromEntries(plan.mesh);
  return dim.axes.reduce((number, axis) => number * sizes[axis] + places[axis], 0);
}

function ranksIn(plan) { return plan.mesh.reduce((product, [, size]) => product * size, 1); }

function partsOf(plan, layout) {
  const dims = layout.dims.map((number) => plan.dims[number]), ranks = ranksIn(plan), drawn = h("div", {}), told = h("p", { role: "status" });
  // two dims are drawn: those that are split most, then the largest
  const order = [...dims.keys()].sort((a, b) => dims[b].parts.length - dims[a].parts.length || dims[b].size - dims[a].size).slice(0, 2).sort((a, b) => a - b);
  const buttons = [];
  const show = (rank) => {
    const places = coordinates(plan, rank);
    const held = dims.map((dim) => partOf(plan, dim, places));
    drawn.replaceChildren(drawing(plan, layout, dims, order, places, held));
    const where = plan.mesh.map(([axis]) => `${axis} ${places[axis]}`).join(", ");
    const texts = dims.map((dim, at) => `dim ${at}: ${runsText(dim, held[at])}`);
    const partial = layout.axes.filter(([, word]) => word === "partial").map(([axis]) => axis);
    told.textContent = `Rank ${rank} (${where}) holds ${texts.join("; ") || "the one number"}${partial.length ? `, as one of the parts over ${partial.join(" and ")} that are yet to be combined` : ""}.`;
    for (const [at, button] of buttons.entries()) button.setAttribute("aria-pressed", String(at === rank));
  };
  let choose;
  if (ranks <= 64) {
    const across = plan.mesh.length ? plan.mesh[plan.mesh.length - 1][1] : 1;
    for (let rank = 0; rank < ranks; rank += 1) {
      const places = coordinates(plan, rank), part = dims.reduce((number, dim) => number * dim.parts.length + partOf(plan, dim, places), 0);
      buttons.push(h("button", { type: "button", style: `background:var(--part${part % 8})`, onclick: () => show(rank),
        "aria-label": `rank ${rank}, part ${part}` }, `${rank}`));
    }
    choose = [h("p", { class: "soft" }, `Ranks of the mesh ${plan.mesh.map(([axis, size]) => `${axis}=${size}`).join(",")}, the last axis across; ranks of one colour hold the same part${layout.axes.some(([, word]) => word === "partial") ? ", or addends of it" : ""}. Choose one:`),
      h("div", { class: "scroll" }, h("div", { class: "ranks", style: `grid-template-columns:repeat(${across}, minmax(34px, 60px))` }, buttons))];
  } else {
    choose = h("p", {}, h("label", {}, `Rank (0 to ${ranks - 1}) `, h("input", { type: "number", min: 0, max: ranks - 1, value: 0,
      oninput: (event) => { const rank = Number(event.target.value); if (rank >= 0 && rank < ranks) show(Math.floor(rank)); } })));
  }
  show(0);
  return h("section", {}, h("h3", {}, "Parts"), choose, drawn, told);
}

function runsText(dim, part) {
  const runs = dim.parts[part];
  if (!runs.length) return "padding only";
  if (runs.length === 1 && runs[0][1] === dim.size) return `all ${dim.size}`;
  const shown = runs.slice(0, 3).map(([start, length]) => (length === 1 ? `${start}` : `${start}–${start + length - 1}`)).join(" and ");
  const more = runs.length - 3 + dim.more;
  return `${shown}${more > 0 ? ` and ${more} more runs` : ""} of ${dim.size}`;
}

function drawing(plan, layout, dims, order, places, held) {
  const width = 560, left = 44, top = 18, [down, over] = order.length === 2 ? order : [null, order[0]];
  const horizontal = over === undefined ? { size: 1, parts: [[[0, 1]]] } : dims[over];
  const vertical = down === null ? { size: 1, parts: [[[0, 1]]] } : dims[down];
  const height = down === null ? 46 : Math.max(90, Math.min(300, (width - left) * Math.min(vertical.size / horizontal.size, 1)));
  const x = (value) => left + ((width - left - 2) * value) / (horizontal.size || 1), y = (value) => top + (height * value) / (vertical.size || 1);
  const elsewhere = dims.filter((_, at) => !order.includes(at) && dims[at].parts.length > 1);
  const ranks = ranksIn(plan), holders = new Map();
  for (let rank = 0; rank < ranks; rank += 1) {
    const at = coordinates(plan, rank);
    if (elsewhere.some((dim) => partOf(plan, dim, at) !== partOf(plan, dim, places))) continue;
    const key = `${down === null ? 0 : partOf(plan, vertical, at)},${over === undefined ? 0 : partOf(plan, horizontal, at)}`;
    if (!holders.has(key)) holders.set(key, []);
    holders.get(key).push(rank);
  }
  const shapes = [], texts = [], partial = layout.axes.some(([, word]) => word === "partial");
  for (const [i, rows] of vertical.parts.entries()) for (const [j, columns] of horizontal.parts.entries()) {
    const part = i * horizontal.parts.length + j, mine = (down === null || held[down] === i) && (over === undefined || held[over] === j);
    const names = holders.get(`${i},${j}`) || [], text = `${names.length > 4 ? `${names.slice(0, 3).join(" ")} … ${names.at(-1)}` : names.join(" ")}${partial ? " (addend)" : ""}`;
    for (const [top_, tall] of rows) for (const [start, long] of columns) {
      const w = x(start + long) - x(start), t = y(top_ + tall) - y(top_);
      shapes.push([mine, s("rect", { x: x(start), y: y(top_), width: Math.max(w, 0.5), height: Math.max(t, 0.5), fill: `var(--part${part % 8})`, class: mine ? "held" : null },
        s("title", {}, `${names.length > 1 ? "ranks" : "rank"} ${text}`))]);
      if (w > 7 * text.length + 4 && t > 13) texts.push(s("text", { x: x(start) + w / 2, y: y(top_) + t / 2 + 4, "text-anchor": "middle", "pointer-events": "none" }, text));
    }
  }
  shapes.sort((a, b) => a[0] - b[0]);
  const labels = [over === undefined ? "" : s("text", { x: left, y: 12 }, `dim ${over}: ${horizontal.size}`),
    down === null ? "" : s("text", { transform: `translate(12, ${top + height}) rotate(-90)` }, `dim ${down}: ${vertical.size}`)];
  const all = plan.mesh.map(([axis]) => axis).filter((axis) => layout.axes.some(([name, word]) => name === axis && word === "split"));
  return h("div", { class: "parts" }, s("svg", { viewBox: `0 0 ${width} ${height + top + 4}`, width, role: "img",
    "aria-label": `The tensor, cut by ${all.join(" and ") || "no axis"}; numbers are the ranks that hold a block` }, shapes.map((pair) => pair[1]), texts, labels),
  elsewhere.length ? h("p", { class: "soft" }, "Another dim is split too; the blocks are those at the chosen rank's place there.") : "");
}
