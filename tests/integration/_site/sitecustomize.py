"""On the path of launched processes that do not use the package: what `distributed._let_gloo_settle` does for others.

Without it one plain run in some 30 on a busy machine aborts at its very end, in PyTorch.
"""

import threading
import time

threading._register_atexit(lambda: time.sleep(0.1))  # type: ignore[attr-defined]
