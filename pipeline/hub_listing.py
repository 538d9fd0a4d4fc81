"""What a repository on the hub holds: by the hub's listing, and in the cache of this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name

from pipeline.hub_file import SHA256, HubFile, RepoType
from pipeline.patience import patiently


def listed(repo_id: str, revision: str | None, repo_type: RepoType, *, what: str) -> list[HubFile]:
    """All files of a repository at a revision, None for the newest, pinned to its commit.

    Raises:
        HubError: If the hub cannot be asked, or does not let us in. ``what`` names it there.
    """
    ask = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
    info = patiently(lambda: ask(repo_id, revision=revision, files_metadata=True), what=what)
    if info.sha is None:
        return []
    return [
        HubFile(
            repo_id, info.sha, sibling.rfilename, sibling.size,
            sibling.lfs.sha256 if sibling.lfs else None, repo_type,
        )
        for sibling in info.siblings or ()
    ]  # fmt: skip


def cached_snapshots(repo_id: str, revision: str | None, repo_type: RepoType) -> list[Path]:
    """Folders of the commits that the cache may have: that of the revision, or of every commit."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    if reference.is_file():
        return [folder / "snapshots" / reference.read_text().strip()]
    if revision:
        return [folder / "snapshots" / revision]
    return list((folder / "snapshots").glob("*"))


def cached_file(repo_id: str, snapshot: Path, filename: str, repo_type: RepoType) -> HubFile | None:
    """A file of one of these folders; None if it is not there."""
    path = snapshot / filename
    if not path.is_file():
        return None
    blob = path.resolve()  # the cache names the blobs of large files by their sha256
    sha256 = blob.name if SHA256.fullmatch(blob.name) else None
    return HubFile(repo_id, snapshot.name, filename, blob.stat().st_size, sha256, repo_type)
