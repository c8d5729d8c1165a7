"""GPT-2 from scratch in one file: attention, the model, OpenAI's weights, training, sampling.

    python gpt2.py train                              train a small GPT-2 on the-verdict.txt
    python gpt2.py generate "I HAD always thought"    let it write on
    python gpt2.py eval --data FILE                   measure a model on a text
    python gpt2.py export FOLDER                      write a folder that `transformers` reads

Read it from the top: a section is explained by what stands above it, and says what it borrows from below.

    1 attention    one head step by step, then causal, then all heads at once with a cache
    2 block        layer normalisation, the feed-forward network, the residual stream
    3 model        embeddings, blocks, and a head that shares the embedding's weights
    4 pretrained   OpenAI's four sizes; Hugging Face folders in and out
    5 data         text to tokens, windows of tokens, examples for fine-tuning
    6 CONFIG       every setting of a run
    7 training     schedule, optimizer, evaluation, checkpoints, the loop
    8 generation   from logits to a token, from a prompt to a text
    9 command line

Letters in shapes: B batch, T tokens (time), C embedding width, H heads, D width of a head (C / H), V vocabulary,
L layers. `# (B, T, C)` at the end of a line is the shape of what the line makes.

Sources: "Attention Is All You Need" (Vaswani et al., 2017); "Language Models are Unsupervised Multitask Learners"
(Radford et al., 2019), here called the GPT-2 paper; and OpenAI's code for it (openai/gpt-2, src/model.py).
"""

import argparse
import codecs
import contextlib
import ctypes
import difflib
import functools
import hashlib
import http.client
import itertools
import json
import logging
import math
import mmap
import os
import pickle
import random
import re
import reprlib
import shlex
import signal
import sys
import time
import warnings
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import fcntl  # file locks, where the system has them
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
log = logging.getLogger("gpt2")


# ---- 1. Attention: every token looks at other tokens and takes a weighted average of what they offer ----------------


class SelfAttention(nn.Module):
    """One attention head without a mask: every token sees every token.  x (B, T, d_in) -> (B, T, d_out).

    softmax(Q Kᵀ / √D) V ("Attention Is All You Need", section 3.2.1).
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token looks for
        self.key = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token can be found by
        self.value = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token hands over

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (row) takes from each token (column). x (B, T, d_in) -> (B, T, T); rows sum to 1."""
        queries, keys = self.query(x), self.key(x)  # (B, T, D) each
        scores = queries @ keys.transpose(1, 2)  # (B, T, T): a dot product for each pair of tokens
        # A dot product of D terms with variance 1 has variance D. Undo that, or softmax saturates and stops learning.
        scores = scores / math.sqrt(keys.size(-1))
        return torch.softmax(scores, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class CausalAttention(SelfAttention):
    """One head that cannot see the future, so that predicting the next token is not copying it.

    x (B, T, d_in) -> (B, T, d_out), T at most `context_length`. The lines marked "new" are what `SelfAttention` lacks.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout_rate: float, qkv_bias: bool = False):
        super().__init__(d_in, d_out, qkv_bias)  # query, key and value
        self.dropout = nn.Dropout(dropout_rate)  # new
        mask = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)  # new: column after row
        self.register_buffer("causal_mask", mask, persistent=False)  # new: no parameter, but it moves with the model

    def weights(self, x: Tensor) -> Tensor:
        """x (B, T, d_in) -> (B, T, T): rows sum to 1, and row t is exactly zero after column t."""
        tokens = x.size(1)
        queries, keys = self.query(x), self.key(x)  # (B, T, D) each
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # (B, T, T)
        scores = scores.masked_fill(self.causal_mask[:tokens, :tokens], -math.inf)  # new: exp(-inf) is 0
        return torch.softmax(scores, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.dropout(self.weights(x))  # new: forget some links while training
        return weights @ self.value(x)  # (B, T, D)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) -> (..., out): `F.linear`, but faster for few rows on a CPU.

    At a first reading, take it for `F.linear`. Generation multiplies one token's vector at a time, and then the time is
    that of reading the weights, which PyTorch does with one core. Cut into pieces, the product is a batch that all
    cores share. On two cores and GPT-2's matrices that is 1.7 times as fast for one row, 1.8 times for 8, 1.4 times for
    128; from about 500 on nothing is gained.
    """
    rows, outputs = x.numel() // x.size(-1), weight.size(0)
    if torch.is_grad_enabled() or x.device.type != "cpu" or rows > 128 or weight.numel() < 100_000:
        return F.linear(x, weight, bias)
    most = max(32, 4 * torch.get_num_threads())
    pieces = next(n for n in range(most, 0, -1) if outputs % n == 0)  # as many equal ones as possible
    same = x.reshape(rows, -1).expand(pieces, -1, -1)  # (pieces, rows, in), without a copy
    cut = weight.view(pieces, outputs // pieces, -1).transpose(1, 2)  # (pieces, in, out / pieces)
    bias = x.new_zeros(()) if bias is None else bias.view(pieces, 1, -1)
    out = torch.baddbmm(bias, same, cut)  # (pieces, rows, out / pieces)
    return out.transpose(0, 1).reshape(*x.shape[:-1], outputs)


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class KeyValueCache:
    """Keys and values of the tokens that one attention layer has read: `length` of at most `context_length`.

    A token sees no later token, so its key and value never change. A model that writes token by token keeps them, and
    computes only the new token.
    """

    def __init__(self, context_length: int):
        self.context_length, self.length = context_length, 0
        self.kept = None  # (2, B, H, context_length, D): keys and values, made at the first append

    def append(self, heads: Tensor) -> Tensor:
        """Add T tokens' keys and values (2, B, H, T, D); return all, (2, B, H, length, D). ValueError when full."""
        start, end = self.length, self.length + heads.size(3)
        if end > self.context_length:
            raise ValueError(f"the cache has room for {self.context_length} tokens, not {end}: start a new one")
        if self.kept is None:
            self.kept = heads.new_empty(*heads.shape[:3], self.context_length, heads.size(4))
        self.kept[:, :, :, start:end] = heads
        self.length = end
        return self.kept[:, :, :, :end]


class MultiHeadAttention(nn.Module):
    """H causal heads at once: one matrix makes all queries, keys and values, another mixes what the heads found.

    Equal to H `CausalAttention` heads side by side and a projection. `config` needs `emb_dim`, `n_heads`,
    `dropout_rate`, `qkv_bias`.  x (B, T, C) -> (B, T, C). With a `KeyValueCache`, x continues what the cache holds:
    S tokens are seen then, those of the cache and the T new ones.
    """

    def __init__(self, config: dict):
        super().__init__()
        width, self.n_heads = config["emb_dim"], config["n_heads"]
        self.query_key_value = Linear(width, 3 * width, bias=config["qkv_bias"])
        self.projection = Linear(width, width)
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.query_key_value(x).view(batch, tokens, 3, self.n_heads, -1)  # (B, T, 3, H, D)
        heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        queries, new = heads[0], heads[1:]
        keys, values = new if cache is None else cache.append(new)  # (B, H, S, D) each
        # One rule with and without a cache: query t stands at position S - T + t and sees the keys up to there. A
        # single query sees all of them; without a past (S = T) the kernel has the rule built in; else a mask says it.
        seen, mask = keys.size(2), None
        if 1 < tokens < seen:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=x.device).tril(diagonal=seen - tokens)
        dropout = self.dropout.p if self.training else 0.0
        # The fused kernel computes softmax(Q Kᵀ / √D) V, (B, H, T, D), and never stores the (T, S) weights.
        out = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=tokens == seen)
        out = out.transpose(1, 2).reshape(batch, tokens, width)  # (B, T, C): the heads side by side
        return self.dropout(self.projection(out))


# ---- 2. Block: attention moves information between tokens, the feed-forward network works on each token alone -------


class LayerNorm(nn.Module):
    """Give each token's vector mean 0 and variance 1, then a learned scale and shift.  x (..., C) -> (..., C).

    scale · (x - mean) / √(variance + 1e-5) + shift, with the biased variance (Ba et al., 2016);
    `F.layer_norm` is that formula in one pass over memory.
    """

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))  # scale
        self.bias = nn.Parameter(torch.zeros(emb_dim))  # shift

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class FeedForward(nn.Module):
    """Widen each token's vector four times, bend it, narrow it again.  x (B, T, C) -> (B, T, C).

    GELU in the tanh form of OpenAI's model.py: ½x(1 + tanh(√(2/π)(x + 0.044715x³))). `config` needs `emb_dim` and
    `dropout_rate`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.expand = Linear(config["emb_dim"], 4 * config["emb_dim"])
        self.projection = Linear(4 * config["emb_dim"], config["emb_dim"])
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.projection(hidden))  # (B, T, C)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.  x (B, T, C) -> (B, T, C).

    The norms stand before the two steps, not after (GPT-2 paper, section 2.3): x runs through all blocks changed only
    by additions, and gradients run back the same way.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.norm1, self.attention = LayerNorm(config["emb_dim"]), MultiHeadAttention(config)
        self.norm2, self.feed_forward = LayerNorm(config["emb_dim"]), FeedForward(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))


# ---- 3. Model: token and position vectors go in at the bottom, a score for each of V next tokens comes out on top ---

MODEL_LIMITS = {  # the keys that make a model, with the least and the greatest value
    "vocab_size": (1, 10**6), "context_length": (1, 10**6), "emb_dim": (1, 65_536), "n_heads": (1, 1_024),
    "n_layers": (1, 1_000), "dropout_rate": (0.0, 0.99), "qkv_bias": (False, True),
}  # fmt: skip


def check_value(key: str, value, low, high):
    """The plain value. ValueError unless it has the type of `low` (an int may stand for a float) and is in bounds."""
    kind = type(low)
    # For Python, True is an int; here it is none.
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or not low <= value <= high:
        name = {int: "a whole number", float: "a number", bool: "a truth value"}[kind]
        raise ValueError(f"{key} is {reprlib.repr(value)}; it must be {name} from {low} to {high}")
    return kind(value)  # NumPy's floats are floats, too, but no checkpoint may hold them


def check_model_config(config: dict, source: str = "") -> dict:
    """The model's keys of `config`. ValueError names a key that is missing or a value that cannot be, and `source`."""
    source, plain = f"{source}: " if source else "", {}
    for key, (low, high) in MODEL_LIMITS.items():
        if key not in config:
            raise ValueError(f"{source}the config has no {key}; a model needs {', '.join(MODEL_LIMITS)}")
        plain[key] = check_value(source + key, config[key], low, high)
    width, heads = plain["emb_dim"], plain["n_heads"]
    if width % heads:
        raise ValueError(f"{source}emb_dim {width} is no multiple of n_heads {heads}; make it one")
    return plain


class GPT2(nn.Module):
    """The GPT-2 language model (GPT-2 paper, section 2.3).

    `config` needs the keys of `MODEL_LIMITS`; others are ignored. ValueError names a key or value that is wrong.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = check_model_config(config)
        self.token_embedding = nn.Embedding(config["vocab_size"], config["emb_dim"])  # (V, C), also the output head
        self.position_embedding = nn.Embedding(config["context_length"], config["emb_dim"])  # learned
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config["n_layers"]))
        self.final_norm = LayerNorm(config["emb_dim"])
        self.chunked_loss = False  # a training run sets it; CONFIG says what it costs
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Weights normal with standard deviation 0.02, biases zero (OpenAI's model.py; its positions have 0.01).

        The two projections of each block that write into the residual stream get 0.02 / √(2L): 2L of them add up, and
        the stream should not grow with depth (GPT-2 paper, section 2.3).
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (MultiHeadAttention, FeedForward)):  # `apply` comes here after its parts
            nn.init.normal_(module.projection.weight, std=0.02 / math.sqrt(2 * self.config["n_layers"]))

    def forward(self, idx: Tensor, cache: list[KeyValueCache] | None = None, last_only: bool = False,
                targets: Tensor | None = None) -> Tensor:  # fmt: skip
        """Token ids idx (B, T), long -> logits (B, T, V): row t scores every candidate for token t + 1.

        `cache` (from `new_cache`) holds the tokens before idx, and takes idx in. `last_only` gives (B, 1, V). With
        `targets` (B, T) the result is instead the summed cross-entropy in nats; a target of -100 does not count.
        ValueError when the tokens do not fit the context.
        """
        start = cache[0].length if cache else 0
        end, context = start + idx.size(1), self.config["context_length"]
        if end > context:
            raise ValueError(f"{end} tokens do not fit context_length {context}: give fewer")
        positions = torch.arange(start, end, device=idx.device)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)  # (B, T, C)
        x = self.final_norm(x[:, -1:] if last_only else x)
        head = self.token_embedding.weight  # (V, C): a token's vector is also what predicts it
        if targets is None:
            return linear(x, head)  # (B, T, V)
        x, targets = x.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T)
        if self.chunked_loss:  # logits of 512 rows at a time; autocast does not reach into it: all stays in float32
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="compact")
            return F.linear_cross_entropy(x, head, targets, reduction="sum", options=options)
        return F.cross_entropy(linear(x, head), targets, reduction="sum")

    def new_cache(self) -> list[KeyValueCache]:
        """An empty key/value cache, one for each layer."""
        return [KeyValueCache(self.config["context_length"]) for _ in self.blocks]

    def num_parameters(self) -> int:
        """How many numbers are trained; the head has none of its own."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT2":
        """A model from a checkpoint of ours, a Hugging Face folder, or OpenAI's `gpt2`, `gpt2-medium`, `-large`, `-xl`.

        In eval mode, float32, on the CPU. What exists under the name comes before OpenAI's size. FileNotFoundError if
        there is no such thing, ValueError if it cannot be used, OSError if a download fails. (Sections 4 and 7.)
        """
        path = Path(name_or_path)
        if path.is_dir():
            return load_hugging_face(path).eval()
        if path.suffix == ".safetensors":
            raise ValueError(f"{path} is part of a Hugging Face folder: give the folder {path.parent}")
        if path.is_file():
            checkpoint = load_checkpoint(path)
            return model_from_tensors(checkpoint["config"], checkpoint["model"], path).eval()
        if str(name_or_path) in OPENAI_SIZES:
            return load_openai(str(name_or_path)).eval()
        choices = f"a checkpoint file, a Hugging Face folder or one of {', '.join(OPENAI_SIZES)}"
        raise FileNotFoundError(f"there is no model {str(name_or_path)!r}: give {choices}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder` in Hugging Face format: weights, config and tokenizer. OSError if it cannot be written."""
        save_hugging_face(self, Path(folder))


# ---- 4. Pretrained: the same model under other names, in the layout that Hugging Face publishes ----------------------
# From below: `load_tokenizer` (section 5), and `safe_load` and `write_files` (7), which guard against broken files.

OPENAI_SIZES = {  # GPT-2 paper, table 2; the parameters are those of the released files
    "gpt2": {"n_layers": 12, "n_heads": 12, "emb_dim": 768},  # 124,439,808
    "gpt2-medium": {"n_layers": 24, "n_heads": 16, "emb_dim": 1024},  # 354,823,168
    "gpt2-large": {"n_layers": 36, "n_heads": 20, "emb_dim": 1280},  # 774,030,080
    "gpt2-xl": {"n_layers": 48, "n_heads": 25, "emb_dim": 1600},  # 1,557,611,200
}
for _size in OPENAI_SIZES.values():
    _size.update(vocab_size=50257, context_length=1024, qkv_bias=True)

HUGGING_FACE_NAMES = {  # parts of our parameters' names: parts of theirs
    "token_embedding": "wte", "position_embedding": "wpe", "blocks.": "h.", "final_norm": "ln_f",
    "norm1": "ln_1", "attention.query_key_value": "attn.c_attn", "attention.projection": "attn.c_proj",
    "norm2": "ln_2", "feed_forward.expand": "mlp.c_fc", "feed_forward.projection": "mlp.c_proj",
}  # fmt: skip
TRANSPOSED = re.compile(r"\.c_(attn|proj|fc)\.weight$")  # stored input × output, as in OpenAI's conv1d
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # old files carry it; ours is a rule, not a tensor

CONFIG_NAMES = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd", "n_heads": "n_head",
                "n_layers": "n_layer", "dropout_rate": "resid_pdrop"}  # fmt: skip
HUGGING_FACE_CONFIG = {  # what a config.json must say, or leave out, for this file to compute the same
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "BOOL": torch.bool, "U8": torch.uint8}  # fmt: skip


def model_without_memory(config: dict) -> GPT2:
    """A model whose tensors have shapes and no numbers (PyTorch's meta device), to be given them."""
    # `normal_` does nothing here: there is nothing to fill, and trying would import PyTorch's compiler, 1.4 s.
    with torch.device("meta"), mock.patch.object(nn.init, "normal_"):
        return GPT2(config)


def hugging_face_names(config: dict) -> dict[str, str]:
    """Every parameter of a model of this size, by our name -> their name, without the `transformer.` before it."""
    names = {name: name for name in model_without_memory(config).state_dict()}
    for ours, theirs in HUGGING_FACE_NAMES.items():
        names = {name: changed.replace(ours, theirs) for name, changed in names.items()}
    return names


def is_plain(value) -> bool:
    """Whether this is an ordinary tensor in memory, of a type that models are stored in."""
    usual = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return usual and not value.is_nested and value.dtype in SAFETENSORS_TYPES.values()


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], source: str | Path) -> None:
    """ValueError names a tensor that is missing, unknown, not of plain floats, of another shape, or not finite."""
    if odd := sorted(shapes.keys() ^ tensors.keys(), key=str):
        what = "is missing" if odd[0] in shapes else "has no place in GPT-2"
        raise ValueError(f"{source}: the tensor {odd[0]} {what}")
    for name, tensor in tensors.items():
        if not is_plain(tensor) or not tensor.is_floating_point() or tensor.shape != shapes[name]:
            kind = f"{tensor.dtype}, {tuple(tensor.shape)}" if is_plain(tensor) else f"an odd {type(tensor).__name__}"
            raise ValueError(f"{source}: the tensor {name} is {kind}; it must be floats of shape {tuple(shapes[name])}")
    # A file may claim huge tensors and hold a few numbers that all of them share: then the sizes do not add up.
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    there = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if there < sum(tensor.nbytes for tensor in tensors.values()):
        raise ValueError(f"{source}: its tensors claim more than the {there} bytes that are there")
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{source}: the tensor {name} holds NaN or infinity; get a clean copy")


def model_from_tensors(config: dict, tensors: dict[str, Tensor], source: str | Path) -> GPT2:
    """A model with these weights, by our names. ValueError says what is wrong with them (see `check_tensors`)."""
    model = model_without_memory(config)  # so there is one copy of the weights beside `tensors`, never two
    check_tensors(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, source)
    weights = {name: torch.empty(old.shape, dtype=torch.float32).copy_(old.detach()) for name, old in tensors.items()}
    model.load_state_dict(weights, assign=True)
    return model


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped from the file and not yet read. ValueError if its layout is broken.

    The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = position = 8 + int.from_bytes(data[:8], "little")
        header, tensors = json.loads(data[8:begin]), {}
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            # Each tensor begins where the one before ends: no gap, no overlap, nothing outside the file.
            count = math.prod(shape)
            if begin + start != position or end - start != count * dtype.itemsize or begin + end > len(data):
                raise ValueError(f"tensor {name} {shape} does not fit bytes {start} to {end} of {len(data) - begin}")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=position).view(shape)
            position = begin + end
        if position != len(data):
            raise ValueError(f"{len(data)} bytes where the header describes {position}")
        return tensors
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise ValueError(f"{path} is damaged, cut short or no safetensors file ({reason})") from error


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error


def load_hugging_face(folder: Path) -> GPT2:
    """The GPT-2 in a Hugging Face folder. ValueError names what this file would compute wrongly, or cannot find."""
    config_file, index = folder / "config.json", folder / "model.safetensors.index.json"
    if not config_file.is_file():
        hint = f": give {folder / 'last.pt'}" if (folder / "last.pt").is_file() else ""
        raise FileNotFoundError(f"{folder} has no config.json, so it is no Hugging Face folder{hint}")
    given = {"resid_pdrop": 0.1, **read_json(config_file)}  # the only key with a default here
    if isinstance(given.get("n_embd"), int) and given.get("n_inner") == 4 * given["n_embd"]:
        given["n_inner"] = None  # two ways to say the same
    for key, needed in HUGGING_FACE_CONFIG.items():
        if given.get(key, needed) != needed:
            raise ValueError(f"{config_file}: {key} is {given[key]!r}; only {needed!r} is supported")
    if missing := [key for key in CONFIG_NAMES.values() if key not in given]:
        raise ValueError(f"{config_file} has no {missing[0]}")
    config = {ours: given[theirs] for ours, theirs in CONFIG_NAMES.items()} | {"qkv_bias": True}
    check_model_config(config, str(config_file))
    if (folder / "model.safetensors").is_file():
        tensors = read_safetensors(folder / "model.safetensors")
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or any(not isinstance(s, str) or Path(s).name != s for s in shards.values()):
            raise ValueError(f"{index} has no weight_map of file names in this folder")
        tensors = {}
        for shard in sorted(set(shards.values())):
            tensors |= read_safetensors(folder / shard)
    elif (folder / "pytorch_model.bin").is_file():
        tensors = safe_load(folder / "pytorch_model.bin")
    else:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    return from_hugging_face(config, tensors, folder)


def from_hugging_face(config: dict, tensors: dict[str, Tensor], source: str | Path) -> GPT2:
    """A model from tensors under their names. Each must be used, but for causal masks and a head equal to `wte`."""
    if not all(isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
        raise ValueError(f"{source} does not hold ordinary tensors by name")
    ours, found = {theirs: name for name, theirs in hugging_face_names(config).items()}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if not CAUSAL_MASK.fullmatch(name):
            found[ours.get(name, name)] = tensor.transpose(0, -1) if TRANSPOSED.search(name) else tensor
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, found.get("token_embedding.weight", head)):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight; a head of its own is not supported")
    return model_from_tensors(config, found, source)


def load_openai(name: str) -> GPT2:
    """One of OpenAI's four models, downloaded once into the torch hub cache. OSError says why that failed."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"openai-community--{name}.safetensors"
    if not path.is_file():
        base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        url = f"{base}/openai-community/{name}/resolve/main/model.safetensors"
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("downloading %s", url)
            torch.hub.download_url_to_file(url, str(part))
            read_safetensors(part)  # as long as its header says: half a file never takes the name
            os.replace(part, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error).replace(str(part), "what arrived")
            raise OSError(f"{url} could not be downloaded: {reason}; check the network, or HF_ENDPOINT") from error
        finally:
            part.unlink(missing_ok=True)
    return from_hugging_face({**OPENAI_SIZES[name], "dropout_rate": 0.1}, read_safetensors(path), path)


def write_safetensors(tensors: dict[str, Tensor], file) -> None:
    """Write tensors as float32, in the format that `read_safetensors` reads, into an open file."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, position = position, position + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, position]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).data)


def save_hugging_face(model: GPT2, folder: Path) -> None:
    """Write what `transformers`, llama.cpp's converter and vLLM take for a GPT-2, each file whole or not at all."""
    from tiktoken.load import read_file_cached

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give another name")
    ours, weights, special = model.config, {}, "<|endoftext|>"
    config = {"architectures": ["GPT2LMHeadModel"], **HUGGING_FACE_CONFIG, "n_ctx": ours["context_length"]}
    config |= {theirs: ours[key] for key, theirs in CONFIG_NAMES.items()}
    config |= {"attn_pdrop": ours["dropout_rate"], "embd_pdrop": ours["dropout_rate"], "initializer_range": 0.02}
    config |= {"bos_token_id": 50256, "eos_token_id": 50256, "torch_dtype": "float32", "use_cache": True}
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": ours["context_length"]}
    tokenizer |= {"bos_token": special, "eos_token": special, "unk_token": special, "add_prefix_space": False}
    state, zeros = model.state_dict(), torch.zeros(3 * ours["emb_dim"])
    for name, theirs in hugging_face_names({**ours, "qkv_bias": True}).items():
        tensor = state.get(name, zeros)  # theirs always has a bias for queries, keys and values; zeros say the same
        weights[f"transformer.{theirs}"] = tensor.t() if TRANSPOSED.search(theirs) else tensor
    load_tokenizer()  # compares OpenAI's two files with their hashes, and fetches what is missing
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    files = {"merges.txt": read_file_cached(url + "vocab.bpe"), "vocab.json": read_file_cached(url + "encoder.json")}
    files |= {"model.safetensors": functools.partial(write_safetensors, weights)}
    files |= {"config.json": json.dumps(config, indent=2).encode()}
    files |= {"tokenizer_config.json": json.dumps(tokenizer, indent=2).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    write_files({folder / name: content for name, content in files.items()})


# ---- 5. Data: text becomes tokens, tokens become inputs and targets, a target one token ahead of its input -----------

IGNORE_INDEX = -100  # a target that no loss counts
FINE_TUNING = (".json", ".jsonl")  # how the names of files with examples end; all others are text
# GPT-2 first splits a text by a regular expression, then joins bytes to tokens within each part. No part runs from a
# visible character into white space, so a cut between the two changes no token.
SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


@functools.lru_cache(maxsize=1)
def load_tokenizer():
    """GPT-2's byte-pair encoding (GPT-2 paper, section 2.2), a `tiktoken.Encoding`.

    It starts from bytes and joins the neighbours that were most frequent in OpenAI's texts: 50,256 tokens and
    `<|endoftext|>`. OSError if it is neither at hand nor to be downloaded.
    """
    import tiktoken  # here, because `--help` should not wait for it

    if (HERE / ".tiktoken").is_dir() and not {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & os.environ.keys():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / ".tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        where = "TIKTOKEN_CACHE_DIR (if not set, .tiktoken/ beside gpt2.py)"
        raise OSError(f"GPT-2's vocabulary is not in {where}, and no download gave it: {error}") from error


def text_to_token_ids(text: str, tokenizer) -> Tensor:
    """A prompt as token ids (1, T). In a prompt `<|endoftext|>` is ordinary text."""
    return torch.tensor([tokenizer.encode(text, disallowed_special=())], dtype=torch.long)


def token_bytes(token_id: int, tokenizer) -> bytes:
    """The bytes of a token; those of � for an id beyond the vocabulary, which a head with spare rows can produce."""
    return tokenizer.decode_single_token_bytes(token_id) if token_id < tokenizer.n_vocab else "�".encode()


def token_ids_to_text(ids: Tensor | Sequence[int], tokenizer) -> str:
    """Token ids (T) or (1, T) as text. Bytes that make no whole character become �."""
    return b"".join(token_bytes(i, tokenizer) for i in torch.as_tensor(ids).flatten().tolist()).decode(errors="replace")


def read_blocks(path: Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[str]:
    """Characters `start` to `stop` of a UTF-8 file, a million at a time. ValueError if it is not UTF-8."""
    position = 0
    with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
        try:
            while position < stop and (block := file.read(1 << 20)):
                yield block[max(start - position, 0) : stop - position]
                position += len(block)
        except UnicodeDecodeError as error:  # its `object` is the last bytes that were read
            where = file.buffer.tell() - len(error.object) + error.start
            found = f"byte {where + 1:,} of the file is 0x{error.object[error.start]:02x}"
            raise ValueError(f"{path} is not UTF-8 text ({found}): convert it") from None


def safe_pieces(path: Path, start: int, stop: int) -> Iterator[str]:
    """The same characters of a file, in pieces that give the same tokens alone as together."""
    rest = ""
    for block in read_blocks(path, start, stop):
        if cut := SAFE_CUT.match(block):
            yield rest + cut.group()
            rest, block = "", block[cut.end() :]
        rest += block
    yield rest


def tokenize_file(path: Path, start: int, stop: int) -> Tensor:
    """The tokens of characters `start` to `stop` of a file, as uint16: 2 bytes a token."""
    tokenizer, pieces, cores = load_tokenizer(), safe_pieces(path, start, stop), os.cpu_count()
    tokens, done = array("H"), 0
    while some := list(itertools.islice(pieces, 2 * cores)):  # two pieces, of a million characters, for each core
        for ids in tokenizer.encode_batch(some, num_threads=cores, allowed_special="all"):
            tokens.extend(ids)
        done += sum(map(len, some))
        if done < stop - start:
            log.info("tokenising: %.0f %% of %s", 100 * done / (stop - start), path, extra={"live": True})
    return torch.frombuffer(tokens, dtype=torch.uint16) if tokens else torch.empty(0, dtype=torch.uint16)


def load_text(path: Path, val_fraction: float = 0.0) -> tuple[Tensor, Tensor]:
    """A text's tokens to train on and to validate, cut by characters, then tokenised. ValueError if it has no text."""
    if not any(map(str.strip, read_blocks(path))):
        raise ValueError(f"{path} is empty or only white space: give a text")
    n_chars = sum(map(len, read_blocks(path)))
    split = int(n_chars * (1 - val_fraction))
    return tokenize_file(path, 0, split), tokenize_file(path, split, n_chars)


class GPTDataset(torch.utils.data.Dataset):
    """Windows over a text's tokens. Item i is (x, y), each (context_length): y is x shifted by one token.

    Windows begin every `stride` tokens, by default where the last one ended. ValueError if the text is too short.
    """

    def __init__(self, token_ids: Sequence[int] | Tensor, context_length: int, stride: int | None = None):
        stride = context_length if stride is None else stride
        if context_length < 1 or stride < 1:
            raise ValueError(f"context_length {context_length} and stride {stride} must be at least 1")
        self.token_ids, self.context_length = torch.as_tensor(token_ids).flatten(), context_length
        self.starts = range(0, len(self.token_ids) - context_length, stride)
        if not self.starts:
            need = f"context_length {context_length} needs {context_length + 1}: lower it, or give more text"
            raise ValueError(f"{len(self.token_ids)} tokens make no window, {need}")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.token_ids[self.starts[index] : self.starts[index] + self.context_length + 1].long()
        return window[:-1], window[1:]

    def scoring_windows(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows (x, y) that score each token after the first once; a target scored before is -100.

        A token has at least context - stride tokens before it, where they exist: a small stride is a fairer measure,
        for more work. The default is the context, and the most. ValueError for less than 1.
        """
        stride = min(self.context_length if stride is None else stride, self.context_length)
        if stride < 1:
            raise ValueError(f"stride is {stride}; it must be 1 or more")
        last, scored = len(self.token_ids) - 1, 0
        for start in range(0, last, stride):
            end = min(start + self.context_length, last)
            window = self.token_ids[start : end + 1].long()
            x, y = window[:-1], window[1:].clone()
            y[: scored - start] = IGNORE_INDEX
            scored = end
            yield x, y
            if end == last:
                return


class CompletionDataset(list):
    """Prompts and completions for fine-tuning. Item i is (x, y) of its own length; y is -100 where the prompt is.

    A completion ends with `<|endoftext|>`, so the model learns to stop. The context cuts `n_cut` of them on the left.
    """

    def __init__(self, examples: Sequence[tuple[str, str]], context_length: int):
        super().__init__()
        tokenizer, self.examples, self.n_cut = load_tokenizer(), examples, 0
        for prompt, completion in examples:
            before = tokenizer.encode(prompt, disallowed_special=()) or [tokenizer.eot_token]
            after = [*tokenizer.encode(completion, disallowed_special=()), tokenizer.eot_token]
            x, y = (before + after)[:-1], [IGNORE_INDEX] * (len(before) - 1) + after
            self.n_cut += len(x) > context_length
            self.append((torch.tensor(x[-context_length:]), torch.tensor(y[-context_length:])))

    def scoring_windows(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All items; there is nothing to slide."""
        return iter(self)


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Items of any lengths as x (B, T), y (B, T); padding stands behind, where no token sees it and no loss counts."""
    xs, ys = zip(*items)
    pad = nn.utils.rnn.pad_sequence
    return pad(xs, batch_first=True), pad(ys, batch_first=True, padding_value=IGNORE_INDEX)


def instruction_prompt(instruction: str, context: str = "") -> str:
    """An instruction, with or without an input, in the layout of Stanford Alpaca."""
    further = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{further}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n")  # fmt: skip


def to_example(entry) -> tuple[str, str]:
    """(prompt, completion) from one JSON value. ValueError if it is neither of the two kinds of object."""
    match entry:
        case {"prompt": str(prompt), "completion": str(completion)}:
            return prompt, completion
        case {"instruction": str(task), "output": str(output)} if isinstance(entry.get("input") or "", str):
            return instruction_prompt(task, entry.get("input") or ""), output
    raise ValueError('needs texts "prompt", "completion" or "instruction", "output" and maybe "input"')


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) pairs from a file with a JSON object a line, or a JSON list. ValueError names the line."""
    text, examples, number = "".join(read_blocks(path)), [], 0
    is_list = text.lstrip().startswith("[")
    try:
        for number, entry in enumerate(json.loads(text) if is_list else text.split("\n"), start=1):
            if is_list or entry.strip():
                examples.append(to_example(entry if is_list else json.loads(entry)))
    except (ValueError, RecursionError) as error:
        where = f", {'item' if is_list else 'line'} {number}" if number else ""
        raise ValueError(f"{path}{where}: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def find_data(name: str) -> Path:
    """The data file, or the one of that name beside gpt2.py. FileNotFoundError if neither is there."""
    for path in (Path(name), HERE / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no file {name!r} to read: give --data a UTF-8 text, or .jsonl to fine-tune")


def load_data(config: dict) -> tuple[GPTDataset | CompletionDataset, GPTDataset | CompletionDataset | None]:
    """The training and the validation set of a run. ValueError says how much there is and what to lower."""
    path, fraction, context = find_data(config["data"]), config["val_fraction"], config["context_length"]
    if path.suffix.lower() in FINE_TUNING:
        examples = read_examples(path)
        random.Random(config["seed"]).shuffle(examples)  # files are often sorted by class
        n_val = math.ceil(len(examples) * fraction)
        if n_val == len(examples):
            raise ValueError(f"{path} has {n_val} examples; val_fraction {fraction} leaves none to train on: lower it")
        val_set = CompletionDataset(examples[:n_val], context) if n_val else None
        return CompletionDataset(examples[n_val:], context), val_set
    train_ids, val_ids = load_text(path, fraction)
    if len(train_ids) <= context or (fraction and len(val_ids) < 2):
        need = f"context_length {context} needs {context + 1} and 2: lower it, change --val_fraction, or give more text"
        raise ValueError(f"{path} has {len(train_ids):,} tokens to train on and {len(val_ids):,} to validate; {need}")
    val_set = GPTDataset(val_ids, min(context, len(val_ids) - 1)) if fraction else None
    return GPTDataset(train_ids, context, config["stride"] or max(1, context // 2)), val_set


# ---- 6. CONFIG: every setting of a run; `python gpt2.py train --KEY VALUE` changes one ------------------------------

CONFIG = {
    # The model: GPT-2 in everything but size
    "vocab_size": 50257,  # tokens in the vocabulary; GPT-2's are 50257
    "context_length": 64,  # tokens the model sees at once
    "emb_dim": 128,  # width of a token's vector
    "n_heads": 4,  # attention heads in a block
    "n_layers": 4,  # blocks
    "dropout_rate": 0.0,  # share of values dropped at random while training
    "qkv_bias": True,  # give queries, keys and values a bias, as OpenAI did
    # The data
    "data": "the-verdict.txt",  # UTF-8 text, or .jsonl/.json examples to fine-tune on
    "val_fraction": 0.1,  # share held back to validate: a text's end, or random examples
    "stride": 0,  # tokens from one training window to the next; 0: half the context
    # The run
    "batch_size": 8,  # windows or examples that a process works on at once
    "grad_accumulation": 1,  # batches that make one optimizer step
    "epochs": 20,  # times through the training data
    "max_steps": 0,  # stop after so many optimizer steps; 0: after the epochs
    "learning_rate": 2e-3,  # the highest, reached by the warm-up
    "min_learning_rate": 5e-4,  # the lowest, at the end; if not given, at most a quarter of the highest
    "warmup_steps": 50,  # optimizer steps up to the highest learning rate
    "decay_steps": 0,  # step at which the lowest learning rate is reached; 0: the last of all epochs
    "weight_decay": 0.3,  # AdamW's pull on matrices and embeddings towards zero
    "grad_clip": 1.0,  # longest gradient; 0: any length
    "seed": 42,  # where all random numbers start
    # On the way, counted in optimizer steps
    "eval_every": 0,  # measure the validation loss so often; 0: once an epoch
    "checkpoint_every": 0,  # save so often, and at each lowest validation loss; 0: once an epoch
    "sample_prompt": "I HAD always thought",  # what the model continues after each epoch, and at the end
    # The machine
    "device": "auto",  # auto: an accelerator where there is one; or cpu, cuda, mps, xpu
    "precision": "auto",  # fp32, bf16 or fp16; auto: bf16 or else fp16 on CUDA, fp32 elsewhere
    "compile": False,  # train through torch.compile
    "chunked_loss": False,  # logits in pieces: 1.3 GB less at 124M and 4 x 512 tokens, steps 1.05 times as long
}
LIMITS = MODEL_LIMITS | {  # of keys that may not be anything from zero to a billion
    "val_fraction": (0.0, 0.9), "batch_size": (1, 10**6), "grad_accumulation": (1, 10**6), "epochs": (1, 10**6),
    "learning_rate": (1e-12, 10.0), "seed": (0, 2**31 - 1),
}  # fmt: skip


def check_config(config: dict) -> dict:
    """`config` over `CONFIG`. ValueError names a key that is unknown or a value that cannot be."""
    if unknown := sorted(config.keys() - CONFIG.keys(), key=str):
        near = difflib.get_close_matches(str(unknown[0]), CONFIG, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the config has an unknown key {unknown[0]!r}{hint}")
    given, config = config, {**CONFIG, **config}
    for key, default in CONFIG.items():
        if not isinstance(default, str):
            kind = type(default)
            config[key] = check_value(key, config[key], *LIMITS.get(key, (kind(0), kind(10**9))))  # bool(10**9) is True
        elif not isinstance(config[key], str):
            raise ValueError(f"{key} is {reprlib.repr(config[key])}; it must be a text")
    check_model_config(config)
    if "min_learning_rate" not in given:
        config["min_learning_rate"] = min(config["min_learning_rate"], config["learning_rate"] / 4)
    if config["precision"] not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {config['precision']!r}; it must be auto, fp32, bf16 or fp16")
    for low, high in (("stride", "context_length"), ("min_learning_rate", "learning_rate")):
        if config[low] > config[high]:
            raise ValueError(f"{low} {config[low]} is above {high} {config[high]}: lower it")
    if config["vocab_size"] < CONFIG["vocab_size"]:
        raise ValueError(f"vocab_size is {config['vocab_size']}; GPT-2's tokens need at least {CONFIG['vocab_size']}")
    return config


# ---- 7. Training: guess every next token, measure the surprise, step downhill; save so that nothing is lost ---------
# At a first reading, skip from `write_files` to `Run`, and there `restore`: they keep files and runs whole.
# From below: `sample_text` (section 8).

CHECKPOINT_FORMAT = "gpt2.py 1"
# What may differ when a run is resumed. The text's contents and the windows of a step are compared by themselves.
FREE_TO_CHANGE = {"max_steps", "eval_every", "checkpoint_every", "sample_prompt", "device", "compile", "chunked_loss",
                  "data", "batch_size", "grad_accumulation"}  # fmt: skip


def learning_rate_at(step: int, config: dict, total_steps: int) -> float:
    """The learning rate of optimizer step 1, 2, …: a line up over `warmup_steps`, half a cosine down, then level."""
    high, low, warmup = config["learning_rate"], config["min_learning_rate"], config["warmup_steps"]
    if step <= warmup:
        return high * step / warmup
    end = config["decay_steps"] or total_steps
    progress = min((step - warmup) / max(end - warmup, 1), 1.0)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: GPT2, config: dict) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings, not norms and biases, which have no reason to be small.

    OpenAI published no such settings for GPT-2: betas, clipping and the cosine are GPT-3's (Brown et al., 2020, B).
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one pass over memory: 4 times as fast on a CPU
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), fused=fused)


def pick_device(name: str) -> torch.device:
    """`auto` is an accelerator if there is one; under torchrun each process takes its own. ValueError if it cannot."""
    try:
        if name == "auto":
            name = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.ones(1, device=name).item()  # the only sure way to know
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"the device {name!r} cannot be used here ({reason}); try --device cpu") from error


def join_processes(device: torch.device) -> tuple[int, int]:
    """(rank of this process, number of processes). Under torchrun, join the others: nccl on CUDA, gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(*values: float | Tensor) -> list[float]:
    """The sum of each of these numbers over all processes. Waits for the device, and for the other processes."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(total)
    return total.tolist()


@contextlib.contextmanager
def evaluating(model: GPT2) -> Iterator[None]:
    """Inside, the model drops nothing out and keeps nothing for gradients; then it is as it was before."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():  # saves 5 % of a token's time against no_grad
            yield
    finally:
        model.train(was_training)


def evaluate(model: GPT2, dataset: GPTDataset | CompletionDataset, *, stride: int | None = None) -> float:
    """The mean loss in nats per token over every token that counts (see `scoring_windows`).

    Draws no random number and puts the model's mode back, so that it cannot change a training run. Under torchrun the
    processes share the windows. ValueError if a window is longer than the model's context.
    """
    device = next(model.parameters()).device
    rank, world = join_processes(device)
    windows, loss, count = itertools.islice(dataset.scoring_windows(stride), rank, None, world), 0.0, 0
    at_once = max(1, 1024 // model.config["context_length"])  # about 1,024 tokens, whose logits take 0.2 GB
    with evaluating(model):
        while items := list(itertools.islice(windows, at_once)):
            x, y = collate(items)
            loss += model(x.to(device), targets=y.to(device)).item()
            count += int((y != IGNORE_INDEX).sum())
    loss, count = sum_over_processes(loss, count)
    return loss / count


def classify(model: GPT2, dataset: CompletionDataset) -> dict[tuple[str, str], int]:
    """{(true, predicted): count} when each prompt gets the most probable of all the file's completions.

    Empty when there are fewer than 2 or more than 50 of them: that is no classification.
    """
    device, labels = next(model.parameters()).device, sorted({completion for _, completion in dataset.examples})
    if not 2 <= len(labels) <= 50:
        return {}
    confusion = dict.fromkeys(itertools.product(labels, labels), 0)
    with evaluating(model):
        for prompt, truth in dataset.examples:
            candidates = CompletionDataset([(prompt, label) for label in labels], model.config["context_length"])
            losses = [model(x[None].to(device), targets=y[None].to(device)).item() for x, y in candidates]
            confusion[truth, labels[losses.index(min(losses))]] += 1
    return confusion


def write_files(contents: dict[Path, bytes | Callable]) -> None:
    """Write files so that each is whole or as it was: beside their names first, down to the disk, then renamed.

    A content is bytes, or a function that writes into an open binary file. OSError if that fails.
    """
    parts = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            if path.is_dir():
                raise OSError("it is a folder")
            parts[path].unlink(missing_ok=True)
            with open(parts[path], "xb") as file:  # a new file: a link that waits there is not followed
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())  # else a power cut can keep the name and lose the bytes
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch.save makes of a disk that takes no more
        reason = (error.strerror or error) if isinstance(error, OSError) else "the disk is full or has failed"
        raise OSError(f"cannot write {path}: {reason}") from error  # `path` is where the loops had come to
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


def safe_load(path: Path, mmap: bool = True) -> dict:
    """The dict of plain values that is in a file of torch.save; nothing in it is run. ValueError if it is broken."""
    try:
        if is_zip := zipfile.is_zipfile(path):  # files from before 2020 are not
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or archive.testzip():
                    raise ValueError("its parts do not match their checksums")
        with warnings.catch_warnings(action="ignore"):  # what is wrong is said below, once
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except Exception as error:  # there is no end to what a broken file can make its readers raise
        if isinstance(error, OSError) and error.filename:  # this one is not broken, but missing or forbidden
            raise
        reason = str(error).partition("\n")[0][:100] or type(error).__name__
        reason = "not only tensors and plain values" if isinstance(error, pickle.UnpicklingError) else reason
        raise ValueError(f"{path} is damaged, or no file of torch.save that is safe to read ({reason})") from error


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values, whole or not at all. OSError if it cannot be written.

    `load_checkpoint` and `from_pretrained` need `config` and `model` (weights by name) in it.
    """
    write_files({Path(path): functools.partial(torch.save, {"format": CHECKPOINT_FORMAT, **checkpoint})})


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict:
    """A checkpoint of ours: `config`, `model` (weights by name) and maybe more. ValueError if it is none."""
    checkpoint = safe_load(Path(path), mmap)
    config, model = checkpoint.get("config"), checkpoint.get("model")
    if checkpoint.get("format") != CHECKPOINT_FORMAT or not isinstance(config, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} is no checkpoint of this program (its format should be {CHECKPOINT_FORMAT!r})")
    if odd := [key for key, value in checkpoint.items() if isinstance(value, Tensor)]:  # comparing one can raise
        raise ValueError(f"{path} holds a tensor for {odd[0]}")
    check_model_config(config, str(path))
    return checkpoint


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when the process ends, however it ends. ValueError if taken."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give --out another name")
    path, is_new = folder / ".lock", not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    no_link = getattr(os, "O_NOFOLLOW", 0)  # or a link in a stranger's folder could aim at any file
    with open(path, "a+", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | no_link)) as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # the run before removed it while we took it
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"process {file.read()} is training into {folder}: wait, or give another --out") from None
        try:
            file.truncate(0)
            print(os.getpid(), end="", file=file, flush=True)
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                path.unlink()
                if is_new:
                    folder.rmdir()  # works only if it is empty: then nothing was saved


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next step to use again.

    It would map each large tensor anew, and the system fill it with zeros page by page. Keeping them makes a step at
    124M parameters and 4 x 512 tokens 1.18 times as fast on two cores, and takes 0.9 GB more memory.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc: macOS, Windows, musl
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def adapt_model(model: GPT2, config: dict) -> GPT2:
    """The model itself, with the dropout rate of `config` and its context, which is the model's or shorter."""
    if config["context_length"] < model.config["context_length"]:  # drop the positions behind it
        kept = model.position_embedding.weight.detach()[: config["context_length"]].clone()
        model.position_embedding = nn.Embedding.from_pretrained(kept, freeze=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config["dropout_rate"]
    model.config = check_model_config(config)
    return model


class Run:
    """Everything that a training run is between two steps: data, model, optimizer, and how far it has come."""

    KEPT = ("config", "step", "tokens_seen", "best_val_loss", "metrics", "windows_per_step", "data_fingerprint")

    def __init__(self, config: dict, model: GPT2 | None):
        self.config, self.device = config, pick_device(config["device"])
        kind, self.precision = self.device.type, config["precision"]
        if self.precision == "auto":  # half precision pays on CUDA; bf16 has float32's range, but old cards lack it
            modern = kind == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
            self.precision = "bf16" if modern else "fp16" if kind == "cuda" else "fp32"
        # Half precision is for matrix products; weights, their gradients and sums stay in float32.
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.autocast = torch.autocast(kind, half) if half else contextlib.nullcontext()
        self.rank, self.world = join_processes(self.device)
        self.train_set, self.val_set = load_data(config)
        self.unit = "examples" if isinstance(self.train_set, CompletionDataset) else "tokens"
        with open(find_data(config["data"]), "rb") as file:
            self.data_fingerprint = f"{self.unit} {hashlib.file_digest(file, 'sha256').hexdigest()}"
        self.windows_per_step = config["batch_size"] * config["grad_accumulation"] * self.world
        self.steps_per_epoch = math.ceil(len(self.train_set) / self.windows_per_step)
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.end = min(self.total_steps, config["max_steps"] or self.total_steps)
        self.step, self.tokens_seen, self.best_val_loss, self.metrics = 0, 0, math.inf, []
        self.epoch, self.order = None, None  # an epoch, and the order of its windows
        self.best = None  # what the next save writes to best.pt
        self.is_new = True  # whether nothing is saved yet
        if kind == "cpu" and hasattr(os, "sysconf"):
            n_weights = config["emb_dim"] * (config["vocab_size"] + 12 * config["n_layers"] * config["emb_dim"])
            need, there = 16 * n_weights, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if need > there:  # weights, gradients and AdamW's two moments are 4 bytes each
                needs = f"training this model takes at least {need / 1e9:,.0f} GB of memory"
                raise ValueError(f"{needs}, and the machine has {there / 1e9:,.0f}: lower --emb_dim or --n_layers")
        torch.manual_seed(config["seed"])
        self.model = (adapt_model(model, config) if model else GPT2(config)).to(self.device).train()
        self.model.chunked_loss = config["chunked_loss"]
        self.optimizer = make_optimizer(self.model, config)
        # float16 has nothing between 0 and 6e-8: the scaler multiplies the loss, so that small gradients survive, and
        # by less after a step in which they passed 65,504 and became infinite. Only CUDA has it here.
        self.scaler = torch.amp.GradScaler(kind, enabled=kind == "cuda" and self.precision == "fp16")
        # Training may go through wrappers around the weights; saving and sampling use the plain model.
        self.network = torch.compile(self.model) if config["compile"] else self.model
        if self.world > 1:
            self.network = nn.parallel.DistributedDataParallel(self.network)
        if kind == "cpu":
            keep_freed_memory()
        if kind == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32

    def restore(self, last: dict, path: Path) -> None:
        """Continue from a checkpoint. ValueError if what is left would not be the same run."""
        if "optimizer" not in last:
            raise ValueError(f"{path} holds weights only: start a run from it with --init {path} and another --out")
        if last.get("data_fingerprint") != self.data_fingerprint:
            raise ValueError(f"{self.config['data']} is not the text that {path} was trained on: give --data that text")
        if (took := last.get("windows_per_step")) != self.windows_per_step:
            make = f"batch_size x grad_accumulation x {self.world} process(es) now make {self.windows_per_step}"
            raise ValueError(f"{path} took {took} windows a step; {make}: change one until they agree")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        try:
            for key, low, high in (("step", 0, 10**9), ("tokens_seen", 0, 10**18), ("best_val_loss", 0.0, math.inf)):
                check_value(key, last[key], low, high)
            for key, value in (item for row in last["metrics"] for item in row.items()):
                if value is not None:  # a gradient norm that was skipped
                    check_value(str(key), value, -1e300, 1e300)  # any finite number
            steps = [row["step"] for row in last["metrics"] if row["train_loss"] >= 0]  # KeyError if one has no loss
            if steps != list(range(1, last["step"] + 1)):
                raise ValueError("its metrics are not those of its steps")
            state = last["optimizer"]["state"]
            for i, parameter in enumerate(parameters):  # AdamW believes what it gets, and would write past its end
                shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                check_tensors(state.get(i, {}), shapes, f"AdamW's state of parameter {i}")
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
            if last["scaler"]:  # one that was off has no state
                self.scaler.load_state_dict(last["scaler"])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be continued: {str(error).partition(chr(10))[0]}") from error
        for name in ("step", "tokens_seen", "best_val_loss", "metrics"):
            setattr(self, name, last[name])
        self.is_new = False
        # A run that `max_steps` stopped was measured once more than one that went on. Forget that, so that the metrics
        # are the same; but not how good best.pt is.
        if self.step % (last["config"].get("eval_every") or self.steps_per_epoch):
            self.metrics[-1].pop("val_loss", None)
        if self.step >= self.end:
            more = "raise --max_steps" if self.step < self.total_steps else f"start anew with --init {path}"
            raise ValueError(f"{path} has done {self.step} steps, all that were asked for: to train on, {more}")

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The batches (x, y) that this process works through in optimizer step 1, 2, …

        Each epoch has its own order of windows, which follows from the seed. A step takes the next batch_size ×
        grad_accumulation × processes of them, or what is left, and each process its share: no overlap, no loss.
        """
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self.epoch != epoch:
            generator = torch.Generator().manual_seed(self.config["seed"] * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(len(self.train_set), generator=generator)
        order = self.order[position * self.windows_per_step : (position + 1) * self.windows_per_step]
        items = [self.train_set[i] for i in order[self.rank :: self.world].tolist()]
        if not items:  # fewer windows than processes: work on one that counts nothing, for the others wait for us
            x, y = self.train_set[int(order[0])]
            items = [(x, torch.full_like(y, IGNORE_INDEX))]
        size = self.config["batch_size"]
        return [collate(items[i : i + size]) for i in range(0, len(items), size)]

    def backward(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Gradients of the mean loss over all targets of a step, in all processes; that loss, and how many targets.

        Each batch's summed loss is divided by the targets of the whole step, not of the batch: so accumulated gradients
        equal those of one big batch, also when examples differ in length.
        """
        n_targets = int(sum_over_processes(sum(int((y != IGNORE_INDEX).sum()) for _, y in batches))[0])
        total = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(batches):
            if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            wait = self.world > 1 and i < len(batches) - 1  # exchange gradients once a step, with the last batch
            with self.network.no_sync() if wait else contextlib.nullcontext():
                with self.autocast:
                    loss = self.network(x, targets=y) / n_targets
                # DistributedDataParallel averages over the processes; times their number that is the sum.
                self.scaler.scale(loss * self.world).backward()
            total += loss.detach()
        return sum_over_processes(total)[0], n_targets

    def optimizer_step(self) -> dict:
        """One step of AdamW; what it measured. FloatingPointError, and no step, if loss or gradient is not finite."""
        started, step, config = time.perf_counter(), self.step + 1, self.config
        # Dropout follows from seed, step and process, made one number by factors that keep them apart. A resumed run
        # needs no random state, and nothing between two steps (an evaluation, a sample, the caller) can change the run.
        torch.manual_seed((config["seed"] * 1_000_003 + step) * 1_009 + self.rank)
        rate = learning_rate_at(step, config, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, n_targets = self.backward(self.batches(step))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config["grad_clip"] or math.inf).item()
        skipped = self.scaler.is_enabled() and not math.isfinite(norm)  # the scaler passes over such a step
        self.check_finite(loss, 0.0 if skipped else norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step, self.tokens_seen = step, self.tokens_seen + n_targets
        row = {"step": step, "epoch": (step - 1) // self.steps_per_epoch + 1, "tokens_seen": self.tokens_seen}
        row |= {"train_loss": loss, "learning_rate": rate, "grad_norm": None if skipped else norm}
        return row | {"tokens_per_second": round(n_targets / (time.perf_counter() - started), 1)}

    def validate(self, keep: bool) -> float:
        """The validation loss now. If it is the lowest yet and `keep` is true, the weights are kept for best.pt."""
        with self.autocast:
            loss = evaluate(self.model, self.val_set)
        self.check_finite(loss)
        if keep and loss < self.best_val_loss:
            self.best_val_loss = loss
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
            self.best = {"format": CHECKPOINT_FORMAT, "config": self.config, "step": self.step, "model": weights}
        return loss

    def check_finite(self, *numbers: float) -> None:
        """Raise FloatingPointError if the run has gone astray."""
        if not all(map(math.isfinite, numbers)):
            found = f"after step {self.step}, loss or gradient norm is {' and '.join(map(str, numbers))}"
            advice = "lower --learning_rate or raise --warmup_steps; what was saved before is unharmed"
            raise FloatingPointError(f"{found} at learning rate {self.optimizer.param_groups[0]['lr']:.3g}: {advice}")

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: once an epoch), and at the end, happens now."""
        return self.step % (every or self.steps_per_epoch) == 0 or self.step == self.end

    def save(self, folder: Path, plot: bool = False) -> bool:
        """Write what the run leaves. False, after a warning, if that fails: the next save tries again."""
        last = {"format": CHECKPOINT_FORMAT, "finished": self.step == self.end}
        last |= {name: getattr(self, name) for name in self.KEPT}
        last |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        files = {folder / "best.pt": functools.partial(torch.save, self.best)} if self.best else {}
        files[folder / "metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in self.metrics).encode()
        files[folder / "last.pt"] = functools.partial(torch.save, last)
        try:
            folder.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            write_files(files)
            if self.is_new:  # remove what the run before left and this save did not write
                for path in {folder / "best.pt", folder / "loss.png"} - files.keys():
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("step %s was not saved: %s", self.step, error)
            return False
        self.best, self.is_new = None, False
        if plot:  # by itself, so that no trouble with a picture costs a checkpoint
            try:
                write_files({folder / "loss.png": functools.partial(plot_losses, self.metrics)})
            except (OSError, ImportError) as error:
                log.warning("loss.png was not drawn: %s", error)
        return True


def plan_run(given: dict, folder: Path | None, init: GPT2 | str | Path | None, resume: bool, overwrite: bool):
    """What shall run: (config, model to go on with or None, checkpoint to continue or None).

    ValueError if `given` contradicts the checkpoint or the model, or if starting would lose an unfinished run.
    """
    last_file = folder / "last.pt" if folder else None
    if resume:
        if init is not None or overwrite:
            raise ValueError("resume continues a run; init and overwrite start one: leave out one of them")
        if last_file is None or not last_file.is_file():
            raise FileNotFoundError(f"there is no {last_file or 'folder'} to resume: start a run without --resume")
        checkpoint = load_checkpoint(last_file, mmap=False)  # the file will be replaced
        config = check_config(checkpoint["config"])
        for key in sorted(given.keys() & config.keys() - FREE_TO_CHANGE):
            if given[key] != config[key]:
                found = f"{last_file} was trained with {key} {config[key]!r}, which {given[key]!r} contradicts"
                raise ValueError(f"{found}: leave it out, or start anew with --init {last_file} and another --out")
        return check_config(config | given), model_from_tensors(config, checkpoint["model"], last_file), checkpoint
    if last_file and last_file.is_file() and not overwrite:
        try:
            unfinished = load_checkpoint(last_file).get("finished") is False
        except ValueError as error:
            raise ValueError(f"{error}; give --overwrite to replace it, or another --out") from error
        if unfinished:
            raise ValueError(f"{folder} holds an unfinished run: give --resume, --overwrite or another --out")
    if init is None:
        return check_config(given), None, None
    model = init if isinstance(init, GPT2) else GPT2.from_pretrained(init)
    if odd := [name for name, p in model.named_parameters() if p.dtype != torch.float32 or not p.requires_grad]:
        raise ValueError(f"the model's {odd[0]} is frozen or not float32: `model.float().requires_grad_()` mends it")
    config = check_config(model.config | {"dropout_rate": CONFIG["dropout_rate"]} | given)
    for key in MODEL_LIMITS.keys() - {"context_length", "dropout_rate"}:
        if config[key] != model.config[key]:
            raise ValueError(f"{key} {config[key]!r} contradicts the model's {model.config[key]!r}: leave it out")
    if config["context_length"] > model.config["context_length"]:
        raise ValueError(f"context_length is above the model's {model.config['context_length']}: lower it")
    return config, model, None


def describe(run: Run, folder: Path | None) -> None:
    """Say what a run will do."""
    config, sets = run.config, [part for part in (run.train_set, run.val_set) if part]
    counts = [len(part if run.unit == "examples" else part.token_ids) for part in sets]
    sizes = ", ".join(f"{count:,} {run.unit} to {use}" for count, use in zip(counts, ("train on", "validate")))
    log.info("data      %s: %s", config["data"], sizes)
    if run.unit == "examples" and (n_cut := sum(part.n_cut for part in sets)):
        log.info("          %s are longer than the context and lose their beginning", f"{n_cut:,}")
    shape = "{n_layers} layers, {n_heads} heads, width {emb_dim}, context {context_length}".format(**config)
    log.info("model     %s parameters: %s", f"{run.model.num_parameters():,}", shape)
    log.info("device    %s, %s%s", run.device, run.precision, f", {run.world} processes" if run.world > 1 else "")
    log.info("steps     %s to %s, %s an epoch", run.step + 1, run.end, run.steps_per_epoch)
    if folder and run.is_new and (folder / "last.pt").exists():
        log.info("saving    in %s; the first save replaces the run that is there", folder)


def train(config: dict | None = None, *, out: str | Path | None = "checkpoints", init: GPT2 | str | Path | None = None,
          resume: bool = False, overwrite: bool = False) -> Iterator[dict]:  # fmt: skip
    """Train, and yield one dict a step: its line of metrics.jsonl, `total_steps`, after each epoch a `sample` too.

    `config` holds what differs from `CONFIG`. `out` is the folder for last.pt, best.pt, metrics.jsonl and loss.png;
    None writes nothing. `init` is a model to start from: a `GPT2`, which is trained in place, or a name or path.
    `resume` continues `out`/last.pt, on the same machine bit for bit. Closing the generator between two steps saves
    first. Each step seeds PyTorch's random numbers anew.

    Losses are nats per token; `tokens_per_second` counts targets. ValueError and FileNotFoundError say what to change;
    FloatingPointError if a loss is not finite; OSError if the last save failed.
    """
    folder = Path(out) if out is not None else None
    saves = folder is not None and int(os.environ.get("RANK") or 0) == 0  # one process does
    with only_run_in(folder) if saves else contextlib.nullcontext():
        config, model, checkpoint = plan_run(config or {}, folder, init, resume, overwrite)
        run, saved = Run(config, model), True
        if checkpoint:
            run.restore(checkpoint, folder / "last.pt")
        describe(run, folder)
        del model, checkpoint  # what was read is in the run now
        while run.step < run.end:
            row = run.optimizer_step()
            if run.val_set and run.is_due(config["eval_every"]):
                row["val_loss"] = run.validate(keep=saves)
            run.metrics.append(row)
            if saves and (run.best or run.is_due(config["checkpoint_every"])):
                saved = run.save(folder, plot=run.step == run.end)
            extra = {"total_steps": run.end}
            if run.rank == 0 and run.is_due(0):
                extra["sample"] = sample_text(run.model, config["sample_prompt"])  # section 8
            try:
                yield row | extra
            except GeneratorExit:  # the caller stops here
                if saves and not run.save(folder, plot=True):
                    raise OSError(f"step {run.step} could not be saved in {folder}") from None
                raise
        if not saved:
            raise OSError(f"step {run.step}, the last, could not be saved in {folder}")


def plot_losses(metrics: list[dict], file) -> None:
    """Draw training and validation loss against the step, as PNG, into an open file."""
    from matplotlib.figure import Figure  # here, because only this needs it

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*((row["step"], row["train_loss"]) for row in metrics))
    axes.plot(steps, losses, color="#0072B2", label="training")
    if measured := [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]:
        axes.plot(*zip(*measured), "o--", color="#D55E00", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Loss while training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png")


# ---- 8. Generation: logits become probabilities, probabilities a token, the token the next input --------------------


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for sampling arguments that make no sense."""
    if temperature != 0 and not 1e-4 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or from 0.0001 on")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                             top_p: float | None = None) -> Tensor:  # fmt: skip
    """logits (B, V) -> probabilities (B, V) to draw from; each row for itself. ValueError for senseless arguments.

    Temperature below 1 sharpens, above 1 flattens. `top_k` keeps the k most probable tokens (Fan et al., 2018), `top_p`
    the fewest most probable ones that together reach p (Holtzman et al., 2020).
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:  # the limit: all on the most probable token
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0, so that no division overflows
    if top_k is not None and top_k < logits.size(-1):
        highest, where = logits.topk(top_k)  # (B, k) each
        logits = torch.full_like(logits, -math.inf).scatter(1, where, highest)  # exactly k, also among equals
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, where = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more probable tokens have together
        kept = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)  # never the first
        probabilities = torch.zeros_like(kept).scatter(1, where, kept / kept.sum(dim=-1, keepdim=True))
    return probabilities


def sample_next(logits: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:  # fmt: skip
    """logits (B, V) -> token ids (B, 1): the most probable at temperature 0, else drawn.

    `generator` is one on the CPU, or one for each row, which makes a row's draws the same alone and inside a batch.
    ValueError if a logit is NaN or infinite; some may be -inf, which is never drawn.
    """
    if not logits.amax(dim=-1).isfinite().all():  # NaN if one is NaN
        raise ValueError("the logits are NaN or infinite: the weights are damaged, or half precision overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Drawn on the CPU: the same on every device, and some devices' multinomial misbehaves.
    probabilities = next_token_probabilities(logits.float().cpu(), temperature, top_k, top_p)
    generators = generator if isinstance(generator, Sequence) else [generator] * len(probabilities)
    if len(generators) != len(probabilities):
        raise ValueError(f"{len(generators)} generators for {len(probabilities)} rows: give one, or one for each row")
    drawn = [torch.multinomial(row, 1, generator=each) for row, each in zip(probabilities, generators)]
    return torch.stack(drawn).to(logits.device)


def generate(model: GPT2, idx: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, eos_id: int | None = None, use_cache: bool = True,
             generator: torch.Generator | Sequence[torch.Generator] | None = None,
             on_token: Callable[[Tensor], None] | None = None) -> Tensor:  # fmt: skip
    """Continue the prompts idx (B, T) -> (B, T + new) on the model's device, new at most `max_new_tokens`.

    Ends early when every row has produced `eos_id`; rows that have are filled up with it. `on_token` gets each new
    column (B, 1). A prompt longer than the context is cropped to its end. When the context is full, the model goes on
    from its last half, read anew: so it can write without end, and result and window are the same with and without the
    cache. See `sample_next` for the rest. ValueError for arguments that make no sense.
    """
    check_sampling(temperature, top_k, top_p)
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"idx has the shape {tuple(idx.shape)}; it must be (batch, tokens), with at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if idx.min() < 0 or idx.max() >= model.config["vocab_size"]:
        found = f"{idx.min()} to {idx.max()}, where the model knows {model.config['vocab_size']} tokens"
        raise ValueError(f"idx holds ids from {found}: use the tokenizer that it was trained with")
    context, idx = model.config["context_length"], idx.to(next(model.parameters()).device)
    start, cache = max(0, idx.size(1) - context), None  # the model sees idx[:, start:]
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            if idx.size(1) - start > context:
                start, cache = idx.size(1) - max(1, context // 2), None
            unread = idx[:, start:] if cache is None else idx[:, -1:]  # by the cache
            cache = cache or (model.new_cache() if use_cache else None)
            logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
            new = sample_next(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if eos_id is not None:
                new = new.masked_fill(ended, eos_id)
                ended |= new == eos_id
            idx = torch.cat([idx, new], dim=1)
            if on_token:
                on_token(new)
            if eos_id is not None and ended.all():
                break
    return idx.clone()  # a tensor made in inference mode could not be trained on


def prompt_ids(prompt: str) -> Tensor:
    """A prompt as ids (1, T); an empty one is `<|endoftext|>`, after which GPT-2 begins a text."""
    tokenizer = load_tokenizer()
    return text_to_token_ids(prompt, tokenizer) if prompt else torch.tensor([[tokenizer.eot_token]])


def sample_text(model: GPT2, prompt: str) -> str:
    """The prompt and its greedy continuation, to see what a model has learnt."""
    tokenizer = load_tokenizer()
    ids = generate(model, prompt_ids(prompt), max_new_tokens=40, eos_id=tokenizer.eot_token)
    return token_ids_to_text(ids[:, 0 if prompt else 1 :], tokenizer).removesuffix("<|endoftext|>")


# ---- 9. Command line: results go to standard output, progress and notes to standard error ---------------------------

DEFAULT_MODEL = "checkpoints/last.pt"


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters, but for line ends and tabs, are written out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match.group()):02x}", text)


class Notes(logging.Handler):
    """Notes on standard error. On a terminal the next overwrites a live one; elsewhere one comes every 10 seconds."""

    def __init__(self):
        super().__init__()
        self.open_line, self.next_time = False, -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        text, live = printable(record.getMessage()), getattr(record, "live", False)
        on_terminal, now = sys.stderr.isatty(), time.monotonic()
        if live and not on_terminal and now < self.next_time:
            return
        if live:
            self.next_time = now + 10
        start = "\r\x1b[K" if self.open_line else ""
        self.open_line = live and on_terminal
        width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1 if on_terminal else None
        try:
            print(start + (text[:width] if self.open_line else text + "\n"), end="", file=sys.stderr, flush=True)
        except BrokenPipeError:  # nobody reads on
            raise
        except OSError:  # a full disk under a log file is no reason to stop
            pass


def run_train(args: argparse.Namespace) -> None:
    """Train, with a line a step. SystemExit 130 or 143 after Ctrl-C or SIGTERM, when the step is done and saved."""
    given = OPENAI_SIZES.get(args.model_size, {}) | {key: value for key, value in vars(args).items() if key in CONFIG}
    run = train(given, out=args.out, init=args.init, resume=args.resume, overwrite=args.overwrite)
    signals, first = [], None

    def stop(number, frame) -> None:
        """Let the first signal wait for the step to end; the second does not."""
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for row in run:
        if first is None:  # before the first step there was nothing to save
            started, first = time.monotonic(), row["step"]
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        text = f"step {row['step']}/{row['total_steps']}  epoch {row['epoch']}  loss {row['train_loss']:.3f}"
        text += f"  validation {row['val_loss']:.3f}" if "val_loss" in row else ""
        text += f"  {row['tokens_per_second']:,.0f} tokens/s"
        if row["step"] > first:
            left = round((time.monotonic() - started) / (row["step"] - first) * (row["total_steps"] - row["step"]))
            text += f"  {left // 60}:{left % 60:02} left"
        log.info(text, extra={"live": "val_loss" not in row})
        if "sample" in row:
            log.info("    %s", " ".join(row["sample"].split()))
        if sum_over_processes(len(signals))[0] and row["step"] < row["total_steps"]:  # all stop after the same step
            run.close()
            again = f"python gpt2.py train --resume --out {shlex.quote(args.out)}"
            log.info("saved step %s; continue with: %s", row["step"], again)
            raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    folder = Path(args.out)
    log.info("done      training loss %.3f; %s shows the way", row["train_loss"], folder / "loss.png")
    log.info("next      python gpt2.py generate --model %s", shlex.quote(str(folder / "last.pt")))


def run_generate(args: argparse.Namespace) -> None:
    """Print one text as it is made, or several when all are done."""
    draws = args.do_sample or args.top_k is not None or args.top_p is not None
    temperature = float(draws) if args.temperature is None else args.temperature
    check_sampling(temperature, args.top_k, args.top_p)
    for key, low, high in (("max_tokens", 0, 10**9), ("num_samples", 1, 1000), ("seed", 0, 2**31 - 1)):
        check_value(key, getattr(args, key), low, high)
    model, tokenizer = load_model(args), load_tokenizer()
    try:  # whatever the terminal's encoding, the bytes are taken for UTF-8
        given = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
        prompt = given.decode("utf-8")
        if args.prompt == "-":  # the line end that `echo` adds is not part of the text
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8 text") from None
    ids = prompt_ids(instruction_prompt(prompt) if args.instruct else prompt)
    if ids.size(1) > model.config["context_length"]:
        log.info("the prompt has %s tokens; the model sees the last %s", ids.size(1), model.config["context_length"])
    start = "" if args.instruct else prompt
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_samples)]
    write_on = functools.partial(
        generate, model, ids.expand(args.num_samples, -1), args.max_tokens, temperature=temperature, top_k=args.top_k,
        top_p=args.top_p, eos_id=tokenizer.eot_token, generator=generators,
    )  # fmt: skip

    def write(text: str) -> None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    if args.num_samples > 1:
        for i, row in enumerate(write_on()[:, ids.size(1) :].tolist()):
            text = token_ids_to_text(list(itertools.takewhile(tokenizer.eot_token.__ne__, row)), tokenizer)
            write(f"--- sample {i + 1} of {args.num_samples} ---\n{start}{text}\n")
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half a character until the rest comes

    def on_token(new: Tensor) -> None:
        if new.item() != tokenizer.eot_token:
            write(decoder.decode(token_bytes(new.item(), tokenizer)))

    write(start)
    try:
        write_on(on_token=on_token)
    finally:  # an error, too, stands on a line of its own
        write(decoder.decode(b"", final=True) + "\n")


def run_eval(args: argparse.Namespace) -> None:
    """Print loss, perplexity, bits per byte and tokens; for examples that are a classification, accuracy too."""
    path, model, tokenizer, confusion = find_data(args.data), load_model(args), load_tokenizer(), {}
    context = model.config["context_length"]
    stride = max(1, context // 2) if args.stride is None else args.stride
    check_value("stride", stride, 1, context)
    if path.suffix.lower() in FINE_TUNING:
        dataset = CompletionDataset(read_examples(path), context)
        if dataset.n_cut:
            log.info("%s examples are longer than the context and lose their beginning", f"{dataset.n_cut:,}")
        scored, confusion = torch.cat([y[y != IGNORE_INDEX] for _, y in dataset]), classify(model, dataset)
    else:
        ids, _ = load_text(path)
        if len(ids) < 2:
            raise ValueError(f"{path} is one token, which leaves none to predict: give more text")
        dataset, scored = GPTDataset(ids, min(context, len(ids) - 1)), ids[1:]
    loss = evaluate(model, dataset, stride=stride)
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: the model's weights are damaged, or half precision overflowed")
    n_bytes = sum(len(token_bytes(token, tokenizer)) for token in scored.tolist() if token != tokenizer.eot_token)
    bits = loss * len(scored) / math.log(2) / max(n_bytes, 1)
    report = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits, "tokens": len(scored)}
    if confusion:
        report["accuracy"] = sum(n for (true, predicted), n in confusion.items() if true == predicted) / len(dataset)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:<14}{value:>14,.4f}" if isinstance(value, float) else f"{name:<14}{value:>14,}")
    labels = sorted({true for true, _ in confusion})
    if 0 < len(labels) <= 10:
        width = max(len(repr(label)) for label in labels) + 2
        print("\nrows: true, columns: predicted\n" + " " * width + "".join(f"{label!r:>{width}}" for label in labels))
        for true in labels:
            print(f"{true!r:<{width}}" + "".join(f"{confusion[true, label]:>{width},}" for label in labels))


def run_export(args: argparse.Namespace) -> None:
    """Write a Hugging Face folder."""
    load_model(args).save_pretrained(args.folder)
    log.info("wrote %s: config.json, model.safetensors and the tokenizer's files", args.folder)


def load_model(args: argparse.Namespace) -> GPT2:
    """The MODEL of a command, on its device."""
    if args.model == DEFAULT_MODEL and not Path(args.model).exists():
        ways = "make one with `python gpt2.py train`, or take OpenAI's with `--model gpt2`"
        raise FileNotFoundError(f"there is no {args.model}: {ways}")
    model = GPT2.from_pretrained(args.model).to(pick_device(getattr(args, "device", "cpu")))
    if args.command != "export" and (size := model.config["vocab_size"]) < CONFIG["vocab_size"]:
        raise ValueError(f"{args.model} has a vocabulary of {size} tokens, GPT-2's tokenizer one of 50257: use another")
    return model


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, each with the command that was typed and its help."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but with nothing left over: a command would leave that to the whole program to complain of."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = "; options are written with _" if re.match(r"--\w+-\w", unknown[0]) else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def make_parser() -> Parser:
    """The four commands. `train` takes every key of `CONFIG`; the comment beside the key is its help."""
    parser = Parser(prog="gpt2.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(name: str, run: Callable, text: str) -> Callable:
        """Add a command, with the options that several share; what adds its own options."""
        defaults = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=text, description=text, formatter_class=defaults, allow_abbrev=False)
        command.set_defaults(run=run, command=name)
        if name != "train":
            choices = f"a checkpoint, a Hugging Face folder, {', '.join(OPENAI_SIZES)}"
            command.add_argument("--model", default=DEFAULT_MODEL, help=choices)
        if name in ("generate", "eval"):
            command.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, mps, xpu")
        return command.add_argument

    add = add_command("train", run_train, "train or fine-tune a model")
    add("--model_size", choices=OPENAI_SIZES, help="OpenAI's size and context in one word; other options win over it")
    add("--init", metavar="MODEL", help="start from a checkpoint, a Hugging Face folder, gpt2, gpt2-medium, ...")
    add("--resume", action="store_true", help="continue the run in --out exactly")
    add("--overwrite", action="store_true", help="replace an unfinished run in --out")
    add("--out", metavar="DIR", default="checkpoints", help="folder for what the run leaves")
    comments = dict(re.findall(r'^    "(\w+)": .+,  # (.+)$', Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    for key, value in CONFIG.items():
        kind = {"type": type(value), "metavar": {int: "N", float: "X", str: "TEXT"}.get(type(value))}
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else kind
        # SUPPRESS: only what was given is in the result. The help says the default all the same.
        add(f"--{key}", default=argparse.SUPPRESS, help=f"{comments[key]} (default: {value})", **kind)

    add = add_command("generate", run_generate, "continue a text")
    add("prompt", nargs="?", default=CONFIG["sample_prompt"], metavar="PROMPT", help="text; - is standard input")
    add("--max_tokens", type=int, default=100, metavar="N", help="most tokens to write")
    add("--do_sample", action="store_true", help="draw tokens, not always the most probable; the next three imply it")
    add("--temperature", type=float, metavar="X", help="below 1 safer, above 1 wilder; 1 if not given")
    add("--top_k", type=int, metavar="K", help="draw from the K most probable tokens")
    add("--top_p", type=float, metavar="P", help="draw from the most probable tokens that together reach P")
    add("--num_samples", type=int, default=1, metavar="N", help="texts; alike unless drawn")
    add("--seed", type=int, default=42, metavar="N", help="text i is drawn with seed N + i")
    add("--instruct", action="store_true", help="give the prompt as an instruction, print the response only")

    add = add_command("eval", run_eval, "measure a model on a text or on examples")
    add("--data", metavar="FILE", default=CONFIG["data"], help="UTF-8 text, or .jsonl/.json examples")
    add("--stride", type=int, metavar="N", help="tokens between windows; else half the context")
    add("--json", action="store_true", help="print one JSON object")

    add = add_command("export", run_export, "write a model as a Hugging Face folder")
    add("folder", metavar="FOLDER", help="where to write it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Its exit status: 0, 2 after one line that says what is wrong, 130, 141 or 143 when interrupted."""
    for name in ("stdin", "stdout", "stderr"):  # a stream that the shell closed
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")  # where a character cannot be shown, its code can
    args = make_parser().parse_args(arguments)
    notes, status = Notes(), 2
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    if int(os.environ.get("RANK") or 0) == 0:
        log.addHandler(notes)
        log.setLevel(logging.INFO)
    else:  # of several processes, the first speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    try:
        args.run(args)
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except BrokenPipeError:  # the reader has left, as `| head -1` does
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (ValueError, OSError, ArithmeticError) as error:  # the last for a loss that is not finite
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            message = "out of memory: lower --batch_size (raise --grad_accumulation), --context_length or --num_samples"
        elif type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = str(error).partition("\n")[0]
            message = f"torch.compile does not work here: leave out --compile, or install what it needs ({reason})"
        else:
            raise
    finally:
        log.removeHandler(notes)
        for number, handler in handlers:
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)  # a notebook goes on after this
    with contextlib.suppress(OSError):  # nowhere to say it
        start = "\n" * notes.open_line + f"gpt2.py {args.command}: error:"  # never behind a live line
        print(start, printable(" ".join(message.split())), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
