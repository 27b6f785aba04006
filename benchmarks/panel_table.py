"""Markdown of the panel's results: a table by group, what is lost, and where the ratio to the best rule is above 1.1.

    python benchmarks/panel_table.py results/panel.csv                 # one version
    python benchmarks/panel_table.py before.csv results/panel.csv      # two: "before → after"
    python benchmarks/panel_table.py panel.csv@21a2bbf panel.csv@11e13a6

Files are the rows that benchmarks/panel.py writes, not its summaries. Where a file holds several commits, one is named
after an @.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from common import parser
from panel import summarize

HIGH = 1.1
WHOLE = dict.fromkeys(("n", "lost", "tied", "won", "error"), "{:.0f}")
COLUMNS = WHOLE | {"ratio": "{:.2f}", "pearson_holds": "{:.0%}", "overlap_holds": "{:.0%}", "seconds": "{:.0f}"}
HEADS = {"n": "runs", "error": "errors", "pearson_holds": "Pearson holds", "overlap_holds": "overlap holds"}


def read(asked: str) -> pd.DataFrame:
    """Rows of one commit of a file."""
    path, _, commit = asked.partition("@")
    rows = pd.read_csv(path, dtype={"commit": str})
    if "ratio" not in rows or "situation" not in rows:
        raise SystemExit(f"{path} holds no rows of the panel: give panel.csv, not panel_summary.csv.")
    known = rows["commit"].unique()
    if len(known) > 1 or commit:
        rows = rows[rows["commit"] == commit]
    if rows.empty:
        raise SystemExit(f"{path} holds the commits {', '.join(known)}: name one, {Path(path).name}@{known[-1]}.")
    return rows


def table(versions: list[pd.DataFrame]) -> str:
    """One line a group, "before → after" where a number differs."""
    found = [summarize(rows).set_index("group").reindex(columns=list(COLUMNS)) for rows in versions]
    kept = [name for name in COLUMNS if name != "error" or any(part["error"].any() for part in found)]
    heads = ["", *(HEADS.get(name, name) for name in kept)]
    lines = [heads, ["---"] * len(heads)]
    for group in found[-1].index:
        cells = []
        for name in kept:
            values = [part.at[group, name] if group in part.index else np.nan for part in found]
            texts = ["–" if value != value else COLUMNS[name].format(value) for value in values]
            cells.append(" → ".join(dict.fromkeys(texts)))
        lines.append([f"**{group}**" if group == "all" else group, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def weak(rows: pd.DataFrame) -> str:
    """Situations that are lost with any seed, or whose geometric mean of ratios is above 1.1, worst first."""
    out = []
    for name, part in rows.groupby("situation"):
        ratio, count = float(np.exp(np.log(part["ratio"].astype(float)).mean())), part["verdict"].value_counts()
        if ratio > HIGH or {"lost", "error"} & set(count.index):
            verdicts = ", ".join(f"{n} {verdict}" if len(part) > 1 else str(verdict) for verdict, n in count.items())
            rules = ", ".join(f"`{rule}`" for rule in part["best_rule"].dropna().unique())
            out.append((ratio, f"| {name} | {verdicts} | {ratio:.2f} | {rules} |"))
    return "\n".join(line for _, line in sorted(out, reverse=True)) or "| none | | | |"


def main() -> None:
    """Print it."""
    arguments = parser(__doc__)
    arguments.add_argument("files", nargs="+", metavar="FILE[@COMMIT]", help="one file, or one before and one after")
    versions = [read(asked) for asked in arguments.parse_args().files[:2]]
    print(table(versions))
    print(f"\n| lost, or ratio above {HIGH} | verdict | ratio | best rule |\n| --- | --- | --- | --- |")
    print(weak(versions[-1]))


if __name__ == "__main__":
    main()
