// Runs before the first paint, so that the page never flashes in the wrong colours.
"use strict";
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = () => {
    try {
      return localStorage.getItem("tandem-theme");
    } catch {
      return null; // storage can be switched off
    }
  };
  const apply = () => {
    const theme = kept() ?? (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    document.querySelector('meta[name="theme-color"]')?.setAttribute("content", theme === "dark" ? "#0f1216" : "#f6f6f3");
  };
  system.addEventListener("change", apply);
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try {
        // Back to the system's choice is no choice of one's own.
        if ((theme === "dark") === system.matches) localStorage.removeItem("tandem-theme");
        else localStorage.setItem("tandem-theme", theme);
        apply();
      } catch {
        document.documentElement.dataset.theme = theme;
      }
    });
  });
})();
