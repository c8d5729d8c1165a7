"""GPT-2 from scratch in one file: attention, the model, OpenAI's weights, training, sampling.

    python gpt2.py train                              train a small GPT-2 on the-verdict.txt
    python gpt2.py generate "I had always thought"    let it write on
    python gpt2.py eval --data FILE                   measure a model on a text
    python gpt2.py export FOLDER                      write a folder that `transformers` reads

Read it from the top. Each section uses only what stands above it, except where a sentence says so:

    1 attention       one head step by step, then causal, then all heads at once with a cache
    2 block           layer normalisation, the feed-forward network, the residual stream
    3 model           embeddings, blocks, and the head that shares the embedding's weights
    4 pretrained      OpenAI's four sizes; Hugging Face folders in and out
    5 data            text to tokens, windows of tokens, examples for fine-tuning
    6 CONFIG          every setting of a run
    7 training        schedule, optimizer, evaluation, checkpoints, the loop
    8 generation      from logits to a token, from a prompt to a text
    9 command line

The letters in shapes: B batch, T tokens (time), C embedding width, H heads, D width of a head (C / H),
V vocabulary, L layers. `# (B, T, C)` beside a line is the shape of what the line makes.

Sources: "Attention Is All You Need" (Vaswani et al., 2017), "Language Models are Unsupervised Multitask
Learners" (Radford et al., 2019; GPT-2), and the code that OpenAI released with it (openai/gpt-2, src/model.py).
"""

import argparse
import codecs
import contextlib
import ctypes
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import urllib.error
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    import fcntl  # file locks, where the system has them
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
log = logging.getLogger("gpt2")


# ---------------------------------------------------------------------------------------------------------------
# 1. Attention. Every token looks at other tokens and takes a weighted average of what they offer.
# ---------------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """One attention head without a mask: every token sees every token.

    softmax(Q Kᵀ / √D) V, "Attention Is All You Need", section 3.2.1.  x (B, T, d_in) -> (B, T, d_out).
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token looks for
        self.key = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token can be found by
        self.value = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token hands over

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (row) takes from each token (column). x (B, T, d_in) -> (B, T, T), rows sum to 1."""
        queries, keys = self.query(x), self.key(x)  # (B, T, D) each
        scores = queries @ keys.transpose(1, 2)  # (B, T, T): a dot product for each pair of tokens
        # A dot product of D unit-variance terms has variance D. Undo that, or softmax saturates and stops learning.
        scores = scores / math.sqrt(keys.size(-1))
        return torch.softmax(scores, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class CausalAttention(nn.Module):
    """One head that cannot see the future, so that predicting the next token is not copying it.

    x (B, T, d_in) -> (B, T, d_out), T at most `context_length`. New against `SelfAttention`: the mask and dropout.
    """

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout_rate: float, qkv_bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout_rate)  # new
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)  # column > row
        self.register_buffer("future", future, persistent=False)  # new

    def weights(self, x: Tensor) -> Tensor:
        """x (B, T, d_in) -> (B, T, T): rows sum to 1, and row t is exactly zero after column t."""
        tokens = x.size(1)
        queries, keys = self.query(x), self.key(x)  # (B, T, D) each
        scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # (B, T, T)
        scores = scores.masked_fill(self.future[:tokens, :tokens], -math.inf)  # new: exp(-inf) = 0
        return torch.softmax(scores, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.dropout(self.weights(x))  # new: forget some links while training
        return weights @ self.value(x)  # (B, T, D)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out) -> (..., out): `F.linear`, faster for few rows on a CPU.

    Generation multiplies one token's vector at a time, and then the time is that of reading the weights. PyTorch
    reads them with one core. Cut into pieces, the same product is a batch that all cores share: measured on two
    cores, 24 to 31 GB/s instead of 15. The cost is nothing; above eight rows `F.linear` is the better one.
    """
    rows = x.numel() // x.size(-1)
    if torch.is_grad_enabled() or x.device.type != "cpu" or rows > 8 or weight.numel() < 100_000:
        return F.linear(x, weight, bias)
    pieces = 4 * torch.get_num_threads()
    whole = weight.size(0) // pieces * pieces  # 50,257 outputs do not divide: the rest is a small product
    columns = x.reshape(rows, -1).t()  # (in, rows)
    cut = weight[:whole].view(pieces, whole // pieces, -1)  # (pieces, out / pieces, in)
    out = torch.bmm(cut, columns.expand(pieces, -1, -1)).view(whole, rows)  # (out, rows)
    if whole < weight.size(0):
        out = torch.cat([out, weight[whole:] @ columns])
    out = out.t().reshape(*x.shape[:-1], -1)  # (..., out)
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class KeyValueCache:
    """The keys and values of the tokens that one attention layer has read: `length` of `context_length` places.

    A token's key and value never change once computed, because it sees no later token. So a model that writes
    token by token keeps them, and computes the new token only.
    """

    def __init__(self, context_length: int):
        self.context_length, self.length = context_length, 0
        self.keys = self.values = None  # (B, H, context_length, D), made at the first append

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add T tokens' keys and values (B, H, T, D) and return all: (B, H, length, D) each. ValueError when full."""
        start, end = self.length, self.length + keys.size(2)
        if end > self.context_length:
            raise ValueError(f"the cache holds {self.context_length} tokens; {end} were given: start a new one")
        if self.keys is None:
            shape = (*keys.shape[:2], self.context_length, keys.size(3))
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class MultiHeadAttention(nn.Module):
    """H causal heads at once: one matrix makes all queries, keys and values, one mixes the heads' results.

    Equal to H `CausalAttention` heads side by side and an output projection. `config` needs `emb_dim`, `n_heads`,
    `dropout_rate` and `qkv_bias`. x (B, T, C) -> (B, T, C). With a `KeyValueCache`, x continues what the cache holds.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["emb_dim"]
        self.n_heads, self.dropout_rate = config["n_heads"], config["dropout_rate"]
        self.query_key_value = Linear(width, 3 * width, bias=config["qkv_bias"])
        self.projection = Linear(width, width)
        self.dropout = nn.Dropout(self.dropout_rate)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.query_key_value(x).view(batch, tokens, 3, self.n_heads, -1)  # (B, T, 3, H, D)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, H, S, D): S - T tokens from before, then these T
        # One rule with and without a cache: query t stands at position S - T + t and sees keys up to there. Without a
        # past (S = T) the kernel has that rule built in; a single query sees everything; else the mask says it.
        seen = keys.size(2)
        mask = None
        if 1 < tokens < seen:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=x.device).tril(diagonal=seen - tokens)
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout_rate if self.training else 0.0,
            is_causal=tokens == seen and tokens > 1,
        )  # (B, H, T, D); the fused kernel never stores the (T, S) weights
        out = out.transpose(1, 2).reshape(batch, tokens, width)  # (B, T, C): the heads side by side
        return self.dropout(self.projection(out))


# ---------------------------------------------------------------------------------------------------------------
# 2. Block. Attention moves information between tokens; the feed-forward network works on each token alone.
# ---------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Give each token's vector mean 0 and variance 1, then a learned scale and shift. x (..., C) -> (..., C).

    scale · (x - mean) / √(variance + 1e-5) + shift, with the biased variance (Ba et al., 2016). `F.layer_norm` is
    that formula in one pass over memory.
    """

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))  # scale
        self.bias = nn.Parameter(torch.zeros(emb_dim))  # shift

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class FeedForward(nn.Module):
    """Widen each token's vector four times, bend it, narrow it again. x (B, T, C) -> (B, T, C).

    GELU in the tanh form that OpenAI's model.py uses: ½x(1 + tanh(√(2/π)(x + 0.044715x³))). `config` needs `emb_dim`
    and `dropout_rate`.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["emb_dim"]
        self.expand = Linear(width, 4 * width)
        self.projection = Linear(4 * width, width)
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.projection(hidden))  # (B, T, C)


class TransformerBlock(nn.Module):
    """Two steps, each added to the residual stream. x (B, T, C) -> (B, T, C).

    The norm stands before each step, not after (GPT-2, section 2.3), so that x runs through all blocks untouched but
    for additions, and gradients run back the same way.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.norm1, self.attention = LayerNorm(config["emb_dim"]), MultiHeadAttention(config)
        self.norm2, self.feed_forward = LayerNorm(config["emb_dim"]), FeedForward(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------
# 3. Model. Token and position vectors go in at the bottom; a score for each of V next tokens comes out at the top.
# ---------------------------------------------------------------------------------------------------------------

MODEL_LIMITS = {  # the keys that make a model: type, least and greatest value
    "vocab_size": (int, 1, 1_000_000),
    "context_length": (int, 1, 1_000_000),
    "emb_dim": (int, 1, 65_536),
    "n_heads": (int, 1, 1_024),
    "n_layers": (int, 1, 1_000),
    "dropout_rate": (float, 0.0, 0.99),
    "qkv_bias": (bool, False, True),
}


def check_values(config: dict, limits: dict[str, tuple]) -> None:
    """Raise ValueError unless `config` has every key of `limits` with a value of its type and within its bounds."""
    for key, (kind, low, high) in limits.items():
        if key not in config:
            raise ValueError(f"the config has no {key}; it needs {', '.join(limits)}")
        value = config[key]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)) or not low <= value <= high:
            name = {int: "a whole number", float: "a number", bool: "a truth value", str: "a text"}[kind]
            raise ValueError(f"{key} is {str(value)[:60]!r}; it must be {name} from {low} to {high}")


class GPT2(nn.Module):
    """The GPT-2 language model (Radford et al., 2019, section 2.3).

    `config` needs the keys of `MODEL_LIMITS` and may have others. ValueError says which value is out of bounds.
    """

    def __init__(self, config: dict):
        super().__init__()
        check_values(config, MODEL_LIMITS)
        if config["emb_dim"] % config["n_heads"]:
            raise ValueError(
                f"emb_dim {config['emb_dim']} does not divide into n_heads {config['n_heads']} equal heads; "
                f"choose a multiple"
            )
        self.config = {key: config[key] for key in MODEL_LIMITS}
        self.token_embedding = nn.Embedding(config["vocab_size"], config["emb_dim"])  # (V, C), also the output head
        self.position_embedding = nn.Embedding(config["context_length"], config["emb_dim"])  # learned, not sines
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config["n_layers"]))
        self.final_norm = LayerNorm(config["emb_dim"])
        self.chunked_loss = False  # see CONFIG
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights of standard deviation 0.02, zero biases (OpenAI's model.py).

        The two projections of each block that write into the residual stream get 0.02 / √(2L): 2L of them add up,
        and the stream should not grow with depth (GPT-2, section 2.3).
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (MultiHeadAttention, FeedForward)):
            nn.init.normal_(module.projection.weight, std=0.02 / math.sqrt(2 * self.config["n_layers"]))

    def forward(
        self,
        idx: Tensor,
        cache: list[KeyValueCache] | None = None,
        last_only: bool = False,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Token ids idx (B, T), long -> logits (B, T, V): row t scores every candidate for token t + 1.

        `cache` (from `new_cache`) holds the tokens before idx and takes idx in. `last_only` gives (B, 1, V).
        With `targets` (B, T) the result is instead the summed cross-entropy in nats; a target of -100 is not counted.
        ValueError when the tokens do not fit the context.
        """
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config["context_length"]:
            raise ValueError(f"{end} tokens do not fit context_length {self.config['context_length']}: give fewer")
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
        if self.chunked_loss:
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="compact")
            return F.linear_cross_entropy(x, head, targets, reduction="sum", options=options)
        return F.cross_entropy(linear(x, head), targets, reduction="sum")

    def new_cache(self) -> list[KeyValueCache]:
        """An empty key/value cache, one for each layer."""
        return [KeyValueCache(self.config["context_length"]) for _ in self.blocks]

    def num_parameters(self) -> int:
        """How many numbers are trained. The head has none of its own."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT2":
        """A model from a checkpoint of ours, a Hugging Face folder, or OpenAI's `gpt2`, `gpt2-medium`, `-large`, `-xl`.

        It is in eval mode, in float32, on the CPU. A file or folder of that name comes before OpenAI's size.
        FileNotFoundError if there is no such thing, ValueError if it cannot be used, OSError if a download fails.
        """
        path = Path(name_or_path)
        if path.is_dir():
            return load_hugging_face(path).eval()
        if path.is_file():
            checkpoint = load_checkpoint(path)
            return model_from_tensors(checkpoint["config"], checkpoint["model"], path).eval()
        if str(name_or_path) in OPENAI_SIZES:
            return load_openai(str(name_or_path)).eval()
        raise FileNotFoundError(
            f"there is no model {str(name_or_path)!r}: give a checkpoint file, a Hugging Face folder or one of "
            f"{', '.join(OPENAI_SIZES)}"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder` in Hugging Face format: weights, config and tokenizer, as `transformers` reads them."""
        save_hugging_face(self, Path(folder))


# ---------------------------------------------------------------------------------------------------------------
# 4. Pretrained. The same model under other names: OpenAI's four sizes in the layout that Hugging Face publishes.
# ---------------------------------------------------------------------------------------------------------------

OPENAI_SIZES = {  # GPT-2, table 2; the parameter counts are those of the released files
    "gpt2": {"n_layers": 12, "n_heads": 12, "emb_dim": 768},  # 124,439,808
    "gpt2-medium": {"n_layers": 24, "n_heads": 16, "emb_dim": 1024},  # 354,823,168
    "gpt2-large": {"n_layers": 36, "n_heads": 20, "emb_dim": 1280},  # 774,030,080
    "gpt2-xl": {"n_layers": 48, "n_heads": 25, "emb_dim": 1600},  # 1,557,611,200
}
for _size in OPENAI_SIZES.values():
    _size.update(vocab_size=50257, context_length=1024, qkv_bias=True)

HUGGING_FACE_NAMES = [  # ours, theirs; in both, {} is the number of the block
    ("token_embedding", "wte"),
    ("position_embedding", "wpe"),
    ("blocks.{}.norm1", "h.{}.ln_1"),
    ("blocks.{}.attention.query_key_value", "h.{}.attn.c_attn"),
    ("blocks.{}.attention.projection", "h.{}.attn.c_proj"),
    ("blocks.{}.norm2", "h.{}.ln_2"),
    ("blocks.{}.feed_forward.expand", "h.{}.mlp.c_fc"),
    ("blocks.{}.feed_forward.projection", "h.{}.mlp.c_proj"),
    ("final_norm", "ln_f"),
]
TRANSPOSED = re.compile(r"\.c_(attn|proj|fc)\.weight$")  # stored input × output, as OpenAI's conv1d had them
NOTHING_NEW = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")  # the causal mask, which old files carry

HUGGING_FACE_CONFIG = {  # what a GPT-2 config.json must say, or leave out, for this file to compute the same
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
CONFIG_NAMES = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd"}
CONFIG_NAMES |= {"n_heads": "n_head", "n_layers": "n_layer", "dropout_rate": "resid_pdrop"}
SAFETENSORS_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SAFETENSORS_TYPES |= {"BOOL": torch.bool, "U8": torch.uint8, "I64": torch.int64}  # masks in old files


def hugging_face_names(model: GPT2) -> dict[str, str]:
    """Every parameter of `model`, by our name -> their name, without the `transformer.` that may stand before it."""
    pairs = [(f"{ours}.{end}", f"{theirs}.{end}") for ours, theirs in HUGGING_FACE_NAMES for end in ("weight", "bias")]
    blocks = range(model.config["n_layers"])
    table = {ours.format(i): theirs.format(i) for ours, theirs in pairs for i in blocks}
    return {name: table[name] for name in model.state_dict()}


def model_from_tensors(config: dict, tensors: dict[str, Tensor], source: str | Path) -> GPT2:
    """A model with these weights, by our names. ValueError names the tensor that is missing, wrong or not finite.

    The model is laid out on the meta device, without memory, and takes one tensor after the other: at no time is there
    more than one copy of the weights beside what `tensors` maps from a file.
    """
    with torch.device("meta"):
        model = GPT2(config)
    wanted = model.state_dict()
    if unknown := tensors.keys() - wanted.keys():
        raise ValueError(f"{source}: the tensor {min(unknown)} has no place in this model")
    weights = {}
    for name, place in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{source}: the tensor {name} is missing")
        if tensor.shape != place.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{source}: the tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"the config asks for floats of shape {tuple(place.shape)}"
            )
        weights[name] = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{source}: the tensor {name} has values that are not finite; get a clean copy of the file")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, mapped from the file and not yet read. ValueError on any broken layout.

    The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, raw tensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut short or no safetensors file: {size} bytes, header of {length} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted((*entry["data_offsets"], name, entry) for name, entry in header.items())
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path} has a broken header: {type(error).__name__}: {error}") from error
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)
    tensors, end = {}, 0
    for start, stop, name, entry in entries:
        dtype, shape = SAFETENSORS_TYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise ValueError(f"{path}: the tensor {name} is of type {entry.get('dtype')!r}, which is not supported")
        if not isinstance(shape, list) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in [*shape, start, stop]):
            raise ValueError(f"{path}: the tensor {name} has the shape {shape!r} and offsets {start!r}, {stop!r}")
        # Each tensor begins where the one before ends: no gap, no overlap, nothing outside the file.
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
            raise ValueError(f"{path}: the tensor {name} {shape} does not fit its bytes {start} to {stop} of {size}")
        piece = data[8 + length + start : 8 + length + stop]
        piece = piece if piece.storage_offset() % dtype.itemsize == 0 else piece.clone()
        tensors[name], end = piece.view(dtype).view(shape), stop
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size} bytes; its header describes {8 + length + end}: it is damaged or cut short")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError says what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def load_hugging_face(folder: Path) -> GPT2:
    """The GPT-2 in a Hugging Face folder. ValueError names what this file would compute wrongly, or cannot find."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; a Hugging Face folder needs one")
    theirs = read_json(folder / "config.json")
    for key, needed in HUGGING_FACE_CONFIG.items():
        value = theirs.get(key, needed)
        if value != needed and not (key == "n_inner" and value == 4 * theirs.get("n_embd", 0)):
            raise ValueError(f"{folder / 'config.json'}: {key} is {value!r}; only {needed!r} is supported")
    theirs = {"resid_pdrop": 0.1, **theirs}
    if missing := [key for key in CONFIG_NAMES.values() if key not in theirs]:
        raise ValueError(f"{folder / 'config.json'} has no {missing[0]}")
    config = {ours: theirs[key] for ours, key in CONFIG_NAMES.items()} | {"qkv_bias": True}

    index = folder / "model.safetensors.index.json"
    tensors = {}
    if (folder / "model.safetensors").is_file():
        tensors = read_safetensors(folder / "model.safetensors")
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise ValueError(f"{index} has no weight_map of file names in this folder")
        for shard in sorted(set(shards.values())):
            tensors |= read_safetensors(folder / shard)
    elif (folder / "pytorch_model.bin").is_file():
        tensors = safe_load(folder / "pytorch_model.bin")
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
            raise ValueError(f"{folder / 'pytorch_model.bin'} does not hold tensors by name")
    else:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    return from_hugging_face(config, tensors, folder)


def from_hugging_face(config: dict, tensors: dict[str, Tensor], source: str | Path) -> GPT2:
    """A model from tensors under their names: each must be used, but for masks and a head equal to `wte.weight`."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not NOTHING_NEW.fullmatch(name)}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight; a head of its own is not supported")
    with torch.device("meta"):
        table = {theirs: ours for ours, theirs in hugging_face_names(GPT2(config)).items()}
    ours = {}
    for name, tensor in tensors.items():
        flip = TRANSPOSED.search(name) and tensor.dim() == 2
        ours[table.get(name, name)] = tensor.t() if flip else tensor
    return model_from_tensors(config, ours, source)


def load_openai(name: str) -> GPT2:
    """One of OpenAI's four models, downloaded once into the torch hub cache. OSError says why it could not be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"openai-community--{name}.safetensors"
    if not path.is_file():
        base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        url = f"{base.rstrip('/')}/openai-community/{name}/resolve/main/model.safetensors"
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("downloading %s", url)
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            read_safetensors(part)  # its length must be what its header says: half a file never takes the name
            os.replace(part, path)
        except (OSError, ValueError, urllib.error.URLError) as error:
            reason = str(error).replace(str(part), "what arrived")
            raise OSError(f"{url} could not be downloaded: {reason}; check the network, or HF_ENDPOINT") from error
        finally:
            part.unlink(missing_ok=True)
    return from_hugging_face({**OPENAI_SIZES[name], "dropout_rate": 0.1}, read_safetensors(path), path)


def save_hugging_face(model: GPT2, folder: Path) -> None:
    """Write what `transformers`, llama.cpp's converter and vLLM take for a GPT-2. Each file is whole or not there."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    context, width = model.config["context_length"], model.config["emb_dim"]
    config = {"architectures": ["GPT2LMHeadModel"], **HUGGING_FACE_CONFIG}
    config |= {theirs: model.config[ours] for ours, theirs in CONFIG_NAMES.items()}
    config |= {"n_ctx": context, "attn_pdrop": config["resid_pdrop"], "embd_pdrop": config["resid_pdrop"]}
    config |= {"initializer_range": 0.02, "bos_token_id": 50256, "eos_token_id": 50256, "torch_dtype": "float32"}

    weights = model.state_dict()
    names = {ours: f"transformer.{theirs}" for ours, theirs in hugging_face_names(model).items()}
    if not model.config["qkv_bias"]:  # theirs always has one: zeros say the same
        for i in range(model.config["n_layers"]):
            ours = f"blocks.{i}.attention.query_key_value.bias"
            weights[ours], names[ours] = torch.zeros(3 * width), f"transformer.h.{i}.attn.c_attn.bias"
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for ours, theirs in names.items():
        shape, end = list(weights[ours].shape), offset + 4 * weights[ours].numel()
        shape = shape[::-1] if TRANSPOSED.search(theirs) else shape
        header[theirs] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end

    def write_weights(file) -> None:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors then begin at a multiple of 8
        file.write(len(text).to_bytes(8, "little") + text)
        for ours, theirs in names.items():
            tensor = weights[ours].detach().float().cpu()
            tensor = tensor.t() if TRANSPOSED.search(theirs) else tensor
            file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)

    special = "<|endoftext|>"
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False}
    tokenizer |= {"bos_token": special, "eos_token": special, "unk_token": special}
    merges, vocabulary = read_vocabulary_files()
    folder.mkdir(parents=True, exist_ok=True)
    text = {"config.json": config, "tokenizer_config.json": tokenizer}
    contents = {folder / name: (json.dumps(value, indent=2) + "\n").encode() for name, value in text.items()}
    contents |= {folder / "merges.txt": merges, folder / "vocab.json": vocabulary}
    writers = {path: functools.partial(lambda value, file: file.write(value), value) for path, value in contents.items()}
    write_files({folder / "model.safetensors": write_weights, **writers})


# ---------------------------------------------------------------------------------------------------------------
# 5. Data. Text becomes tokens; tokens become pairs of input and target, the target one token ahead.
# ---------------------------------------------------------------------------------------------------------------

IGNORED = -100  # a target that no loss counts
END_OF_TEXT = "<|endoftext|>"
# Cutting a text before white space that follows something else changes no token: GPT-2's pattern never joins them.
SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
LIVE = {"live": True}  # marks a note that the next one may overwrite on a terminal


def use_own_vocabulary() -> None:
    """Let tiktoken find the vocabulary beside this file, unless the user has named a folder of their own."""
    if (HERE / ".tiktoken").is_dir() and not {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & os.environ.keys():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / ".tiktoken")


@functools.lru_cache(maxsize=1)
def load_tokenizer():
    """GPT-2's byte-pair encoding, a `tiktoken.Encoding`. OSError if it is neither at hand nor to be downloaded."""
    import tiktoken  # here, because `--help` should not wait for it

    use_own_vocabulary()
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise OSError(f"GPT-2's vocabulary could not be read or downloaded ({error}); keep .tiktoken/ beside gpt2.py") from error


def read_vocabulary_files() -> tuple[bytes, bytes]:
    """OpenAI's vocab.bpe and encoder.json, which Hugging Face calls merges.txt and vocab.json."""
    from tiktoken.load import read_file_cached

    load_tokenizer()  # checks both files against their hashes, and fetches what is missing
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    return read_file_cached(address + "vocab.bpe"), read_file_cached(address + "encoder.json")


def text_to_token_ids(text: str, tokenizer) -> Tensor:
    """A prompt as token ids (1, T). `<|endoftext|>` in it is ordinary text."""
    return torch.tensor([tokenizer.encode_ordinary(text)], dtype=torch.long)


def token_bytes(token_id: int, tokenizer) -> bytes:
    """The bytes of one token; those of � for an id beyond the vocabulary, which a padded head can produce."""
    return tokenizer.decode_single_token_bytes(token_id) if token_id < tokenizer.n_vocab else "�".encode()


def token_ids_to_text(ids: Tensor | Sequence[int], tokenizer) -> str:
    """Token ids (T) or (1, T) as text. Bytes that are no whole character become �."""
    ids = torch.as_tensor(ids).flatten().tolist()
    return b"".join(token_bytes(i, tokenizer) for i in ids).decode("utf-8", errors="replace")


def read_blocks(path: Path, start: int = 0, stop: float = math.inf) -> Iterator[str]:
    """The characters from `start` to `stop` of a UTF-8 file, a million at a time. ValueError says where it is not UTF-8."""
    position = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
            while position < stop and (block := file.read(1 << 20)):
                part = block[max(start - position, 0) : int(min(stop - position, len(block)))]
                position += len(block)
                if part:
                    yield part
    except UnicodeDecodeError:
        with open(path, "rb") as file:  # no byte of a UTF-8 character is a line end, so lines can be tried alone
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = f"line {number}, byte {error.start + 1}: 0x{line[error.start]:02x}"
                    raise ValueError(f"{path} is not UTF-8 text ({where}); convert it to UTF-8") from None


def tokenize_file(path: Path, start: int, stop: int, tokenizer) -> Tensor:
    """The tokens of the characters `start` to `stop` of a file, as uint16: two bytes a token.

    The text is read and tokenised in pieces by all cores, so memory holds the tokens and a few megabytes of text.
    """
    tokens, pieces, rest, done = array("H"), [], [], 0
    for block in itertools.chain(read_blocks(path, start, stop), [None]):
        cut = SAFE_CUT.match(block) if block else None
        if cut or block is None:
            pieces.append("".join(rest) + (cut.group() if cut else ""))
            rest = [block[cut.end() :]] if cut else []
        else:
            rest.append(block)
        if len(pieces) == 2 * os.cpu_count() or block is None:
            for ids in tokenizer.encode_batch(pieces, num_threads=os.cpu_count(), allowed_special="all"):
                tokens.extend(ids)
            done, pieces = done + sum(map(len, pieces)), []
            log.info("tokenising: %s of %s characters", f"{done:,}", f"{stop - start:,}", extra=LIVE)
    return torch.frombuffer(tokens, dtype=torch.uint16) if tokens else torch.empty(0, dtype=torch.uint16)


class GPTDataset(torch.utils.data.Dataset):
    """Windows over a text's tokens. Item i is (x, y), each (context_length) long: y is x shifted by one.

    Windows begin every `stride` tokens (by default each where the last one ended). ValueError if there is none.
    """

    def __init__(self, token_ids: Sequence[int] | Tensor, context_length: int, stride: int | None = None):
        if context_length < 1 or (stride is not None and stride < 1):
            raise ValueError(f"context_length {context_length} and stride {stride} must be at least 1")
        self.token_ids, self.context_length = torch.as_tensor(token_ids), context_length
        self.starts = range(0, len(self.token_ids) - context_length, stride or context_length)
        if not self.starts:
            raise ValueError(
                f"{len(self.token_ids)} tokens make no window: context_length {context_length} takes "
                f"{context_length + 1}; lower context_length or give more text"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.token_ids[start : start + self.context_length + 1].long()
        return window[:-1], window[1:]

    def scoring_windows(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows that score every token after the first exactly once; a target scored before is -100.

        With a stride below the context (the default is the context), each token has at least context - stride tokens
        before it, where they exist: a fairer measure, for more work.
        """
        last, scored = len(self.token_ids) - 1, 0
        for start in range(0, last, stride or self.context_length):
            end = min(start + self.context_length, last)
            window = self.token_ids[start : end + 1].long()
            x, y = window[:-1], window[1:].clone()
            y[: scored - start] = IGNORED
            yield x, y
            if (scored := end) == last:
                return


class CompletionDataset(torch.utils.data.Dataset):
    """Prompts and completions for fine-tuning. Item i is (x, y) of its own length; y is -100 where the prompt is.

    A completion ends with `<|endoftext|>`, so that the model learns to stop. Examples longer than the context lose the
    beginning of their prompt; `n_cut` counts them.
    """

    def __init__(self, examples: Sequence[tuple[str, str]], context_length: int, tokenizer):
        self.examples, self.items, self.n_cut = examples, [], 0
        for prompt, completion in examples:
            x = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
            y = [*tokenizer.encode_ordinary(completion), tokenizer.eot_token]
            ids = torch.tensor(x + y)
            targets = torch.tensor([IGNORED] * (len(x) - 1) + y)
            self.n_cut += len(targets) > context_length
            self.items.append((ids[:-1][-context_length:], targets[-context_length:]))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.items[index]

    def scoring_windows(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All items; there is nothing to slide."""
        return iter(self.items)


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Items of unequal length as x (B, T), y (B, T). Padding stands at the end, where no earlier token sees it and
    no loss counts it."""
    xs, ys = zip(*items)
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(xs, padding_value=0), pad(ys, padding_value=IGNORED)


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The prompt layout of Stanford Alpaca, with or without an input."""
    kind = "task, paired with an input that provides further context" if context else "task"
    request = f"Below is an instruction that describes a {kind}. Write a response that appropriately completes the request."
    middle = f"\n\n### Input:\n{context}" if context else ""
    return f"{request}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) pairs from a file with one JSON object a line, or a JSON list. ValueError names the line."""
    text = "".join(read_blocks(path))
    as_list = text.lstrip().startswith("[")
    where, entries = "item", []
    try:
        if as_list:
            entries = list(enumerate(json.loads(text), start=1))
        else:
            where = "line"
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    entries.append((number, json.loads(line)))
    except (ValueError, RecursionError) as error:
        place = "" if as_list else f" line {number}"
        raise ValueError(f"{path}{place}: not valid JSON: {error or 'nested too deeply'}") from error
    examples = []
    for number, entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        is_pair = "prompt" in fields
        names = ("prompt", "completion") if is_pair else ("instruction", "output")
        values = [fields.get(name) for name in names] + [fields.get("input") or ""]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(
                f'{path} {where} {number}: needs the texts "prompt" and "completion", or "instruction" and "output" '
                f'(and maybe "input"), not {json.dumps(entry)[:60]}'
            )
        examples.append((values[0] if is_pair else instruction_prompt(values[0], values[2]), values[1]))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def is_fine_tuning_data(path: Path) -> bool:
    return path.suffix.lower() in (".json", ".jsonl")


def load_data(config: dict) -> tuple[GPTDataset | CompletionDataset, GPTDataset | CompletionDataset | None]:
    """The training and the validation set of a run. ValueError says how many tokens there are and what to lower."""
    path, fraction, context = find_data(config["data"]), config["val_fraction"], config["context_length"]
    tokenizer = load_tokenizer()
    if is_fine_tuning_data(path):
        examples = read_examples(path)
        random.Random(config["seed"]).shuffle(examples)  # files are often sorted by class
        n_val = math.ceil(len(examples) * fraction)
        if n_val == len(examples):
            raise ValueError(f"{path} has {n_val} examples, and val_fraction {fraction} leaves none to train on")
        parts = examples[n_val:], examples[:n_val]
        sets = [CompletionDataset(part, context, tokenizer) if part else None for part in parts]
        log.info("data       %s: %s examples to train on, %s to validate", path, f"{len(parts[0]):,}", f"{n_val:,}")
        if n_cut := sum(part.n_cut for part in sets if part):
            log.info("           %s of them longer than %s tokens: their prompts lose the beginning", n_cut, context)
        return sets[0], sets[1]
    train_ids, val_ids = load_text(path, fraction, tokenizer)
    log.info("data       %s: %s tokens to train on, %s to validate", path, f"{len(train_ids):,}", f"{len(val_ids):,}")
    if len(train_ids) <= context or (fraction and len(val_ids) < 2):
        raise ValueError(
            f"{path} has {len(train_ids):,} tokens to train on and {len(val_ids):,} to validate; context_length {context} "
            f"needs {context + 1} and 2: lower --context_length, change --val_fraction or give more text"
        )
    val_set = GPTDataset(val_ids, min(context, len(val_ids) - 1)) if fraction else None
    return GPTDataset(train_ids, context, config["stride"] or context), val_set


def load_text(path: Path, val_fraction: float, tokenizer) -> tuple[Tensor, Tensor]:
    """A text's tokens in two parts, cut by characters, so that no token knows both. ValueError if there is no text."""
    n_chars, blank = 0, True
    for block in read_blocks(path):
        n_chars, blank = n_chars + len(block), blank and block.isspace()
    if blank:
        raise ValueError(f"{path} is empty or only white space; give a text to learn from")
    split = int(n_chars * (1 - val_fraction))
    return tokenize_file(path, 0, split, tokenizer), tokenize_file(path, split, n_chars, tokenizer)


def find_data(name: str) -> Path:
    """The data file, or the one of that name beside gpt2.py. FileNotFoundError if neither is there."""
    for path in (Path(name), HERE / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no data file {name!r}; give --data a UTF-8 text, or .jsonl for fine-tuning")


# ---------------------------------------------------------------------------------------------------------------
# 6. CONFIG. Every setting of a run. `python gpt2.py train --KEY VALUE` changes one.
# ---------------------------------------------------------------------------------------------------------------

CONFIG = {
    # The model: GPT-2 in everything but size
    "vocab_size": 50257,  # tokens in the vocabulary; GPT-2's has 50257
    "context_length": 64,  # tokens the model sees at once
    "emb_dim": 128,  # width of a token's vector
    "n_heads": 4,  # attention heads in a block
    "n_layers": 4,  # blocks
    "dropout_rate": 0.1,  # share of values dropped at random while training
    "qkv_bias": True,  # give queries, keys and values a bias, as OpenAI did
    # The data
    "data": "the-verdict.txt",  # UTF-8 text, or .jsonl/.json examples for fine-tuning
    "val_fraction": 0.1,  # share of the data held back, from the end of a text, to validate
    "stride": 0,  # tokens from one training window to the next; 0: the context, so that none overlap
    # The run
    "batch_size": 8,  # windows or examples that each process works on at once
    "grad_accumulation": 1,  # batches that make one optimizer step
    "epochs": 20,  # times through the training data
    "max_steps": 0,  # stop after so many optimizer steps; 0: after the epochs
    "learning_rate": 1e-3,  # the highest, after the warm-up
    "min_learning_rate": 1e-4,  # the lowest, at the end
    "warmup_steps": 20,  # optimizer steps from zero to the highest learning rate
    "decay_steps": 0,  # optimizer steps until the learning rate is lowest; 0: all epochs
    "weight_decay": 0.1,  # pull on matrices and embeddings towards zero, by AdamW
    "grad_clip": 1.0,  # longest gradient; 0: any length
    "seed": 42,  # start of all random numbers
    # What happens on the way, in optimizer steps
    "eval_every": 0,  # measure the validation loss so often; 0: after each epoch
    "checkpoint_every": 0,  # save so often, beside each new best validation loss; 0: after each epoch
    "sample_prompt": "I had always thought",  # after each epoch the model continues this
    # The machine
    "device": "auto",  # auto takes an accelerator where there is one; else cpu, cuda, mps, xpu, ...
    "precision": "auto",  # fp32, bf16 or fp16; auto: bf16 or else fp16 on CUDA, fp32 elsewhere
    "compile": False,  # train through torch.compile: slow to start, then faster on a GPU
    "chunked_loss": False,  # never hold all logits at once: at 4 x 512 tokens, 0.9 GB less for a slower step
}

TRAINING_LIMITS = {
    "data": (str, "", "\U0010ffff"),
    "val_fraction": (float, 0.0, 0.9),
    "stride": (int, 0, 10**9),
    "batch_size": (int, 1, 10**6),
    "grad_accumulation": (int, 1, 10**6),
    "epochs": (int, 1, 10**6),
    "max_steps": (int, 0, 10**9),
    "learning_rate": (float, 1e-12, 10.0),
    "min_learning_rate": (float, 0.0, 10.0),
    "warmup_steps": (int, 0, 10**9),
    "decay_steps": (int, 0, 10**9),
    "weight_decay": (float, 0.0, 10.0),
    "grad_clip": (float, 0.0, 1e9),
    "seed": (int, 0, 2**31 - 1),
    "eval_every": (int, 0, 10**9),
    "checkpoint_every": (int, 0, 10**9),
}
# These may differ when a run is resumed: they change nothing that it computes
FREE_TO_CHANGE = {"max_steps", "eval_every", "checkpoint_every", "sample_prompt", "device", "compile", "chunked_loss"}
FREE_TO_CHANGE |= {"data", "batch_size", "grad_accumulation"}  # if the contents, or windows a step, are the same


def check_config(config: dict) -> dict:
    """`config` over `CONFIG`. ValueError names a key that is unknown or a value that cannot be."""
    for key in config.keys() - CONFIG.keys():
        near = difflib.get_close_matches(str(key), CONFIG, n=1)
        raise ValueError(f"the config has an unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    config = {**CONFIG, **config}
    check_values(config, MODEL_LIMITS)
    check_values(config, TRAINING_LIMITS)
    if config["precision"] not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {config['precision']!r}; it must be auto, fp32, bf16 or fp16")
    if config["min_learning_rate"] > config["learning_rate"]:
        raise ValueError(
            f"min_learning_rate {config['min_learning_rate']} is above learning_rate {config['learning_rate']}; lower it"
        )
    if config["vocab_size"] < CONFIG["vocab_size"]:
        raise ValueError(f"vocab_size is {config['vocab_size']}; GPT-2's tokens need at least {CONFIG['vocab_size']}")
    return config


# ---------------------------------------------------------------------------------------------------------------
# 7. Training. Guess the next token everywhere at once, measure the surprise, step downhill; save so that nothing is lost.
# ---------------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, config: dict, total_steps: int) -> float:
    """The learning rate of optimizer step 1, 2, …: a line up over `warmup_steps`, half a cosine down, then level."""
    high, low, warmup = config["learning_rate"], config["min_learning_rate"], config["warmup_steps"]
    if step <= warmup:
        return high * step / warmup
    end = config["decay_steps"] or total_steps
    progress = min((step - warmup) / max(end - warmup, 1), 1.0)  # 0 -> 1
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: GPT2, config: dict) -> torch.optim.Optimizer:
    """AdamW with decay for matrices and embeddings only: norms and biases have no reason to be small (GPT-1, 4.1)."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    free = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": config["weight_decay"]}, {"params": free, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one pass over memory; on a CPU 4 times as fast
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), fused=fused)


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one. Under torchrun each process takes its own. ValueError if unavailable."""
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            name = found.type if found else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.empty(1, device=name)  # the only sure way to know
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"the device {name!r} cannot be used here ({reason}); try --device cpu") from error


def pick_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type for matrix products; weights and sums stay in float32. `auto` takes half precision where it pays."""
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":  # bfloat16 has float32's range and needs no loss scaling, but compute capability 8.0
            precision = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `dtype` inside this context."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def join_processes(device: torch.device) -> None:
    """Under `torchrun`, join the other processes: nccl between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(*values: float | Tensor) -> list[float]:
    """The sum of each of these numbers over all processes. Waits for the device, and for the other processes."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(model: GPT2, dataset: GPTDataset | CompletionDataset, *, stride: int | None = None) -> float:
    """The mean loss in nats per token over every token of `dataset` that counts (see its `scoring_windows`).

    No random number is drawn and the model's mode is put back, so that it never changes a training run. Under
    torchrun the processes share the windows. ValueError if the model's context is shorter than the windows.
    """
    device, was_training = next(model.parameters()).device, model.training
    rank, world = processes()
    windows = itertools.islice(dataset.scoring_windows(stride), rank, None, world)
    loss, count = 0.0, 0
    model.eval()
    try:
        while items := list(itertools.islice(windows, max(1, 4096 // model.config["context_length"]))):
            x, y = collate(items)
            loss += model(x.to(device), targets=y.to(device)).item()
            count += int((y != IGNORED).sum())
    finally:
        model.train(was_training)
    loss, count = sum_over_processes(loss, count)
    return loss / count


def token_log_probabilities(model: GPT2, x: Tensor, y: Tensor) -> Tensor:
    """log p(target) at every place, 0 where a target is -100. x, y (B, T) -> (B, T), nats."""
    logits = model(x).flatten(0, 1).float()  # (B·T, V)
    return -F.cross_entropy(logits, y.flatten(), reduction="none", ignore_index=IGNORED).view_as(y)


@torch.no_grad()
def classify(model: GPT2, dataset: CompletionDataset, tokenizer) -> tuple[float, dict[tuple[str, str], int]] | None:
    """Accuracy, and {(true, predicted): count}, when each prompt gets the most probable of all completions seen.

    None with a single completion or more than 50: that is no classification.
    """
    device, context = next(model.parameters()).device, model.config["context_length"]
    labels = sorted({completion for _, completion in dataset.examples})
    if not 2 <= len(labels) <= 50:
        return None
    confusion = dict.fromkeys(itertools.product(labels, labels), 0)
    for prompt, truth in dataset.examples:
        x, y = collate(CompletionDataset([(prompt, label) for label in labels], context, tokenizer).items)
        scores = token_log_probabilities(model, x.to(device), y.to(device)).sum(dim=1)  # (number of labels)
        confusion[truth, labels[int(scores.argmax())]] += 1
    return sum(confusion[label, label] for label in labels) / len(dataset), confusion


def write_files(writers: dict[Path, Callable]) -> None:
    """Write files so that each is whole or as it was: beside their names first, all to the disk, then renamed.

    `writers` maps a path to what writes an open binary file. OSError if that fails; then no file has changed.
    """
    parts = {path: path.with_name(path.name + ".part") for path in writers}
    try:
        for path, write in writers.items():
            with open(parts[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could keep the name and lose the bytes
        for path, part in parts.items():
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def safe_load(path: Path) -> dict:
    """A dict of tensors and plain values from a file of torch.save. Nothing in it is run. ValueError if it is broken."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksum and unpacks without limit
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or archive.testzip():
                    raise ValueError("its parts do not match their checksums")
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, EOFError,
            MemoryError, pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or no file of torch.save that is safe to read: {reason}") from error


CHECKPOINT_FORMAT = "gpt2.py 1"


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values, whole or not at all. OSError if it cannot be written."""
    write_files({Path(path): functools.partial(torch.save, checkpoint)})


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint with at least `config` and `model` (weights by name), on the CPU. ValueError if it is not ours."""
    checkpoint = safe_load(Path(path))
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is no checkpoint of this program: its format is {checkpoint.get('format')!r}")
    config, model = checkpoint.get("config"), checkpoint.get("model")
    if not isinstance(config, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} has no config and model weights")
    if not all(isinstance(tensor, Tensor) for tensor in model.values()):
        raise ValueError(f"{path}: its model weights are not all tensors")
    check_values(config, MODEL_LIMITS)
    return checkpoint


@contextlib.contextmanager
def only_run_in(folder: Path):
    """Hold the folder's lock. The system frees it when the process ends, however it ends. ValueError if it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"process {file.read()} is training into {folder}; wait, or give another --out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks that are freed, for the next step to reuse.

    By default each large tensor is mapped anew and its pages are filled with zeros at the first touch. Keeping them
    made a step of 4 x 512 tokens at 124M parameters 1.18 times as fast on two cores, for 0.9 GB more memory.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: macOS, Windows, Alpine
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


@functools.lru_cache(maxsize=1)
def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the windows in an epoch. It follows from the seed, so a resumed run need not have saved it."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class Run:
    """Everything that a training run is between two steps: data, model, optimizer, and how far it has come."""

    def __init__(self, config: dict, model: GPT2 | None):
        self.config, self.device = config, pick_device(config["device"])
        self.dtype = pick_dtype(self.device, config["precision"])
        join_processes(self.device)
        self.rank, self.world = processes()
        self.train_set, self.val_set = load_data(config)
        self.windows_per_step = config["batch_size"] * config["grad_accumulation"] * self.world
        self.steps_per_epoch = math.ceil(len(self.train_set) / self.windows_per_step)
        self.total_steps = config["epochs"] * self.steps_per_epoch
        self.end = min(self.total_steps, config["max_steps"] or self.total_steps)
        with open(find_data(config["data"]), "rb") as file:
            self.data_sha256 = hashlib.file_digest(file, "sha256").hexdigest()

        torch.manual_seed(config["seed"])
        self.model = (GPT2(config) if model is None else model).to(self.device).train()
        self.model.chunked_loss = config["chunked_loss"]
        self.optimizer = make_optimizer(self.model, config)
        scale = self.device.type == "cuda" and self.dtype == torch.float16  # float16's range ends at 65,504
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scale)
        # Saving and sampling use the plain model; training may go through these wrappers around the same weights.
        self.network = torch.compile(self.model) if config["compile"] else self.model
        if self.world > 1:
            self.network = nn.parallel.DistributedDataParallel(self.network)
        if self.device.type == "cpu":
            keep_freed_memory()
        elif self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for products that stay in float32
        self.step, self.tokens_seen, self.best_val_loss, self.metrics = 0, 0, math.inf, ""
        self.best = None  # a checkpoint that is to become best.pt at the next save
        self.replaces = True  # whether the next save replaces another run's files

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The batches (x, y) that this process works through in optimizer step 1, 2, …

        A step takes the next batch_size × grad_accumulation × processes windows of the epoch's order, and each process
        its share of them: no overlap, no loss. The last step of an epoch takes what is left.
        """
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        first = position * self.windows_per_step
        order = epoch_order(len(self.train_set), self.config["seed"], epoch)[first : first + self.windows_per_step]
        items = [self.train_set[i] for i in order[self.rank :: self.world].tolist()]
        if not items:  # fewer windows than processes: work on one that counts nothing, for the others wait for us
            x, y = self.train_set[int(order[0])]
            items = [(x, torch.full_like(y, IGNORED))]
        size = self.config["batch_size"]
        return [collate(items[i : i + size]) for i in range(0, len(items), size)]

    def backward(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """Gradients of the mean loss over the targets of these batches, in all processes; that loss and its targets.

        Each batch's summed loss is divided by the number of targets in the whole step, not in the batch: so accumulated
        gradients equal those of one big batch, also when examples differ in length.
        """
        n_targets = int(sum_over_processes(sum(int((y != IGNORED).sum()) for _, y in batches))[0])
        total = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(batches):
            if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            wait = self.world > 1 and i < len(batches) - 1  # exchange gradients once a step, with the last batch
            with self.network.no_sync() if wait else contextlib.nullcontext():
                with autocast(self.device, self.dtype):
                    loss = self.network(x, targets=y) / n_targets
                # DistributedDataParallel averages over processes; times their number, that is the sum.
                self.scaler.scale(loss * self.world).backward()
            total += loss.detach()
        return sum_over_processes(total)[0], n_targets

    def optimizer_step(self) -> dict:
        """One step of AdamW; what it measured. FloatingPointError, and no step, if loss or gradient is not finite."""
        started, step, config = time.perf_counter(), self.step + 1, self.config
        # Dropout follows from (seed, step, process): a resumed run needs no saved random state, and nothing that
        # happens between two steps (a sample, an evaluation, the caller's own work) can change the run.
        torch.manual_seed((config["seed"] * 1_000_003 + step) * 1_009 + self.rank)
        rate = learning_rate_at(step, config, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, n_targets = self.backward(self.batches(step))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config["grad_clip"] or math.inf).item()
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)  # it skips such a step
        if not overflow and not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step} has loss {loss} and gradient norm {norm} at learning rate {rate:.3g}: lower --learning_rate "
                f"or raise --warmup_steps; what was saved before is unharmed"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step, self.tokens_seen = step, self.tokens_seen + n_targets
        epoch, seconds = (step - 1) // self.steps_per_epoch + 1, time.perf_counter() - started
        row = {"step": step, "epoch": epoch, "tokens_seen": self.tokens_seen, "train_loss": loss, "learning_rate": rate}
        return row | {"grad_norm": None if overflow else norm, "tokens_per_second": round(n_targets / seconds, 1)}

    def validate(self) -> float:
        """The validation loss now; if it is the lowest yet, the weights are kept for best.pt."""
        with autocast(self.device, self.dtype):
            loss = evaluate(self.model, self.val_set)
        if loss < self.best_val_loss:
            self.best_val_loss = loss
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"format": CHECKPOINT_FORMAT, "config": self.config, "step": self.step, "model": weights}
        return loss

    def at(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: every epoch), and at the end, happens now."""
        return self.step % (every or self.steps_per_epoch) == 0 or self.step == self.end

    def save(self, folder: Path, plot: bool = False) -> bool:
        """Write what the run leaves. False, with a warning, if that fails: training goes on, and the next save tries again."""
        state = {name: getattr(self, name) for name in self.KEPT}
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        last = {"format": CHECKPOINT_FORMAT, "finished": self.step == self.end, **state, **parts}
        writers = {folder / "best.pt": functools.partial(torch.save, self.best)} if self.best else {}
        if plot:
            writers[folder / "loss.png"] = functools.partial(plot_losses, self.metrics)
        writers[folder / "metrics.jsonl"] = lambda file: file.write(self.metrics.encode())
        writers[folder / "last.pt"] = functools.partial(torch.save, last)
        try:
            write_files(writers)
            for name in ("best.pt", "loss.png") if self.replaces else ():
                if folder / name not in writers:
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("step %s was not saved: %s", self.step, error)
            return False
        self.best, self.replaces = None, False
        return True

    KEPT = ("config", "step", "tokens_seen", "best_val_loss", "metrics", "windows_per_step", "data_sha256")

    def restore(self, last: dict, path: Path) -> None:
        """Continue from a checkpoint. ValueError if data or windows a step differ: the rest would not be the same run."""
        if last.get("data_sha256") != self.data_sha256:
            raise ValueError(f"{self.config['data']} is not the text that {path} was trained on; give --data that text")
        if last.get("windows_per_step") != self.windows_per_step:
            raise ValueError(
                f"{path} took {last.get('windows_per_step')} windows a step; {self.world} processes now take "
                f"{self.windows_per_step}: change --batch_size or --grad_accumulation so that they agree"
            )
        try:
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(last[name])
            for name in ("step", "tokens_seen", "best_val_loss", "metrics"):
                setattr(self, name, type(getattr(self, name))(last[name]))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be continued: {str(error).splitlines()[0]}") from error
        self.replaces = False
        if self.step >= self.end:
            raise ValueError(f"all {self.end} steps of {path} are done; to train on, start from it with --init {path}")


def plan_run(given: dict, folder: Path | None, init, resume: bool, overwrite: bool):
    """Settle what runs: (config, model to start from or None, checkpoint to continue or None).

    ValueError if `given` contradicts the checkpoint or the model, or if starting would lose an unfinished run.
    """
    last = folder / "last.pt" if folder else None
    if resume:
        if last is None or not last.is_file():
            raise FileNotFoundError(f"there is nothing to resume: no {last}; start a run without --resume")
        checkpoint = load_checkpoint(last)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{last} holds weights only; start a new run from it with --init {last}")
        config = check_config(checkpoint["config"])
        for key in sorted(given.keys() - FREE_TO_CHANGE):
            if check_config(given)[key] != config[key]:
                raise ValueError(
                    f"{last} was trained with {key} {config[key]!r}, and {given[key]!r} contradicts it: leave it out, "
                    f"or start a new run from these weights with --init {last} and another --out"
                )
        return check_config({**config, **given}), None, checkpoint
    if last and last.is_file() and not overwrite and not load_checkpoint(last).get("finished", True):
        raise ValueError(
            f"{folder} holds an unfinished run: continue it with --resume, replace it with --overwrite, "
            f"or give another --out"
        )
    model = GPT2.from_pretrained(init) if isinstance(init, (str, Path)) else init
    if model is None:
        return check_config(given), None, None
    config = check_config({**CONFIG, **model.config, "dropout_rate": CONFIG["dropout_rate"], **given})
    for key in ("vocab_size", "emb_dim", "n_heads", "n_layers", "qkv_bias"):
        if config[key] != model.config[key]:
            raise ValueError(f"{key} is {config[key]!r}, but the model to start from has {model.config[key]!r}: leave it out")
    return config, resized(model, config), None


def resized(model: GPT2, config: dict) -> GPT2:
    """The same model, changed in place to a shorter context (its later positions are dropped) and another dropout."""
    context = config["context_length"]
    if context > model.config["context_length"]:
        raise ValueError(f"context_length {context} is more than the {model.config['context_length']} of the model: lower it")
    positions = model.position_embedding
    positions.weight = nn.Parameter(positions.weight.detach()[:context].clone())
    positions.num_embeddings = context
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config["dropout_rate"]
        if isinstance(module, MultiHeadAttention):
            module.dropout_rate = config["dropout_rate"]
    model.config = {key: config[key] for key in MODEL_LIMITS}
    return model


def plot_losses(metrics: str, file) -> None:
    """Draw the losses in lines of metrics.jsonl against the step, as PNG, into an open file."""
    from matplotlib.figure import Figure  # here, because only this needs it

    rows = [json.loads(line) for line in metrics.splitlines()]
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["train_loss"] for row in rows], color="#0072B2", label="training")
    if measured := [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]:
        axes.plot(*zip(*measured), "o--", color="#D55E00", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Loss while training", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png")


def train(
    config: dict | None = None,
    *,
    out: str | Path | None = "checkpoints",
    init: GPT2 | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[dict]:
    """Train, and yield one dict a step: its line of metrics.jsonl, `total_steps`, and after an epoch a `sample`.

    `config` holds what differs from `CONFIG`. `out` is the folder for last.pt, best.pt, metrics.jsonl and loss.png;
    None writes nothing. `init` is a model to start from: a `GPT2`, which is trained in place, or a name or path.
    `resume` continues `out`/last.pt bit for bit. Closing the generator between two steps saves first.

    Losses are in nats per token; `tokens_per_second` counts targets. ValueError and FileNotFoundError say what to
    change; FloatingPointError if a loss is not finite; OSError if the last save failed.
    """
    folder = Path(out) if out is not None else None
    main = int(os.environ.get("RANK", 0)) == 0  # one process saves
    with only_run_in(folder) if folder and main else contextlib.nullcontext():
        config, model, last = plan_run(dict(config or {}), folder, init, resume, overwrite)
        run = Run(config, model)
        if last:
            run.restore(last, folder / "last.pt")
        describe(run, folder)
        last, saved = None, True
        while run.step < run.end:
            row = run.optimizer_step()
            if run.val_set and run.at(config["eval_every"]):
                row["val_loss"] = run.validate()
            run.metrics += json.dumps(row) + "\n"
            due = run.best is not None or run.at(config["checkpoint_every"])
            if due and folder and main:
                saved = run.save(folder, plot=run.step == run.end)
            row["total_steps"] = run.end
            if main and run.at(0):
                row["sample"] = sample_text(run.model, config["sample_prompt"])
            try:
                yield row
            except GeneratorExit:  # the caller stops here
                if folder and main and not run.save(folder, plot=True):
                    raise OSError(f"step {run.step} could not be saved in {folder}; make room and start again") from None
                raise
        if not saved:
            raise OSError(f"step {run.step}, the last, could not be saved in {folder}; make room and --resume")


def describe(run: Run, folder: Path | None) -> None:
    """Say what a run will do."""
    config, model = run.config, run.model
    shape = f"{config['n_layers']} layers, {config['n_heads']} heads, width {config['emb_dim']}"
    log.info("model      %s parameters: %s, context %s", f"{model.num_parameters():,}", shape, config["context_length"])
    log.info("device     %s, %s, %s process(es)", run.device, str(run.dtype).removeprefix("torch."), run.world)
    log.info("steps      %s to %s: %s epochs of %s steps, %s windows a step", run.step + 1, run.end, config["epochs"],
             run.steps_per_epoch, run.windows_per_step)  # fmt: skip
    if folder and run.replaces and (folder / "last.pt").exists():
        log.info("saving     to %s; the first save replaces the run that is there", folder)


def sample_text(model: GPT2, prompt: str, max_new_tokens: int = 40) -> str:
    """A greedy continuation of `prompt`, to see what the model has learnt."""
    tokenizer = load_tokenizer()
    idx = prompt_ids(prompt, tokenizer)
    new = generate(model, idx, max_new_tokens, eos_id=tokenizer.eot_token)
    return token_ids_to_text(new, tokenizer)


# ---------------------------------------------------------------------------------------------------------------
# 8. Generation. Logits become probabilities, probabilities a token, the token the next input.
# ---------------------------------------------------------------------------------------------------------------


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits (B, V) -> probabilities (B, V) to draw from. Rows do not influence each other.

    Temperature below 1 sharpens, above 1 flattens. `top_k` keeps the k most probable tokens; `top_p` the smallest set
    of most probable ones whose probabilities reach p (Holtzman et al., 2020). ValueError for values that make no sense.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:  # the limit: all on the most probable token
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        best, where = logits.topk(top_k)  # (B, k) each
        logits = torch.full_like(logits, -math.inf).scatter(1, where, best)  # exactly k, also among equals
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, where = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # what the more probable tokens have together
        ordered[before >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(1, where, ordered)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for sampling arguments that make no sense."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def sample_next(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """logits (B, V) -> token ids (B, 1): the most probable at temperature 0, else drawn with CPU `generator`(s).

    A generator for each row makes a row's draws the same alone and inside a batch. ValueError if a logit is NaN.
    """
    if torch.isnan(logits).any():
        raise ValueError("the model's logits are NaN: its weights are damaged, or half precision overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # On the CPU: the same draws on every device, and no device whose multinomial misbehaves.
    probabilities = next_token_probabilities(logits.float().cpu(), temperature, top_k, top_p)
    generators = generator if isinstance(generator, Sequence) else [generator] * len(probabilities)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.stack(drawn).to(logits.device)


@torch.no_grad()
def generate(
    model: GPT2,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    use_cache: bool = True,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue the prompts idx (B, T) -> (B, T + new), new at most `max_new_tokens`; on the model's device.

    It ends early when every row has produced `eos_id`; rows that ended before are filled with it. `on_token` gets each
    column (B, 1) as it is made. A prompt longer than the context is cropped to its end. When the context is full, the
    model goes on from the last half of it, read anew: so it writes on without end, always sees at least half a context,
    and the result is the same with and without the cache. ValueError for arguments that make no sense.
    """
    check_sampling(temperature, top_k, top_p)
    if idx.dim() != 2 or idx.numel() == 0:
        raise ValueError(f"idx has the shape {tuple(idx.shape)}; it must be (batch, tokens) with at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    context, was_training = model.config["context_length"], model.training
    idx = idx.to(next(model.parameters()).device)
    start, cache = max(0, idx.size(1) - context), None  # the model sees idx[:, start:]
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if idx.size(1) - start > context:
                start, cache = idx.size(1) - max(1, context // 2), None
            if not use_cache:
                logits = model(idx[:, start:], last_only=True)  # (B, 1, V)
            elif cache is None:
                cache = model.new_cache()
                logits = model(idx[:, start:], cache, last_only=True)
            else:
                logits = model(idx[:, -1:], cache, last_only=True)
            new = sample_next(logits[:, -1], temperature, top_k, top_p, generator)  # (B, 1)
            if eos_id is not None:
                new = new.masked_fill(ended, eos_id)
                ended |= new == eos_id
            idx = torch.cat([idx, new], dim=1)
            if on_token:
                on_token(new)
            if eos_id is not None and ended.all():
                break
    finally:
        model.train(was_training)
    return idx


def prompt_ids(prompt: str, tokenizer) -> Tensor:
    """A prompt as ids (1, T); an empty one is `<|endoftext|>`, after which GPT-2 starts a new text."""
    return text_to_token_ids(prompt, tokenizer) if prompt else torch.tensor([[tokenizer.eot_token]])


# ---------------------------------------------------------------------------------------------------------------
# 9. Command line. Standard output carries results; progress and notes go to standard error.
# ---------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters other than line ends and tabs, written out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match.group()):02x}", text)


class Notes(logging.Handler):
    """Notes on standard error. On a terminal a live line overwrites itself; elsewhere one is printed every ten seconds."""

    def __init__(self):
        super().__init__()
        self.is_open, self.next_time = False, 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Print one note."""
        text, live = printable(record.getMessage()), getattr(record, "live", False)
        if not live:
            text, self.is_open = ("\r\x1b[K" if self.is_open else "") + text + "\n", False
        elif sys.stderr.isatty():
            text, self.is_open = "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], True
        elif time.monotonic() < self.next_time:
            return
        else:
            text, self.next_time = text + "\n", time.monotonic() + 10
        sys.stderr.write(text)
        sys.stderr.flush()


def run_train(args: argparse.Namespace) -> None:
    """python gpt2.py train"""
    given = OPENAI_SIZES.get(args.model_size, {}) | {key: value for key, value in vars(args).items() if key in CONFIG}
    run, stopped, started, first = train(given, out=args.out, init=args.init, resume=args.resume, overwrite=args.overwrite), [], 0, 0

    def stop(number, frame) -> None:  # the first signal waits for the step to end, the second does not
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)

    for row in run:
        if not started:  # what came before the first step has nothing to save
            started, first = time.monotonic(), row["step"]
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
        left = (time.monotonic() - started) / max(row["step"] - first, 1) * (row["total_steps"] - row["step"])
        text = f"step {row['step']}/{row['total_steps']}  epoch {row['epoch']}  loss {row['train_loss']:.3f}"
        text += f"  validation {row['val_loss']:.3f}" if "val_loss" in row else ""
        text += f"  {row['tokens_per_second']:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
        log.info(text, extra={"live": "val_loss" not in row})
        if "sample" in row:
            log.info("    %s", " ".join(row["sample"].split()))
        if any(sum_over_processes(len(stopped))):  # all processes stop after the same step
            run.close()
            log.info("stopped after step %s and saved; go on with: python gpt2.py train --resume --out %s", row["step"], args.out)
            raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    log.info("done       train loss %.3f; curve in %s/loss.png", row["train_loss"], args.out)
    log.info("next       python gpt2.py generate --model %s/last.pt", args.out)


def run_generate(args: argparse.Namespace) -> None:
    """python gpt2.py generate"""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = args.do_sample or any(value is not None for value in (args.temperature, args.top_k, args.top_p))
    temperature = (1.0 if args.temperature is None else args.temperature) if sampling else 0.0
    check_sampling(temperature, args.top_k, args.top_p)
    model = load_model(args)
    tokenizer, context = load_tokenizer(), model.config["context_length"]
    shown = "" if args.instruct else prompt
    idx = prompt_ids(instruction_prompt(prompt) if args.instruct else prompt, tokenizer)
    if idx.size(1) > context:
        log.info("note: the prompt has %s tokens; the model sees the last %s", idx.size(1), context)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_samples)]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in generators]
    texts = [""] * args.num_samples

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def on_token(column: Tensor) -> None:
        for i, token in enumerate(column.flatten().tolist()):
            if token != tokenizer.eot_token:
                piece = decoders[i].decode(token_bytes(token, tokenizer))  # holds back half a character
                texts[i] += piece
                if args.num_samples == 1:
                    write(piece)

    if args.num_samples == 1:
        write(shown)
    choice = {"temperature": temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": generators}
    idx = idx.expand(args.num_samples, -1)
    generate(model, idx, args.max_tokens, eos_id=tokenizer.eot_token, on_token=on_token, **choice)
    for i, decoder in enumerate(decoders):
        rest = decoder.decode(b"", final=True)
        write(f"{rest}\n" if args.num_samples == 1 else f"--- sample {i + 1} of {args.num_samples} ---\n{shown}{texts[i]}{rest}\n")


def run_eval(args: argparse.Namespace) -> None:
    """python gpt2.py eval"""
    path = find_data(args.data)
    model, tokenizer = load_model(args), load_tokenizer()
    context, confusion = model.config["context_length"], None
    stride = args.stride or max(1, context // 2)
    if stride > context:
        raise ValueError(f"stride {stride} is more than the model's context {context}: tokens between would not be scored")
    if is_fine_tuning_data(path):
        dataset = CompletionDataset(read_examples(path), context, tokenizer)
        scored = [y[y != IGNORED] for _, y in dataset]
        scored = torch.cat(scored)
        result = classify(model, dataset, tokenizer)
    else:
        ids, _ = load_text(path, 0.0, tokenizer)
        if len(ids) < 2:
            raise ValueError(f"{path} has {len(ids)} token; a loss needs at least 2")
        dataset, result = GPTDataset(ids, min(context, len(ids) - 1)), None
        scored = ids[1:]
    loss = evaluate(model, dataset, stride=min(stride, getattr(dataset, "context_length", stride)))
    n_bytes = sum(len(token_bytes(i, tokenizer)) for i in scored.tolist())
    report = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss * len(scored) / math.log(2) / n_bytes, "tokens": len(scored)}
    if result:
        report["accuracy"], confusion = result
    if args.json:
        print(json.dumps(report))
        return
    units = {"loss": "nats per token", "tokens": "scored"}
    for name, value in report.items():
        print(f"{name:<14}{value:>12,.4f}" if isinstance(value, float) else f"{name:<14}{value:>12,}", units.get(name, ""))
    labels = sorted({true for true, _ in confusion or {}})
    if 0 < len(labels) <= 10:
        print("\ntrue \\ predicted" + "".join(f"{printable(repr(label)):>14}" for label in labels))
        for true in labels:
            print(f"{printable(repr(true)):<16}" + "".join(f"{confusion[true, label]:>14}" for label in labels))


def run_export(args: argparse.Namespace) -> None:
    """python gpt2.py export"""
    load_model(args).save_pretrained(args.folder)
    log.info("wrote %s: config.json, model.safetensors and tokenizer files", args.folder)


def load_model(args: argparse.Namespace) -> GPT2:
    """The MODEL of a command, on its device."""
    if args.model == DEFAULT_MODEL and not Path(args.model).exists():
        raise FileNotFoundError(f"there is no {args.model} yet: make one with `python gpt2.py train`, or take OpenAI's with --model gpt2")
    return GPT2.from_pretrained(args.model).to(pick_device(getattr(args, "device", "cpu")))


DEFAULT_MODEL = "checkpoints/last.pt"


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> None:
        """Say what is wrong and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def make_parser() -> Parser:
    """The four commands. `train` takes every key of `CONFIG`; the comment beside the key is its help."""
    show = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = Parser(prog="gpt2.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train or fine-tune a model", **show)
    command.set_defaults(run=run_train)
    command.add_argument("--model_size", choices=OPENAI_SIZES, help="OpenAI's sizes in one word; other options win over it")
    command.add_argument("--init", metavar="MODEL", help="start from a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl")
    command.add_argument("--resume", action="store_true", help="continue the run in --out exactly")
    command.add_argument("--overwrite", action="store_true", help="replace an unfinished run in --out")
    command.add_argument("--out", metavar="DIR", default="checkpoints", help="folder for what the run leaves")
    source = Path(__file__).read_text(encoding="utf-8")
    for key, default in CONFIG.items():
        comment = re.search(rf'^    "{key}": .*,  # (.*)$', source, re.MULTILINE).group(1)
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        if kind.get("type"):
            kind["metavar"] = {int: "N", float: "X", str: "TEXT"}[type(default)]
        # SUPPRESS keeps what was not given out of the result; the default still shows in the help.
        command.add_argument(f"--{key}", default=argparse.SUPPRESS, help=f"{comment} (default: {default})".replace("%", "%%"), **kind)

    models = f"a checkpoint, a Hugging Face folder, or {', '.join(OPENAI_SIZES)}"
    command = commands.add_parser("generate", help="continue a text", **show)
    command.set_defaults(run=run_generate)
    command.add_argument("prompt", nargs="?", default=CONFIG["sample_prompt"], metavar="PROMPT", help="text to continue; - reads it from standard input")
    command.add_argument("--max_tokens", type=at_least(0), default=100, metavar="N", help="tokens to write at most")
    command.add_argument("--do_sample", action="store_true", help="draw tokens instead of taking the most probable; implied by the next three")
    command.add_argument("--temperature", type=float, metavar="X", help="below 1 safer, above 1 wilder; 1.0 when sampling")
    command.add_argument("--top_k", type=int, metavar="K", help="draw from the K most probable tokens")
    command.add_argument("--top_p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    command.add_argument("--num_samples", type=at_least(1), default=1, metavar="N", help="texts to write; the first is that of N = 1")
    command.add_argument("--seed", type=at_least(0), default=42, metavar="N", help="text i is drawn with seed N + i")
    command.add_argument("--instruct", action="store_true", help="wrap the prompt as an instruction, print the answer only")
    device = {"default": CONFIG["device"], "metavar": "TEXT", "help": "auto, cpu, cuda, mps, xpu, ..."}
    command.add_argument("--model", default=DEFAULT_MODEL, help=models)
    command.add_argument("--device", **device)

    command = commands.add_parser("eval", help="measure a model on a text or on fine-tuning data", **show)
    command.set_defaults(run=run_eval)
    command.add_argument("--data", metavar="FILE", default=CONFIG["data"], help="UTF-8 text, or .jsonl/.json examples")
    command.add_argument("--stride", type=at_least(1), metavar="N", help="tokens from one window to the next; half the context if not given")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--model", default=DEFAULT_MODEL, help=models)
    command.add_argument("--device", **device)

    command = commands.add_parser("export", help="write a Hugging Face folder", **show)
    command.set_defaults(run=run_export)
    command.add_argument("folder", metavar="FOLDER", help="where to write it")
    command.add_argument("--model", default=DEFAULT_MODEL, help=models)
    return parser


def at_least(low: int) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` on."""

    def number(text: str) -> int:
        if int(text) < low or int(text) >= 2**31:
            raise argparse.ArgumentTypeError(f"{text} must be from {low} to {2**31 - 1}")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on standard error that says what is wrong and what to do."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows codes, and nothing crashes
    args = make_parser().parse_args(arguments)
    if int(os.environ.get("RANK", 0)) == 0:
        log.addHandler(Notes())
        log.setLevel(logging.INFO)
    try:
        args.run(args)
        return 0
    except BrokenPipeError:  # the reader has gone, as in `| head -1`: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message:
            message = "out of memory: lower --batch_size (and raise --grad_accumulation), --context_length or the model's size"
        elif isinstance(error, RuntimeError):
            raise
        print(f"gpt2.py {args.command}: error: {printable(message)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
