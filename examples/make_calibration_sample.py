"""Make the calibration sample that the package ships: ``python examples/make_calibration_sample.py -o sample.jsonl``.

The text is the running Python's own documentation and code, none of it from the modules and chapters that
``heldout.txt`` is made of, texts in Chinese, Japanese and Korean of its test suite, and a few conversations of ours.
Another Python release gives another sample.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tiny.corpus import build_corpus

T = TypeVar("T")

BUDGETS = {"documentation": 130_000, "language reference": 45_000, "source": 40_000, "conversations": 30_000}
"""Bytes of text of each kind."""
LANGUAGES = ("gb18030", "euc_jp", "euc_kr", "big5")

OURS: tuple[tuple[str, str], ...] = (
    (
        "Explique en quelques phrases ce qu'est un dictionnaire en Python.",
        "Un dictionnaire associe des clés à des valeurs. On y accède par la clé : `prix['pomme']`. Les clés doivent "
        "être hachables, par exemple des chaînes ou des nombres, et l'ordre d'insertion est conservé.",
    ),
    (
        "Wie lese ich eine Textdatei Zeile für Zeile?",
        "Mit einer Schleife über das Dateiobjekt:\n\n```python\nwith open('daten.txt', encoding='utf-8') as datei:\n"
        "    for zeile in datei:\n        print(zeile.rstrip())\n```\n\nSo liegt nie die ganze Datei im Speicher.",
    ),
    (
        "¿Qué hora es en Tokio si en Madrid son las nueve de la mañana en invierno?",
        "En invierno Madrid está en UTC+1 y Tokio en UTC+9: la diferencia es de ocho horas. Allí son las cinco de la "
        "tarde.",
    ),
    (
        "用一句话解释什么是二分查找。",
        "二分查找在一个已排序的序列中,每次比较中间的元素,把搜索范围缩小一半,因此只需要大约 log2(n) 次比较。",
    ),
    (
        "Переведи на английский: «Утром шёл дождь, но к обеду выглянуло солнце.»",
        "In the morning it rained, but by noon the sun came out.",
    ),
    (
        "Pythonでリストを逆順にするには?",
        "`numbers[::-1]` は逆順の新しいリストを返し、`numbers.reverse()` はその場で並べ替えます。",
    ),
    (
        "A train leaves at 14:35 and arrives at 17:10. How long is the journey? Think step by step.",
        "From 14:35 to 17:00 is 2 hours and 25 minutes. From 17:00 to 17:10 is 10 minutes more. Together: 2 hours and "
        "35 minutes.",
    ),
    (
        "Write a SQL query that counts the orders of each customer, most first.",
        "```sql\nSELECT customer_id, COUNT(*) AS orders\nFROM orders\nGROUP BY customer_id\nORDER BY orders DESC;\n```",
    ),
    (
        "Give me the three states of water as JSON.",
        '```json\n{"states": [{"name": "ice", "celsius_below": 0}, {"name": "liquid"}, {"name": "steam", '
        '"celsius_above": 100}]}\n```',
    ),
)


def records(seed: int) -> Iterator[dict[str, object]]:
    """The sample's records, shuffled."""
    corpus = build_corpus(seed)
    found: list[dict[str, object]] = []
    for kind in ("documentation", "language reference", "source"):
        found += [{"text": text} for text in _within(_shuffled(corpus.training[kind], seed), BUDGETS[kind])]
    explained = [
        (f"What does `{entry.name}` do?", entry.documentation) for entry in _shuffled(corpus.entries, seed + 1)
    ]
    limit = BUDGETS["conversations"]
    for question, answer in explained:
        limit -= len(question.encode()) + len(answer.encode())
        if limit < 0:
            break
        found.append(_conversation(question, answer))
    found += [_conversation(question, answer) for question, answer in OURS]
    folder = Path(sysconfig.get_paths()["stdlib"]) / "test" / "cjkencodings"
    found += [{"text": (folder / f"{name}-utf8.txt").read_text(encoding="utf-8")} for name in LANGUAGES]
    yield from _shuffled(found, seed + 2)


def _conversation(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _shuffled(items: Iterable[T], seed: int) -> list[T]:
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _within(texts: Iterable[str], limit: int) -> Iterator[str]:
    largest = limit // 8
    for text in texts:
        size = len(text.encode())
        if size > largest:  # no text of a kind outweighs the others
            continue
        limit -= size
        if limit < 0:
            return
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    with arguments.output.open("w", encoding="utf-8") as file:
        for record in records(arguments.seed):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
