// The live pages of `cloudtrain ui`. The server sends documents and what changes in them (runtime/patches.py); this file shows them.
// report/charts.js builds elements, of texts, never of markup, and draws the charts.
"use strict";

const $ = (id) => document.getElementById(id);
const main = $("main"), told = document.documentElement.dataset;
let stream = null, doc = null, page = null, session = {}, offset = 0, frame = 0;
const now = () => performance.now() / 1000 + offset; // the server's clock: that of this machine may be wrong

function apply(value, patch) {
  if ("value" in patch) return patch.value;
  if ("keep" in patch) return [...value.slice(0, patch.keep), ...patch.rest];
  for (const [key, change] of Object.entries(patch.items || patch.keys)) value[key] = apply(value[key], change);
  for (const key of patch.gone || []) delete value[key];
  return value;
}
const count = (value) => (value == null ? "" : value.toLocaleString("en-US"));
const short = (value) => (value == null ? "" : String(Number(value.toPrecision(4))));
const since = (time) => (time == null ? "" : h("time", { "data-at": time }, `${duration(now() - time)} ago`));
const badge = (state) => h("span", { class: `state ${state}` }, state);
const to = (kind, id, text) => h("a", { href: `#/${kind}/${encodeURIComponent(id)}` }, text);
setInterval(() => document.querySelectorAll("time[data-at]").forEach((element) => {
  element.textContent = `${duration(now() - element.dataset.at)} ago`;
}), 1000);

// --- The stream of a page ----------------------------------------------------------------------------------------------

function open(kind, id, variant) {
  close();
  stream = new EventSource(`/api/stream/${kind}?${new URLSearchParams({ id, variant })}`);
  stream.onmessage = (event) => {
    const message = JSON.parse(event.data);
    offset = message.now - performance.now() / 1000;
    doc = message.patch ? apply(doc, message.patch) : message.document;
    frame ||= requestAnimationFrame(render);
    link("live");
    if (!message.final) return;
    close(); // there is nothing to wait for
    link("");
  };
  stream.onerror = async () => {
    link("The server does not answer. Trying again.", true);
    if (stream?.readyState !== EventSource.CLOSED) return;
    close(); // a refusal, after which a browser does not try again: the token may be an old one
    const found = await ask("/api/session");
    if (!found.error) session = found;
    if (found.read === false) login(); else setTimeout(() => stream || document.hidden || page?.open(), 5e3);
  };
}
function close() {
  stream?.close();
  stream = null;
}
function link(text, bad = false) {
  if ($("link").textContent !== text) $("link").textContent = text;
  $("link").className = bad ? "bad" : "";
}
function render() {
  frame = 0;
  if (!doc || !page) return;
  show(page.trouble, doc.gone || doc.trouble, (text) => text && h("p", { class: "trouble", role: "alert" }, text));
  page.loading.hidden = !doc.loading || Boolean(doc.trouble);
  if ((!doc.loading || doc.runs) && !doc.gone) page.render(doc);
  told.shown = doc.loading ? "" : "yes";
}
// A hidden page costs no requests, and a browser keeps only six streams open.
document.addEventListener("visibilitychange", () => (document.hidden ? close() : stream || page?.open()));

function start(title, kind, id, draw, ...parts) {
  document.title = `${title} · cloudtrain`;
  const trouble = h("div"), loading = h("p", { class: "note", role: "status" }, "Reading …");
  main.replaceChildren(trouble, loading, ...parts);
  doc = null;
  told.shown = told.drawn = "";
  page = { trouble, loading, render: draw, open: (variant = page.variant ?? "") => { page.variant = variant; open(kind, id, variant); } };
  page.open();
}
async function ask(path, body) {
  let text = "";
  try {
    text = await (await fetch(path, body && { method: "POST", body: JSON.stringify(body) })).text();
    return text ? JSON.parse(text) : {};
  } catch (error) { return { error: text || `No response from the server: ${error.message}.` }; }
}

// --- Charts and tables, as report/ made them ---------------------------------------------------------------------------

let library = null, drawing = Promise.resolve();
const plotly = () => (library ||= new Promise((done, failed) => document.head.append(h("script", { src: "/static/plotly.js", onload: done, onerror: () => { library = null; failed("could not load plotly.js"); } }))));
const SCALED = new Set(["loss", "gradnorm", "rate", "steptime", "throughput"]);

// One at a time: the next document may come while the first is drawn.
function charts(grid, records, isLog) {
  const settle = (chart, figure) => {
    const axis = figure.layout.yaxis;
    if (!SCALED.has(chart.name) && !grid.dataset.compare) return figure;
    if (isLog) Object.assign(axis, { type: "log", rangemode: "normal" });
    axis.uirevision = String(isLog); // a range of one scale means nothing on the other
    return figure;
  };
  drawing = drawing.then(() => drawCharts(grid, records, plotly, settle)).then(() => { told.drawn = "yes"; }, (error) => link(`The charts cannot be drawn: ${error}`, true));
}
function tables(grid, records, first = () => null, version = null) {
  for (const [index, table] of records.entries()) {
    let section = grid.querySelector(`:scope > [data-table="${index}"]`);
    if (!section) grid.append((section = h("section", { "data-table": index }, h("h2"), h("p"), scrolled("", h("tr"), h("tbody")))));
    section.className = table.columns.length ? "wide" : "";
    const [title, text, area] = section.children, [head, body] = area.querySelectorAll("thead, tbody");
    const cell = ([text, kind, address], column) => h("td", { class: kind }, (column === 0 && first(table, text))
      || (address ? h("a", { href: address }, text) : table.columns[column]?.[0] === "state" ? badge(text) : text));
    show(title, table.title);
    show(text, table.text);
    text.hidden = !table.text;
    area.setAttribute("aria-label", table.title);
    head.hidden = !table.columns.length;
    show(head.firstChild, table.columns, (columns) => columns.map(([name, kind]) => h("th", { class: kind, scope: "col" }, name)));
    show(body, [table.rows, version], () => table.rows.map((row) => h("tr", {}, ...row.map(cell))));
  }
  grid.querySelectorAll(":scope > [data-table]").forEach((section) => section.dataset.table < records.length || section.remove());
}
const scrolled = (label, heads, body) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {}, h("thead", {}, heads), body));
// Texts that grow: who has scrolled to the end follows.
function logs(box, found) {
  for (const [name, lines] of Object.entries(found)) {
    let area = box.querySelector(`[data-log="${CSS.escape(name)}"]`);
    if (!area) box.append(h("section", {}, h("h2", {}, name), (area = h("pre", { "data-log": name, tabindex: 0, role: "log", "aria-label": name }))));
    const follows = area.scrollTop + area.clientHeight >= area.scrollHeight - 30;
    show(area, lines, () => lines.join("\n"));
    if (follows) area.scrollTop = area.scrollHeight;
  }
}
function controls(redraw) {
  fetch("/static/plotly.js", { priority: "low" }); // into the browser's cache, while the records are read
  const smoothing = h("select", { id: "smoothing", onchange: () => page.open(smoothing.value) },
    ...[["0.0", "none"], ["0.6", "a little"], ["0.9", "medium"], ["0.98", "strong"]].map(([value, words]) => h("option", { value }, words)));
  const isLog = () => log.getAttribute("aria-pressed") === "true";
  const log = h("button", { type: "button", "aria-pressed": "false", onclick: () => { log.setAttribute("aria-pressed", !isLog()); if (doc?.charts) redraw(); } }, "Log scale");
  const reset = h("button", { type: "button", onclick: () => document.querySelectorAll(".js-plotly-plot").forEach((area) => Plotly.relayout(area, { "xaxis.autorange": true, "yaxis.autorange": true })) }, "Reset zoom");
  return [h("div", { class: "bar" }, h("label", { for: "smoothing" }, "Smoothing"), smoothing, log, reset), isLog];
}

// --- Pages -------------------------------------------------------------------------------------------------------------

const COLUMNS = [
  ["run", "name", "name", (run) => [h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, "data-id": run.id }), " ", to("run", run.id, run.name), run.damaged ? h("p", { class: "note" }, run.damaged) : ""]],
  ["state", "state", "", (run) => [run.state && badge(run.state), run.stalled && run.state !== "killed" ? " stalled" : ""]],
  ["progress", "share", "", (run) => [run.total_steps ? h("progress", { value: run.step || 0, max: run.total_steps, "aria-label": `Progress of ${run.name}` }) : "", ` ${count(run.step)}${run.total_steps ? ` / ${count(run.total_steps)}` : ""}`]],
  ["left", "eta_seconds", "", (run) => duration(run.eta_seconds)],
  ["loss", "loss", "", (run) => [spark(run.curve), short(run.loss)]],
  ["goodput", "goodput", "number", (run) => (run.goodput == null ? "" : `${run.is_goodput_bound ? "≥ " : ""}${(100 * run.goodput).toFixed(1)} %`)],
  ["cost", "cost", "number cost", (run) => (run.cost == null ? "" : `${run.is_cost_bound ? "≥ " : ""}${run.cost.toFixed(2)}`)],
  ["last safe step", "safe_step", "", (run) => [count(run.safe_step), run.safe_time ? ", " : "", since(run.safe_time)]],
  ["attempts", "attempts", "number", (run) => count(run.attempts)],
  ["size", "size", "number", (run) => run.size_text],
  ["last seen", "last_seen", "", (run) => since(run.last_seen)],
];
const spark = (curve) => h("svg", { class: "spark", viewBox: "0 0 120 24", "aria-hidden": "true" }, h("path", { d: curve || "" }));
const memory = { filter: "", key: "last_seen", down: true, chosen: new Set(), details: new Map() };
const PART = 100; // rows that come at once: a thousand would take a phone a second

function runsPage() {
  const rows = new Map(), body = h("tbody"), compare = h("a", { hidden: true }), amount = h("span", { role: "status" }), roots = h("div", { class: "url" });
  let most = PART, waiting = [], busy = 0;
  const filter = h("input", { type: "search", id: "filter", size: 24, placeholder: "name, state, experiment", value: memory.filter, oninput: () => { memory.filter = filter.value; most = PART; draw(); } });
  const more = h("button", { type: "button", hidden: true, onclick: () => { most += PART; draw(); } }, "Show more");
  new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && more.click()).observe(more);
  const heads = COLUMNS.map(([title, key, kind]) => h("th", { class: kind.replace("name", ""), scope: "col", "data-key": key }, h("button", { type: "button", onclick: () => {
    memory.down = memory.key === key ? !memory.down : key !== "name";
    memory.key = key;
    draw();
  } }, title)));
  const table = scrolled("Runs", h("tr", {}, ...heads), body);
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) { target.seen = isIntersecting; if (isIntersecting) waiting.push(target); }
    read();
  });
  const rowOf = (key, build) => rows.get(key) || rows.set(key, build()).get(key);
  async function read() { // what takes the step records of a run, for the rows that are seen
    while (busy < 4 && waiting.length && body.isConnected) {
      const row = waiting.pop(), run = row.run, known = memory.details.get(run.id), version = [run.step, run.state, run.checkpoints, run.safe_step, run.attempts, Math.floor(run.last_seen / 60)].join();
      if (!row.seen || !run.state || known?.version === version) continue;
      memory.details.set(run.id, { ...known, version });
      busy += 1;
      const found = await ask(`/api/details?id=${encodeURIComponent(run.id)}`);
      busy -= 1;
      if (found.error) setTimeout(again, (row.wait = Math.min(3e5, 2 * (row.wait ?? 2.5e3))), row, version);
      else memory.details.set(run.id, { version, ...found });
      fill(row, row.run);
      if (found.cost != null) table.classList.add("priced");
    }
  }
  function again(row, version) { // after an error, unless something newer was asked for meanwhile
    if (!body.isConnected || document.hidden || memory.details.get(row.run.id)?.version !== version) return;
    memory.details.set(row.run.id, { ...memory.details.get(row.run.id), version: null });
    fill(row, row.run);
    read();
  }
  function fill(row, run) {
    row.run = run;
    show(row, { ...run, ...memory.details.get(run.id) }, (all) => COLUMNS.map(([, , kind, cell]) => h("td", { class: kind }, ...[cell(all)].flat())));
    row.querySelector("input").checked = memory.chosen.has(run.id);
    if (row.seen) waiting.push(row);
  }
  function draw() {
    if (!doc?.runs) return;
    const words = memory.filter.toLowerCase().split(/\s+/).filter(Boolean), all = Object.values(doc.runs), { key, down } = memory;
    const value = (run) => (key === "share" ? (run.step || 0) / (run.total_steps || Infinity) : run[key] ?? memory.details.get(run.id)?.[key]);
    const found = all.filter((run) => words.every((word) => `${run.name} ${run.state ?? ""} ${run.experiment}`.toLowerCase().includes(word)));
    const { compare: byText } = new Intl.Collator("en", { numeric: true });
    found.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const order = x == null || y == null ? (x == null) - (y == null) : (typeof x === "string" ? byText(x, y) : x - y) * (down ? -1 : 1);
      return !a.experiment - !b.experiment || byText(a.experiment, b.experiment) || order || byText(a.name, b.name);
    });
    let group = "";
    const shown = found.slice(0, most).flatMap((run) => {
      const row = rowOf(run.id, () => h("tr")), starts = run.experiment !== group;
      if (!row.run) seen.observe(row);
      fill(row, run);
      group = run.experiment;
      return starts ? [rowOf(`: ${group}`, () => h("tr", { class: "group" }, h("th", { colspan: COLUMNS.length, scope: "rowgroup" }, group || "without an experiment"))), row] : [row];
    });
    const held = document.activeElement;
    if (shown.length !== body.children.length || shown.some((row, index) => body.children[index] !== row)) body.replaceChildren(...shown);
    if (held !== document.activeElement) held.focus({ preventScroll: true });
    table.classList.toggle("priced", all.some((run) => memory.details.get(run.id)?.cost != null));
    show(amount, `${count(found.length)} of ${count(all.length)} runs`);
    more.hidden = found.length <= most;
    heads.forEach((head) => head.setAttribute("aria-sort", head.dataset.key === key ? (down ? "descending" : "ascending") : "none"));
    choose();
    read();
  }
  function choose() {
    compare.hidden = memory.chosen.size < 2;
    compare.href = `#/compare/${encodeURIComponent([...memory.chosen].join("\n"))}`;
    compare.textContent = `Compare ${memory.chosen.size} runs`;
  }
  body.addEventListener("change", ({ target }) => { memory.chosen[target.checked ? "add" : "delete"](target.dataset.id); choose(); });
  start("Runs", "runs", "", (found) => { show(roots, found.roots, (urls) => urls.join(" · ")); draw(); },
    h("header", {}, h("h1", {}, "Runs"), roots), h("div", { class: "bar" }, h("label", { for: "filter" }, "Filter"), filter, amount, compare), table, more);
}

function runPage(id) {
  const [head, notes, extra, grid] = ["header", "div", "div", "div"].map((tag, index) => h(tag, { class: ["head", "", "bar", "charts"][index] }));
  const figures = h("dl", { class: "figures" }), texts = h("div");
  const [bar, isLog] = controls(() => charts(grid, doc.charts, isLog()));
  start("Run", "run", id, (run) => {
    const live = run.live;
    document.title = `${run.name}: ${run.state}`;
    show(head, [run.name, run.run_url, live, run.facts, run.trackers], () => [
      h("h1", {}, run.name), badge(run.state), h("div", { class: "url" }, run.run_url),
      ...run.trackers.map(({ service, url, page: words }) => h("div", { class: "url" }, `${service}: `, url ? h("a", { href: url, rel: "noopener noreferrer" }, words) : words)),
      live.total_steps ? h("progress", { value: live.step || 0, max: live.total_steps, "aria-label": "Progress" }) : null,
      h("p", { class: "note", id: "facts" }, `${run.facts.join(" · ")} · last heartbeat `, since(live.last_seen)),
    ]);
    show(notes, run.notes, (found) => found.map((text) => h("p", { class: "note" }, text)));
    show(figures, run.key_figures, (found) => found.map(([name, value, detail]) => h("div", {}, h("dt", {}, name), h("dd", {}, value), detail ? h("dd", {}, detail) : null)));
    show(extra, [run.job, run.state], () => [run.job ? to("job", run.job, `Log of the job ${run.job}`) : null,
      session.act && ["started", "training"].includes(run.state) ? danger("Save and stop", () => ask("/api/act", { run: id, action: "stop" })) : null,
      session.act ? h("button", { type: "button", class: "danger", onclick: () => prune(id) }, "Prune …") : null,
      session.actions && !session.act ? h("button", { type: "button", onclick: () => login() }, "Enter the token for actions") : null]);
    charts(grid, run.charts, isLog());
    tables(grid, run.tables, (table, title) => (table.title.startsWith("Checkpoints") && run.checkpoints[title]
      ? h("button", { type: "button", "aria-haspopup": "dialog", onclick: () => checkpoint(id, title, ...run.checkpoints[title]) }, title) : null), run.checkpoints);
    logs(texts, run.logs);
  }, head, notes, figures, extra, bar, grid, texts);
}

function comparePage(ids) {
  const head = h("header"), notes = h("div"), grid = h("div", { class: "charts", "data-compare": "yes" });
  const [bar, isLog] = controls(() => charts(grid, doc.charts, isLog()));
  start("Compare", "compare", ids, (found) => {
    show(head, [found.name, found.runs], () => [h("h1", {}, `Compare ${found.name}`), ...found.runs.map((run) => h("div", { class: "url" }, `${run.name} (${run.state}) ${run.url}`))]);
    show(notes, found.notes, (words) => words.map((text) => h("p", { class: "trouble" }, text)));
    charts(grid, found.charts, isLog());
    tables(grid, found.tables);
  }, head, notes, bar, grid);
}

function listPage(title, kind) {
  const grid = h("div", { class: "charts" });
  start(title, kind, "", (found) => tables(grid, found.tables), h("header", {}, h("h1", {}, title)), grid);
}

function jobPage(id) {
  const head = h("header"), bar = h("div", { class: "bar" }), grid = h("div", { class: "charts" }), texts = h("div"), absent = h("p", { class: "note" });
  start("Job", "job", id, (job) => {
    document.title = `${job.id}: ${job.state}`;
    show(head, [job.id, job.state], () => [h("h1", {}, job.id), badge(job.state)]);
    show(bar, [job.run, job.is_over], () => [job.run ? to("run", job.run, "Its run") : null, session.act && !job.is_over ? danger("Save and cancel", () => ask("/api/act", { action: "cancel", job: job.id })) : null]);
    tables(grid, job.tables);
    absent.textContent = job.no_log || "";
    logs(texts, job.logs);
  }, head, bar, grid, absent, texts);
}

// --- Dialogs -----------------------------------------------------------------------------------------------------------

function dialog(...parts) {
  $("dialog").replaceChildren(...parts.filter(Boolean), h("p", {}, h("button", { type: "button", onclick: () => $("dialog").close() }, "Close")));
  if (!$("dialog").open) $("dialog").showModal();
}
async function tell(answer) {
  const found = await answer;
  dialog(h("p", { role: "status", class: found.error ? "trouble" : "" }, found.error || found.text));
}
const danger = (words, run) => h("button", { type: "button", class: "danger", onclick: () => dialog(h("p", {}, `${words}?`), h("button", { type: "button", class: "danger", onclick: () => tell(run()) }, words)) }, words);
function checkpoint(id, title, words, key, pinned) {
  const word = pinned ? "Unpin" : "Pin", line = (verb) => h("p", {}, h("code", {}, `cloudtrain checkpoint ${verb} ${words}${verb === "download" ? " out" : ""}`));
  dialog(h("h2", {}, title), ...["download", "verify", "pin", "view"].map(line),
    session.act && h("button", { type: "button", onclick: () => tell(ask("/api/act", { run: id, action: word.toLowerCase(), key })) }, word));
}
function prune(id) {
  const keep = h("input", { type: "number", min: 1, value: 3, id: "keep" });
  const look = async (sure) => {
    const found = await ask("/api/act", { run: id, action: "prune", keep: Number(keep.value), sure });
    if (found.error || !found.going) return tell(found);
    dialog(h("p", {}, found.text), h("pre", { tabindex: 0 }, found.lines.join("\n")),
      found.going.length && h("button", { type: "button", class: "danger", onclick: () => look(found.going) }, "Delete these"));
  };
  dialog(h("p", {}, h("label", { for: "keep" }, "Keep the newest "), keep), h("button", { type: "button", onclick: () => look() }, "Show what would be deleted"));
}
function login(error = "") {
  close();
  link("");
  $("dialog").close();
  page = null;
  const token = h("input", { type: "password", id: "token", autocomplete: "current-password" });
  main.replaceChildren(h("header", {}, h("h1", {}, "Token")), h("form", { class: "bar", onsubmit: async (event) => {
    event.preventDefault();
    const answer = await ask("/api/session", { token: token.value });
    if (answer.error) login(answer.error); else begin();
  } }, h("label", { for: "token" }, "The token that cloudtrain ui printed"), token, h("button", {}, "Open")), h("p", { class: "trouble", role: "alert" }, error));
  told.shown = "login";
  token.focus();
}

const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
function route() {
  const [, kind = "", id = ""] = location.hash.split("/").map(decoded);
  const above = { job: "jobs", run: "", compare: "" }[kind] ?? kind;
  document.querySelectorAll(".top a").forEach((anchor) => (anchor.hash === `#/${above}` ? anchor.setAttribute("aria-current", "page") : anchor.removeAttribute("aria-current")));
  ({ run: runPage, compare: comparePage, job: jobPage, jobs: () => listPage("Jobs", "jobs"), datasets: () => listPage("Datasets", "datasets") }[kind] || runsPage)(id);
}
async function begin() {
  const token = /^#token=(.+)$/.exec(location.hash);
  if (token) {
    history.replaceState(null, "", "/"); // so that it stays neither in the address nor in the history
    const answer = await ask("/api/session", { token: decoded(token[1]) });
    if (answer.error) return login(answer.error);
  }
  session = await ask("/api/session");
  if (session.error) { link(session.error, true); setTimeout(begin, 5e3); } else if (session.read) route(); else login();
}
window.addEventListener("hashchange", () => {
  if (/^#token=/.test(location.hash)) begin();
  else if (session.read) { $("dialog").close(); route(); main.focus(); }
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
begin();
