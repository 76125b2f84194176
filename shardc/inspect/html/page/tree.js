// The tree of modules as a table whose rows open and close. Rows are made when they are seen.

class Tree {
  // `columns`: {head, text(totals), share(totals)}; `open(name)` shows a parameter.
  constructor(plan, label, columns, open, withParameters) {
    this.plan = plan; this.columns = columns; this.open = open; this.withParameters = withParameters;
    this.opened = new Set([""]); this.unfolded = new Set(); this.current = "";
    this.root = { key: "", name: plan.modules.name, kind: plan.modules.kind || "", members: [plan.modules], level: 1, path: "" };
    let only = this.root;
    for (let depth = 0; depth < 3; depth += 1) {
      this.opened.add(only.key);
      const below = this.children(only).filter((view) => !view.parameter);
      const next = below.filter((view) => (view.members || []).some((record) => record.children || record.group));
      if (next.length !== 1) break;
      only = next[0];
    }
    this.body = h("tbody", {});
    this.grid = h("table", { role: "treegrid", "aria-label": label },
      h("thead", {}, h("tr", { role: "row" }, h("th", { role: "columnheader" }, "module"),
        columns.map((column) => h("th", { role: "columnheader", class: "number" }, column.head)))),
      this.body);
    this.body.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => this.click(event));
    this.render();
    this.element = h("div", {}, h("p", { class: "soft" },
      "Arrow keys move, open and close; Enter shows a parameter; U shows each of the layers that are folded into one row."),
    h("div", { class: "scroll" }, this.grid));
  }

  children(view) {
    if (view.parameter) return [];
    const level = view.level + 1;
    if (view.group && this.unfolded.has(view.key)) {
      return view.group.map((record) => this.view(record, [record], view, level, view.parentPath));
    }
    const made = [];
    if (this.withParameters && view.members.length) {
      for (const [place, number] of (view.members[0].parameters || []).entries()) {
        const numbers = view.members.map((record) => record.parameters[place]);
        const tensor = this.plan.tensors[number];
        made.push({ parameter: number, numbers, name: tensor[1].split(".").pop(), key: `${view.key}/=${place}`, level });
      }
    }
    const first = view.members[0];
    for (const [place, record] of (first.children || []).entries()) {
      const same = view.members.map((member) =>
        member.children[place] && member.children[place].name === record.name ? member.children[place]
          : (member.children || []).find((child) => child.name === record.name)).filter(Boolean);
      made.push(this.view(record, same, view, level, view.path));
    }
    return made;
  }

  view(record, same, parent, level, parentPath) {
    const path = parentPath ? `${parentPath}.${record.name}` : record.name;
    const group = record.group ? same.flatMap((one) => one.group) : null;
    return { key: `${parent.key}/${record.name}`, name: record.name, kind: record.kind || "", level, path, parentPath,
      members: group || same, group, count: group ? group.length : same.length > 1 ? same.length : 0 };
  }

  visible() {
    const rows = [];
    const walk = (view) => {
      rows.push(view);
      if (this.opened.has(view.key)) for (const child of this.children(view)) walk(child);
    };
    walk(this.root);
    return rows;
  }

  render(focus) {
    this.rows = this.visible();
    if (!this.rows.some((view) => view.key === this.current)) this.current = "";
    this.body.replaceChildren(...this.rows.map((view) => this.row(view)));
    if (focus) this.focus(this.current);
  }

  focus(key) {
    for (const row of this.body.children) row.tabIndex = row.dataset.key === key ? 0 : -1;
    this.current = key;
    const row = [...this.body.children].find((one) => one.dataset.key === key);
    if (row) row.focus();
  }

  hasChildren(view) {
    return !view.parameter && view.members.some((record) => record.children || (this.withParameters && record.parameters));
  }

  row(view) {
    const inner = this.hasChildren(view), open = this.opened.has(view.key);
    const attributes = { role: "row", "data-key": view.key, "aria-level": view.level, tabindex: view.key === this.current ? 0 : -1,
      "aria-expanded": inner ? String(open) : null };
    const indent = `padding-left:${10 + (view.level - 1) * 16}px`;
    const name = [h("span", { class: "twist", "aria-hidden": "true" }, inner ? (open ? "▾" : "▸") : "")];
    if (view.parameter !== undefined) {
      const tensor = this.plan.tensors[view.parameter];
      const many = view.numbers.length > 1 ? h("span", { class: "badge" }, `×${view.numbers.length}`) : null;
      name.push(h("button", { class: "link", type: "button", tabindex: -1, "data-open": tensor[1] }, view.name), " ",
        h("code", { class: "soft" }, this.plan.typed(tensor)), " ", many);
    } else {
      name.push(h("strong", {}, view.name), " ", h("span", { class: "soft kind" }, view.kind), " ");
      if (view.group) {
        const each = this.unfolded.has(view.key);
        name.push(h("button", { type: "button", tabindex: -1, "data-unfold": view.key, "aria-pressed": String(each) },
          each ? `×${view.count} unfolded` : `×${view.count} folded`));
      } else if (view.count) name.push(h("span", { class: "badge" }, `×${view.count}`));
    }
    const totals = view.parameter === undefined ? totalOf(this.plan, view.members) : parametersOf(this.plan, view.numbers);
    const cells = this.columns.map((column) => {
      const share = column.share ? column.share(totals) : 0;
      return h("td", { role: "gridcell", class: share ? "number heat" : "number", style: share ? `--share:${(0.75 * share).toFixed(3)}` : null }, column.text(totals));
    });
    return h("tr", attributes, h("td", { role: "gridcell", style: indent }, name), cells);
  }

  toggle(view, open) {
    if (open) this.opened.add(view.key); else this.opened.delete(view.key);
    this.render(true);
  }

  unfold(view) {
    if (!view || !view.group) return;
    if (this.unfolded.has(view.key)) this.unfolded.delete(view.key); else this.unfolded.add(view.key);
    this.opened.add(view.key);
    this.render(true);
  }

  click(event) {
    const row = event.target.closest("tr");
    if (!row) return;
    const view = this.rows.find((one) => one.key === row.dataset.key);
    this.current = view.key;
    if (event.target.dataset.open) { this.focus(view.key); this.open(event.target.dataset.open); }
    else if (event.target.dataset.unfold) this.unfold(view);
    else if (this.hasChildren(view)) this.toggle(view, !this.opened.has(view.key));
    else this.focus(view.key);
  }

  key(event) {
    const at = this.rows.findIndex((view) => view.key === this.current), view = this.rows[at];
    const to = (index) => this.focus(this.rows[Math.max(0, Math.min(index, this.rows.length - 1))].key);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowDown") to(at + 1);
    else if (event.key === "ArrowUp") to(at - 1);
    else if (event.key === "Home") to(0);
    else if (event.key === "End") to(this.rows.length - 1);
    else if (event.key === "ArrowRight") {
      if (!this.hasChildren(view)) return;
      if (this.opened.has(view.key)) to(at + 1); else this.toggle(view, true);
    } else if (event.key === "ArrowLeft") {
      if (this.opened.has(view.key) && this.hasChildren(view)) this.toggle(view, false);
      else { let up = at; while (up > 0 && this.rows[up].level >= view.level) up -= 1; to(up); }
    } else if (event.key === "u" || event.key === "U") this.unfold(view);
    else if (event.key === "Enter" || event.key === " ") {
      if (view.parameter !== undefined) this.open(this.plan.tensors[view.parameter][1]);
      else if (this.hasChildren(view)) this.toggle(view, !this.opened.has(view.key));
    } else return;
    event.preventDefault();
  }
}

const known = new WeakMap();

function totalOf(plan, records) {
  const total = { compute: 0, sent: plan.mesh.map(() => [0, 0]), peak: 0, held: 0 };
  for (const record of records) {
    if (!known.has(record)) {
      const own = totalOf(plan, [...(record.children || []), ...(record.group || [])]);
      own.compute += record.compute || 0;
      own.peak += record.peak || 0;
      own.held += sum((record.parameters || []).map((number) => plan.tensors[number][5]));
      for (const [axis, [time, size]] of (record.sent || []).entries()) { own.sent[axis][0] += time; own.sent[axis][1] += size; }
      known.set(record, own);
    }
    const one = known.get(record);
    total.compute += one.compute; total.peak += one.peak; total.held += one.held;
    for (const [axis, [time, size]] of one.sent.entries()) { total.sent[axis][0] += time; total.sent[axis][1] += size; }
  }
  return total;
}

const parametersOf = (plan, numbers) => ({ held: sum(numbers.map((number) => plan.tensors[number][5])) });

function moduleView(plan, open) {
  const all = totalOf(plan, [plan.modules]);
  const sent = (totals, what) => sum(totals.sent.map((pair) => pair[what]));
  const column = (head, of, text, most) => ({ head, text: (totals) => (of(totals) === undefined ? "" : of(totals) ? text(of(totals)) : "–"),
    share: (totals) => (most && of(totals) ? of(totals) / most : 0) });
  const columns = [
    column("parameters", (totals) => totals.held, bytes, 0),
    column("compute", (totals) => totals.compute, seconds, all.compute),
    column("communication", (totals) => totals.sent && sent(totals, 0), seconds, sent(all, 0)),
    column("sent", (totals) => totals.sent && sent(totals, 1), bytes, sent(all, 1)),
    column("at the peak", (totals) => totals.peak, bytes, all.peak),
  ];
  return h("div", {}, h("p", {}, "Each module of the model, per rank and step: bytes of its parameters, seconds of compute and of collectives, bytes sent, ",
    "and what was made in it and is held where memory is fullest. The darker, the larger the share of the model."),
  new Tree(plan, "Modules", columns, open, true).element);
}

function communicationView(plan, open) {
  const all = totalOf(plan, [plan.modules]).sent, holder = h("div", {});
  const draw = (what) => {
    const most = sum(all.map((pair) => pair[what])) || 1, text = what ? bytes : seconds;
    const columns = plan.mesh.map(([axis, size], place) => ({ head: `over ${axis} (${size})`,
      text: (totals) => (totals.sent[place][what] ? text(totals.sent[place][what]) : "–"), share: (totals) => totals.sent[place][what] / most }));
    columns.push({ head: "over all axes", text: (totals) => { const amount = sum(totals.sent.map((pair) => pair[what])); return amount ? `${text(amount)} (${(100 * amount / most).toFixed(0)}%)` : "–"; } });
    holder.replaceChildren(new Tree(plan, "Communication by module and axis", columns, open, false).element);
  };
  draw(0);
  const choose = h("select", { id: "heat-of", onchange: (event) => draw(Number(event.target.value)) },
    h("option", { value: 0 }, "seconds of collectives"), h("option", { value: 1 }, "bytes sent"));
  return h("div", {}, h("p", {}, "What modules send over every axis of the mesh, per rank and step. The darker, the larger the share. ",
    "Gradients that travel in one bucket count for the module of the first."), h("div", { class: "bar" }, h("label", { for: "heat-of" }, "show"), choose), holder);
}
