// What the browser keeps for this page. Storage can be switched off or full: then a choice lasts as long as
// the page.

/** The text kept under `name`, or null. */
export function kept(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Keeps a text; null takes it away. Returns whether that worked. */
export function keep(name, text) {
  try {
    if (text == null) localStorage.removeItem(name);
    else localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}
