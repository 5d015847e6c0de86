// Asks the server: JSON, and answers that come as events. Errors are the server's own sentences.

let key = sessionStorage.getItem("pylora-key") ?? "";
export const hasKey = () => key !== "";
export function setKey(given) {
  key = given.trim();
  sessionStorage.setItem("pylora-key", key);
}

export class Refused extends Error {
  constructor(status, said) {
    super(said);
    this.status = status;
  }
}

const headers = () => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) });

async function asked(path, options) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, said.error?.message ?? `The server said ${answer.status}.`);
}

export const get = async (path) => (await asked(path, {})).json();
export const post = async (path, body, signal) =>
  (await asked(path, { method: "POST", body: JSON.stringify(body), signal })).json();

// Each event of a stream, as an object. What cuts it short is raised.
export async function* events(path, body, signal) {
  const answer = await asked(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "The answer was cut off.");
    waiting += value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(event.error.code ?? 500, event.error.message);
      yield event;
    }
  }
}
