// The page: sends questions, shows answers, keeps the strip and the controls up to date.
import { Turn } from "./answer.js";
import { hide } from "./card.js";
import * as controls from "./controls.js";
import { Conversation } from "./conversation.js";
import { byId, h } from "./dom.js";
import { onLanguage, switchLanguage, t } from "./language.js";
import { settings } from "./settings.js";
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
/** Tries of a question whose conversation is too long for the model, each with half of the turns before. */
const TRIES_MAX = 10;
const POLL_MS = 1000;
/** Between tries while the node cannot be reached. */
const POLL_LOST_MS = 3000;

const prompt = byId("prompt");
const send = byId("send");
const stop = byId("stop");
const scroll = byId("scroll");
const conversation = new Conversation({ again: (question) => ask(question) });
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
    const follow = atEnd();
    controls.showStatus(now);
    strip.showStatus(now);
    // Banners and examples that come and go take room from the transcript.
    if (follow) toEnd();
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
  const empty = conversation.turns.length === 0;
  for (const name of ["clear", "export"]) byId(name).disabled = empty;
  document.body.classList.toggle("chatting", !empty);
  byId("empty").hidden = !empty;
  for (const chip of byId("chips").children) chip.disabled = abort != null;
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

/** Asks with the conversation; where that is too long for the model, without its oldest turns. */
async function answered(turn, before, on) {
  const { threshold, own } = controls.state;
  const { temperature, tokens, system, follow } = settings;
  for (let tries = 1; ; tries++) {
    const messages = conversation.messages(turn.question, system, follow, turn.leftOut);
    try {
      return await answer({ messages, mode: turn.mode, threshold: turn.mode === "auto" && own ? threshold : null, temperature, tokens, signal: abort.signal }, on);
    } catch (error) {
      const left = follow ? before - turn.leftOut : 0;
      if (error.code !== "context_length_exceeded" || left < 1 || tries >= TRIES_MAX) throw error;
      turn.leftOut += Math.ceil(left / 2);
    }
  }
}

async function ask(question) {
  if (abort || !question) return;
  const before = conversation.answered().length;
  const turn = new Turn(question, controls.mode(), controls.state.threshold, conversation.actions);
  abort = new AbortController();
  conversation.add(turn);
  hide();
  ready();
  toEnd();
  const delta = (text, tokens) => {
    const follow = atEnd();
    turn.delta(text, tokens);
    if (turn.pieces > 4) strip.showRate(turn.rate);
    if (follow) requestAnimationFrame(toEnd);
  };
  const reasoning = (text) => {
    const follow = atEnd();
    turn.think(text);
    if (follow) requestAnimationFrame(toEnd);
  };
  let state = "done";
  let failure = null;
  try {
    await answered(turn, before, { delta, reasoning, usage: (usage) => turn.usage(usage), finish: (reason) => turn.finish(reason) });
  } catch (error) {
    state = error.name === "AbortError" ? "stopped" : "failed";
    if (state === "failed") failure = error;
  }
  const follow = atEnd();
  abort = null;
  turn.end(state, failure);
  // A conversation that was cleared meanwhile stays so.
  if (conversation.turns.includes(turn)) conversation.save();
  if (follow) toEnd();
  strip.addAnswer(turn);
  controls.addRisks(turn.tokens);
  // A failure speaks for itself through its alert.
  if (!failure) say(state === "stopped" ? t("stopped") : t("spoken", { text: turn.text }));
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
function halt() {
  abort?.abort();
  prompt.focus();
}
stop.addEventListener("click", halt);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && abort && !event.isComposing) halt();
});
byId("clear").addEventListener("click", () => {
  abort?.abort();
  conversation.clear();
  hide();
  ready();
  prompt.focus();
});
byId("export").addEventListener("click", () => conversation.export());
byId("language").addEventListener("click", switchLanguage);
byId("chips").append(...EXAMPLES.map((text) => h("button", { type: "button", onclick: () => ask(text) }, text)));

controls.start({ refresh, say });
conversation.restore();
onLanguage(() => {
  for (const turn of conversation.turns) turn.relabel();
});
ready();
toEnd();
// On a touch screen that would open the keyboard over the page.
if (!matchMedia("(pointer: coarse)").matches) prompt.focus();
refresh();
