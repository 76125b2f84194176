// Two plans side by side: their figures, the tensors that lie differently, and what modules cost in each.

function compareView(first, second) {
  const names = [first.name, second.name], figure = (label, of, text) => {
    const values = [first, second].map((plan) => of(plan.figures)), change = values[0] ? (100 * (values[1] - values[0])) / values[0] : NaN;
    return [label, text(values[0]), text(values[1]), Number.isFinite(change) ? `${change > 0 ? "+" : ""}${change.toFixed(1)}%` : "–"];
  };
  const rows = [figure("predicted step", (f) => f.predicted, seconds), figure("compute", (f) => f.compute, seconds), figure("conversions", (f) => f.conversions, seconds),
    figure("of which hidden", (f) => f.hidden, seconds), figure("sent by a rank", (f) => sum(Object.values(f.sent)), bytes), figure("memory at the peak", (f) => f.peak, bytes)];
  const other = new Map(second.tensors.map((tensor) => [tensor[0] + tensor[1], tensor])), groups = new Map();
  for (const tensor of first.tensors) {
    const that = other.get(tensor[0] + tensor[1]), texts = [first.typed(tensor), that ? second.typed(that) : "not there"];
    const key = [tensor[0], patternOf(tensor[1]), ...texts].join("|");
    if (!groups.has(key)) groups.set(key, { tensor, that, texts, count: 0 });
    groups.get(key).count += 1;
  }
  const link = (plan, tensor, text) => (tensor ? h("button", { type: "button", class: "link", onclick: () => valuePanel.open(plan, tensor[1]) }, text) : text);
  const lies = [...groups.values()].sort((a, b) => (a.texts[0] === a.texts[1]) - (b.texts[0] === b.texts[1])).map(({ tensor, that, texts, count }) =>
    [tensor[0], h("code", {}, count > 1 ? patternOf(tensor[1]) : tensor[1]), count > 1 ? `×${count}` : "", link(first, tensor, texts[0]), link(second, that, texts[1]),
      texts[0] === texts[1] ? "the same" : h("span", { class: "chip differs" }, "differs")]);
  return h("div", {}, h("h2", {}, "Figures, per rank and step"), table("Figures of both plans", ["", ...names, "change"], rows, [null, "number", "number", "number"]),
    h("h2", {}, "Tensors"), table("Layouts in both plans", ["role", "tensor", "", ...names, ""], lies),
    h("h2", {}, "Modules"), h("div", { class: "pair" }, [first, second].map((plan) => h("div", {}, h("h3", {}, plan.name), moduleView(plan, (value) => valuePanel.open(plan, value))))));
}
