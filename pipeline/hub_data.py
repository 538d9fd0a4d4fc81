"""Image data sets on the Hugging Face hub: which Parquet files make up a split.

A split is the files ``<split>-00000-of-00014.parquet`` of a repository (as in ILSVRC/imagenet-1k),
or ``<split>/0000.parquet`` (as the hub converts data sets itself, at revision
``refs/convert/parquet``), in any folder. The repository is resolved once to a commit; with
HF_HUB_OFFLINE=1, or for a full commit whose files are in the cache, nothing is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from huggingface_hub import constants

from pipeline.entries import DataSpec
from pipeline.errors import DataError, HubError
from pipeline.hub_file import COMMIT, HubFile
from pipeline.hub_listing import cached_file, cached_snapshots, listed


def files(
    data: DataSpec, *, split: str | None = None, locked: Sequence[HubFile] = ()
) -> tuple[HubFile, ...]:
    """Find the Parquet files of a split: all, or the first ``data.files``, at one commit.

    Args:
        data: A data table with ``name = "hub"``.
        split: Another split than the table's.
        locked: What a lock has of it. If that is enough, nobody is asked; if not, the rest is
            looked for at the same commit.

    Raises:
        DataError: If the repository has no such split, or the split lacks files.
        HubError: If the hub cannot be asked, or does not let us in.
    """
    split = split or data.split
    repo, revision = data.repo or "", data.revision
    if locked:
        found = _choose(locked, split, data.files)
        if found is not None and _is_whole(found, data.files):
            return found
        revision = locked[0].commit
    if constants.HF_HUB_OFFLINE or COMMIT.fullmatch(revision or ""):
        choices = [_choose(held, split, data.files) for held in _cached(repo, revision)]
        whole = [found for found in choices if found and _is_whole(found, data.files)]
        if len(whole) > 1:
            raise HubError(
                f"{repo}: offline, and the cache holds {len(whole)} revisions "
                f"({', '.join(found[0].commit for found in whole)}). Set 'revision' to one of them."
            )
        if whole:
            return whole[0]
    what = f"{repo} at {revision}" if revision else repo
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{what}: the split {split!r} is not whole in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set. Unset it, or fill the cache on a machine with network: "
            "flatcensus fetch. If its files are named as 0000.parquet, which does not tell how "
            "many there are, set files = their number.",
            unasked=True,
        )
    held = listed(repo, revision, "dataset", what=what)
    found = _choose(held, split, data.files)
    if found is not None:
        return found
    splits = sorted({name for file in held if (name := _split(file.filename))})
    raise DataError(
        f"{what}: expected the files of split {split!r} as data/{split}-00000-of-NNNNN.parquet, "
        f"whole and in one folder; found Parquet files of {', '.join(splits) or 'no split'}. "
        'Choose another split; one of several folders is split = "folder/name", and where the '
        'repository holds no Parquet files, revision = "refs/convert/parquet" may.'
    )


_NAME = re.compile(r"(?P<split>.+?)(?:-(?P<index>\d{5})-of-(?P<count>\d{5}).*|/\d+)\.parquet")


def _split(filename: str) -> str | None:
    """The split that a file belongs to, with its folder; None if it is no Parquet shard."""
    match = _NAME.fullmatch(filename)
    return match["split"] if match else None


def _is_whole(found: Sequence[HubFile], count: int | None) -> bool:
    """Whether these are all that is wanted: names without a count do not tell of others."""
    return (count is not None and len(found) >= count) or "-of-" in found[0].filename


def _choose(held: Iterable[HubFile], split: str, count: int | None) -> tuple[HubFile, ...] | None:
    """The files of a split in order, or None unless they are whole and of one folder."""
    shards: dict[str, list[HubFile]] = {}
    for file in sorted(held, key=lambda file: file.filename):
        found = _split(file.filename)
        if found is not None and (found == split or found.endswith(f"/{split}")):
            shards.setdefault(found, []).append(file)
    if len(shards) != 1:
        return None
    (chosen,) = shards.values()
    first = _NAME.fullmatch(chosen[0].filename)
    assert first is not None
    whole = int(first["count"]) if first["count"] else max(len(chosen), count or 1)
    wanted = whole if count is None else min(count, whole)
    matches = [_NAME.fullmatch(file.filename) for file in chosen[:wanted]]
    numbered = [int(m["index"]) for m in matches if m and m["index"]]
    if len(chosen) < wanted or (numbered and numbered != list(range(wanted))):
        return None
    return tuple(chosen[:wanted])


def _cached(repo: str, revision: str | None) -> list[list[HubFile]]:
    """What the cache holds of the repository at this revision; of each commit if none is given."""
    held = []
    for snapshot in cached_snapshots(repo, revision, "dataset"):
        paths = sorted(snapshot.rglob("*.parquet"))
        names = [path.relative_to(snapshot).as_posix() for path in paths]
        found = [cached_file(repo, snapshot, name, "dataset") for name in names]
        held.append([file for file in found if file is not None])
    return held
