"""One file of weights or data on the hub, or on the web: where it is and how to know it again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

RepoType = Literal["model", "dataset", "url"]
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_IDENTITY = re.compile(r"hub:([^@]+)@([^/]+)/([^#]+)(?:#([0-9a-f]{64}))?")
URL_IDENTITY = re.compile(r"url:(.+)/([^/]+-([0-9a-f]{8,64})\.[^/.]+)")
# Of weights whose commit nobody knows yet. Only ``plan`` meets it; nothing is stored under it.
UNLOCKED = "unlocked:"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit, or one of a web server.

    Attributes:
        repo_id: The repository; for ``url`` the address of the file's folder.
        commit: Its commit; for ``url`` the leading digits of the SHA-256 that the file's name ends
            in.
        filename: The file in it.
        size: In bytes, None where it is not known.
        sha256: What the hub states (for files in large-file storage, as weights are), else None.
        repo_type: What kind of repository it is.
    """

    repo_id: str
    commit: str
    filename: str
    size: int | None
    sha256: str | None
    repo_type: RepoType = "model"

    @property
    def identity(self) -> str:
        """What a checkpoint reference carries: enough to fetch the file, and to know it again.

        A web address holds digits of the content's SHA-256, so it is the same before and after the
        download.
        """
        if self.repo_type == "url":
            return f"url:{self.url}"
        digest = f"#{self.sha256}" if self.sha256 else ""
        return f"hub:{self.repo_id}@{self.commit}/{self.filename}{digest}"

    @property
    def content(self) -> str:
        """What enters keys: the identity without the commit where the content's SHA-256 is known.

        A commit that changes something else of the repository makes no result stale.
        """
        return content_of(self.identity)

    @property
    def url(self) -> str:
        """Address of a file on a web server."""
        return f"{self.repo_id}/{self.filename}"

    @property
    def what(self) -> str:
        """How the file is called in messages."""
        if self.repo_type == "url":
            return self.url
        return f"{self.repo_id}/{self.filename} at {self.commit[:12]}"


def url_file(url: str) -> HubFile | None:
    """The file at a web address, or None if its name does not end in digits of its SHA-256."""
    match = URL_IDENTITY.fullmatch(f"url:{url}")
    return HubFile(match[1], match[3], match[2], None, None, "url") if match else None


def identified(identity: str) -> HubFile:
    """The file that an identity names; its size is not known."""
    if match := URL_IDENTITY.fullmatch(identity):
        return HubFile(match[1], match[3], match[2], None, None, "url")
    match = HUB_IDENTITY.fullmatch(identity)
    assert match, identity
    return HubFile(match[1], match[2], match[3], None, match[4])


def content_of(identity: str) -> str:
    """``HubFile.content`` from an identity; other identities are their own."""
    match = HUB_IDENTITY.fullmatch(identity)
    if match is None or match[4] is None:
        return identity
    return f"hub:{match[1]}/{match[3]}#{match[4]}"
