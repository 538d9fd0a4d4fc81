"""Weights at a plain web address, whose name ends in the digits of their SHA-256."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from fake_hub import FakeHub, Fault
from hub_world import point, served
from huggingface_hub import constants

from pipeline import hub, patience
from pipeline.download import download
from pipeline.errors import HubError
from pipeline.hub_file import HubFile, identified, url_file
from pipeline.web import is_safe
from tasks.checkpoints import CheckpointError, describe_timm, load_checkpoint

MODEL = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def content() -> bytes:
    torch.manual_seed(3)
    buffer = io.BytesIO()
    torch.save(timm.create_model("test_vit").state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)
    with served() as fake:
        point(fake, monkeypatch, tmp_path)
        digits = hashlib.sha256(content).hexdigest()[:8]
        fake.files["web"] = {f"model-{digits}.pth": content}
        yield fake


def address(server: FakeHub) -> str:
    (name,) = server.files["web"]
    return f"{server.endpoint}/web/{name}"


def file_of(server: FakeHub) -> HubFile:
    file = url_file(address(server))
    assert file is not None
    return file


def test_all_of_timms_gcvit_have_such_an_address() -> None:
    names = timm.list_models("gcvit*", pretrained=True)
    files = [hub.resolve(name) for name in names]
    assert len(files) == 5
    assert {file.repo_type for file in files} == {"url"}
    assert all(len(file.commit) == 8 and file.url.startswith("https://") for file in files)


def test_an_address_without_digits_or_without_https_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert url_file("https://x.org/model.pth") is None
    assert not is_safe("http://x.org/model-0123abcd.pth")
    assert not is_safe("file:///etc/model-0123abcd.pth")
    cfg = timm.get_pretrained_cfg("gcvit_tiny.in1k")
    for url in ("https://x.org/model.pth", "http://x.org/model-0123abcd.pth"):
        monkeypatch.setattr(cfg, "url", url)
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda *_, **__: cfg)
        with pytest.raises(HubError, match="no https address of a file whose name ends in digits"):
            hub.resolve("gcvit_tiny.in1k")


def test_weights_are_fetched_checked_and_loaded_and_the_identity_never_changes(
    server: FakeHub, content: bytes
) -> None:
    file = file_of(server)
    ref = describe_timm(MODEL, identity=file.identity)
    path = download(identified(ref.identity))
    assert path.read_bytes() == content
    loaded = load_checkpoint(ref.model_copy(update={"path": str(path)})).model
    expected = torch.load(io.BytesIO(content), weights_only=True)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    server.requests.clear()
    assert download(file) == path
    assert server.requests == [], "a cached file costs no request"
    assert {token for path, token in server.tokens if path.startswith("/web/")} == {None}
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="expected sha256"):
        load_checkpoint(ref.model_copy(update={"path": str(path)}))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    buffer = io.BytesIO()
    torch.save({"weight": Evil()}, buffer)
    path = tmp_path / f"m-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    path.write_bytes(buffer.getvalue())
    file = url_file(f"https://x.org/{path.name}")
    assert file is not None
    ref = describe_timm(MODEL, identity=file.identity, path=path)
    with pytest.raises(CheckpointError, match="could execute code"):
        load_checkpoint(ref)


def test_a_cut_connection_goes_on_where_it_broke(server: FakeHub, content: bytes) -> None:
    server.faults = [Fault("/web/", cut_after=len(content) // 2)]
    assert download(file_of(server)).read_bytes() == content
    part = list(Path(constants.HF_HUB_CACHE).rglob("*.part"))
    assert (part, len(server.begun)) == ([], 2)


def test_what_a_killed_process_left_is_taken_up(server: FakeHub, content: bytes) -> None:
    file = file_of(server)
    folder = Path(constants.HF_HUB_CACHE) / "flatcensus"
    folder.mkdir(parents=True)
    (folder / f"{file.filename}.part").write_bytes(content[:1000])
    assert download(file).read_bytes() == content
    (folder / f"{file.filename}.part").write_bytes(content)  # complete, but not yet renamed
    (folder / file.filename).unlink()
    assert download(file).read_bytes() == content
    (folder / f"{file.filename}.part").write_bytes(b"x" * 10)  # foreign bytes
    (folder / file.filename).unlink()
    assert download(file).read_bytes() == content


def test_busy_servers_and_wrong_bytes_are_met_with_the_same_patience(
    server: FakeHub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.faults = [
        Fault("/web/", status=429, headers={"Retry-After": "37"}),
        Fault("/web/", status=503),
        Fault("/web/", wrong_bytes=True),
    ]
    assert download(file_of(server)).read_bytes() == content
    assert pauses == [37, 0]
    server.faults = [Fault("/web/", wrong_bytes=True, times=99)]
    download(file_of(server)).unlink()
    with pytest.raises(HubError, match=r"whose SHA-256 starts with \w{8}.* received others 3"):
        download(file_of(server))


def test_a_missing_file_is_named_with_its_address(server: FakeHub) -> None:
    file = file_of(server)
    server.files["web"] = {}
    with pytest.raises(HubError, match=rf"{file.filename}: not found at 127"):
        download(file)
