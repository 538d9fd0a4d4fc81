"""Ray clusters of several machines on this one, to be broken: killed, cut off, restarted.

Two kinds, with the same handles:

    with raylets(Node(cpus=1), Node(cpus=1, gpus=2)) as cluster:      # several raylets, one address
    with namespaces(Node(cpus=1), Node(cpus=1)) as cluster:           # machines with cables
        cluster.address                    "10.111.7.2:6379", for --on of a machine in the cluster
        cluster.dashboard                  "http://10.111.7.2:8265", for --on from outside it
        cluster.environment                what a command needs to be let in; merge into its env
        cluster.head, cluster.machines     Machine; the first Node is the head
        cluster.add(Node(cpus=1))          one more, ready when this returns
        cluster.wait_for_nodes(2)          until the head counts so many living nodes
        machine.kill()                     power cut: every process of the machine, at once
        machine.start()                    power on again, with an empty session folder
        machine.unplug(); machine.plug()   cable (namespaces only): packets are lost, nothing resets
        machine.runs                       whether it is on and its Ray is there
        machine.processes("raylet")        pids of this host, by a part of the command line
        machine.popen("flatcensus", ...)   a command on that machine

``bare_python(folder)`` is a Python for ``Node.python`` that has the dependencies, not this code.

``namespaces`` gives each machine its own network namespace and address on a bridge, its own process
ids, IPC, /dev/shm and Ray session; disks are this host's, so any folder is a shared one, unless
``Node.hidden`` names it. It needs root and ``ip``: ``requires_namespaces`` is a pytest mark that
skips, and says why, where it cannot work. ``Node(ray=False)`` is a laptop: on the network, not in
the cluster. The host itself has the bridge's address and reaches every machine.

Logs are in ``cluster.folder``, which KEEP_MACHINES=1 keeps. Nothing else is left behind: machines
are found by a mark in the environment of their processes, and other clusters on this host are not
touched (never ``ray stop``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from processes import descendants, kill, wait_for

from pipeline.nodes import HEALTH_FLAGS

MARK = "FLATCENSUS_TEST_MACHINE"
# All nodes alike; several of them start at once on few cores.
FLAGS = HEALTH_FLAGS | {"RAY_raylet_start_wait_time_s": "90"}
SILENT = "import ray.scripts.scripts as s; s.main()"


@dataclass(frozen=True)
class Node:
    """What a machine has. ``gpus`` are numbers for the scheduler only."""

    cpus: int = 1
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    python: str = sys.executable
    ray: bool = True
    hidden: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Machine:
    """One machine: a head, a worker, or a laptop (``Node(ray=False)``)."""

    def __init__(self, cluster: Cluster, node: Node, index: int) -> None:
        self.cluster, self.node, self.index = cluster, node, index
        self.name = f"m{index}"
        self.mark = f"{cluster.tag}-{self.name}"
        self.address = cluster.address_of(index)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_head(self) -> bool:
        return self.index == 0

    def start(self) -> None:
        """Power on. Returns at once; see ``Cluster.wait_for_nodes``."""
        assert self.process is None, f"{self.name} runs"
        command = self._ray() if self.node.ray else ["sleep", "infinity"]
        log = (self.cluster.folder / f"{self.name}.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [*self.cluster.boxed(self), *command], env=self.environment, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        """Whether it is on and, on a machine of the cluster, whether its Ray is there."""
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Cut the power: SIGKILL to everything on it."""
        process, self.process = self.process, None
        while pids := self.processes():
            for pid in pids:
                kill(pid)
            time.sleep(0.02)
        if process is not None:
            process.wait()

    def unplug(self) -> None:
        """Pull the network cable: nobody is told, packets go nowhere."""
        self.cluster.link(self, up=False)

    def plug(self) -> None:
        """Put the cable back."""
        self.cluster.link(self, up=True)

    def processes(self, part: str = "") -> list[int]:
        """This host's pids of what runs on the machine and has ``part`` in its command line."""
        # Ray's workers overwrite their environment with their title, so by descent as well.
        marked = _marked(self.mark)
        found = dict.fromkeys([*marked, *(p for pid in marked for p in descendants(pid))])
        return [p for p in found if part in _command(p)]

    def popen(self, *command: object, **options) -> subprocess.Popen[str]:
        """Start a command on the machine, with the cluster's environment."""
        environment = {**self.environment, **(options.pop("env", None) or {})}
        return subprocess.Popen(
            [*self.cluster.entered(self), *map(str, command)], env=environment, text=True,
            start_new_session=True, **options,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Environment of all its processes."""
        ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {
            **ours, **self.cluster.environment, **FLAGS, MARK: self.mark,
            "PATH": f"{Path(self.node.python).parent}:{os.environ['PATH']}",
            **({"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.cluster.durable)}
               if self.is_head and self.cluster.durable else {}),
            **self.node.environment,
        }  # fmt: skip

    def _ray(self) -> list[str]:
        node, cluster = self.node, self.cluster
        where = (
            ["--head", f"--port={cluster.port}", f"--dashboard-port={cluster.dashboard_port}",
             f"--dashboard-host={self.address}", "--include-dashboard=true",
             f"--ray-client-server-port={cluster.client_port}", f"--temp-dir={cluster.session}"]
            if self.is_head
            else [f"--address={cluster.address}"]
        )  # fmt: skip
        return [
            node.python, "-c", SILENT, "start", *where, "--block", "--disable-usage-stats",
            f"--node-ip-address={self.address}", f"--num-cpus={node.cpus}",
            f"--num-gpus={node.gpus}", f"--resources={json.dumps(dict(node.resources))}",
            f"--object-store-memory={100 * 1024**2}", "--include-log-monitor=false",
            "--dashboard-agent-listen-port=0",
        ]  # fmt: skip


class Cluster:
    """Several raylets with one address. Use ``raylets``."""

    def __init__(self, *, token: bool = True, durable: bool = False) -> None:
        self.tag = f"fc{secrets.token_hex(3)}"
        # Not pytest's folder: sockets below it may have 107 characters in their paths.
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.tag}-", dir="/tmp"))
        self.session = self.folder / "s"
        self.durable = self.folder / "gcs" if durable else None
        self.machines: list[Machine] = []
        self.port, self.dashboard_port, self.client_port = self.ports()
        self.environment: dict[str, str] = {"RAY_AUTH_MODE": "disabled"}
        self.token = secrets.token_hex(16) if token else ""
        if token:
            path = self.folder / "token"
            path.write_text(self.token)
            self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}

    @property
    def head(self) -> Machine:
        return self.machines[0]

    @property
    def address(self) -> str:
        """The head, as ``ray start --address`` takes it."""
        return f"{self.address_of(0)}:{self.port}"

    @property
    def dashboard(self) -> str:
        """The head's HTTP address, for Ray Jobs."""
        return f"http://{self.address_of(0)}:{self.dashboard_port}"

    def add(self, node: Node, *, wait: bool = True) -> Machine:
        """One more machine, switched on."""
        machine = Machine(self, node, len(self.machines))
        self.prepare(machine)
        self.machines.append(machine)
        before = self.num_nodes() if wait and node.ray and not machine.is_head else 0
        machine.start()
        if wait and node.ray:
            self.wait_for_nodes(before + 1)
        return machine

    def num_nodes(self) -> int:
        """Living nodes as the head counts them; 0 where it does not answer."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                rows = json.load(answer)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return sum(row["state"] == "ALIVE" for row in rows)

    def wait_for_nodes(self, number: int, *, seconds: float = 90) -> None:
        """Wait until the head counts exactly so many living nodes."""

        def arrived() -> bool:
            time.sleep(0.3)
            for machine in self.machines:
                if machine.process is not None and not machine.runs:
                    log = (self.folder / f"{machine.name}.log").read_text()[-2000:]
                    raise AssertionError(f"{machine.name} has ended: {log}")
            return self.num_nodes() == number

        wait_for(arrived, seconds=seconds, what=f"a cluster of {number} nodes")

    def close(self) -> None:
        """Cut all power, remove all files."""
        for machine in self.machines:
            machine.kill()
        for pid in _marked(f"{self.tag}-"):
            kill(pid)
        if not os.environ.get("KEEP_MACHINES"):
            shutil.rmtree(self.folder, ignore_errors=True)

    # What differs between the two kinds of machines.

    def ports(self) -> tuple[int, int, int]:
        """Of the head: cluster, dashboard, Ray client."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            first, second, third = (each.getsockname()[1] for each in sockets)
        return first, second, third

    def address_of(self, index: int) -> str:
        """The address of a machine."""
        return "127.0.0.1"

    def prepare(self, machine: Machine) -> None:
        """Lay cables."""

    def boxed(self, machine: Machine) -> list[str]:
        """What to put before the command that is the machine."""
        return []

    def entered(self, machine: Machine) -> list[str]:
        """What to put before a command to run it on the machine."""
        return []

    def link(self, machine: Machine, *, up: bool) -> None:
        """Plug or unplug."""
        raise AssertionError("raylets of one address have no cables: use namespaces()")


class NamespaceCluster(Cluster):
    """Machines with their own addresses and cables. Use ``namespaces``."""

    def __init__(self, *, token: bool = True, durable: bool = False) -> None:
        self.subnet = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(250)}"
        super().__init__(token=token, durable=durable)
        _ip("link", "add", self.tag, "type", "bridge")
        _ip("addr", "add", f"{self.subnet}.1/24", "dev", self.tag)
        _ip("link", "set", self.tag, "up")

    def ports(self) -> tuple[int, int, int]:
        return 6379, 8265, 10001

    def address_of(self, index: int) -> str:
        return f"{self.subnet}.{index + 2}"

    def prepare(self, machine: Machine) -> None:
        space, cable = f"{self.tag}-{machine.name}", self._cable(machine)
        _ip("netns", "add", space)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", cable, "master", self.tag, "up")
        inside = ("-n", space)
        _ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "link", "set", "lo", "up")
        # Whoever asks for the world is told at once that there is none: Ray looks for clouds.
        _ip(*inside, "route", "add", "unreachable", "default")

    def boxed(self, machine: Machine) -> list[str]:
        own = self.folder / machine.name
        own.mkdir(exist_ok=True)
        self.session.mkdir(exist_ok=True)
        mounts = ["mount -t tmpfs tmpfs /dev/shm", f"mount --bind {own} {self.session}"]
        mounts += [f"mount -t tmpfs tmpfs '{path}'" for path in machine.node.hidden]
        script = " && ".join([*mounts, f"hostname {machine.mark}", 'exec "$@"'])
        return [
            "ip", "netns", "exec", f"{self.tag}-{machine.name}",
            "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
            "--mount-proc", "sh", "-c", script, "sh",
        ]  # fmt: skip

    def entered(self, machine: Machine) -> list[str]:
        here = _namespace(os.getpid())
        inner = [p for p in machine.processes() if _namespace(p) not in ("", here)]
        assert inner, f"{machine.name} is off"
        return ["nsenter", "-t", str(min(inner, key=_started)), "-m", "-p", "-n", "-i", "-u"]

    def link(self, machine: Machine, *, up: bool) -> None:
        _ip("link", "set", self._cable(machine), "up" if up else "down")

    def close(self) -> None:
        for machine in self.machines:
            machine.kill()
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{machine.name}"], check=False)
        subprocess.run(["ip", "link", "del", self.tag], check=False)
        super().close()

    def _cable(self, machine: Machine) -> str:
        return f"{self.tag}v{machine.index}"  # names of interfaces have 15 characters at most


@contextlib.contextmanager
def raylets(*nodes: Node, token: bool = True, durable: bool = False) -> Iterator[Cluster]:
    """A cluster of several raylets with one address; the first node is the head.

    Args:
        nodes: What each machine has.
        token: Whether Ray asks for a token, as it does by default.
        durable: Whether the head's state survives the head (on disk, by RocksDB).
    """
    yield from _running(Cluster(token=token, durable=durable), nodes)


@contextlib.contextmanager
def namespaces(*nodes: Node, token: bool = True, durable: bool = False) -> Iterator[Cluster]:
    """A cluster of machines with their own addresses and cables; see ``raylets``."""
    yield from _running(NamespaceCluster(token=token, durable=durable), nodes)


def bare_python(folder: Path) -> str:
    """A Python with this one's packages, but for the flatcensus that is installed to be edited."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Folders named in a .pth file are searched, but the .pth files in them are not read.
    packages = [p for p in sys.path if p.endswith("-packages") and Path(p).is_dir()]
    (site / "borrowed.pth").write_text("\n".join(packages))
    return str(folder / "bin/python")


def _running(cluster: Cluster, nodes: tuple[Node, ...]) -> Iterator[Cluster]:
    try:
        for index, node in enumerate(nodes):
            # Raylets that begin at one moment at one address may wait for each other for ever.
            cluster.add(node, wait=index == 0 or not isinstance(cluster, NamespaceCluster))
        cluster.wait_for_nodes(sum(node.ray for node in nodes))
        yield cluster
    finally:
        cluster.close()


@cache
def _why_no_namespaces() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command {tool}: apt-get install iproute2"
    name = f"fct{secrets.token_hex(3)}"
    steps = (
        ["ip", "link", "add", name, "type", "bridge"],
        ["ip", "netns", "add", name],
        ["ip", "netns", "exec", name, "unshare", "-m", "-p", "-u", "-i", "--fork",
         "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
    )  # fmt: skip
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"no network namespaces here: {' '.join(step)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
    return ""


def requires_namespaces(test):
    """Mark of tests that need ``namespaces``: skipped, with the reason, where they cannot be."""
    why = _why_no_namespaces()
    return pytest.mark.skipif(bool(why), reason=why)(test)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _marked(mark: str) -> list[int]:
    """Pids of all processes whose environment has this mark (or one that it begins)."""
    wanted = f"{MARK}={mark}".encode()
    exact = not mark.endswith("-")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended while we looked, or is somebody else's
            if any(line == wanted or (not exact and line.startswith(wanted)) for line in lines):
                found.append(int(entry.name))
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process began, in ticks since boot."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return sys.maxsize
