// Which language the page speaks, and what it says in it.
import en from "./words/en.js";
import zh from "./words/zh.js";
import { kept, keep } from "./storage.js";

const WORDS = { en, zh };
const NAME = "tandem-language";
const listeners = [];

const wanted = kept(NAME) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
let language = Object.hasOwn(WORDS, wanted) ? wanted : "en";

/** The words of `key`; `values` is a number or the named parts of a sentence. */
export function t(key, values) {
  const words = WORDS[language][key] ?? en[key];
  return typeof words === "function" ? words(values) : words;
}

/** Puts the words where the page's own markup asks for them. */
function show() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = t("title");
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-name]")) {
    element.setAttribute("aria-label", t(element.dataset.tName));
    if (element.matches("button")) element.title = t(element.dataset.tName);
  }
  for (const element of document.querySelectorAll("[data-t-hint]")) element.placeholder = t(element.dataset.tHint);
}

/** Runs `work` whenever the language has changed. */
export const onLanguage = (work) => listeners.push(work);

/** Changes to the other language. */
export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  keep(NAME, language);
  show();
  for (const work of listeners) work();
}

show();
