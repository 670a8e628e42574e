"""Train a reward model: torchrun scripts/train.py [--robust] [options], or python scripts/train.py for one process."""

import sys

from mmrm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
