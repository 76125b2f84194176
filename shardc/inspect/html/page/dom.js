// What every view uses: elements, amounts as text, the note beside the pointer.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function seconds(value) {
  for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["us", 1e-6]]) {
    if (Math.abs(value) >= size) return `${(value / size).toFixed(2)} ${unit}`;
  }
  return value ? `${(value / 1e-9).toFixed(2)} ns` : "0 s";
}

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (Math.abs(value) >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${Math.round(value)} B`;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const inModule = (module) => module || "the model itself";

const tip = {
  show(text, event) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.hidden = false;
    box.style.left = `${Math.max(0, Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${Math.max(0, Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8))}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};

function table(label, heads, rows, kinds) {
  const cell = (tag, value, index) => h(tag, { class: kinds && kinds[index] ? kinds[index] : null, scope: tag === "th" ? "col" : null }, value);
  return h("div", { class: "scroll" }, h("table", { "aria-label": label },
    h("thead", {}, h("tr", {}, heads.map((head, index) => cell("th", head, index)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, index) => cell("td", value, index)))))));
}

function command(text) {
  const button = h("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(shown); button.textContent = "selected: press Ctrl+C"; }
  } }, "copy");
  const shown = h("code", {}, text);
  return h("div", { class: "bar" }, shown, button);
}

// Keys that zoom and pan what stands in `element`: + and -, arrows, 0 for all of it.
function zoomKeys(element, zoom, step) {
  element.addEventListener("keydown", (event) => {
    const target = d3.select(element), pan = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") target.call(zoom.scaleBy, 1.5);
    else if (event.key === "-") target.call(zoom.scaleBy, 1 / 1.5);
    else if (event.key === "0") target.call(zoom.transform, d3.zoomIdentity);
    else if (pan) { const k = d3.zoomTransform(element).k; target.call(zoom.translateBy, pan[0] / k, pan[1] / k); }
    else return;
    event.preventDefault();
  });
}
