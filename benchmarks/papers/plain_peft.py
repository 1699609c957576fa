"""Score an exported adapter with transformers and PEFT alone: LoRAbbit is neither needed nor imported.

    python -I benchmarks/papers/plain_peft.py BASE TOKENIZER ADAPTER ROWS

BASE is a model and TOKENIZER where its tokenizer is (folders or hub names), ADAPTER an exported folder, ROWS a file
`{"labels", "max_length", "rows": [{"text", "label"}]}` with class indices. Prints the accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 64


def accuracy(base: str, tokenizer_of: str, adapter: str, rows: Path) -> float:
    """Share of right answers."""
    given = json.loads(rows.read_text(encoding="utf-8"))
    known, length = given["rows"], given["max_length"]
    labels = torch.tensor([row["label"] for row in known])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=given["labels"])
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    right = 0
    with torch.inference_mode():
        for first in range(0, len(known), BATCH):
            texts = [row["text"] for row in known[first : first + BATCH]]
            batch = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
            right += int((model(**batch).logits.argmax(-1) == labels[first : first + BATCH]).sum())
    return right / len(known)


if __name__ == "__main__":
    found = accuracy(*sys.argv[1:4], Path(sys.argv[4]))
    if any(name.split(".")[0].startswith("lorabbit") for name in sys.modules):
        sys.exit("LoRAbbit was imported: this proves nothing")
    print(f"{found:.6f}")
