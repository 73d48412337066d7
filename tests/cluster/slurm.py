"""A Slurm cluster of one node, started by hand: munged, slurmctld and slurmd, with all their state in one folder.

No systemd, no cgroups, no database, and the system's own Slurm and munge are left alone. The node claims 4 CPUs, 24 GB
and 2 GPUs of 4 shards each, whatever the machine has, so that jobs of realistic requests run side by side on a
small one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from getpass import getuser
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SEARCH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # daemons are not on a user's path

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides

SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory

AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
KillWait=2
MinJobAge=7200

GresTypes=gpu,shard
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=4 RealMemory=24000 Gres=gpu:2,shard:8
PartitionName=cpu Nodes={node} Default=YES MaxTime=INFINITE OverSubscribe=NO
PartitionName=gpu Nodes={node} MaxTime=INFINITE OverSubscribe=NO
"""

GRES_CONF = """
Name=gpu File=/dev/zero
Name=gpu File=/dev/full
Name=shard Count=8
"""


class Cluster:
    """A running cluster; its clients need `environment`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def cancel_all(self) -> None:
        """End every job and wait until its processes are gone: slurmd, when it stops, leaves them running."""
        self.run("scancel", "--user", getuser())
        wait_for(lambda: not self.run("squeue", "--noheader"), self)

    def run(self, *command: str) -> str:
        """What a Slurm client prints; CalledProcessError if it fails."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def jobs(self) -> list[dict[str, str]]:
        """What each job of the last two hours asked for and came to: JobId, JobState, TimeLimit, TRES, Comment..."""
        lines = self.run("scontrol", "--oneliner", "show", "jobs").splitlines()
        return [
            dict(field.partition("=")[::2] for field in line.split() if "=" in field)
            for line in lines
            if line.startswith("JobId=")  # else: "No jobs in the system"
        ]


def programs() -> dict[str, str]:
    """The path of each program of Slurm and munge.

    Raises:
        RuntimeError: one is not installed; the message has the remedy.
    """
    found = {name: shutil.which(name, path=SEARCH) for name in PROGRAMS}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise RuntimeError(
            f"no {', '.join(missing)} on this machine: run `make test-slurm` as root, or on Debian or Ubuntu"
            " `apt-get install slurmctld slurmd slurm-client munge`"
        )
    return {name: path for name, path in found.items() if path is not None}


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster with its files in `folder` (made anew), and stop it with all its jobs at the end.

    Raises:
        RuntimeError: a program is missing, or the node is not ready in 30 seconds; the daemons' logs are quoted.
    """
    program = programs()
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True)
    key, munge_socket = folder / "munge.key", folder / "munge.socket"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            folder=folder,
            host=socket.gethostname(),
            node="node1",
            user=getuser(),
            munge_socket=munge_socket,
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    (folder / "gres.conf").write_text(GRES_CONF)
    # Snakemake's executor strips every SLURM_ variable, and so SLURM_CONF, before it calls srun inside a job.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {program["srun"]} "$@"\n')
    srun.chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
        "SLURM_CONF": str(conf),
        "PATH": f"{srun.parent}{os.pathsep}{SEARCH}",
    }
    cluster = Cluster(folder, environment)

    with ExitStack() as stack:
        # --force: munge wants a folder that all users can enter; this cluster has one user.
        start = [program["munged"], "--foreground", "--force", f"--key-file={key}", f"--socket={munge_socket}"]
        start += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")]
        stack.enter_context(daemon(start, cluster))
        wait_for(munge_socket.exists, cluster)
        stack.enter_context(daemon([program["slurmctld"], "-D"], cluster))
        stack.enter_context(daemon([program["slurmd"], "-D", "-N", "node1"], cluster))
        wait_for(lambda: "idle" in sinfo(cluster), cluster)
        stack.callback(cluster.cancel_all)
        yield cluster


@contextmanager
def daemon(command: list[str], cluster: Cluster) -> Iterator[None]:
    """Run a daemon in the foreground of its own process, its output beside its log, until the end."""
    with (cluster.folder / f"{Path(command[0]).name}.out").open("w") as output:
        process = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def sinfo(cluster: Cluster) -> str:
    """The state of the node, empty as long as the controller does not answer."""
    command = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], bool], cluster: Cluster, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = [*cluster.folder.glob("*.out"), *cluster.folder.glob("*.log")]
            text = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
            raise RuntimeError(f"the Slurm cluster did not come or go within {seconds:.0f} s\n{text}")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
