// features.mjs - what families of models have beside a Llama: the statements of
// docs/spec.md in plain JavaScript, on top of lora.mjs.
import { at, map, mat, sum } from "./lora.mjs";

const column = (n, f) => Float64Array.from({ length: n }, (_, i) => f(i));

export function layerNorm(x, w, b, eps, dy) {
  const n = x.cols, mean = column(x.rows, (i) => sum(n, (j) => at(x, i, j)) / n);
  const variance = (i) => sum(n, (j) => (at(x, i, j) - mean[i]) ** 2) / n;
  const rstd = column(x.rows, (i) => 1 / Math.sqrt(variance(i) + eps));
  const normed = map(x, (e, i) => (e - mean[i]) * rstd[i]), g = map(dy, (e, i, j) => e * w.v[j]);
  const meanOf = (f) => column(x.rows, (i) => sum(n, (j) => f(i, j)) / n);
  const plain = meanOf((i, j) => at(g, i, j)), along = meanOf((i, j) => at(g, i, j) * at(normed, i, j));
  return {
    rstd,
    y: map(normed, (e, i, j) => e * w.v[j] + (b ? b.v[j] : 0)),
    dx: map(normed, (e, i, j) => rstd[i] * (at(g, i, j) - plain[i] - e * along[i])),
  };
}

// The complementary error function: a series near 0, a continued fraction beyond.
function erfc(x) {
  if (x < 0) return 2 - erfc(-x);
  if (x > 2) {
    let tail = 0;
    for (let k = 60; k > 0; k--) tail = k / 2 / (x + tail);
    return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + tail);
  }
  let term = x, total = x;
  for (let k = 1; k < 60; k++) {
    term *= -x * x / k;
    total += term / (2 * k + 1);
  }
  return 1 - 2 / Math.sqrt(Math.PI) * total;
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const GELU = 2 * Math.sqrt(2 / Math.PI), CUBE = 0.044715;
const gated = (x, u, du) => [x * sigmoid(u), sigmoid(u) * (1 + x * sigmoid(-u) * du)];
// act(x) and its slope
const ACTIVATIONS = {
  silu: (x) => gated(x, x, 1),
  gelu_tanh: (x) => gated(x, GELU * (x + CUBE * x ** 3), GELU * (1 + 3 * CUBE * x * x)),
  gelu_erf: (x) => {
    const below = erfc(-x / Math.SQRT2) / 2;
    return [x * below, below + x * Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI)];
  },
  relu2: (x) => [Math.max(x, 0) ** 2, 2 * Math.max(x, 0)],
};
export function activation(kind, x, up, dy) {
  const act = ACTIVATIONS[kind], other = (i, j) => (up ? at(up, i, j) : 1);
  return {
    y: map(x, (e, i, j) => act(e)[0] * other(i, j)),
    dx: map(x, (e, i, j) => at(dy, i, j) * other(i, j) * act(e)[1]),
    dup: up && map(x, (e, i, j) => at(dy, i, j) * act(e)[0]),
  };
}

export function softCap(x, multiplier, cap, dy) {
  const capped = (s) => (cap ? cap * Math.tanh(s / cap) : s);
  const y = map(x, (e) => capped(multiplier * e));
  const slope = (c) => (cap ? 1 - (c / cap) ** 2 : 1);
  return { y, dx: map(y, (e, i, j) => multiplier * at(dy, i, j) * slope(e)) };
}

export function choose(logits, k, normalize, dw) {
  const n = logits.cols, row = (i) => [...logits.v.subarray(i * n, (i + 1) * n)];
  const p = mat(logits.rows, n), weights = mat(logits.rows, k), chosen = [], dlogits = mat(p.rows, n);
  for (let i = 0; i < p.rows; i++) {
    const l = row(i), top = Math.max(...l), e = l.map((x) => Math.exp(x - top));
    const all = sum(n, (j) => e[j]), q = e.map((x) => x / all);
    p.v.set(q, i * n);
    const best = q.map((_, j) => j).sort((a, b) => q[b] - q[a] || a - b).slice(0, k);
    chosen.push(...best);
    const total = normalize ? sum(k, (t) => q[best[t]]) : 1, w = best.map((j) => q[j] / total);
    weights.v.set(w, i * k);
    const along = normalize ? sum(k, (t) => at(dw, i, t) * w[t]) : 0, dp = q.map(() => 0);
    best.forEach((j, t) => (dp[j] = (at(dw, i, t) - along) / total));
    const mean = sum(n, (j) => dp[j] * q[j]);
    dlogits.v.set(q.map((x, j) => x * (dp[j] - mean)), i * n);
  }
  return { probabilities: p, chosen, weights, dlogits };
}

// Radians per position of each pair of R numbers, and what cos and sin are multiplied by.
export function frequencies(R, p) {
  const { theta, length, trained, factor, original_max_position_embeddings: first } = p;
  const stretch = p.rope_type === "dynamic" && length > trained
    ? (factor * length / trained - (factor - 1)) ** (R / (R - 2)) : 1;
  const plain = column(R / 2, (i) => (theta * stretch) ** (-2 * i / R));
  if (p.rope_type === "linear") return { frequency: plain.map((f) => f / factor), times: 1 };
  if (p.rope_type === "llama3") {
    const { low_freq_factor: low, high_freq_factor: high } = p;
    const part = (f) => Math.min(Math.max((first * f / (2 * Math.PI) - low) / (high - low), 0), 1);
    return { frequency: plain.map((f) => f * ((1 - part(f)) / factor + part(f))), times: 1 };
  }
  if (p.rope_type === "longrope") {
    const each = length > first ? p.long_factor : p.short_factor;
    const times = Math.sqrt(1 + Math.log(factor) / Math.log(first));
    return { frequency: plain.map((f, i) => f / each[i]), times };
  }
  if (p.rope_type !== "yarn") return { frequency: plain, times: 1 };
  const { beta_fast: fast = 32, beta_slow: slow = 1, truncate = true } = p;
  const pair = (turns) => R * Math.log(first / (turns * 2 * Math.PI)) / (2 * Math.log(theta));
  const low = Math.max(truncate ? Math.floor(pair(fast)) : pair(fast), 0);
  const high = Math.min(truncate ? Math.ceil(pair(slow)) : pair(slow), R - 1);
  const ramp = (i) => Math.min(Math.max((i - low) / (high - low || 0.001), 0), 1);
  const scale = (m) => 0.1 * m * Math.log(factor) + 1;
  const own = p.mscale ? scale(p.mscale) / scale(p.mscale_all_dim) : scale(1);
  const slowed = (f, i) => f * (ramp(i) / factor + (1 - ramp(i)));
  return { frequency: plain.map(slowed), times: p.attention_factor ?? own };
}
