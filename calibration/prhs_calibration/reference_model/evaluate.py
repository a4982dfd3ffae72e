"""Recall of a planted fact by prompt length, greedy and dense, on held-out text."""

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from ..corpus import built_in_text
from .recall import DIGITS, draw_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTHS = (256, 512, 1024, 2048)


@torch.no_grad()
def recall_by_length(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    lengths: tuple[int, ...] = LENGTHS,
    count: int = 100,
    seed: int = 0,
) -> dict[int, float]:
    """Share of `count` prompts per length (tokens, answer included) whose whole number is answered right.

    One forward per prompt: every answer token is the argmax given those before it exactly when greedy
    decoding writes the answer, so decoding step by step would tell the same.
    """
    shares = {}
    for length in lengths:
        right = 0
        for index in range(count):
            ids = recall_item(tokenizer, length, Random(f"{seed}/{length}/{index}"))
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            guesses = logits[-DIGITS - 1 : -1].argmax(-1).tolist()
            right += guesses == ids[-DIGITS:]
        shares[length] = right / count
    return shares


def recall_item(tokenizer: "PreTrainedTokenizerBase", length: int, rng: Random) -> list[int]:
    """Token ids of exactly `length` tokens: held-out text with 1 to 6 facts in it, one asked for at the end.

    The fact asked for stands anywhere before the question. Any sentence form may be drawn.
    """
    facts = draw_facts(rng, rng.randint(1, min(6, length // 64)))
    ending = tokenizer(f"\n{facts[0].question}{facts[0].answer}", add_special_tokens=False).input_ids
    planted = [tokenizer(f"\n{fact.sentence}", add_special_tokens=False).input_ids for fact in facts]
    room = length - 1 - len(ending) - sum(map(len, planted))
    text = built_in_text()
    start = rng.randrange(len(text) - 8 * length)
    lines = text[start : start + 8 * length].split("\n")[1:]
    body = [tokenizer("\n" + line, add_special_tokens=False).input_ids for line in lines]
    while sum(map(len, body)) > room:
        body.pop()
    cut = [(rng.randint(0, len(body)), ids) for ids in planted]
    rows = []
    for index in range(len(body) + 1):
        rows += [token for at, ids in cut if at == index for token in ids]
        rows += body[index] if index < len(body) else []
    filler = tokenizer(text[: 4 * length], add_special_tokens=False, verbose=False).input_ids
    rows = filler[: length - 1 - len(ending) - len(rows)] + rows
    return [tokenizer.bos_token_id, *rows, *ending]


def evaluate_checkpoint(folder: Path, *, count: int = 100, device: str = "cpu") -> dict[str, Any]:
    """Recall table of a saved checkpoint in fp32 (weights rounded to bf16 as stored)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model.to(device).eval()  # type: ignore[arg-type]
    shares = recall_by_length(model, tokenizer, count=count)
    return {"prompts_per_length": count, "recall": {str(length): share for length, share in shares.items()}}


def main() -> None:
    """Print the table of the checkpoint in a folder (default: the embedded one)."""
    import argparse

    from . import reference_path

    parser = argparse.ArgumentParser(prog="python -m prhs_calibration.reference_model.evaluate")
    parser.add_argument("folder", type=Path, nargs="?", default=reference_path())
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    table = evaluate_checkpoint(options.folder, count=options.count, device=options.device)
    print(f"length  recall (of {table['prompts_per_length']} prompts)")
    for length, share in table["recall"].items():
        print(f"{length:>6}  {share:.3f}")


if __name__ == "__main__":
    main()
