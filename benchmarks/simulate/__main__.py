"""Replays arrivals of one's own: a JSON list of objects with the fields of ``simulation.Arrival``."""

import argparse
import json
from pathlib import Path

from benchmarks.report import console
from benchmarks.simulate import BATCHES, FIFO, OURS, Case, latencies, passes
from benchmarks.simulate.simulation import Costs, in_batches, one_by_one, simulate
from benchmarks.simulate.traces import read


def main() -> None:
    """Replay a trace and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("trace", type=Path, help="JSON list of requests, each with at_s, method, steps, strength, ...")
    parser.add_argument("--costs", type=Path, help="JSON object: network {rows: seconds}, encode, decode, embed, ...")
    args = parser.parse_args()
    try:
        costs = Costs(**json.loads(args.costs.read_text())) if args.costs else Costs()
        trace = read(args.trace)
    except (OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    case = Case(args.trace.name, {
        OURS: simulate(costs, trace), FIFO: one_by_one(costs, trace), BATCHES: in_batches(costs, trace)
    })  # fmt: skip
    for table in (latencies([case]), passes([case])):
        console.print(table.markdown(), markup=False)


if __name__ == "__main__":
    main()
