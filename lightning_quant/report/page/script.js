"use strict";

function value(row, column) {
  const cell = row.cells[column];
  return cell.classList.contains("number") ? parseFloat(cell.dataset.value) : cell.textContent;
}

for (const run of document.querySelectorAll(".run")) {
  const table = run.querySelector("table.layers");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const filter = run.querySelector(".filter");

  const show = () => {
    const text = filter.value.toLowerCase();
    for (const row of rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
    }
    run.querySelector(".shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };

  table.tHead.querySelectorAll("th").forEach((head, column) => {
    head.addEventListener("click", () => {
      const number = head.classList.contains("number");
      // Numbers are sorted largest first, names alphabetically.
      const [first, other] = number ? ["descending", "ascending"] : ["ascending", "descending"];
      const order = head.getAttribute("aria-sort") === first ? other : first;
      table.querySelectorAll("thead th").forEach((cell) => cell.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (!number) return sign * x.localeCompare(y, undefined, { numeric: true });
        // Missing measurements come last in both orders.
        return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y);
      });
      body.append(...rows);
    });
  });
  filter.addEventListener("input", show);
  show();
}
