// dora.mjs - DoRA of one layer [W]: lengths, forward, backward, merged.
import { add, at, mat, mul, map, sum, T, times } from "./lora.mjs";

export function dora({ x, W, A, B, dy }, m, bias, s) {
  const V = add(W, times(s, mul(B, A)));
  const n = m.map((_, j) => Math.sqrt(sum(V.cols, (i) => at(V, j, i) ** 2))); // [W-6]
  const f = m.map((length, j) => (n[j] === 0 && length === 0 ? 1 : length / n[j])); // [W-4]
  const v = mul(x, T(V)), dv = map(dy, (e, i, j) => e * f[j]);
  const dm = m.map((_, j) => // [W-3]
    n[j] === 0 ? 0 : sum(v.rows, (i) => at(dy, i, j) * at(v, i, j)) / n[j]);
  return {
    n, dm,
    y: map(v, (e, i, j) => e * f[j] + (bias ? bias[j] : 0)), // [W-1]
    dx: mul(dv, V),
    dA: times(s, mul(T(mul(dv, B)), x)),
    dB: times(s, mul(T(dv), mul(x, T(A)))),
    merged: mat(V.rows, V.cols, (i, j) => f[i] * at(V, i, j)), // [W-5]
  };
}
