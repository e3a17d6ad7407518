// An answer's text on the page: Markdown, with every piece tinted by the token it comes from.
import { attach, hideIfGone } from "./card.js";
import { h, icon } from "./dom.js";
import { t } from "./language.js";
import { blocks } from "./markdown.js";

export class Text {
  constructor() {
    this.source = "";
    /** Tokens in order: where each begins and ends in the source. */
    this.tokens = [];
    this.known = new WeakMap();
    this.element = h("div", { class: "answer-text" });
    this.shown = [];
    this.waiting = false;
    attach(this.element, this.known);
  }

  /** Appends a piece with the tokens it is made of. */
  add(text, tokens) {
    // Where the tokens' own texts do not add up (a stop string, a character cut in two), the content counts.
    const whole = tokens.map((token) => token.text ?? "").join("") === text;
    tokens.forEach((token, at) => {
      const piece = whole ? (token.text ?? "") : at === tokens.length - 1 ? text : "";
      if (!piece) return;
      this.tokens.push({ token: { ...token, text: piece }, from: this.source.length, to: this.source.length + piece.length });
      this.source += piece;
    });
    if (!tokens.length) this.source += text;
    // One drawing per frame, however fast tokens come.
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => this.waiting && this.draw());
  }

  /** Draws what has changed: blocks that read as before stay. */
  draw() {
    this.waiting = false;
    const leaf = (from, to) => this.pieces(from, to);
    const next = blocks(this.source);
    let same = 0;
    const reads = (block) => this.source.slice(block.from, block.to);
    while (same < Math.min(next.length, this.shown.length) && this.shown[same].from === next[same].from && this.shown[same].text === reads(next[same])) same++;
    for (const old of this.shown.splice(same)) old.node.remove();
    for (const block of next.slice(same)) {
      const node = block.build(leaf);
      for (const figure of [node, ...node.querySelectorAll("figure.code")]) if (figure.matches("figure.code")) figure.prepend(this.codeHead(figure));
      this.element.append(node);
      this.shown.push({ from: block.from, text: reads(block), node });
    }
    if (!this.element.querySelector('.tok[tabindex="0"]')) this.element.querySelector(".tok")?.setAttribute("tabindex", "0");
    hideIfGone();
  }

  codeHead(figure) {
    const copy = copyButton("copyCode", () => figure.querySelector("code").textContent, figure.querySelector("pre"));
    return h("figcaption", {}, h("span", {}, figure.dataset.language ?? ""), copy);
  }

  /** Nodes of a part of the source, cut where tokens meet. */
  pieces(from, to) {
    const nodes = [];
    let low = 0;
    let high = this.tokens.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.tokens[middle].to <= from) low = middle + 1;
      else high = middle;
    }
    let at = from;
    for (; low < this.tokens.length && this.tokens[low].from < to; low++) {
      const { token, from: begin, to: end } = this.tokens[low];
      if (begin > at) nodes.push(h("span", {}, this.source.slice(at, begin)));
      const piece = this.source.slice(Math.max(at, begin), Math.min(to, end));
      const span = h("span", { class: "tok", "data-origin": token.origin, "data-index": token.index, tabindex: "-1" }, piece);
      this.known.set(span, token);
      nodes.push(span);
      // Long JSON has no blanks to break lines at.
      if (/[,:;]$/.test(piece)) nodes.push(h("wbr"));
      at = Math.min(to, end);
    }
    if (at < to) nodes.push(h("span", {}, this.source.slice(at, to)));
    return nodes;
  }
}

/** A button that copies `text()`; without a clipboard it leaves `element` selected. */
export function copyButton(name, text, element) {
  const copy = h("button", { type: "button", "aria-label": t(name), title: t(name) }, icon("copy"));
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      copy.replaceChildren(icon("check"));
      setTimeout(() => copy.replaceChildren(icon("copy")), 1500);
    } catch {
      getSelection().selectAllChildren(element);
    }
  });
  return copy;
}
