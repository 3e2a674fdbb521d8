// From the probabilities of two paths to a decision: the same rule as cellslide/classify/decision.py, number for number.
// Probabilities are float32 as stored; every step that is float32 there is rounded here by Math.fround.

export const PATHS = ["mix", "local", "global"];
const MIX = 0, LOCAL = 1, GLOBAL = 2;
const EPSILON = Math.fround(1e-6);
const TINY = 1.1754943508222875e-38; // The least normal float32.
const f = Math.fround;

// Sum in the order of numpy for one short row, so that the last bit is the same.
function sum(v, k) {
  if (k < 8) {
    let s = 0;
    for (let j = 0; j < k; j++) s += v[j];
    return s;
  }
  const r = v.slice(0, 8);
  let j = 8;
  for (; j + 8 <= k; j += 8) for (let i = 0; i < 8; i++) r[i] += v[j + i];
  let s = r[0] + r[1] + (r[2] + r[3]) + (r[4] + r[5] + (r[6] + r[7]));
  for (; j < k; j++) s += v[j];
  return s;
}

// Softmax of log p / T, in place; `work` holds k doubles.
function temper(p, k, temperature, work) {
  if (temperature === 1) return;
  let top = -Infinity;
  for (let j = 0; j < k; j++) {
    work[j] = Math.log(Math.max(p[j], TINY)) / temperature;
    if (work[j] > top) top = work[j];
  }
  for (let j = 0; j < k; j++) work[j] = Math.exp(work[j] - top);
  const total = sum(work, k);
  for (let j = 0; j < k; j++) p[j] = f(work[j] / total);
}

// Calibrated probabilities for slides whose classes are `ratio` times as frequent, in place; `work` holds k doubles.
function withPrior(p, k, ratio, work) {
  for (let j = 0; j < k; j++) work[j] = p[j] * ratio[j];
  const total = sum(work, k);
  for (let j = 0; j < k; j++) p[j] = f(work[j] / total);
}

function argmax(values, start, k) {
  let best = 0;
  for (let j = 1; j < k; j++) if (values[start + j] > values[start + best]) best = j;
  return best;
}

function anyNaN(values, start, k) {
  for (let j = 0; j < k; j++) if (Number.isNaN(values[start + j])) return true;
  return false;
}

// The path of one cell by the safe gate; its global path ran.
function safePath(rule, policy, local, global, g, start, k) {
  const a = argmax(local, start, k), b = argmax(global, start, k);
  const pl = local[start + a], pg = global[start + b];
  const weighedLocal = f(pl * f(f(rule.reliability_local[a]) + EPSILON));
  const weighedGlobal = f(pg * f(f(rule.reliability_global[b]) + EPSILON));
  const path = weighedGlobal > weighedLocal ? GLOBAL : LOCAL;
  const given = policy.tau !== null || policy.gamma !== null;
  if (!given && !rule.accepts) return path;
  const tau = policy.tau === null ? rule.calibrated_tau : policy.tau;
  const gamma = policy.gamma === null ? rule.calibrated_gamma : policy.gamma;
  const rho = f(pg - pl);
  if (g > f(tau) && rho > f(gamma)) return GLOBAL;
  if (g < f(1 - tau) && rho < f(-gamma)) return LOCAL;
  return path;
}

// The probability that each of k classes needs.
export function floors(rule, policy, k) {
  const out = new Float32Array(k);
  const each = policy.floors && rule.thresholds ? rule.thresholds : null;
  for (let j = 0; j < k; j++) out[j] = Math.max(each ? each[j] : 0, policy.abstain);
  return out;
}

// Decide n cells of k classes; local, global are n x k, gate n. Rows whose local vector is NaN get class -1.
//   rule    what the calibration holds (temperatures, reliability, thresholds)
//   policy  {gate, tau, gamma, abstain, floors}; tau and gamma null: as calibrated
// Returns the class, its probability, the path (index into PATHS), whether it abstains, and all probabilities n x k.
export function decide(rule, policy, local, global, gate, n, k) {
  const out = {
    index: new Int16Array(n).fill(-1), prob: new Float32Array(n).fill(NaN), path: new Int8Array(n).fill(-1),
    abstained: new Uint8Array(n), all: new Float32Array(n * k).fill(NaN),
  };
  const least = floors(rule, policy, k), row = new Float32Array(k), work = new Float64Array(k);
  for (let i = 0; i < n; i++) {
    const start = i * k;
    if (anyNaN(local, start, k)) continue;
    const skipped = Number.isNaN(gate[i]) || anyNaN(global, start, k);
    let path = LOCAL;
    if (!skipped && policy.gate === "safe") path = safePath(rule, policy, local, global, gate[i], start, k);
    else if (!skipped) path = PATHS.indexOf(policy.gate);
    const rest = f(1 - gate[i]);
    for (let j = 0; j < k; j++) {
      const l = local[start + j], g = global[start + j];
      row[j] = path === LOCAL ? l : path === GLOBAL ? g : f(f(rest * l) + f(gate[i] * g));
    }
    temper(row, k, rule.temperatures[path], work);
    if (rule.prior_ratio) withPrior(row, k, rule.prior_ratio, work);
    const top = argmax(row, 0, k);
    out.all.set(row, start);
    out.index[i] = top;
    out.prob[i] = row[top];
    out.path[i] = path;
    out.abstained[i] = row[top] < least[top] ? 1 : 0;
  }
  return out;
}

// Whether a policy is the rule in force, whose decisions the table holds.
export function asStored(rule, policy) {
  return ["gate", "tau", "gamma", "abstain"].every((name) => policy[name] === rule[name])
    && policy.floors === Boolean(rule.thresholds);
}

// What cells are shown as by the decisions of the table: codes are -1 for none, and k where a cell abstained.
export function marksOfStored(codes, n, k) {
  const out = new Int16Array(n);
  for (let i = 0; i < n; i++) out[i] = codes[i] < 0 ? k + 1 : codes[i];
  return out;
}

// What each cell is shown as: its class, k where it abstains, k + 1 where it has none.
export function marks(decision, n, k) {
  const out = new Int16Array(n);
  for (let i = 0; i < n; i++) out[i] = decision.index[i] < 0 ? k + 1 : decision.abstained[i] ? k : decision.index[i];
  return out;
}

// The same for cells that came with a class and its probability (NaN: not known).
export function marksOfNamed(rule, policy, codes, prob, n, k) {
  const out = new Int16Array(n), least = floors(rule, policy, k);
  for (let i = 0; i < n; i++) out[i] = codes[i] < 0 ? k + 1 : prob[i] < least[codes[i]] ? k : codes[i];
  return out;
}
