"""The ``bounds`` table in few numbers: how often each inequality holds, and by how much.

An inequality that is no theorem for the network at hand may fail: that is a finding. A theorem that
fails although its conditions are met is a bug or a numerical problem; it is counted apart.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.labels import counted

# Values of the column ``holds``.
YES, NO, UNDEFINED, MISSING = "yes", "no", "undefined", "missing"

COLUMNS = {
    "bound": "str", "kind": "str", "is_theorem": "bool", "num_checkpoints": "int64",
    "num_missing": "int64", "num_checks": "int64", "num_hold": "int64", "num_fail": "int64",
    "num_undefined": "int64", "num_conditions_unmet": "int64", "num_violated": "int64",
    "median_slack_log10": "float64", "min_slack_log10": "float64",
}  # fmt: skip

_Line = Mapping[Hashable, Any]


def summarize_bounds(bounds: pd.DataFrame) -> pd.DataFrame:
    """Count per inequality and form of it.

    Args:
        bounds: The ``bounds`` table of a run; may be empty.

    Returns:
        One row per (``bound``, ``kind``) that was evaluated, in the order of the table.
        ``num_checkpoints`` have checks of it; ``num_missing`` should have, but have no result.
        ``num_checks`` are the lines, one per checkpoint or one per checkpoint and layer:
        ``num_hold`` + ``num_fail`` + ``num_undefined``. ``num_conditions_unmet`` of them do not
        meet the conditions, ``num_violated`` fail as theorems whose conditions are met. The slack
        is log10(right / left) over the checks that hold or fail; NaN where there is none.
    """
    lines = bounds.to_dict("records")
    groups: dict[tuple[str, str], list[_Line]] = {}
    for line in lines:
        if line["holds"] != MISSING:
            groups.setdefault((line["bound"], line["kind"]), []).append(line)
    absent = [line for line in lines if line["holds"] == MISSING]
    rows = [
        {"bound": bound, "kind": kind, **_counts(group, absent), **_slack(group)}
        for (bound, kind), group in groups.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def bounds_headline(bounds: pd.DataFrame) -> str:
    """One sentence on all checks, empty where there are none.

    Such as ``bounds: 312 of 320 hold, 8 fail (0 of them theorems whose conditions are met)``.
    """
    lines = bounds.to_dict("records")
    if not lines:
        return ""
    counts = Counter(line["holds"] for line in lines)
    missing = {line["checkpoint"] for line in lines if line["holds"] == MISSING}
    text = (
        f"bounds: {counts[YES]} of {len(lines) - counts[MISSING]} hold, {counts[NO]} fail "
        f"({num_violated(bounds)} of them theorems whose conditions are met)"
    )
    text += f", {counts[UNDEFINED]} undefined" if counts[UNDEFINED] else ""
    return text + (f", {counted(len(missing), 'checkpoint')} without result" if missing else "")


def standing(is_theorem: bool, is_met: bool) -> str:
    """What a form of an inequality is for the networks of a run.

    Args:
        is_theorem: Whether it must hold under its conditions.
        is_met: Whether any of its checks meets them.
    """
    if not is_theorem:
        return "not a theorem"
    return "theorem" if is_met else "not a theorem here: conditions not met"


def num_violated(bounds: pd.DataFrame) -> int:
    """How many checks must not be: theorems that fail although their conditions are met."""
    return sum(map(_is_violated, bounds.to_dict("records")))


def _is_violated(line: _Line) -> bool:
    # Both are missing, not false, where nothing was evaluated.
    return line["holds"] == NO and line["is_theorem"] is True and line["conditions_met"] is True


def _counts(group: Sequence[_Line], absent: Sequence[_Line]) -> dict[str, object]:
    counts = Counter(line["holds"] for line in group)
    measured = {(line["metric"], line["label"]) for line in group}
    return {
        "is_theorem": any(line["is_theorem"] is True for line in group),
        "num_checkpoints": len({line["checkpoint"] for line in group}),
        "num_missing": len(
            {line["checkpoint"] for line in absent if (line["metric"], line["label"]) in measured}
        ),
        "num_checks": len(group),
        "num_hold": counts[YES],
        "num_fail": counts[NO],
        "num_undefined": counts[UNDEFINED],
        "num_conditions_unmet": sum(line["conditions_met"] is not True for line in group),
        "num_violated": sum(map(_is_violated, group)),
    }


def _slack(group: Sequence[_Line]) -> dict[str, float]:
    decided = [float(line["slack_log10"]) for line in group if line["holds"] in (YES, NO)]
    known = [slack for slack in decided if not math.isnan(slack)]
    return {
        # Of two middle ones the lower: the mean with an infinite one (left = 0) says nothing.
        "median_slack_log10": statistics.median_low(known) if known else math.nan,
        "min_slack_log10": min(known, default=math.nan),
    }
