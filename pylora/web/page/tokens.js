// The words of an answer: each token is a span that knows how likely it was, and what else might have come.

const tip = document.getElementById("tip");
const known = new WeakMap(); // span -> {token, logprob, top}

// A line break or a space, so that it can be seen.
const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
export const percent = (logprob) => {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100 %" : p < 0.01 ? "< 0.01 %" : `${p.toPrecision(p < 1 ? 1 : 3)} %`;
};

// Spans of tokens as they come. Bytes are decoded across tokens: a character may be cut in two.
export class Words {
  constructor(place) {
    this.place = place;
    this.decoder = new TextDecoder();
    this.text = "";
  }
  add(entry) {
    const piece = entry.bytes ? this.decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token;
    this.text += piece;
    const span = document.createElement("span");
    span.className = "t";
    span.textContent = piece;
    span.style.setProperty("--doubt", Math.min(1, -entry.logprob / 4).toFixed(3));
    known.set(span, entry);
    this.place.append(span);
  }
  plain(text) {
    this.text += text;
    this.place.append(text);
  }
}

function show(span) {
  const entry = known.get(span);
  if (!entry) return hide();
  for (const other of document.querySelectorAll(".t.on")) other.classList.remove("on");
  span.classList.add("on");
  const rivals = entry.top_logprobs.some((r) => r.token === entry.token)
    ? entry.top_logprobs
    : [...entry.top_logprobs, entry];
  tip.replaceChildren(
    ...rivals.map((rival) => {
      const line = document.createElement("p");
      line.classList.toggle("chosen", rival.token === entry.token && rival.id === entry.id);
      line.style.setProperty("--share", `${100 * Math.exp(rival.logprob)}%`);
      const name = document.createElement("code");
      name.textContent = shown(rival.token);
      const share = document.createElement("span");
      share.textContent = percent(rival.logprob);
      line.append(name, share);
      return line;
    }),
  );
  tip.hidden = false;
  const at = span.getBoundingClientRect();
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), innerWidth - box.width - 8);
  const above = at.top - box.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
}

export function hide() {
  tip.hidden = true;
  for (const other of document.querySelectorAll(".t.on")) other.classList.remove("on");
}

// By mouse, by touch, and by arrow keys within an answer that has the focus.
export function watch(talk) {
  talk.addEventListener("pointerover", (e) => (e.target.matches?.(".t") ? show(e.target) : hide()));
  talk.addEventListener("pointerleave", hide);
  talk.addEventListener("click", (e) => e.target.matches(".t") && show(e.target));
  talk.addEventListener("scroll", hide, { passive: true });
  talk.addEventListener("focusout", hide);
  talk.addEventListener("keydown", (e) => {
    if (!e.target.matches(".said") || !["ArrowRight", "ArrowLeft"].includes(e.key)) return;
    const all = [...e.target.querySelectorAll(".t")];
    const step = e.key === "ArrowRight" ? 1 : -1;
    const next = all[all.findIndex((t) => t.classList.contains("on")) + step] ?? all[step > 0 ? 0 : all.length - 1];
    if (next) show(next);
    e.preventDefault();
  });
}
