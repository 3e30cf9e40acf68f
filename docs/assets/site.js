// Tables sort by a click on a column's head; long ones can be filtered by a word. Nothing is fetched and nothing is counted.
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    if (!cell) return "";
    return cell.dataset.sort !== undefined ? Number(cell.dataset.sort) : cell.textContent.trim();
  };

  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // empty cells last
    return a.localeCompare(b, undefined, { numeric: true });
  };

  const sort = (table, head, column) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (up ? 1 : -1) * compare(key(a, column), key(b, column)));
    table.tBodies[0].append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable, table.messages")) {
    const frame = document.createElement("div");
    frame.className = "table-scroll";
    table.replaceWith(frame);
    frame.append(table);
    if (table.classList.contains("sortable")) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = head.textContent;
        button.addEventListener("click", () => sort(table, head, column));
        head.replaceChildren(button);
      });
    }
    if (table.tBodies[0].rows.length > 60) {
      const field = document.createElement("input");
      field.className = "table-filter";
      field.type = "search";
      field.placeholder = "only rows with …";
      field.setAttribute("aria-label", "only rows with these letters");
      field.addEventListener("input", () => {
        const wanted = field.value.toLowerCase();
        for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      });
      frame.before(field);
    }
  }
})();
