"""A real SLURM for tests: munge, slurmctld and some nodes on this machine, private to the test session, ended by pid.

As root each node is a network namespace with a name, an address and an /etc/hosts of its own, so that scripts run as on a cluster;
otherwise the nodes are several slurmd on one host, told apart by $SLURMD_NODENAME alone. Owns the daemons and the configuration; the
tests beside it own what is submitted. Debian's slurmctld, slurmd, slurm-client and munge are needed.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # which a plain user may not have
ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0
LOGIN = "login"  # where slurmctld runs and commands are typed
NET = "10.213.7"  # inside the namespaces only

CONF = """\
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire: a requeued job waits for as long, and a second; 5 is the least that is taken
AuthInfo=socket={base}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_resolution=1
ReturnToService=2
KillWait=60
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout_s}
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class JobState:
    """Of `scontrol show job`. code: the batch script's exit code."""

    state: str
    restarts: int
    code: int
    nodes: str
    fields: dict[str, str] = field(repr=False)

    @property
    def is_over(self) -> bool:
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")


class Cluster:
    """Nodes n1, n2, ... Everything it runs has a time limit."""

    def __init__(self, base: Path, *, num_nodes: int, slurmd_timeout_s: int = 15) -> None:
        self.base, self.slurmd_timeout_s = base, slurmd_timeout_s
        self.nodes = [f"n{number + 1}" for number in range(num_nodes)]
        self.has_namespaces = os.geteuid() == 0
        self._prefix = f"{base.name}-"
        self._environ = os.environ | {"SLURM_CONF": str(base / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """RuntimeError if the nodes are not idle in time, with the controller's last words."""
        for name in ("munge", "state", "log", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.base / name).mkdir(parents=True)
        self._write_configuration()
        if self.has_namespaces:
            self._make_network()
        munge = self.base / "munge"
        key = munge / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        munge.chmod(0o755)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.on(LOGIN, "munged", *(f"--{flag}={munge}/munge.{suffix}" for flag, suffix in files.items()))
        self.on(LOGIN, "slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Ends every job, then the daemons, by pid."""
        with contextlib.suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            self.on(LOGIN, "scancel", "--user", str(os.getuid()))
            wait_until(lambda: not self.on(LOGIN, "squeue", "--noheader").strip(), limit_s=30.0)
        pids = [int(path.read_text()) for path in (*self.base.glob("*.pid"), *self.base.glob("munge/*.pid"))]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(_is_alive(pid) for pid in pids), limit_s=10.0)
        for pid in pids:
            _kill(pid, signal.SIGKILL)
        if self.has_namespaces:
            for name in (*self.nodes, LOGIN):
                self.kill_node(name)
                subprocess.run(["ip", "netns", "del", self._prefix + name], timeout=30, check=False)

    def on(self, node: str, *command: str, cwd: Path = ROOT, environ: Mapping[str, str] | None = None) -> str:
        """What `command` prints there. RuntimeError with it if it fails."""
        done = subprocess.run(
            [*self._entry(node), *command],
            env={**self._environ, **(environ or {})},
            cwd=cwd,
            timeout=30.0,
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}: {done.stdout}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path = ROOT, environ: Mapping[str, str] | None = None) -> int:
        """The number of the job."""
        return int(self.on(LOGIN, "sbatch", "--parsable", *arguments, cwd=cwd, environ=environ).split()[-1])

    def job(self, job: int | str) -> JobState:
        text = self.on(LOGIN, "scontrol", "--oneliner", "show", "job", str(job)).splitlines()[0]
        fields = dict(re.findall(r"(\S+?)=(\S*)", text))
        code = int(fields["ExitCode"].split(":")[0])
        return JobState(fields["JobState"], int(fields["Restarts"]), code, fields["NodeList"], fields)

    def wait(self, job: int | str, *, limit_s: float, until: Callable[[JobState], bool] | None = None) -> JobState:
        """Until the job is over, or as asked. TimeoutError with its last state."""
        return wait_until(lambda: self._state_if(job, until or (lambda state: state.is_over)), limit_s=limit_s)

    def signal(self, job: int | str, name: str, *how: str) -> None:
        """To the job's steps; how: --batch, --full."""
        self.on(LOGIN, "scancel", f"--signal={name}", *how, str(job))

    def start_node(self, node: str) -> None:
        self.on(node, *(("slurmd",) if self.has_namespaces else ("slurmd", "-N", node)))

    def kill_node(self, node: str) -> None:
        """As if the power went: SIGKILL to all its processes. Needs namespaces."""
        pids = subprocess.run(["ip", "netns", "pids", self._prefix + node], text=True, capture_output=True, timeout=30)
        for pid in pids.stdout.split():
            _kill(int(pid), signal.SIGKILL)

    @contextlib.contextmanager
    def cut_off(self, node: str) -> Iterator[None]:
        """Inside, nothing reaches the node and nothing comes from it, not even a refusal. Needs namespaces."""
        there = self._ip(node, "-oneline", "addr", "show", "eth0")
        address, mac = (
            re.findall(r"inet (\S+)/24", there)[0],
            self._ip(node, "link", "show", "eth0").split("ether ")[1][:17],
        )
        # as behind a router: who does not find its card would be told so by the own kernel after 3 s
        for host, device in ((LOGIN, "br0"), *((other, "eth0") for other in self.nodes if other != node)):
            self._ip(host, "neigh", "replace", address, "lladdr", mac, "nud", "permanent", "dev", device)
        self._ip(LOGIN, "link", "set", f"v{node}", "down")
        try:
            yield
        finally:
            self._ip(LOGIN, "link", "set", f"v{node}", "up")

    def wait_for_nodes(self, *, limit_s: float = START_S) -> None:
        def are_idle() -> bool:
            return self.on(LOGIN, "sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(self.nodes)

        try:
            wait_until(are_idle, limit_s=limit_s)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{(self.base / 'log' / 'slurmctld.log').read_text()[-2000:]}") from None

    def _state_if(self, job: int | str, condition: Callable[[JobState], bool]) -> JobState | None:
        state = self.job(job)
        return state if condition(state) else None

    def _entry(self, node: str) -> Sequence[str]:
        if not self.has_namespaces:
            return ()
        inside = f'hostname {node}; mount --bind {self.base}/hosts /etc/hosts; exec "$@"'
        net = f"--net=/run/netns/{self._prefix}{node}"
        return ("nsenter", net, "unshare", "--uts", "--mount", "bash", "-c", inside, "_")

    def _make_network(self) -> None:
        hosts = (LOGIN, *self.nodes)
        lines = [f"{NET}.{number} {host}" for number, host in enumerate(hosts, start=1)]
        (self.base / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

        for host in hosts:
            subprocess.run(["ip", "netns", "add", self._prefix + host], check=True, timeout=30)
            self._ip(host, "link", "set", "lo", "up")
        self._ip(LOGIN, "link", "add", "br0", "type", "bridge")
        self._ip(LOGIN, "addr", "add", f"{NET}.1/24", "dev", "br0")
        self._ip(LOGIN, "link", "set", "br0", "up")
        for number, node in enumerate(self.nodes, start=2):
            self._ip(
                LOGIN, "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", self._prefix + node
            )
            self._ip(LOGIN, "link", "set", f"v{node}", "master", "br0", "up")
            self._ip(node, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
            self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, host: str, *arguments: str) -> str:
        command = ["ip", "-n", self._prefix + host, *arguments]
        return subprocess.run(command, check=True, timeout=30, text=True, stdout=subprocess.PIPE).stdout

    def _write_configuration(self) -> None:
        # 22.05 loads a cgroup plugin where nothing is mounted, and dies of any but this one
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        what = "CPUs=64 Sockets=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
        if self.has_namespaces:
            controller, port = LOGIN, 6817
            nodes = [f"NodeName={node} {what}" for node in self.nodes]
        else:
            controller, port = "localhost(127.0.0.1)", 16000 + os.getpid() % 1000 * 10
            host = socket.gethostname().split(".")[0]
            nodes = [
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.{10 + number} Port={port + number} {what}"
                for number, node in enumerate(self.nodes, start=1)
            ]
        for number in range(8):
            (self.base / "dev" / f"gpu{number}").touch()
        gpus = f"NodeName={','.join(self.nodes)} Name=gpu File={self.base}/dev/gpu[0-7]\n"
        (self.base / "gres.conf").write_text(gpus)
        values = {"base": self.base, "slurmd_timeout_s": self.slurmd_timeout_s, "user": _user()}
        text = CONF.format(controller=controller, port=port, nodes="\n".join(nodes), **values)
        (self.base / "slurm.conf").write_text(text)


@contextlib.contextmanager
def open_cluster(*, num_nodes: int, slurmd_timeout_s: int = 15) -> Iterator[Cluster]:
    """A cluster whose nodes are idle. slurmd_timeout_s: after which SLURM by itself takes a node for dead; 300 on most sites."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # munged refuses a folder above its socket that others cannot enter, as pytest's are
        cluster = Cluster(Path(folder), num_nodes=num_nodes, slurmd_timeout_s=slurmd_timeout_s)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def wait_until(condition: Callable[[], Any], *, limit_s: float) -> Any:
    """The first answer that is true. TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(0.1)
    return answer


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
