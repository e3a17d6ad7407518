// One turn of the transcript: the question, its answer token by token, and what it took.
import { attach } from "./card.js";
import { bytes, count, h, icon, short } from "./dom.js";

export class Turn {
  /** `actions`: `again(question)`, run by the buttons under the answer. */
  constructor(question, mode, threshold, actions) {
    this.question = question;
    this.mode = mode;
    this.threshold = mode === "auto" ? threshold : null;
    this.actions = actions;
    this.tokens = new Map();
    this.text = "";
    this.pieces = 0;
    this.sent = performance.now();
    this.first = null;
    this.last = null;
    this.body = h("div", { class: "answer-text" });
    this.facts = h("div", { class: "facts" });
    this.answer = h("div", { class: "answer", "data-state": "waiting", "data-mode": mode, "aria-busy": "true" }, this.body, this.facts);
    this.element = h("article", { class: "turn" }, h("p", { class: "question" }, question), this.answer);
    attach(this.body, this.tokens);
  }

  /** Appends a piece of the answer with the tokens it is made of. */
  delta(text, tokens) {
    this.last = performance.now();
    this.first ??= this.last;
    this.answer.dataset.state = "streaming";
    this.text += text;
    this.pieces += Math.max(1, tokens.length);
    // Where the tokens' own texts do not add up (a stop string, a character cut in two), the content counts.
    const whole = tokens.map((token) => token.text ?? "").join("") === text;
    tokens.forEach((token, at) => {
      const piece = whole ? token.text : at === tokens.length - 1 ? text : "";
      if (!piece) return;
      const span = h("span", { class: "tok", "data-origin": token.origin, "data-index": token.index, tabindex: this.tokens.size ? "-1" : "0" }, piece);
      this.tokens.set(span, { ...token, text: piece, threshold: this.threshold });
      this.body.append(span);
      // Long JSON has no blanks to break lines at.
      if (/[,:;]$/.test(piece)) this.body.append(h("wbr"));
    });
    if (!tokens.length && text) this.body.append(h("span", {}, text));
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
    if (this.first == null || n < 1) return null;
    const span = this.last - this.first;
    return span > 2 && n > 1 ? ((n - 1) * 1000) / span : (n * 1000) / Math.max(1, this.last - this.sent);
  }

  /** Ends the answer: `state` is done, stopped or failed. */
  end(state, failure) {
    this.answer.dataset.state = state;
    this.answer.setAttribute("aria-busy", "false");
    if (failure) this.fail(failure);
    if (state !== "failed" || this.text) this.summarise(state);
  }

  fail(failure) {
    const words = failure.message.charAt(0).toUpperCase() + failure.message.slice(1);
    const hint = failure.wait ? ` (try again in ${count(Math.ceil(failure.wait), "second")})` : "";
    this.answer.append(
      h("div", { class: "failure", role: "alert" }, icon("alert"), h("span", {}, words + hint), h("button", { type: "button", onclick: () => this.actions.again(this.question) }, "Retry")),
    );
  }

  summarise(state) {
    const { route } = this;
    const took = h("div", { class: "took" });
    const parts = [];
    if (route) {
      const { edge_tokens: edge = 0, accepted: verified = 0, cloud_tokens: cloud = 0 } = route;
      const shares = Object.entries({ edge, verified, cloud }).filter(([, n]) => n);
      took.append(h("span", { class: "bar", "aria-hidden": "true" }, ...shares.map(([name, n]) => h("i", { class: name, "--n": n }))));
      // The first count says what is counted.
      shares.forEach(([name, n], at) => parts.push(at === 0 ? `${count(n, "token")} ${name}` : `${n.toLocaleString("en")} ${name}`));
      if (route.rolled_back) parts.push(`${route.rolled_back} rolled back`);
      parts.push(count(route.round_trips ?? 0, "round trip"));
      parts.push(bytes((route.bytes_up ?? 0) + (route.bytes_down ?? 0)).join(" "));
    } else if (this.pieces) {
      parts.push(count(this.pieces, "token"));
    }
    if (this.rate != null) parts.push(`${short(this.rate)} tok/s`);
    if (this.ttft != null) parts.push(`ttft ${short(this.ttft)} ms`);
    took.append(h("span", { class: "tag" }, this.mode));
    if (state === "stopped") took.append(h("span", { class: "tag" }, "stopped"));
    if (this.reason === "length") took.append(h("span", { class: "tag" }, "length limit"));
    took.append(h("span", { class: "figures" }, parts.join(" · ")));
    if (route?.degraded) {
      took.append(h("span", { class: "tag degraded" }, icon("alert"), `degraded: ${route.degraded_reason ?? "the cloud was away"}`));
    }
    this.facts.append(took, this.buttons());
  }

  buttons() {
    const copy = h("button", { type: "button", "aria-label": "Copy the answer", title: "Copy the answer" }, icon("copy"));
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(this.text);
        copy.replaceChildren(icon("check"));
        setTimeout(() => copy.replaceChildren(icon("copy")), 1500);
      } catch {
        getSelection().selectAllChildren(this.body); // no clipboard outside secure contexts: leave it selected
      }
    });
    const again = h("button", { type: "button", "aria-label": "Ask again with the present settings", title: "Ask again with the present settings", onclick: () => this.actions.again(this.question) }, icon("again"));
    return h("span", { class: "actions" }, again, copy);
  }
}
