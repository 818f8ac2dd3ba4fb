"""The tokenizer's files of the local folder that a model of transformers was loaded from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json", "processor_config.json", "feature_extractor_config.json",
)  # fmt: skip
"""Files of tokenizers and processors, as transformers names them."""


def copy_tokenizer(config: Any, folder: Path) -> None:
    """Copy the files of a model's tokenizer into a folder; no file is overwritten.

    Args:
        config: of the model; says where the model was loaded from.
        folder: exists.
    """
    name = str(getattr(config, "_name_or_path", "") or "")
    source = Path(name)
    if not name or not source.is_dir() or source.resolve() == folder.resolve():
        return
    for file in OF_TOKENIZERS:
        if (source / file).is_file() and not (folder / file).exists():
            shutil.copyfile(source / file, folder / file)
