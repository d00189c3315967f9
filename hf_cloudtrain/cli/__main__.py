"""`python -m hf_cloudtrain.cli`: the command line where `cloudtrain` is not on the PATH."""

from __future__ import annotations

from hf_cloudtrain.cli import main

if __name__ == "__main__":
    main()
