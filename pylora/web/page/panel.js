// What the page is set to: which adapters and how much of each, how tokens are drawn. Kept in this browser.

import * as api from "./api.js";

const $ = (id) => document.getElementById(id);
const weights = new Map(); // adapter -> number; 0: not in use
let listed = [];
export const about = { base: "", chat: true };

const ranges = { temperature: "temperature-said", "top-p": "top-p-said" };
const kept = ["temperature", "top-p", "seed", "most", "system", "live", "compare", "tint", "plain"];

export const chosen = () => listed.filter((n) => weights.get(n)).map((name) => ({ name, weight: weights.get(name) }));
export const label = (mix) =>
  mix.length === 0 ? "base" : mix.map((a) => (a.weight === 1 ? a.name : `${+a.weight.toFixed(2)} × ${a.name}`)).join(" + ");
export const wants = (name) => $(name).checked;
export const plain = () => $("plain").checked || !about.chat;
export const system = () => $("system").value.trim();
export function settings() {
  return {
    temperature: +$("temperature").value,
    top_p: +$("top-p").value,
    seed: Math.max(0, Math.trunc(+$("seed").value || 0)),
    max_tokens: Math.max(1, Math.trunc(+$("most").value || 256)),
  };
}

function fill(range) {
  const share = (range.value - range.min) / (range.max - range.min);
  range.style.setProperty("--at", `${100 * share}%`);
}

function slider(name, changed) {
  const field = document.createElement("div");
  field.className = "field";
  const id = `w-${name}`;
  const text = document.createElement("label");
  Object.assign(text, { htmlFor: id, textContent: name, title: name });
  const said = document.createElement("output");
  said.setAttribute("for", id);
  const range = document.createElement("input");
  Object.assign(range, { type: "range", id, min: 0, max: 2, step: 0.05, value: weights.get(name) ?? 0 });
  range.dataset.adapter = name;
  const show = () => {
    const value = +range.value;
    weights.set(name, value);
    said.textContent = value.toFixed(2);
    range.setAttribute("aria-valuetext", value ? value.toFixed(2) : "not in use");
    field.classList.toggle("on", value > 0);
    $("silence").hidden = chosen().length === 0;
    fill(range);
  };
  range.addEventListener("input", show);
  range.addEventListener("change", () => { save(); changed(); });
  range.addEventListener("dblclick", () => { range.value = 1; show(); save(); changed(); });
  field.append(text, said, range);
  show();
  return field;
}

function save() {
  const said = Object.fromEntries(kept.map((id) => [id, $(id).type === "checkbox" ? $(id).checked : $(id).value]));
  localStorage.setItem("pylora", JSON.stringify({ ...said, weights: Object.fromEntries(weights) }));
}

function restore() {
  let said = {};
  try { said = JSON.parse(localStorage.getItem("pylora") ?? "{}"); } catch { /* as if there were none */ }
  for (const id of kept) {
    if (!(id in said)) continue;
    if ($(id).type === "checkbox") $(id).checked = said[id];
    else $(id).value = said[id];
  }
  for (const [name, value] of Object.entries(said.weights ?? {})) weights.set(name, +value || 0);
}

// Asks which adapters there are; sliders are made anew only if they changed.
export async function refresh(changed) {
  const models = (await api.get("v1/models")).data;
  const base = models.find((m) => !m.parent);
  about.base = base.id;
  about.chat = base.chat !== false;
  $("model").textContent = [base.id, base.precision].filter(Boolean).join(" · ");
  const names = models.filter((m) => m.parent).map((m) => m.id);
  if (names.join("\n") !== listed.join("\n")) {
    listed = names;
    $("adapters").replaceChildren(...names.map((name) => slider(name, changed)));
  }
  $("no-adapters").hidden = names.length > 0;
  $("filter").hidden = names.length < 9;
  $("access").hidden = !api.hasKey();
}

export function begin(changed, redrawn) {
  restore();
  for (const [id, said] of Object.entries(ranges)) {
    const show = () => { $(said).textContent = (+$(id).value).toFixed(2); fill($(id)); };
    $(id).addEventListener("input", show);
    show();
  }
  for (const id of kept) $(id).addEventListener("change", () => { save(); redrawn(id); });
  $("dice").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
    save();
    redrawn("seed");
  });
  $("silence").addEventListener("click", () => {
    for (const range of $("adapters").querySelectorAll("input")) {
      range.value = 0;
      range.dispatchEvent(new Event("input"));
    }
    save();
    changed();
  });
  $("filter").addEventListener("input", () => {
    const sought = $("filter").value.toLowerCase();
    for (const field of $("adapters").children) {
      field.hidden = !field.textContent.toLowerCase().includes(sought) && !field.classList.contains("on");
    }
  });
  const drawer = (open) => {
    $("panel").classList.toggle("open", open);
    $("panel-open").setAttribute("aria-expanded", open);
    $("shade").hidden = !open;
    (open ? $("panel-close") : $("panel-open")).focus();
  };
  $("panel-open").addEventListener("click", () => drawer(true));
  $("panel-close").addEventListener("click", () => drawer(false));
  $("shade").addEventListener("click", () => drawer(false));
  $("panel").addEventListener("keydown", (e) => e.key === "Escape" && $("panel").classList.contains("open") && drawer(false));
}
