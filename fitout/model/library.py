"""Code in C++ (cpp/) that is compiled where it runs, once, by the compiler that is there, and kept in home()/native.

A library is found by a hash of its sources, of how it is compiled and of what for. One that others could have written
is not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..files import atomic_path, home

SOURCES = Path(__file__).parent / "cpp"
PATIENCE = 300  # seconds to compile; it takes three


class Missing(Exception):
    """Why a library cannot be had."""


def load(names: Sequence[str], flags: Sequence[str], linked: Sequence[str], of: object) -> ctypes.CDLL:
    """The library of the sources `names`, linked with `linked`, for a machine and versions that `of` tells apart.
    Compiles what is not there yet, or damaged. Raises Missing; OSError where files cannot be written or loaded."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise Missing(f"there is no C++ compiler ({compiler[0]})")
    sources = [(SOURCES / name).read_text() for name in names]
    headers = [path.read_text() for path in sorted(SOURCES.glob("*.h"))]
    told = [compiler, list(flags), list(linked), of, sources, headers]
    path = home() / "native" / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = path.parent.stat()
    if folder.st_uid != os.getuid() or folder.st_mode & 0o022:
        raise Missing(f"others can write into {path.parent}")
    if not path.exists():
        _compile(compiler, names, flags, linked, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # whatever stands there under this name
        path.unlink()
        _compile(compiler, names, flags, linked, path)
        return ctypes.CDLL(str(path))


def _compile(
    compiler: list[str], names: Sequence[str], flags: Sequence[str], linked: Sequence[str], path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as whole:
        objects = [f"{folder}/{Path(name).stem}.o" for name in names]
        for name, compiled in zip(names, objects, strict=True):
            _call([*compiler, *flags, "-c", str(SOURCES / name), "-o", compiled])
        _call([*compiler, "-shared", *objects, *linked, "-o", str(whole)])


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{command[0]} took more than {PATIENCE} seconds") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise Missing(f"{command[0]} could not compile it: {said}")
