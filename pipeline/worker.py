"""Units to shards: the only caller of the mathematics.

``run_unit`` never raises for what a unit does: it returns an Outcome, so that the scheduler can
tell a network that cannot be measured from a machine that failed. A Workbench keeps one loaded
network and its images for the next unit of the same checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import resource
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants

from pipeline.errors import HubError, StoreError
from pipeline.hub_file import identified
from pipeline.outcome import HINTS, FailureClass, Outcome
from pipeline.planned_images import open_dataset
from pipeline.schema import Constants, Failure, UnitRecord
from pipeline.shards import decode_shard, encode_shard, has_shard, shard_key
from pipeline.specs import Task, checkpoint_folder
from pipeline.store import Store, open_store
from pipeline.versions import code_version, versions
from tasks.checkpoints import (
    CheckpointError,
    CheckpointRef,
    LoadedCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from tasks.datasets import (
    TRAINING_SPLIT,
    DatasetError,
    ImageDataset,
    load_batch,
    preprocessing,
    sample_order,
)
from tasks.measurement import Batch, MeasurementError, Row, Subject
from tasks.training import TrainSettings, train

# What torch raises as a plain RuntimeError when the CPU's or cuBLAS's memory ends.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Workbench:
    """One worker's loaded network, images and thread setting; reused while the subject stays."""

    subject_key: str = ""
    subject: Subject | None = None
    datasets: dict[tuple[str, str, str], ImageDataset] = field(default_factory=dict)

    def subject_of(self, task: Task) -> Subject:
        """The task's checkpoint, loaded unless it is on the bench already."""
        if self.subject is None or self.subject_key != task.spec.subject:
            self.subject = None  # free the old network before the new one is loaded
            self.subject = self._load(task)
            self.subject_key = task.spec.subject
        if self.subject.batch_size != task.batch_size:
            self.subject = replace(self.subject, batch_size=task.batch_size)
        return self.subject

    def _load(self, task: Task) -> Subject:
        spec = task.spec
        assert spec.ref is not None
        dtype = getattr(torch, str(spec.fields["dtype"]))
        loaded = load_checkpoint(_with_weights(task), dtype=dtype, device=task.device)
        dataset = self.planned_dataset(task, spec.data.split, spec.data_identity)
        training = None
        if spec.training_identity is not None:
            training = self.planned_dataset(task, TRAINING_SPLIT, spec.training_identity)
        return make_subject(loaded, dataset, task, training=training)

    def planned_dataset(self, task: Task, split: str, identity: str) -> ImageDataset:
        """The images of one split. Raises DatasetError if they are not those of the plan."""
        dataset = self._dataset(task, split)
        if (found := dataset.identity()) != identity:
            raise DatasetError(
                f"the {split} images of {task.spec.data.name!r} changed after the plan was made "
                f"(planned {identity[:12]}, found {found[:12]}). Run the command again"
            )
        return dataset

    def _dataset(self, task: Task, split: str) -> ImageDataset:
        """The images of one split, loaded once."""
        data = task.spec.data
        key = (data.name, data.model_dump_json(exclude={"samples"}), split)
        if key not in self.datasets:
            files = task.spec.data_files.get(split, ())
            self.datasets[key] = open_dataset(data, split=split, files=files)
        return self.datasets[key]


def run_unit(task: Task, bench: Workbench) -> Outcome:
    """Do one unit and commit its shard. All failures come back as an Outcome."""
    torch.set_num_threads(task.threads)
    # Float32 means float32: by default torch lets convolutions on GPUs round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    started, clock, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    try:
        store = open_store(task.store)
        key = shard_key(task.spec.key, task.block)
        if store.exists(key):  # another launch works on this run, or an attempt taken for lost
            return Outcome("duplicate", time.perf_counter() - clock)
        load_seconds, tested = 0.0, False
        if task.spec.kind == "train":
            rows, artifacts = _train(task, bench, store)
            self_test = None
        else:
            assert task.spec.entry is not None
            subject = bench.subject_of(task)
            load_seconds = time.perf_counter() - clock
            known = _self_test(subject)
            rows, artifacts = task.spec.entry.measurement.measure(subject, task.block), {}
            self_test = _self_test(subject)
            tested = known is None and self_test is not None
        seconds = time.perf_counter() - clock
        record = _record(
            task, started, seconds, len(rows), artifacts, self_test,
            device=_device_name(task.device), peak_bytes=_peak_bytes(task.device),
            spent={
                "cpu_seconds": time.process_time() - cpu, "load_seconds": load_seconds,
                "self_tested": tested,
            },
        )  # fmt: skip
        if store.put_new(key, encode_shard(rows, record, _constants(task))):
            return Outcome("committed", seconds)
        return Outcome("duplicate", seconds, nondeterminism=_compare(store, key, rows))
    except HubError as error:  # after retries of its own; offline, another try cannot help
        waited = error.unasked and not constants.HF_HUB_OFFLINE
        return _failed(error, _silence(task) if waited else "permanent", clock)
    except (CheckpointError, DatasetError, MeasurementError) as error:
        return _failed(error, "permanent", clock)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _failed(error, "memory", clock)
    except (ConnectionError, TimeoutError) as error:
        return _failed(error, "transient", clock)
    except StoreError as error:
        return _failed(error, "store", clock)
    except Exception as error:  # a border: an unknown error becomes a row with its traceback
        if _is_disk_full(error):  # of temporary files, say: no unit would fare better
            return _failed(error, "store", clock)
        memory = any(words in str(error) for words in _OUT_OF_MEMORY)
        return _failed(error, "memory" if memory else "unexpected", clock)


def write_failure(store: Store, task: Task, failure: Failure) -> bool:
    """Publish a failure shard: the unit is settled until somebody asks to try again."""
    now = datetime.now(UTC)
    # Written by the scheduler, whose machine may have no such device.
    record = _record(task, now, 0.0, 0, {}, None, device=task.device, peak_bytes=None).model_copy(
        update={"status": "failed", "failure": failure}
    )
    key = shard_key(task.spec.key, task.block, task.generation)
    return store.put_new(key, encode_shard([], record, _constants(task)))


def make_subject(
    loaded: LoadedCheckpoint,
    dataset: ImageDataset,
    task: Task,
    *,
    training: ImageDataset | None = None,
) -> Subject:
    """Join a network and its images into what measurements see."""
    return Subject(
        model=loaded.model,
        output=task.spec.fields["output"],
        batch=_loader(loaded, dataset, task),
        seed=task.seed,
        batch_size=task.batch_size,
        num_parameters=loaded.num_parameters,
        training_batch=None if training is None else _loader(loaded, training, task),
    )


def _loader(
    loaded: LoadedCheckpoint, dataset: ImageDataset, task: Task
) -> Callable[[Sequence[int]], Batch]:
    """Images of one split in their frozen order, in the form that the network takes."""
    transform = preprocessing(loaded.data_config)
    order = sample_order(dataset.identity(), seed=task.seed, length=len(dataset))
    dtype = getattr(torch, str(task.spec.fields["dtype"]))

    def batch(samples: Sequence[int]) -> Batch:
        return load_batch(
            dataset, samples, order=order, transform=transform,
            num_outputs=loaded.num_outputs, dtype=dtype, device=task.device,
            label_map=task.spec.label_map, with_labels=task.spec.with_labels,
        )  # fmt: skip

    return batch


def _train(task: Task, bench: Workbench, store: Store) -> tuple[list[Row], dict[str, str]]:
    """Train, publish the checkpoint folder, and return history and artifact digests.

    The shard that follows is the commit; weights without a shard are a leftover and are replaced.
    """
    entry = task.spec.train
    assert entry is not None
    images = bench.planned_dataset(task, TRAINING_SPLIT, task.spec.fields["train_data"])
    trained = train(
        entry.settings,
        images,
        bench.planned_dataset(task, "test", task.spec.fields["test_data"]),
        device=task.device,
    )
    artifacts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="flatcensus-") as folder:
        save_checkpoint(
            trained.model, Path(folder), architecture=trained.architecture,
            model_args=trained.model_args, data_config=trained.data_config, family=entry.family,
            label_names=images.class_names,
        )  # fmt: skip
        committed = has_shard(store, task.spec.key, task.block)
        for file in sorted(Path(folder).iterdir()):
            key, data = f"{checkpoint_folder(task.spec.key)}/{file.name}", file.read_bytes()
            artifacts[key] = hashlib.sha256(data).hexdigest()
            if not committed:
                store.put(key, data)
    return trained.rows, artifacts


def _with_weights(task: Task) -> CheckpointRef:
    """The reference with its weights on this node's disk, fetched if need be and pinned."""
    ref = task.spec.ref
    assert ref is not None
    if task.spec.stored is not None:  # the planner's copy may lie on another machine
        folder = open_store(task.store).local_folder(task.spec.stored)
        return ref.model_copy(update={"path": str(folder)})
    if ref.source != "timm":
        return ref
    from pipeline.download import download

    return ref.model_copy(update={"path": str(download(identified(ref.identity)))})


def _record(
    task: Task,
    started: datetime,
    seconds: float,
    num_rows: int,
    artifacts: dict[str, str],
    self_test: dict[str, Any] | None,
    *,
    device: str,
    peak_bytes: int | None,
    spent: Mapping[str, Any] | None = None,
) -> UnitRecord:
    spec, samples, draws = task.spec, task.block.samples, task.block.draws
    return UnitRecord(
        spec_key=spec.key, start=samples.start, stop=samples.stop,
        draw_start=draws.start, draw_stop=draws.stop, checkpoint=spec.checkpoint,
        family=spec.family, metric=spec.metric, label=spec.label, kind=spec.kind, status="ok",
        failure=None, generation=task.generation, attempt=task.attempt,
        host=socket.gethostname(), device=device, pid=os.getpid(),
        threads=task.threads, batch_size=task.batch_size, started_at=_iso(started),
        finished_at=_iso(datetime.now(UTC)), seconds=seconds,
        predicted_seconds=task.predicted_seconds, peak_bytes=peak_bytes,
        num_rows=num_rows, versions=versions(), self_test=self_test, artifacts=artifacts,
        **(spent or {}),
    )  # fmt: skip


def _constants(task: Task) -> Constants:
    """The columns that name the code behind every row."""
    known = versions()
    if task.spec.entry is None:
        version = TrainSettings.version
    else:
        version = task.spec.entry.measurement.version
    return Constants(
        metric_version=version,
        code_version=code_version(),
        torch_version=known["torch"],
        timm_version=known["timm"],
    )


def _silence(task: Task) -> FailureClass:
    """A web server of one checkpoint that does not answer is no reason to stop the others."""
    ref = task.spec.ref
    return "transient" if ref is not None and ref.identity.startswith("url:") else "unreachable"


def _failed(error: BaseException, kind: FailureClass, clock: float) -> Outcome:
    failure = Failure(
        class_=kind,
        type=type(error).__name__,
        message=str(error) or type(error).__name__,
        hint=HINTS[kind],
        traceback="".join(traceback.format_exception(error))[-8000:],
    )
    seconds = time.perf_counter() - clock
    return Outcome("failed", seconds, failure, kind, disk_full=_is_disk_full(error))


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, StoreError):
        return error.disk_full
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _compare(store: Store, key: str, rows: Sequence[Row]) -> str | None:
    """Whether an earlier shard holds other numbers than the ones just computed."""
    table = decode_shard(store.get(key), key=key).table
    theirs = table.column("value").to_numpy()
    ours = np.array([row.value for row in rows])
    if np.array_equal(theirs, ours, equal_nan=True):
        return None
    return f"{key}: an earlier attempt committed other numbers; they were kept"


def _self_test(subject: Subject) -> dict[str, Any] | None:
    """The self-test a measurement left on the subject, for the record."""
    test = subject.cache.get("self_test")
    return test.to_dict() if test is not None else None


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
