"""Real Slurm clusters on this machine that never meet, and an object store that both reach.

Each site has a network of its own (a network namespace), with the same ports as the others. A cluster has its own munge
key; a node has its own processes, host name, host table and address, and does not see the folders of other clusters. To
kill a node is to kill all of its processes at once. GPUs are pretended: Slurm hands them out, and nothing can use them.

Needs root, `slurm-wlm`, `munge`, `iproute2`, and `gcc` for other clocks. All processes end with the context.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.s3_proxy import Proxy
from support.s3_servers import Identities, weed_command

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "cc")
CONTROLLER, NODES, STORE = 10, 11, 1
"""Last number of an address: of the controller, the first node, and the store."""
KILL_WAIT = timedelta(seconds=30)
"""Between the signal at a time limit and the end of who does not heed it: Slurm's default."""
GOING = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED"}
"""States of a job that has not ended, or is queued again."""
S3_PORT, PROXY_PORT = 8333, 8334
"""Of the store, and of what may be asked instead of it."""

_CONFIGURATION = """
ClusterName={name}
SlurmctldHost=controller({controller})
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits for the end of its credential; 120 s by default.
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, no accounting, no MPI.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
GresTypes=gpu
NodeName={nodes} CPUs=4 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no clusters on this machine; None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "Slurm clusters need root on Linux"
    lacking = [name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
    if lacking:
        return f"Slurm clusters need the packages slurm-wlm, munge, iproute2 and gcc: no {', '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return f"namespaces are not allowed here: {tried.stderr.decode().strip()}" if tried.returncode else None


def need_slurm() -> None:
    """Skip what needs clusters where there can be none; fail if LLM_NEO_REQUIRE_SLURM says that there must."""
    if (why := missing()) is not None:
        pytest.fail(why) if os.environ.get("LLM_NEO_REQUIRE_SLURM") else pytest.skip(why)


def until(condition: Callable[[], Any], what: str | Callable[[], str], *, seconds: float = 300.0) -> Any:
    """What `condition` says once it is true. A machine that is busy with other things takes several times as long."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what() if callable(what) else what}")
        time.sleep(0.2)
    return found


class Network:
    """Namespaces: one for the store, and one for each cluster, of which only the store is reached."""

    def __init__(self, sites: Sequence[str]) -> None:
        self._prefix = f"neo{os.getpid()}"
        self._sites = list(sites)

    def name(self, site: str) -> str:
        """Of the namespace."""
        return f"{self._prefix}-{site}"

    def address(self, site: str, number: int) -> str:
        """Of a host of a site; the store is number 1 everywhere."""
        return f"10.231.{self._sites.index(site) + 1}.{number}"

    def inside(self, site: str, argv: Sequence[str]) -> list[str]:
        """A command line, on a site. (`ip netns exec` would hide /sys/fs/cgroup, which slurmd looks for.)"""
        return ["nsenter", f"--net=/run/netns/{self.name(site)}", *argv]

    def enter(self, site: str) -> None:
        """Move the calling thread there, and all threads that it starts."""
        with open(f"/run/netns/{self.name(site)}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace of {site}")

    def reaches(self, site: str, address: str, port: int) -> str:
        """What somebody on a site is told who wants to connect: nothing if it works."""
        code = f"import socket; socket.create_connection(({address!r}, {port}), 5)"
        argv = self.inside(site, [sys.executable, "-c", code])
        return subprocess.run(argv, capture_output=True, text=True, check=False).stderr

    @contextmanager
    def up(self) -> Iterator[None]:
        """Make the namespaces, and remove them."""
        all_sites = ["store", *self._sites]
        try:
            for site in all_sites:
                _ip("netns", "add", self.name(site))
                _ip("-n", self.name(site), "link", "set", "lo", "up")
            for site in self._sites:
                here, store, cable = self.name(site), self.name("store"), f"to-{site}"[:15]
                _ip("link", "add", "uplink", "netns", here, "type", "veth", "peer", "name", cable, "netns", store)
                _ip("-n", store, "addr", "add", f"{self.address(site, STORE)}/24", "dev", cable)
                _ip("-n", store, "link", "set", cable, "up")
                for number in (CONTROLLER, *range(NODES, NODES + 4)):
                    _ip("-n", here, "addr", "add", f"{self.address(site, number)}/24", "dev", "uplink")
                _ip("-n", here, "link", "set", "uplink", "up")
            yield
        finally:
            for site in all_sites:
                subprocess.run(["ip", "netns", "del", self.name(site)], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class SharedStore:
    """SeaweedFS in its own network, which can be taken away and given back, and a proxy that may be asked instead."""

    def __init__(self, network: Network, folder: Path, identities: Identities) -> None:
        self._network, self._folder = network, folder
        folder.mkdir()
        ports = (S3_PORT, 9333, 9340, 8888, 9999)
        self._argv = network.inside("store", weed_command(folder, ports, identities, bind="0.0.0.0"))
        self._process: subprocess.Popen[bytes] | None = None
        self.proxy = Proxy(port=PROXY_PORT, store_port=S3_PORT, enter=lambda: network.enter("store"))

    def start(self) -> None:
        """Start it on what it held before; returns when it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdout=log, stderr=log, cwd=self._folder)
        until(lambda: not self._network.reaches("store", "127.0.0.1", S3_PORT), "the store")

    def hang(self) -> None:
        """Let it answer nothing any more, with all connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """As by a power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End all of it."""
        self.kill()
        self.proxy.close()


class Cluster:
    """A Slurm cluster."""

    def __init__(self, name: str, network: Network, folder: Path, *, nodes: int, gpus: int, cpu: int | None = None):
        """Nothing is started yet.

        Args:
            name: of the cluster and the site.
            network: where it is a site.
            folder: that all nodes see, and no other cluster; jobs work in `folder/home`.
            nodes: how many; `name-1`, ...
            gpus: of each node, pretended.
            cpu: the only core that all of its nodes run on.
        """
        self.name, self.network, self.folder, self.home = name, network, folder, folder / "home"
        self.nodes = [f"{name}-{number + 1}" for number in range(nodes)]
        self._cpu = cpu
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._slurm = folder / "slurm"
        for made in (self.home / "tmp", self._slurm / "state", self._slurm / "munge"):
            made.mkdir(parents=True)
        self.socket = self._slurm / "munge" / "socket"
        assert len(str(self.socket)) < 100, "names of sockets are short"
        (self._slurm / "munge").chmod(0o755)
        self.key = self._slurm / "munge" / "key"
        self.key.write_bytes(os.urandom(128))
        self.key.chmod(0o400)
        self.configuration = self._slurm / "slurm.conf"
        self.configuration.write_text(self._text(gpus))
        files = [self._device(number) for number in range(gpus)]
        names = ",".join(map(str, files))
        (self._slurm / "gres.conf").write_text("AutoDetect=off\n" + (f"Name=gpu File={names}\n" if files else ""))
        hosts = [f"{network.address(name, CONTROLLER)} controller", f"{network.address(name, STORE)} store"]
        hosts += [f"{network.address(name, NODES + number)} {node}" for number, node in enumerate(self.nodes)]
        (self._slurm / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts) + "\n")

    def _text(self, gpus: int) -> str:
        given = {
            "kill_wait": round(KILL_WAIT.total_seconds()),
            "name": self.name,
            "folder": self._slurm,
            "socket": self.socket,
            "gpus": gpus,
        }
        head, _, rest = _CONFIGURATION.format(
            controller=self.network.address(self.name, CONTROLLER), nodes="@", **given
        ).partition("NodeName=@")
        options, _, partition = rest.partition("\n")
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={self.network.address(self.name, NODES + number)} "
            f"Port={7000 + number}{options}"
            for number, node in enumerate(self.nodes)
        ]
        text = "\n".join([head, *nodes, partition])
        return text if gpus else text.replace(" Gres=gpu:0", "")

    def _device(self, number: int) -> Path:
        path = self._slurm / f"gpu{number}"
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))  # What is written to it is gone: /dev/null.
        return path

    def other_clock(self, *, ahead: timedelta) -> dict[str, str]:
        """Variables of a job whose steps have another wall clock than this machine."""
        library = self.home / "other_clock.so"
        source = Path(__file__).with_name("other_clock.c")
        if not library.exists():
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        seconds = round(ahead.total_seconds())
        return {"SLURM_EXPORT_ENV": f"ALL,LD_PRELOAD={library},WALL_CLOCK_AHEAD={seconds}"}

    @contextmanager
    def up(self, *, hidden: Sequence[Path] = ()) -> Iterator[None]:
        """Start it, and end all that it runs.

        Args:
            hidden: folders that its nodes do not see.
        """
        self._hidden = list(hidden)
        munge = self._slurm / "munge"
        try:
            keep = [f"--key-file={self.key}", f"--socket={self.socket}", f"--seed-file={munge / 'seed'}"]
            keep += [f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}"]
            self._start("munged", ["munged", "--foreground", "--force", "--num-threads=2", *keep])
            until(self.socket.exists, f"munged of {self.name}")
            self._start("controller", ["slurmctld", "-D", "-c", "-f", str(self.configuration)])
            for node in self.nodes:
                self.start_node(node)
            until(lambda: set(self.node_states().values()) == {"idle"}, lambda: self._told())
            yield
        finally:
            for process in reversed(self._processes.values()):
                process.kill()
                process.wait()

    def _told(self) -> str:
        logs = "\n".join(f"{path}: {path.read_text(errors='replace')[-1500:]}" for path in self._slurm.glob("*.log"))
        return f"the nodes of {self.name} are {self.node_states()}\n{logs}"

    def _start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon on a machine of its own: processes, host name, host table; killed with all it has started."""
        setup = [f"mount --bind {self._slurm}/hosts /etc/hosts", f"hostname {name}"]
        setup += [f"mount -t tmpfs none {folder}" for folder in self._hidden]
        # The shell is the first process there, and takes over the orphans.
        script = "\n".join(["set -e", *setup, f'"$@" >> {self._slurm}/{name}.out 2>&1', "exit 1"])
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        pinned = [] if self._cpu is None else ["taskset", "-c", str(self._cpu)]
        argv = [*own, *pinned, "bash", "-c", script, name, *command]
        self._processes[name] = subprocess.Popen(
            self.network.inside(self.name, argv), env=self._environment({}), start_new_session=True
        )

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        (self._slurm / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, ["slurmd", "-D", "-f", str(self.configuration), "-N", node])

    def kill_node(self, node: str) -> None:
        """Switch a node off, and tell the controller, which would notice after `SlurmdTimeout`."""
        self._processes[node].kill()
        self._processes[node].wait()
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=power"])

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if name in ("LANG", "LD_LIBRARY_PATH")}
        paths = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
        plain |= {
            "PATH": ":".join(paths),
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "SLURM_CONF": str(self.configuration),
        }
        return plain | dict(more)

    def run(self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, check: bool = True) -> str:
        """What a command says on the login node."""
        inside = self.network.inside(self.name, argv)
        done = subprocess.run(
            inside, env=self._environment(env or {}), cwd=self.home, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{argv} left {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout + done.stderr

    def submit(
        self, script: Path, *arguments: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> int:
        """Submit a batch script as it is; the job's id.

        Args:
            script: the file.
            arguments: of the script.
            options: of sbatch, before which the directives in the file step back.
            env: of the job; nothing else comes from here.
        """
        argv = ["sbatch", "--parsable", *options, str(script), *arguments]
        return int(self.run(argv, env).strip().splitlines()[-1].split(";")[0])

    def jobs(self, job: int) -> list[dict[str, str]]:
        """What Slurm knows of a job, or of each task of an array."""
        told = self.run(["scontrol", "--oneliner", "show", "job", str(job)])
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told.splitlines() if line.startswith("JobId=")]

    def states(self, job: int) -> list[str]:
        """State of a job, or of each task of an array."""
        return [found["JobState"] for found in self.jobs(job)]

    def warn_of_time_limit(self, job: int) -> None:
        """Let Slurm warn a job, or each task of an array, within half a minute that its time is over.

        Limits are whole minutes, and Slurm looks at them every half minute. This one leaves two to three minutes: less
        than the scripts in `examples/slurm` want to be warned before it.
        """
        for found in self.jobs(job):
            name = f"{job}_{found['ArrayTaskId']}" if "ArrayTaskId" in found else str(job)
            hours, minutes, _ = map(int, found["RunTime"].split(":"))
            self.set_time_limit(name, 60 * hours + minutes + 3)

    def set_time_limit(self, job: int | str, minutes: int) -> None:
        """Of a job, of all tasks of an array, or of one task."""
        self.run(["scontrol", "update", f"jobid={job}", f"timelimit={minutes}"])

    def ended(self, job: int, *, seconds: float = 400.0) -> list[dict[str, str]]:
        """Wait for the end of a job and of all tasks of an array."""
        until(lambda: not GOING & set(self.states(job)), lambda: f"{self.jobs(job)}\n{self.logs()}", seconds=seconds)
        return self.jobs(job)

    def node_states(self) -> dict[str, str]:
        """State of every node."""
        told = self.run(["sinfo", "--noheader", "--Node", "--format=%N %t"], check=False)
        return dict(line.split() for line in told.splitlines() if len(line.split()) == 2)

    def logs(self) -> str:
        """What all jobs have written."""
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in self.log_files())

    def log_files(self) -> list[Path]:
        """Files that jobs have written to."""
        return sorted(self.home.glob("*.log"))


def exit_of(job: Mapping[str, str]) -> int:
    """The exit code of a job's script."""
    return int(job["ExitCode"].split(":")[0])


@contextmanager
def two_clusters(
    identities: Identities, *, nodes: Mapping[str, int], gpus: Mapping[str, int], pinned: bool = False
) -> Iterator[tuple[Cluster, Cluster, SharedStore, Network]]:
    """The clusters `teacher` and `student`, and the store that both reach at `http://store:8333`.

    Args:
        identities: who may do what in the store.
        nodes: of each cluster.
        gpus: of each node, by cluster.
        pinned: give each cluster a core of its own.
    """
    with ExitStack() as stack:
        # pytest's own folders have names that are too long for a socket.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-")))
        folder.chmod(0o755)
        sites = ("teacher", "student")
        network = Network(sites)
        stack.enter_context(network.up())
        store = SharedStore(network, folder / "store", identities)
        stack.callback(store.close)
        store.start()
        found = [
            Cluster(site, network, folder / site, nodes=nodes[site], gpus=gpus[site], cpu=cpu if pinned else None)
            for cpu, site in enumerate(sites)
        ]
        for cluster in found:
            hidden = [other.folder for other in found if other is not cluster] + [folder / "store"]
            stack.enter_context(cluster.up(hidden=hidden))
        yield found[0], found[1], store, network
