"""``python -m fastfusion.benchmarks.gpu``: what ``make gpu`` runs."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
