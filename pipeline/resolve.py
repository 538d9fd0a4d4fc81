"""From a manifest to specs: identities of images and weights, keys, what cannot be had.

Trained checkpoints enter once their training is committed; hub checkpoints at the commit that the
run first saw. A checkpoint that cannot be had is a row, never a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.entries import Manifest, MeasurementEntry, TrainEntry
from pipeline.errors import ManifestError
from pipeline.hub_file import UNLOCKED, HubFile, content_of
from pipeline.lock import Lock, known_lock
from pipeline.planned_images import (
    Images,
    PlannedImages,
    UnknownImages,
    map_identity,
    outputs_of_classes,
    reads_labels,
)
from pipeline.specs import (
    KEY_VERSION,
    Resolved,
    Spec,
    TrainedRef,
    Unresolved,
    checkpoint_folder,
    spec_key,
)
from pipeline.store import Store
from pipeline.trained import describe_trained, train_again, trained_files
from pipeline.versions import versions
from tasks.checkpoints import (
    CheckpointError,
    CheckpointRef,
    architecture_family,
    describe_local,
    describe_timm,
)
from tasks.datasets import TRAINING_SPLIT, DatasetError, transform_identity
from tasks.outline import Outline, outline, outline_architecture
from tasks.training_network import network_for


def resolve(manifest: Manifest, store: Store, *, tentative: bool = False) -> Resolved:
    """Turn a manifest into specs: identities of data and weights, keys, ranges.

    Trained checkpoints enter once their training unit is committed. A checkpoint that cannot be had
    becomes an Unresolved row.

    Args:
        manifest: What to audit.
        store: The run folder.
        tentative: For plans alone: checkpoints and images of which the hub could not be asked
            become specs all the same, under identities that nothing can be stored under.

    Raises:
        DataError: The images cannot be had.
        HubError: The hub does not tell of them.
        ManifestError: They are fewer than ``samples``, two checkpoints have one name, or a network
            to be trained does not fit them.
        StoreError: A lock is damaged.
    """
    lock = known_lock(manifest.lock_path, store)
    datasets = PlannedImages(lock, tentative=tentative)
    specs: list[Spec] = []
    refs: list[tuple[CheckpointRef, str]] = []
    images = datasets.get(manifest.data) if manifest.measurements else None
    if images is not None and manifest.data.samples > len(images):
        raise ManifestError(
            f"[data] samples = {manifest.data.samples}, but {manifest.data.name} "
            f"{manifest.data.split} has {len(images)} images. Lower samples or choose another split"
        )
    training = None
    if images is not None:
        training = datasets.training(manifest, images)
    unresolved: list[Unresolved] = []
    untrained: list[TrainedRef] = []
    stored: dict[str | None, str] = {}
    trainings = [_train_spec(entry, datasets) for entry in manifest.train]
    written = trained_files(store, [spec.key for spec in trainings])
    for entry, spec in zip(manifest.train, trainings, strict=True):
        specs.append(spec)
        if spec.key not in written:
            untrained.append(TrainedRef(entry, spec.key))
            continue
        directory = store.local_folder(checkpoint_folder(spec.key))
        try:
            ref = describe_trained(directory, written[spec.key])
        except CheckpointError as error:
            if tentative or train_again(store, spec.key, str(error)):
                untrained.append(TrainedRef(entry, spec.key))
            else:
                reason = f"{error}. {_COPY}"
                unresolved.append(Unresolved(entry.name, entry.family, "trained", reason))
            continue
        stored[str(directory)] = checkpoint_folder(spec.key)
        refs.append((_of_family(ref, entry.family), entry.name))
    for entry, paths in manifest.local:
        for path in paths:
            refs.extend(_described(path, path.name, entry.family, unresolved))
    known = {model.name: model for entry in manifest.timm for model in entry.models}
    files: dict[str, tuple[HubFile, ...]] = {}
    # A plan that got no answer about the images need not wait for one about each network too.
    silent = isinstance(images, UnknownImages) and images.is_silent
    hub_refs = list(
        _timm_refs(manifest, lock, unresolved, files, tentative=tentative, silent=silent)
    )
    refs.extend((ref, ref.name) for ref in hub_refs)
    _check_names(manifest, hub_refs)
    if images is not None:
        pinned = {
            split: datasets.pinned(manifest.data, split)
            for split in (manifest.data.split, TRAINING_SPLIT)
        }
        settings = [(entry, entry.measurement.key_fields()) for entry in manifest.measurements]
        for ref, name in refs:
            try:
                network = outline(ref)
                transform = transform_identity(network.data_config)
                outputs = outputs_of_classes(manifest, images, ref, num_outputs=network.num_outputs)
            except (CheckpointError, DatasetError) as error:
                unresolved.append(Unresolved(name, ref.family, ref.tag, str(error)))
                continue
            if name in known and (wrong := known[name].mismatch(network)):
                reason = (
                    f"timm {versions()['timm']} builds another network under this name than the "
                    f"manifest expects: {wrong}. Correct the manifest, or install the timm that "
                    "it was written for"
                )
                unresolved.append(Unresolved(name, ref.family, ref.tag, reason))
                continue
            checkpoint = _Measured(ref, name, network, transform, outputs, stored.get(ref.path))
            specs += [
                _measure_spec(manifest, checkpoint, entry, fields, images, training, pinned)
                for entry, fields in settings
            ]
    return Resolved(tuple(specs), tuple(unresolved), tuple(untrained), files | datasets.files)


_COPY = "Its training is packed, so bring the file back from a copy, or train in a new run folder"


def _check_names(manifest: Manifest, hub_refs: Sequence[CheckpointRef]) -> None:
    """Tables tell checkpoints apart by name, so two of one name would be mixed up."""
    places = [(entry.name, "a [[train]] table") for entry in manifest.train]
    places += [(path.name, str(path)) for _, paths in manifest.local for path in paths]
    places += [(ref.name, f"timm's {ref.name}") for ref in hub_refs]
    seen: dict[str, str] = {}
    for name, place in places:
        if name in seen:
            raise ManifestError(
                f"two checkpoints are named {name!r}: {seen[name]} and {place}. Rename one, or "
                "list it once"
            )
        seen[name] = place


def _train_spec(entry: TrainEntry, datasets: PlannedImages) -> Spec:
    table = f"[[train]] {entry.name}"
    images = datasets.whole(entry.data, TRAINING_SPLIT, table)
    try:
        network = outline_architecture(*network_for(entry.settings, images))
    except ValueError as error:
        raise ManifestError(f"{table}: {error}") from error
    fields = {
        "key_version": KEY_VERSION,
        "kind": "train",
        "train_data": images.identity(),
        "test_data": datasets.whole(entry.data, "test", table).identity(),
        "training": entry.settings.key_fields(),
    }
    return Spec(
        key=spec_key(fields), kind="train", checkpoint=entry.name, family=entry.family,
        tag="", metric="training", label="", fields=fields, ref=None, entry=None,
        train=entry, data=entry.data, data_identity=images.identity(), available=1,
        num_samples=1, network=network,
    )  # fmt: skip


class _Measured(NamedTuple):
    """A checkpoint to measure, and what all its specs share."""

    ref: CheckpointRef
    name: str
    network: Outline
    transform: dict[str, Any]
    outputs: tuple[int, ...] | None
    stored: str | None


def _measure_spec(
    manifest: Manifest,
    checkpoint: _Measured,
    entry: MeasurementEntry,
    settings: dict[str, Any],
    images: Images,
    training: Images | None,
    pinned: Mapping[str, tuple[HubFile, ...]],
) -> Spec:
    ref, outputs = checkpoint.ref, checkpoint.outputs
    fields = {
        "key_version": KEY_VERSION,
        "kind": "measure",
        "checkpoint": content_of(ref.identity),
        "data": images.identity(),
        "transform": checkpoint.transform,
        "output": manifest.output,
        "dtype": manifest.dtype,
        "seed": manifest.seed,
        "measurement": settings,
    }
    if entry.measurement.needs_training_images:
        assert training is not None
        fields["training_data"] = training.identity()
    if entry.measurement.needs_labels and outputs is not None:
        fields["label_map"] = map_identity(outputs)
    if ref.source == "timm" and f"/{ref.architecture}." not in ref.identity:
        # One file can serve two of timm's architectures: those of CLIP differ in the activation.
        fields["architecture"] = ref.architecture
    return Spec(
        key=spec_key(fields), kind="measure", checkpoint=checkpoint.name, family=ref.family,
        tag=ref.tag, metric=entry.metric, label=entry.label, fields=fields, ref=ref, entry=entry,
        train=None, data=manifest.data, data_identity=images.identity(), available=len(images),
        num_samples=manifest.data.samples, network=checkpoint.network, label_map=outputs,
        with_labels=reads_labels(manifest), data_files=pinned, stored=checkpoint.stored,
    )  # fmt: skip


def _described(
    path: Path, name: str, family: str | None, unresolved: list[Unresolved]
) -> Iterator[tuple[CheckpointRef, str]]:
    try:
        ref = describe_local(path)
    except CheckpointError as error:
        unresolved.append(Unresolved(name, family or "unknown", "local", str(error)))
        return
    yield _of_family(ref, family), name


def _of_family(ref: CheckpointRef, family: str | None) -> CheckpointRef:
    """The reference in the family that the manifest names, if it does."""
    return ref.model_copy(update={"family": family}) if family else ref


def _timm_refs(
    manifest: Manifest,
    lock: Lock,
    unresolved: list[Unresolved],
    files: dict[str, tuple[HubFile, ...]],
    *,
    tentative: bool,
    silent: bool,
) -> Iterator[CheckpointRef]:
    """Hub checkpoints at the manifest's revision, else as locked, else as the hub has them now."""
    if not manifest.timm:
        return
    from pipeline import hub_names
    from pipeline.patience import Circuit

    for weights in hub_names.find_weights(manifest, lock, Circuit(broken=silent)):
        found, family = weights.file, weights.entry.family_of(weights.name)
        if isinstance(found, HubFile):
            files[weights.key] = (found,)
            identity = found.identity
        elif tentative and found.unasked:
            identity = UNLOCKED + weights.name
        else:
            architecture, _, tag = weights.name.partition(".")
            group = family or _family(architecture)
            unresolved.append(Unresolved(weights.name, group, tag, str(found)))
            continue
        ref = describe_timm(weights.name, identity=identity)
        yield ref.model_copy(update={"family": family}) if family else ref


def _family(architecture: str) -> str:
    """Module of timm, or the name itself where this timm does not know it."""
    try:
        return architecture_family(architecture)
    except CheckpointError:
        return architecture
