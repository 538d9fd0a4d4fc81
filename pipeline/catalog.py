"""What a manifest can name: metrics, data sets, networks, timm's families and its models."""

from __future__ import annotations

import pandas as pd

from pipeline.errors import UsageError, did_you_mean

KINDS = ("metrics", "datasets", "networks", "families", "models")


def catalog(what: str, pattern: str = "*") -> pd.DataFrame:
    """A table of one kind of things. Raises UsageError for another kind."""
    if what == "metrics":
        from tasks.registry import METRICS

        lines = [
            {
                "metric": name,
                "version": cls.version,
                "quantities": ", ".join(cls.quantities),
                "labels": "needed" if cls.needs_labels else "not needed",
                "settings": ", ".join(
                    f"{key}={field.default!r}" for key, field in cls.model_fields.items()
                ),
            }
            for name, cls in sorted(METRICS.items())
        ]
    elif what == "datasets":
        from pipeline.entries import DataSpec

        annotation = DataSpec.model_fields["name"].annotation
        lines = [{"dataset": name} for name in getattr(annotation, "__args__", ())]
    elif what == "networks":
        from tasks.training import TrainSettings

        annotation = TrainSettings.model_fields["network"].annotation
        lines = [{"network": name} for name in getattr(annotation, "__args__", ())]
    elif what == "families":
        from tasks.families import FAMILIES, traits_of

        lines = [
            {
                "family": name,
                "for example": ", ".join(member.architecture for member in members),
                "special": ", ".join(traits_of(name)),
                "not defined": ", ".join(dict.fromkeys(s for m in members for s in m.cannot)),
            }
            for name, members in FAMILIES.items()
        ]
    elif what == "models":
        import timm

        lines = [{"model": name} for name in timm.list_models(pattern, pretrained=True)]
    else:
        raise UsageError(f"cannot list {what!r}.{did_you_mean(what, KINDS)}")
    return pd.DataFrame(lines)
