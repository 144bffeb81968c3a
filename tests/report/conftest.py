"""Synthetic records."""

from fixtures.records import make  # noqa: F401
