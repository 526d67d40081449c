"""`python -m backend_torch --model DIR`: the sidecar over this engine. It knows only the command it stands for."""

from __future__ import annotations

import sys

from dualtrace.cli import main

if __name__ == "__main__":
    main(["serve", "torch", *sys.argv[1:]])
