// The page: sends questions, shows answers, keeps the strip and the controls up to date.
import { Turn } from "./answer.js";
import { hide } from "./card.js";
import * as controls from "./controls.js";
import { byId, h } from "./dom.js";
import { answer, status } from "./stream.js";
import * as strip from "./strip.js";

const EXAMPLES = [
  "What is the capital of Peru?",
  "Calculate 936 + 181.",
  "Which number is smaller: 296 or 326?",
  "Remind me to clean the filter at 2:15 PM.",
  "What is 18 kilograms in grams?",
  "Sort 48, 40, 32, 57 from smallest to largest.",
];
/** Turns kept in the transcript; the oldest go first. */
const TURNS_MAX = 200;
const POLL_MS = 1000;
/** Between tries while the node cannot be reached. */
const POLL_LOST_MS = 3000;

const prompt = byId("prompt");
const send = byId("send");
const stop = byId("stop");
const log = byId("log");
const scroll = byId("scroll");
let turns = [];
let abort = null;

const say = (text) => {
  byId("say").textContent = text;
};

/* Status: once a second while someone can see it, not at all otherwise. */
let timer = null;
let underWay = Promise.resolve();
function refresh() {
  clearTimeout(timer);
  // One at a time: a poll that began before a change must not hide it.
  underWay = underWay.then(poll);
  return underWay;
}
async function poll() {
  clearTimeout(timer);
  let wait = POLL_MS;
  try {
    const now = await status();
    controls.showStatus(now);
    strip.showStatus(now);
  } catch (error) {
    controls.showStatus(null, error);
    wait = POLL_LOST_MS;
  }
  if (!document.hidden) timer = setTimeout(refresh, wait);
}
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const toEnd = () => scroll.scrollTo({ top: scroll.scrollHeight });

function ready() {
  send.disabled = abort != null || prompt.value.trim() === "";
  send.hidden = abort != null;
  stop.hidden = abort == null;
  byId("clear").disabled = turns.length === 0;
  document.body.classList.toggle("chatting", turns.length > 0);
  byId("empty").hidden = turns.length > 0;
  for (const chip of byId("chips").children) chip.disabled = abort != null;
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** The last finished turn, for a follow-up. */
function context() {
  if (!controls.state.follow) return [];
  const last = turns.findLast((turn) => turn.answer.dataset.state === "done" && turn.text);
  return last ? [{ role: "user", content: last.question }, { role: "assistant", content: last.text.trim() }] : [];
}

async function ask(question) {
  if (abort || !question) return;
  const { mode, threshold, own } = controls.state;
  const messages = [...context(), { role: "user", content: question }];
  const turn = new Turn(question, mode, threshold, { again: ask });
  abort = new AbortController();
  turns.push(turn);
  log.append(turn.element);
  while (turns.length > TURNS_MAX) turns.shift().element.remove();
  hide();
  ready();
  toEnd();
  const delta = (text, tokens) => {
    const follow = atEnd();
    turn.delta(text, tokens);
    if (turn.pieces > 4) strip.showRate(turn.rate);
    if (follow) toEnd();
  };
  let state = "done";
  let failure = null;
  try {
    await answer(
      { messages, mode, threshold: mode === "auto" && own ? threshold : null, signal: abort.signal },
      { delta, usage: (usage) => turn.usage(usage), finish: (reason) => turn.finish(reason) },
    );
  } catch (error) {
    state = error.name === "AbortError" ? "stopped" : "failed";
    if (state === "failed") failure = error;
  }
  const follow = atEnd();
  abort = null;
  turn.end(state, failure);
  if (follow) toEnd();
  strip.addAnswer(turn);
  controls.addRisks([...turn.tokens.values()]);
  // A failure speaks for itself through its alert.
  if (!failure) say(state === "stopped" ? "Stopped." : `Answer: ${turn.text}`);
  ready();
  refresh();
}

function submit() {
  const question = prompt.value.trim();
  if (abort || !question) return;
  prompt.value = "";
  fit();
  ask(question);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", () => {
  fit();
  ready();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
stop.addEventListener("click", () => {
  abort?.abort();
  prompt.focus();
});
byId("clear").addEventListener("click", () => {
  abort?.abort();
  turns = [];
  log.replaceChildren();
  hide();
  ready();
  prompt.focus();
});
byId("chips").append(...EXAMPLES.map((text) => h("button", { type: "button", onclick: () => ask(text) }, text)));

controls.start({ refresh, say });
ready();
if (matchMedia("(hover: hover)").matches) prompt.focus();
refresh();
