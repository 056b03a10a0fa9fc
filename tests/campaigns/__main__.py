"""The command; see the package."""

from __future__ import annotations

import argparse
import json
import time

from tests.campaigns import CAMPAIGNS, campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns")
    parser.add_argument("name", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    print(json.dumps({chosen.name: campaign(chosen.name, chosen.n, chosen.seed)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
