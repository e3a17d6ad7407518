// What goes along with every question, and how answers are shown.
import { byId } from "./dom.js";
import { onLanguage, t } from "./language.js";
import { keep, kept } from "./storage.js";

const NAME = "tandem-settings";
const TEMPERATURE_MAX = 2;
const TOKENS_MAX = 1_000_000;

export const settings = { system: "", temperature: 0, tokens: null, tints: true, follow: true };

function load() {
  try {
    const known = JSON.parse(kept(NAME) ?? "{}");
    for (const name of Object.keys(settings)) if (name in known) settings[name] = known[name];
  } catch {
    // Not ours: the defaults hold.
  }
  if (typeof settings.system !== "string") settings.system = "";
  if (!(settings.temperature >= 0 && settings.temperature <= TEMPERATURE_MAX)) settings.temperature = 0;
  if (!Number.isInteger(settings.tokens) || settings.tokens < 1) settings.tokens = null;
}

function change(changes) {
  Object.assign(settings, changes);
  keep(NAME, JSON.stringify(settings));
  show();
}

function show() {
  byId("tints").setAttribute("aria-checked", String(settings.tints));
  document.body.classList.toggle("untinted", !settings.tints);
  byId("follow").setAttribute("aria-checked", String(settings.follow));
  byId("follow-text").textContent = t(settings.follow ? "followOn" : "followOff");
  byId("temperature-value").textContent = settings.temperature.toFixed(1);
  byId("temperature").style.setProperty("--at", settings.temperature / TEMPERATURE_MAX);
}

load();
byId("system").value = settings.system;
byId("temperature").value = settings.temperature;
byId("tokens").value = settings.tokens ?? "";
byId("system").addEventListener("input", (event) => change({ system: event.target.value }));
byId("temperature").addEventListener("input", (event) => change({ temperature: Number(event.target.value) }));
byId("tokens").addEventListener("input", (event) => {
  const n = Math.min(Number.parseInt(event.target.value, 10), TOKENS_MAX);
  change({ tokens: n >= 1 ? n : null });
});
for (const name of ["tints", "follow"]) byId(name).addEventListener("click", () => change({ [name]: !settings[name] }));
onLanguage(show);
show();
