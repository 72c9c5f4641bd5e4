"use strict";
(() => {
  const table = document.querySelector(".gallery");
  const dialog = document.getElementById("large"), all = document.getElementById("all"), what = document.getElementById("what");
  const filter = document.getElementById("filter"), count = document.getElementById("count");
  const heads = [...table.querySelectorAll("thead th[data-column]")];
  const rows = [...table.querySelectorAll("tbody tr")];
  let shown = heads.map((_, i) => i), at = 0;
  dialog.classList.toggle("small", table.classList.contains("small"));

  const draw = () => {
    const column = shown[at];
    what.textContent = "seed " + heads[column].textContent.trim() + " (" + (at + 1) + " of " + shown.length + ")";
    all.replaceChildren(...rows.map((row) => {
      const figure = document.createElement("figure"), words = document.createElement("figcaption");
      words.textContent = row.querySelector("th").textContent;
      words.className = row.className;
      const image = document.createElement("img");
      image.src = row.querySelector(`td[data-column="${column}"] img`).src;
      image.alt = words.textContent;
      figure.append(image, words);
      return figure;
    }));
  };
  const go = (by) => { at = (at + by + shown.length) % shown.length; draw(); };

  table.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-open]");
    if (!button) return;
    at = shown.indexOf(Number(button.dataset.open));
    draw();
    dialog.showModal();
  });
  document.getElementById("back").addEventListener("click", () => go(-1));
  document.getElementById("on").addEventListener("click", () => go(1));
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = heads.map((_, i) => i).filter((i) => words.every((word) => heads[i].textContent.toLowerCase().includes(word)));
    const kept = new Set(shown.map(String));
    for (const cell of table.querySelectorAll("[data-column]")) cell.hidden = !kept.has(cell.dataset.column);
    count.textContent = words.length ? shown.length + " of " + heads.length : "";
  });
})();
