"""Predictions for whole tables: a table in, the same table with predictions out, whatever happens in between.

    table -> tables -> shards: predicted, each committed by its manifest -> table -> scores

In reading order:

- `tables`  parquet, CSV and JSON Lines, read and written
- `shards`  a table in shards, predicted by one or more processes, and continued after a kill
- `scores`  accuracy and F1 of such a table

May import `serving/models` and the rooms below `serving`.
"""
