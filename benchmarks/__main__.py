"""``python -m benchmarks [NAME ...] [--quick] [--out DIR]``: run benchmarks and write their results."""

import argparse
import time
from pathlib import Path

from benchmarks import exactness, learning, masks, overhead, peers, throughput
from benchmarks.report import console

BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module.run
    for module in (throughput, exactness, masks, overhead, learning, peers)
}
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("build/benchmarks")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help=f"under twenty minutes for all, written to {QUICK_RESULTS}"
    )
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; choose from {', '.join(BENCHMARKS)}")
    folder = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    for name in args.names or BENCHMARKS:
        began = time.monotonic()
        report = BENCHMARKS[name](args.quick)
        report.write(folder, quick=args.quick)
        for table in report.tables:
            table.show()
        console.print(*(f"• {finding}" for finding in report.findings), sep="\n")
        console.print(f"{folder / name}.md, {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
