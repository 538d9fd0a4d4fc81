"""The units that wait for a slot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection

from pipeline.specs import Task


class UnitQueue:
    """Units by subject. A slot keeps its subject; otherwise the one with most work left wins.

    Subjects whose weights are fetched on the slot's node go first.
    """

    def __init__(self) -> None:
        self.by_subject: dict[str, list[Task]] = defaultdict(list)
        self.seconds: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self.by_subject)

    def add(self, task: Task) -> None:
        """Add a unit."""
        self.by_subject[task.spec.subject].append(task)
        self.seconds[task.spec.subject] += task.predicted_seconds  # type: ignore[assignment]

    def upcoming(self) -> list[str]:
        """Subjects that wait, most work left first."""
        return sorted(self.by_subject, key=lambda s: -self.seconds[s])

    def take(self, subject: str, fetched: Collection[str] = ()) -> Task | None:
        """The next unit for a slot that has ``subject``; None if there is none.

        ``fetched`` are subjects whose weights are on the slot's node or on their way to it.
        """
        if not self.by_subject:
            return None
        if subject not in self.by_subject:
            near = [s for s in fetched if s in self.by_subject]
            subject = max(near or self.by_subject, key=lambda s: self.seconds[s])
        tasks = self.by_subject[subject]
        task = tasks.pop(0)
        self.seconds[subject] -= task.predicted_seconds  # type: ignore[assignment]
        if not tasks:
            del self.by_subject[subject], self.seconds[subject]
        return task
