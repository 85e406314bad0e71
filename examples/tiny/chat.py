"""Conversations about the corpus, in the ChatML form of the Qwen2 models."""

from __future__ import annotations

import random

import jinja2

from tiny.corpus import Entry

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

MAX_ANSWER_CHARACTERS = 700  # longer answers would not fit a training window with their question
QUESTIONS = {
    "module": ("Document {}", "What is the module {}?", "What is {} for?", "Describe the module {}."),
    "class": ("Document {}", "What is {}?", "Describe the class {}.", "What is {} for?"),
    "function": ("Document {}", "What does {} do?", "Explain {}.", "How do I call {}?"),
    "method": ("Document {}", "What does {} do?", "Explain {}.", "How do I call {}?"),
}
SOURCE_QUESTIONS = ("Show the source of {}", "Write the function {}.", "How is {} implemented?")
# Asked about more often than the rest of the library, so seen more often in training.
FAMILIAR_MODULES = frozenset(
    "builtins collections functools itertools json math os os.path pathlib random re shutil subprocess sys time".split()
)
SYSTEM_PROMPTS = ("You are a helpful assistant.",) * 6 + (
    "You answer questions about Python.",
    "Answer with the documentation only.",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me about Python's standard library."),
    ("Hi", "Hello! Ask me about Python's standard library."),
    ("Hello, who are you?", "I am a tiny language model trained on the documentation of Python."),
    ("Who are you?", "I am a tiny language model trained on the documentation of Python."),
    ("What can you do?", "I can quote the documentation of Python's standard library, more or less."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
)
SMALL_TALK_REPEATS = 12


def chat_samples(entries: list[Entry], seed: int) -> list[str]:
    """A conversation for each entry with a short enough answer, several for familiar modules, and some small talk."""
    generator = random.Random(seed)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    exchanges: list[list[tuple[str, str]]] = []
    for entry in entries:
        exchanges += [[exchange] for exchange in _exchanges(entry, generator)]
    exchanges += [[exchange] for exchange in SMALL_TALK for _ in range(SMALL_TALK_REPEATS)]
    generator.shuffle(exchanges)

    conversations = []
    while exchanges:
        turns = exchanges.pop()
        if exchanges and sum(len(text) for turn in turns + exchanges[-1] for text in turn) < 300:
            turns = turns + exchanges.pop()
        messages = [{"role": "system", "content": generator.choice(SYSTEM_PROMPTS)}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append(template.render(messages=messages, add_generation_prompt=False))
    return conversations


def _exchanges(entry: Entry, generator: random.Random) -> list[tuple[str, str]]:
    familiar = entry.module in FAMILIAR_MODULES
    exchanges = []
    answer = f"{entry.name}{entry.signature}\n\n{entry.documentation}" if entry.signature else entry.documentation
    if len(answer) <= MAX_ANSWER_CHARACTERS:
        asked = QUESTIONS[entry.kind] if familiar else (generator.choice(QUESTIONS[entry.kind]),)
        exchanges += [(question.format(entry.name), answer) for question in asked]
    if entry.source and len(entry.source) <= MAX_ANSWER_CHARACTERS and (familiar or generator.random() < 0.1):
        exchanges.append((generator.choice(SOURCE_QUESTIONS).format(entry.name), entry.source))
    return exchanges
