// Puts the page together: the form, the keys, the theme, and what happens when something changes.

import * as api from "./api.js";
import * as panel from "./panel.js";
import * as talk from "./talk.js";
import * as tokens from "./tokens.js";

const $ = (id) => document.getElementById(id);
const text = $("text");
const IDEAS = ["Who are you?", "Explain LoRA to a child.", "Write four lines about the sea."];

function tell(said) {
  $("told").textContent = said;
  $("told").hidden = false;
  clearTimeout(tell.later);
  tell.later = setTimeout(() => ($("told").hidden = true), 6000);
}

function buttons() {
  $("stop").hidden = !talk.busy();
  $("send").hidden = talk.busy();
  $("send").disabled = text.value.trim() === "";
}

function send(said) {
  if (!said.trim()) return;
  $("welcome").hidden = true;
  text.value = "";
  grow();
  const done = talk.ask(said);
  buttons();
  return done;
}

// The last question once more, with what was changed.
function again() {
  if (!panel.wants("live") || !talk.last()) return;
  talk.ask("", talk.last());
  buttons();
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  buttons();
}

function fresh() {
  talk.clear();
  $("welcome").hidden = false;
  text.focus();
  buttons();
}

// ---- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
const themes = ["system", "light", "dark"];
let theme = localStorage.getItem("pylora-theme") ?? "system";
function paint() {
  document.documentElement.dataset.theme = theme === "system" ? (dark.matches ? "dark" : "light") : theme;
}
paint();
dark.addEventListener("change", paint);
$("theme").addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  localStorage.setItem("pylora-theme", theme);
  paint();
  tell(theme === "system" ? "Light or dark as the system has it" : `Theme: ${theme}`);
});

// ---- asking

$("ask").addEventListener("submit", (e) => { e.preventDefault(); send(text.value); });
$("stop").addEventListener("click", talk.stop);
$("new").addEventListener("click", fresh);
text.addEventListener("input", grow);
text.addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); if (!talk.busy()) send(text.value); }
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape" && talk.busy() && !$("sent").open) talk.stop();
  if (e.key.toLowerCase() === "o" && e.shiftKey && (e.ctrlKey || e.metaKey)) { e.preventDefault(); fresh(); }
});
document.addEventListener("answered", buttons);
$("ideas").append(...IDEAS.map((idea) => {
  const item = document.createElement("li");
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: idea });
  button.addEventListener("click", () => send(idea));
  item.append(button);
  return item;
}));

// ---- what was sent: two tabs

const tabs = [$("tab-tokens"), $("tab-body")];
function open(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
}
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (e) => {
    if (!["ArrowLeft", "ArrowRight"].includes(e.key)) return;
    open(tabs[1 - i]);
    tabs[1 - i].focus();
  });
}
$("sent").addEventListener("click", (e) => e.target === $("sent") && $("sent").close());

// ---- the panel, and what the server has

async function refresh() {
  try {
    await panel.refresh(again);
    $("plain").disabled = !panel.about.chat;
    text.placeholder = panel.plain() ? "Text to go on with" : "Message";
  } catch (error) {
    $("model").textContent = error.message;
    if (error.status !== 401) return;
    $("access").hidden = false;
    $("access").open = true;
    $("model").textContent = "This server wants an API key: it goes into the panel, below.";
  }
}
$("key").addEventListener("change", () => { api.setKey($("key").value); refresh(); });
panel.begin(again, (id) => {
  document.body.classList.toggle("tint", panel.wants("tint"));
  text.placeholder = panel.plain() ? "Text to go on with" : "Message";
  if (["seed", "temperature", "top-p", "compare", "system", "plain"].includes(id)) again();
});
document.body.classList.toggle("tint", panel.wants("tint"));
tokens.watch($("talk"));
await refresh();
setInterval(() => document.visibilityState === "visible" && !talk.busy() && refresh(), 15000);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && refresh());
buttons();
