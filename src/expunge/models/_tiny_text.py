"""Tokenizers and text encoders of the toy models, made offline."""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5TokenizerFast

WINDOW = 24
"""Prompt window of the tiny models, in tokens; Stable Diffusion has 77, FLUX.1 512."""

_END = "<|endoftext|>"
_WORDS = "a an the of in on and with photo picture painting drawing style red blue cat dog strawberry banana guitar car"


def tiny_tokenizer() -> CLIPTokenizer:
    """Build a byte-level CLIP tokenizer that can spell anything and has a few words as single tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", _END, *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted(_WORDS.split(), key=len, reverse=True):  # longest first: a short word must not split a long one
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def text_config(vocab: int, eos: int) -> CLIPTextConfig:
    """Describe a two-layer CLIP text encoder of width 32."""
    return CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        initializer_factor=4.0,
        bos_token_id=0,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Build a unigram T5 tokenizer that spells Latin text and has a few words as single tokens; no other sign."""
    signs = [chr(code) for code in range(33, 127)]
    words = ["▁" + word for word in _WORDS.split()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*special, *((word, -1.0) for word in dict.fromkeys(words)), *((sign, -9.0) for sign in ("▁", *signs))]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, additional_special_tokens=[], model_max_length=WINDOW)


def t5_config(vocab: int) -> T5Config:
    """Describe a two-layer T5 encoder of width 64."""
    return T5Config(
        vocab_size=vocab,
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
