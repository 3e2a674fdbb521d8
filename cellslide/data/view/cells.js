// The cells of the part of the slide that is seen: fetched with some of what lies around, decided in the page.

import { asStored, decide, marks, marksOfNamed, marksOfStored } from "./decide.js";

const TYPES = { float32: Float32Array, int32: Int32Array, int16: Int16Array, uint32: Uint32Array };
// So much is fetched beyond each edge of what is seen, in parts of its size.
const MARGIN = 0.25;

// Read what view/arrays.py has packed.
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, [type, n, offset]] of Object.entries(head.arrays)) {
    arrays[name] = new TYPES[type](buffer, 4 + length + offset, n);
  }
  return { ...head.facts, ...arrays };
}

export function queryOf(policy) {
  const query = new URLSearchParams({ gate: policy.gate, abstain: policy.abstain, score: policy.score });
  if (policy.tau !== null) query.set("tau", policy.tau);
  if (policy.gamma !== null) query.set("gamma", policy.gamma);
  if (!policy.floors) query.set("floors", "0");
  return query;
}

export class Cells {
  // facts: what facts.json says; policy: a function that gives the policy of the moment; onChange: called when there is
  // something new to draw; onTrouble: called with words.
  constructor(facts, policy, onChange, onTrouble) {
    Object.assign(this, { facts, policy, onChange, onTrouble });
    this.data = null;
    this.marks = null;
    this.decision = null;
    this.asked = null;
  }

  // See to it that the box [x0, y0, x1, y1] is there for so many screen pixels a slide pixel.
  async see(box, scale, force = false) {
    if (!force && this.asked && covers(this.asked, box, scale)) return;
    const mx = (box[2] - box[0]) * MARGIN, my = (box[3] - box[1]) * MARGIN;
    const wide = [box[0] - mx, box[1] - my, box[2] + mx, box[3] + my];
    this.control?.abort();
    const control = (this.control = new AbortController());
    this.asked = { box: wide, scale };
    const query = queryOf(this.policy());
    ["x0", "y0", "x1", "y1"].forEach((name, i) => query.set(name, wide[i]));
    query.set("scale", scale);
    try {
      const answer = await fetch(`cells?${query}`, { signal: control.signal });
      if (!answer.ok) throw new Error(await answer.text());
      this.data = unpack(await answer.arrayBuffer());
      this.redecide();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.asked = null;
      this.onTrouble(`The nuclei could not be fetched: ${error.message}`);
    }
  }

  // Apply the policy of the moment to the cells at hand; no request.
  redecide() {
    const d = this.data, k = this.facts.classes.length;
    if (!d) return;
    if (d.form === "density") {
      this.marks = this.decision = null;
    } else {
      const { rule } = this.facts, policy = this.policy();
      this.decision = rule.paths ? decide(rule, policy, d.prob_local, d.prob_global, d.gate, d.n, k) : null;
      if (asStored(rule, policy)) this.marks = marksOfStored(d.class, d.n, k);
      else if (this.decision) this.marks = marks(this.decision, d.n, k);
      else this.marks = marksOfNamed(rule, policy, d.class_top, d.class_prob, d.n, k);
    }
    this.onChange();
  }

  // Count what is seen in a box by mark; null where there are counts on a grid only.
  count(box) {
    const d = this.data;
    if (!this.marks) return null;
    const counts = new Array(this.facts.classes.length + 2).fill(0), scored = this.scored();
    for (let i = 0; i < d.n; i++) {
      if (scored(i) && this.inside(i, box)) counts[this.marks[i]]++;
    }
    return counts;
  }

  // A function that tells whether a cell's score lets it be shown; one whose score is not known always is.
  scored() {
    const { score } = this.data, least = Math.fround(this.policy().score);
    return (i) => !(score[i] < least);
  }

  inside(i, [x0, y0, x1, y1]) {
    const [x, y] = this.place(i);
    return x >= x0 && x < x1 && y >= y0 && y < y1;
  }

  // Where a cell is, in pixels of level 0.
  place(i) {
    const d = this.data;
    return [d.xy[2 * i] + d.box[0], d.xy[2 * i + 1] + d.box[1]];
  }

  // The cell at a point, at most `reach` slide pixels away; -1 where there is none. shown: whether a mark is.
  at(x, y, reach, shown) {
    if (!this.marks) return -1;
    const d = this.data, scored = this.scored();
    const px = x - d.box[0], py = y - d.box[1];
    let best = -1, least = reach * reach;
    for (let i = 0; i < d.n; i++) {
      const dx = d.xy[2 * i] - px, dy = d.xy[2 * i + 1] - py, far = dx * dx + dy * dy;
      if (far > least || !shown[this.marks[i]] || !scored(i)) continue;
      [best, least] = [i, far];
    }
    return best;
  }
}

// Whether what was asked for serves a view: it holds it, and is neither much finer nor much coarser.
function covers(asked, [x0, y0, x1, y1], scale) {
  const [a0, b0, a1, b1] = asked.box, zoom = scale / asked.scale;
  return a0 <= x0 && b0 <= y0 && a1 >= x1 && b1 >= y1 && zoom > 0.75 && zoom < 1.34;
}
