// Light or dark as this browser was told last, before anything is painted; without a word, as the system has it.
"use strict";

try {
  document.documentElement.dataset.colours = localStorage.getItem("colours") || "";
} catch {
  // A browser that keeps nothing is asked anew on each page.
}
