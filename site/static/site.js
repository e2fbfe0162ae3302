// A box that scrolls must be reachable by keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".table-wrapper, div.cell_output, div.formula, pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
