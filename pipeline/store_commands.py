"""``flatcensus verify`` and ``flatcensus compact``: the files of results in a run folder."""

from __future__ import annotations

from pipeline.command import JsonOption, RunArg, shown
from pipeline.console import Console, table_of
from pipeline.errors import EXIT_FAILED_UNITS, EXIT_OK


def verify(run: RunArg, as_json: JsonOption = False) -> int:
    """Check every byte of every result; set damaged files aside so that units are done again."""
    from pipeline.labels import counted
    from pipeline.packs import list_packs
    from pipeline.run import open_run
    from pipeline.shards import loose_shards
    from pipeline.shards import verify as verify_store

    console = Console(as_json=as_json)
    store = open_run(run).store
    quarantined = verify_store(store)
    records = [item._asdict() for item in quarantined]
    if quarantined and not as_json:
        console.table(table_of(records, ["key", "moved_to", "reason"]))
    packs, num_shards = list_packs(store), sum(1 for _ in loose_shards(store))
    num_packed = sum(pack.index.num_units for pack in packs)
    before = len(store.list("quarantine/")) - len(quarantined)
    console.data(
        {
            "sound_shards": num_shards, "sound_packs": len(packs), "packed_units": num_packed,
            "damaged": records, "set_aside_before": before,
        }
    )  # fmt: skip
    parts = [counted(num_shards, "sound shard")]
    if packs:
        parts.append(f"{counted(num_packed, 'unit')} in {counted(len(packs), 'sound pack')}")
    parts.append(f"{len(quarantined)} damaged and set aside")
    if before:
        parts.append(f"{counted(before, 'file')} in quarantine/ from before")
    console.say(", ".join(parts))
    if quarantined:
        console.next_step(f"flatcensus resume {shown(run)}", "do the lost units again")
    else:
        console.next_step(f"flatcensus status {shown(run)}", "what is done and what is not")
    return EXIT_FAILED_UNITS if quarantined else EXIT_OK


def compact(run: RunArg, as_json: JsonOption = False) -> int:
    """Put many small result files into few large ones. No number changes; safe at any time."""
    from pipeline.compact import compact as compact_store
    from pipeline.labels import counted
    from pipeline.run import open_run

    console = Console(as_json=as_json)
    opened = open_run(run)
    done = compact_store(opened.store)
    for item in done.nondeterminism:
        console.warn(f"nondeterminism: {item.key} {item.reason}; moved to {item.moved_to}")
    for item in done.quarantined:
        console.warn(f"{item.key} was moved to {item.moved_to}: {item.reason}")
    console.data(
        {
            "units": done.num_units, "packs": done.num_packs, "merged": done.num_merged,
            "duplicates": done.num_duplicates,
            "nondeterminism": [item._asdict() for item in done.nondeterminism],
            "quarantined": [item._asdict() for item in done.quarantined],
        }
    )  # fmt: skip
    if done.num_units or done.num_packs or done.num_merged or done.num_duplicates:
        console.say(
            f"{counted(done.num_units, 'unit')} moved into {counted(done.num_packs, 'new pack')}, "
            f"{counted(done.num_merged, 'older pack')} merged, "
            f"{counted(done.num_duplicates, 'equal duplicate')} dropped"
        )
    else:
        console.say("nothing to pack")
    if done.quarantined:
        console.next_step(f"flatcensus resume {shown(run)}", "do again what is lost")
        return EXIT_FAILED_UNITS
    opened.reduce()
    console.next_step(f"flatcensus query {shown(run)}", "the same numbers, read faster")
    return EXIT_OK
