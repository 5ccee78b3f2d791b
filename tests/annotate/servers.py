"""Label Studio and Doccano for the integration tests, on loopback, each in a virtual environment of its own.

    python -m tests.annotate.servers install FOLDER          two environments, about 1.5 GB, some minutes
    python -m tests.annotate.servers test FOLDER [PYTEST...] starts both, runs tests/annotate/test_live.py, stops them
    python -m tests.annotate.servers run FOLDER              starts both and waits, to look at them in a browser

Doccano 1.8.4 needs marshmallow below 4 and numpy below 2, and starts on every address by its own command; here its
application is started by gunicorn on 127.0.0.1 instead. Its imports and exports are done by a second process.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

VERSIONS = {
    "label-studio": ["label-studio==1.23.2"],
    "doccano": ["doccano==1.8.4", "marshmallow<4", "numpy<2", "setuptools<81"],
}
LABEL_STUDIO, DOCCANO = "http://127.0.0.1:18901", "http://127.0.0.1:18902"
PATIENCE = 600  # seconds for a first start, which makes the database


def install(folder: Path) -> None:
    for name, packages in VERSIONS.items():
        venv = folder / name
        if not (venv / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "-q", *packages], check=True)


@contextmanager
def process(command: list[str], env: dict[str, str], log: Path, cwd: Path) -> Iterator[None]:
    """A server in a process group of its own, ended with everything it started."""
    with open(log, "wb") as output:
        running = subprocess.Popen(
            command, env={**os.environ, **env}, cwd=cwd, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)


def wait_for(url: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"{url} did not start:\n{log.read_text()[-2000:]}")


@contextmanager
def label_studio(venv: Path, data: Path) -> Iterator[dict[str, str]]:
    """Label Studio with one account; gives what `fitout data push label-studio` reads from the environment."""
    token = secrets.token_hex(20)
    env = {
        "HOME": str(data),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "False",
        "LATEST_VERSION_CHECK": "False",
        "LABEL_STUDIO_PASSWORD": secrets.token_hex(16),
        "LABEL_STUDIO_USER_TOKEN": token,
    }
    port = LABEL_STUDIO.rsplit(":", 1)[1]
    command = [str(venv / "bin" / "label-studio"), "start", "--no-browser", "--internal-host", "127.0.0.1"]
    command += ["--port", port, "--data-dir", str(data), "--username", "tester@localhost.test", "--log-level", "ERROR"]
    log = data / "server.log"
    with process(command, env, log, data):
        wait_for(f"{LABEL_STUDIO}/health", log)
        yield {"LABEL_STUDIO_URL": LABEL_STUDIO, "LABEL_STUDIO_API_KEY": token}


@contextmanager
def doccano(venv: Path, data: Path) -> Iterator[dict[str, str]]:
    """Doccano with two administrators (tester, second; one password) and its task queue."""
    [packages] = (venv / "lib").glob("python3.*/site-packages")
    password = secrets.token_hex(16)
    env = {
        "DOCCANO_HOME": str(data),
        "STANDALONE": "True",
        "DJANGO_SETTINGS_MODULE": "config.settings.production",
        "DATABASE_URL": f"sqlite:///{data}/db.sqlite3",
        "MEDIA_ROOT": str(data / "media"),
        "SECRET_KEY": secrets.token_hex(32),
    }
    command = str(venv / "bin" / "doccano")
    whole = {**os.environ, **env}
    subprocess.run([command, "init"], env=whole, check=True, capture_output=True)
    for name in ("tester", "second"):
        account = ["--username", name, "--password", password, "--email", f"{name}@localhost.test"]
        subprocess.run([command, "createuser", *account], env=whole, check=True, capture_output=True)
    backend = packages / "backend"
    server = [str(venv / "bin" / "gunicorn"), "--chdir", str(backend), "--bind", DOCCANO.removeprefix("http://")]
    log = data / "server.log"
    with (
        process([*server, "--workers", "2", "config.wsgi"], env, log, data),
        process([command, "task", "--concurrency", "1"], env, data / "tasks.log", data),
    ):
        wait_for(f"{DOCCANO}/v1/health/", log)
        yield {"DOCCANO_URL": DOCCANO, "DOCCANO_USERNAME": "tester", "DOCCANO_PASSWORD": password}


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("install", "test", "run"):
        print(__doc__)
        return 2
    what, folder, *rest = arguments
    if what == "install":
        install(Path(folder))
        return 0
    with ExitStack() as stack:
        env = {}
        for name, start in (("label-studio", label_studio), ("doccano", doccano)):
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True)))
            env |= stack.enter_context(start(Path(folder).resolve() / name, data))
        if what == "run":
            print("".join(f"export {key}={value}\n" for key, value in env.items()), "stop with Ctrl-C", flush=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                return 0
        command = [sys.executable, "-m", "pytest", "-q", "tests/annotate/test_live.py", *rest]
        return subprocess.run(command, env={**os.environ, **env}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
