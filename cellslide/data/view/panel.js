// The chosen nucleus: its crops, what both paths say of it, what was measured.

import { PATHS } from "./decide.js";

const SVG = "http://www.w3.org/2000/svg";
const LABELS = { cell_id: "cell", x: "x (px)", y: "y (px)", area_um2: "area (µm²)", score: "score", gate: "gate (weight of global)", organ: "organ", uuid: "id in QuPath" };
const TITLES = { local: "what the local path sees", context: "its surroundings, for the global path", nucleus: "nucleus" };

function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

const number = (value) => (typeof value !== "number" ? value : Number.isInteger(value) ? String(value) : value.toPrecision(4));
const percent = (p) => (p === null || Number.isNaN(p) ? "–" : `${(100 * p).toFixed(1)} %`);

export class Panel {
  // decided: a function that gives what the page decides of the chosen cell, or null; onClose: the panel was closed.
  constructor(facts, decided, onClose) {
    Object.assign(this, { facts, decided });
    this.section = document.getElementById("nucleus");
    this.body = document.getElementById("nucleus-body");
    document.getElementById("nucleus-close").addEventListener("click", onClose);
  }

  close() {
    this.section.hidden = true;
    this.asked = null;
  }

  // Fetch and show the cell of a table row, unless another one is chosen meanwhile.
  async open(row) {
    this.asked = row;
    const answer = await fetch(`cell/${row}`);
    if (!answer.ok || this.asked !== row) return;
    this.cell = await answer.json();
    if (this.asked !== row) return;
    this.section.hidden = false;
    this.section.dataset.row = row;
    document.getElementById("nucleus-title").textContent = `Nucleus ${this.cell.obs.cell_id}`;
    this.body.replaceChildren(this.crops(), make("p", { id: "verdict" }), this.bars(), this.measures());
    this.decide();
  }

  // Say what the rule of the moment makes of the cell that is shown.
  decide() {
    const line = document.getElementById("verdict"), decided = this.decided();
    if (!line || this.section.hidden || this.cell.row !== this.asked) return;
    const { obs } = this.cell, top = obs.class === obs.class_top ? "" : `${obs.class_top} `;
    const sure = obs.class_prob === null ? "" : ` (${top}${percent(obs.class_prob)})`;
    const parts = [`Stored: ${obs.class ?? "not typed"}${sure}.`];
    if (decided && decided.index >= 0) {
      const name = this.facts.classes[decided.index].name, prob = percent(decided.prob);
      const verdict = decided.abstained ? `abstains (${name} ${prob})` : `${name} (${prob})`;
      parts.push(`Now: ${verdict}, ${PATHS[decided.path]}.`);
    }
    line.textContent = parts.join(" ");
    this.section.querySelectorAll("[data-now]").forEach((cell, k) => { cell.textContent = decided ? percent(decided.all[k]) : "–"; });
  }

  crops() {
    const figures = this.cell.crops.map((crop) => {
      const image = make("img", { src: `crop/${this.cell.row}/${crop.name}`, alt: TITLES[crop.name], width: 224, height: 224 });
      const drawn = document.createElementNS(SVG, "svg");
      drawn.setAttribute("viewBox", "0 0 1 1");
      drawn.setAttribute("aria-hidden", "true");
      if (crop.outline.length) {
        const ring = document.createElementNS(SVG, "polygon");
        ring.setAttribute("points", crop.outline.map((p) => p.join(",")).join(" "));
        drawn.append(ring);
      }
      const words = `${TITLES[crop.name]}, ${Math.round(crop.um)} µm`;
      return make("figure", {}, make("div", { className: "picture" }, image, drawn), make("figcaption", { textContent: words }));
    });
    return make("div", { className: "crops" }, ...figures);
  }

  // One row a class: both paths as bars, and what is decided of them.
  bars() {
    const { probs } = this.cell, names = this.facts.classes.map((c) => c.name);
    const columns = probs.prob_local ? ["prob_local", "prob_global"] : probs.prob ? ["prob"] : [];
    if (!columns.length || probs[columns[0]].length !== names.length) return make("div");
    const head = make("tr", {}, make("th", { scope: "col", textContent: "class" }),
      ...columns.map((c) => make("th", { scope: "col", textContent: c.replace("prob_", "") })));
    if (probs.prob_local) head.append(make("th", { scope: "col", className: "n", textContent: "decided" }));
    const rows = names.map((name, k) => {
      const row = make("tr", {}, make("th", { scope: "row", textContent: name }));
      for (const column of columns) row.append(this.bar(probs[column][k], this.colorOf(k)));
      if (probs.prob_local) {
        const now = make("td", { className: "n" });
        now.dataset.now = k;
        row.append(now);
      }
      return row;
    });
    return make("table", { className: "bars" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  colorOf(k) {
    return document.getElementById("classes").tBodies[0].rows[k].querySelector("input[type=color]").value;
  }

  bar(p, color) {
    const fill = make("span", { className: "fill" });
    fill.style.width = `${100 * (p ?? 0)}%`;
    fill.style.background = color;
    return make("td", {}, make("span", { className: "bar" }, fill), make("span", { className: "value", textContent: percent(p) }));
  }

  measures() {
    const list = make("dl", { className: "measures" });
    const { obs, features } = this.cell;
    for (const [key, label] of Object.entries(LABELS)) {
      if (obs[key] !== undefined && obs[key] !== null) list.append(make("dt", { textContent: label }), make("dd", { textContent: number(obs[key]) }));
    }
    for (const [key, value] of Object.entries(features)) {
      if (key !== "area_um2" && value !== null) list.append(make("dt", { textContent: key.replaceAll("_", " ") }), make("dd", { textContent: number(value) }));
    }
    return make("details", {}, make("summary", { textContent: "Measures" }), list);
  }
}
