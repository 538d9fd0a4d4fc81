"""Which output of a network each class of a data set is.

Both sides name their classes, or the network's are unknown. ImageNet's classes are those of timm's
own tables: WordNet ids in the order of the outputs, each with its description. A data set's class
is found by WordNet id, by description ("tench, Tinca tinca"), by a single name of it where only
one class has that ("tench"), or, if all names are integers, they are the indices themselves. Where
the network's classes are unknown, the classes of data are taken to be its outputs in order if they
are equally many. Nothing is guessed beyond that.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import timm
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from tasks.checkpoint_folder import read_config
from tasks.checkpoints import CheckpointRef
from tasks.idx import DatasetError

_SHOWN = 4  # classes of each side in a message
_NUMBERED = re.compile(r"(.+?)(\d+)")
_REMEDY = (
    'Choose data with the network\'s classes, name them so, or set labels = "ignore" and measure '
    "only what needs no labels"
)


class LabelError(DatasetError):
    """The classes of the data are not, or not surely, classes of the network."""


class NetworkClasses(NamedTuple):
    """Names of a network's classes in the order of its outputs.

    Attributes:
        names: WordNet ids, for example.
        descriptions: Words for each name, "" where there are none.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]


def network_classes(ref: CheckpointRef, *, num_outputs: int) -> NetworkClasses | None:
    """What the outputs of a checkpoint are, or None where nobody says.

    A folder says so by ``label_names`` in its config.json (a list, or an object from index to
    name), with ``label_descriptions`` by name. timm's pretrained networks are told apart by their
    number of outputs, as timm does.

    Raises:
        LabelError: If ``label_names`` are not one name for each output.
    """
    if ref.source == "timm":
        config = timm.get_pretrained_cfg(ref.name)
        names = None if config is None else config.label_names
        if names:
            return _named(names, (config and config.label_descriptions) or {}, num_outputs, ref)
        subset = infer_imagenet_subset({"num_classes": num_outputs})
        return None if subset is None else _imagenet(subset)
    config = read_config(Path(ref.path or ""))
    inner = config["pretrained_cfg"]
    names = config.get("label_names") or inner.get("label_names")
    words = config.get("label_descriptions") or inner.get("label_descriptions")
    return _named(names, words or {}, num_outputs, ref) if names else None


def label_map(
    class_names: Sequence[str],
    *,
    num_outputs: int,
    known: NetworkClasses | None,
    integers_are_indices: bool = True,
) -> tuple[int, ...]:
    """The output of the network for each class of the data.

    Args:
        class_names: Classes of the data.
        num_outputs: Outputs of the network.
        known: Its classes.
        integers_are_indices: Whether names that are all integers are outputs; not where they are
            words of another meaning, as for the digits.

    Raises:
        LabelError: If a class has no output, or none that is sure; names both sides.
    """
    if known is not None:
        found = [_outputs(name, known) for name in class_names]
        if all(len(outputs) == 1 for outputs in found):
            return _distinct([outputs[0] for outputs in found], class_names)
        in_order = len(class_names) == num_outputs
        if in_order and all(i in outputs for i, outputs in enumerate(found)):
            return tuple(range(num_outputs))  # two classes of one description, in their places
    if integers_are_indices and all(name.isascii() and name.isdecimal() for name in class_names):
        return _indices([int(name) for name in class_names], num_outputs, class_names)
    if known is not None:
        raise _foreign(class_names, num_outputs, known)
    if len(class_names) == num_outputs:
        return tuple(range(num_outputs))
    raise LabelError(
        f"the data have {len(class_names)} classes ({_some(class_names)}), the network has "
        f"{num_outputs} outputs and does not say which classes they are. Write label_names "
        f"into its config.json, a list of {num_outputs} names. {_REMEDY}"
    )


def _indices(indices: list[int], num_outputs: int, class_names: Sequence[str]) -> tuple[int, ...]:
    if max(indices) >= num_outputs:
        raise LabelError(
            f"the data have class {max(indices)}, but the network has {num_outputs} outputs "
            f"(0 to {num_outputs - 1}). {_REMEDY}"
        )
    return _distinct(indices, class_names)


def _foreign(class_names: Sequence[str], num_outputs: int, known: NetworkClasses) -> LabelError:
    """Which classes of the data have no output, or more than one."""
    found = {name: _outputs(name, known) for name in class_names}
    foreign = [name for name, outputs in found.items() if not outputs]
    if foreign:
        return LabelError(
            f"{len(foreign)} of {len(class_names)} classes of the data ({_some(foreign)}) are none "
            f"of the network's {num_outputs} ({_some(_shown(known))}). {_REMEDY}"
        )
    name, outputs = next(item for item in found.items() if len(item[1]) > 1)
    return LabelError(
        f"class {name!r} of the data may be {' or '.join(known.names[i] for i in outputs)} of the "
        f"network's classes. Name it by one of these. {_REMEDY}"
    )


def _outputs(name: str, known: NetworkClasses) -> tuple[int, ...]:
    """The outputs that a name may mean: by the first kind of name that fits."""
    for table in _tables(known):
        if name in table:
            return table[name]
    # A ClassLabel's names must differ, so of two equal descriptions the second is "crane2".
    match = _NUMBERED.fullmatch(name)
    same = _tables(known)[1].get(match[1], ()) if match else ()
    if match and 2 <= int(match[2]) <= len(same):
        return (same[int(match[2]) - 1],)
    return ()


@cache
def _tables(known: NetworkClasses) -> tuple[Mapping[str, tuple[int, ...]], ...]:
    """Outputs by name, by description, and by each of the words in a description."""
    words = [
        {word.strip() for word in description.split(",")} for description in known.descriptions
    ]
    return (
        _places((name,) for name in known.names),
        _places((description,) for description in known.descriptions),
        _places(words),
    )


def _places(keys: Iterable[Iterable[str]]) -> Mapping[str, tuple[int, ...]]:
    places: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for i, found in enumerate(keys):
        for key in found:
            if key:
                places[key] += (i,)
    return dict(places)


@cache
def _imagenet(subset: str) -> NetworkClasses:
    info = ImageNetInfo(subset)
    return NetworkClasses(tuple(info.label_names()), tuple(info.label_descriptions()))  # pyright: ignore[reportArgumentType]


def _named(
    names: Sequence[str] | Mapping[str, str],
    words: Mapping[str, str],
    num_outputs: int,
    ref: CheckpointRef,
) -> NetworkClasses:
    by_index = {int(i): str(name) for i, name in names.items()} if isinstance(names, Mapping) else (
        dict(enumerate(map(str, names)))
    )  # fmt: skip
    if sorted(by_index) != list(range(num_outputs)):
        raise LabelError(
            f"{ref.path or ref.name}: label_names in config.json are {len(by_index)} names, but "
            f"the network has {num_outputs} outputs. Correct them or leave them out"
        )
    listed = tuple(by_index[i] for i in range(num_outputs))
    return NetworkClasses(listed, tuple(str(words.get(name, "")) for name in listed))


def _distinct(outputs: Sequence[int], class_names: Sequence[str]) -> tuple[int, ...]:
    names: dict[int, str] = {}
    for output, name in zip(outputs, class_names, strict=True):
        if output in names:
            raise LabelError(
                f"classes {names[output]!r} and {name!r} of the data are both output {output} of "
                "the network. Merge them, or name one otherwise"
            )
        names[output] = name
    return tuple(outputs)


def _shown(known: NetworkClasses) -> list[str]:
    pairs = zip(known.names, known.descriptions, strict=True)
    return [f"{name} {words.split(',')[0]}".strip() for name, words in pairs]


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
