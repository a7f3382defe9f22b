"""python -m fastpix2pix, as torchrun -m starts it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
