"""`python tools/test.py ...` is `dcdet test ...`, from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from dcdet.cli import main

    sys.exit(main(["test", *sys.argv[1:]]))
