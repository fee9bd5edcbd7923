"""Shows samples as the model will see them."""

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from align.data.packing import IGNORED


def show_examples(rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Prints samples as the model will see them: what is trained on in green, special tokens reversed."""
    special = set(tokenizer.all_special_ids)
    for sample in rows.take(number):
        text = []
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
            style = ("7;" if token in special else "") + ("32" if label != IGNORED else "90")
            text.append(f"\033[{style}m{tokenizer.decode([token])}\033[0m")
        print("".join(text), end="\n\n")
