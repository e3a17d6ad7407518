// Mode, threshold, the cloud switch, and the marks that say how the cloud is.
import { byId, count, h, icon, percent } from "./dom.js";
import { control, useKey } from "./stream.js";

const MODES = {
  local: "Local: this device alone, nothing leaves it.",
  auto: "Auto: asks the cloud where this device is unsure.",
  exact: "Exact: word for word what the cloud would write.",
  cloud: "Cloud: the large model writes, this device shows it.",
};

/** Tokens of recent answers in the plot above the slider. */
const RISKS_MAX = 120;

export const state = { mode: "auto", threshold: 0.5, own: false, follow: false, link: "unknown" };

const range = byId("threshold");
// Risks that matter are small: the scale is cubic, half way is 12.5 %.
const along = Math.cbrt;
let policy = 0.5;
let risks = [];
let asked = false;
let refreshNow = () => {};

function store(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Storage can be switched off; the choice then lasts as long as the page.
  }
}

function showMode() {
  const alone = state.link !== "up" && state.link !== "unknown" && (state.mode === "exact" || state.mode === "cloud");
  byId("mode-text").textContent = MODES[state.mode] + (alone ? " The cloud is away now." : "");
  byId("threshold-card").classList.toggle("off", state.mode !== "auto");
}

function showThreshold() {
  const at = state.threshold;
  range.value = along(at);
  range.style.setProperty("--at", along(at));
  range.setAttribute("aria-valuetext", percent(at));
  byId("threshold-value").textContent = percent(at);
  byId("threshold-reset").hidden = !state.own;
  const over = risks.filter((risk) => risk > at).length;
  const effect = at >= 1 ? "Never asks the cloud." : at <= 0 ? "Asks the cloud at every token with any risk at all." : `Asks the cloud when the risk of keeping the device’s token is above ${percent(at)}.`;
  const last = risks.length ? ` ${over} of the last ${count(risks.length, "token")} ${over === 1 ? "was" : "were"} above this.` : "";
  byId("threshold-text").textContent = effect + last + (state.mode === "auto" ? "" : " Counts in mode auto only.");
  byId("risk-plot").replaceChildren(
    ...(risks.length ? risks.map((risk) => h("i", { class: risk > at ? "over" : false, "--risk": along(Math.min(1, Math.max(0, risk))) })) : [h("span", { class: "none" }, "the risk of each token shows here")]),
  );
}

/** Adds the risks of a finished answer to the plot. */
export function addRisks(tokens) {
  risks = [...risks, ...tokens.map((token) => token.risk).filter((risk) => risk != null)].slice(-RISKS_MAX);
  showThreshold();
}

/** The field for the API key of a node that asks for one. */
function keyForm() {
  const field = h("input", { type: "password", name: "key", autocomplete: "off", "aria-label": "API key", required: true });
  const form = h("form", { class: "key-form" }, field, h("button", { type: "submit" }, "Use"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(field.value.trim());
    field.value = "";
    refreshNow();
  });
  return form;
}

function setLink(link) {
  state.link = link;
  byId("pill").dataset.link = link;
  byId("wire").dataset.link = link;
  byId("pill-text").textContent = { up: "Cloud on", cut: "Cut off", away: "Cloud away", lost: "Node lost", key: "Locked", unknown: "connecting" }[link];
  const banner = byId("banner");
  const text = {
    cut: "The cloud is cut off. Answers come from this device alone.",
    away: "The cloud is away. Answers come from this device alone until it is back.",
    key: "This node asks for its API key.",
    lost: "This page has lost its node. Is it still running? Trying again…",
  }[link];
  if (banner.dataset.kind !== link) {
    banner.dataset.kind = link;
    banner.hidden = !text;
    banner.replaceChildren(...(text ? [icon("alert"), h("span", {}, text), link === "key" ? keyForm() : null].filter(Boolean) : []));
  }
  showMode();
}

/** Shows the node's status; `null` when there is none, with the Failure that says why. */
export function showStatus(status, failure) {
  const cut = byId("cut");
  if (!status) {
    cut.disabled = true;
    return setLink(failure?.status === 401 ? "key" : "lost");
  }
  cut.disabled = asked;
  if (!asked) {
    cut.setAttribute("aria-checked", String(!status.cut));
    byId("cut-label").textContent = status.cut ? "Cloud cut off" : status.cloud_problem ? "Cloud cannot take part" : status.cloud_connected ? "Cloud connected" : "Waiting for the cloud";
    byId("cut-text").textContent = status.cloud_problem ? status.cloud_problem : status.cut ? "Switch it on to let the cloud back." : "Switch it off to pull the plug: answers then come from this device alone.";
  }
  byId("pair").textContent = status.cloud_model ? `${status.edge_model} + ${status.cloud_model}` : status.edge_model;
  policy = status.threshold;
  if (!state.own && Math.abs(policy - state.threshold) > 1e-6) {
    state.threshold = policy;
    showThreshold();
  }
  setLink(status.cut ? "cut" : status.cloud_connected ? "up" : "away");
}

/** Wires the controls up. `refresh` fetches the status anew; `say` tells screen readers. */
export function start({ refresh, say }) {
  refreshNow = refresh;
  try {
    const kept = localStorage.getItem("tandem-mode");
    if (kept in MODES) state.mode = kept;
  } catch {
    // As above.
  }
  for (const input of document.querySelectorAll('input[name="mode"]')) {
    input.checked = input.value === state.mode;
    input.addEventListener("change", () => {
      state.mode = input.value;
      store("tandem-mode", state.mode);
      showMode();
      showThreshold();
    });
  }
  range.addEventListener("input", () => {
    state.threshold = Number(range.value) ** 3;
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
  const follow = byId("follow");
  follow.addEventListener("click", () => {
    state.follow = !state.follow;
    follow.setAttribute("aria-checked", String(state.follow));
    byId("follow-text").textContent = state.follow
      ? "On: the last question and its answer go along, for “And what is its currency?”"
      : "Off: each question stands alone. The demo pair knows single questions and short follow-ups.";
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
  showMode();
  showThreshold();
}
