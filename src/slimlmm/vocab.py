"""Trimming the vocabulary: tokens of byte-level or byte-fallback BPE that the data never use go, with their weights.

Nothing becomes unwritable: all single characters and bytes stay, so other text only falls apart into smaller pieces. The
kept set is closed under merges (both parts of every kept token are kept). Every merge that the encoding of a
kept text makes is then still there, and no merge comes before another that did not before: kept texts are
tokenised exactly as they were.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slimlmm.anatomy import describe
from slimlmm.errors import UserError
from slimlmm.families import family_of
from slimlmm.surgery import cut
from slimlmm.token_ids import is_id, referenced, renumber

#: settings of a tokenizer that describe its files, not its behaviour
_STALE = (
    "tokenizer_object",
    "tokenizer_file",
    "vocab",
    "merges",
    "vocab_file",
    "merges_file",
    "added_tokens_decoder",
    "gguf_file",
    "name_or_path",
)

#: tokens of the single bytes that a character without a token falls back to
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}

_FAST: Any = PreTrainedTokenizerFast


class KeptWholeError(UserError):
    """A vocabulary that cannot be trimmed, for this `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"unused_tokens: {reason}; take unused_tokens out of drop in the recipe.")
        self.reason = reason


def trim(
    model: PreTrainedModel, processor: Any, keep_texts: Iterable[str], *, at_least: int = 0
) -> tuple[PreTrainedModel, Any]:
    """Return a model and a processor that know only the tokens of `keep_texts`, bytes, and special tokens.

    Give the texts as the model sees them (prompts after the chat template, and the answers). Logits of the
    kept tokens are those of `model`; token ids are renumbered everywhere: weights, configs, generation
    config, tokenizer, processor. `model` and `processor` stay as they are, and are returned where no token goes.
    """
    texts = list(keep_texts)
    tokenizer = tokenizer_of(processor)
    ids = needed(model.config, model.generation_config, processor, texts, at_least=at_least)
    anatomy = describe(model.config)
    size = anatomy.axis("vocab").size
    inside = [token for token in ids if token < size]
    if len(inside) == size and len(ids) == len(tokenizer):
        return model, processor
    student = cut(model, anatomy, "vocab", {"vocab": torch.tensor(inside)})
    trimmed = subset_tokenizer(tokenizer, ids)
    _check_same(tokenizer, trimmed, texts)
    return student, _with_tokenizer(processor, trimmed, ids)


def needed(config: Any, generation: Any, processor: Any, texts: Iterable[str], *, at_least: int = 0) -> list[int]:
    """Return the sorted ids of the tokens that `trim` keeps for these texts, placeholders behind the vocabulary included.

    Raises:
        KeptWholeError: it cannot trim the vocabulary.
    """
    axis = describe(config).axes["vocab"]
    if axis.refusal:
        raise KeptWholeError(axis.refusal)
    group = axis.groups[0]
    size, behind = group.units, max(slot.rest for slot in group.slots)
    kept = set(closed_tokens(tokenizer_of(processor), texts, at_least=at_least))
    data = config.to_dict()
    parts = family_of(config).token_data(data).values()
    kept |= {i for i in referenced(*parts, generation.to_dict()) if i < size}
    kept |= {token for tokens in group.some_of for token in tokens}
    ids = sorted(kept)
    if ids[-1] >= size + behind:
        raise KeptWholeError(f"the tokenizer knows token {ids[-1]}, but the model has only {size + behind} rows")
    placeholders = [token for token in ids if token >= size]
    if placeholders != list(range(size, size + len(placeholders))):
        raise KeptWholeError(
            f"the tokenizer's tokens {placeholders} stand behind the vocabulary of {size}, with gaps that their new numbers "
            "would not have"
        )
    return ids


def refusal(config: Any, generation: Any, processor: Any) -> str:
    """Return why this vocabulary cannot be trimmed, whatever the texts are, "" where nothing speaks against it."""
    try:
        needed(config, generation, processor, ())
    except KeptWholeError as error:
        return error.reason
    return ""


def tokenizer_of(processor: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a processor (or the tokenizer itself), refusing what cannot be trimmed."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise KeptWholeError(f"a fast tokenizer is needed, not {type(tokenizer).__name__}")
    return tokenizer


def closed_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], *, at_least: int = 0) -> list[int]:
    """Return sorted ids to keep: bytes, added tokens, tokens of `texts`, and all these are merged from.

    When fewer than `at_least`, the earliest merges (the commonest tokens) fill up.
    """
    spec = _spec(tokenizer)
    vocabulary, merges = spec["model"]["vocab"], [_pair(merge) for merge in spec["model"]["merges"]]
    parents: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        parents.setdefault(left + right, []).append((left, right))
    by_id = {index: token for token, index in vocabulary.items()}
    kept = {token for token in vocabulary if token not in parents}
    pending = [by_id[index] for index in _used(tokenizer, list(texts)) if index in by_id]
    while pending:
        token = pending.pop()
        if token not in kept:
            kept.add(token)
            pending += [part for pair in parents[token] for part in pair]
    added = {token["id"] for token in spec["added_tokens"]}
    for left, right in merges:
        if len({vocabulary[token] for token in kept} | added) >= at_least:
            break
        if left in kept and right in kept and all({a, b} <= kept for a, b in parents[left + right]):
            kept.add(left + right)
    return sorted({vocabulary[token] for token in kept} | added)


def _used(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> set[int]:
    return (
        {index for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for index in ids} if texts else set()
    )


def subset_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: list[int]) -> PreTrainedTokenizerFast:
    """Return the tokenizer over the kept ids only, renumbered in their old order; all else comes along."""
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
    spec["padding"] = spec["truncation"] = None  # set anew at every call; they hold ids too
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key not in _STALE}
    settings |= {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    # what the source's class has by default, the class of the trimmed one may not, so it is said in its files
    settings |= {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    trimmed: PreTrainedTokenizerFast = _FAST(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **settings)
    trimmed.chat_template = tokenizer.chat_template
    return trimmed


def _spec(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the tokenizer's JSON; only BPE that can fall back to bytes can be trimmed."""
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, levels = spec["model"].get("type"), json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    falls_back = kind == "BPE" and spec["model"].get("byte_fallback") and spec["model"]["vocab"].keys() >= BYTES
    if kind != "BPE" or not ("ByteLevel" in levels or falls_back):
        raise KeptWholeError(
            f"only byte-level or byte-fallback BPE tokenizers can be trimmed, this one is {kind} with no bytes "
            "to fall back to"
        )
    return spec


def _pair(merge: list[str] | str) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumber_post_processor(node: object, new: Mapping[int, int]) -> None:
    """Rewrite the ids in a template post-processor, wherever they stand."""
    if isinstance(node, list):
        for item in node:
            _renumber_post_processor(item, new)
    elif isinstance(node, dict):
        for special in (node.get("special_tokens") or {}).values():
            special["ids"] = [new[old] for old in special["ids"]]
        for key in ("sep", "cls"):
            if key in node:
                node[key] = [node[key][0], new[node[key][1]]]
        for item in node.get("processors", []):
            _renumber_post_processor(item, new)


def _check_same(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Prove that the texts are still cut into the same pieces."""
    for text in texts:
        before = old.convert_ids_to_tokens(old(text)["input_ids"])
        after = new.convert_ids_to_tokens(new(text)["input_ids"])
        if before != after:
            raise KeptWholeError(f"{text[:40]!r} would be tokenised differently")


def _with_tokenizer(processor: Any, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Any:
    """Return a copy of `processor` around `tokenizer`, with the ids that it remembers renumbered."""
    if isinstance(processor, PreTrainedTokenizerFast):
        return tokenizer
    new = {old: index for index, old in enumerate(ids)}
    renewed = copy.copy(processor)
    renewed.tokenizer = tokenizer
    for key, value in vars(processor).items():
        if (is_id(key) or key.endswith(("_id", "_ids"))) and not isinstance(value, bool):  # use_image_id is a switch
            setattr(renewed, key, renumber(key, value, new, ids[-1] + 1))
    return renewed
