"""Proof of the gate: so many runs with a planted slow-down, which must fail, and so many without, which must pass.

python -m bench.prove --runs 5 --plant 'kernels/l1_tanh_loss *=2'     saves first, then compares

Exit code 0 where every run went as it must, else 4.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Sequence

from . import gate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prove", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each kind")
    parser.add_argument("--plant", default="kernels/l1_tanh_loss *=2", help="'PATTERN=TIMES'")
    parser.add_argument("--only", action="append", help="pattern of the comparisons; all by default")
    options = parser.parse_args(arguments)
    only = [part for pattern in options.only or [] for part in ("--only", pattern)]
    if code := gate.main(["save", *only]):
        return code
    wrong = 0
    for number in range(options.runs):
        for plant, expected in (([], 0), (["--plant", options.plant], 4)):
            began, text = time.monotonic(), io.StringIO()
            with contextlib.redirect_stdout(text):
                code = gate.main(["compare", *only, *plant])
            what = f"planted {options.plant}" if plant else "as it is"
            last = text.getvalue().strip().splitlines()[-1]
            print(f"{number + 1} {what}: exit {code}, expected {expected}; {time.monotonic() - began:.0f} s; {last}")
            if code != expected:
                wrong += 1
                print(text.getvalue())
            sys.stdout.flush()
    print(f"{2 * options.runs - wrong} of {2 * options.runs} runs as they must be")
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
