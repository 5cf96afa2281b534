"use strict";
const table = document.getElementById("layers");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const shown = document.getElementById("shown");
const filter = document.getElementById("filter");

function show() {
  const text = filter.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
    count += row.hidden ? 0 : 1;
  }
  shown.textContent = `${count} of ${rows.length}`;
}

function value(row, column) {
  const cell = row.cells[column];
  return cell.classList.contains("number") ? parseFloat(cell.dataset.value) : cell.textContent;
}

table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
  head.addEventListener("click", () => {
    const number = head.classList.contains("number");
    // Numbers begin with the largest, names with the first.
    const first = number ? "descending" : "ascending";
    const other = number ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    table.querySelectorAll("thead th").forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (!number) return sign * x.localeCompare(y, undefined, { numeric: true });
      // What was not measured comes last either way.
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y);
    });
    body.append(...rows);
  });
});
filter.addEventListener("input", show);
show();
