"""The tables of a report, and their written forms."""
