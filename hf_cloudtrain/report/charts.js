// Draws the charts of a run: the report, the page beside a run and `cloudtrain ui` have it in common.
// Texts become text nodes, never markup.
"use strict";

// An element with attributes, listeners (`onclick`) and children.
function h(tag, props = {}, ...children) {
  const element = ["svg", "path"].includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// Build what an element shows, only if the value has changed. The focused element keeps the focus if the new content has the same one.
function show(element, value, build = (text) => text) {
  const text = JSON.stringify(value ?? null);
  if (element.told === text) return;
  element.told = text;
  const held = document.activeElement;
  const alike = () => [...element.querySelectorAll(held?.tagName ?? "body")].filter((one) => one.textContent === held.textContent);
  const index = alike().indexOf(held);
  element.replaceChildren(...[build(value)].flat().filter((child) => child != null));
  if (index >= 0) (alike()[index] ?? alike()[0])?.focus({ preventScroll: true });
}

// '3 d 4 h', '59 s'
function duration(seconds) {
  if (seconds == null) return "";
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  const parts = [];
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
    if (seconds >= length && parts.length < 2) { parts.push(`${Math.floor(seconds / length)} ${unit}`); seconds %= length; } else if (parts.length) break;
  }
  return parts.join(" ");
}

// The sections of charts, in front of the tables: `chart` is a Chart.record() of hf_cloudtrain/report/figure.py.
// The charts are drawn from top to bottom, each shown before the next; for new data again, where what was zoomed into stays.
async function drawCharts(grid, charts, library, settle = (chart, figure) => figure) {
  const areas = charts.map((chart) => {
    let section = grid.querySelector(`:scope > [data-chart="${chart.name}"]`);
    if (!section) {
      section = h("section", { "data-chart": chart.name }, h("h2"), h("p"), h("ul", { class: "legend" }), h("div", { class: "chart", id: chart.name, role: "img" }));
      grid.insertBefore(section, grid.querySelector(":scope > [data-table]"));
    }
    section.className = chart.wide ? "wide" : "";
    const [title, text, legend, area] = section.children;
    show(title, chart.title);
    show(text, chart.text);
    show(legend, chart.legend.length > 1 || chart.name === "goodput" ? chart.legend : [], (entries) => entries.map(([shape, colour, words]) => {
      const mark = h("i", { class: shape });
      mark.style.color = colour;
      return h("li", {}, mark, words);
    }));
    legend.hidden = !legend.children.length;
    area.style.height = `${chart.height}px`;
    area.setAttribute("aria-label", `${chart.title}. ${chart.text}`);
    return area;
  });
  for (const section of grid.querySelectorAll(":scope > [data-chart]")) {
    if (!charts.some((chart) => chart.name === section.dataset.chart)) section.remove();
  }
  await new Promise((done) => setTimeout(done)); // the page is shown first: plotly.js takes a while
  await library();
  for (const [index, area] of areas.entries()) {
    const figure = settle(charts[index], structuredClone(charts[index].figure)); // plotly writes into what it draws
    const version = JSON.stringify(figure);
    if (area.version === version || !grid.isConnected) continue;
    area.version = version;
    await drawChart(area, figure);
    await new Promise((done) => setTimeout(done));
  }
}

function drawChart(element, figure) {
  const layout = { ...figure.layout, font: { ...figure.layout.font, family: getComputedStyle(document.body).fontFamily } };
  if (element.clientWidth < 460) {
    layout.margin = { ...layout.margin, l: Math.min(46, layout.margin.l), r: 6 };
    layout.xaxis = { ...layout.xaxis, nticks: layout.xaxis.type === "date" ? 3 : 4, tickangle: 0 };
  }
  const config = { displaylogo: false, responsive: true, displayModeBar: false, locale: "en-US" };
  return Plotly.react(element, figure.data, layout, config);
}

// The text that a script element holds, compressed by gzip and base64-encoded.
async function unpack(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (char) => char.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
