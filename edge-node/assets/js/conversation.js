// The conversation: its turns, what of them goes along with a question, and where they are kept.
import { byId, h } from "./dom.js";
import { t } from "./language.js";
import { keep, kept } from "./storage.js";
import { Turn } from "./answer.js";

const NAME = "tandem-conversation";
/** Turns kept; the oldest go first. */
const TURNS_MAX = 200;
/** Most characters kept in the browser, of its five million. */
const KEPT_MAX = 2_000_000;

export class Conversation {
  constructor(actions) {
    this.actions = actions;
    this.turns = [];
    this.log = byId("log");
  }

  /** Brings back what was kept. */
  restore() {
    let all;
    try {
      all = JSON.parse(kept(NAME) ?? "[]");
    } catch {
      return;
    }
    if (!Array.isArray(all)) return;
    for (const one of all.slice(-TURNS_MAX)) {
      if (typeof one?.question === "string") this.add(Turn.restore(one, this.actions));
    }
  }

  add(turn) {
    this.turns.push(turn);
    this.log.append(turn.element);
    while (this.turns.length > TURNS_MAX) this.turns.shift().element.remove();
  }

  clear() {
    this.turns = [];
    this.log.replaceChildren();
    keep(NAME, null);
  }

  /** Keeps the turns; where room is short, first without the tokens of the oldest, then without the oldest. */
  save() {
    const all = this.turns.filter((turn) => turn.state !== "waiting" && turn.text).map((turn) => turn.kept);
    let next = 0;
    for (;;) {
      const text = JSON.stringify(all);
      if (text.length <= KEPT_MAX && keep(NAME, text)) return;
      if (next < all.length - 1) all[next++].tokens = [];
      else if (all.length > 1) all.shift();
      else return;
    }
  }

  /** The messages of a question: what the model should be, the turns before it, the question. */
  messages(question, system, follow, leaveOut = 0) {
    const before = follow ? this.answered().slice(leaveOut) : [];
    return [
      ...(system.trim() ? [{ role: "system", content: system.trim() }] : []),
      ...before.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.text.trim() }]),
      { role: "user", content: question },
    ];
  }

  /** The turns with an answer, also with one that was stopped. */
  answered() {
    return this.turns.filter((turn) => ["done", "stopped"].includes(turn.state) && turn.text.trim());
  }

  /** The conversation as a Markdown file. */
  file() {
    const parts = this.turns.map((turn) => `## ${t("you")}\n\n${turn.question}\n\n## Tandem (${turn.mode})\n\n${turn.text.trim()}\n`);
    return new Blob([parts.join("\n")], { type: "text/markdown" });
  }

  /** Hands the file to the browser. */
  export() {
    const address = URL.createObjectURL(this.file());
    const link = h("a", { href: address, download: `tandem-${new Date().toISOString().slice(0, 16).replace(":", "")}.md` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }
}
