"""The work that both sides do: a seeded random model, an initial adapter, tokenised rows, their order, their hashes.

    FOLDER/base/         Hugging Face folder, random Llama, with the tokenizer and its chat template
    FOLDER/adapter/      the initial LoRA weights, PEFT format
    FOLDER/recipe.yaml   Fitout's recipe
    FOLDER/prepared/     a run directory holding only the prepared data
    FOLDER/steps.jsonl   for each step its rows, each {ids, mask}: the peer's data, read back from the prepared store
    FOLDER/work.json     sizes and hashes

Run as `python -m benchmarks.work FOLDER SHAPE PRECISION STEPS METHOD DATA RANK LENGTH`, a process of its own, so that
making the work leaves no trace in the memory that is measured. RANK is LoRA's, LENGTH the most tokens of a sample (of
`blocks`: of each).
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"
TOKENIZER = SHARED / "tokenizers" / "minimind"
SHELL = Path(__file__).parents[1] / "fitout" / "demo" / "shell"  # its tokenizer, where `shared` is not there
ALPHA, SEED = 32, 0
LR = {"lora": 2e-4, "full": 2e-5}
PROMPT, ANSWER, ANSWERS = 384, 128, 8  # tokens, tokens, answers to one prompt: the rows of `shared`
BATCH = {"alpaca": 16, "gsm8k": 16, "shared": 8, "pairs": 16, "dpo": 8, "lengths": 64, "words": 16}  # examples a step
STEP = {"blocks": 4096}  # tokens a step, at least one block
TEXTS = ("blocks", "words")
SHAPES: dict[str, dict[str, Any]] = {
    "30m": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 8192,
    },
    "135m": {  # SmolLM2-135M
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    # the shapes of Qwen2.5-0.5B and 1.5B and of Llama-3.1-8B, for a GPU; `tiny` shows that the same commands run
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192,
    },
}  # fmt: skip
OF_A_GPU = ("0.5b", "1.5b", "8b")  # saved in bf16, as such models come; trained as long runs are (train.compile)

Row = tuple[tuple[int, ...], tuple[bool, ...]]  # ids, and for each whether it is trained


def hash_step(rows: Iterable[Row]) -> str:
    """A hash of the ids and masks of one step, whatever order and padding they were computed in."""
    digest = hashlib.sha256()
    for ids, mask in sorted(rows):
        digest.update(json.dumps([list(ids), [int(on) for on in mask]]).encode())
    return digest.hexdigest()[:16]


def make(folder: Path, shape: str, precision: str, steps: int, method: str, data: str, rank: int, length: int) -> None:
    base = _make_base(folder / "base", shape, length)
    if method == "lora":
        _make_adapter(folder / "base", folder / "adapter", rank)
    batch = max(1, STEP[data] // length) if data in STEP else BATCH[data]
    recipe = _make_recipe(folder, precision, steps, method, data, rank, length, batch, shape in OF_A_GPU)
    rows = _prepare(folder, recipe, steps)
    facts = {
        "shape": {**SHAPES[shape], "parameters": base},
        "precision": precision,
        "method": method,
        "data": data,
        "batch": batch,
        "rank": rank,
        "max_length": length,
        "lr": LR[method],
        "weights_sha256": _sha256(folder / "base" / "model.safetensors"),
        "adapter_sha256": _sha256(folder / "adapter" / "adapter_model.safetensors") if method == "lora" else None,
        "rows_sha256": _sha256(folder / "steps.jsonl"),
        "steps": [
            {
                "hash": hash_step(step),
                "rows": len(step),
                "tokens": sum(len(ids) for ids, _ in step),
                "supervised": sum(sum(mask) for _, mask in step),
            }
            for step in rows
        ],
    }
    (folder / "work.json").write_text(json.dumps(facts))


def _make_base(folder: Path, shape: str, length: int) -> int:
    """Random weights; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"tie_word_embeddings": True, **SHAPES[shape]}, max_position_embeddings=max(2048, length), bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    if shape in OF_A_GPU:
        torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() and shape in OF_A_GPU else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer = TOKENIZER if TOKENIZER.exists() else SHELL
    for file in [*tokenizer.glob("token*.json"), *tokenizer.glob("*.jinja")]:
        shutil.copy(file, folder)
    return sum(p.numel() for p in model.parameters())


def _make_adapter(base: Path, folder: Path, rank: int) -> None:
    import torch

    from fitout.model.load import load_base
    from fitout.model.methods import LoraSettings, create

    model = load_base(str(base))
    method = create(LoraSettings(rank=rank, alpha=ALPHA, dropout=0.0, targets="all-linear"))
    torch.manual_seed(SEED)
    method.apply(model)
    folder.mkdir()
    method.save(model, folder, base=str(base))


def _make_recipe(
    folder: Path, precision: str, steps: int, method: str, data: str, rank: int, length: int, batch: int, compiled: bool
) -> Path:
    """Data preparation is done once, before the clock; the prepared data are found by their fingerprint."""
    import yaml

    recipe = {
        "name": "benchmark",
        "model": {"base": str(folder / "base")},
        "data": {
            "sources": [_source(data, folder)],
            "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
            "max_length": length,
        },
        "method": {"kind": "full"},
        "objective": {"kind": "pretrain" if data in TEXTS else "dpo" if data == "dpo" else "sft"},
        "train": {
            "max_steps": steps, "lr": LR[method], "schedule": "constant", "warmup": 0, "batch_size": batch,
            "clip": 1.0, "precision": precision, "seed": SEED, "save_every": 1_000_000, "listeners": [],
            "compile": compiled,
        },
    }  # fmt: skip
    if method == "lora":
        recipe["model"]["adapter"] = str(folder / "adapter")
        recipe["method"] = {"kind": "lora", "rank": rank, "alpha": ALPHA, "dropout": 0.0, "targets": "all-linear"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _source(data: str, folder: Path) -> dict[str, Any]:
    """Where the rows of a data set come from; those that are made of others are written into `folder`."""
    if data == "alpaca":
        return {"path": str(SHARED / "llamafactory" / "alpaca_en_demo.json"), "format": "alpaca"}
    if data == "gsm8k":
        columns = {"prompt": "question", "completion": "answer"}
        path = str(SHARED / "gsm8k" / "train.jsonl")
        return {"path": path, "format": "prompt_completion", "columns": columns, "limit": 1000}
    if data == "blocks":
        return {"path": str(SHARED / "text" / "Cbronte_Jane_1847.txt"), "format": "text"}
    if data == "words":
        (folder / "words.txt").write_text(" ".join(_words(2_000_000)))
        return {"path": str(folder / "words.txt"), "format": "text"}
    if data == "dpo":
        return {"path": _write(folder, ("prompt", "chosen", "rejected"), _questions()), "format": "preference"}
    made = {"lengths": _alpaca_lengths, "pairs": _pairs, "shared": lambda: _shared_prompts(folder / "base")}
    return {"path": _write(folder, ("prompt", "completion"), made[data]()), "format": "prompt_completion"}


def _write(folder: Path, keys: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return str(path)


def _words(count: int) -> list[str]:
    """Words that nobody needs to have: for where `shared` is not."""
    rng = random.Random(SEED)
    known = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    return rng.choices(known, k=count)


def _alpaca_lengths(count: int = 4000) -> Iterable[tuple[str, str]]:
    """Prompts and answers whose lengths spread about as those of Alpaca-form rows do: log-normal, 120 words in the
    middle, 500 at most, a third of them asked."""
    rng, words = random.Random(SEED), _words(50_000)
    for _ in range(count):
        size = min(500, max(12, round(rng.lognormvariate(4.6, 0.7))))
        at = rng.randrange(len(words) - size)
        cut = at + max(4, size // 3)
        yield " ".join(words[at:cut]), " ".join(words[cut : at + size])


def peak_mb() -> float:
    """This process's peak so far: what was allocated on a GPU, else what was resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _questions() -> Iterable[tuple[str, str, str]]:
    """Preference pairs with one question: it, the chosen and the rejected answer."""
    for row in json.loads((SHARED / "llamafactory" / "dpo_en_demo.json").read_text()):
        if len(row["conversations"]) == 1:
            yield row["conversations"][0]["value"], row["chosen"]["value"], row["rejected"]["value"]


def _pairs() -> Iterable[tuple[str, str]]:
    """Both answers of preference pairs, each as a sample."""
    for question, *answers in _questions():
        for answer in answers:
            yield question, answer


def _shared_prompts(base: Path) -> Iterable[tuple[str, str]]:
    """Eight answers to each prompt: consecutive pieces of a novel, cut to PROMPT and ANSWER tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer((SHARED / "text" / "Dickens_Expectations_1861.txt").read_text()[:400_000])["input_ids"]
    piece = PROMPT + ANSWERS * ANSWER
    for start in range(0, len(ids) - piece, piece):
        cuts = [start + PROMPT + ANSWER * n for n in range(ANSWERS + 1)]
        for a, b in zip(cuts, cuts[1:], strict=False):
            yield tokenizer.decode(ids[start : cuts[0]]), tokenizer.decode(ids[a:b])


def _prepare(folder: Path, recipe: Path, steps: int) -> list[list[Row]]:
    """Fitout's own preparation, then the rows of each step read back from its store for the peer."""
    import yaml

    from fitout import config, verbs
    from fitout.data.batches import Batches
    from fitout.data.store import Part

    run = verbs.prepare(config.load(recipe), out=folder / "prepared")
    part = Part(run.data / "train.arrow")
    batches = Batches(part, batch_size=yaml.safe_load(recipe.read_text())["train"]["batch_size"], seed=SEED)
    rows = []
    with open(folder / "steps.jsonl", "w", encoding="utf-8") as file:
        for step in range(steps):
            numbers = batches.rows(step)
            masks = [[False, *(bool(on) for on in part.train_on(row)[1:])] for row in numbers]  # nothing before a first
            ids = [tuple(part.ids(row).tolist()) for row in numbers]
            rows.append(list(zip(ids, map(tuple, masks), strict=True)))
            file.write(json.dumps([{"ids": list(i), "mask": [int(on) for on in m]} for i, m in rows[-1]]) + "\n")
    return rows


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    _, folder, shape, precision, steps, method, data, rank, length = sys.argv
    make(Path(folder), shape, precision, int(steps), method, data, int(rank), int(length))
