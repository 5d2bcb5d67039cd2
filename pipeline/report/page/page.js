"use strict";
(() => {
  const PAGE = 300;
  const LONGEST = 30;
  const report = JSON.parse(document.getElementById("report").textContent);
  const byId = (id) => document.getElementById(id);
  const body = document.querySelector("#rows tbody");
  const number = (value) =>
    typeof value === "number" ? value : { inf: Infinity, "-inf": -Infinity }[value] ?? NaN;
  const short = (value, digits) => {
    const found = number(value);
    if (Number.isNaN(found)) return "–";
    if (!Number.isFinite(found)) return found > 0 ? "∞" : "−∞";
    if (found === 0) return "0";
    const size = Math.abs(found);
    return size >= 1e-3 && size < 1e6 ? String(Number(found.toPrecision(digits))) : found.toExponential(digits - 1);
  };
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const stateOf = (row) => (row.ok ? (number(row.difference) === 0 ? "equal" : "within") : "failed");
  const GLYPHS = { equal: "✓", within: "≈", failed: "✕" };
  const STATES = ["equal", "within", "failed"];
  const rows = report.rows.map((row, index) => ({
    ...row,
    index,
    state: stateOf(row),
    text: [row.check, row.kind, row.stage, row.name, row.peer, row.dtype, row.verdict, row.where]
      .join(" ")
      .toLowerCase(),
  }));

  // -- the table's columns: how each is written, and what it is sorted by ------------------------------------------
  const scalar = (row) => row.shape.reduce((product, side) => product * side, 1);
  const COLUMNS = [
    { key: "state", title: "verdict", by: (row) => STATES.indexOf(row.state) },
    { key: "check", title: "check", by: (row) => row.check },
    { key: "stage", title: "stage", by: (row) => row.stage },
    { key: "kind", title: "what", by: (row) => row.kind },
    { key: "name", title: "name", by: (row) => row.name },
    { key: "shape", title: "shape", by: scalar, numeric: true },
    { key: "norm", title: "norm", by: (row) => number(row.norm), numeric: true },
    { key: "difference", title: "max |diff|", by: (row) => number(row.difference), numeric: true },
    { key: "relative", title: "relative", by: (row) => number(row.relative), numeric: true },
    { key: "tolerance", title: "allowed", by: (row) => number(row.tolerance), numeric: true },
    { key: "ulps", title: "ULP", by: (row) => number(row.ulps), numeric: true },
  ];
  const WRITTEN = {
    state: (row) => [make("span", { class: `glyph ${row.state}`, "aria-hidden": "true" }, GLYPHS[row.state]), ` ${row.verdict}`],
    name: (row) => [row.name, ...(row.peer ? [make("span", { class: "peer" }, ` (${row.peer})`)] : [])],
    shape: (row) => [row.shape.join("×") || "scalar"],
    norm: (row) => [short(row.norm, 4)],
    difference: (row) => [short(row.difference, 3)],
    relative: (row) => [gauge(row), make("span", { class: "value" }, short(row.relative, 2))],
    tolerance: (row) => [short(row.tolerance, 2)],
    ulps: (row) => [short(row.ulps, 3)],
  };

  // A difference beside its tolerance, from 1e-16 to 1 in powers of ten.
  const along = (value) => Math.min(1, Math.max(0, (Math.log10(value) + 16) / 16));
  function gauge(row) {
    const canvas = make("span", { class: `gauge ${row.state}`, "aria-hidden": "true" });
    const bar = make("span", { class: "bar" });
    const difference = number(row.relative);
    bar.style.width = `${difference > 0 ? Math.max(3, 100 * along(difference)) : 0}%`;
    canvas.append(bar);
    if (number(row.tolerance) > 0) {
      const limit = make("span", { class: "limit" });
      limit.style.left = `${100 * along(number(row.tolerance))}%`;
      canvas.append(limit);
    }
    return canvas;
  }

  // -- what is shown ---------------------------------------------------------------------------------------------
  const view = { words: [], failures: false, check: "", part: "", sort: "", down: false, most: PAGE, open: new Set() };

  function chosen() {
    const part = view.part ? new Set(report.parts[view.part].rows) : null;
    const found = rows.filter(
      (row) =>
        (!view.failures || !row.ok) &&
        (!view.check || row.check === view.check) &&
        (!part || part.has(row.index)) &&
        view.words.every((word) => row.text.includes(word)),
    );
    if (!view.sort) return found;
    const { by } = COLUMNS.find((column) => column.key === view.sort);
    const sign = view.down ? -1 : 1;
    const compare = (a, b) => {
      if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
      const [nothingA, nothingB] = [Number.isNaN(a), Number.isNaN(b)];
      if (nothingA || nothingB) return nothingA - nothingB; // what is not a number is always last
      return a === b ? 0 : sign * (a < b ? -1 : 1);
    };
    return found.map((row) => [by(row), row]).sort(([a, x], [b, y]) => compare(a, b) || x.index - y.index).map(([, row]) => row);
  }

  function cells(row) {
    const open = view.open.has(row.index);
    const line = make("tr", { class: row.state, "data-row": row.index });
    if (row.index === report.first_row) line.classList.add("culprit-row");
    const toggle = make("button", { type: "button", class: "toggle", "aria-expanded": String(open) }, open ? "▾" : "▸");
    toggle.setAttribute("aria-label", `Details of ${row.kind} ${row.name}`);
    toggle.addEventListener("click", () => {
      open ? view.open.delete(row.index) : view.open.add(row.index);
      show();
      body.querySelector(`tr[data-row="${row.index}"] .toggle`)?.focus();
    });
    line.append(make("td", {}, toggle));
    for (const column of COLUMNS) {
      const content = WRITTEN[column.key] ? WRITTEN[column.key](row) : [row[column.key]];
      const tag = column.key === "name" ? "th" : "td";
      const cell = make(tag, { class: `${column.key}${column.numeric ? " number" : ""}` }, ...content);
      if (tag === "th") cell.scope = "row";
      if (cell.textContent.length <= LONGEST) cell.classList.add("whole"); // longer ones may break anywhere
      if (column.key === "tolerance") cell.title = row.why;
      line.append(cell);
    }
    return open ? [line, details(row)] : [line];
  }

  function details(row) {
    const list = make("dl");
    const facts = [
      ["verdict", row.where ? `${row.verdict}, ${row.where}` : row.verdict],
      ["allowed", `${row.tolerance} of the largest: ${row.why}`],
      ["relative difference", String(row.relative)],
      ["largest |difference|", String(row.difference)],
      ["norm", String(row.norm)],
      ["dtype and shape", `${row.dtype} (${row.shape.join(", ")})`],
      ["units in the last place", String(row.ulps)],
      ["stage", row.peer ? `${row.stage}, handed over with ${row.peer}` : row.stage || "–"],
    ];
    for (const [name, value] of facts) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    const cell = make("td", { colspan: COLUMNS.length + 1 }, list);
    return make("tr", { class: "details", "data-of": row.index }, cell);
  }

  function show() {
    const found = chosen();
    const listed = found.slice(0, view.most);
    const none = make("tr", { class: "nothing" }, make("td", { colspan: COLUMNS.length + 1 }, "No comparison matches."));
    body.replaceChildren(...(listed.length ? listed.flatMap(cells) : [none]));
    byId("count").textContent = `${found.length} of ${rows.length} comparisons`;
    byId("more").hidden = found.length <= view.most;
    byId("more").textContent = `show ${Math.min(PAGE, found.length - view.most)} more`;
    const selected = byId("selected");
    selected.hidden = !view.part;
    selected.textContent = view.part ? `only ${report.parts[view.part].label} ✕` : "";
    for (const part of document.querySelectorAll("[data-part]"))
      part.setAttribute("aria-pressed", String(part.dataset.part === view.part));
    for (const head of document.querySelectorAll("#columns th[data-key]")) {
      const mine = head.dataset.key === view.sort;
      head.setAttribute("aria-sort", mine ? (view.down ? "descending" : "ascending") : "none");
    }
  }

  const change = (changes) => {
    Object.assign(view, { most: PAGE }, changes);
    show();
  };

  // -- the table's head and its tools ----------------------------------------------------------------------------
  byId("columns").append(make("th", { scope: "col" }, make("span", { class: "hidden" }, "details")));
  for (const column of COLUMNS) {
    const button = make("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      if (view.sort !== column.key) change({ sort: column.key, down: Boolean(column.numeric || column.key === "state") });
      else if (view.down === Boolean(column.numeric || column.key === "state")) change({ down: !view.down });
      else change({ sort: "", down: false }); // the third time: the order in which data flows
    });
    const head = make("th", { scope: "col", "data-key": column.key, "aria-sort": "none" }, button);
    if (column.numeric) head.className = "number";
    byId("columns").append(head);
  }
  for (const check of report.checks) if (check.ran) byId("check").append(make("option", { value: check.name }, check.name));
  const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  byId("filter").addEventListener("input", (event) => change({ words: words(event.target.value) }));
  byId("check").addEventListener("change", (event) => change({ check: event.target.value }));
  byId("failures").addEventListener("change", (event) => change({ failures: event.target.checked }));
  byId("selected").addEventListener("click", () => change({ part: "" }));
  byId("more").addEventListener("click", () => change({ most: view.most + PAGE }));
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("save").addEventListener("click", () => {
    const { phases, parts, first_row, ...plain } = report;
    const url = URL.createObjectURL(new Blob([JSON.stringify(plain, null, 2)], { type: "application/json" }));
    make("a", { href: url, download: "verification.json" }).click();
    URL.revokeObjectURL(url);
  });
  if (report.first_row >= 0) {
    const button = byId("show-first");
    button.hidden = false;
    button.addEventListener("click", () => {
      byId("tools").reset();
      view.open.add(report.first_row);
      change({ words: [], failures: false, check: "", part: "", sort: "", most: Math.max(PAGE, report.first_row + 1) });
      const line = body.querySelector(`tr[data-row="${report.first_row}"]`);
      line.scrollIntoView({ block: "center" });
      line.querySelector(".toggle").focus({ preventScroll: true });
    });
  }

  // -- the picture: a click, Enter or Space on a part shows its rows -------------------------------------------------
  const choose = (key) => change({ part: view.part === key ? "" : key });
  for (const part of document.querySelectorAll("[data-part]")) {
    part.addEventListener("click", () => choose(part.dataset.part));
    part.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(part.dataset.part);
    });
  }

  // -- the timeline: words beside the pointer or the focus; arrow keys go from box to box ------------------------------
  const tip = byId("tip");
  const spans = [...document.querySelectorAll("svg.timeline .span")];
  const hide = () => {
    tip.hidden = true;
    for (const span of spans) span.classList.remove("same");
  };
  const tell = (span) => {
    tip.textContent = span.dataset.tip;
    tip.hidden = false;
    const box = span.getBoundingClientRect();
    const left = Math.min(box.left + scrollX, scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${box.bottom + scrollY + 8}px`;
    for (const other of spans) other.classList.toggle("same", other.dataset.microbatch === span.dataset.microbatch);
  };
  const focus = (span) => {
    for (const other of spans) other.setAttribute("tabindex", other === span ? "0" : "-1");
    span.focus();
  };
  const workers = [...document.querySelectorAll("svg.timeline .worker")].map((worker) => [...worker.querySelectorAll(".span")]);
  const middle = (span) => span.getBoundingClientRect().x + span.getBoundingClientRect().width / 2;
  const nearest = (candidates, span) =>
    candidates.reduce((best, one) => (Math.abs(middle(one) - middle(span)) < Math.abs(middle(best) - middle(span)) ? one : best));
  if (spans.length) spans[0].setAttribute("tabindex", "0");
  workers.forEach((mine, worker) =>
    mine.forEach((span, place) => {
      span.addEventListener("mouseenter", () => tell(span));
      span.addEventListener("mouseleave", hide);
      span.addEventListener("focus", () => tell(span));
      span.addEventListener("blur", hide);
      span.addEventListener("click", () => {
        if (span.dataset.stage in report.parts) choose(span.dataset.stage);
      });
      span.addEventListener("keydown", (event) => {
        const above = workers.slice(0, worker).reverse().find((others) => others.length);
        const below = workers.slice(worker + 1).find((others) => others.length);
        const next = {
          ArrowRight: () => mine[place + 1],
          ArrowLeft: () => mine[place - 1],
          ArrowUp: () => above && nearest(above, span),
          ArrowDown: () => below && nearest(below, span),
          Home: () => mine[0],
          End: () => mine.at(-1),
        }[event.key];
        if (event.key === "Escape") hide();
        if (!next) return;
        event.preventDefault();
        const found = next();
        if (found) focus(found);
      });
    }),
  );

  show();
  document.documentElement.dataset.ready = "yes";
})();
