"""Trimming the vocabulary: byte-level BPE tokens that the data never use go, with their embedding and head rows.

Nothing becomes unwritable: all single bytes stay, so other text only falls apart into smaller pieces. The kept set is closed
under merges (both parts of every kept token are kept), therefore every text whose tokens are kept is tokenised as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from slimlmm.errors import UserError


def closed_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], *, at_least: int = 0) -> list[int]:
    """Return sorted ids to keep: single bytes, added tokens, tokens of `texts`, and all that these are merged from.

    When fewer than `at_least`, the earliest merges (the commonest tokens) fill up.
    """
    spec = _spec(tokenizer)
    vocabulary, merges = spec["model"]["vocab"], [_pair(merge) for merge in spec["model"]["merges"]]
    parents: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        parents.setdefault(left + right, []).append((left, right))
    by_id = {index: token for token, index in vocabulary.items()}
    used: set[int] = set()
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        used.update(ids)
    kept = {token for token in vocabulary if token not in parents}
    pending = [by_id[index] for index in used if index in by_id]
    while pending:
        token = pending.pop()
        if token not in kept:
            kept.add(token)
            pending += [part for pair in parents[token] for part in pair]
    for left, right in merges:
        if len(kept) >= at_least:
            break
        if left in kept and right in kept:
            kept.add(left + right)
    added = {token["id"] for token in spec["added_tokens"]}
    return sorted({vocabulary[token] for token in kept} | added)


def subset_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: list[int]) -> PreTrainedTokenizerFast:
    """Return the tokenizer over the kept ids only, renumbered in their old order."""
    spec = _spec(tokenizer)
    new = {old: index for index, old in enumerate(kept)}
    vocabulary = {token: new[old] for token, old in spec["model"]["vocab"].items() if old in new}
    spec["model"]["vocab"] = vocabulary
    spec["model"]["merges"] = [
        merge
        for merge in spec["model"]["merges"]
        if all(part in vocabulary for part in (*_pair(merge), "".join(_pair(merge))))
    ]
    for token in spec["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber_post_processor(spec.get("post_processor"), new)
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key not in ("tokenizer_object", "vocab", "merges")}
    settings |= {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for key in ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_decoder", "gguf_file", "name_or_path"):
        settings.pop(key, None)
    core = Tokenizer.from_str(json.dumps(spec))
    trimmed = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    trimmed.chat_template = tokenizer.chat_template
    trimmed.padding_side = tokenizer.padding_side
    return trimmed


def _spec(tokenizer: PreTrainedTokenizerFast) -> dict[str, dict]:  # type: ignore[type-arg]
    """Return the tokenizer's JSON; only byte-level BPE can be trimmed."""
    spec: dict[str, dict] = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[type-arg]
    kind, levels = spec["model"].get("type"), json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    if kind != "BPE" or "ByteLevel" not in levels:
        raise UserError(f"vocab: only byte-level BPE tokenizers can be trimmed, this one is {kind}; leave vocab out of the recipe.")
    return spec


def _pair(merge: list[str] | str) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumber_post_processor(node: object, new: dict[int, int]) -> None:
    """Rewrite the ids in a template post-processor, wherever they stand."""
    if isinstance(node, list):
        for item in node:
            _renumber_post_processor(item, new)
    elif isinstance(node, dict):
        for special in (node.get("special_tokens") or {}).values():
            special["ids"] = [new[old] for old in special["ids"]]
        for item in node.get("processors", []):
            _renumber_post_processor(item, new)
