"""Tables as data, and their Markdown and LaTeX forms. The page renders the same rows."""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd

# str, int, float or None; (text, sort key) if the text has another order. The column "run" has
# (text, id): its cells open the details of a run.
Cell = Any


@dataclass
class Table:
    """A table: rows of {column: cell}; facets are columns with a filter."""

    name: str
    title: str
    caption: str
    rows: list[dict[str, Cell]]
    facets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    has_files: bool = True  # False: only on the page

    @property
    def columns(self) -> list[str]:
        """Column headers. A row may lack some of them."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @property
    def shown(self) -> pd.DataFrame:
        """The cells as text."""
        return pd.DataFrame(self.rows, columns=self.columns, dtype=object).map(text)


def text(cell: Cell) -> str:
    """Format a cell."""
    if isinstance(cell, tuple):
        return str(cell[0])
    if pd.isna(cell):
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def sort_key(cell: Cell) -> Any:
    """Return the sort key of a cell: a number if it has one."""
    return cell[1] if isinstance(cell, tuple) else cell


def markdown(table: Table) -> str:
    """Return GitHub Markdown with the caption and the notes below the table."""
    cells = [table.columns, ["---"] * len(table.columns), *table.shown.to_numpy().tolist()]
    rows = [" | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) for row in cells]
    lines = [f"| {row} |" for row in rows]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"### {table.title}", "", *lines, "", table.caption, *notes, ""])


LATEX = {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "µ": r"$\mu$", "√": r"$\surd$"},
    **{"<": r"$<$", ">": r"$>$", "≈": r"$\approx$", "−": "--", "…": r"\ldots{}"},
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "[": "{[}",  # at the start of a row, LaTeX reads [ as an argument of the line break before it
}
LAST_SETUP = "\u017f"  # LaTeX fails on letters beyond this one unless they are declared
PAGE_ROWS = 40  # rows that fit on a page
LONG = 36  # longer cells are wrapped


def latex(table: Table) -> str:
    r"""Return a booktabs `table`, or a landscape `longtable` if the rows do not fit on a page.

    The first line names the required packages. Numbers are right-aligned, and long text is wrapped.
    A `table` wider than the text is scaled down. Notes are placed below the float, where they can
    break across pages.
    """
    shown = table.shown
    columns = "".join(_column(shown.iloc[:, i].tolist()) for i in range(len(table.columns)))
    long = len(table.rows) > PAGE_ROWS
    frame = shown.map(_safe).rename(columns=_safe)
    caption = rf"\caption{{{_safe(f'{table.title}. {table.caption}')}}}\label{{tab:{table.name}}}"
    body = frame.to_latex(index=False, escape=False, column_format=columns, longtable=long)
    notes = "".join(
        f"\n\\noindent{{\\footnotesize\\raggedright {_safe(note)}\\par}}" for note in table.notes
    )
    if long:
        begin, rest = body.split("\n", 1)
        return (
            "% \\usepackage{array,booktabs,longtable,pdflscape}\n\\begin{landscape}\\scriptsize"
            f"\\setlength{{\\tabcolsep}}{{2pt}}\n{begin}\n{caption}\\\\\n{rest}{notes}\n"
            "\\end{landscape}\n"
        )
    scale = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"
    return (
        f"% \\usepackage{{array,booktabs,graphicx}}\n\\begin{{table}}\n\\centering\n{caption}\n"
        f"\\setlength{{\\tabcolsep}}{{3pt}}\n{scale}\n{body.rstrip()}}}\n\\end{{table}}{notes}\n"
    )


def _safe(words: str) -> str:
    return "".join(LATEX.get(c, c if c <= LAST_SETUP else "?") for c in words)


def _column(cells: list[str]) -> str:
    """Return the LaTeX specification of a column."""
    if (longest := max(map(len, cells), default=0)) > LONG:
        # Half an em per letter, about four lines. A narrower column could be taller than a page.
        return rf">{{\raggedright\arraybackslash}}p{{{max(20, longest // 8)}em}}"
    filled = [cell for cell in cells if cell]
    return "r" if filled and all(re.match(r"[-+]?[\d.]", cell) for cell in filled) else "l"
