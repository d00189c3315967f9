"""The page of a run: one HTML file with its charts, attempts and checkpoints, written on request or while the run trains.

    summary     one checkpoint in short: its manifest, and whether it is the newest, the best or pinned (the CLI shows it too)
    figure      colours, layout, legend, escaping: what all charts share
    curves      charts over steps: loss, learning rate, step time, evaluations
    timeline    charts over time: attempts, where the time went, upload lag
    charts      `charts_of(history)`: all of them, in the order of the page
    sparkline   a curve as small as a word
    comparison  several runs: their curves on one axis, their differences
    page        key figures, tables and charts, put into `report.html`
    live        the page that lives with a run, written by a process of its own

A chart is a figure of plotly as a plain dictionary, with a title and a sentence. All that shows charts takes them from
`charts_of`, and draws them with `charts.js` (`drawChart(element, figure)`, again for new data) and `page.css`.

Everything shown comes from storage and is untrusted: see `page`. The room reads a run through `checkpoints/` and
`tracking/`, and imports nothing above them. `page` imports jinja2, and plotly
for its JavaScript, late: they are an extra.
"""
