// Classes and thresholds: what is shown, and by which rule cells are decided.

const $ = (id) => document.getElementById(id);
const WORDS = { mix: "mix: both paths, weighed by the gate", safe: "safe: the more reliable path", local: "local path", global: "global path" };
const NONE = { abstained: { name: "abstained", color: "#5c5c5c" }, untyped: { name: "not typed", color: "#8a8a8a" } };

export class Controls {
  // facts: what facts.json says. onPolicy: the rule was moved; onLook: only what is shown.
  constructor(facts, onPolicy, onLook) {
    Object.assign(this, { facts, onPolicy, onLook });
    this.stored = {
      gate: facts.rule.gate, tau: facts.rule.tau, gamma: facts.rule.gamma, abstain: facts.rule.abstain,
      floors: Boolean(facts.rule.thresholds), score: 0,
    };
    this.policy = { ...this.stored };
    this.marks = [...facts.classes.map((c, k) => ({ ...c, shown: true, dashed: false, hatched: k === facts.rejects })),
      { ...NONE.abstained, shown: true, dashed: true }, { ...NONE.untyped, shown: true, dashed: true }];
    this.listClasses();
    this.bind();
    this.show();
  }

  listClasses() {
    const typed = this.facts.rule.paths || this.facts.named;
    this.rows = this.marks.map((mark, k) => {
      const row = document.createElement("tr"), name = document.createElement("th");
      name.scope = "row";
      const label = document.createElement("label"), box = document.createElement("input");
      const color = document.createElement("input"), text = document.createElement("span");
      Object.assign(box, { type: "checkbox", checked: true });
      Object.assign(color, { type: "color", value: mark.color, title: "colour of this class in this window" });
      color.setAttribute("aria-label", `colour of ${mark.name}`);
      text.textContent = mark.hatched ? `${mark.name} (rejected, in no other count)` : mark.name;
      label.append(box, text);
      name.append(color, label);
      const [here, all] = [document.createElement("td"), document.createElement("td")];
      here.className = all.className = "n";
      row.append(name, here, all);
      row.hidden = k >= this.facts.classes.length && !typed;
      box.addEventListener("change", () => { mark.shown = box.checked; this.onLook(); });
      color.addEventListener("input", () => { mark.color = color.value; this.onLook(); });
      $("classes").tBodies[0].append(row);
      return { row, box, color, here, all };
    });
  }

  bind() {
    const rule = this.facts.rule;
    for (const gate of rule.gates) $("gate").add(new Option(WORDS[gate], gate));
    $("gate").addEventListener("change", () => this.change({ gate: $("gate").value }));
    for (const name of ["tau", "gamma", "abstain", "score"]) {
      $(name).addEventListener("input", () => this.change({ [name]: Number($(name).value) }));
    }
    $("floors").addEventListener("change", () => this.change({ floors: $("floors").checked }));
    $("reset").addEventListener("click", () => this.change(this.stored));
    $("plain").addEventListener("change", () => this.recolor($("plain").checked));
    $("show-all").addEventListener("click", () => this.showAll(true));
    $("show-none").addEventListener("click", () => this.showAll(false));
    for (const id of ["rule-field", "tau-field", "gamma-field", "gate-hint"]) $(id).hidden = !rule.paths;
    $("abstain-field").hidden = !rule.paths && !this.facts.named;
    $("floors-field").hidden = !rule.thresholds;
    $("decide-title").textContent = rule.paths || this.facts.named ? "Decide anew" : "Detection";
  }

  change(part) {
    Object.assign(this.policy, part);
    this.show();
    this.onPolicy();
  }

  showAll(shown) {
    this.marks.forEach((mark, k) => { mark.shown = this.rows[k].box.checked = shown; });
    this.onLook();
  }

  // Colours that every kind of colour vision tells apart, or those of the files.
  recolor(plain) {
    this.facts.classes.forEach((c, k) => { this.marks[k].color = this.rows[k].color.value = plain ? c.plain : c.color; });
    this.onLook();
  }

  // Bring sliders and words in line with the policy.
  show() {
    const p = this.policy, rule = this.facts.rule, safe = p.gate === "safe";
    $("gate").value = p.gate;
    const values = {
      tau: p.tau ?? rule.calibrated_tau, gamma: p.gamma ?? rule.calibrated_gamma, abstain: p.abstain, score: p.score,
    };
    for (const [name, value] of Object.entries(values)) {
      $(name).value = value;
      $(`${name}-out`).textContent = value.toFixed(2);
    }
    $("tau").disabled = $("gamma").disabled = !safe;
    $("floors").checked = p.floors;
    $("gate-hint").textContent = this.hint(safe);
    const changed = Object.keys(p).some((key) => p[key] !== this.stored[key]);
    $("changed").textContent = changed ? "changed in this window only" : "";
    $("reset").disabled = !changed;
    $("command").textContent = this.command();
    $("command-field").hidden = !changed || !rule.paths;
  }

  // The command that makes the rule of the moment that of the table; the least score is of this window alone.
  command() {
    const p = this.policy, words = ["cellslide classify", this.facts.folder, "--regate --gate", p.gate];
    if (p.gate === "safe" && p.tau !== null) words.push("--tau", p.tau);
    if (p.gate === "safe" && p.gamma !== null) words.push("--gamma", p.gamma);
    if (p.abstain !== this.stored.abstain || !p.floors) words.push("--abstain", p.abstain);
    return words.join(" ");
  }

  hint(safe) {
    const rule = this.facts.rule, moved = this.policy.tau !== null || this.policy.gamma !== null;
    if (!rule.gates.includes("safe")) return "No reliability of the paths is known here, so there is no safe gate.";
    if (!safe) return "τ and γ belong to the safe gate: choose that rule.";
    if (!moved && !rule.accepts) return "As calibrated, the gate is not followed; move τ or γ to follow it.";
    return "";
  }

  // counts: by mark, or null where cells are not told apart in view.
  showHere(counts) {
    this.rows.forEach(({ here }, k) => { here.textContent = counts ? counts[k].toLocaleString("en") : "–"; });
  }

  showSlide(counts) {
    const all = [...counts.classes, counts.abstained, counts.untyped];
    this.rows.forEach((row, k) => { row.all.textContent = all[k].toLocaleString("en"); });
    // "not typed" stands there only where it says something.
    const last = this.rows.length - 1;
    if (!all[last]) this.rows[last].row.hidden = true;
  }
}
