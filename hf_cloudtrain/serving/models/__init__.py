"""A model to answer with: the files of a checkpoint, verified and untrusted, and the pipeline that they are loaded into.

    checkpoint -> source: verified files, task -> predictor (a pipeline of transformers)

In reading order:

- `tasks`      which architectures are served, and what a client may set
- `source`     the folder of a model: downloaded and verified, and what it holds
- `untrusted`  what the files of a model may not make transformers and peft do
- `batched`    a pipeline that tokenizes a batch at once
- `predictor`  a loaded pipeline: an answer or an error for each row
- `loading`    the files as such a pipeline, if they fit

torch and transformers are imported late. May import `datasets` and the rooms below.
"""
