"""`python -m semalign`: the command `semalign`."""

import sys

from semalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
