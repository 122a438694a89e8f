"""Conversations, with what `apply_chat_template` of transformers makes of them.

The tests read chat_fixtures and need no transformers. This script wrote it, with
transformers 5.24.0 and tokenizers 0.23. To write it anew, in an environment with these:

    python tests/data/make_chat_fixtures.py

tokenizer.json is a small BPE of bytes that was trained on these conversations.
cases.json has a list of cases: a template by its shape, the messages and tools, and

    text    of the conversation; prompt: with add_generation_prompt
    ids     of the text
    mask    of return_assistant_tokens_mask, where the template has generation blocks
"""

import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).with_name("chat_fixtures")

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
By default.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML_MARKED = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set state = namespace(answers=0) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool>' ~ message.content ~ '</tool><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set state.answers = state.answers + 1 %}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' ~ (call.function | tojson(indent=2)) ~ '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.name + ': ' if message.name is defined }}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}"
    "{% endif %}{% endfor %}"
)

SHAPES = {
    "chatml": CHATML,
    "chatml_marked": CHATML_MARKED,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}

TWO_TURNS = [
    {"role": "user", "content": "What is the sum of 2 and 3?"},
    {"role": "assistant", "content": "The sum is 5."},
    {"role": "user", "content": "  And in Greek: \u03b1\u03b2\u03b3?\n"},
    {"role": "assistant", "content": "\u03c0\u03ad\u03bd\u03c4\u03b5 \U0001f600\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
CALLS = [
    {"role": "user", "content": "Weather in <Rome> & 'Bern'?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"place": "Rome \u2602"}}}
        ],
    },
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "It rains."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

CASES = [
    *((shape, TWO_TURNS, None) for shape in SHAPES),
    ("chatml", SYSTEM, None),
    ("chatml_marked", SYSTEM, None),
    ("llama3", SYSTEM, None),
    ("chatml_marked", CALLS, TOOLS),
]

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
]


def train_tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.dumps(each, ensure_ascii=False) for each in (SYSTEM, CALLS, TOOLS)]
    made.train_from_iterator([*texts, *SHAPES.values()], trainer)
    begin = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return made


def main() -> None:
    from transformers import AutoTokenizer

    FOLDER.mkdir(exist_ok=True)
    train_tokenizer().save(str(FOLDER / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": None,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    found = []
    for shape, messages, tools in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                Path(folder, name).write_bytes((FOLDER / name).read_bytes())
            Path(folder, "chat_template.jinja").write_text(SHAPES[shape])
            tokenizer = AutoTokenizer.from_pretrained(folder)
        given = dict(conversation=messages, tools=tools)
        case = dict(shape=shape, messages=messages, tools=tools)
        case["text"] = tokenizer.apply_chat_template(**given, tokenize=False)
        case["prompt"] = tokenizer.apply_chat_template(
            **given, tokenize=False, add_generation_prompt=True
        )
        case["ids"] = tokenizer.apply_chat_template(**given)["input_ids"]
        if "generation %}" in SHAPES[shape]:
            case["mask"] = tokenizer.apply_chat_template(
                **given, return_assistant_tokens_mask=True
            )["assistant_masks"]
        found.append(case)
    lines = ",\n".join(json.dumps(case) for case in found)
    (FOLDER / "cases.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
