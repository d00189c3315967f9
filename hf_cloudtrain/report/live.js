// A page beside a run that is alive: says how old it is, and reloads itself once the storage has a newer one.
"use strict";
(() => {
  const LOOK = 60e3;
  const note = document.getElementById("live");
  const written = 1000 * note.dataset.written, limit = 1000 * note.dataset.renewed + 2 * LOOK;
  const stamp = new Date(written).toISOString().replace("T", " ").slice(0, 19) + " UTC";
  let trouble = "", tag = null, zoomed = false;

  // The clock of this device may differ from that of the training machine. A page that has changed between two looks was
  // written just now, which tells the difference.
  let difference = 0;
  try {
    const before = JSON.parse(sessionStorage.getItem("cloudtrain-page") ?? "null");
    const known = before !== null && before.url === location.href;
    difference = known ? before.difference : 0;
    if (known && before.written !== written) difference = Date.now() - written;
    sessionStorage.setItem("cloudtrain-page", JSON.stringify({ url: location.href, written, difference }));
  } catch { /* a page without storage, as in a frame */ }

  const tell = () => {
    const age = Math.max(0, Date.now() - difference - written);
    note.textContent = age > limit
      ? `Last written ${duration(age / 1000)} ago (${stamp}), and it should be renewed every ${duration(note.dataset.renewed)}: the run was ` +
        "probably killed, or its machine cannot reach the storage. "
      : `Live: last written ${duration(age / 1000)} ago (${stamp}). `;
    note.textContent += trouble || (zoomed ? "It waits to be reloaded until you zoom out (double-click)." : "It reloads itself.");
    document.documentElement.dataset.stale = age > limit ? "yes" : "no";
  };

  // One byte, so that an address that has expired or a storage that is gone leaves the old page in place.
  const look = async (isFirst = false) => {
    if (document.hidden || zoomed) return;
    if (location.protocol === "file:") return isFirst ? undefined : location.reload();
    try {
      const answer = await fetch(location.href, { cache: "no-store", headers: { Range: "bytes=0-0" } });
      if (answer.ok) {
        const found = answer.headers.get("ETag") ?? answer.headers.get("Last-Modified");
        if (!isFirst && (found === null || tag !== null && tag !== found)) return location.reload();
        tag = found;
        trouble = "";
      } else {
        trouble = [401, 403].includes(answer.status) ? `The storage refuses this address (${answer.status}): it has expired, or ` +
          "needs other credentials. " : answer.status === 404 ? "The page is no longer there: the run was deleted. "
          : `The storage answers with ${answer.status}. `;
      }
      await answer.body?.cancel();
    } catch {
      trouble = "The storage cannot be reached now; trying again. ";
    }
    tell();
  };

  document.addEventListener("plotly-drawn", () => {
    for (const chart of document.querySelectorAll(".chart")) {
      chart.on("plotly_relayout", (change) => { if (Object.keys(change).some((key) => key.includes(".range"))) zoomed = true; tell(); });
      chart.on("plotly_doubleclick", () => setTimeout(() => { zoomed = false; tell(); }, 500));
    }
  });
  tell();
  look(true);
  setInterval(tell, 10e3);
  setInterval(() => look(), LOOK);
  document.addEventListener("visibilitychange", () => look());
})();
