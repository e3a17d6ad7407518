// The card that tells about one token: who decided it, how sure, and why.
import { byId, h, icon, percent, short } from "./dom.js";
import { t } from "./language.js";

const WHO = { edge: ["device", "cardEdge"], verified: ["check", "cardVerified"], cloud: ["cloud", "cardCloud"] };

/** What came of asking, by origin. */
const ASKED = { verified: "cardAgreed", cloud: "cardChose" };
/** The node's reasons in words; where the words differ by origin, an object. */
const WHY = {
  sure: { edge: "whySureEdge", verified: "whySureVerified", cloud: "whySureCloud" },
  risk: "whyRisk",
  entropy: "whyEntropy",
  top1: "whyTop1",
  random: "whyRandom",
  always: "whyAlways",
  never: "whyNever",
  "not-finite": "whyNotFinite",
  auto: { cloud: "whyAuto" },
  exact: { verified: "whyExactVerified", cloud: "whyExactCloud" },
  local: "whyLocal",
  cloud: { cloud: "whyCloud" },
  "cloud-away": "whyAway",
  grammar: "whyGrammar",
};

function why({ reason, origin }) {
  const known = WHY[reason];
  if (typeof known === "string") return t(known) + (ASKED[origin] ? t(ASKED[origin]) : "");
  return known?.[origin] ? t(known[origin]) : t("whyOther", { reason });
}

const card = byId("card");
let shown = null;

/** The piece with its blanks visible. */
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎") || t("cardNothing");

const meter = (part, mark) =>
  h("span", { class: "meter" }, h("i", { "--part": Math.min(1, Math.max(0, part)) }), mark == null ? null : h("u", { "--mark": mark }));

const row = (name, part, text, mark) =>
  h("div", {}, h("dt", {}, name), h("dd", {}, part == null ? h("span") : meter(part, mark), h("b", {}, text)));

function fill(token) {
  const [symbol, who] = WHO[token.origin] ?? ["alert", null];
  const rows = [];
  if (token.logprob != null) rows.push(row(t(token.origin === "edge" ? "probability" : "probabilityCloud"), Math.exp(token.logprob), percent(Math.exp(token.logprob))));
  if (token.edge_top1 != null) rows.push(row(t("bestGuess"), token.edge_top1, percent(token.edge_top1)));
  if (token.risk != null) rows.push(row(t("risk"), token.risk, percent(token.risk), token.threshold));
  // Against ln 16: past sixteen equally likely tokens the device is as good as guessing.
  if (token.edge_entropy != null) rows.push(row(t("entropy"), token.edge_entropy / Math.log(16), `${short(Math.abs(token.edge_entropy) < 0.005 ? 0 : token.edge_entropy)} ${t("nats")}`));
  card.dataset.origin = token.origin;
  card.replaceChildren(
    h("header", {}, h("span", { class: "piece" }, visible(token.text)), h("span", { class: "number" }, t("cardToken", { index: token.index + 1, id: token.id }))),
    h("p", { class: "who" }, icon(symbol), who ? t(who) : token.origin),
    h("dl", {}, ...rows),
    h("p", { class: "why" }, why(token)),
  );
}

function place(span) {
  const boxes = span.getClientRects();
  if (!boxes.length) return hide();
  const at = boxes[0];
  const margin = 12;
  const { offsetWidth: width, offsetHeight: height } = card;
  const left = Math.min(Math.max(at.left + at.width / 2 - width / 2, margin), innerWidth - width - margin);
  const above = at.top - height - 8;
  card.style.left = `${left}px`;
  card.style.top = `${above >= margin ? above : Math.min(at.bottom + 8, innerHeight - height - margin)}px`;
}

function show(span, token) {
  if (shown === span) return;
  hide();
  shown = span;
  fill(token);
  card.hidden = false;
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "card");
  place(span);
}

/** Takes the card away. */
export function hide() {
  if (!shown) return;
  shown.classList.remove("shown");
  shown.removeAttribute("aria-describedby");
  shown = null;
  card.hidden = true;
}

/** Takes the card away if its token is no longer on the page. */
export function hideIfGone() {
  if (shown && !shown.isConnected) hide();
}

/** Makes the tokens inside `text` show their card; `tokens` maps each span to its token. */
export function attach(text, tokens) {
  const find = (event) => {
    const span = event.target.closest?.(".tok");
    return span && tokens.has(span) ? span : null;
  };
  // Moves, not enters: the page scrolling under a resting pointer must not take over from the keyboard.
  text.addEventListener("pointermove", (event) => {
    const span = find(event);
    if (span && event.pointerType === "mouse") show(span, tokens.get(span));
  });
  text.addEventListener("pointerleave", () => shown === document.activeElement || hide());
  text.addEventListener("focusin", (event) => {
    const span = find(event);
    if (span) show(span, tokens.get(span));
  });
  text.addEventListener("focusout", hide);
  // One tab stop per answer: the arrow keys move from token to token.
  text.addEventListener("keydown", (event) => {
    const span = find(event);
    if (!span) return;
    const all = [...text.querySelectorAll(".tok")];
    const here = all.indexOf(span);
    const next = { ArrowRight: here + 1, ArrowDown: here + 1, ArrowLeft: here - 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next == null || !all[next]) return;
    event.preventDefault();
    span.tabIndex = -1;
    all[next].tabIndex = 0;
    all[next].focus();
  });
}

addEventListener("keydown", (event) => event.key === "Escape" && hide());
addEventListener("resize", hide);
document.addEventListener("scroll", () => shown && place(shown), { capture: true, passive: true });
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest?.(".answer .tok")) hide();
});
