"""How an attempt at a unit can end. Light: slots and schedulers read it without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.schema import Failure

# permanent: this unit can never succeed · memory: try a smaller batch · transient: try later ·
# unreachable: the hub did not answer after tries of its own · store: nothing can be written, stop
# the launch · crash, hang: the process died or went silent
FailureClass = Literal[
    "permanent", "memory", "transient", "unreachable", "store", "crash", "hang", "unexpected"
]


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt. Small and picklable: it crosses process and node borders.

    ``disk_full`` tells this cause of the failure class ``store`` apart.
    """

    status: Literal["committed", "duplicate", "failed"]
    seconds: float
    failure: Failure | None = None
    failure_class: FailureClass | None = None
    nondeterminism: str | None = None
    disk_full: bool = False


HINTS: dict[FailureClass, str] = {
    "permanent": "Mend the checkpoint or the data named above, then: flatcensus resume RUN",
    "memory": "Lower resources.batch_size or give a slot more memory, then: flatcensus resume RUN",
    "transient": "The network or hub failed repeatedly; when it answers: flatcensus resume RUN",
    "unreachable": "The hub does not answer; when it does: flatcensus resume RUN",
    "store": "Free space or restore access to the run folder, then: flatcensus resume RUN",
    "crash": "The process died without an exception (out of memory or a crash in native code); "
    "see the system log, lower resources.batch_size, then: flatcensus resume RUN",
    "hang": "No sign of life within resources.hang_seconds; raise it if the unit is only slow, "
    "then: flatcensus resume RUN",
    "unexpected": "An error without a known cause: please report it with this traceback",
}
