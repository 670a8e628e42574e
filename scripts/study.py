"""Standard against robust on every shapes environment: python scripts/study.py."""

import sys

from mmrm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
