"""Tiny Hugging Face models with a real tokenizer, saved as a user would find them."""

from __future__ import annotations

from pathlib import Path

CORPUS = ["Ann has 3 boxes with 12 eggs each and sells 7 eggs. How many are left? 36 - 7 = 29. <|im_start|>user"] * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> int:
    """Save a byte-level BPE tokenizer with a chat template; return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return len(fast)


def save_hf(
    folder: Path, model_type: str = "qwen2", tied: bool = False, vocab_size: int = 330, dtype: str = "float32", **sizes
) -> Path:
    """Save a random model (`random_model`) with a tokenizer and a generation config."""
    from transformers import GenerationConfig

    tokens = save_tokenizer(folder)
    assert tokens <= vocab_size, (tokens, vocab_size)
    random_model(model_type, tied, vocab_size, dtype, **sizes).save_pretrained(folder)
    GenerationConfig(eos_token_id=[2], pad_token_id=0, temperature=0.7, top_p=0.8, do_sample=True).save_pretrained(
        folder
    )
    return folder


def random_model(
    model_type: str = "qwen2", tied: bool = False, vocab_size: int = 330, dtype: str = "float32", **settings
):
    """A Hugging Face model whose every parameter, norms and biases included, shows in its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        model_type,
        **defaults | {"num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0} | settings,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model
