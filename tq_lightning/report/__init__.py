"""A report from run records: a tidy table, tables, figures and a page. It never imports torch."""
