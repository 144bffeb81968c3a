"""Packed files of small networks."""

from fixtures.packed import make, net, packed  # noqa: F401
