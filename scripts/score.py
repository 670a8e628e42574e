"""Score a JSONL with a reward model on Ray actors: python scripts/score.py --model DIR --data FILE --out FILE."""

import sys

from mmrm_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
