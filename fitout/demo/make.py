"""`python -m fitout.demo.make`: everything the demo needs that is not in its recipes, made again from its seeds.

data                              the instruction data, the test file and the retention probes
corpus --tokens N --out FILE      pretraining documents as JSON lines {"text": ...}
questions --out FILE              other questions about the held-out half than the test file's, to choose a recipe by
pairs --out FILE                  the same questions with the right answer and a wrong one of their kind
tokenizer --out FOLDER            the tokenizer, with its chat template
base --out FOLDER                 an untrained model of 3.2 million parameters with the tokenizer
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_jsonl
from . import DATA, SHELL, corpus, instructions
from .tokenizer import load_tokenizer, train_tokenizer

CORPUS_SEED = 7
MODEL_SEED = 0
CONTEXT = 1024
TOKENIZER_DOCUMENTS = 20_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fitout.demo.make", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data", help="write the instruction data, the test file and the retention probes")
    data.add_argument("--out", type=Path, default=DATA)
    text = verbs.add_parser("corpus", help="write pretraining documents as JSON lines")
    text.add_argument("--tokens", type=int, default=10_000_000)
    text.add_argument("--seed", type=int, default=CORPUS_SEED)
    text.add_argument("--tokenizer", type=Path, default=SHELL, help="folder of the tokenizer that counts the tokens")
    text.add_argument("--out", type=Path, required=True)
    questions = verbs.add_parser("questions", help="write held-out questions that the test file does not ask")
    questions.add_argument("--out", type=Path, required=True)
    pairs = verbs.add_parser("pairs", help="write the same questions with a right and a wrong answer")
    pairs.add_argument("--out", type=Path, required=True)
    tokenizer = verbs.add_parser("tokenizer", help="train the tokenizer")
    tokenizer.add_argument("--out", type=Path, default=SHELL)
    base = verbs.add_parser("base", help="write the untrained model and its tokenizer")
    base.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)

    if given.verb == "data":
        for name, rows in instructions.write_data(given.out).items():
            print(f"{given.out / name}: {rows} rows")
    elif given.verb == "corpus":
        documents, tokens = write_corpus(given.out, given.tokens, given.tokenizer, given.seed)
        print(f"{given.out}: {documents} documents, {tokens} tokens with their ends")
    elif given.verb == "questions":
        others = [{"messages": item.messages(), **item.about} for item in instructions.other_items()]
        print(f"{given.out}: {write_jsonl(given.out, others)} rows")
    elif given.verb == "pairs":
        print(f"{given.out}: {write_jsonl(given.out, preference_pairs())} rows")
    elif given.verb == "tokenizer":
        print(f"{given.out}: {make_tokenizer(given.out)} entries")
    else:
        print(f"{given.out}: {make_base(given.out)} parameters")
    return 0


def preference_pairs() -> Iterator[dict[str, Any]]:
    """Each other question with its answer, and that of the next one of its kind whose answer is another."""
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for item in instructions.other_items():
        kinds.setdefault((item.about["relation"], item.about["language"]), []).append(item)
    for items in kinds.values():
        for at, item in enumerate(items):
            others = [other.answer for other in items[at:] + items[:at] if other.answer != item.answer]
            if others:
                yield {"prompt": item.question, "chosen": item.answer, "rejected": others[0], **item.about}


def write_corpus(path: Path, tokens: int, tokenizer: Path, seed: int = CORPUS_SEED) -> tuple[int, int]:
    """Writes documents until they hold `tokens` tokens, each with its end; returns documents and tokens."""
    encode = load_tokenizer(tokenizer)
    seen = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal seen
        for document in corpus.documents(seed):
            if seen >= tokens:
                return
            seen += len(encode(document)["input_ids"]) + 1
            yield {"text": document}

    return write_jsonl(path, rows()), seen


def make_tokenizer(folder: Path) -> int:
    """Trains the tokenizer on documents and on the words of the demo's questions; returns its size."""
    questions = (item.question for half in (True, False) for item in instructions.items(0, held_out=half))
    roles = itertools.repeat("User: Assistant: System: Tool:", 100)
    texts = itertools.chain(corpus.documents(CORPUS_SEED, TOKENIZER_DOCUMENTS), questions, roles)
    train_tokenizer(texts, folder, context=CONTEXT)
    return len(load_tokenizer(folder))


def make_base(folder: Path) -> int:
    """Writes a Llama of 3.2 million parameters, drawn from MODEL_SEED, with its tokenizer; returns how many it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = make_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(MODEL_SEED)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    raise SystemExit(main())
