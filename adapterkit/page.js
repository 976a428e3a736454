"use strict";
const ramp = document.getElementById("ramp");
const stops = ramp ? JSON.parse(ramp.textContent) : [];

const colour = (share) => {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return stops[low].map((part, i) => Math.round(part + (stops[low + 1][i] - part) * (place - low)));
};

const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 105 ? "#000" : "#fff");
const short = (value) => (value === null ? "" : String(Number(value.toPrecision(3)) || 0));

function paint(select) {
  const heat = document.getElementById(select.dataset.heat);
  const cells = [...heat.querySelectorAll("td[data-v]")];
  const metric = Number(select.value);
  const logarithmic = select.selectedOptions[0].dataset.log === "1";
  const values = cells.map((cell) => JSON.parse(cell.dataset.v)[metric]);
  const scaled = values.map((v) => (v === null ? null : logarithmic ? Math.log10(v) : v));
  const known = scaled.filter((v) => v !== null && Number.isFinite(v));
  const low = Math.min(...known);
  const high = Math.max(...known);
  cells.forEach((cell, i) => {
    const missing = scaled[i] === null || !Number.isFinite(scaled[i]);
    cell.classList.toggle("none", missing);
    const rgb = colour(high > low ? (scaled[i] - low) / (high - low) : 0.5);
    cell.style.background = missing ? "" : `rgb(${rgb.join(",")})`;
    cell.style.color = missing ? "" : inkOn(rgb);
    if (heat.dataset.numbers === "1") cell.textContent = missing ? "" : short(values[i]);
    const name = cell.dataset.t;
    cell.title = `${name}: ${missing ? "none" : short(values[i])}`;
  });
  const back = (v) => (known.length ? short(logarithmic ? 10 ** v : v) : "none");
  const key = document.getElementById(select.dataset.heat + "-key");
  key.firstElementChild.textContent = back(low);
  key.lastElementChild.textContent = back(high);
}

function sortBy(button) {
  const head = button.closest("th");
  const body = head.closest("table").tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.children[column].dataset.v ?? row.children[column].textContent;
  const rows = [...body.rows].map((row, place) => ({ row, place, key: value(row) }));
  rows.sort((a, b) => {
    if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "") || a.place - b.place;
    const numbers = Number(a.key) - Number(b.key);
    const order = Number.isNaN(numbers) ? a.key.localeCompare(b.key, undefined, { numeric: true }) : numbers;
    return (down ? -order : order) || a.place - b.place;
  });
  body.append(...rows.map((item) => item.row));
}

for (const select of document.querySelectorAll("select[data-heat]")) {
  select.addEventListener("change", () => paint(select));
  paint(select);
}
for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => sortBy(button));
}

// Where the clipboard is closed to a page, its text is selected for the user to copy.
async function copy(button) {
  const text = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    button.textContent = "Selected: copy with Ctrl-C";
  }
}

function hint() {
  for (const box of document.querySelectorAll(".scroll + .hint")) {
    const scroll = box.previousElementSibling;
    box.hidden = scroll.scrollWidth <= scroll.clientWidth;
  }
}

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", () => copy(button));
}
addEventListener("resize", hint);
hint();
