"""`python tools/benchmark.py ...` is `dcdet benchmark ...`, from a benchmarkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from dcdet.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
