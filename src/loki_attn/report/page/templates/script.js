"use strict";
// The page is whole without this: it only adds sorting, a switch of colours, and open data in print.
(() => {
  const order = (cell) => cell.dataset.order;
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y)
      ? a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" })
      : x - y;
  };

  const sort = (table, column, head) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const lines = Array.from(body.rows);
    lines.sort((a, b) => {
      const [x, y] = [order(a.cells[column]), order(b.cells[column])];
      // What was not measured stays at the end in both directions.
      if (x === "" || y === "") return (x === "") - (y === "");
      return down ? compare(y, x) : compare(x, y);
    });
    body.append(...lines);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.tBodies[0].rows.length < 2) continue;
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...(head.textContent ? head.childNodes : ["item"]));
      head.replaceChildren(button);
      button.addEventListener("click", () => sort(table, column, head));
    });
  }

  const names = ["auto", "light", "dark"];
  const toggle = document.createElement("button");
  toggle.type = "button";
  toggle.className = "colours";
  const show = (at) => {
    const root = document.documentElement;
    if (at) root.dataset.theme = names[at];
    else delete root.dataset.theme;
    toggle.textContent = `Colours: ${names[at]}`;
    toggle.dataset.at = at;
  };
  toggle.addEventListener("click", () => show((Number(toggle.dataset.at) + 1) % names.length));
  show(0);
  document.querySelector("header").prepend(toggle);
})();
