"""A tokenizer of a few words, as a folder has it."""

import json

import tokenizers
from tokenizers import models, pre_tokenizers, processors

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "long": 3, "text": 4, "?": 5}
END = WORDS["</s>"]


def write_tokenizer(folder):
    """One that begins a text with <s>, and would cut it after two tokens."""
    made = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    ends = json.dumps({"eos_token_id": END})
    (folder / "generation_config.json").write_text(ends)
