"""What a shard holds: the columns of its rows and the record of the unit that made them.

Raise ``SCHEMA_VERSION`` when a column or a field changes; shards of another version are then
refused by name instead of being misread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pydantic

from tasks.block import Block

SCHEMA_VERSION = 1

# Few different values per shard: stored as a dictionary and small integers.
_LABEL = pa.dictionary(pa.int32(), pa.string())

# The same for all rows of a unit.
CONSTANT_FIELDS = (
    pa.field("spec_key", _LABEL, nullable=False),
    pa.field("checkpoint", _LABEL, nullable=False),
    pa.field("family", _LABEL),
    pa.field("metric", _LABEL, nullable=False),
    pa.field("label", _LABEL, nullable=False),
    pa.field("series", _LABEL),
    pa.field("metric_version", pa.int32(), nullable=False),
    pa.field("code_version", _LABEL, nullable=False),
    pa.field("torch_version", _LABEL, nullable=False),
    pa.field("timm_version", _LABEL),
)

# The fields of tasks.measurement.Row, by name.
ROW_FIELDS = (
    pa.field("quantity", _LABEL, nullable=False),
    pa.field("sample", pa.int32()),
    pa.field("draw", pa.int32()),
    pa.field("group", pa.int32()),
    pa.field("layer", _LABEL),
    pa.field("step", pa.int64()),
    pa.field("value", pa.float64(), nullable=False),
    pa.field("stderr", pa.float64()),
    pa.field("lower", pa.float64()),
    pa.field("upper", pa.float64()),
    pa.field("loss_change_plus", pa.float64()),
    pa.field("loss_change_minus", pa.float64()),
    pa.field("status", _LABEL, nullable=False),
    pa.field("num_iterations", pa.int32(), nullable=False),
    pa.field("num_probes", pa.int32(), nullable=False),
    pa.field("forward_equivalents", pa.float64(), nullable=False),
    pa.field("seconds", pa.float64(), nullable=False),
)

MEASUREMENT_SCHEMA = pa.schema([*CONSTANT_FIELDS[:7], *ROW_FIELDS, *CONSTANT_FIELDS[7:]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Columns that are the same for all rows of a unit and that its record does not name."""

    metric_version: int
    code_version: str
    torch_version: str
    timm_version: str | None = None
    series: str | None = None


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Failure(_Frozen):
    """Why a unit failed: its failure class (``class`` in JSON), the exception, what to do."""

    class_: str = pydantic.Field(
        serialization_alias="class", validation_alias=pydantic.AliasChoices("class_", "class")
    )
    type: str
    message: str
    hint: str = ""
    traceback: str = ""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, text: Any) -> Any:
        # Messages may quote file names that are not UTF-8; a failure must be recordable anyway.
        return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


class UnitRecord(_Frozen):
    """Provenance of one unit: what was run, by whom, where, when, and how it ended.

    ``start``/``stop`` bound the unit's samples, ``draw_start``/``draw_stop`` its weight draws,
    ``generation`` counts its failure records,
    ``attempt`` its tries within one launch. Times are UTC in ISO 8601, ``peak_bytes`` is memory.
    ``seconds`` is wall-clock time; ``cpu_seconds`` leaves out what others had of the cores. Both
    hold ``load_seconds``, for fetching and reading network and images where they were not there
    yet, and the self-test if the unit ``self_tested``. None where an older flatcensus wrote them.
    ``artifacts`` maps keys of the run folder to SHA-256 digests. Nothing here determines a number.
    """

    schema_version: int = SCHEMA_VERSION
    spec_key: str
    start: int = pydantic.Field(ge=0)
    stop: int
    draw_start: int = pydantic.Field(default=0, ge=0)
    draw_stop: int = 1
    checkpoint: str
    family: str | None = None
    metric: str
    label: str
    kind: Literal["measure", "train"] = "measure"
    status: Literal["ok", "failed"] = "ok"
    failure: Failure | None = None
    generation: int = pydantic.Field(default=0, ge=0)
    attempt: int = 1
    host: str
    device: str
    pid: int
    threads: int
    batch_size: int | None = None
    started_at: str
    finished_at: str
    seconds: float
    predicted_seconds: float | None = None
    cpu_seconds: float | None = None
    load_seconds: float | None = None
    self_tested: bool | None = None
    peak_bytes: int | None = None
    num_rows: int = 0
    versions: dict[str, str] = pydantic.Field(default_factory=dict)
    self_test: dict[str, Any] | None = None
    artifacts: dict[str, str] = pydantic.Field(default_factory=dict)
    pinned: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _is_consistent(self) -> UnitRecord:
        for first, stop in ((self.start, self.stop), (self.draw_start, self.draw_stop)):
            if stop <= first:
                raise ValueError(f"stop must be above start, found {first}-{stop}")
        if (self.status == "failed") != (self.failure is not None):
            raise ValueError(f"status {self.status!r} does not fit failure={self.failure!r}")
        if self.status == "failed" and self.num_rows:
            raise ValueError(f"a failed unit has no rows, found num_rows={self.num_rows}")
        return self

    @property
    def block(self) -> Block:
        """The unit's samples and draws."""
        return Block(range(self.start, self.stop), range(self.draw_start, self.draw_stop))


# UnitRecord as a flat table: nested fields as JSON text, the failure's fields as columns.
UNITS_SCHEMA = pa.schema(
    [
        pa.field(name, kind)
        for kind, names in {
            pa.string(): (
                "spec_key checkpoint family metric label kind status failure_class failure_type "
                "failure_message failure_hint failure_traceback host device started_at finished_at "
                "versions self_test artifacts pinned"
            ),
            pa.int64(): (
                "schema_version start stop draw_start draw_stop generation attempt pid threads "
                "batch_size peak_bytes num_rows"
            ),
            pa.float64(): "seconds predicted_seconds cpu_seconds load_seconds",
            pa.bool_(): "self_tested superseded",
        }.items()
        for name in names.split()
    ]
)
