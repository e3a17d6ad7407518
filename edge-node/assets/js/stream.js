// Talking to the node: one streamed answer, the status, the controls.
import { t } from "./language.js";

/** What went wrong, in words for the reader; `wait` is the node's hint in seconds, `code` its word for the error. */
export class Failure extends Error {
  constructor(message, status = 0, wait = null, code = null) {
    super(message);
    this.status = status;
    this.wait = wait;
    this.code = code;
  }
}

let key = null;
try {
  key = sessionStorage.getItem("tandem-key");
} catch {
  // Storage can be switched off; the key then lasts as long as the page.
}

/** Sets the API key, for nodes that ask for one. */
export function useKey(given) {
  key = given;
  try {
    sessionStorage.setItem("tandem-key", given);
  } catch {
    // As above.
  }
}

const headers = (more = {}) => (key ? { ...more, authorization: `Bearer ${key}` } : more);

/** Events of a `text/event-stream` body: the joined `data` of each; comments are skipped. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
      // A lone \r at the end may be the first half of \r\n.
      const held = !done && rest.endsWith("\r") ? "\r" : "";
      const lines = rest.slice(0, rest.length - held.length).split(/\r\n|\n|\r/);
      rest = lines.pop() + held;
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not JSON: the status says enough.
  }
  const wait = Number.parseFloat(response.headers.get("retry-after"));
  const { status } = response;
  const words = error.message || ([401, 404, 429, 503].includes(status) ? t(`failure${status}`) : t("failureStatus", { status }));
  return new Failure(words, status, Number.isFinite(wait) ? wait : null, error.code ?? null);
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failure(t("failureOdd"));
  }
}

/** Network trouble as a Failure; an abort stays what it is. */
function trouble(error) {
  if (error.name === "AbortError" || error instanceof Failure) return error;
  return new Failure(t("failureGone"));
}

/**
 * Streams one answer. `on.delta(text, tokens)` gets each piece, `on.reasoning(text)` what comes before it, `on.usage(usage)` the totals,
 * `on.finish(reason)` why it ended. Throws Failure, or AbortError after `signal`.
 */
export async function answer({ messages, mode, threshold, temperature, tokens, signal }, on) {
  const tandem = { tokens: true, mode };
  if (threshold != null) tandem.threshold = threshold;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify({ ...(tokens ? { max_tokens: tokens } : {}), model: "tandem", messages, temperature, stream: true, stream_options: { include_usage: true }, tandem }),
      signal,
    });
    if (!response.ok) throw await failure(response);
    let ended = false;
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new Failure(chunk.error.message ?? t("failureBroken"));
      for (const choice of chunk.choices ?? []) {
        const tokens = choice.tandem?.tokens ?? [];
        const text = choice.delta?.content ?? "";
        const thought = choice.delta?.reasoning_content ?? "";
        if (thought) on.reasoning(thought);
        if (text || tokens.length) on.delta(text, tokens);
        if (choice.finish_reason) {
          ended = true;
          on.finish(choice.finish_reason);
        }
      }
      if (chunk.usage) on.usage(chunk.usage);
    }
    if (!ended) throw new Failure(t("failureMiddle"));
  } catch (error) {
    throw trouble(error);
  }
}

/** The node's status. */
export async function status() {
  try {
    const response = await fetch("/tandem/status", { headers: headers(), signal: AbortSignal.timeout(4000), cache: "no-store" });
    if (!response.ok) throw await failure(response);
    return await response.json();
  } catch (error) {
    throw trouble(error);
  }
}

/** Sets controls of the node, e.g. `{cut: true}`. */
export async function control(change) {
  try {
    const response = await fetch("/tandem/controls", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify(change),
      signal: AbortSignal.timeout(4000),
    });
    if (!response.ok) throw await failure(response);
  } catch (error) {
    throw trouble(error);
  }
}
