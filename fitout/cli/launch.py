"""Starts the ranks of a run, as torchrun would (torch elastic), and says how they ended.

Each rank is `fitout VERB ...` again, with RANK, WORLD_SIZE and so on in its environment. When one ends badly all are
ended; nothing is started again by itself, since the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FitoutError, RequestError
from ..rundir import RunDir

GRACE = 600  # seconds that ranks have to save when the run is asked to stop
ELASTIC = 60  # seconds in which torch elastic has ended all ranks of a machine, and told, where it can
JOIN = 900  # seconds that machines wait for each other at the start
GO_ON = "Go on with the same command (for `fitout train` add --resume)."


def launch(
    arguments: Sequence[str], run: RunDir, *, processes: int, nodes: int = 1, rendezvous: str | None = None
) -> int:
    """Runs `fitout ARGUMENTS` as `processes` ranks here (and on `nodes` - 1 other machines); returns the exit code.

    Raises RequestError when ranks cannot be started like this, FitoutError when one ended by a signal or hung.
    """
    _check(processes, nodes, rendezvous)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its story of a failure is told here
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    config: dict[str, Any] = {"rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    if nodes > 1 and rendezvous is not None:
        config = _between_machines(rendezvous)
    stacks = set(run.stacks.glob("*.txt"))
    if nodes > 1:
        threading.Thread(target=_leave_after_a_hang, args=(run, stacks), daemon=True).start()
    ranks = elastic_launch(
        LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            run_id=f"fitout-{run.path.name}",
            rdzv_backend="c10d",
            max_restarts=0,
            **config,
        ),
        sys.executable,
    )
    try:
        ranks("-m", "fitout", *arguments)
    except ChildFailedError as error:
        return _ended(error.failures, run, set(run.stacks.glob("*.txt")) - stacks)
    except SignalException as error:
        if run.read_status().get("status") == "stopped":
            return 3
        raise FitoutError(
            f"stopped by {error.sigval.name} before a checkpoint could be saved", where=str(run.path), hint=GO_ON
        ) from None
    except (RendezvousError, ConnectionError) as error:
        raise FitoutError(
            f"the machines did not come together, or lost each other: {str(error).splitlines()[0]}",
            where=f"--rendezvous {rendezvous}" if rendezvous else "",
            harm="No step was taken without all of them.",
            hint=f"Start the same command on all {nodes} machines within {JOIN // 60} minutes; the address is that of "
            "the first one, with a port that the others can reach.",
        ) from None
    return 0


def _check(processes: int, nodes: int, rendezvous: str | None) -> None:
    if "RANK" in os.environ:
        raise RequestError(
            "these processes are ranks already",
            where="--processes",
            harm="Each would start ranks of its own.",
            hint="Leave out --processes under torchrun, accelerate launch or deepspeed.",
        )
    if (nodes > 1) != (rendezvous is not None):
        raise RequestError(
            "--nodes and --rendezvous go together",
            hint="On every machine: --nodes 2 --rendezvous FIRST_MACHINE:29500",
        )
    if rendezvous is not None and not rendezvous.rpartition(":")[2].isdecimal():
        raise RequestError(f"{rendezvous!r} has no port", where="--rendezvous", hint="For example node1:29500")
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise RequestError(
            f"{processes} ranks, and this machine has {torch.cuda.device_count()} GPUs",
            where="--processes",
            harm="Two ranks on one GPU would wait for each other and share its memory.",
            hint=f"Say --processes {torch.cuda.device_count()}; on the CPU: CUDA_VISIBLE_DEVICES= before the command.",
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _between_machines(rendezvous: str) -> dict[str, Any]:
    """How this machine is reached by the others, and whether it is the one that they meet at.

    gloo and NCCL would take the address of the machine's own name, which is often the loopback's.
    """
    host, _, port = rendezvous.rpartition(":")
    try:
        address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
            probe.connect(address[4])  # sends nothing; the kernel chooses the way
            own = probe.getsockname()[0]
    except OSError as error:
        raise RequestError(
            f"{host} cannot be reached: {error.strerror or error}", where="--rendezvous", hint="Give its IP address."
        ) from None
    interface = _interface(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    is_host = own == address[4][0] or own.startswith("127.")
    return {
        "rdzv_endpoint": rendezvous,
        "local_addr": own,
        "rdzv_configs": {"is_host": is_host, "join_timeout": JOIN, "timeout": JOIN},
    }


def _interface(own: str) -> str | None:
    """The name of the network interface with this IPv4 address (Linux)."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def _hung(run: RunDir) -> FitoutError:
    return FitoutError(
        "a rank hung, or its machine cannot be reached; all were ended",
        where=str(run.stacks),
        harm="The last checkpoint is complete; nothing after it was kept.",
        hint="The files there say what each was doing; the one that waits in no collective is the cause. " + GO_ON,
    )


def _leave_after_a_hang(run: RunDir, before: set[Path]) -> None:
    """Ends this process a minute after ranks ended because of a hang. Torch elastic itself may wait for the machine
    where all meet, and with a cut cable the kernel takes a quarter of an hour to give up."""
    while not set(run.stacks.glob("*.txt")) - before:
        time.sleep(2)
    time.sleep(ELASTIC)
    first, *rest = _hung(run).lines()
    print("\n".join([f"error {first}", *(f"      {line}" for line in rest)]), file=sys.stderr, flush=True)
    os._exit(1)


def _ended(failures: dict[int, Any], run: RunDir, stacks: set[Path]) -> int:
    """The exit code of ranks of which some failed. Those that were ended because of another do not count."""
    if stacks:
        raise _hung(run)
    by_time = sorted(failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
    signalled = [(rank, -one.exitcode) for rank, one in by_time if one.exitcode < 0 and one.exitcode != -signal.SIGTERM]
    if signalled:
        rank, number = signalled[0]
        raise FitoutError(
            f"rank {rank} was ended by {signal.Signals(number).name}; the others were stopped",
            where=str(run.path),
            harm="The last checkpoint is complete; nothing after it was kept.",
            hint=GO_ON + (" SIGKILL is what a machine out of memory sends." if number == signal.SIGKILL else ""),
        )
    code = by_time[0][1].exitcode
    return code if code in (1, 2, 3) else 1
