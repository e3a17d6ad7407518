// One turn of the conversation: the question, its answer, and what it took.
import { bytes, h, icon, short } from "./dom.js";
import { t } from "./language.js";
import { Text, copyButton } from "./transcript.js";

/** What is kept of a token, in this order. */
const KEPT = ["text", "origin", "index", "id", "logprob", "risk", "edge_top1", "edge_entropy", "reason", "threshold"];

export class Turn {
  /** `actions`: `again(question)`, run by the buttons under the answer. */
  constructor(question, mode, threshold, actions) {
    this.question = question;
    this.mode = mode;
    this.threshold = mode === "auto" ? threshold : null;
    this.actions = actions;
    this.shown = new Text();
    this.thought = "";
    this.pieces = 0;
    this.leftOut = 0;
    this.sent = performance.now();
    this.first = null;
    this.last = null;
    this.state = "waiting";
    this.facts = h("div", { class: "facts" });
    this.answer = h("div", { class: "answer", "data-state": "waiting", "data-mode": mode, "aria-busy": "true" }, this.shown.element, this.facts);
    this.reasoning = h("details", { class: "reasoning", hidden: true }, h("summary", {}, t("reasoning")), h("div", {}));
    this.answer.prepend(this.reasoning);
    this.element = h("article", { class: "turn" }, h("p", { class: "question" }, question), this.answer);
  }

  /** The turn as it is kept. */
  get kept() {
    const tokens = this.tokens.map((token) => KEPT.map((name) => token[name] ?? null));
    const { question, mode, threshold, state, reason, text, route, completion, pieces, leftOut, thought } = this;
    return { question, mode, threshold, state, reason, text, tokens, route, completion, pieces, leftOut, thought, took: [this.ttft, this.last == null ? null : this.last - this.sent] };
  }

  /** A turn that was kept. */
  static restore(kept, actions) {
    const turn = new Turn(String(kept.question), String(kept.mode), kept.threshold, actions);
    const tokens = (kept.tokens ?? []).map((values) => Object.fromEntries(KEPT.map((name, at) => [name, values[at]]).filter(([, value]) => value != null)));
    // Tokens may have been dropped to save room; the text never is.
    const spelt = tokens.map((token) => token.text).join("");
    if (tokens.length && spelt === kept.text) turn.shown.add(spelt, tokens);
    else turn.shown.add(String(kept.text ?? ""), []);
    if (kept.thought) turn.think(String(kept.thought));
    turn.first = turn.last = null;
    turn.pieces = kept.pieces ?? tokens.length;
    turn.route = kept.route ?? null;
    turn.completion = kept.completion;
    turn.reason = kept.reason;
    turn.leftOut = kept.leftOut ?? 0;
    const [first, last] = kept.took ?? [];
    if (first != null) turn.first = turn.sent + first;
    if (last != null) turn.last = turn.sent + last;
    turn.end(kept.state === "done" ? "done" : "stopped");
    return turn;
  }

  get text() {
    return this.shown.source;
  }

  get tokens() {
    return this.shown.tokens.map(({ token }) => token);
  }

  /** Appends a piece of the answer with the tokens it is made of. */
  delta(text, tokens) {
    this.last = performance.now();
    this.first ??= this.last;
    this.answer.dataset.state = "streaming";
    this.pieces += Math.max(1, tokens.length);
    this.shown.add(text, tokens.map((token) => ({ ...token, threshold: this.threshold })));
  }

  /** Appends to what the model says to itself before it answers. */
  think(text) {
    this.last = performance.now();
    this.first ??= this.last;
    this.answer.dataset.state = "streaming";
    this.thought += text;
    this.reasoning.hidden = false;
    this.reasoning.lastChild.append(text);
  }

  usage(usage) {
    this.route = usage.tandem ?? null;
    this.completion = usage.completion_tokens ?? this.pieces;
  }

  finish(reason) {
    this.reason = reason;
  }

  /** Milliseconds to the first piece, if there was one. */
  get ttft() {
    return this.first == null ? null : this.first - this.sent;
  }

  /** Tokens per second: between first and last piece where they differ, else over the whole wait. */
  get rate() {
    const n = this.completion ?? this.pieces;
    if (this.first == null || this.last == null || n < 1) return null;
    const span = this.last - this.first;
    return span > 2 && n > 1 ? ((n - 1) * 1000) / span : (n * 1000) / Math.max(1, this.last - this.sent);
  }

  /** Ends the answer: `state` is done, stopped or failed. */
  end(state, failure) {
    this.state = state;
    this.shown.draw();
    this.answer.dataset.state = state;
    this.answer.setAttribute("aria-busy", "false");
    if (failure) this.fail(failure);
    this.relabel();
  }

  fail(failure) {
    const words = failure.message.charAt(0).toUpperCase() + failure.message.slice(1);
    const hint = failure.wait ? t("tryAgain", Math.ceil(failure.wait)) : "";
    this.answer.append(
      h("div", { class: "failure", role: "alert" }, icon("alert"), h("span", {}, words + hint), h("button", { type: "button", onclick: () => this.actions.again(this.question) }, t("retry"))),
    );
  }

  /** Writes the line under the answer, in the page's present language. */
  relabel() {
    this.reasoning.firstChild.textContent = t("reasoning");
    if (this.state === "waiting" || (this.state === "failed" && !this.text)) return;
    const { route } = this;
    const took = h("div", { class: "took" });
    const parts = [];
    if (route) {
      const { edge_tokens: edge = 0, accepted: verified = 0, cloud_tokens: cloud = 0 } = route;
      const shares = Object.entries({ edge, verified, cloud }).filter(([, n]) => n);
      took.append(h("span", { class: "bar", "aria-hidden": "true" }, ...shares.map(([name, n]) => h("i", { class: name, "--n": n }))));
      // The first count says what is counted.
      const name = { edge: t("edge"), verified: t("verified"), cloud: t("cloudTag") };
      shares.forEach(([who, n], at) => parts.push(`${at === 0 ? t("tokens", n) : n.toLocaleString("en")} ${name[who]}`));
      if (route.cached_tokens) parts.push(t("reused", route.cached_tokens.toLocaleString("en")));
      if (route.rolled_back) parts.push(t("rolledBack", route.rolled_back));
      parts.push(t("roundTrips", route.round_trips ?? 0));
      parts.push(bytes((route.bytes_up ?? 0) + (route.bytes_down ?? 0)).join(" "));
    } else if (this.pieces) {
      parts.push(t("tokens", this.pieces));
    }
    if (this.rate != null) parts.push(`${short(this.rate)} ${t("perSecond")}`);
    if (this.ttft != null) parts.push(`ttft ${short(this.ttft)} ms`);
    took.append(h("span", { class: "tag" }, t(this.mode)?.toLowerCase() ?? this.mode));
    if (this.state === "stopped") took.append(h("span", { class: "tag" }, t("stoppedTag")));
    if (this.reason === "length") took.append(h("span", { class: "tag" }, t("lengthTag")));
    if (this.leftOut) took.append(h("span", { class: "tag left-out" }, t("leftOutTag", this.leftOut)));
    took.append(h("span", { class: "figures" }, parts.join(" · ")));
    if (route?.degraded) {
      took.append(h("span", { class: "tag degraded" }, icon("alert"), t("degraded", { why: route.degraded_reason ?? t("cloudWasAway") })));
    }
    const again = h("button", { type: "button", "aria-label": t("again"), title: t("again"), onclick: () => this.actions.again(this.question) }, icon("again"));
    const copy = copyButton("copy", () => this.text, this.shown.element);
    this.facts.replaceChildren(took, h("span", { class: "actions" }, again, copy));
  }
}
