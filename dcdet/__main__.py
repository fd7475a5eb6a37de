"""`python -m dcdet` is `dcdet`."""

import sys

from dcdet.cli import main

if __name__ == "__main__":
    sys.exit(main())
