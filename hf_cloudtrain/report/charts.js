// Draws the charts of a run: the report, the page beside a run and `cloudtrain ui` have it in common.
"use strict";

// Draw a figure of hf_cloudtrain/report in an element, or redraw it there: what was zoomed into stays.
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
