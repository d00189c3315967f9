"""`python -m hf_cloudtrain.cli`, where the script is not on the PATH."""

from __future__ import annotations

from hf_cloudtrain.cli import main

if __name__ == "__main__":
    main()
