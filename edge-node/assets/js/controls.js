// Mode, threshold, the cloud switch, and the marks that say how the cloud is.
import { byId, h, icon, percent } from "./dom.js";
import { onLanguage, t } from "./language.js";
import { keep, kept } from "./storage.js";
import { control, useKey } from "./stream.js";

const MODES = { local: "modeLocal", auto: "modeAuto", exact: "modeExact", cloud: "modeCloud" };

/** The embedded model of the edge. */
const DEMO = "demo-edge";
/** Tokens of recent answers in the plot above the slider. */
const RISKS_MAX = 120;

/** Words of the mark in the header, by how the cloud is. */
const PILLS = { up: "pillUp", cut: "pillCut", away: "pillAway", failed: "pillFailed", alone: "pillAlone", lost: "pillLost", key: "pillKey", unknown: "pillUnknown" };
/** Words of the banner. A node that was started without a cloud needs none. */
const BANNERS = { cut: "bannerCut", away: "bannerAway", failed: "bannerFailed", lost: "bannerLost", key: "bannerKey" };

export const state = { mode: "auto", threshold: 0.5, own: false, link: "unknown" };

const range = byId("threshold");
// What the policy scores in: a probability, or nats of the entropy baseline up to `most`.
let unit = { name: "probability", most: 1 };
const amount = (score) => (unit.name === "nats" ? `${score.toFixed(2)} nats` : percent(score));
// Scores that matter are small: the scale is cubic, half way is 12.5 %.
const along = (score) => Math.cbrt(Math.min(1, Math.max(0, score / unit.most)));
let policy = 0.5;
let risks = [];
let asked = false;
let refreshNow = () => {};

/** The mode of the next answer: the chosen one where it can be had. */
export const mode = () => (state.link === "alone" ? "local" : state.mode);

function showMode() {
  const away = ["cut", "away", "failed", "lost"].includes(state.link) && (state.mode === "exact" || state.mode === "cloud");
  byId("mode-text").textContent = t(MODES[mode()]) + (away ? t("modeAway") : "");
  byId("threshold-card").classList.toggle("off", mode() !== "auto");
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.disabled = state.link === "alone" && input.value !== "local";
    input.checked = input.value === mode();
  }
}

function showThreshold() {
  const at = state.threshold;
  range.value = along(at);
  range.style.setProperty("--at", along(at));
  range.setAttribute("aria-valuetext", amount(at));
  byId("threshold-value").textContent = amount(at);
  byId("threshold-reset").hidden = !state.own;
  const over = risks.filter((risk) => risk > at).length;
  const effect = at >= unit.most ? t("thresholdNever") : at <= 0 ? t("thresholdAlways") : t("thresholdAbove", { at: amount(at) });
  const last = risks.length ? t("thresholdLast", { over, all: risks.length }) : "";
  byId("threshold-text").textContent = effect + last + (mode() === "auto" ? "" : t("thresholdAutoOnly"));
  byId("risk-plot").replaceChildren(
    ...(risks.length ? risks.map((risk) => h("i", { class: risk > at ? "over" : false, "--risk": along(risk) })) : [h("span", { class: "none" }, t("riskHere"))]),
  );
}

/** Adds the risks of a finished answer to the plot. */
export function addRisks(tokens) {
  risks = [...risks, ...tokens.map((token) => token.risk).filter((risk) => risk != null)].slice(-RISKS_MAX);
  showThreshold();
}

/** The field for the API key of a node that asks for one. */
function keyForm() {
  const field = h("input", { type: "password", name: "key", autocomplete: "off", "aria-label": t("apiKey"), required: true });
  const form = h("form", { class: "key-form" }, field, h("button", { type: "submit" }, t("use")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(field.value.trim());
    field.value = "";
    refreshNow();
  });
  return form;
}

function setLink(link, cloud = {}) {
  state.link = link;
  byId("pill").dataset.link = link;
  byId("wire").dataset.link = link;
  byId("pill-text").textContent = t(PILLS[link]);
  document.body.classList.toggle("alone", link === "alone");
  byId("empty-title").textContent = t(link === "alone" ? "emptyAloneTitle" : "emptyTitle");
  byId("empty-text").textContent = t(link === "alone" ? "emptyAloneText" : "emptyText");
  const banner = byId("banner");
  // The node's own words, in its language: what is wrong, and what to do.
  const says = ["away", "failed"].includes(link) ? [cloud.problem, cloud.what_to_do].filter(Boolean) : [];
  const shows = [link, document.documentElement.lang, ...says].join("|");
  if (banner.dataset.shows !== shows) {
    banner.dataset.shows = shows;
    banner.dataset.kind = link;
    const words = BANNERS[link] && t(BANNERS[link]);
    banner.hidden = !words;
    const [problem, advice] = says;
    banner.replaceChildren(
      ...[
        words && icon("alert"),
        words && h("div", {}, h("p", {}, words), problem && h("p", { class: "problem" }, problem), advice && h("p", { class: "advice" }, h("b", {}, t("whatToDo")), " ", advice)),
        link === "key" && keyForm(),
      ].filter(Boolean),
    );
  }
  showMode();
}

/** How the cloud is, in one word of this page. */
function linkOf({ cloud, cut, cloud_connected: connected }) {
  if (cut) return "cut";
  return { none: "alone", connected: "up", failed: "failed" }[cloud?.state] ?? (connected ? "up" : "away");
}

let latest = [null, null];

/** Shows the node's status; `null` when there is none, with the Failure that says why. */
export function showStatus(status, failure) {
  latest = [status, failure];
  const cut = byId("cut");
  if (!status) {
    cut.disabled = true;
    return setLink(failure?.status === 401 ? "key" : "lost");
  }
  const link = linkOf(status);
  cut.disabled = asked;
  cut.hidden = link === "alone";
  if (!asked) {
    cut.setAttribute("aria-checked", String(!status.cut));
    byId("cut-label").textContent = t({ cut: "cutSwitchOff", failed: "cutSwitchFailed", up: "cutSwitchOn" }[link] ?? "cutSwitchWaiting");
    byId("cut-text").textContent = link === "failed" && status.cloud_problem ? status.cloud_problem : t({ cut: "cutTextOff", alone: "aloneText" }[link] ?? "cutText");
  }
  byId("pair").textContent = status.cloud_model ? `${status.edge_model} + ${status.cloud_model}` : status.edge_model;
  // The examples are of what the embedded models were trained on.
  byId("chips").hidden = status.edge_model !== DEMO;
  policy = status.threshold;
  const next = { name: status.threshold_unit || "probability", most: status.threshold_max || 1 };
  if (next.name !== unit.name) {
    // A threshold of one's own was in the other unit.
    unit = next;
    risks = [];
    state.own = false;
    state.threshold = policy;
    showThreshold();
  }
  if (!state.own && Math.abs(policy - state.threshold) > 1e-6) {
    state.threshold = policy;
    showThreshold();
  }
  setLink(link, status.cloud);
}

/** Wires the controls up. `refresh` fetches the status anew; `say` tells screen readers. */
export function start({ refresh, say }) {
  refreshNow = refresh;
  const known = kept("tandem-mode");
  if (Object.hasOwn(MODES, known ?? "")) state.mode = known;
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.addEventListener("change", () => {
      state.mode = input.value;
      keep("tandem-mode", state.mode);
      showMode();
      showThreshold();
    });
  }
  range.addEventListener("input", () => {
    state.threshold = Number(range.value) ** 3 * unit.most;
    state.own = true;
    showThreshold();
  });
  byId("threshold-reset").addEventListener("click", () => {
    state.own = false;
    state.threshold = policy;
    showThreshold();
    range.focus();
  });
  const cut = byId("cut");
  cut.addEventListener("click", async () => {
    const wanted = cut.getAttribute("aria-checked") === "true";
    cut.setAttribute("aria-checked", String(!wanted));
    cut.disabled = asked = true;
    try {
      await control({ cut: wanted });
    } catch (error) {
      cut.setAttribute("aria-checked", String(wanted));
      say(error.message);
    }
    asked = false;
    await refresh();
    cut.focus();
  });
  const panel = byId("panel");
  const toggle = byId("panel-toggle");
  const open = (wanted) => {
    panel.classList.toggle("open", wanted);
    toggle.setAttribute("aria-expanded", String(wanted));
  };
  toggle.addEventListener("click", () => open(!panel.classList.contains("open")));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel.classList.contains("open")) {
      open(false);
      toggle.focus();
    }
  });
  document.addEventListener("pointerdown", (event) => {
    if (!panel.contains(event.target) && !toggle.contains(event.target)) open(false);
  });
  onLanguage(() => {
    if (latest[0] || latest[1]) showStatus(...latest);
    else setLink("unknown");
    showThreshold();
  });
  setLink("unknown");
  showThreshold();
}
