// The live strip: five figures, each with a small line of its recent past.
import { byId, bytes, h, percent, s, short } from "./dom.js";
import { t } from "./language.js";

/** Points kept per line. */
const POINTS_MAX = 40;

const tiles = new Map([...byId("strip").children].map((tile) => [tile.dataset.figure, { tile, past: [] }]));

function set(name, value, unit, note) {
  const { tile } = tiles.get(name);
  const figure = tile.querySelector("dd");
  figure.replaceChildren(value, unit ? h("span", { class: "unit" }, unit) : "");
  if (note) tile.querySelector("small").textContent = note;
}

function push(name, value) {
  const { tile, past } = tiles.get(name);
  past.push(value);
  if (past.length > POINTS_MAX) past.shift();
  draw(tile.querySelector(".spark"), past);
}

function draw(svg, past) {
  if (past.length < 2) return;
  const width = 64;
  const height = 24;
  const top = Math.max(...past, 1e-9) * 1.15;
  const at = past.map((value, i) => [(i / (past.length - 1)) * (width - 3), height - 2 - (value / top) * (height - 4)]);
  const line = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  const [x, y] = at.at(-1);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    s("path", { class: "area", d: `${line}L${x.toFixed(1)} ${height}L0 ${height}Z` }),
    s("path", { d: line }),
    s("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 2 }),
  );
}

/** Shows the node's status. */
export function showStatus(status) {
  if (status.cloud_connected && status.rtt_ms != null) {
    set("rtt", short(status.rtt_ms), "ms", t("toTheCloud"));
    push("rtt", status.rtt_ms);
  } else {
    set("rtt", "–", "", t(status.cut ? "cutOffShort" : status.cloud_connected ? "notMeasured" : "noCloud"));
  }
  const { totals } = status;
  set("trips", totals.round_trips.toLocaleString("en"), "", t("inAnswers", status.answers));
  const [size, unit] = bytes(totals.bytes_up + totals.bytes_down);
  set("bytes", size, unit, `↑ ${bytes(totals.bytes_up).join(" ")}  ↓ ${bytes(totals.bytes_down).join(" ")}`);
  const all = totals.edge_tokens + totals.accepted + totals.cloud_tokens;
  set("share", all ? percent(totals.cloud_tokens / all).replace(" %", "") : "–", all ? "%" : "", all ? t("ofTokens", all) : t("ofAllTokens"));
  if (status.tokens_per_s != null) set("rate", short(status.tokens_per_s), "", t("lastAnswer"));
}

/** The rate of the answer under way. */
export function showRate(rate) {
  set("rate", short(rate), "", t("rightNow"));
}

/** Adds a finished answer to the lines. */
export function addAnswer(turn) {
  if (turn.rate != null) {
    set("rate", short(turn.rate), "", t("lastAnswer"));
    push("rate", turn.rate);
  }
  if (!turn.route) return;
  const { edge_tokens: edge = 0, accepted = 0, cloud_tokens: cloud = 0, round_trips = 0, bytes_up = 0, bytes_down = 0 } = turn.route;
  push("trips", round_trips);
  push("bytes", bytes_up + bytes_down);
  if (edge + accepted + cloud) push("share", cloud / (edge + accepted + cloud));
}
