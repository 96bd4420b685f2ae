"""Tiny real vision-language models, built offline from config classes: one builder per family.

``tiny(name)`` gives a random model of a stock class with a working processor, ``tiny_batch(name, model)`` a
valid training batch for it (labels included). Sizes are small and, within a tower, mutually different where
the family allows it, so that a slice along the wrong axis fails. Every vector is jittered: biases and norms
are never trivial.
"""

from __future__ import annotations

import functools
import json
import pathlib

import pytest
import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NAMES = (
    "llava-clip-llama",
    "llava-siglip-qwen2",
    "llava-dinov2-llama",
    "smolvlm",
    "idefics3",
    "qwen2_5_vl",
    "blip2-opt",
)
LLAVA = NAMES[:3]
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<image>")
IDEFICS_SPECIALS = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
QWEN_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CORPUS = (
    "What is shown in the picture? A red bicycle, a green apple and two small dogs.",
    "Read the slogan. Fresh every morning, cheaper than ever before!",
    "Which brand is advertised? The brand is Alder & Sons.",
    "Is the claim exaggerated? Yes, because nobody can promise a cure in 3 days.",
    "What product category does the advertisement belong to? food, drinks, shoes, toys, travel",
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_fallback_tokenizer(image: str = "<image>", known: int = 256) -> tf.PreTrainedTokenizerFast:
    """BPE over characters as Llama 2 and Gemma have it: spaces written as U+2581, bytes where a character has no token.

    Of the bytes the first `known` have one; a vocabulary that lacks some cannot be trimmed.
    """
    core = Tokenizer(models.BPE(byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(spaces)
    first = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(known))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    spec = json.loads(core.to_str())  # bytes are no special tokens: text that spells one does not become one
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["content"] in SPECIALS]
    return _wrapped(Tokenizer.from_str(json.dumps(spec)), image)


def tiny_tokenizer(extra: tuple[str, ...] = (), image: str = "<image>") -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE with about 60 merges; specials stand first, `extra` last (real ones mix both)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=list(SPECIALS), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in extra])
    return _wrapped(core, image)


def whole_llava():
    """A tiny LLaVA whose vocabulary cannot be trimmed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(
            globals(), "tiny_tokenizer", lambda extra=(), image="<image>": byte_fallback_tokenizer(image, 255)
        )
        return tiny("llava-dinov2-llama")


def _wrapped(core: Tokenizer, image: str) -> tf.PreTrainedTokenizerFast:
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<pad>"
    )
    tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT.replace("IMAGE", image)
    return tokenizer


class HandProcessor:
    """Processor for families whose stock one needs torchvision: picture processor + tokenizer, by hand."""

    def __init__(self, image_processor, tokenizer, image_token: str, merge: int):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token, self.merge = image_token, merge
        self.chat_template = tokenizer.chat_template
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs):
        pictures = self.image_processor(images=images, return_tensors="pt") if images is not None else {}
        text = [text] if isinstance(text, str) else list(text)
        if images is not None:
            counts = iter((pictures["image_grid_thw"].prod(-1) // self.merge**2).tolist())
            text = ["".join(self._expand(part, counts) for part in self._split(t)) for t in text]
        tokens = self.tokenizer(text, return_tensors=return_tensors, **kwargs)
        tokens["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).long()
        return tf.BatchFeature({**tokens, **pictures})

    def _split(self, text: str) -> list[str]:
        parts = text.split(self.image_token)
        return [piece for part in parts[:-1] for piece in (part, self.image_token)] + parts[-1:]

    def _expand(self, part: str, counts) -> str:
        return part * next(counts) if part == self.image_token else part

    def apply_chat_template(self, conversation, **kwargs):
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def special_ids(tokenizer) -> dict:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llama(tokenizer, **changes) -> dict:
    sizes = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 68,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        **special_ids(tokenizer),
    }
    return sizes | changes


def vit(model_type: str | None = None, **changes) -> dict:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 44,
        "image_size": 28,
        "patch_size": 14,
        "initializer_range": 0.1,
    }
    return sizes | ({"model_type": model_type} if model_type else {}) | changes


def _llava(name: str):
    tokenizer = tiny_tokenizer()
    text = _llama(tokenizer)
    if name == "llava-clip-llama":
        text |= {"head_dim": 10, "tie_word_embeddings": False}
        vision, layer, strategy, extra = vit("clip_vision_model", projection_dim=16), -2, "default", 1
    elif name == "llava-siglip-qwen2":
        text |= {"model_type": "qwen2", "head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
        vision, layer, strategy, extra = vit("siglip_vision_model"), -1, "full", 0
    else:
        text |= {"tie_word_embeddings": True}
        vision = vit("dinov2", mlp_ratio=3, layerscale_value=0.7, num_hidden_layers=3)
        del vision["intermediate_size"]
        layer, strategy, extra = -1, "default", 1
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text["tie_word_embeddings"],
        **special_ids(tokenizer),
    )
    pictures = tf.CLIPImageProcessorPil(
        size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=False
    )
    processor = tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _idefics3(name: str):
    tokenizer = tiny_tokenizer(IDEFICS_SPECIALS)
    pictures = tf.Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    processor = tf.Idefics3Processor(
        image_processor=pictures, tokenizer=tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    vision_type = {"smolvlm": "smolvlm_vision", "idefics3": "idefics3_vision"}[name]
    kind = {"smolvlm": tf.SmolVLMConfig, "idefics3": tf.Idefics3Config}[name]
    tied = name == "smolvlm"
    config = kind(
        vision_config=vit(vision_type, patch_size=7),
        text_config=_llama(tokenizer, head_dim=8 if tied else 12, tie_word_embeddings=tied),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=tied,
        **special_ids(tokenizer),
    )
    return config, processor


def _qwen2_5_vl(name: str):
    tokenizer = tiny_tokenizer(QWEN_SPECIALS, image="<|vision_start|><|image_pad|><|vision_end|>")
    pictures = tf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}, patch_size=14, merge_size=2
    )
    processor = HandProcessor(pictures, tokenizer, "<|image_pad|>", merge=2)
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.1,
    }
    text = _llama(tokenizer, tie_word_embeddings=False)
    del text["head_dim"], text["model_type"]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    ids = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=False,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in zip(keys, ids, strict=True)},
    )
    return config, processor


def qformer() -> dict:
    return {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 36,
        "vocab_size": 50,
        "cross_attention_frequency": 2,
        "initializer_range": 0.1,
    }


def _blip2(name: str):
    tokenizer = tiny_tokenizer(image="")
    pictures = tf.BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = tf.Blip2Processor(pictures, tokenizer, num_query_tokens=4)
    processor.chat_template = tokenizer.chat_template
    text = {
        "model_type": "opt",
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 68,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        "init_std": 0.1,
        **special_ids(tokenizer),
    }
    config = tf.Blip2Config(
        vision_config=vit(),
        qformer_config=qformer(),
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


_BUILDERS = {
    **dict.fromkeys(LLAVA, _llava),
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
    "blip2-opt": _blip2,
}


def tiny_config(name: str) -> tf.PreTrainedConfig:
    """The configuration alone."""
    return _BUILDERS[name](name)[0]


def tiny(name: str, seed: int = 0):
    """Return (random model in eval mode, processor) of the family `name`; one seed, one set of weights."""
    config, processor = _BUILDERS[name](name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.data += 0.2 * torch.randn_like(parameter)
    ids = special_ids(processor.tokenizer)
    model.generation_config = tf.GenerationConfig(**ids, max_new_tokens=8, do_sample=False)
    return model.eval(), processor


def _prompt(name: str, processor, answer: list[int]) -> list[int]:
    """Token ids of one example: picture placeholders (already expanded), question, answer."""
    tokenizer = processor.tokenizer
    image = {"qwen2_5_vl": "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"}.get(name, "<image>" * 4)
    if name in ("smolvlm", "idefics3"):
        image = f"<fake_token_around_image><global-img>{image}<fake_token_around_image>"
    return tokenizer(image + "What is shown?", add_special_tokens=False)["input_ids"] + answer


def tiny_batch(name: str, model, n: int = 2, seed: int = 0, answer_tokens: int = 5) -> dict[str, torch.Tensor]:
    """Return `n` valid random examples: pictures, prompt, random answers; labels only on the answers."""
    processor = _BUILDERS[name](name)[1]
    rng = torch.Generator().manual_seed(seed)
    low = len(SPECIALS)
    answers = torch.randint(low, low + 250, (n, answer_tokens), generator=rng)
    ids = torch.tensor([_prompt(name, processor, row.tolist()) for row in answers])
    labels = ids.clone()
    labels[:, :-answer_tokens] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if name == "qwen2_5_vl":
        image_id = processor.image_token_id
        batch["pixel_values"] = torch.randn(n * 16, 3 * 2 * 14 * 14, generator=rng)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * n)
        batch["mm_token_type_ids"] = (ids == image_id).long()
    elif name in ("smolvlm", "idefics3"):
        batch["pixel_values"] = torch.randn(n, 1, 3, 28, 28, generator=rng)
    else:
        batch["pixel_values"] = torch.randn(n, 3, 28, 28, generator=rng)
    return {key: value.to(model.device) for key, value in batch.items()}


def longer(batch: dict[str, torch.Tensor], by: int = 5) -> dict[str, torch.Tensor]:
    """Return the batch with so many columns of padding more."""
    filled = {"input_ids": SPECIALS.index("<pad>"), "attention_mask": 0, "labels": -100}
    more = {key: batch[key].new_full((len(batch[key]), by), value) for key, value in filled.items()}
    return batch | {key: torch.cat((batch[key], value), 1) for key, value in more.items()}


@functools.cache
def tiny_folder(name: str, root: str) -> pathlib.Path:
    """Save tiny(name) under `root` as a plain Hugging Face folder and return it."""
    folder = pathlib.Path(root) / name
    model, processor = tiny(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"]
    return folder
