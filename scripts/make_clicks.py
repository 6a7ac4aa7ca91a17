#!/usr/bin/env python3
"""Writes a click log shaped like Criteo's, whose true probabilities, and so the best possible AUC, are known.

    python scripts/make_clicks.py --out clicks --rows 1000000 --tables 2000 600 5000
    jaxscale train recipes/dlrm_clicks.py --data.path clicks --model.tables 2000 600 5000

The same flags make the same bytes. Read next: `jaxscale/data/make_clicks.py`.
"""

import argparse
import sys
from pathlib import Path

from jaxscale.data.click_file import is_click_folder, open_clicks
from jaxscale.data.make_clicks import make_clicks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there yet")
    parser.add_argument("--rows", type=int, required=True, help="examples")
    parser.add_argument("--tables", type=int, nargs="+", required=True, help="ids of each categorical feature")
    parser.add_argument("--hots", type=int, nargs="*", default=[], help="ids an example of each feature at most")
    parser.add_argument("--dense", type=int, default=13, help="dense features")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hots = args.hots or [1] * len(args.tables)
    if len(hots) != len(args.tables):
        parser.error(f"--hots has {len(hots)} entries for {len(args.tables)} tables; give one of each")
    if min(args.rows, args.dense, *args.tables, *hots) < 1:
        parser.error("--rows, --dense, --tables and --hots are 1 or more")
    if is_click_folder(args.out):
        parser.error(f"{args.out} is a click log already; delete it or give another --out")
    make_clicks(args.out, args.rows, args.tables, hots, args.dense, args.seed)
    file = open_clicks(args.out)
    print(f"{args.out}: {file.rows:,} rows, {file.label.mean():.1%} clicked, content {file.content[:8]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
