// check.mjs - reads the golden vectors and holds lora.mjs and llama.mjs against them.
//
//   pylora vectors --out DIR && node examples/ports/check.mjs DIR [OUT]
//
// With OUT what was computed is written there, with the answers of plan.mjs, for
// `pylora vectors --check OUT`.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { OPS } from "./cases.mjs";
import { mat } from "./lora.mjs";
import { plan } from "./plan.mjs";

const [directory = "vectors", written] = process.argv.slice(2);
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
  return mat(rows, cols, (i, j) => v[i * cols + j]);
};
function write(file, dtype, numbers) { // an output: float64 where it has a bound
  const whole = dtype === "i64" ? numbers.map(BigInt) : numbers;
  mkdirSync(join(written, file, ".."), { recursive: true });
  writeFileSync(join(written, file), new Uint8Array(ARRAYS[dtype].from(whole).buffer));
}

const manifest = JSON.parse(readFileSync(join(directory, "manifest.json"), "utf8"));
if (manifest.format !== "pylora-vectors" || manifest.version !== 1)
  throw new Error(`${directory} holds ${manifest.format} ${manifest.version}, not version 1`);
let numbers = 0, worst = 0;
const failures = [];
for (const entry of manifest.cases) {
  const m = {}, v = (name) => read(entry.inputs[name]);
  for (const [name, at] of Object.entries(entry.inputs)) m[name] = matrix(at);
  const shape = (name) => entry.outputs[name].shape;
  const folder = join(directory, entry.name, "adapter");
  const got = OPS[entry.op](m, entry.params, v, shape, folder);
  for (const [name, want] of Object.entries(entry.outputs)) {
    const value = Array.from(got[name].v ?? got[name], Number), expected = read(want);
    const bound = want.bound ? read(want.bound) : null;
    if (written) write(want.file, want.dtype, value);
    let bad = value.length === expected.length ? 0 : expected.length || 1;
    for (let i = 0; i < expected.length; i++, numbers++) {
      const error = Math.abs(value[i] - expected[i]);
      if (bound ? !(error <= bound[i]) : !Object.is(value[i], expected[i])) bad++;
      else if (bound && bound[i] > 0) worst = Math.max(worst, error / bound[i]);
    }
    if (bad) failures.push(`${entry.name}/${name}: ${bad} of ${expected.length} are wrong`);
  }
}
const asked = JSON.parse(readFileSync(join(directory, "plans.json"), "utf8"));
const plans = {}; // the answers: what is chosen, or why it is refused
for (const { name, config, model, expect } of asked.cases) {
  try {
    plans[name] = { modules: plan(config, asked.models[model]) };
  } catch (error) {
    plans[name] = { refused: error.message };
  }
  const { modules, refused } = plans[name], want = expect.modules ?? {};
  const same = (p) =>
    modules[p] && ["r", "alpha", "scale"].every((n) => modules[p][n] === want[p][n]);
  const fits = expect.modules && modules && Object.keys(want).every(same)
    && Object.keys(modules).length === Object.keys(want).length;
  if (!fits && !(expect.refused && refused)) failures.push(`plans/${name}: is wrong`);
}
if (written) {
  const text = JSON.stringify({ format: "pylora-outputs", version: 1, plans });
  writeFileSync(join(written, "outputs.json"), text);
}
for (const line of failures) console.error(line);
const counts = `${manifest.cases.length} cases, ${numbers} numbers, ${asked.cases.length} plans`;
console.log(`${counts}, ${failures.length} failures; `
  + `the largest error is ${worst.toPrecision(2)} of its bound`);
process.exitCode = failures.length ? 1 : 0;
