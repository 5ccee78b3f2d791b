"""The demo's tokenizer: byte-level BPE over the world's text, with a chat template that an adapter alone can learn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

VOCABULARY = 2944
END = "<|endoftext|>"  # ends a document in pretraining, a turn in chat, and pads; id 0

# Words with the space before them, single Chinese characters, single digits, runs of punctuation, line ends, spaces.
# A digit or a Chinese character never takes the space before it, so that it is the same token wherever it stands.
PIECES = (
    r"'(?:s|t|re|ve|m|ll|d)| ?[\p{L}\p{M}&&[^\p{Han}]]+|\p{Han}|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|\s+"
)

# Every role is a plain word that pretraining has seen, and every turn of the assistant ends as a document does. The
# answer begins with the space that begins a word in running text, so the prompt (up to "Assistant:") is a prefix of
# the whole in tokens too, and the first word of an answer is the token the base model knows it by.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = (message['content'] or '') | trim -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}
{%- if content %}{{ ' ' + content }}{% endif -%}
{%- for call in message['tool_calls'] or [] -%}
{{- ' Tool ' + ((call['function'] if 'function' in call else call) | tojson) -}}
{%- endfor -%}
{{- eos_token -}}
{%- elif message['role'] == 'system' -%}
{{- 'System: ' + content + '\\n' -}}
{%- elif message['role'] == 'tool' -%}
{{- 'Tool: ' + content + '\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- 'User: ' + content + '\\n' -}}
{%- else -%}
{{- raise_exception('unknown role: ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocabulary: int = VOCABULARY, context: int = 1024) -> None:
    """Learns the merges from `texts` and writes tokenizer.json and tokenizer_config.json (with the template)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    # The name every release knows; recent ones write a class that older ones cannot find.
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
