"""``python -m benchmarks.quality [METHOD ...]``: measure the methods, on one model or on several side by side.

Writes ``quality.md``, and its numbers and contact sheets under ``results``. A model is a diffusers pipeline directory,
or a directory with one under ``model``, as the recipe exports it; default is the embedded model. One CLIP judges the
edits of all models.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import underpaint_mini
from rich.markup import escape
from underpaint import Client
from underpaint_server.local_server import LocalServer
from underpaint_server.settings import EMBEDDED_MODEL

from benchmarks import cases
from benchmarks.quality import diffedit, disentangled, edict, injection
from benchmarks.quality.bench import UNCONDITIONAL, Bench
from benchmarks.quality.judge import Judge
from benchmarks.quality.section import Section, write
from benchmarks.report import console

METHODS: dict[str, Callable[[Bench], Section]] = {
    "edict": edict.study,
    "diffedit": diffedit.study,
    "disentangled": disentangled.study,
    "injection": injection.study,
}
FOLDER = Path(__file__).parents[1]
QUICK_FOLDER = Path("build/benchmarks")
STEPS, QUICK_STEPS = 50, 3
ABOUT = (
    "{count} composites with known answers (tests/data/composites): held-out sprites, one thing changed, true target "
    "and true region known. A real server, {dtype} network; models: {models}. The judge is a CLIP ({judge}), by "
    "default the embedded model's own: it never saw these sprites in these styles, but it was trained on the same kind "
    "of pictures, and it is no better at telling styles and objects than its row 'true target' says. Seeds are fixed: "
    "run again on such a machine, this gives the same figures. A claim under a table is computed from that table's "
    "cases: it 'holds' or 'does NOT hold' where the mean paired difference lies more than two standard errors from "
    "nothing."
)


def main() -> None:
    """Run the command line."""
    args = _arguments()
    folder = args.out or (QUICK_FOLDER if args.quick else FOLDER)
    locations = _chosen_models(args)
    chosen = cases.load(args.cases or (1 if args.quick else None))
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    begin = time.monotonic()
    served = {**locations, UNCONDITIONAL: args.unconditional}
    models = ",".join(f"{name}={location}" for name, location in served.items())
    # A quick run skips the server's measurement of whether it must pin the size of passes.
    pinning = "pinned" if args.quick else "auto"
    with (
        LocalServer(models=models, dtype=args.dtype, exact_batching=pinning) as server,
        Client(server.target, timeout=3600) as client,
    ):
        samples = 3 if args.quick else 10
        judge = Judge(args.judge)
        bench = Bench(client, locations, args.dtype, chosen, judge, steps, samples, args.quick)
        about = _about(bench)
        for name in args.names or METHODS:
            section = METHODS[name](bench)
            for table in section.tables:
                table.show()
                console.print(*(f"• {escape(note)}" for note in table.notes), sep="\n")
            # After each section, because the whole run may take hours.
            report = write(folder, about, name, section, list(METHODS), quick=args.quick)
    console.print(f"{report}, {time.monotonic() - begin:.0f} s")


def _chosen_models(args: argparse.Namespace) -> dict[str, Path]:
    if args.models:
        named: dict[str, Path] = args.models
        return named
    return {EMBEDDED_MODEL if args.model == underpaint_mini.MODEL else "model": args.model}


def _about(bench: Bench) -> str:
    digests = {model.name.removeprefix("models/"): model.digest for model in bench.client.models()}
    models = ", ".join(f"{name} (weights {digests[name][:12]})" for name in bench.models)
    return ABOUT.format(count=len(bench.cases), dtype=bench.dtype, models=models, judge=bench.judge.digest[:12])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="METHOD", help=f"{', '.join(METHODS)}; default: all")
    parser.add_argument("--quick", action="store_true", help=f"one case of each kind, few steps, into {QUICK_FOLDER}")
    parser.add_argument("--cases", type=int, metavar="N", help="cases of each kind; default: all 12")
    parser.add_argument("--steps", type=int, metavar="N", help=f"steps of an edit's schedule; default: {STEPS}")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--model", type=_location, default=underpaint_mini.MODEL, metavar="DIR",
        help="directory of the model; default: the embedded model",
    )  # fmt: skip
    group.add_argument(
        "--models", type=_locations, metavar="ID=DIR,ID=DIR", help="several models to compare, with their ids"
    )
    parser.add_argument(
        "--unconditional", type=_location, default=underpaint_mini.DDPM, metavar="DIR",
        help="directory of a DDPM for content injection; default: the embedded DDPM",
    )  # fmt: skip
    parser.add_argument(
        "--judge", type=Path, default=underpaint_mini.CLIP, metavar="DIR",
        help="directory of the CLIP that judges; default: the embedded CLIP",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report; default: benchmarks")
    args = parser.parse_args()
    for name in args.names:
        if name not in METHODS:
            parser.error(f"no method '{name}'; choose from {', '.join(METHODS)}")
    return args


def _location(text: str) -> Path:
    location = Path(text)
    location = location / "model" if (location / "model" / "model_index.json").is_file() else location
    if not (location / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(f"no model_index.json in '{text}' or in '{text}/model'")
    return location


def _locations(text: str) -> dict[str, Path]:
    pairs = [part.partition("=") for part in text.split(",")]
    invalid = [
        name
        for name, _, location in pairs
        if not re.fullmatch(r"[\w.-]+", name) or name == UNCONDITIONAL or not location
    ]
    if invalid or len({name for name, _, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not ID=DIR,ID=DIR; ids must differ, have only letters, digits and _ . -, and not be "
            f"'{UNCONDITIONAL}'"
        )
    return {name: _location(location) for name, _, location in pairs}


if __name__ == "__main__":
    main()
