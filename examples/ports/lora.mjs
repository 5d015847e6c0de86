// lora.mjs - LoRA by the letter of docs/spec.md in plain JavaScript, without dependencies.
//
// Numbers in brackets are statements of the specification. Arithmetic is float64; where bits must
// agree it is rounded as the specification says. llama.mjs has a transformer around it, check.mjs
// compares both with the golden vectors.
import { createHash } from "node:crypto";

// ---- matrices, row-major ------------------------------------------------------------------------
export const mat = (rows, cols, f = () => 0) => {
  const v = new Float64Array(rows * cols);
  for (let i = 0; i < rows; i++) for (let j = 0; j < cols; j++) v[i * cols + j] = f(i, j);
  return { rows, cols, v };
};
export const at = (M, i, j) => M.v[i * M.cols + j];
export const map = (M, f) => mat(M.rows, M.cols, (i, j) => f(at(M, i, j), i, j));
export const sum = (n, f) => {
  let s = 0;
  for (let i = 0; i < n; i++) s += f(i);
  return s;
};
export const T = (M) => mat(M.cols, M.rows, (i, j) => at(M, j, i));
export const mul = (X, Y) =>
  mat(X.rows, Y.cols, (i, j) => sum(X.cols, (t) => at(X, i, t) * at(Y, t, j)));
export const add = (X, Y) => (Y ? map(X, (x, i, j) => x + at(Y, i, j)) : X);
export const times = (s, X) => map(X, (x) => s * x);

// ---- random streams [R] -------------------------------------------------------------------------
const LOW = 0xffffffffn;
function* philox(seed, stream, first) {
  for (let e = first; ; ) {
    const block = e >> 2n;
    let c = [block & LOW, block >> 32n, stream & LOW, stream >> 32n], k = [seed & LOW, seed >> 32n];
    for (let round = 0; round < 10; round++) {
      const a = c[0] * 0xd2511f53n, b = c[2] * 0xcd9e8d57n;
      c = [(b >> 32n) ^ c[1] ^ k[0], b & LOW, (a >> 32n) ^ c[3] ^ k[1], a & LOW];
      k = [(k[0] + 0x9e3779b9n) & LOW, (k[1] + 0xbb67ae85n) & LOW];
    }
    do yield Number(c[e & 3n]); while ((++e & 3n) !== 0n);
  }
}
export function words(n, seed, stream, first) {
  const source = philox(seed, stream, first);
  return Uint32Array.from({ length: n }, () => source.next().value);
}
export const stream = (name) =>
  createHash("sha256").update(name).digest().readBigUInt64LE(0);
export function units(n, seed, id) {
  const w = words(2 * n, seed, id, 0n), high = (i) => w[i] >>> 6;
  return Float64Array.from(
    { length: n }, (_, e) => (high(2 * e) * 2 ** 26 + high(2 * e + 1) + 0.5) * 2 ** -52);
}
const view = new DataView(new ArrayBuffer(8));
function exponent(x) { // e, where |x| = f 2^e with f in [1/2, 1)
  view.setFloat64(0, x);
  return ((view.getUint32(0) >>> 20) & 0x7ff) - 1022;
}
function log(x) { // random.md, section 4
  let e = exponent(x), f = x / 2 ** e;
  if (f < 0.7071067811865476) (f *= 2), e--;
  const s = (f - 1) / (f + 1), z = s * s;
  let tail = 1 / 23;
  for (let odd = 21; odd > 1; odd -= 2) tail = tail * z + 1 / odd;
  return e * 0.6931471803691238 + (e * 1.9082149292705877e-10 + (s + s * (tail * z)) * 2);
}
const AS241 = [ // numerator and denominator, constant term first
  [[3.3871328727963665, 133.14166789178438, 1971.5909503065513, 13731.69376550946,
      45921.95393154987, 67265.7709270087, 33430.57558358813, 2509.0809287301227],
    [1, 42.31333070160091, 687.1870074920579, 5394.196021424751, 21213.794301586597,
      39307.89580009271, 28729.085735721943, 5226.495278852854]],
  [[1.4234371107496835, 4.630337846156546, 5.769497221460691, 3.6478483247632045,
      1.2704582524523684, 0.2417807251774506, 0.022723844989269184, 0.0007745450142783414],
    [1, 2.053191626637759, 1.6763848301838038, 0.6897673349851, 0.14810397642748008,
      0.015198666563616457, 0.0005475938084995345, 1.0507500716444169e-09]],
  [[6.657904643501103, 5.463784911164114, 1.7848265399172913, 0.29656057182850487,
      0.026532189526576124, 0.0012426609473880784, 2.7115555687434876e-05, 2.0103343992922881e-07],
    [1, 0.599832206555888, 0.1369298809227358, 0.014875361290850615, 0.0007868691311456133,
      1.8463183175100548e-05, 1.421511758316446e-07, 2.0442631033899397e-15]],
];
const horner = (p, t) => p.reduceRight((s, c) => s * t + c);
const ratio = ([p, q], t) => horner(p, t) / horner(q, t);
export function quantile(u) {
  const q = u - 0.5;
  if (Math.abs(q) <= 0.425) return q * ratio(AS241[0], 0.180625 - q * q);
  const r = Math.sqrt(-log(q < 0 ? u : 1 - u));
  const z = r <= 5 ? ratio(AS241[1], r - 1.6) : ratio(AS241[2], r - 5);
  return q < 0 ? -z : z;
}

// ---- dropout [D], LoRA [F, B] -------------------------------------------------------------------
export function drop(x, d) {
  if (!d) return x;
  const p = Math.fround(d.p), factor = Math.fround(1 / Math.fround(1 - p));
  const id = stream(`dropout/${d.path}/${d.step}`), limit = Math.floor(p * 2 ** 32); // [D-7]
  const w = words(x.v.length, BigInt(d.seed), id, BigInt((d.row0 ?? 0) * x.cols));
  return map(x, (e, i, j) => (w[i * x.cols + j] >= limit ? Math.fround(e * factor) : 0));
}
export function loraForward(x, L, d, residual) {
  const h = mul(drop(x, d), T(L.A));
  let y = mul(x, T(L.W));
  if (L.bias) y = map(y, (e, i, j) => e + L.bias.v[j]);
  if (L.B.v.some((b) => b !== 0)) y = add(y, times(L.s, mul(h, T(L.B)))); // [F-2]
  if (L.biasB) y = map(y, (e, i, j) => e + L.s * L.biasB.v[j]); // [F-4]
  return { y: add(y, residual), h };
}
export function loraBackward(dy, x, h, L, d, more) {
  const g = mul(dy, L.B), dB = times(L.s, mul(T(dy), h)), dA = times(L.s, mul(T(g), drop(x, d)));
  let dx = mul(dy, L.W);
  if (L.B.v.some((b) => b !== 0)) dx = add(dx, drop(times(L.s, mul(g, L.A)), d)); // [B-4]
  const dbias = mat(1, dy.cols, (_, j) => L.s * sum(dy.rows, (i) => at(dy, i, j))); // [B-5]
  return { g, dA, dB, dbias_B: dbias, dx: add(dx, more) };
}

// ---- merge [M]: formats are [digits of the significand, exponent of the smallest number, bits] --
export const FORMATS = { f32: [24, -149, 32], f16: [11, -24, 16], bf16: [8, -133, 16] };
export function decode([digits, smallest, width], bits) {
  const one = 2 ** (digits - 1), e = Math.floor((bits % 2 ** (width - 1)) / one), f = bits % one;
  let size = e ? (one + f) * 2 ** (e - 1 + smallest) : f * 2 ** smallest;
  if (e === 2 ** (width - digits) - 1) size = f ? NaN : Infinity;
  return bits >= 2 ** (width - 1) ? -size : size;
}
function encode([digits, smallest, width], t) { // not NaN; to nearest even, in one rounding
  if (Math.abs(t) === Infinity)
    return 2 ** (width - 1) - 2 ** (digits - 1) + (t < 0 ? 2 ** (width - 1) : 0);
  const one = 2 ** (digits - 1), last = Math.max(t ? exponent(t) - digits : smallest, smallest);
  const scaled = Math.abs(t) * 2 ** -last;
  let n = Math.floor(scaled);
  if (scaled - n > 0.5 || (scaled - n === 0.5 && n % 2)) n++;
  const sign = t < 0 || Object.is(t, -0) ? 2 ** (width - 1) : 0;
  return sign + Math.min((last - smallest) * one + n, 2 ** (width - 1) - one);
}
export function merge(format, W, A, B, scale) {
  const s = Math.fround(scale), k = A.cols, out = { merged: [], position: [], bits: [] };
  W.forEach((w, e) => {
    const t = s * sum(A.rows, (i) => at(B, Math.floor(e / k), i) * at(A, i, e % k)); // [M-7]
    const merged = encode(format, decode(format, w) + t);
    out.merged.push(merged);
    if (encode(format, decode(format, merged) - t) === w) return;
    out.position.push(e); // [M-8]
    out.bits.push(w);
  });
  return out;
}

export function unmerge(format, merged, A, B, scale, position, bits) {
  const s = Math.fround(scale), k = A.cols;
  const W = merged.map((w, e) => {
    const t = s * sum(A.rows, (i) => at(B, Math.floor(e / k), i) * at(A, i, e % k));
    return encode(format, decode(format, w) - t);
  });
  position.forEach((e, i) => (W[e] = bits[i]));
  return W;
}

// ---- initial values [I], optimizer [O] ----------------------------------------------------------
function random(rows, cols, name, seed, value) {
  const u = units(rows * cols, seed, stream(name));
  return mat(rows, cols, (i, j) => Math.fround(value(u[i * cols + j])));
}
export function initial(kind, method, d, k, r, path, seed) { // A [r,k], B [d,r], B's bias [d]
  const normal = (s) => (u) => quantile(u) * s, uniform = (b) => (u) => (u * 2 - 1) * b;
  const all = method === "false", names = [`init/${path}`, `init/${path}/B`, `init/${path}/bias`];
  if (kind === "embedding") // [I-5]
    return { A: all ? random(r, k, names[0], seed, normal(1)) : mat(r, k),
      B: random(d, r, names[1], seed, normal(1)) };
  const down = method === "gaussian" ? normal(1 / r) : uniform(1 / Math.sqrt(k)); // [I-3, I-2]
  const bound = uniform(1 / Math.sqrt(r)); // [I-4]
  const up = (cols, name) => (all ? random(d, cols, name, seed, bound) : mat(d, cols));
  return { A: random(r, k, names[0], seed, down), B: up(r, names[1]), bias: up(1, names[2]) };
}
export function clip(grads, limit) { // [O-4]
  const squares = (g) => sum(g.v.length, (e) => g.v[e] ** 2);
  const norm = Math.sqrt(sum(grads.length, (i) => squares(grads[i])));
  return { norm: [norm], clipped: grads.map((g) => times(norm > limit ? limit / norm : 1, g)) };
}
export function adamw(p, g, m, v, o) { // one step, in place on p, m and v [O-3]
  const { lr, step, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0, grad_scale = 1 } = o;
  for (let i = 0; i < p.length; i++) {
    const d = g[i] * grad_scale;
    m[i] = beta1 * m[i] + (1 - beta1) * d;
    v[i] = beta2 * v[i] + (1 - beta2) * d * d;
    const update = m[i] / (1 - beta1 ** step) / (Math.sqrt(v[i] / (1 - beta2 ** step)) + eps);
    p[i] = p[i] * (1 - lr * weight_decay) - lr * update;
  }
}
