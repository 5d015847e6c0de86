// check.mjs - reads the golden vectors and holds lora.mjs and llama.mjs against them.
//
//   pylora vectors --out DIR && node examples/ports/check.mjs DIR
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as lora from "./lora.mjs";
import * as llama from "./llama.mjs";

const directory = process.argv[2] ?? "vectors";
const ARRAYS = { f32: Float32Array, f64: Float64Array, u8: Uint8Array, u16: Uint16Array };
Object.assign(ARRAYS, { u32: Uint32Array, i64: BigInt64Array });

function read(entry) { // the numbers of an array, as float64 (int64 here is small)
  const data = readFileSync(join(directory, entry.file));
  if (createHash("sha256").update(data).digest("hex") !== entry.sha256)
    throw new Error(`${entry.file} was changed`);
  return Array.from(new ARRAYS[entry.dtype](new Uint8Array(data).buffer), Number);
}
const matrix = (entry) => { // a vector is a matrix of one row
  const [cols, rows = 1] = entry.shape.slice().reverse(), v = read(entry);
  return lora.mat(rows, cols, (i, j) => v[i * cols + j]);
};

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
const layer = (m, s) => ({ W: m.W, bias: m.bias, A: m.A, B: m.B, s });

// op -> computes a case: m its input matrices, p its parameters, v(name) an input as plain numbers
const OPS = {
  lora(m, p) {
    const L = layer(m, scaling(p, m.A)), d = p.p && p, { y, h } = lora.loraForward(m.x, L, d);
    return { y, h, ...lora.loraBackward(m.dy, m.x, h, L, d) };
  },
  embedding(m, p, v) { // tokens as one-hot rows; W is [vocab, hidden]
    const ids = v("ids"), x = lora.mat(ids.length, m.W.rows, (i, j) => Number(ids[i] === j));
    const L = { W: lora.T(m.W), A: m.A, B: m.B, s: p.scale }, { y, h } = lora.loraForward(x, L);
    return { y, ...lora.loraBackward(m.dy, x, h, L) };
  },
  merge(m, p, v) {
    const format = lora.FORMATS[p.dtype], W = v("W");
    const out = lora.merge(format, W, m.A, m.B, p.scale);
    const back = lora.unmerge(format, out.merged, m.A, m.B, p.scale, out.position, out.bits);
    if (back.some((bits, i) => bits !== W[i])) throw new Error("unmerging is not exact");
    return out;
  },
  philox: (m, p) => ({ words: lora.words(11, BigInt(p.seed), BigInt(p.stream), BigInt(p.first)) }),
  unit: (m, p) => ({ u: lora.units(8, BigInt(p.seed), lora.stream(p.name)) }),
  init(m, p, v, [r, k], [d]) {
    const A = lora.initial(r, k, p.path, p.method, BigInt(p.seed));
    return { A, B: lora.mat(d, r) };
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
    const turn = (back) => llama.rope(m.x, v("position"), p.head_dim, p.theta, back, p.layout);
    return { y: turn(false), inverse: turn(true) };
  },
  attention: (m, p) => llama.attention(m.q, m.k, m.v, p, m.do),
  swiglu: (m) =>
    ({ y: llama.swigluForward(m.gate, m.up), ...llama.swigluBackward(m.dy, m.gate, m.up) }),
  cross_entropy: (m, p, v) => llama.crossEntropy(m.logits, v("labels"), v("weight")),
  adamw(m, p) {
    lora.adamw(m.param.v, m.grad.v, m.m.v, m.v.v, p);
    return { new_param: m.param, new_m: m.m, new_v: m.v };
  },
  embed(m, p, v, _a, _b, entry) { // load a file, forward, merge, one training step
    const L = { W: m.W, ...adapterFile(join(directory, entry.adapter), p.path) };
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

const manifest = JSON.parse(readFileSync(join(directory, "manifest.json"), "utf8"));
if (manifest.format !== "pylora-vectors" || manifest.version !== 1)
  throw new Error(`${directory} holds ${manifest.format} ${manifest.version}, not version 1`);
let numbers = 0, worst = 0;
const failures = [];
for (const entry of manifest.cases) {
  const m = {}, v = (name) => read(entry.inputs[name]);
  for (const [name, at] of Object.entries(entry.inputs)) m[name] = matrix(at);
  const shape = (name) => entry.outputs[name]?.shape ?? [];
  const got = OPS[entry.op](m, entry.params, v, shape("A"), shape("B"), entry);
  for (const [name, want] of Object.entries(entry.outputs)) {
    const value = Array.from(got[name].v ?? got[name], Number), expected = read(want);
    const bound = want.bound ? read(want.bound) : null;
    let bad = value.length === expected.length ? 0 : expected.length || 1;
    for (let i = 0; i < expected.length; i++, numbers++) {
      const error = Math.abs(value[i] - expected[i]);
      if (bound ? !(error <= bound[i]) : !Object.is(value[i], expected[i])) bad++;
      else if (bound && bound[i] > 0) worst = Math.max(worst, error / bound[i]);
    }
    if (bad) failures.push(`${entry.name}/${name}: ${bad} of ${expected.length} are wrong`);
  }
}
for (const line of failures) console.error(line);
console.log(`${manifest.cases.length} cases, ${numbers} numbers, ${failures.length} failures; `
  + `the largest error is ${worst.toPrecision(2)} of its bound`);
process.exitCode = failures.length ? 1 : 0;
