"""Episodes by seed until there were enough faults; the report."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import s3_servers
from faulty_s3 import FaultyS3, faulty_s3
from machines import Cluster, Node, namespaces, raylets
from s3_servers import s3_environment, s3_server

from campaigns import compare, flips, report
from campaigns.episodes import Episode, run_episode
from campaigns.faults import BUCKET, CABLES, CLUSTER, INLINE, KINDS, LOCAL
from campaigns.workshop import Workshop, end_orderly
from campaigns.world import NUM_SLOTS, World

SHARES = {INLINE: 6, LOCAL: 6, CLUSTER: 5, BUCKET: 4, CABLES: 1}  # of the episodes: chosen
STALL_SECONDS, S3_PATIENCE = 3.0, {"FLATCENSUS_S3_PATIENCE_SECONDS": "20"}
LONG_PAUSE_SECONDS = 1.0
FAULTS = (8, 12)  # of one episode
ENDING = 3  # of those, at most so many that end a launch


class Places:
    """Where episodes run. Clusters are started when they are needed, and kept."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.workshop = stack, Workshop()
        self.clusters: dict[str, Cluster] = {}
        self.network: FaultyS3 | None = None

    def world(self, place: str, seed: int) -> World:
        """A fresh world there."""
        if place in (INLINE, LOCAL):
            return World(self.workshop, on=place)
        if place == BUCKET:
            network = self._network(seed)
            environment = s3_environment(network.address) | S3_PATIENCE
            uri = f"s3://{s3_servers.BUCKET}/run-{seed}"
            return World(
                self.workshop, on=INLINE, uri=uri, network=network, environment=environment
            )
        cluster = self._cluster(place)
        if place == CLUSTER:
            return World(self.workshop, on=cluster.address, cluster=cluster)
        # The host is not on their network, and a cable is out for longer than the usual units.
        return World(
            self.workshop, on=cluster.address, cluster=cluster, machine=cluster.head,
            pause=LONG_PAUSE_SECONDS,
        )  # fmt: skip

    def _network(self, seed: int) -> FaultyS3:
        if self.network is None:
            folder = self.workshop.world.with_name("moto")
            address = self.stack.enter_context(s3_server("moto", folder))
            os.environ.update(s3_environment(address))  # this process looks past the faults
            self.network = self.stack.enter_context(faulty_s3(address, stall_seconds=STALL_SECONDS))
        self.network.seed = seed
        return self.network

    def _cluster(self, place: str) -> Cluster:
        if place not in self.clusters:
            start = namespaces if place == CABLES else raylets
            # Their clocks are right; what is measured is not shipped with the code.
            own = {"LD_PRELOAD": "", "PYTHONPATH": os.environ["PYTHONPATH"]}
            nodes = [Node(cpus=cpus, environment=own) for cpus in (0, 1, 1)]
            self.clusters[place] = self.stack.enter_context(start(*nodes))
        return self.clusters[place]


def main() -> int:
    """Run a campaign."""
    end_orderly()
    options = _options()
    silent = _flip(options.flips, options.seed)
    episodes: list[Episode] = []
    end = time.monotonic() + 60 * options.minutes
    with ExitStack() as stack:
        places = Places(stack)
        expected = _undisturbed(places)
        seed = options.seed
        while not _enough(options, episodes) and time.monotonic() < end:
            place, kinds = _drawn(seed, options.place, options.only)
            episode = run_episode(
                places.world(place, seed), kinds, expected, place=place, seed=seed
            )
            episodes.append(episode)
            report.keep(episode, options.out)
            _say(episode)
            seed += 1
    print(report.markdown(report.read([options.out])))
    return 1 if silent or any(episode.violations for episode in episodes) else 0


def _flip(number: int, seed: int) -> int:
    """Turn so many bits over and say who noticed. Returns how many nobody did."""
    if not number:
        return 0
    logging.disable(logging.WARNING)  # every one of them is one
    with tempfile.TemporaryDirectory() as folder:
        found = flips.flip(Path(folder), number, seed=seed)
    logging.disable(logging.NOTSET)
    for what, verdicts in found.items():
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        print(f"single bits of {what} files turned over: {counts}", flush=True)
    return sum(verdicts["silent"] for verdicts in found.values())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns")
    parser.add_argument("--faults", type=int, default=None, help="stop after so many")
    parser.add_argument("--episodes", type=int, default=None, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin none after that")
    parser.add_argument("--seed", type=int, default=1, help="of the first episode; then the next")
    parser.add_argument("--place", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--flips", type=int, default=0, help="single bits to turn over before")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign.jsonl"))
    options = parser.parse_args()
    options.out = Path(os.environ["FLATCENSUS_CAMPAIGN_FROM"]) / options.out
    if options.faults is None and options.episodes is None:
        options.faults = 500
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def _undisturbed(places: Places) -> dict[str, bytes]:
    """The tables of a run that nobody attacks."""
    with places.world(INLINE, 0) as world:
        code = world.launch().ended()
        found = compare.tables(world)
        assert code == 0, world.launches[0].output.read_text()
        assert set(found) == set(compare.TABLES)
        assert not compare.differences(world, found)
        return found


def _enough(options: argparse.Namespace, episodes: list[Episode]) -> bool:
    faults = sum(len(episode.faults) for episode in episodes)
    return (options.faults is not None and faults >= options.faults) or (
        options.episodes is not None and len(episodes) >= options.episodes
    )


def _drawn(seed: int, places: list[str], only: list[str]) -> tuple[str, list[str]]:
    """Where the episode of a seed runs, and what is done to it."""
    rng = random.Random(seed)
    possible = {p: [k for k in only if p in KINDS[k].places] for p in places}
    places = [p for p in places if possible[p]]
    (place,) = rng.choices(places, [SHARES[p] for p in places])
    kinds: list[str] = []
    for _ in range(rng.randint(*FAULTS)):
        ended = sum(bool(KINDS[kind].codes) for kind in kinds) >= ENDING
        left = [k for k in possible[place] if not (ended and KINDS[k].codes)]
        kinds += rng.choices(left, [KINDS[k].weight for k in left]) if left else []
    return place, kinds


def _say(episode: Episode) -> None:
    names = ", ".join(fault.kind for fault in episode.faults)
    print(
        f"{episode.place} --seed {episode.seed}: {len(episode.faults)} faults, "
        f"{episode.launches} launches, {episode.work.lost} units lost, "
        f"{episode.work.recomputed:g} recomputed, {episode.seconds:.0f} s ({names})",
        *episode.violations, sep="\n", file=sys.stderr, flush=True,
    )  # fmt: skip


assert NUM_SLOTS == 2, "as many as the workers of a cluster"
