"""Tables as data, and their written forms: Markdown, LaTeX and the page's cells come from the same rows."""

from dataclasses import dataclass
from typing import Any

Cell = Any  # str, int, float or None; (text, sort key) where the text does not sort by itself


@dataclass
class Table:
    """`columns` name the cells of every row; `facets` are the columns worth a drop-down filter on the page; `notes` are
    lines that belong under the table."""

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    facets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def text(cell: Cell) -> str:
    """A cell as printed."""
    if isinstance(cell, tuple):
        return str(cell[0])
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def sort_key(cell: Cell) -> Any:
    """What a cell sorts by: a number where there is one."""
    return cell[1] if isinstance(cell, tuple) else cell


def markdown(table: Table) -> str:
    """GitHub Markdown with the caption under the table."""

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    lines = [row(table.columns), row(["---"] * len(table.columns)), *(row([text(c) for c in cells]) for cells in table.rows)]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"### {table.title}", "", *lines, "", table.caption, *notes, ""])


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "−": "--",
    "…": r"\ldots{}",
    "√": r"$\surd$",
    "<": r"$<$",
    ">": r"$>$",
    "≈": r"$\approx$",
    "[": "{[}",  # at the head of a row it would be read as an argument of the line break before it
}
LAST_SETUP = "\u017f"  # letters up to here are set up in LaTeX by itself; a later one would stop the compiler
PAGE_ROWS = 40  # rows that fit a page


def latex(table: Table) -> str:
    """A booktabs `table`, or a `longtable` where the rows don't fit a page; its first line says which packages it needs."""

    def row(cells: list[str]) -> str:
        return " & ".join(safe(cell) for cell in cells) + r" \\"

    def safe(words: str) -> str:
        return "".join(LATEX.get(c, c if c <= LAST_SETUP else "?") for c in words)

    caption = safe(" ".join([f"{table.title}.", table.caption, *table.notes]))
    body = "\n".join(row([text(c) for c in cells]) for cells in table.rows)
    named = rf"\caption{{{caption}}}\label{{tab:{table.name}}}"
    heads, columns = row(table.columns), "l" * len(table.columns)
    if len(table.rows) > PAGE_ROWS:
        return rf"""% \usepackage{{booktabs,longtable}}
\begin{{longtable}}{{{columns}}}
{named}\\
\toprule
{heads}
\midrule
\endhead
{body}
\bottomrule
\end{{longtable}}
"""
    return rf"""% \usepackage{{booktabs}}
\begin{{table}}
\centering
{named}
\begin{{tabular}}{{{columns}}}
\toprule
{heads}
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table}}
"""
