"""Sweeps: one file in the W&B format, run by `wandb agent` and by our Optuna engine alike.

`space` reads the file, `twins` turns it into Optuna's terms, `ledger` keeps count of what is to be run (and survives
killed workers), `trial` runs one `fit`, `worker` runs one after another, `optuna_engine` runs the whole study.
"""
