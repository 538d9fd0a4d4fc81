"""Tables as they were last reduced, used again as long as nothing that they rest on has changed.

``tables/memo.json`` keeps a fingerprint of what the tables were made from (manifest, specs, the
listing of shards and packs with sizes and stamps, versions of the code) and the SHA-256 of each
table. A query then reads neither shards nor manifest. Where anything differs, down to one bit of a
table, the tables are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.store import MissingKeyError, Store, open_store
from pipeline.versions import versions

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

MEMO = "tables/memo.json"
_SOURCES = ("manifest.toml", "run.json", "resolved.json")
_RESULTS = ("shards/", "packs/")


def run_tables(folder: str) -> Mapping[str, ds.Dataset]:
    """The tables of a run for questions: as they were published, or else made again and kept."""
    known = recall(open_store(folder))
    if known is not None:
        return known
    # Only now: these take seconds to import.
    from pipeline.reduce import write_tables
    from pipeline.run import open_run

    run = open_run(folder)
    _, tables = run.reduce(publish=False)
    try:
        write_tables(tables, run.store)
    except StoreError as error:  # a folder that cannot be written can be asked all the same
        _log.warning("the tables are not kept for the next question: %s", error)
    return {name: ds.dataset(table) for name, table in tables.arrow().items()}


def table_key(name: str) -> str:
    """Where a table is kept."""
    return f"tables/{name}.parquet"


def fingerprint(store: Store) -> str | None:
    """Digest of what tables are made from; None if the folder alone does not say."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for key in _SOURCES:
        try:
            digest.update(hashlib.sha256(store.get(key)).digest())
        except MissingKeyError:
            return None
    for prefix in _RESULTS:
        for entry in store.entries(prefix):
            digest.update(f"{entry.key} {entry.size} {entry.stamp}\n".encode())
    return digest.hexdigest()


def published_table(store: Store, name: str) -> pd.DataFrame | None:
    """A table as it was last published, None if it never was.

    Raises:
        StoreError: What is there cannot be read.
    """
    key = table_key(name)
    if not store.exists(key):
        return None
    try:
        data, digest = store.get(key), published_digest(store, name)
        if digest not in (None, _sha256(data)):
            raise ValueError("its SHA-256 is not that of the table that was published")
        return pq.read_table(pa.BufferReader(data)).to_pandas()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StoreError(
            f"{store.uri}/{key} cannot be read ({str(error).splitlines()[0]}). "
            f"Write the tables again with: flatcensus report {store.uri}"
        ) from error


def published_digest(store: Store, name: str) -> str | None:
    """SHA-256 of a table as it was published; None if nobody knows."""
    try:
        return dict(json.loads(store.get(MEMO))["tables"]).get(name)
    except (MissingKeyError, ValueError, TypeError, KeyError):
        return None


def forget(store: Store) -> None:
    """Begin to publish other tables: none is known until ``remember``."""
    store.put(MEMO, json.dumps({"made_from": None, "tables": {}}).encode())


def remember(store: Store, made_from: str | None, tables: Mapping[str, bytes]) -> None:
    """Keep digests of published tables and the ``fingerprint`` taken before they were made."""
    digests = {name: _sha256(data) for name, data in tables.items()}
    known = {"made_from": made_from, "tables": digests}
    store.put(MEMO, json.dumps(known, indent=1).encode())


def recall(store: Store) -> dict[str, ds.Dataset] | None:
    """The published tables, verified, or None where they are not what a reduction would give.

    They are read column by column when somebody asks for them.
    """
    try:
        known = json.loads(store.get(MEMO))
        made_from, digests = known["made_from"], dict(known["tables"])
        if made_from is None or made_from != fingerprint(store):
            return None
        tables = {name: store.get(table_key(name)) for name in digests}
    except (MissingKeyError, ValueError, TypeError, KeyError):
        return None
    if any(_sha256(tables[name]) != digest for name, digest in digests.items()):
        return None
    return {name: _dataset(data) for name, data in tables.items()}


def encode_table(table: pa.Table) -> bytes:
    """A table's Parquet file: the same bytes for the same table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _dataset(data: bytes) -> ds.Dataset:
    parquet: Any = ds.ParquetFileFormat()
    fragment = parquet.make_fragment(pa.BufferReader(data))
    return ds.FileSystemDataset([fragment], fragment.physical_schema, parquet)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
