"""Lightning callbacks and loggers of a run: evaluation, record, metrics, resume, signals."""
