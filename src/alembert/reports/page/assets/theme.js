"use strict";
// Before anything is drawn: the theme that was chosen here before, if any.
(() => {
  try {
    const chosen = localStorage.getItem("alembert-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch { /* storage may be forbidden */ }
  document.documentElement.classList.add("scripted");
})();
