"""Tables as data, and their written forms: Markdown, LaTeX and the page's cells come from the same rows."""

import re
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

    lines = [
        row(table.columns),
        row(["---"] * len(table.columns)),
        *(row([text(c) for c in cells]) for cells in table.rows),
    ]
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
LONG = 36  # characters beyond which a cell is wrapped


def latex(table: Table) -> str:
    r"""A booktabs `table`, or a `longtable` where the rows don't fit a page; its first line says which packages it needs.

    Columns of numbers are set right; of words that are long, wrapped. What is still wider than the text is scaled down to
    it, and the notes stand below the float, where they may run over a page.
    """

    def row(cells: list[str]) -> str:
        return " & ".join(safe(cell) for cell in cells) + r" \\"

    def safe(words: str) -> str:
        return "".join(LATEX.get(c, c if c <= LAST_SETUP else "?") for c in words)

    shown = [[text(c) for c in cells] for cells in table.rows]
    caption = safe(f"{table.title}. {table.caption}")
    body = "\n".join(map(row, shown))
    named = rf"\caption{{{caption}}}\label{{tab:{table.name}}}"
    heads, columns = (
        row(table.columns),
        "".join(_column([cells[i] for cells in shown]) for i in range(len(table.columns))),
    )
    notes = "".join(
        f"\n\\noindent{{\\footnotesize\\raggedright {safe(note)}\\par}}" for note in table.notes
    )
    if len(table.rows) > PAGE_ROWS:
        return rf"""% \usepackage{{array,booktabs,longtable,pdflscape}}
\begin{{landscape}}\scriptsize\setlength{{\tabcolsep}}{{2pt}}
\begin{{longtable}}{{{columns}}}
{named}\\
\toprule
{heads}
\midrule
\endhead
{body}
\bottomrule
\end{{longtable}}{notes}
\end{{landscape}}
"""
    return rf"""% \usepackage{{array,booktabs,graphicx}}
\begin{{table}}
\centering
{named}
\setlength{{\tabcolsep}}{{3pt}}
\resizebox{{\ifdim\width>\textwidth\textwidth\else\width\fi}}{{!}}{{%
\begin{{tabular}}{{{columns}}}
\toprule
{heads}
\midrule
{body}
\bottomrule
\end{{tabular}}}}
\end{{table}}{notes}
"""


def _column(cells: list[str]) -> str:
    """How LaTeX sets a column."""
    if (longest := max(map(len, cells), default=0)) > LONG:
        # Half a letter's width each on about four lines: a narrower column would be taller than the page.
        return rf">{{\raggedright\arraybackslash}}p{{{max(20, longest // 8)}em}}"
    filled = [cell for cell in cells if cell]
    return "r" if filled and all(re.match(r"[-+]?[\d.]", cell) for cell in filled) else "l"
