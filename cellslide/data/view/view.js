// A slide to walk through: the viewer, its nuclei, the controls, and how they hear of each other.

import { Cells, queryOf } from "./cells.js";
import { Controls } from "./controls.js";
import { Corrector } from "./correct.js";
import { Overlay } from "./draw.js";
import { Finder } from "./find.js";
import { Panel } from "./panel.js";

const $ = (id) => document.getElementById(id);
const TAP_PX = 14, WAIT_MS = 120, NUCLEUS_UM = 8;
const FORMS = { outlines: "outlines", points: "points; zoom in for outlines", density: "density; zoom in for single nuclei" };

function later(work, ms) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(work, ms); };
}

class View {
  constructor(facts) {
    this.facts = facts;
    this.chosen = null; // A row of the table.
    this.total = facts.n;
    this.controls = new Controls(facts, () => this.policyMoved(), () => this.draw());
    this.viewer = openViewer(facts);
    this.overlay = new Overlay(this.viewer.canvas, facts);
    this.panel = new Panel(facts, () => this.decided(), () => this.close());
    this.cells = new Cells(facts, () => this.controls.policy, () => this.cellsChanged(), (words) => this.trouble(words));
    this.finder = new Finder(facts, this.viewer, () => this.seen(), (row) => this.chooseRow(row), (words, ms) => this.trouble(words, ms));
    this.corrector = new Corrector(facts, this.viewer, {
      chosen: () => (this.chosen === null || this.panel.cell?.row !== this.chosen ? null : this.panel.cell.obs),
      seen: () => this.seen(), count: (box) => this.cells.data && this.cells.count(box), draw: () => this.draw(),
      trouble: (words, ms) => this.trouble(words, ms),
    });
    this.fetchSoon = later(() => this.fetch(), WAIT_MS);
    this.countSoon = later(() => this.countSlide(), WAIT_MS);
    this.refetchSoon = later(() => this.fetch(true), WAIT_MS);
    this.bind();
    this.words();
    this.countSlide();
    this.regions();
  }

  bind() {
    const v = this.viewer;
    for (const name of ["open", "resize", "animation", "update-viewport"]) v.addHandler(name, () => this.draw());
    for (const name of ["open", "resize", "animation", "animation-finish"]) v.addHandler(name, () => this.fetchSoon());
    v.addHandler("animation-finish", () => this.countHere());
    v.addHandler("canvas-click", (event) => {
      if (!event.quick) return;
      if (this.corrector.click(event.position)) { event.preventDefaultAction = true; return; }
      event.preventDefaultAction = this.choose(event.position.x, event.position.y);
    });
    // Turning and flipping would leave the overlay behind; A and D are keys of this page.
    v.addHandler("canvas-key", (event) => {
      if (["r", "R", "f", "F", "j", "k", "a", "A", "d", "D"].includes(event.originalEvent.key)) event.preventDefaultAction = true;
    });
    $("zoom-in").addEventListener("click", () => v.viewport.zoomBy(1.6).applyConstraints());
    $("zoom-out").addEventListener("click", () => v.viewport.zoomBy(1 / 1.6).applyConstraints());
    $("home").addEventListener("click", () => v.viewport.goHome());
    $("overlay").addEventListener("click", () => this.toggleOverlay());
    for (const name of ["tissue", "artefacts"]) $(name).addEventListener("change", () => { this.overlay.layers[name] = $(name).checked; this.draw(); });
    $("filled").addEventListener("change", () => { this.overlay.filled = $("filled").checked; this.draw(); });
    $("side-toggle").addEventListener("click", () => {
      const open = document.body.classList.toggle("narrow-side");
      $("side-toggle").setAttribute("aria-expanded", String(!open));
    });
    document.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=color], input[type=text]")) return;
    const acts = {
      u: () => this.finder.next("uncertain"), d: () => this.finder.next("disputed"), l: () => this.finder.next("largest"),
      x: () => this.corrector.mark("deleted"), a: () => this.corrector.take("add"), c: () => this.corrector.take("check"), m: () => this.corrector.take("ruler"),
      n: () => this.step(1), p: () => this.step(-1), o: () => this.toggleOverlay(), escape: () => this.close(),
      i: () => { $("filled").checked = this.overlay.filled = !this.overlay.filled; this.draw(); },
    };
    const act = acts[event.key.toLowerCase()];
    if (act) { act(); event.preventDefault(); }
  }

  // What is seen: screen = slide * scale + (x, y), and the box of it in slide pixels.
  seen() {
    const port = this.viewer.viewport, item = this.viewer.world.getItemAt(0);
    if (!item) return null;
    const a = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const b = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(this.facts.width, 0));
    const scale = (b.x - a.x) / this.facts.width, size = port.getContainerSize();
    const box = [-a.x / scale, -a.y / scale, (size.x - a.x) / scale, (size.y - a.y) / scale];
    return { scale, x: a.x, y: a.y, width: size.x, height: size.y, box };
  }

  fetch(force = false) {
    const seen = this.seen();
    if (seen && seen.width > 0) this.cells.see(seen.box, seen.scale, force);
  }

  cellsChanged() {
    this.overlay.build(this.cells);
    this.draw();
    this.countHere();
    this.panel.decide();
  }

  policyMoved() {
    // Single cells are decided here; counts on a grid and of the slide come from the server, by the same rule.
    if (this.cells.data?.form === "density") this.refetchSoon();
    else this.cells.redecide();
    this.countSoon();
  }

  draw() {
    const seen = this.seen();
    if (!seen) return;
    this.overlay.fit(seen.width, seen.height);
    this.overlay.draw(this.cells, seen, this.controls.marks, this.indexOfChosen());
    this.corrector?.paint(this.overlay.canvas, this.overlay.ratio, seen);
    this.scaleBar(seen.scale);
  }

  countHere() {
    const seen = this.seen(), d = this.cells.data;
    if (!seen || !d) return;
    const counts = this.cells.count(seen.box), status = $("status");
    this.controls.showHere(counts);
    const n = counts ? this.nuclei(counts) : d.n;
    status.textContent = `${n.toLocaleString("en")} nuclei ${counts ? "in view" : "here"} of ${this.total.toLocaleString("en")}: ${FORMS[d.form]}`;
    Object.assign(status.dataset, { form: d.form, n });
  }

  async countSlide() {
    const query = queryOf(this.controls.policy), asked = (this.counting = {});
    const answer = await fetch(`counts.json?${query}`);
    if (!answer.ok || this.counting !== asked) return;
    const counts = await answer.json();
    this.total = this.nuclei([...counts.classes, counts.abstained, counts.untyped]);
    this.controls.showSlide(counts);
    this.countHere();
  }

  // How many nuclei there are by mark; what was rejected is none.
  nuclei(counts) {
    return counts.reduce((sum, n, k) => (k === this.facts.rejects ? sum : sum + n), 0);
  }

  toggleOverlay() {
    this.overlay.on = !this.overlay.on;
    $("overlay").setAttribute("aria-pressed", String(this.overlay.on));
    this.draw();
  }

  indexOfChosen() {
    return this.chosen === null || !this.cells.data?.row ? -1 : this.cells.data.row.indexOf(this.chosen);
  }

  // What the page decides of the chosen cell, null where it is not at hand or was not typed by two paths.
  decided() {
    const i = this.indexOfChosen(), d = this.cells.decision, k = this.facts.classes.length;
    if (i < 0 || !d) return null;
    return { index: d.index[i], prob: d.prob[i], path: d.path[i], abstained: d.abstained[i], all: d.all.subarray(i * k, i * k + k) };
  }

  // Choose the nucleus at a point of the screen; tells whether there is one.
  choose(x, y) {
    const seen = this.seen();
    const reach = Math.max(TAP_PX / seen.scale, NUCLEUS_UM / this.facts.mpp);
    const shown = this.controls.marks.map((mark) => mark.shown);
    const i = this.cells.at((x - seen.x) / seen.scale, (y - seen.y) / seen.scale, reach, shown);
    if (i >= 0) this.select(i);
    return i >= 0;
  }

  chooseRow(row) {
    this.chosen = row;
    this.draw();
    this.panel.open(row);
  }

  // What was searched, and what of it is no clean tissue.
  async regions() {
    const answer = await fetch("regions.json");
    if (!answer.ok) return;
    const found = await answer.json();
    this.overlay.regions = found;
    const names = [...new Set(found.artefacts.map((a) => a.name))].join(", ");
    $("artefacts-names").textContent = names ? `(${names})` : "";
    $("layers").hidden = !found.tissue.length && !found.artefacts.length;
    this.draw();
  }

  select(i) {
    this.chosen = this.cells.data.row[i];
    this.draw();
    this.panel.open(this.chosen);
  }

  // The next or previous nucleus in view, from the middle outwards.
  step(by) {
    const seen = this.seen(), { marks } = this.controls, d = this.cells.data;
    if (!this.cells.marks) return this.trouble("Zoom in to step through single nuclei.", 4000);
    const [cx, cy] = [(seen.box[0] + seen.box[2]) / 2, (seen.box[1] + seen.box[3]) / 2];
    const order = [], scored = this.cells.scored();
    for (let i = 0; i < d.n; i++) {
      if (!marks[this.cells.marks[i]].shown || !scored(i) || !this.cells.inside(i, seen.box)) continue;
      const [x, y] = this.cells.place(i);
      order.push([(x - cx) ** 2 + (y - cy) ** 2, i]);
    }
    order.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    if (!order.length) return;
    const now = order.findIndex(([, i]) => d.row[i] === this.chosen);
    const next = now < 0 ? (by > 0 ? 0 : order.length - 1) : (now + by + order.length) % order.length;
    this.select(order[next][1]);
  }

  close() {
    this.chosen = null;
    this.panel.close();
    this.draw();
  }

  scaleBar(scale) {
    const um = 100 / (scale / this.facts.mpp), power = 10 ** Math.floor(Math.log10(um));
    const nice = [5, 2, 1].map((m) => m * power).find((v) => v <= um);
    $("scale-bar").style.width = `${(nice / this.facts.mpp) * scale}px`;
    $("scale-text").textContent = nice >= 1000 ? `${nice / 1000} mm` : `${nice} µm`;
  }

  words() {
    const { facts } = this;
    document.title = `${facts.slide}: cellslide`;
    $("title").textContent = facts.slide;
    for (const name of facts.links) {
      const folder = location.pathname.split("/").at(-2);
      const direct = facts.links_below ? `${folder}/` : "";
      const link = Object.assign(document.createElement("a"), { href: `../../files/${direct}${name}`, textContent: name.replace(".html", "") });
      $("links").append(link);
    }
    $("all").hidden = !facts.links_below;
    const said = (n) => n.toLocaleString("en");
    const size = `${said(facts.width)} × ${said(facts.height)} px of ${facts.mpp.toPrecision(4)} µm`;
    $("facts").textContent = [`${said(facts.n)} nuclei, ${size}`, ...facts.weights, `cellslide ${facts.version}`].filter(Boolean).join("; ");
    this.trouble(facts.trouble);
  }

  trouble(words, ms = 0) {
    $("trouble").textContent = words;
    $("trouble").hidden = !words;
    if (ms) setTimeout(() => { $("trouble").hidden = true; }, ms);
  }
}

function openViewer(facts) {
  const source = {
    width: facts.width, height: facts.height, tileSize: facts.tile, tileOverlap: 0,
    minLevel: Math.max(0, Math.min(8, facts.top - 1)), maxLevel: facts.top,
    getTileUrl: (level, x, y) => `tile/${level}/${x}/${y}`,
  };
  // Stands for the style element that OpenSeadragon would add, which the policy of this page forbids.
  const stand = document.createElementNS("about:none", "style");
  stand.setAttribute("data-openseadragon-mobile-css", "");
  document.head.append(stand);
  return OpenSeadragon({
    id: "slide", tileSources: source, drawer: "canvas", showNavigationControl: false, showNavigator: true, navigatorAutoFade: false,
    navigatorPosition: "BOTTOM_RIGHT", navigatorSizeRatio: 0.16, maxZoomPixelRatio: 6, minZoomImageRatio: 0.6,
    animationTime: 0.5, imageLoaderLimit: 4, gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { pinchRotate: false },
  });
}

const answer = await fetch("facts.json");
if (answer.ok) new View(await answer.json());
else document.getElementById("status").textContent = `This slide cannot be shown: ${await answer.text()}`;
