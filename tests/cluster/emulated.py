"""A real Slurm with fake GPUs on this machine: Debian's daemons on loopback, everything they write in one folder.

One slurmd plays each node. Besides starting and stopping, a cluster can be hurt: a node crashes without a word, a daemon
is killed and comes back. Processes are ended by the pids that this cluster's own files name, and by no other means.

    python tests/cluster/emulated.py start FOLDER [NODES [GPUS]]    prints the line that lets a shell use the cluster
    python tests/cluster/emulated.py stop FOLDER                    jobs and daemons end; the folder stays
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core", "my_print_defaults": "mariadb-client-core",
}  # fmt: skip
"""What is needed, and Debian's package that has it."""

LONGEST_PATH = 60  # of the folder: sockets below it have to fit into 108 characters
START_SECONDS = 60.0
NODE_DOWN_SECONDS = 10  # of silence, after which Slurm gives a node up
GRACE_SECONDS = 8  # from the notice of a pre-emption to its end
KILL_SECONDS = 4  # from SIGTERM to SIGKILL, for a job that is cancelled

SYSTEM_PATH = os.pathsep.join(["/usr/local/sbin", "/usr/sbin", "/sbin"])
# Where the machine's name is a loopback address Slurm binds to that alone, unless it is told otherwise.
PREEMPTIBLE, ALWAYS = "preemptible", "gpu"


def missing() -> str:
    """Why no cluster can be had here; empty where it can."""
    found = _path()
    lacking = sorted(package for program, package in PROGRAMS.items() if shutil.which(program, path=found) is None)
    return f"no Slurm here: apt-get install {' '.join(lacking)}" if lacking else ""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), SYSTEM_PATH])


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something to come about; raises TimeoutError that says what did not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """One cluster and the folder that it lives in."""

    home: Path
    nodes: int = 4
    gpus: int = 8
    cpus: int = 64
    has_accounting: bool = True

    @property
    def conf(self) -> Path:
        return self.home / "slurm.conf"

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def daemons(self) -> list[str]:
        """In the order in which they start."""
        accounting = ["mariadbd", "slurmdbd"] if self.has_accounting else []
        return ["munged", *accounting, "slurmctld", *(f"slurmd.{name}" for name in self.node_names)]

    @property
    def environment(self) -> dict[str, str]:
        """For programs that use the cluster."""
        return {**os.environ, "PATH": _path(), "LC_ALL": "C", "SLURM_CONF": str(self.conf)}

    # ------------------------------------------------------------------------------------------------ commands

    def ask(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm's answers; what a job of it prints lies in the cluster's folder."""
        done = subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout.strip()

    def jobs(self, state: str = "all", fields: str = "%A|%j|%T|%N") -> list[list[str]]:
        """Fields of the jobs in a state."""
        lines = self.ask("squeue", "--noheader", f"--states={state}", f"--format={fields}").splitlines()
        return [line.split("|") for line in lines]

    def is_up(self) -> bool:
        """Whether every node can take a job."""
        answer = self.ask("sinfo", "--noheader", "--Node", f"--partition={ALWAYS}", "--format=%T", check=False).split()
        return len(answer) == self.nodes and set(answer) <= {"idle", "mixed", "allocated", "completing"}

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """Start whatever does not run, and wait until every node is ready."""
        self.home.mkdir(parents=True, exist_ok=True)
        if not self.conf.exists():
            self._configure()
        for daemon in self.daemons:
            self.revive(daemon)
        self.resume()

    def resume(self) -> None:
        """Wait until every node is ready; one that Slurm took out of service, as after a crash, is put back."""
        with contextlib.suppress(TimeoutError):
            until(self.is_up, 5, "nodes")
        if not self.is_up():
            for name in self.node_names:
                self.ask("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        until(self.is_up, START_SECONDS, f"every node ready ({self.home})")

    def stop(self) -> None:
        """End jobs and daemons."""
        self.ask("scancel", f"--user={os.getuid()}", check=False)
        with contextlib.suppress(TimeoutError, RuntimeError):
            until(lambda: not self.jobs("pending,running,completing"), 2 * KILL_SECONDS, "an empty queue")
        for daemon in reversed(self.daemons):
            if daemon.startswith("slurmd."):
                self.crash(daemon.partition(".")[2])
            else:
                self.kill(daemon, signal.SIGTERM)
        for pid in self._job_processes(""):
            _signal(pid, signal.SIGKILL)

    def kill(self, daemon: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End one daemon and see it gone; nothing where it does not run."""
        pid = self._pid(daemon)
        if pid is None:
            return
        _signal(pid, number)
        with contextlib.suppress(TimeoutError):
            until(lambda: not _is_live(pid), 20, daemon)
        if _is_live(pid):
            _signal(pid, signal.SIGKILL)
            until(lambda: not _is_live(pid), 20, daemon)
        self._pid_file(daemon).unlink(missing_ok=True)

    def crash(self, node: str) -> None:
        """Let a node go without a word: its slurmd and every process of its jobs, none of which can report the others."""
        pid = self._pid(f"slurmd.{node}")
        victims = ([pid] if pid is not None else []) + self._job_processes(node)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for victim in victims:
                _signal(victim, number)
        self._pid_file(f"slurmd.{node}").unlink(missing_ok=True)

    def revive(self, daemon: str) -> None:
        """Start a daemon that does not run."""
        if self._pid(daemon) is None:
            kind, _, node = daemon.partition(".")
            {
                "munged": self._start_munged, "mariadbd": self._start_mariadbd, "slurmdbd": self._start_slurmdbd,
                "slurmctld": self._start_slurmctld, "slurmd": lambda: self._run(["slurmd", "-N", node]),
            }[kind]()  # fmt: skip

    # ------------------------------------------------------------------------------------------------ daemons

    def _run(self, command: list[str], **extra: str) -> None:
        """Run a daemon that puts itself into the background."""
        with (self.home / f"{command[0]}.out").open("ab") as out:
            done = subprocess.run(
                command, env={**self.environment, **extra}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False,
                timeout=START_SECONDS,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: ended with {done.returncode}: {out.name}")

    def _start_munged(self) -> None:
        self._run(
            ["munged", "--force", f"--key-file={self.home}/munge.key", f"--socket={self.home}/munge.sock",
             f"--pid-file={self.home}/munged.pid", f"--log-file={self.home}/munged.log", f"--seed-file={self.home}/munge.seed"]
        )  # fmt: skip
        until((self.home / "munge.sock").exists, START_SECONDS, "munged")

    def _start_mariadbd(self) -> None:
        folder, defaults = self.home / "db", f"--defaults-file={self.home}/my.cnf"
        if not (folder / "mysql").is_dir():
            self._run(
                ["mariadb-install-db", defaults, f"--user={getpass.getuser()}", "--skip-test-db",
                 "--auth-root-authentication-method=socket", f"--auth-root-socket-user={getpass.getuser()}"]
            )  # fmt: skip
        (self.home / "mysql.sock").unlink(missing_ok=True)
        self._run(["setsid", "--fork", "mariadbd", defaults, f"--user={getpass.getuser()}"])
        until((self.home / "mysql.sock").exists, START_SECONDS, "mariadbd")

    def _start_slurmdbd(self) -> None:
        self._run(["slurmdbd"], MYSQL_UNIX_PORT=f"{self.home}/mysql.sock")
        known = ("sacctmgr", "--noheader", "list", "cluster")
        until(lambda: subprocess.run(known, env=self.environment, capture_output=True).returncode == 0, START_SECONDS, "slurmdbd")  # fmt: skip
        for what in (("cluster", "golf"), ("account", "golf", "cluster=golf"), ("qos", "short", "MaxSubmitJobsPerUser=1000"),
                     ("user", getpass.getuser(), "account=golf", "cluster=golf", "qos=normal,short")):  # fmt: skip
            self.ask("sacctmgr", "--immediate", "add", *what, check=False)

    def _start_slurmctld(self) -> None:
        self._run(["slurmctld"])
        until(lambda: subprocess.run(["sinfo"], env=self.environment, capture_output=True).returncode == 0, START_SECONDS, "slurmctld")  # fmt: skip

    def _pid_file(self, daemon: str) -> Path:
        return self.home / f"{daemon}.pid"

    def _pid(self, daemon: str) -> int | None:
        """The pid of a daemon that lives; a pid that is by now another program's is none."""
        try:
            pid = int(self._pid_file(daemon).read_text())
            is_it = Path(f"/proc/{pid}/comm").read_text().strip() == daemon.partition(".")[0]
        except (OSError, ValueError):
            return None
        return pid if is_it and _is_live(pid) else None

    def _job_processes(self, node: str) -> list[int]:
        """Processes of this cluster's jobs and of what watches over them; on a node, or anywhere."""
        log = f"{self.home}/slurmd.{node}"
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "comm").read_text().strip() == "slurmstepd":
                    is_ours = any(os.readlink(link).startswith(log) for link in (folder / "fd").iterdir())
                else:
                    is_ours = self._is_of_job((folder / "environ").read_bytes().split(b"\0"), node)
            except OSError:  # it ended, or is somebody else's
                continue
            if is_ours and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def _is_of_job(self, environment: list[bytes], node: str) -> bool:
        on_node = not node or f"SLURMD_NODENAME={node}".encode() in environment
        in_job = any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)
        return f"SLURM_CONF={self.conf}".encode() in environment and on_node and in_job

    # ------------------------------------------------------------------------------------------------ configuration

    def _configure(self) -> None:
        if len(str(self.home)) > LONGEST_PATH:
            raise ValueError(f"{self.home}: a cluster's folder must have a path of at most {LONGEST_PATH} characters")
        for name in ("state", "dev", *(f"spool.{node}" for node in self.node_names)):
            (self.home / name).mkdir()
        for number in range(self.gpus):
            _make_device(self.home / "dev" / f"gpu{number}")
        self._write("munge.key", secrets.token_bytes(1024))
        files = f"{self.home}/dev/gpu[0-{self.gpus - 1}]" if self.gpus > 1 else f"{self.home}/dev/gpu0"
        self._write("gres.conf", f"AutoDetect=off\nName=gpu File={files}\n".encode())
        ports = _free_ports(self.nodes + 2)
        self._write("slurm.conf", ("\n".join(self._slurm_conf(ports)) + "\n").encode())
        if self.has_accounting:
            self._write("slurmdbd.conf", ("\n".join(self._slurmdbd_conf(ports[1])) + "\n").encode())
            self._write("my.cnf", ("\n".join(self._my_cnf()) + "\n").encode())

    def _write(self, name: str, content: bytes) -> None:
        path = self.home / name
        path.touch(mode=0o600)
        path.write_bytes(content)

    def _slurm_conf(self, ports: list[int]) -> Iterator[str]:
        host, user, home = socket.gethostname().partition(".")[0], getpass.getuser(), self.home
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        yield from (
            "ClusterName=golf", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}", f"SlurmUser={user}",
            f"SlurmdUser={user}", "AuthType=auth/munge", "CredType=cred/munge",
            f"AuthInfo=socket={home}/munge.sock,cred_expire=10",  # a job's credential: so long a node's jobs cannot return
            f"StateSaveLocation={home}/state", f"SlurmdSpoolDir={home}/spool.%n", f"SlurmctldPidFile={home}/slurmctld.pid",
            f"SlurmdPidFile={home}/slurmd.%n.pid", f"SlurmctldLogFile={home}/slurmctld.log",
            f"SlurmdLogFile={home}/slurmd.%n.log", "SwitchType=switch/none", "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
            "PropagateResourceLimits=NONE", "SlurmdParameters=config_overrides", "ReturnToService=2",
            f"SlurmdTimeout={NODE_DOWN_SECONDS}", f"KillWait={KILL_SECONDS}", "InactiveLimit=0", "JobRequeue=1",
            f"FirstJobId={1000 + secrets.randbelow(10**7)}",  # ids of an earlier cluster must not come again
            "MinJobAge=300", "MaxJobCount=20000", "MessageTimeout=10", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory", "PriorityType=priority/basic", "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2,default_queue_depth=1000",
            "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "SlurmctldParameters=preempt_send_user_signal",
        )  # fmt: skip
        if any(line.split()[0].startswith("127.") for line in _addresses(host)):
            yield "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
        if self.has_accounting:
            yield from (
                "AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={ports[1]}", f"AccountingStoragePass={home}/munge.sock",
                "AccountingStorageTRES=gres/gpu", "AccountingStorageEnforce=associations,limits,qos",
            )  # fmt: skip
        else:
            yield "AccountingStorageType=accounting_storage/none"
        yield "GresTypes=gpu"
        for name, port in zip(self.node_names, ports[2:], strict=True):
            yield (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory={memory_mb} Gres=gpu:{self.gpus} State=UNKNOWN"
            )
        yield f"PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=INFINITE DefMemPerCPU={max(1, memory_mb // self.cpus)}"
        yield f"PartitionName={ALWAYS} Default=YES PriorityTier=10 PreemptMode=OFF"
        yield f"PartitionName={PREEMPTIBLE} PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}"

    def _slurmdbd_conf(self, port: int) -> list[str]:
        user = getpass.getuser()
        return [
            f"DbdHost={socket.gethostname().partition('.')[0]}", "DbdAddr=127.0.0.1", f"DbdPort={port}", f"SlurmUser={user}",
            "AuthType=auth/munge", f"AuthInfo=socket={self.home}/munge.sock", f"PidFile={self.home}/slurmdbd.pid",
            f"LogFile={self.home}/slurmdbd.log", "StorageType=accounting_storage/mysql", "StorageHost=localhost",
            f"StorageUser={user}", "StorageLoc=golf",
        ]  # fmt: skip

    def _my_cnf(self) -> list[str]:
        return [
            "[mariadbd]", f"datadir={self.home}/db", f"socket={self.home}/mysql.sock", f"pid-file={self.home}/mariadbd.pid",
            f"log-error={self.home}/mariadbd.log", "skip-networking", "skip-name-resolve", "performance_schema=OFF",
            "innodb_buffer_pool_size=64M", "innodb_log_file_size=16M", "innodb_flush_log_at_trx_commit=0",
            "innodb_flush_method=nosync", "innodb_lock_wait_timeout=900", "innodb_use_native_aio=0",
        ]  # fmt: skip


def _make_device(path: Path) -> None:
    """A copy of /dev/null, which Slurm numbers and gives to jobs; where none can be made, a file, which it only counts."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.stat(os.devnull).st_rdev)
    except OSError:
        path.touch()


def _addresses(host: str) -> list[str]:
    found = subprocess.run(["getent", "hosts", host], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if line.strip()]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, found while all of them are held."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _is_live(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    counts = [int(number) for number in arguments[2:4]]
    home = Path(arguments[1]).resolve()
    known = len(list(home.glob("spool.*"))) or 4
    cluster = Cluster(home, *(counts or [known]))
    if arguments[0] == "stop":
        cluster.stop()
        return 0
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    cluster.start()
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
