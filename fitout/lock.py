"""One process at a time: a lock on a folder that dies with its holder.

    the usual case      flock on the file: the kernel lets go when the holder is gone, however it went (kill -9 too)
    a file system       (some network ones) without flock: a file that only one process can create, with who made it;
    without locks       it is stale, and taken over, when that process is gone: no such pid here, another one with the
                        same pid, or the machine was started anew since

The file tells who holds it: {"pid", "host", "boot", "started", "since"}.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from .errors import RunExistsError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """The lock file `path`, held by this process until `release` (or the end of a `with`).

    Raises RunExistsError when another process has it, OSError for what the file system says.
    """

    def __init__(self, path: Path):
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._claim: Path | None = None
        try:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _taken(path, _read(path)) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._claim = _claim(path)
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(_me()).encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        if self._claim:
            self._claim.unlink(missing_ok=True)
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether some process holds the lock file `path` at this moment."""
    if not path.exists():
        return False
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        claim = _claim_of(path)
        return claim.exists() and not _gone(_read(claim))
    finally:
        os.close(handle)
    return False


def _claim_of(path: Path) -> Path:
    return path.with_name(path.name + ".claim")


def _claim(path: Path) -> Path:
    """The file that stands for the lock where the file system has none; a stale one is taken over."""
    claim = _claim_of(path)
    mine = json.dumps(_me()).encode()
    for _ in range(2):
        with suppress(FileExistsError):
            handle = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(handle, mine)
            os.close(handle)
            time.sleep(0.1)  # another one that also found the old one stale may just have taken this one away
            if claim.exists() and claim.read_bytes() == mine:
                return claim
        holder = _read(claim)
        if not _gone(holder):
            raise _taken(path, holder)
        claim.unlink(missing_ok=True)
    raise _taken(path, _read(claim))


def _me() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot(), "started": _started(pid), "since": since}


def _boot() -> str:
    """Names this start of the machine; empty where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    """Who a lock file names; {} when it is empty or torn."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock names certainly runs no more; of another machine's nothing is certain."""
    if not holder or holder.get("host") != socket.gethostname():
        return False
    if holder.get("boot") and holder["boot"] != _boot():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return bool(holder.get("started")) and holder["started"] != _started(int(holder["pid"]))


def _taken(path: Path, holder: dict[str, Any]) -> RunExistsError:
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder.get("since") else "unknown"
    hint = "Wait for it, stop it, or choose another name with --out."
    if _gone(holder):  # what it started lives on with its open files
        who = f"{who}; it is gone, but a process that it started still holds the folder"
        hint = f"End that process (fuser {path} names it), or choose another name with --out."
    elif holder.get("host") not in (None, socket.gethostname()):
        hint = f"Wait for it, or, when that machine is off, remove {_claim_of(path)}."
    return RunExistsError(
        f"another process is working in this run directory ({who})",
        where=str(path.parent),
        harm="Two writers would mix their checkpoints and logs.",
        hint=hint,
    )
