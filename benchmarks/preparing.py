"""From a file of instructions to token ids and masks: Fitout, TRL, LLaMA-Factory and the bare tokenizer in turn.

    python -m benchmarks.preparing --out benchmarks/results/preparing.json [--llama-factory PYTHON] [--rows 1000 ...]

Each run is a process of its own over the same JSONL file (Alpaca form, about 0.9 kB a row, no two rows near) with the
same tokenizer and template; nothing is cached. This process imports no library.

    fitout plain   what the peers do too: template, masks, ids, on disk (no rule for cleaning, no duplicates looked for)
    fitout         as `fitout data prepare` does it: cleaning, duplicates, split, leakage certificate, report, page
    trl            SFTTrainer's own preparation of a prompt/completion set, packed (`bfd`), two processes
    llama-factory  its `get_dataset`, two processes
    tokenizer      encode_batch of the `tokenizers` library over the same rendered texts, nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .against_trl import child, machine
from .work import SHARED, TOKENIZER

PEERS_UP_TO = 100_000  # rows; beyond, only ours
SIDES = ("fitout plain", "fitout", "trl", "llama-factory", "tokenizer")
MAX_LENGTH = 1024


def main() -> None:
    if sys.argv[1:2] == ["side"]:
        _side(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=2, help="of up to 10,000 rows; of more one")
    parser.add_argument("--llama-factory", metavar="PYTHON")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    points = json.loads(asked.out.read_text())["points"] if asked.out.exists() else {}
    for rows in asked.rows:
        with tempfile.TemporaryDirectory(prefix="fitout-benchmark-") as name:
            folder = Path(name)
            _make(folder, rows)
            runs = points.setdefault(str(rows), {})
            for number in range(asked.rounds if rows <= 10_000 else 1):
                for side in asked.sides if number % 2 == 0 else asked.sides[::-1]:
                    peer = side in ("trl", "llama-factory")
                    if (peer and rows > PEERS_UP_TO) or (side == "llama-factory" and not asked.llama_factory):
                        continue
                    python = asked.llama_factory if side == "llama-factory" else sys.executable
                    runs.setdefault(side, []).append(_measure(folder, side, python))
                    print(rows, side, runs[side][-1], flush=True)
        asked.out.write_text(
            json.dumps({"kind": "preparing", "quick": False, "machine": machine(), "points": points}, indent=1) + "\n"
        )


def _make(folder: Path, count: int) -> None:
    """Rows of words of novels, in runs of three to seven from anywhere: no two rows are near each other."""
    words = "".join(path.read_text(errors="ignore") for path in sorted((SHARED / "text").glob("*_1*.txt"))).split()
    rng = random.Random(0)

    def piece(low: int, high: int) -> str:
        size, out = rng.randint(low, high), []
        while len(out) < size:
            at = rng.randrange(len(words) - 8)
            out += words[at : at + rng.randint(3, 7)]
        return " ".join(out[:size])

    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"instruction": piece(10, 60), "input": "", "output": piece(30, 200)}) + "\n")
    (folder / "base").mkdir()
    model = SHARED.parent / "models" / "stories260K"
    for path in [*model.glob("*.json"), *model.glob("*.safetensors")]:
        shutil.copy(path, folder / "base")
    for path in TOKENIZER.glob("*.json"):
        shutil.copy(path, folder / "base")


def _measure(folder: Path, side: str, python: str) -> dict[str, Any]:
    out = folder / "result.json"
    began = time.time()
    child("preparing", "side", side, folder, out, python=python)
    return {**json.loads(out.read_text()), "process_s": round(time.time() - began, 2)}


# one side, in its own process


def _side(side: str, folder: Path, out: Path) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", DISABLE_VERSION_CHECK="1")
    peak = _watched()
    work = {"trl": _trl, "llama-factory": _llama_factory, "tokenizer": _tokenizer}.get(side)
    told = work(folder) if work else _fitout(folder, plain=side == "fitout plain")
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    told["peak_memory_mb"] = max(own.ru_maxrss >> 10, peak[0] >> 20)
    told["cpu_s"] = round(own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, 1)
    out.write_text(json.dumps(told))


def _watched() -> list[int]:
    """[the largest sum of bytes that this process and those it started held at once], looked at all the time; memory
    that several share counts once (PSS)."""
    peak = [0]

    def held(process: Path) -> int:
        with suppress(OSError):  # it has just ended
            children = {one for task in (process / "task").iterdir() for one in (task / "children").read_text().split()}
            lines = (process / "smaps_rollup").read_text().splitlines()
            own = next((line for line in lines if line.startswith("Pss:")), "Pss: 0 kB")
            return int(own.split()[1]) * 1024 + sum(held(Path("/proc") / child) for child in children)
        return 0

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], held(Path("/proc") / str(os.getpid())))
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    return peak


def _timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), round(time.perf_counter() - began, 2)


def _fitout(folder: Path, *, plain: bool) -> dict[str, Any]:
    from fitout import config, verbs
    from fitout.chat.sandbox import renderer
    from fitout.files import read_json

    rules = ("end_markers", "control_characters", "mojibake", "unicode", "html", "refusals", "copied", "language")
    data: dict[str, Any] = {
        "sources": [{"path": str(folder / "rows.jsonl"), "format": "alpaca"}],
        "max_length": MAX_LENGTH,
        "too_long": "truncate",
    }
    if plain:
        data |= {"clean": {**dict.fromkeys(rules, "off"), "personal": "off"}, "deduplicate": False}
        data["split"] = {"train": 1.0, "validation": 0.0, "test": 0.0}
    recipe = config.build({"name": "rows", "model": {"base": str(folder / "base")}, "data": data})
    run, seconds = _timed(lambda: verbs.prepare(recipe, out=folder / "run"))
    details = read_json(run.data / "details.json")
    tokens = sum(part["tokens"] for part in read_json(run.data_report)["parts"].values())
    shutil.rmtree(run.path)
    renderer().stop()  # so that its time is counted
    return {"seconds": seconds, "tokens": tokens, "stages": details["seconds"]}


def _trl(folder: Path) -> dict[str, Any]:
    from datasets import disable_caching, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def prepared() -> Any:
        rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=folder / "cache")
        talks = rows.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            },
            remove_columns=rows.column_names,
            num_proc=2,
        )
        arguments = SFTConfig(
            output_dir=str(folder / "peer"), use_cpu=True, bf16=False, report_to="none", max_length=MAX_LENGTH,
            packing=True, dataset_num_proc=2,
        )  # fmt: skip
        return SFTTrainer(model=model, args=arguments, train_dataset=talks, processing_class=tokenizer)

    trainer, seconds = _timed(prepared)
    return {"seconds": seconds, "tokens": sum(len(row) for row in trainer.train_dataset["input_ids"])}


def _llama_factory(folder: Path) -> dict[str, Any]:
    from .side_llama_factory import stand_in_for_sound

    stand_in_for_sound()
    from datasets import disable_caching
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    disable_caching()
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    model, data, training, *_ = get_train_args(
        {
            "stage": "sft", "do_train": True, "model_name_or_path": str(folder / "base"), "template": "qwen",
            "finetuning_type": "lora", "dataset": "rows", "dataset_dir": str(folder), "cutoff_len": MAX_LENGTH,
            "output_dir": str(folder / "peer"), "preprocessing_num_workers": 2, "overwrite_cache": True,
            "packing": True, "report_to": "none", "cache_dir": str(folder / "cache"),
        }
    )  # fmt: skip
    module = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    made, seconds = _timed(lambda: get_dataset(template, model, data, training, stage="sft", **module))
    return {"seconds": seconds, "tokens": sum(len(row) for row in made["train_dataset"]["input_ids"])}


def _tokenizer(folder: Path) -> dict[str, Any]:
    from fitout.chat.render import open_chat
    from fitout.chat.types import Conversation, Message, Origin

    chat = open_chat(str(folder / "base"))
    seconds, tokens, batch = 0.0, 0, []

    def encode() -> None:
        nonlocal seconds, tokens
        texts = [one.text for group in chat.strings(batch) for one in group]
        began = time.perf_counter()
        encoded = chat.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds += time.perf_counter() - began
        tokens += sum(len(one.ids) for one in encoded)
        batch.clear()

    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            said = Message("user", row["instruction"]), Message("assistant", row["output"])
            batch.append(Conversation(said, Origin("rows.jsonl", number), (), {}))
            if len(batch) == 1000:
                encode()
    if batch:
        encode()
    return {"seconds": round(seconds, 2), "tokens": tokens}


if __name__ == "__main__":
    main()
