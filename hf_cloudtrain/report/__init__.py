"""The page of a run: one HTML file with its charts, attempts and checkpoints, written on request or while the run trains.

    summary     one checkpoint in short: its manifest, and whether it is the newest, the best or pinned (the CLI shows it too)
    prune       which checkpoints a policy deletes: shown first, and then carried out
    figure      colours, layout, legend, escaping: what all charts share
    curves      charts over steps: loss, learning rate, step time, evaluations
    timeline    charts over time: attempts, where the time went, upload lag
    charts      `charts_of(history)`: all of them, in the order of the page
    sparkline   a curve as small as a word
    comparison  several runs: their curves on one axis, their differences
    page        key figures, tables and charts, put into `report.html`
    reader      a run read again and again while a person looks at it: few requests, only new records
    row         one run in a list of runs
    live        the page that lives with a run, written by a process of its own
    still       a figure as SVG without a script
    card        state, progress and loss of a run in a notebook
    notebook    that card, renewed while a cell trains
    run         `Run`: a run for notebooks and scripts

A chart is a figure of plotly as a plain dictionary, with a title and a sentence. All that shows charts takes them from
`charts_of`, and draws them with `charts.js` (`drawChart(element, figure)`, again for new data) and `page.css`.

Everything shown comes from storage and is untrusted: see `page`. The room reads a run through `checkpoints/` and
`tracking/`, and imports nothing above them. jinja2 and plotly are an extra, and imported late.
"""
