import hashlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from fake_hub import COMMIT, FakeHub, Fault, fake_hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save

from pipeline import patience
from pipeline.errors import HubError
from pipeline.hub import download, fetch_fashion_mnist, resolve
from pipeline.hub_file import identified
from tasks.checkpoints import CheckpointError, describe_timm, load_checkpoint
from tasks.datasets import load_dataset

NAME = "test_vit.r160_in1k"
REPO = f"timm/{NAME}"
TOKEN = "hf_" + "Sentinel" * 4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit").eval()


@pytest.fixture(scope="module")
def weights(model: torch.nn.Module) -> bytes:
    return save(model.state_dict())


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def hub(
    weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> Iterator[FakeHub]:
    with fake_hub({REPO: {"model.safetensors": weights, "config.json": b"{}"}}) as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def go_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def shown(error: pytest.ExceptionInfo[HubError]) -> str:
    return "".join(traceback.format_exception(error.value))


def test_a_name_is_resolved_to_commit_file_and_sha256(hub: FakeHub, weights: bytes) -> None:
    file = resolve(NAME)
    assert (file.repo_id, file.commit, file.filename) == (REPO, COMMIT, "model.safetensors")
    assert (file.size, file.sha256) == (len(weights), hashlib.sha256(weights).hexdigest())
    assert resolve("test_vit") == file, "timm's default tag"


def test_a_downloaded_model_gives_the_outputs_of_the_saved_one(
    hub: FakeHub, model: torch.nn.Module
) -> None:
    file = resolve(NAME)
    ref = describe_timm(NAME, identity=file.identity)
    loaded = load_checkpoint(
        ref.model_copy(update={"path": str(download(identified(ref.identity)))})
    )
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(images), loaded.model(images)
    # Fused attention is off in the loaded model: float32 sums in another order, nothing else.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert ref.family == "vision_transformer"


def test_a_reference_names_its_file_again(hub: FakeHub) -> None:
    file = resolve(NAME)
    again = identified(describe_timm(NAME, identity=file.identity).identity)
    assert (again.repo_id, again.commit, again.filename, again.sha256) == (
        file.repo_id,
        file.commit,
        file.filename,
        file.sha256,
    )


def test_a_cached_file_costs_no_request(hub: FakeHub) -> None:
    file = resolve(NAME)
    path = download(file)
    hub.requests.clear()
    assert download(file) == path
    assert resolve(NAME, revision=COMMIT) == file
    assert hub.requests == []


def test_offline_the_name_is_resolved_from_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = resolve(NAME)
    path = download(file)
    go_offline(hub, monkeypatch)
    assert resolve(NAME) == file
    assert download(file) == path
    assert hub.requests == []


def test_offline_without_cache_says_so_and_asks_nobody(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = resolve(NAME)
    go_offline(hub, monkeypatch)
    with pytest.raises(HubError, match=r"not in the cache .* HF_HUB_OFFLINE is set"):
        resolve(NAME)
    with pytest.raises(HubError, match=r"not in the cache .* HF_HUB_OFFLINE is set"):
        download(file)
    assert hub.requests == []


def test_offline_with_two_cached_revisions_asks_for_one(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(NAME)
    download(first)
    hub.commit = "f" * 40
    download(resolve(NAME))
    go_offline(hub, monkeypatch)
    with pytest.raises(HubError, match="holds 2 revisions"):
        resolve(NAME)
    assert resolve(NAME, revision=COMMIT) == first


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub: FakeHub, pauses: list[float], status: int) -> None:
    hub.faults = [Fault("/api/", status=status, times=2), Fault("/cdn/", status=status, times=2)]
    assert download(resolve(NAME)).is_file()
    assert [path for _, path in hub.requests].count(f"/api/models/{REPO}") == 3
    for pause, base in zip(pauses[:2], (1, 2), strict=True):
        assert base / 2 <= pause <= base, "exponential, with jitter of a factor 1/2 to 1"


def test_retry_after_is_honoured(hub: FakeHub, pauses: list[float]) -> None:
    hub.faults = [Fault("/api/", status=429, headers={"Retry-After": "37"})]
    resolve(NAME)
    assert pauses == [37]


def test_the_hubs_own_rate_limit_header_is_honoured(hub: FakeHub, pauses: list[float]) -> None:
    hub.faults = [Fault("/api/", status=429, headers={"ratelimit": '"api";r=0;t=55'})]
    resolve(NAME)
    assert pauses == [55]


def test_a_wait_beyond_the_rate_limit_window_is_left_to_the_user(
    hub: FakeHub, pauses: list[float]
) -> None:
    hub.faults = [Fault("/api/", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(HubError, match="asks to wait 3600 s") as error:
        resolve(NAME)
    assert pauses == []
    assert error.value.unasked, "no checkpoint is at fault: a launch stops, and no unit fails"


def test_a_hub_that_stays_broken_ends_after_bounded_tries(
    hub: FakeHub, pauses: list[float]
) -> None:
    hub.faults = [Fault("/api/", status=502, times=100)]
    with pytest.raises(HubError, match="HTTP status 502 after 6 tries"):
        resolve(NAME)
    assert len(hub.requests) == patience.TRIES
    assert len(pauses) == patience.TRIES - 1


def test_a_cut_connection_is_resumed(hub: FakeHub, weights: bytes) -> None:
    hub.faults = [Fault("/cdn/", cut_after=len(weights) // 2)]
    assert download(resolve(NAME)).read_bytes() == weights


def test_wrong_bytes_are_fetched_again(hub: FakeHub, weights: bytes) -> None:
    hub.faults = [Fault("/cdn/", wrong_bytes=True, times=2)]
    assert download(resolve(NAME)).read_bytes() == weights


def test_bytes_that_stay_wrong_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault("/cdn/", wrong_bytes=True, times=100)]
    with pytest.raises(HubError, match="received other bytes 3 times"):
        download(resolve(NAME))
    left = [p for p in (tmp_path / "cache").rglob("model.safetensors")]
    assert left == [], "no wrong file stays behind"


def test_a_file_that_rots_in_the_cache_is_fetched_again(hub: FakeHub, weights: bytes) -> None:
    path = download(resolve(NAME))
    path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert download(resolve(NAME)).read_bytes() == weights


def test_weights_that_change_after_the_download_are_refused(hub: FakeHub, weights: bytes) -> None:
    file = resolve(NAME)
    path = download(file)
    path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="expected sha256"):
        load_checkpoint(
            describe_timm(NAME, identity=file.identity).model_copy(update={"path": str(path)})
        )


def test_a_missing_repository_is_named(hub: FakeHub, pauses: list[float]) -> None:
    with pytest.raises(HubError, match=r"timm/test_vit2.r160_in1k: no such repository"):
        resolve("test_vit2.r160_in1k")
    assert pauses == []


def test_a_missing_revision_is_named(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"at v7: no such revision"):
        resolve(NAME, revision="v7")


@pytest.mark.parametrize(
    ("status", "headers", "text"),
    [
        (401, {}, "does not accept the login"),
        (403, {}, "refuses access"),
        (403, {"X-Error-Code": "GatedRepo"}, "refuses access"),
    ],
)
def test_refused_access_hints_at_a_token_and_never_shows_it(
    hub: FakeHub, pauses: list[float], status: int, headers: dict[str, str], text: str
) -> None:
    hub.faults = [Fault("/api/", status=status, headers=headers, times=100)]
    with pytest.raises(HubError, match=text) as error:
        resolve(NAME)
    assert any(token == f"Bearer {TOKEN}" for _, token in hub.tokens), "the token was sent"
    assert "HF_TOKEN" in str(error.value)
    assert TOKEN not in shown(error)
    assert pauses == [], "waiting would not help"


def test_the_token_stays_at_the_hub(hub: FakeHub) -> None:
    download(resolve(NAME))
    assert {token for path, token in hub.tokens if path.startswith("/cdn/")} == {None}


def test_without_network_the_endpoint_is_named(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(HubError, match=r"cannot reach http://127\.0\.0\.1:9 after 6 tries"):
        resolve(NAME)
    assert len(pauses) == patience.TRIES - 1


def test_a_repository_without_safetensors_is_refused(hub: FakeHub) -> None:
    hub.files[REPO] = {"pytorch_model.bin": b"pickle"}
    with pytest.raises(HubError, match=r"found pytorch_model\.bin\. .* can execute code"):
        resolve(NAME)


def test_a_name_that_timm_does_not_know_gets_the_nearest(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="Did you mean"):
        resolve("test_vitt.r160_in1k")
    with pytest.raises(HubError, match=r"Known: test_vit\.r160_in1k"):
        resolve("test_vit.other")
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubError, match="cannot write to the cache"):
        download(resolve(NAME))


def test_fashion_mnist_is_converted_to_what_the_reader_takes(hub: FakeHub, tmp_path: Path) -> None:
    sets = {"train": 5, "test": 3}
    pixels = {
        split: np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        for split, n in sets.items()
    }
    hub.files["datasets/zalando-datasets/fashion_mnist"] = {
        f"fashion_mnist/{split}-00000-of-00001.parquet": parquet(images)
        for split, images in pixels.items()
    }
    folder = fetch_fashion_mnist(tmp_path / "data")
    for split, images in pixels.items():
        dataset = load_dataset("fashion-mnist", split=split, root=folder)
        assert isinstance(dataset.images, np.ndarray)
        assert np.array_equal(dataset.images, images)
        assert dataset.labels.tolist() == list(range(len(images)))
    hub.requests.clear()
    assert fetch_fashion_mnist(tmp_path / "data") == folder
    assert hub.requests == []


def parquet(images: np.ndarray) -> bytes:
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        files.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": files, "label": pa.array(range(len(images)), pa.int64())})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_the_usual_environment_variables_suffice(hub: FakeHub, tmp_path: Path) -> None:
    """A fresh process knows nothing of this test but HF_ENDPOINT and HF_HOME."""
    code = (
        "import json; from pipeline.hub import *; f = resolve('test_vit.r160_in1k');"
        "print(json.dumps([f.commit, str(download(f))]))"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    commit, path = json.loads(done.stdout)
    assert commit == COMMIT
    assert Path(path).is_relative_to(tmp_path / "home")
