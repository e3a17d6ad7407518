// Markdown as elements. The text of a model is never read as markup: every element is built by name, and
// every piece of text goes through `leaf(from, to)`, which makes nodes of that part of the source.
import { h } from "./dom.js";

/** Deepest nesting of quotes, lists and emphasis; below it, text stays as it is written. */
const DEPTH_MAX = 8;
/** Longest link, and most cells of a line that are a table's. */
const LINK_MAX = 2000;
const CELLS_MAX = 64;

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,3}[.)])( +)(?=\S)/;
const DELIMITERS = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;
const ADDRESS = /^(?:https?:|mailto:)/i;

/** The lines of a source, each with the place where it begins. */
function linesOf(source) {
  let at = 0;
  return source.split("\n").map((text) => {
    const line = { text, at };
    at += text.length + 1;
    return line;
  });
}

const cut = (line, n) => ({ text: line.text.slice(n), at: line.at + Math.min(n, line.text.length) });
const blank = (line) => line.text.trim() === "";
const begins = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line.text));

/** The blocks of a source: `{ from, to, build(leaf) }`, in order and without gaps that hold text. */
export function blocks(source) {
  return parse(linesOf(source), 0);
}

function parse(lines, depth) {
  const found = [];
  let i = 0;
  while (i < lines.length) {
    if (blank(lines[i])) {
      i += 1;
      continue;
    }
    const [build, next] = block(lines, i, depth);
    const last = lines[next - 1];
    found.push({ from: lines[i].at, to: last.at + last.text.length, build });
    i = next;
  }
  return found;
}

const within = (parsed, leaf) => parsed.map((part) => part.build(leaf));

/** The block that begins at line `i`: how to build it, and the line after it. */
function block(lines, i, depth) {
  const { text } = lines[i];
  const fence = FENCE.exec(text);
  if (fence) return code(lines, i, fence);
  const heading = HEADING.exec(text);
  if (heading) {
    const rest = cut(lines[i], heading[0].length);
    const line = { ...rest, text: rest.text.replace(/[ \t]+#*[ \t]*$/, "") };
    // The page has headings of its own above these.
    return [(leaf) => h(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline([line], leaf)), i + 1];
  }
  if (RULE.test(text)) return [() => h("hr"), i + 1];
  if (depth < DEPTH_MAX && QUOTE.test(text)) {
    let next = i;
    const inner = [];
    for (; next < lines.length && QUOTE.test(lines[next].text); next++) inner.push(cut(lines[next], QUOTE.exec(lines[next].text)[0].length));
    const parsed = parse(inner, depth + 1);
    return [(leaf) => h("blockquote", {}, ...within(parsed, leaf)), next];
  }
  if (depth < DEPTH_MAX && ITEM.test(text)) return list(lines, i, depth);
  if (text.includes("|") && lines[i + 1] && DELIMITERS.test(lines[i + 1].text) && cells(lines[i]).length <= CELLS_MAX) return table(lines, i);
  let next = i + 1;
  while (next < lines.length && !blank(lines[next]) && (depth >= DEPTH_MAX || !begins(lines[next]))) next++;
  const all = lines.slice(i, next);
  return [(leaf) => h("p", {}, ...inline(all, leaf)), next];
}

function code(lines, i, [, mark, name]) {
  let next = i + 1;
  const closes = (line) => line.text.trim().startsWith(mark) && line.text.trim().replaceAll(mark[0], "") === "";
  while (next < lines.length && !closes(lines[next])) next++;
  const inner = lines.slice(i + 1, next);
  const build = (leaf) => {
    const parts = inner.flatMap((line, at) => leaf(line.at, line.at + line.text.length + (at < inner.length - 1 ? 1 : 0)));
    return h("figure", { class: "code", "data-language": name.trim() || null }, h("pre", { tabindex: "0" }, h("code", {}, ...parts)));
  };
  return [build, Math.min(next + 1, lines.length)];
}

function list(lines, i, depth) {
  const [, indent, mark] = ITEM.exec(lines[i].text);
  const numbered = /\d/.test(mark);
  const items = [];
  let next = i;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next].text);
    const same = item && item[1].length >= indent.length && item[1].length < indent.length + 2 && /\d/.test(item[2]) === numbered;
    if (!same || RULE.test(lines[next].text)) break;
    const width = item[3].length > 4 ? item[0].length - item[3].length + 1 : item[0].length;
    const inner = [cut(lines[next], width)];
    next += 1;
    while (next < lines.length) {
      const line = lines[next];
      const indented = /^ */.exec(line.text)[0].length;
      const after = lines[next + 1];
      const goesOn = blank(line) ? after && !blank(after) && /^ */.exec(after.text)[0].length >= Math.min(width, indent.length + 2) : indented >= Math.min(width, indent.length + 2) || (!begins(line) && !blank(lines[next - 1]));
      if (!goesOn) break;
      inner.push(cut(line, Math.min(indented, width)));
      next += 1;
    }
    items.push(parse(inner, depth + 1));
    // A blank line between items does not end the list.
    if (next + 1 < lines.length && blank(lines[next]) && ITEM.test(lines[next + 1].text)) next += 1;
  }
  const start = numbered && Number.parseInt(mark, 10) !== 1 ? Number.parseInt(mark, 10) : null;
  return [(leaf) => h(numbered ? "ol" : "ul", { start }, ...items.map((item) => h("li", {}, ...within(item, leaf)))), next];
}

/** The cells of a table's line. */
function cells(line) {
  const found = [];
  const text = line.text.replace(/\|?\s*$/, "");
  let from = /^\s*\|?/.exec(text)[0].length;
  for (let at = from; at <= text.length; at++) {
    if (at < text.length && (text[at] !== "|" || text[at - 1] === "\\")) continue;
    const raw = text.slice(from, at);
    found.push({ text: raw.trim(), at: line.at + from + (raw.length - raw.trimStart().length) });
    from = at + 1;
  }
  return found;
}

function table(lines, i) {
  let next = i + 2;
  while (next < lines.length && lines[next].text.includes("|")) next++;
  const row = (line, tag, leaf) => h("tr", {}, ...cells(line).slice(0, CELLS_MAX).map((cell) => h(tag, {}, ...inline([cell], leaf))));
  const build = (leaf) =>
    h("div", { class: "table" }, h("table", {}, h("thead", {}, row(lines[i], "th", leaf)), h("tbody", {}, ...lines.slice(i + 2, next).map((line) => row(line, "td", leaf)))));
  return [build, next];
}

/** The nodes of some lines of text. */
function inline(lines, leaf) {
  const text = lines.map((line) => line.text).join("\n");
  const starts = [];
  let length = 0;
  for (const line of lines) {
    starts.push(length);
    length += line.text.length + 1;
  }
  // From places in `text` to pieces of the source: lines may have lost their first characters.
  const pieces = (from, to) =>
    lines.flatMap((line, n) => {
      const first = Math.max(from, starts[n]);
      const last = Math.min(to, starts[n] + line.text.length + (n < lines.length - 1 ? 1 : 0));
      return first < last ? leaf(line.at + first - starts[n], line.at + last - starts[n]) : [];
    });
  return spans(text, 0, text.length, pieces, 0);
}

const WORD = /[\p{L}\p{N}_]/u;
const MARKS = [["***", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

function spans(text, from, to, pieces, depth) {
  const nodes = [];
  let plain = from;
  let at = from;
  const missing = new Set();
  const flush = (until) => {
    if (until > plain) nodes.push(...pieces(plain, until));
  };
  const put = (node, next) => {
    flush(at);
    nodes.push(node);
    at = next;
    plain = next;
  };
  while (at < to) {
    const c = text[at];
    if (c === "\\" && at + 1 < to && /[!-/:-@[-`{-~]/.test(text[at + 1])) {
      flush(at);
      plain = at + 1;
      at += 2;
    } else if (c === "`") {
      const mark = /^`+/.exec(text.slice(at, to))[0];
      const end = missing.has(mark) ? -1 : closing(text, at + mark.length, to, mark);
      if (end < 0) {
        missing.add(mark);
        at += mark.length;
      } else {
        put(h("code", {}, ...pieces(at + mark.length, end)), end + mark.length);
      }
    } else if (c === "[" && depth < DEPTH_MAX && !missing.has(c)) {
      if (text.indexOf("](", at) < 0) missing.add(c);
      const link = linkAt(text, at, to);
      if (link) put(anchor(link.address, spans(text, at + 1, link.end, pieces, depth + 1)), link.next);
      else at += 1;
    } else if ((c === "h" || c === "H") && !(at > from && WORD.test(text[at - 1]))) {
      const address = /^https?:\/\/[^\s<>"`]*[^\s<>"`.,;:!?'*_)\]]/i.exec(text.slice(at, to))?.[0];
      if (address) put(anchor(address, pieces(at, at + address.length)), at + address.length);
      else at += 1;
    } else {
      const found = depth < DEPTH_MAX ? emphasis(text, at, from, to, missing) : null;
      if (found) put(h(found.tag, {}, ...spans(text, found.from, found.to, pieces, depth + 1)), found.next);
      else at += MARKS.find(([mark]) => text.startsWith(mark, at))?.[0].length ?? 1;
    }
  }
  flush(to);
  return nodes;
}

/** The end of a code span: as many backticks, and no more. */
function closing(text, from, to, mark) {
  for (let at = text.indexOf(mark, from); at >= 0 && at < to; at = text.indexOf(mark, at)) {
    const run = /^`+/.exec(text.slice(at, to))[0].length;
    if (run === mark.length) return at;
    at += run;
  }
  return -1;
}

/** Emphasis that begins at `at`: marks outside a word, next to what they stress. `6*7` has none. */
function emphasis(text, at, first, to, missing) {
  const found = MARKS.find(([mark]) => text.startsWith(mark, at));
  if (!found || missing.has(found[0])) return null;
  const [mark, tag] = found;
  const from = at + mark.length;
  if (from >= to || /\s/.test(text[from]) || text[from] === mark[0] || (at > first && WORD.test(text[at - 1]))) return null;
  for (let end = text.indexOf(mark, from + 1); end >= 0 && end + mark.length <= to; end = text.indexOf(mark, end + 1)) {
    const next = end + mark.length;
    const inside = next < to && (WORD.test(text[next]) || text[next] === mark[0]);
    if (!/\s/.test(text[end - 1]) && !inside && (mark.length > 1 || text[end - 1] !== mark[0])) return { tag, from, to: end, next };
  }
  missing.add(mark);
  return null;
}

/** `[text](address)` with an address that may be followed. */
function linkAt(text, at, to) {
  const found = /^\[((?:[^\]\\\n]|\\.)*)\]\(\s*<?([^\s<>()]+)>?(?:\s+"[^"\n]*")?\s*\)/.exec(text.slice(at, Math.min(to, at + LINK_MAX)));
  if (!found || !ADDRESS.test(found[2])) return null;
  return { address: found[2], end: at + 1 + found[1].length, next: at + found[0].length };
}

const anchor = (address, children) => h("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
