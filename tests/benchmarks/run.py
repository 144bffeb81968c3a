"""Run every benchmark of this folder in turn and collect the tables (`make bench`).

python tests/benchmarks/run.py [--out results/benchmarks] [--only training,loader]
python tests/benchmarks/run.py --tables    # README.md alone, from the tables that are there
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
from pathlib import Path

import latency_table
from measuring import missed

HERE = Path(__file__).parent


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Return the Markdown lines of a table."""
    return [
        "| " + " | ".join(row) + " |"
        for row in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    ]


# tables that are too long to print row by row
PICTURES = {"latency": latency_table.markdown}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--tables", action="store_true", help="run nothing, write README.md")
    args = parser.parse_args(argv)
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    chosen = args.only.split(",") if args.only else [] if args.tables else list(scripts)
    unknown = [name for name in chosen if name not in scripts]
    if unknown:
        print(
            f"error: no benchmark {unknown[0]!r}; pass some of {', '.join(scripts)}",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, str(scripts[name]), "--out", str(args.out / f"{name}.csv")]
        )
        if done.returncode:
            failed.append(name)
    tables = {}
    for path in sorted(args.out.glob("*.csv")):
        with path.open(newline="") as file:
            tables[path.stem] = list(csv.DictReader(file))
    aimed = [row for rows in tables.values() for row in rows if row["aim"] and row["value"]]
    short = [row for row in aimed if missed(float(row["value"]), row["aim"])]
    lines = [
        "# Benchmarks",
        "",
        f"    make bench    # {os.cpu_count()} cores, {platform.machine()}",
        "",
        "Each table has the values of its last run; the tables were not measured on the same day.",
        "`gpu` is written by `make gpu`.",
        "",
        f"{len(aimed) - len(short)} of {len(aimed)} aims are met{'; not met:' if short else '.'}",
        "",
        *(f"- {row['case']}: {row['value']} {row['unit']}, aim {row['aim']}" for row in short),
        *([""] if short else []),
    ]
    for name, rows in tables.items():
        lines += [f"## {name}", "", *PICTURES.get(name, markdown)(rows), ""]
    (args.out / "README.md").write_text("\n".join(lines))
    print(
        f"tables: {args.out / 'README.md'}" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
