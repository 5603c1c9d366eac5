"""``python -m sessionscope``."""

import sys

from sessionscope._cli import main

if __name__ == "__main__":
    sys.exit(main())
