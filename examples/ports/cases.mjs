// cases.mjs - what each operation of the golden vectors means, in terms of lora.mjs and llama.mjs.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { dora } from "./dora.mjs";
import * as features from "./features.mjs";
import * as lora from "./lora.mjs";
import * as llama from "./llama.mjs";
import * as several from "./several.mjs";

function adapterFile(folder, path) { // [K]: A, B and the scale of one module of a PEFT directory
  const config = JSON.parse(readFileSync(join(folder, "adapter_config.json"), "utf8"));
  const data = readFileSync(join(folder, "adapter_model.safetensors"));
  const start = 8 + Number(data.readBigUInt64LE(0)), header = JSON.parse(data.subarray(8, start));
  const tensor = (key) => {
    const { dtype, shape, data_offsets: [from] } = header[`base_model.model.${path}.${key}`];
    if (dtype !== "F32") throw new Error(`${key} is ${dtype}`);
    const value = (i, j) => data.readFloatLE(start + from + 4 * (i * shape[1] + j));
    return lora.mat(shape[0], shape[1], value);
  };
  const A = tensor("lora_A.weight");
  return { A, B: tensor("lora_B.weight"), s: scaling({ ...config, alpha: config.lora_alpha }, A) };
}
const scaling = (p, A) => p.alpha / (p.use_rslora ? Math.sqrt(A.rows) : A.rows); // [S-1]
const layer = (m, s) => ({ W: m.W, bias: m.bias, A: m.A, B: m.B, biasB: m.bias_B, s });
const adapters = (m, p) => p.scales.map((s, n) => ({ A: m[`A.${n}`], B: m[`B.${n}`], s }));

// op -> computes a case: m its input matrices, p its parameters, v(name) an input as plain numbers,
// shape(name) that of an output, folder that of its files
export const OPS = {
  lora(m, p) {
    const L = layer(m, scaling(p, m.A)), d = p.p && p, { y, h } = lora.loraForward(m.x, L, d);
    return { y, h, ...lora.loraBackward(m.dy, m.x, h, L, d) };
  },
  embedding(m, p, v) { // tokens as one-hot rows; W is [vocab, hidden]
    const ids = v("ids"), x = lora.mat(ids.length, m.W.rows, (i, j) => Number(ids[i] === j));
    const L = { W: lora.T(m.W), A: m.A, B: m.B, s: p.scale }, { y, h } = lora.loraForward(x, L);
    return { y, ...lora.loraBackward(m.dy, x, h, L) };
  },
  dora: (m, p, v) => dora(m, [...v("magnitude")], m.bias && [...v("bias")], p.scale),
  merge(m, p, v) {
    const format = lora.FORMATS[p.dtype], W = v("W");
    const out = lora.merge(format, W, m.A, m.B, p.scale);
    const back = lora.unmerge(format, out.merged, m.A, m.B, p.scale, out.position, out.bits);
    if (back.some((bits, i) => bits !== W[i])) throw new Error("unmerging is not exact");
    return out;
  },
  unmerge: (m, p, v) => ({ W: lora.unmerge(
    lora.FORMATS[p.dtype], v("merged"), m.A, m.B, p.scale, v("position"), v("bits")) }),
  lora16(m, p) { // 16-bit patterns; computed in float64
    const number = (bits) => lora.decode(lora.FORMATS[p.dtype], bits);
    const wide = Object.fromEntries(Object.entries(m).map(([n, M]) => [n, lora.map(M, number)]));
    return lora.loraForward(wide.x, layer(wide, scaling(p, wide.A)));
  },
  rows(m, p) { // all rows are computed, some are shown
    const L = layer(m, p.scale), { y, h } = lora.loraForward(m.x, L);
    const { dx } = lora.loraBackward(m.dy, m.x, h, L);
    const some = (M) => p.rows.flatMap((i) => [...M.v.subarray(i * M.cols, (i + 1) * M.cols)]);
    const whole = (i) => y.v.subarray(i * y.cols, (i + 1) * y.cols).every(Number.isFinite);
    return { y: some(y), dx: some(dx), finite: [...Array(y.rows).keys()].map(whole) };
  },
  stacked: (m, p) => several.stacked(m.x, m.W, adapters(m, p), m.dy),
  mixed: (m, p, v) => several.mixed(m.x, m.W, adapters(m, p), v("rows"), m.dy),
  philox: (m, p, v, shape) => ({ words:
    lora.words(shape("words")[0], BigInt(p.seed), BigInt(p.stream), BigInt(p.first)) }),
  quantile: (m, p, v) => ({ z: v("u").map(lora.quantile) }),
  unit: (m, p) => ({ u: lora.units(8, BigInt(p.seed), lora.stream(p.name)) }),
  init(m, p, v, shape) {
    const [r, k] = shape("A"), [d] = shape("B");
    return lora.initial(p.kind, p.method, d, k, r, p.path, BigInt(p.seed));
  },
  dropout(m, p) {
    const y = lora.drop(m.x, p);
    return { y, kept: lora.map(y, (e) => Number(e !== 0)) };
  },
  rms_norm(m, p) {
    const { y, rstd } = llama.normForward(m.x, m.w, p.eps);
    return { y, rstd, dx: llama.normBackward(m.dy, m.x, m.w, rstd) };
  },
  rope(m, p, v) {
    const turn = (back) => llama.rope(m.x, v("position"), { ...p, rope_theta: p.theta }, back);
    return { y: turn(false), inverse: turn(true) };
  },
  rope_tables(m, p, v) {
    const { frequency, times } = features.frequencies(p.head_dim, p);
    const turns = v("position").flatMap((at) => Array.from(frequency, (f, pair) =>
      (p.rope_type ? at * f : llama.angle(at, pair, p.head_dim, p.theta))));
    const multiplied = (f) => turns.map((turn) => times * f(turn));
    return { cos: multiplied(Math.cos), sin: multiplied(Math.sin) };
  },
  attention: (m, p) => llama.attention(m.q, m.k, m.v, { ...p, attention_scale: p.scale }, m.do),
  layer_norm: (m, p) => features.layerNorm(m.x, m.w, m.b, p.eps, m.dy),
  activation: (m, p) => features.activation(p.kind, m.x, m.up, m.dy),
  soft_cap: (m, p) => features.softCap(m.x, p.multiplier, p.cap, m.dy),
  choose: (m, p) => features.choose(m.logits, p.top_k, p.normalize, m.dw),
  swiglu: (m) =>
    ({ y: llama.swigluForward(m.gate, m.up), ...llama.swigluBackward(m.dy, m.gate, m.up) }),
  cross_entropy: (m, p, v) => llama.crossEntropy(m.logits, v("labels"), v("weight")),
  micro_batches: (m, p, v) => llama.microBatches(m.logits, v("labels"), p.parts),
  clip(m, p) {
    const { norm, clipped } = lora.clip(Object.values(m), p.limit);
    return Object.fromEntries([["norm", norm], ...clipped.map((g, i) => [`new_g.${i}`, g])]);
  },
  update(m, p) { // the first step, from moments of zero [O-5, O-6]
    const zeros = (M) => M.v.map(() => 0), each = [["A", 1], ["B", p.lora_plus_ratio], ["bias", 1]];
    return Object.fromEntries(each.map(([name, ratio]) => {
      const decay = name === "bias" ? 0 : p.weight_decay;
      const settings = { ...p, lr: p.lr * ratio, weight_decay: decay };
      lora.adamw(m[name].v, m[`d${name}`].v, zeros(m[name]), zeros(m[name]), settings);
      return [`new_${name}`, m[name]];
    }));
  },
  adamw(m, p) {
    lora.adamw(m.param.v, m.grad.v, m.m.v, m.v.v, p);
    return { new_param: m.param, new_m: m.m, new_v: m.v };
  },
  embed(m, p, v, _shape, folder) { // load a file, forward, merge, one training step
    const L = { W: m.W, ...adapterFile(folder, p.path) };
    const { y, h } = lora.loraForward(m.x, L), { dx, dA, dB } = lora.loraBackward(m.dy, m.x, h, L);
    const bits = Array.from(new Uint32Array(Float32Array.from(m.W.v).buffer));
    const { merged } = lora.merge(lora.FORMATS.f32, bits, L.A, L.B, L.s);
    for (const [param, grad] of [[L.A, dA], [L.B, dB]])
      lora.adamw(param.v, grad.v, param.v.map(() => 0), param.v.map(() => 0), p);
    const floats = new Float32Array(Uint32Array.from(merged).buffer);
    return { h, y, dx, dA, dB, merged: floats, new_A: L.A, new_B: L.B };
  },
  block(m, p) {
    const L = projections(m, "", p.scale), norm = (name) => m[`${name}.weight`];
    const out = llama.block(m.x, L, norm("input_layernorm"), norm("post_attention_layernorm"), p);
    out.backward(m.dy);
    return out;
  },
  training(m, p, v) {
    const layers = [...Array(p.config.num_hidden_layers).keys()].map((n) => `model.layers.${n}.`);
    const blocks = layers.map((prefix) => projections(m, prefix, p.alpha / p.r));
    const row = (M, i) => Array.from(M.v.subarray(i * M.cols, (i + 1) * M.cols));
    const rows = (M) => Array.from({ length: M.rows }, (_, i) => row(M, i));
    const loss = llama.train((name) => m[name], blocks, rows(m.ids), rows(m.labels), v("lr"), p);
    const trained = layers.flatMap((prefix, n) => Object.entries(blocks[n]).flatMap(([name, L]) =>
      ["A", "B"].map((which) => [`new.${prefix}${name}.${which}`, L[which]])));
    return { loss, ...Object.fromEntries(trained) };
  },
};
function projections(m, prefix, s) { // projection -> {W, A, B, s} of the inputs with this prefix
  const names = Object.keys(m).filter((n) => n.startsWith(prefix) && n.endsWith(".A"));
  return Object.fromEntries(names.map((n) => n.slice(prefix.length, -2)).map((name) => {
    const of = (field) => m[`${prefix}${name}.${field}`];
    return [name, { W: of("weight"), A: of("A"), B: of("B"), s }];
  }));
}
