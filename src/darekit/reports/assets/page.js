// SPDX-License-Identifier: Apache-2.0
"use strict";
(function () {
  const { figures, copies, tips } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const told = document.getElementById("told");
  const TIP_LINES = 30; // of a recipe at the pointer; a click copies all of it

  // --- colours: the figures name them, the style sheet has them

  function painted(value, key, colours) {
    if (Array.isArray(value)) return value.map((one) => painted(one, key, colours));
    if (value && typeof value === "object") {
      const found = {};
      for (const name of Object.keys(value)) found[name] = painted(value[name], name, colours);
      return found;
    }
    if (typeof value === "string" && key.endsWith("color") && /^[a-z]+[0-9]?$/.test(value)) {
      return colours.getPropertyValue("--" + value).trim() || value;
    }
    return value;
  }

  // --- at the pointer: the point's own lines, then its recipe

  const tip = document.getElementById("tip");

  function escaped(text) {
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function showTip(point, pointer) {
    const [at, said] = point.customdata || [null, null];
    const says = said === null ? "" : tips[said];
    if (!says) return hideTip();
    const [head, ...rest] = says.split("\n");
    const strong = document.createElement("strong");
    strong.textContent = head;
    tip.replaceChildren(strong, rest.map((line) => "\n" + line).join(""));
    if (at !== null && copies[at][2] === "recipe") {
      const lines = copies[at][1].trimEnd().split("\n");
      const pre = document.createElement("pre");
      pre.textContent = lines.slice(0, TIP_LINES).join("\n") + (lines.length > TIP_LINES ? "\n…" : "");
      tip.append(pre);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const room = (place, size, whole) => Math.max(8, place + 16 + size < whole ? place + 16 : place - 16 - size);
    tip.style.left = Math.min(room(pointer.clientX, box.width, innerWidth), innerWidth - box.width - 8) + "px";
    tip.style.top = Math.min(room(pointer.clientY, box.height, innerHeight), innerHeight - box.height - 8) + "px";
  }

  function hideTip() {
    tip.hidden = true;
  }

  // --- drawing

  const OPTIONS = {
    responsive: true, displaylogo: false,
    plotlyServerURL: "", // nothing is ever sent anywhere
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d", "toggleSpikelines", "hoverClosestCartesian", "hoverCompareCartesian"],
    toImageButtonOptions: { format: "svg" },
  };

  // On paper a plot is as wide as the page, whatever the window, and low enough for two on a page.
  const PAPER = { alone: 650, beside: 312, height: 0.78 }; // pixels of A4 and letter, less margins
  let printing = false;

  function sized(layout, chart) {
    if (!printing) return layout;
    const width = chart.closest(".panels").classList.contains("many") ? PAPER.beside : PAPER.alone;
    return { ...layout, width, height: Math.round(layout.height * PAPER.height) };
  }

  function draw(chart) {
    const figure = figures[Number(chart.dataset.figure)];
    const colours = getComputedStyle(root);
    const shown = painted(figure, "", colours);
    shown.layout = sized(shown.layout, chart);
    const off = chart.hiddenNames || [];
    for (const trace of shown.data) if (off.includes(trace.name)) trace.visible = "legendonly";
    const first = !chart.data;
    const done = Plotly.react(chart, shown.data, shown.layout, OPTIONS).then(() => {
      // One picture with a name for screen readers; its parts have none, and the tables have the numbers.
      chart.querySelectorAll("svg.main-svg").forEach((svg, i) => {
        if (i === 0) {
          svg.setAttribute("role", "img");
          svg.setAttribute("aria-label", chart.getAttribute("aria-label"));
        } else {
          svg.setAttribute("aria-hidden", "true");
        }
      });
      document.querySelectorAll("#js-plotly-tester, .modebar svg").forEach((svg) => svg.setAttribute("aria-hidden", "true"));
    });
    if (first) {
      chart.on("plotly_click", (event) => {
        const [at] = event.points[0].customdata || [null];
        if (at !== null) copy(at);
      });
      chart.on("plotly_hover", (event) => showTip(event.points[0], event.event));
      chart.on("plotly_unhover", hideTip);
    }
    return done;
  }

  function drawAll() {
    return Promise.all([...document.querySelectorAll(".view:not([hidden]) .chart")].map(draw));
  }

  for (const select of document.querySelectorAll("select[data-views]")) {
    select.addEventListener("change", () => {
      const views = select.closest("figure").querySelectorAll(".view");
      views.forEach((view, i) => { view.hidden = i !== Number(select.value); });
      views[Number(select.value)].querySelectorAll(".chart").forEach(draw);
    });
  }

  for (const key of document.querySelectorAll(".key")) {
    key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", String(on));
      const name = escaped(key.dataset.name);
      for (const chart of key.closest(".view").querySelectorAll(".chart")) {
        chart.hiddenNames = (chart.hiddenNames || []).filter((one) => one !== name).concat(on ? [] : [name]);
        draw(chart);
      }
    });
  }

  // --- copying

  addEventListener("scroll", hideTip, { passive: true });

  let timer = 0;
  function tell(text) {
    told.textContent = text;
    told.classList.add("shown");
    clearTimeout(timer);
    timer = setTimeout(() => told.classList.remove("shown"), 3500);
  }

  // Where the page is a file, some browsers have no clipboard for it, or refuse it.
  function copyBySelection(text) {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    area.style.cssText = "position:fixed;top:0;left:0;opacity:0";
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    let done = false;
    try { done = document.execCommand("copy"); } catch { done = false; }
    area.remove();
    if (before && before.focus) before.focus({ preventScroll: true });
    return done;
  }

  async function copy(at) {
    const [title, text, what] = copies[at];
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      done = copyBySelection(text);
    }
    root.dataset.copied = done ? String(at) : "";
    tell(done ? `Copied the ${what} of ${title}` : `This browser does not allow copying: the ${what} of ${title} is\n${text}`);
  }

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", () => copy(Number(button.dataset.copy)));
  }

  // --- tables: a click on a heading sorts

  function valueOf(row, at) {
    const text = row.cells[at].textContent.trim();
    const number = parseFloat(text.replace(/[\u2212]/g, "-").replace(/,/g, ""));
    return Number.isNaN(number) ? text : number;
  }

  for (const button of document.querySelectorAll("button[data-sort]")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const at = Number(button.dataset.sort);
      const down = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [valueOf(row, at), row]);
      rows.sort(([a], [b]) => {
        if (a === b) return 0;
        if (a === "" || b === "") return a === "" ? 1 : -1; // what is missing stays last
        if (typeof a === typeof b) return down * (a < b ? -1 : 1);
        return typeof a === "number" ? -1 : 1;
      });
      body.append(...rows.map(([, row]) => row));
    });
  }

  // --- light and dark

  const system = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }
  function stored(value) {
    try {
      if (value) localStorage.setItem("darekit-theme", value);
      return localStorage.getItem("darekit-theme");
    } catch {
      return null; // some browsers keep nothing for files
    }
  }
  function name() {
    document.getElementById("theme-word").textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  }
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  toggle.hidden = false;
  name();
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    name();
    drawAll();
  });
  system.addEventListener("change", () => { name(); drawAll(); });

  // Paper is white.
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    printing = true;
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    printing = false;
    drawAll().then(() => document.querySelectorAll(".view:not([hidden]) .chart").forEach((one) => Plotly.Plots.resize(one)));
  });

  drawAll().then(() => { root.dataset.ready = "true"; });
})();
