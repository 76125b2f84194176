// The page: tabs over views that are made when they are first seen.

const data = JSON.parse(document.getElementById("data").textContent);
for (const [number, plan] of data.plans.entries()) {
  plan.number = number;
  plan.typed = (tensor) => tensor[2] + plan.layouts[tensor[3]].text;
}
let plan = data.plans[0];
const openValue = (name) => valuePanel.open(plan, name);

function planView() {
  const values = plan.answers.filter((one) => !plan.tensors.some((tensor) => tensor[1] === one.value));
  const link = (name, typed) => [h("button", { type: "button", class: "link", onclick: () => openValue(name) }, name), h("code", {}, typed)];
  const ends = plan.tensors.filter((tensor) => tensor[0] !== "parameter").slice(0, 60);
  return h("div", {}, h("pre", { tabindex: 0, "aria-label": "Summary" }, plan.head.join("\n")),
    plan.notes.length ? [h("h2", {}, "Notes"), h("ul", {}, plan.notes.map((note) => h("li", {}, note)))] : "",
    h("h2", {}, "Sent by a rank in a step"), table("Bytes sent over each axis", ["axis", "ranks", "bytes"], plan.mesh.map(([axis, size]) => [axis, size, bytes(plan.figures.sent[axis])]), [null, "number", "number"]),
    ends.length ? [h("h2", {}, "Inputs and outputs"), table("Inputs and outputs", ["role", "value", "layout"], ends.map((tensor) => [tensor[0], ...link(tensor[1], plan.typed(tensor))]))] : "",
    values.length ? [h("h2", {}, "Values whose conversions take longest"), table("Values whose conversions take longest", ["value", "layout"], values.map((one) => link(one.value, one.layout)))] : "",
    h("p", { class: "soft" }, "Parameters are in the tree of modules."));
}

const VIEWS = [["Plan", planView], ["Modules", () => moduleView(plan, openValue)], ["Communication", () => communicationView(plan, openValue)],
  ["Memory", () => memoryView(plan)], ["Timeline", () => timelineView(plan)], ["Graph", () => graphView(plan)]];
if (data.plans.length > 1) VIEWS.push(["Compare", () => compareView(...data.plans)]);

const tabs = document.getElementById("tabs"), views = document.getElementById("views"), made = new Map();
let current = 0;

function show(index, focus) {
  current = index;
  const key = `${plan.number} ${VIEWS[index][0]}`;
  if (!made.has(key)) {
    made.set(key, h("section", { role: "tabpanel", id: `panel-${plan.number}-${index}`, "aria-labelledby": `tab-${index}` }));
    views.append(made.get(key));
    made.get(key).append(VIEWS[index][1]());
  }
  for (const [other, panel] of made) panel.hidden = other !== key;
  for (const [place, tab] of [...tabs.children].entries()) {
    tab.setAttribute("aria-selected", String(place === index));
    tab.tabIndex = place === index ? 0 : -1;
  }
  tabs.children[index].setAttribute("aria-controls", made.get(key).id);
  if (focus) tabs.children[index].focus();
}

for (const [index, [name]] of VIEWS.entries()) tabs.append(h("button", { type: "button", role: "tab", id: `tab-${index}`, onclick: () => show(index) }, name));
tabs.addEventListener("keydown", (event) => {
  const to = { ArrowRight: current + 1, ArrowLeft: current - 1 + VIEWS.length, Home: 0, End: VIEWS.length - 1 }[event.key];
  if (to === undefined) return;
  show(to % VIEWS.length, true);
  event.preventDefault();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { valuePanel.close(); tip.hide(); } });

if (data.plans.length > 1) {
  const holder = document.getElementById("plans");
  holder.append("plan for ", ...data.plans.map((one) => h("button", { type: "button", "aria-pressed": String(one === plan), onclick: (event) => {
    plan = one;
    valuePanel.close();
    for (const button of holder.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === event.currentTarget));
    show(current);
  } }, one.name)));
}
show(0);
document.documentElement.dataset.ready = "yes";
