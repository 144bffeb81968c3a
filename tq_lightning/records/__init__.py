"""record.json: its fields, their validation, reading and writing.

A run writes a `Record`, `inspect --out` an `InspectRecord`. These dataclasses are the schema: a
file is validated against their annotations when it is read.
"""

from tq_lightning.records.inspect import (
    STORAGE_LABELS,
    Energy,
    InspectRecord,
    Layer,
    Mechanism,
    StorageBytes,
)
from tq_lightning.records.json_tree import SCHEMA, Number, Points, RecordError
from tq_lightning.records.metrics import (
    ACC1,
    PPL,
    STORAGE_BYTES,
    TASKS,
    Metric,
    goal_of,
    metric_of,
)
from tq_lightning.records.read_write import (
    NAME,
    SOURCES,
    mark_superseded,
    parse,
    read_any,
    read_record,
    write_record,
)
from tq_lightning.records.run import (
    MONITOR,
    Change,
    Evaluation,
    ModelBytes,
    Record,
    TestResult,
    WidthResult,
    format_value,
    record_at,
    value_of,
    width_results,
)

__all__ = [
    "ACC1",
    "MONITOR",
    "NAME",
    "PPL",
    "SCHEMA",
    "SOURCES",
    "STORAGE_BYTES",
    "STORAGE_LABELS",
    "TASKS",
    "Change",
    "Energy",
    "Evaluation",
    "InspectRecord",
    "Layer",
    "Mechanism",
    "Metric",
    "ModelBytes",
    "Number",
    "Points",
    "Record",
    "RecordError",
    "StorageBytes",
    "TestResult",
    "WidthResult",
    "format_value",
    "goal_of",
    "mark_superseded",
    "metric_of",
    "parse",
    "read_any",
    "read_record",
    "record_at",
    "value_of",
    "width_results",
    "write_record",
]
