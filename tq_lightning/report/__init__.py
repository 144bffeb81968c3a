"""From run records (JSON files) to one report: tidy table, tables, figures and a page. Never imports torch."""
