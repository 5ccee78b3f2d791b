"""No pickle, no eval, no shell in the package; read from the syntax tree, so comments and messages may name them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fitout"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "tempfile.mktemp",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}


def dangers(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a file that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += [(node.lineno, module)] if module in MODULES else []
            names = {f"{node.module}.{a.name}" for a in node.names}
            found += [(node.lineno, name) for name in names & CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                found.append((node.lineno, name))
            for keyword in node.keywords:
                value = keyword.value
                on = isinstance(value, ast.Constant) and bool(value.value)
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and on:
                    found.append((node.lineno, f"{keyword.arg}={ast.unparse(value)}"))
                if keyword.arg in ("weights_only", "use_safetensors") and not on:
                    found.append((node.lineno, f"{keyword.arg}={ast.unparse(value)}"))
    return found


def test_nothing_runs_what_it_reads():
    found = {
        f"{path.relative_to(PACKAGE)}:{line}": what
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in dangers(path.read_text(encoding="utf-8"))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "f(trust_remote_code=True)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_the_guard_sees_each(source):
    assert dangers(source)


def test_the_guard_lets_the_plain_forms_be():
    assert not dangers("import re\nre.compile('x')\nmodel.eval()\nyaml.safe_load('x')\nf(trust_remote_code=flag)")
