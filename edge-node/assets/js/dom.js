// Building elements and writing figures.

/** An element with attributes and children; text children are never read as markup. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of an SVG drawing. */
export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A symbol of the page's sprite. */
export const icon = (name) => s("svg", { "aria-hidden": "true" }, s("use", { href: `#i-${name}` }));

export const byId = (id) => document.getElementById(id);

/** [number, unit] of a count of bytes. */
export function bytes(count) {
  if (count < 1000) return [String(count), "B"];
  if (count < 1e6) return [short(count / 1e3), "kB"];
  return count < 1e9 ? [short(count / 1e6), "MB"] : [short(count / 1e9), "GB"];
}

/** Three significant digits, no exponent. */
export function short(value) {
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** A probability as a percentage that never shows 0 or 100 unless it is. */
export function percent(part) {
  if (part <= 0) return "0 %";
  if (part >= 1) return "100 %";
  if (part < 0.001) return "< 0.1 %";
  if (part > 0.999) return "> 99.9 %";
  return `${(part * 100).toFixed(1)} %`;
}
