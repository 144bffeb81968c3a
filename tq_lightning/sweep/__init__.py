"""Hyperparameter sweeps: W&B sweep files, run by Optuna without an account or a network.

In reading order: `config` reads a sweep file, `launcher` starts worker processes, each `worker`
claims trials from the `trial_queue`, and `trial` runs one as a `fit` and reads its result.
"""
