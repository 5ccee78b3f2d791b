"""A small engine to serve: a random Llama over a byte-level tokenizer made on the spot."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fitout.chat.render import open_chat
    from fitout.engine import Engine

    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["a world"], trainers.BpeTrainer(vocab_size=258, initial_alphabet=letters, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    chat = open_chat(folder)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    return Engine(LlamaForCausalLM(config).eval(), chat)
