"""Hostile input for as long as you like: python -m tests.hostile.fuzz [seconds=60] [seed=0] [TARGET ...]

Prints how many inputs of every target were refused and taken; a fault is printed with the call that repeats it, and
makes the exit status 1.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from collections import Counter

from pipeline.tables import text_table
from tests.hostile.targets import TARGETS, attempt


def main(arguments: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    names = [argument for argument in arguments if "=" not in argument] or list(TARGETS)
    deadline = time.monotonic() + float(options.get("seconds", 60))
    answers: dict[str, Counter[str]] = {name: Counter() for name in names}
    seen: set[str] = set()
    for seed in itertools.count(int(options.get("seed", 0))):
        for name in names:
            if time.monotonic() > deadline:
                rows = [[name, *(answers[name][kind] for kind in ("refused", "taken", "FAULT"))] for name in names]
                print(text_table(["target", "refused", "taken", "faults"], rows))
                return int(bool(seen))
            try:
                answers[name][attempt(name, seed)] += 1
            except Exception as error:
                answers[name]["FAULT"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{name}: {type(error).__name__} at {place.filename}:{place.lineno}"
                if kind not in seen:
                    seen.add(kind)
                    print(f"{kind}: {str(error)[:200]!r}\n  again: attempt({name!r}, {seed})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
