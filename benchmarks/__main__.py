"""``python -m benchmarks [NAME ...] [--quick] [--device D] [--out DIR]``: run benchmarks and write their results."""

import argparse
import time
from importlib import import_module
from pathlib import Path

from underpaint_server.engine.worker import spin_briefly

from benchmarks.report import Report, console

BENCHMARKS = ("throughput", "reuse", "exactness", "masks", "overhead", "learning", "simulate", "peers")
GPU = "gpu"
"""The benchmark that needs a GPU, and so is run only by name."""
RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("build/benchmarks")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)} (default: all), {GPU}")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="of the benchmark gpu; cpu tries it on tiny networks"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"under twenty minutes for all, written to {QUICK_RESULTS}"
    )
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in (*BENCHMARKS, GPU)]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; choose from {', '.join(BENCHMARKS)}, {GPU}")
    folder = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    for name in args.names or BENCHMARKS:
        if name != "peers":  # it would slow the libraries that are compared; the server's processes do it themselves
            spin_briefly()
        began = time.monotonic()
        report = _run(name, args)
        report.write(folder, quick=args.quick)
        for table in report.tables:
            table.show()
        console.print(*(f"• {finding}" for finding in report.findings), sep="\n")
        console.print(f"{folder / name}.md, {time.monotonic() - began:.0f} s\n")


def _run(name: str, args: argparse.Namespace) -> Report:
    """A benchmark's module is imported only here: that for a GPU must run where little is installed."""
    module = import_module(f"benchmarks.{name}")
    report: Report = module.run(args.quick, args.device) if name == GPU else module.run(args.quick)
    return report


if __name__ == "__main__":
    main()
