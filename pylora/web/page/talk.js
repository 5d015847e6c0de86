// The conversation: what was asked, and for each side (the mix, the base) what it answered.

import * as api from "./api.js";
import * as panel from "./panel.js";
import { Words } from "./tokens.js";

const talk = document.getElementById("talk");
const turns = []; // {asked, element, sides: {mix: {...}, base: {...}}}
let running = null; // AbortController of what is being answered

export const busy = () => running !== null;
export const stop = () => running?.abort();
export const last = () => turns.at(-1);

const make = (tag, name, text) => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};

// The messages before `turn` as this side knows them, and what `turn` asks.
function messages(turn, side) {
  const said = panel.system() ? [{ role: "system", content: panel.system() }] : [];
  for (const before of turns.slice(0, turns.indexOf(turn))) {
    const answer = (before.sides[side] ?? before.sides.mix)?.text;
    said.push({ role: "user", content: before.asked });
    if (answer) said.push({ role: "assistant", content: answer });
  }
  return [...said, { role: "user", content: turn.asked }];
}

function request(turn, side) {
  const mix = side === "base" ? [] : panel.chosen();
  const common = { model: panel.about.base, ...(mix.length && { adapters: mix }), ...panel.settings() };
  const stream = { stream: true, stream_options: { include_usage: true } };
  if (panel.plain()) return ["v1/completions", { ...common, prompt: turn.asked, logprobs: 5, ...stream }, mix];
  return ["v1/chat/completions", { ...common, messages: messages(turn, side), logprobs: true, top_logprobs: 5, ...stream }, mix];
}

// The entries of an event, in chat's form whichever form it has.
function entries(choice) {
  const logs = choice.logprobs;
  if (!logs) return [];
  if (logs.content) return logs.content;
  return logs.tokens.map((token, i) => ({
    token,
    logprob: logs.token_logprobs[i],
    top_logprobs: Object.entries(logs.top_logprobs[i]).map(([t, logprob]) => ({ token: t, logprob })).sort((a, b) => b.logprob - a.logprob),
  }));
}

function card(turn, side) {
  const element = make("article", `answer ${side === "base" ? "base" : "mixed"}`);
  element.dataset.side = side;
  const title = make("h3");
  const said = make("div", "said going");
  Object.assign(said, { tabIndex: 0, role: "group", ariaLabel: "Answer; arrow keys go from word to word" });
  const footer = make("footer");
  element.append(title, said, footer);
  return { element, title, said, footer, text: "" };
}

async function answer(turn, side, signal) {
  const place = card(turn, side);
  turn.sides[side] = place;
  turn.answers.append(place.element);
  const [path, body, mix] = request(turn, side);
  place.title.append(make("b", "", panel.label(mix)));
  const words = new Words(place.said);
  const began = performance.now();
  let first = 0;
  let usage = null;
  let reason = "";
  try {
    for await (const event of api.events(path, body, signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const text = choice.delta ? choice.delta.content : choice.text;
      const listed = entries(choice);
      if ((text || listed.length) && !first) first = performance.now();
      const low = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
      if (listed.length) listed.forEach((entry) => words.add(entry));
      else if (text) words.plain(text);
      place.text += text ?? "";
      if (low) talk.scrollTop = talk.scrollHeight;
      reason = choice.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") place.element.append(make("p", "wrong", error.message));
    else reason = "stopped";
  }
  place.said.classList.remove("going");
  if (!place.said.childNodes.length) place.said.append(make("span", "hint", reason === "stopped" ? "Stopped." : ""));
  finish(place, { path, body, usage, reason, began, first, ended: performance.now() });
}

function finish(place, run) {
  const n = run.usage?.completion_tokens;
  const facts = [];
  if (n > 1) facts.push([`${((1000 * (n - 1)) / (run.ended - run.first)).toFixed(1)} tokens/s`, "tokens per second, after the first"]);
  if (run.first) facts.push([`${Math.round(run.first - run.began)} ms to the first`, "from sending to the first word"]);
  if (run.usage) {
    const cached = run.usage.prompt_tokens_details?.cached_tokens;
    facts.push([`${run.usage.prompt_tokens} → ${n} tokens`, cached ? `${cached} of the prompt's were known already` : "of the prompt, of the answer"]);
  }
  if (run.reason === "length") facts.push(["cut off", "as many tokens as were allowed"]);
  if (run.reason === "stopped") facts.push(["stopped", ""]);
  place.footer.replaceChildren(...facts.map(([text, title]) => Object.assign(make("span", "", text), { title })));
  const sent = make("button", "link", "What was sent");
  sent.type = "button";
  sent.addEventListener("click", () => showSent(run));
  place.footer.append(sent);
}

const pieces = (strings) => strings.map((text) => make("span", "piece", text.replaceAll("\n", "⏎\n")));

async function showSent({ path, body }) {
  const dialog = document.getElementById("sent");
  const tokens = document.getElementById("sent-tokens");
  document.getElementById("sent-body").textContent = `POST /${path}\n\n${JSON.stringify(body, null, 2)}`;
  tokens.textContent = "…";
  dialog.showModal();
  const { model, messages: list, prompt, adapters } = body;
  try {
    const said = await api.post("tokenize", { model: adapters?.length === 1 ? adapters[0].name : model, ...(list ? { messages: list } : { prompt }), return_token_strs: true });
    tokens.replaceChildren(make("span", "count", `${said.count} tokens, each in its own shade; the model may take ${said.max_model_len.toLocaleString("en")}`), ...pieces(said.token_strs));
  } catch (error) {
    tokens.textContent = error.message;
  }
}

// One question, asked of the mix and, where it is wanted, of the base, at the same time.
export async function ask(text, again = null) {
  stop();
  const turn = again ?? { asked: text, element: make("section", "turn"), answers: make("div", "answers") };
  if (!again) {
    const asked = make("div", "asked");
    asked.append(make("p", "", text));
    turn.element.append(asked, turn.answers);
    turns.push(turn);
    talk.append(turn.element);
  }
  turn.sides = {};
  turn.answers.replaceChildren();
  const mine = (running = new AbortController());
  document.body.classList.add("going");
  const sides = panel.wants("compare") && panel.chosen().length ? ["base", "mix"] : ["mix"];
  const all = sides.map((side) => answer(turn, side, mine.signal));
  talk.scrollTop = talk.scrollHeight;
  await Promise.all(all);
  if (running === mine) {
    running = null;
    document.body.classList.remove("going");
    document.dispatchEvent(new Event("answered"));
  }
}

export function clear() {
  stop();
  turns.length = 0;
  for (const turn of talk.querySelectorAll(".turn")) turn.remove();
}
