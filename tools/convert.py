"""`python tools/convert.py ...` is `dcdet convert ...`, from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from dcdet.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
