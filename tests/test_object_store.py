"""Run folders on S3: lost replies, errors and stalls on the way, servers to be refused."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from faulty_s3 import FaultyS3, faulty_s3
from races import require_one_winner_per_key
from s3_servers import (
    ACCESS_KEY,
    BUCKET,
    CONDITIONAL,
    OVERWRITING,
    SECRET_KEY,
    free_port,
    s3_environment,
    s3_server,
    use_s3,
)

from pipeline import object_store, s3_requests
from pipeline.errors import EXIT_ENVIRONMENT, StoreError
from pipeline.folder_copy import local_copy
from pipeline.s3_requests import Bucket
from pipeline.store import MissingKeyError, Store, open_store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("moto", tmp_path_factory.mktemp("moto")) as address:
        yield address


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyS3]:
    """A fault proxy that deals nothing yet, and a process that looks for S3 behind it."""
    with faulty_s3(server, stall_seconds=5.0) as found:
        use_s3(monkeypatch, found.address)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(s3_requests, "PAUSE_SECONDS", (0.01, 0.05))
        yield found


@pytest.fixture
def store(proxy: FaultyS3, tmp_path: Path) -> Store:
    return open_store(f"s3://{BUCKET}/{tmp_path.name}")


PASSING = [
    ["500"], ["503", "slow_down"], ["reset"], ["refuse"], ["conflict"], ["upload_cut"],
    ["lost"], ["late_500"], ["lost", "late_500", "500", "lost"],
]  # fmt: skip


@pytest.mark.parametrize("script", PASSING, ids="-".join)
def test_a_writer_knows_its_own_success_whatever_became_of_the_reply(
    proxy: FaultyS3, store: Store, script: list[str]
):
    proxy.script = list(script)
    assert store.put_new("a", b"mine" * 1000)
    assert sum(proxy.counts.values()) == len(script)
    assert not store.put_new("a", b"mine" * 1000)  # equal bytes by another writer are no success
    assert store.get("a") == b"mine" * 1000


@pytest.mark.parametrize("fault", ["lost", "late_500", "500", "reset", "upload_cut"])
def test_a_writer_that_lost_the_race_is_told_so_whatever_became_of_the_reply(
    proxy: FaultyS3, store: Store, fault: str
):
    store.put("a", b"theirs")
    proxy.script = [fault, fault]
    assert not store.put_new("a", b"mine")
    assert proxy.counts[fault] == 2
    assert store.get("a") == b"theirs"


@pytest.mark.parametrize("fault", ["cut", "500", "reset", "lost"])
@pytest.mark.parametrize("size", [1, 3 * 2**20])
def test_half_a_body_is_never_taken_for_the_object(
    proxy: FaultyS3, store: Store, fault: str, size: int
):
    data = os.urandom(size)
    store.put("a", data)
    proxy.script = [fault] * 3
    assert store.get("a") == data
    assert proxy.counts[fault] == 3


@pytest.mark.parametrize("fault", ["lost", "500", "cut"])
def test_other_requests_are_repeated_too(proxy: FaultyS3, store: Store, fault: str):
    store.put("q/a", b"1")
    for call, expected in (
        (lambda: store.put("b", b"2"), None),
        (lambda: store.exists("b"), True),
        (lambda: store.list("q/"), ["q/a"]),
        (lambda: store.move("q/a", "q/b"), True),
        (lambda: store.delete("b"), None),
        (lambda: store.list(), ["q/b"]),
    ):
        proxy.script = [fault]
        assert call() == expected
        assert proxy.script == []


def test_an_error_in_a_long_listing_costs_one_page(
    proxy: FaultyS3, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "_PAGE", 100)
    keys = sorted(f"many/{number}" for number in range(1050))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b""), keys))
    before = proxy.num_requests
    proxy.script = ["", "500", "", "cut"]
    assert store.list("many/") == keys
    assert proxy.num_requests - before <= 6


def test_twelve_writers_behind_a_faulty_network_have_exactly_one_winner_per_key(
    proxy: FaultyS3, store: Store
):
    proxy.seed = 5
    proxy.rates = {
        "500": 0.05, "slow_down": 0.05, "reset": 0.05, "lost": 0.1, "late_500": 0.05,
        "conflict": 0.05, "upload_cut": 0.05, "cut": 0.05, "refuse": 0.05,
    }  # fmt: skip
    require_one_winner_per_key(store, num_writers=12, num_keys=20)
    assert min(proxy.counts[fault] for fault in proxy.rates if fault != "cut") > 0


@pytest.mark.parametrize("name", CONDITIONAL)
def test_half_an_upload_is_no_object(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FLATCENSUS_S3_PATIENCE_SECONDS", "0")
    data = os.urandom(2**20)
    with (
        s3_server(name, tmp_path / name) as address,
        faulty_s3(address, rates={"upload_cut": 1.0}) as proxy,
    ):
        use_s3(monkeypatch, proxy.address)
        store = open_store(f"s3://{BUCKET}/run")
        for write in (store.put, store.put_new):
            with pytest.raises(StoreError, match="attempts: 1,"):
                write("a", data)
        assert proxy.counts["upload_cut"] == 2
        assert store.list() == []
        proxy.rates = {}
        assert store.put_new("a", data)
        proxy.script = ["upload_cut"]
        with pytest.raises(StoreError):
            store.put("a", data[::-1])
        assert store.get("a") == data, "half a replacement replaces nothing"


def test_a_server_that_stalls_is_left_for_another_try(
    proxy: FaultyS3, store: Store, monkeypatch: pytest.MonkeyPatch
):
    store.put("a", b"1")
    monkeypatch.setattr(s3_requests, "STALL_SECONDS", 0.5)
    proxy.script = ["stall"]
    assert store.get("a") == b"1"
    proxy.script = ["stall"]
    assert store.put_new("b", b"2")
    assert proxy.counts["stall"] == 2


def test_an_outage_ends_with_an_error_that_says_where_and_what_to_do(
    proxy: FaultyS3, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLATCENSUS_S3_PATIENCE_SECONDS", "0.3")
    for fault, said in (("500", "HTTP 500, InternalError"), ("refuse", "error sending request")):
        proxy.rates = {fault: 1.0}
        with pytest.raises(StoreError) as caught:
            store.put_new("a", b"1")
        message = str(caught.value)
        assert f"s3://{BUCKET}/" in message
        assert proxy.address in message
        assert said in message
        assert re.search(r"no success \(attempts: \d+,", message)
        assert "Check the network" in message
        assert caught.value.exit_code == EXIT_ENVIRONMENT
    proxy.rates = {}
    assert store.put_new("a", b"1")


def test_patience_bounds_the_time_spent(
    proxy: FaultyS3, store: Store, monkeypatch: pytest.MonkeyPatch
):
    slept: list[float] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(s3_requests, "PAUSE_SECONDS", (0.1, 10.0))
    monkeypatch.setattr(s3_requests.time, "monotonic", lambda: sum(slept) + 1e-6 * next(clock))
    monkeypatch.setattr(s3_requests.time, "sleep", slept.append)
    with pytest.raises(StoreError, match="no success"):
        s3_requests.repeated(Bucket(BUCKET), "read", "a", _unsettled)
    assert 0.75 * s3_requests.PATIENCE_SECONDS < sum(slept) <= s3_requests.PATIENCE_SECONDS
    assert slept[0] < 0.2
    assert max(slept) <= 10.0


def _unsettled() -> None:
    raise s3_requests.UnsettledError("not yet")


def test_a_bucket_that_does_not_exist_is_named(proxy: FaultyS3):
    for call in (lambda s: s.put_new("a", b""), lambda s: s.list(), lambda s: s.probe()):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/.*there is no such bucket"):
            call(open_store("s3://no-such-bucket/run"))


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("403 Forbidden", "InvalidAccessKeyId", "Check AWS_ACCESS_KEY_ID"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "AWS_REGION"),
        ("403 Forbidden", "RequestTimeTooSkewed", "clock is wrong"),
        ("507 Insufficient Storage", "XMinioStorageFull", "the store is full"),
    ],
)
def test_what_no_other_try_would_mend_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, status: str, code: str, said: str
):
    body = (
        f"<Error><Code>{code}</Code><Message>No: {SECRET_KEY}.</Message>"
        f"<AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId></Error>"
    )
    with _answering(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}") as server:
        use_s3(monkeypatch, server.address)
        with pytest.raises(StoreError) as caught:
            open_store(f"s3://{BUCKET}/run").put("a", b"1")
    assert said in str(caught.value)
    assert server.num_requests == 1
    assert caught.value.disk_full == (code == "XMinioStorageFull")
    assert SECRET_KEY not in str(caught.value)
    assert ACCESS_KEY not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert ACCESS_KEY not in shown, "the server's whole answer stays out of tracebacks"


class _answering:
    """A server that gives every request the same answer."""

    def __init__(self, answer: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answer, self.num_requests = answer.encode(), 0

    def __enter__(self) -> _answering:
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                self.num_requests += 1
                connection.sendall(self.answer)


def test_without_credentials_the_message_says_which_variables_to_set(
    monkeypatch: pytest.MonkeyPatch, server: str
):
    use_s3(monkeypatch, server)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    # Where a machine's role is asked for: here, nobody answers.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreError, match="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(f"s3://{BUCKET}/other").put("a", b"1")


def test_a_server_that_is_not_there_and_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLATCENSUS_S3_PATIENCE_SECONDS", "0.2")
    use_s3(monkeypatch, f"http://user:word@127.0.0.1:{free_port()}")
    with pytest.raises(StoreError, match=r"at http://127\.0\.0\.1:\d+: no success") as caught:
        open_store(f"s3://{BUCKET}/run").list()
    assert "word" not in str(caught.value)
    for address in ("not an address", "127.0.0.1:9000", "ftp://example.org", "http://"):
        use_s3(monkeypatch, address)
        with pytest.raises(StoreError, match="expected an address such as https://"):
            open_store(f"s3://{BUCKET}/run").list()


def test_credentials_are_neither_logged_nor_stored(
    proxy: FaultyS3, store: Store, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    caplog.set_level(logging.DEBUG)
    proxy.script = ["500", "lost"]
    store.put_new("checkpoints/k/a", b"1")
    folder = store.local_folder("checkpoints/k")
    assert "again" in caplog.text  # repetition is logged
    attributes = obstore.get(
        Bucket(BUCKET).reader(), f"{store.uri.partition(BUCKET)[2][1:]}/checkpoints/k/a"
    ).attributes
    texts = [caplog.text, store.uri, str(folder), str(attributes)]
    texts += [p.read_text() for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not any(secret in text for secret in (ACCESS_KEY, SECRET_KEY) for text in texts)


@pytest.mark.parametrize("name", OVERWRITING)
def test_a_server_that_overlooks_conditions_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with s3_server(name, tmp_path / name) as address:
        use_s3(monkeypatch, address)
        with ThreadPoolExecutor(2) as pool:  # also when two launches ask at once
            stores = [open_store(f"s3://{BUCKET}/run") for _ in range(2)]
            errors = [future.exception() for future in [pool.submit(s.probe) for s in stores]]
        for error in errors:
            assert isinstance(error, StoreError)
            assert f"s3://{BUCKET}/run at {address} lets an object be created twice" in str(error)
            assert "conditional writes" in str(error)


def test_a_server_that_checks_the_condition_before_it_writes_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Refuses the second of two, but not the second of two at once."""
    real, racing = obstore.put, threading.Barrier(2)

    def put(client, name, data, **options):
        if name.endswith("-raced") and data in (b"0", b"1"):
            racing.wait()
            options["mode"] = "overwrite"
        return real(client, name, data, **options)

    monkeypatch.setattr(obstore, "put", put)
    with pytest.raises(StoreError, match="created twice"):
        store.probe()


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3:///run", "s3://census/../other", "s3://census/a//b", "s3://census/.hidden"],
)
def test_uris_that_name_no_folder_are_refused(uri: str):
    with pytest.raises(StoreError, match="expected s3://bucket/prefix"):
        open_store(uri)


def test_credentials_in_the_uri_are_refused_and_not_repeated():
    with pytest.raises(StoreError, match="credentials do not belong") as caught:
        open_store(f"s3://{ACCESS_KEY}:{SECRET_KEY}@census/run")
    assert SECRET_KEY not in str(caught.value)


def test_a_whole_bucket_may_be_a_run_folder(proxy: FaultyS3):
    bucket = Bucket(BUCKET)
    obstore.put(bucket.reader(), "whole/run.json", b"{}")
    store = open_store(f"s3://{BUCKET}")
    assert store.uri == f"s3://{BUCKET}"
    assert store.get("whole/run.json") == b"{}"
    assert "whole/run.json" in store.list("whole/")


def test_objects_that_no_run_writes_are_overlooked(store: Store, proxy: FaultyS3):
    client, root = Bucket(BUCKET).reader(), store.uri.partition(BUCKET)[2][1:]
    for name in (".hidden", "a/.tmp-1", "back\\slash"):
        obstore.put(client, f"{root}/{name}", b"x")
    obstore.put(client, f"{root}-other/a", b"x")
    store.put("a/b", b"1")
    assert store.list() == ["a/b"]


def test_too_large_an_object_is_refused_before_anything_is_sent(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(object_store, "MAX_BYTES", 10)
    with pytest.raises(StoreError, match="S3 takes 10 in one upload"):
        store.put_new("a", b"x" * 11)
    assert not store.exists("a")


def test_uploads_get_time_by_their_size(monkeypatch: pytest.MonkeyPatch):
    limits: list[float] = []
    monkeypatch.setattr(s3_requests, "_client", lambda _name, limit, *_: limits.append(limit))
    for size in (0, 2**20, 2**30, 5 * 10**9):
        Bucket(BUCKET).writer(size)
    for limit, size in zip(limits, (0, 2**20, 2**30, 5 * 10**9), strict=True):
        needed = s3_requests.STALL_SECONDS + size / s3_requests.UPLOAD_BYTES_PER_SECOND
        assert needed <= limit < 2 * needed


def test_a_damaged_copy_is_made_again(store: Store):
    store.put("checkpoints/k/model", b"weights")
    folder = store.local_folder("checkpoints/k")
    for damage in (lambda p: p.write_bytes(b"weighty"), lambda p: p.unlink()):
        damage(folder / "model")
        assert store.local_folder("checkpoints/k") == folder
        assert (folder / "model").read_bytes() == b"weights"


def test_a_damaged_object_is_not_copied(store: Store):
    """Another object under the key, with the digest of the first: as a flipped bit would look."""
    store.put("checkpoints/k/model", b"weights")
    client, name = Bucket(BUCKET).reader(), f"{store.uri.partition(BUCKET)[2][1:]}/checkpoints/k"
    attributes = obstore.get(client, f"{name}/model").attributes
    obstore.put(client, f"{name}/model", b"weighty", attributes=attributes)
    with pytest.raises(StoreError, match=r"checkpoints/k/model is damaged.*flatcensus resume"):
        store.local_folder("checkpoints/k")
    assert store.get("checkpoints/k/model") == b"weighty"  # for readers that check on their own


def test_copies_cut_on_the_way_are_whole(proxy: FaultyS3, store: Store):
    data = os.urandom(2**20)
    store.put("checkpoints/k/model", data)
    proxy.script = ["cut", "", "cut", "cut"]  # the listing, then the object
    assert (store.local_folder("checkpoints/k") / "model").read_bytes() == data
    assert proxy.counts["cut"] == 3


COPIER = """
import hashlib, sys
from pipeline.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    folder = store.local_folder("checkpoints/k")
    print(hashlib.sha256((folder / "model").read_bytes()).hexdigest())
"""


def test_processes_that_copy_one_folder_at_once_all_get_it_whole(
    store: Store, proxy: FaultyS3, tmp_path: Path
):
    store.put("checkpoints/k/model", os.urandom(2**20))
    command = [sys.executable, "-c", COPIER, store.uri]
    copiers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(3)
    ]
    for copier in copiers:
        assert copier.stdout is not None
        assert copier.stdout.readline() == "ready\n"
    found = [
        line for copier in copiers for line in copier.communicate("go\n", timeout=60)[0].split()
    ]
    assert len(found) == 15
    assert len(set(found)) == 1
    places = list((tmp_path / "cache/flatcensus/folders").iterdir())
    assert len(places) == 1  # no temporary directory is left


def test_a_copy_that_another_process_finished_first_is_left_to_its_readers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address, files, first = "s3://census/k", [("model", "1")], []

    def read(name: str) -> bytes:  # while it reads, the other one starts and ends
        other = local_copy(address, files, lambda name: b"weights")
        first.append((other, (other / "model").stat().st_ino))
        return b"weights"

    folder = local_copy(address, files, read)
    assert [(folder, (folder / "model").stat().st_ino)] == first
    assert len(list((tmp_path / "flatcensus/folders").iterdir())) == 1


def test_a_full_cache_is_an_error_that_names_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    store.put("checkpoints/k/model", b"1")

    def write_bytes(self: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(StoreError, match="XDG_CACHE_HOME") as caught:
        store.local_folder("checkpoints/k")
    assert caught.value.disk_full
    assert list((tmp_path / "cache/flatcensus/folders").iterdir()) == []


def test_a_server_that_comes_back_is_found_again(
    store: Store, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
):
    proxy.rates = {"refuse": 1.0}
    timer = threading.Timer(0.5, lambda: setattr(proxy, "rates", {}))
    timer.start()
    started = time.monotonic()
    assert store.put_new("a", b"1")
    assert time.monotonic() - started > 0.4
    timer.join()


def test_move_whose_source_is_gone_says_so(store: Store):
    with pytest.raises(MissingKeyError, match="no such object"):
        store.move("a", "b")
    assert not store.exists("b")


def test_environment_of_the_servers_is_all_that_a_client_needs(server: str):
    """What workers on other machines must be given."""
    code = (
        "from pipeline.store import open_store; s = open_store('s3://census/env'); "
        "s.probe(); print(s.put_new('a', b''))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | s3_environment(server), capture_output=True, text=True, cwd=ROOT,
        check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"
