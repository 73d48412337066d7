"""Starting a job in milliseconds: a process that has imported what a command needs forks itself for every job.

Importing torch and timm takes seconds of CPU, often more than the job's own work, and a cohort is thousands of jobs. So
the first job of a Snakemake run starts a *warm process* for its command, and every job runs in a fork of it: with its
own memory, environment, working directory and output, so that a job that breaks breaks alone. The warm process belongs
to one Snakemake process (on a cluster: to the one inside a submitted job) and ends with it, its jobs too, or after half
a minute without work.

`GMMAMBA_WARM_START` holds the pid of that Snakemake process; without it, or where forking is unsafe (macOS), commands
run in their own process as usual. Standard library only: the client is what every job has to import.

The talk between client and warm process, over a Unix socket in a folder that only the user can open: the client sends
its request with its three standard streams; the warm process answers "+" when the job has begun and a line with its
exit status when it has ended. A client that goes away takes its job with it, and so does the warm process.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib
import json
import os
import resource
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OWNER = "GMMAMBA_WARM_START"
IDLE_SECONDS = 30.0
STREAMS = (0, 1, 2)


def run_warm(package: str, arguments: Sequence[str], preload: Sequence[str]) -> int | None:
    """Run ``python -m package arguments`` in a fork of the warm process; returns its exit status.

    preload: modules that the warm process has imported. None where there is none to be had: the caller then runs the
    command itself.
    """
    owner = os.environ.get(OWNER)
    if not owner or sys.platform != "linux":
        return None
    address = _folder() / f"{owner}-{_key(package, preload)}"
    for _ in range(2):  # a warm process may end, having been idle, between our call and its answer
        try:
            connection = _connect(address, owner, preload)
        except OSError as error:  # such as a file system without locks or sockets, or a path too long for one
            return _run_alone(int(owner), f"{error}; TMPDIR chooses the folder")
        with connection:
            if _send(connection, package, arguments) and _receive(connection, 1) == b"+":
                return _wait(connection)
    return _run_alone(int(owner), f"the process for {package} ended at once")


def usage() -> str:
    """What this process took so far: Snakemake's `benchmark` follows the client and would not see a forked job."""
    took = resource.getrusage(resource.RUSAGE_SELF)
    peak = took.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return f"{took.ru_utime + took.ru_stime:.1f} s of CPU, {peak:.0f} MB at most"


# The client ----------------------------------------------------------------------------------------------------------


def _run_alone(owner: int, why: str) -> int | None:
    """None: the caller may run its command in this process, which then ends with the owner, as a fork would."""
    try:
        alive = os.pidfd_open(owner)
    except ProcessLookupError:
        print("Snakemake has ended: this job is not begun", file=sys.stderr)
        return 1

    def watch() -> None:
        select.select([alive], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    print(f"no warm start, this job runs by itself: {why}", file=sys.stderr)
    return None


def _folder() -> Path:
    """The user's own folder for sockets."""
    folder = Path(tempfile.gettempdir(), f"gmmamba-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must belong to you alone (mode 700): remove it, or set TMPDIR")
    return folder


def _key(package: str, preload: Sequence[str]) -> str:
    """Other interpreters, other checkouts and other nodes have warm processes of their own."""
    parts = [socket.gethostname(), sys.prefix, str(Path(__file__).resolve()), package, *preload]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextmanager
def _locked(address: Path) -> Iterator[None]:
    with (address.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _connect(address: Path, owner: str, preload: Sequence[str]) -> socket.socket:
    """A connection to the warm process, which is started where there is none."""
    with _locked(address):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            address.unlink(missing_ok=True)  # of one that was killed
            # Bound here: who calls while the process still imports waits in the queue.
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(address))
                listening.listen(128)
                command = [sys.executable, "-m", "slidestore.warm_start", str(address), owner]
                subprocess.Popen(
                    [*command, str(listening.fileno()), *preload],
                    pass_fds=[listening.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the jobs
                )
            connection.connect(str(address))
    return connection


def _send(connection: socket.socket, package: str, arguments: Sequence[str]) -> bool:
    """Ask for the job; False where the warm process has ended."""
    environment = {name: value for name, value in os.environ.items() if name != OWNER}
    request = {"package": package, "arguments": arguments, "cwd": str(Path.cwd()), "environment": environment}
    body = json.dumps(request).encode()
    try:
        socket.send_fds(connection, [len(body).to_bytes(8, "big")], STREAMS)
        connection.sendall(body)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _receive(connection: socket.socket, size: int) -> bytes:
    """`size` bytes, fewer where the other side has gone."""
    received = b""
    with suppress(ConnectionResetError):
        while len(received) < size and (more := connection.recv(size - len(received))):
            received += more
    return received


def _wait(connection: socket.socket) -> int:
    """The exit status of the job, as a shell would give it."""
    answer = b""
    while not answer.endswith(b"\n"):
        if not (more := _receive(connection, 1)):
            print("the warm process of this job was killed, and the job with it: run again", file=sys.stderr)
            return 1
        answer += more
    status = int(answer)
    if status < 0:
        hint = " (for want of memory?)" if -status == signal.SIGKILL else ""
        print(f"the job was ended by {signal.Signals(-status).name}{hint}", file=sys.stderr)
        return 128 - status
    return status


# The warm process ----------------------------------------------------------------------------------------------------


def serve(listening: socket.socket, owner: int) -> None:
    """Fork for every request until the owner is gone or nothing was asked for IDLE_SECONDS."""
    jobs: dict[int, socket.socket] = {}  # pid of a job -> connection to its client
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a job has ended: wake up
    last = time.monotonic()
    alive = os.pidfd_open(owner)  # readable when the owner has ended
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        selector.register(alive, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(timeout=1.0):
                if key.fileobj == alive:
                    return  # jobs of a Snakemake that was killed end here: nobody would record their results
                if key.fileobj is woken:
                    woken.recv(4096)
                elif key.fileobj is listening:
                    connection, _ = listening.accept()
                    try:
                        pid = _start(connection, [listening, wake, woken, *jobs.values()])
                    except OSError:  # no more processes, or no memory: the client runs its job itself
                        connection.close()
                        continue
                    jobs[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                else:  # a client says nothing after its request: it has gone away
                    selector.unregister(key.fileobj)
                    with suppress(ProcessLookupError):
                        os.killpg(key.data, signal.SIGKILL)
            for pid, status in _ended():
                last = time.monotonic()
                with jobs.pop(pid) as connection:
                    if connection in selector.get_map():
                        selector.unregister(connection)
                    with suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(f"{status}\n".encode())
            if not jobs and time.monotonic() - last > IDLE_SECONDS:
                return


def _ended() -> Iterator[tuple[int, int]]:
    """The jobs that have ended: pid and exit status, negative for a signal."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            yield found[0], os.waitstatus_to_exitcode(found[1])


def _start(connection: socket.socket, others: list[socket.socket]) -> int:
    """Fork a job for the request on `connection`; returns its pid."""
    head, streams, _, _ = socket.recv_fds(connection, 8, len(STREAMS))
    body = _receive(connection, int.from_bytes(head, "big"))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for other in others:  # only the warm process may hold them open
                other.close()
            status = _job(connection, json.loads(body), streams)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)  # not the way of the warm process, whose stack this is
    for stream in streams:
        os.close(stream)
    with suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    return pid


def _job(connection: socket.socket, request: dict[str, Any], streams: list[int]) -> int:
    """In the fork: take over the client's streams, folder, environment and arguments, and run its command."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no job outlives the warm process
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for theirs, ours in zip(streams, STREAMS, strict=True):
        os.dup2(theirs, ours)
        os.close(theirs)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["package"], *request["arguments"]]
    connection.sendall(b"+")
    try:
        runpy.run_module(request["package"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def main(address: str, owner: str, descriptor: str, *preload: str) -> None:
    """The warm process: ``python -m slidestore.warm_start ADDRESS OWNER DESCRIPTOR MODULE ...``"""
    try:
        for module in preload:
            importlib.import_module(module)
        with Path(os.devnull).open("w") as nowhere:  # so far errors went to the log of the first job
            os.dup2(nowhere.fileno(), 2)
        serve(socket.socket(fileno=int(descriptor)), int(owner))
    finally:
        with _locked(Path(address)):
            Path(address).unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
