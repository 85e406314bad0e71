"""Train the example checkpoints from the documentation and sources that every Python carries.

The text, the tokenizer, the order of the data and the initial weights are seeded, so that one Python release with one
torch release on one kind of machine reproduces a checkpoint. A model takes ten to fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from pathlib import Path

from tiny.chat import chat_samples
from tiny.corpus import Corpus, build_corpus
from tiny.tokenizer import END_OF_TEXT, token_id, train_tokenizer

FOLDERS = {"dense": "tiny-qwen2", "moe": "tiny-qwen2-moe"}
VOCABULARY_SIZE = 2048
REQUIRED_RATIO = 1 / 3  # of the unigram model's perplexity
EXAMPLE = "example:\n  python examples/train_tiny.py --model dense -o my-checkpoints"


def main(arguments: list[str] | None = None) -> int:
    """Train one model or both and write their folders under ``--output``; returns the process's exit status."""
    options = _parser().parse_args(arguments)
    names = list(FOLDERS) if options.model == "both" else [options.model]

    try:
        for name in names:
            _refuse_existing(options.output / FOLDERS[name])
        print("collecting text from the standard library", flush=True)
        corpus = build_corpus(options.seed)
        corpus.training["conversations"] = chat_samples(corpus.entries, options.seed)
        held_out = "\n\n".join(corpus.held_out) + "\n"
        _write_held_out(options.output, held_out)
    except FileExistsError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    return max(_train_one(name, corpus, held_out, options) for name in names)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another --output.")


def _write_held_out(output: Path, held_out: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "heldout.txt"
    if path.exists() and path.read_text(encoding="utf-8") != held_out:
        raise FileExistsError(
            f"{path} holds other text, taken from another Python or seed; choose another --output so that "
            "the reports of the checkpoints beside it stay true."
        )
    unfinished = output / ".heldout.txt.unfinished"
    unfinished.write_text(held_out, encoding="utf-8")
    unfinished.replace(path)


def _train_one(name: str, corpus: Corpus, held_out: str, options: argparse.Namespace) -> int:
    import torch
    import transformers

    from tiny.evaluation import model_perplexity, unigram_counts, unigram_perplexity
    from tiny.models import RECIPES, round_to_bfloat16
    from tiny.training import train
    from tiny.writing import write_checkpoint

    recipe = RECIPES[name]
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = [text for kind in corpus.training.values() for text in kind]
    tokenizer = train_tokenizer(texts, VOCABULARY_SIZE)
    end = token_id(tokenizer, END_OF_TEXT)
    documents = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    held_out_ids = tokenizer.encode(held_out).ids
    counts = unigram_counts(documents, VOCABULARY_SIZE)
    baseline = unigram_perplexity(counts, held_out_ids)

    model = recipe.build(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{FOLDERS[name]}: {parameters:,} parameters, {sum(counts):,} tokens of text", flush=True)
    started = time.monotonic()
    loss = train(
        model,
        documents,
        steps=options.steps,
        batch_size=options.batch_size,
        peak=recipe.learning_rate,
        seed=options.seed,
    )
    seconds = time.monotonic() - started
    round_to_bfloat16(model)
    perplexity = model_perplexity(model, held_out_ids)
    ratio = perplexity / baseline
    print(f"held-out perplexity {perplexity:.2f}, unigram model {baseline:.2f}, ratio {ratio:.4f}", flush=True)
    if ratio >= REQUIRED_RATIO:
        print(
            f"train_tiny: {FOLDERS[name]} is not written: its ratio {ratio:.3f} is not below {REQUIRED_RATIO:.3f}; "
            "train for more --steps.",
            file=sys.stderr,
        )
        return 1

    report = {
        "held_out_perplexity": round(perplexity, 3),
        "unigram_perplexity": round(baseline, 3),
        "ratio": round(ratio, 5),
        "held_out_sha256": hashlib.sha256(held_out.encode()).hexdigest(),
        "held_out_tokens": len(held_out_ids),
        "parameters": parameters,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "threads": options.threads,
        "final_training_loss": round(loss, 4),
        "training_seconds": round(seconds),
        "training_tokens": sum(counts),
        "training_characters": {kind: sum(map(len, group)) for kind, group in corpus.training.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "unigram_counts": counts,
    }
    folder = options.output / FOLDERS[name]
    write_checkpoint(folder, model, tokenizer, report, recipe.shard_size)
    print(f"wrote {folder}", flush=True)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("dense", "moe", "both"), default="both", help="which to train (both)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder that receives the checkpoint folders")
    parser.add_argument("--steps", type=_positive, default=1500, help="optimizer steps (1500)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="windows of 256 tokens in a step (8)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (1, which repeats exactly)")
    parser.add_argument("--seed", type=int, default=2, help="seed of data and weights (2)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
