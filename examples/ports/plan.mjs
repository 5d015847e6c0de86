// plan.mjs - which modules the settings of an adapter choose, and with which rank, alpha and scale:
// the statements S and T of docs/spec.md. Throws where they say that something must be refused.

const KNOWN = new Set(("r lora_alpha target_modules exclude_modules layers_to_transform "
  + "layers_pattern rank_pattern alpha_pattern use_rslora peft_type").split(" "));
const IGNORED = [null, false, 0, ""]; // a setting that is not known, and not set [K-6]

const refuse = (why) => {
  throw new Error(why);
};
const regex = (text, frame) => {
  try {
    return new RegExp(frame.replace("…", () => text), "u");
  } catch {
    return refuse(`${text} is not a regular expression`);
  }
};
const whole = (text, path) => regex(text, "^(?:…)$").test(path); // [T-2]
const ends = (text, path) => regex(text, "^(?:.*\\.)?(?:…)$").test(path); // [T-5]
const named = (name, path) => path === name || path.endsWith(`.${name}`); // [T-1]
const list = (value) => (Array.isArray(value) ? value : (value ?? null) === null ? [] : [value]);

function layerOf(path, patterns) { // [T-4]
  if (!patterns.length) return Number(/^.*?\.[^.]*\.(\d+)\./.exec(path)?.[1] ?? NaN);
  const frame = "^(?:|.*?\\.)(?:…)\\.(?<number>\\d+)\\.";
  const found = patterns.map((p) => regex(p, frame).exec(path));
  return Number(found.find((match) => match)?.groups.number ?? NaN);
}

function check(c) { // [S-1, S-2, K-6]
  for (const [name, value] of Object.entries(c)) {
    const object = typeof value === "object" && value !== null;
    const empty = IGNORED.includes(value) || (object && !Object.keys(value).length);
    if (!KNOWN.has(name) && !empty) refuse(`${name} is a setting that is not known`);
  }
  if ((c.peft_type ?? "LORA") !== "LORA") refuse(`${c.peft_type} is not LoRA`);
  for (const r of [c.r ?? 8, ...Object.values(c.rank_pattern ?? {})])
    if (!Number.isInteger(r) || r < 1) refuse(`${r} is not a rank`);
  for (const alpha of [c.lora_alpha ?? 8, ...Object.values(c.alpha_pattern ?? {})])
    if (!Number.isFinite(alpha)) refuse(`${alpha} is not an alpha`);
}

// modules: [{path, kind}], kind "linear", "embedding" or another; gives path -> {r, alpha, scale}
export function plan(c, modules) {
  check(c);
  const able = modules.filter((m) => m.kind === "linear" || m.kind === "embedding"); // [T-7]
  const paths = able.map((m) => m.path), targets = c.target_modules;
  const layers = list(c.layers_to_transform), patterns = list(c.layers_pattern);
  const excluded = c.exclude_modules ?? [];
  const all = typeof targets === "string" && targets.toLowerCase() === "all-linear";
  if (typeof targets === "string" && layers.length) refuse("layers need a list of targets");
  const must = (what, test) => paths.some(test) || refuse(`${what} matches nothing`); // [T-6]
  if (!all && typeof targets === "string") must(targets, (path) => whole(targets, path));
  if (typeof excluded === "string" && excluded) must(excluded, (path) => whole(excluded, path));
  for (const name of [...(typeof targets === "string" ? [] : list(targets)),
    ...(typeof excluded === "string" ? [] : excluded)]) must(name, (path) => named(name, path));
  for (const n of layers) must(`layer ${n}`, (path) => layerOf(path, patterns) === n);

  const out = typeof excluded === "string"
    ? (path) => excluded !== "" && whole(excluded, path)
    : (path) => excluded.some((name) => named(name, path)); // [T-3]
  const chosen = able.filter(({ path, kind }) => {
    if (out(path)) return false;
    if (all) return kind === "linear" && path !== "lm_head";
    if (typeof targets === "string") return targets !== "" && whole(targets, path);
    if (list(targets).includes(path)) return true;
    return list(targets).some((name) => named(name, path))
      && (!layers.length || layers.includes(layerOf(path, patterns)));
  }).map((m) => m.path);
  if (!chosen.length) refuse("nothing is chosen");
  const value = (name, path, usual) => {
    const key = Object.keys(c[name] ?? {}).find((text) => ends(text, path));
    return key === undefined ? usual : c[name][key];
  };
  for (const name of ["rank_pattern", "alpha_pattern"])
    for (const key of Object.keys(c[name] ?? {}))
      if (!chosen.some((path) => ends(key, path))) refuse(`${name}: ${key} matches nothing`);
  return Object.fromEntries(chosen.map((path) => {
    const r = value("rank_pattern", path, c.r ?? 8);
    const alpha = value("alpha_pattern", path, c.lora_alpha ?? 8);
    return [path, { r, alpha, scale: alpha / (c.use_rslora ? Math.sqrt(r) : r) }];
  }));
}
