"""The live web page of `cloudtrain ui`: runs, jobs and datasets as they are on storage, in any browser.

    records -> tracking/mirror -> source (runs, store) -> feed -> patch -> browser (static/page.js)
                                      report/ reads the run, and makes its charts and tables

It reads only records on storage, so it shows the runs of all engines and machines. One feed reads for all browsers that
show the same page, and none reads while no browser shows it. In reading order:

- `places`: the folders whose runs are shown, and the job of a run
- `runs`: the list, one run, several compared
- `store`: jobs, one job with its log, datasets
- `feeds`: one reader for all browsers of a page
- `actions`: stop, pin, prune and cancel, with a record in the run
- `guard`: hosts, origins, the token, and the headers of security
- `app`: routes, and how the server listens
- `static/`: one HTML page with its script and its style; plotly.js comes from the installed package

It draws nothing itself: charts and tables are those of `report/`, as JSON. It may import `report`, `jobs` and the rooms
below. `app` and `guard` need starlette and uvicorn, which are an extra.
"""
