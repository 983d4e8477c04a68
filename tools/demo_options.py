"""What the demo's four tools take, apart from what they import: --help needs no torch, and who has
none is told what to install."""

from __future__ import annotations

import argparse
import math
import multiprocessing
from pathlib import Path
from typing import NoReturn

from demo_grammar import VOICES

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "milpy" / "demo"
GOLDEN = ROOT / "tests" / "golden" / "demo.json"


def model_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="default: milpy/demo")
    return parser


def goldens_parser(description: str | None) -> argparse.ArgumentParser:
    parser = model_parser(description)
    parser.add_argument("--out", type=Path, default=GOLDEN, help="default: tests/golden/demo.json")
    return parser


def train_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[*VOICES], nargs="*", default=VOICES)
    parser.add_argument("--device", help="torch's name; default: cuda where there is one, else cpu")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--texts", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--base-steps", type=int, default=16_000)
    parser.add_argument("--base-seconds", type=float, default=math.inf)
    parser.add_argument("--base-bar", type=float, default=0.9, help="below: no adapters")
    parser.add_argument("--adapter-steps", type=int, default=3_000)
    parser.add_argument("--adapter-seconds", type=float, default=math.inf)
    return parser


def end_without(
    problem: ModuleNotFoundError, tool: str, parser: argparse.ArgumentParser
) -> NoReturn:
    """Where the tool is run: its help if that was asked for, else what to install."""
    if tool != "__main__":
        raise problem
    parser.parse_args()
    raise SystemExit(
        f"{parser.prog}: found no {problem.name}, expected the [ref] extra: pip install -e '.[ref]'"
    )
