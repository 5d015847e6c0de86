// llama.mjs - a Llama with LoRA on any of its projections, forward, backward and training: the
// statements A and O of docs/spec.md in plain JavaScript, on top of lora.mjs.
import { adamw, add, at, loraBackward, loraForward, map, mat, mul, sum, T } from "./lora.mjs";

const column = (n, f) => Float64Array.from({ length: n }, (_, i) => f(i));

export function normForward(x, w, eps) {
  const squares = (i) => sum(x.cols, (j) => at(x, i, j) ** 2);
  const rstd = column(x.rows, (i) => 1 / Math.sqrt(squares(i) / x.cols + eps));
  return { rstd, y: map(x, (e, i, j) => e * rstd[i] * w.v[j]) };
}
export function normBackward(dy, x, w, rstd, more) {
  const dot = (i) => sum(x.cols, (j) => at(dy, i, j) * w.v[j] * at(x, i, j));
  const mean = column(x.rows, (i) => dot(i) / x.cols);
  const dx = (e, i, j) => rstd[i] * (at(dy, i, j) * w.v[j] - e * rstd[i] ** 2 * mean[i]);
  return add(map(x, dx), more);
}

export const angle = (position, pair, D, theta) => position * theta ** ((-2 * pair) / D);
export function rope(x, position, p, inverse = false) { // of each head the first R numbers
  const { head_dim: D, rope_theta: theta, layout = "half", rotary_dim: R = D } = p;
  const half = layout === "half", times = p.attention_factor ?? 1;
  return map(x, (e, i, j) => {
    const c = j % D, pair = half ? c % (R / 2) : c >> 1;
    if (c >= R) return e;
    const first = half ? c < R / 2 : c % 2 === 0;
    const other = at(x, i, j + (first ? 1 : -1) * (half ? R / 2 : 1));
    const turn = angle(position[i], pair, R, theta);
    const sine = Math.sin(turn) * (first === inverse ? 1 : -1);
    return times * (e * Math.cos(turn) + sine * other);
  });
}

export function attention(q, k, v, p, dO) { // with dO also
  const { heads, kv_heads, head_dim: D, lengths, window = 0, softcap: cap } = p;
  const scale = p.attention_scale ?? 1 / Math.sqrt(D); // and the cap
  const zero = (M) => mat(M.rows, M.cols), o = zero(q), lse = mat(q.rows, heads);
  const dq = zero(q), dk = zero(k), dv = zero(v);
  const dot = (X, i, c, Y, j, d) => sum(D, (e) => at(X, i, c + e) * at(Y, j, d + e));
  const query = (t, start, h) => {
    const a = h * D, b = Math.floor(h / (heads / kv_heads)) * D;
    const low = window ? Math.max(start, t + 1 - window) : start, n = t + 1 - low;
    const capped = (s) => (cap ? cap * Math.tanh(s / cap) : s);
    const S = column(n, (j) => capped(scale * dot(q, t, a, k, low + j, b))), top = Math.max(...S);
    const L = (lse.v[t * heads + h] = top + Math.log(sum(n, (j) => Math.exp(S[j] - top))));
    const P = S.map((s) => Math.exp(s - L));
    for (let e = 0; e < D; e++)
      o.v[t * q.cols + a + e] = sum(n, (j) => P[j] * at(v, low + j, b + e));
    for (let j = 0; dO && j < n; j++) {
      const dP = dot(dO, t, a, v, low + j, b) - dot(dO, t, a, o, t, a);
      const dS = scale * P[j] * dP * (cap ? 1 - (S[j] / cap) ** 2 : 1);
      for (let e = 0; e < D; e++) {
        dq.v[t * q.cols + a + e] += dS * at(k, low + j, b + e);
        dk.v[(low + j) * k.cols + b + e] += dS * at(q, t, a + e);
        dv.v[(low + j) * k.cols + b + e] += P[j] * at(dO, t, a + e);
      }
    }
  };
  let start = 0;
  for (const n of lengths) {
    for (let t = start; t < start + n; t++) for (let h = 0; h < heads; h++) query(t, start, h);
    start += n;
  }
  return { o, lse, dq, dk, dv };
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
export const swigluForward = (gate, up) => map(gate, (g, i, j) => g * sigmoid(g) * at(up, i, j));
export function swigluBackward(dy, gate, up) {
  const slope = (g) => sigmoid(g) * (1 + g * sigmoid(-g));
  return {
    dgate: map(gate, (g, i, j) => at(dy, i, j) * at(up, i, j) * slope(g)),
    dup: map(gate, (g, i, j) => at(dy, i, j) * g * sigmoid(g)),
  };
}

export function crossEntropy(logits, labels, weight) { // [O-2]
  const n = logits.cols, lse = column(logits.rows, (i) => {
    const top = Math.max(...logits.v.subarray(i * n, (i + 1) * n));
    return top + Math.log(sum(n, (j) => Math.exp(at(logits, i, j) - top)));
  });
  const nll = column(logits.rows, (i) => (labels[i] < 0 ? 0 : lse[i] - at(logits, i, labels[i])));
  const dlogits = map(logits, (e, i, j) =>
    labels[i] < 0 ? 0 : weight[i] * (Math.exp(e - lse[i]) - (j === labels[i] ? 1 : 0)));
  return { nll, lse, dlogits };
}

// The loss of a step in parts [O-1]: parts are numbers of rows.
export function microBatches(logits, labels, parts) {
  const counted = labels.filter((t) => t >= 0).length, dlogits = [];
  let loss = 0, start = 0;
  for (const rows of parts) {
    const part = mat(rows, logits.cols, (i, j) => at(logits, start + i, j));
    const own = labels.slice(start, start + rows);
    const out = crossEntropy(part, own, own.map(() => 1 / counted));
    loss += sum(rows, (i) => out.nll[i]) / counted;
    dlogits.push(...out.dlogits.v);
    start += rows;
  }
  return { loss: [loss], dlogits };
}

// One block. L: projection -> {W, A, B, s}; drop(projection) -> its dropout, or undefined.
// Gives y, every intermediate by name, and backward(dy), which adds the gradients.
export function block(x, L, norm1, norm2, p, drop = () => undefined) {
  const v = {}, head = "self_attn.", ffn = "mlp.";
  const position = p.lengths.flatMap((n) => [...Array(n).keys()]);
  const forward = (name, x, residual) => {
    const { y, h } = loraForward(x, L[name], drop(name), residual);
    v[`${name}.h`] = h;
    return y;
  };
  const backward = (name, dy, x, more) => {
    const { dx, dA, dB } = loraBackward(dy, x, v[`${name}.h`], L[name], drop(name), more);
    Object.assign(v, { [`${name}.dA`]: dA, [`${name}.dB`]: dB });
    return dx;
  };
  ({ y: v.normed1, rstd: v.rstd1 } = normForward(x, norm1, p.eps));
  v.q = rope(forward(`${head}q_proj`, v.normed1), position, p);
  v.k = rope(forward(`${head}k_proj`, v.normed1), position, p);
  v.v = forward(`${head}v_proj`, v.normed1);
  Object.assign(v, attention(v.q, v.k, v.v, p));
  v.mid = forward(`${head}o_proj`, v.o, x);
  ({ y: v.normed2, rstd: v.rstd2 } = normForward(v.mid, norm2, p.eps));
  v.gate = forward(`${ffn}gate_proj`, v.normed2);
  v.up = forward(`${ffn}up_proj`, v.normed2);
  v.act = swigluForward(v.gate, v.up);
  v.y = forward(`${ffn}down_proj`, v.act, v.mid);
  v.backward = (dy) => {
    v.dact = backward(`${ffn}down_proj`, dy, v.act);
    Object.assign(v, swigluBackward(v.dact, v.gate, v.up));
    const dn2 = backward(`${ffn}up_proj`, v.dup, v.normed2);
    v.dnormed2 = backward(`${ffn}gate_proj`, v.dgate, v.normed2, dn2);
    v.dmid = normBackward(v.dnormed2, v.mid, norm2, v.rstd2, dy);
    v.do = backward(`${head}o_proj`, v.dmid, v.o);
    const { dq, dk, dv } = Object.assign(v, attention(v.q, v.k, v.v, p, v.do));
    const dn = backward(`${head}v_proj`, dv, v.normed1);
    const dn1 = backward(`${head}k_proj`, rope(dk, position, p, true), v.normed1, dn);
    v.dnormed1 = backward(`${head}q_proj`, rope(dq, position, p, true), v.normed1, dn1);
    v.dx = normBackward(v.dnormed1, x, norm1, v.rstd1, v.dmid);
  };
  return v;
}

// Trains the adapters in `blocks` (one map of projections a layer) in place and gives the loss of
// each step. tensor(name): the model's tensors; p: the parameters of the case "training".
export function train(tensor, blocks, ids, labels, rates, p) {
  const c = p.config, moments = new Map(), embed = tensor("model.embed_tokens.weight");
  const shape = { heads: c.num_attention_heads, kv_heads: c.num_key_value_heads };
  Object.assign(shape, { head_dim: c.head_dim, rope_theta: c.rope_theta, lengths: p.lengths });
  shape.eps = c.rms_norm_eps;
  return rates.map((lr, index) => {
    const step = index + 1, id = ids[index], label = labels[index];
    let x = mat(id.length, embed.cols, (i, j) => at(embed, id[i], j));
    const caches = blocks.map((L, n) => {
      const norm = (name) => tensor(`model.layers.${n}.${name}.weight`);
      const drop = (name) => (
        { p: p.dropout, seed: p.seed, path: `model.layers.${n}.${name}`, step });
      const v = block(x, L, norm("input_layernorm"), norm("post_attention_layernorm"), shape, drop);
      x = v.y;
      return v;
    });
    const { y, rstd } = normForward(x, tensor("model.norm.weight"), c.rms_norm_eps);
    const counted = label.filter((t) => t >= 0).length;
    const weight = label.map(() => 1 / counted); // [O-1]
    const { nll, dlogits } = crossEntropy(mul(y, T(embed)), label, weight); // a tied head
    let dx = normBackward(mul(dlogits, embed), x, tensor("model.norm.weight"), rstd);
    for (const [n, v] of [...caches.entries()].reverse()) {
      v.backward(dx);
      dx = v.dx;
      for (const [name, L] of Object.entries(blocks[n])) for (const which of ["A", "B"]) {
        const param = L[which].v, key = `${n}.${name}.${which}`;
        if (!moments.has(key)) moments.set(key, [param.map(() => 0), param.map(() => 0)]);
        const grad = v[`${name}.d${which}`].v, settings = { ...p, lr, step };
        adamw(param, grad, ...moments.get(key), settings);
      }
    }
    return sum(nll.length, (i) => nll[i]) / counted;
  });
}
