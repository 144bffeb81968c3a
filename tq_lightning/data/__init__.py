"""Data sets and their batches: reading, sampling, augmentation, and the data module."""
