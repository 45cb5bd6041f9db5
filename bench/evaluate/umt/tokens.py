"""From texts to token ids, as UMT's public code makes them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import BertTokenizer

from bench.evaluate.journal import EvaluationError
from bench.models.umt_text import TextSize

PAD, CLS, SEP = 0, 101, 102
_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")


def normalised(text: str) -> str:
    """A caption or question as UMT reads it: lower case, no punctuation, - and / as spaces.

    An answer is not normalised.
    """
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).strip()


class Tokenizer(Protocol):
    """Texts to ids, without marks of begin and end."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class Tokens:
    """Texts as ids [B, L], filled up at their ends, and a mask, bool [B, L], False where filled up."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, texts: Sequence[str], most: int) -> Tokens:
        """The tokens of texts, [CLS] before them and, other than BERT's own tokenizer would do, no [SEP] behind.

        Args:
            tokenizer: see `read_tokenizer`.
            texts: at least one.
            most: so many tokens are kept, [CLS] counted; L is at most that.
        """
        rows = [[CLS, *row][:most] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), PAD)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return cls(ids, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))

    def rows(self, which: Sequence[int]) -> Tokens:
        """Some of the texts, as long as the longest of them."""
        ids, mask = self.ids[list(which)], self.mask[list(which)]
        length = int(mask.sum(1).max())
        return Tokens(ids[:, :length], mask[:, :length])

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))


def read_tokenizer(folder: Path, size: TextSize) -> Tokenizer:
    """The uncased WordPiece tokenizer of bert-base-uncased or bert-large-uncased.

    Args:
        folder: with vocab.txt, or as transformers' save_pretrained makes it. Where it has a config.json too, its sizes
            must be those of the text model.
        size: of the text model.

    Raises:
        EvaluationError: it is something else.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"there is no folder {folder}; give bert-base-uncased's or bert-large-uncased's, with vocab.txt or "
            "tokenizer.json"
        )
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        found = {"tokens": len(tokenizer), "[PAD]": tokenizer.pad_token_id, "[CLS]": tokenizer.cls_token_id}
        found |= {"[SEP]": tokenizer.sep_token_id, "cased": tokenizer.tokenize("A") != tokenizer.tokenize("a")}
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    except Exception as error:  # transformers and its tokenizers each have their own
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EvaluationError(f"the tokenizer in {folder} cannot be read: {first}; give bert-base-uncased's") from error
    wanted = {"tokens": size.vocabulary, "[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "cased": False}
    if found != wanted:
        raise EvaluationError(
            f"the tokenizer in {folder} is not UMT's: it has {_told(found, wanted)}; give bert-base-uncased's"
        )
    sizes = {
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.dim,
        "vocab_size": size.vocabulary,
        "fusion_layer": size.fusion,
    }
    stated = {key: config[key] for key in sizes if key in config}
    if stated != {key: sizes[key] for key in stated}:
        raise EvaluationError(
            f"{folder / 'config.json'} is of another text model: it has {_told(stated, sizes)}; UMT-B takes "
            "bert-base-uncased, UMT-L bert-large-uncased"
        )
    return tokenizer


def _told(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value} for {wanted[key]}" for key, value in found.items() if value != wanted[key])
