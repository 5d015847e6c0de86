// several.mjs - more than one adapter on a layer: the statements X of docs/spec.md, on lora.mjs.
import { add, at, loraBackward, loraForward, mat, mul, T } from "./lora.mjs";

// Those in `adapters` at once.
export function stacked(x, W, adapters, dy) {
  const zero = mat(W.rows, W.cols), parts = adapters.map((L) => ({ ...L, W: zero }));
  const out = { y: mul(x, T(W)), dx: mul(dy, W) };
  parts.forEach((L, n) => {
    const { y, h } = loraForward(x, L), { dx, dA, dB } = loraBackward(dy, x, h, L);
    Object.assign(out, { y: add(out.y, y), dx: add(out.dx, dx), [`dA.${n}`]: dA, [`dB.${n}`]: dB });
  });
  return out;
}

// Of row i that of number rows[i], or none for -1: each adapter sees its own rows.
export function mixed(x, W, adapters, rows, dy) {
  const out = { y: mul(x, T(W)), dx: mul(dy, W) };
  adapters.forEach((L, n) => {
    const own = [...rows.keys()].filter((i) => rows[i] === n);
    const take = (M) => mat(own.length, M.cols, (i, j) => at(M, own[i], j));
    const part = stacked(take(x), W, [L], take(dy));
    for (const which of ["y", "dx"]) own.forEach((i, row) =>
      part[which].v.subarray(row * out[which].cols, (row + 1) * out[which].cols)
        .forEach((e, j) => (out[which].v[i * out[which].cols + j] = e)));
    Object.assign(out, { [`dA.${n}`]: part["dA.0"], [`dB.${n}`]: part["dB.0"] });
  });
  return out;
}
