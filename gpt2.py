"""GPT-2 from scratch in one file: attention, the model, training, sampling, OpenAI's weights.

    python gpt2.py train                              train a small GPT-2 on the-verdict.txt
    python gpt2.py generate "I HAD always thought"    let it write on
    python gpt2.py eval --data FILE                   measure a model on a text
    python gpt2.py export FOLDER                      write a folder that `transformers` reads

Part one is GPT-2, sections 1 to 7, to be read from the top. Part two makes it a program, sections 8 to 12;
what part one borrows from there has the number of its section beside the first use.

Letters in shapes: B batch, T tokens (time), C embedding width, H heads, D width of a head (C / H),
V vocabulary, L layers. `# (B, T, C)` at the end of a line is the shape of what the line makes.

The GPT-2 paper: "Language Models are Unsupervised Multitask Learners", 2019; its code: github.com/openai/gpt-2.
"""

import argparse
import codecs
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import re
import signal
import sys
import textwrap
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
log = logging.getLogger("gpt2")

# ==== Part one: GPT-2 ====
# ---- 1. Attention: every token looks at others and averages what they offer ----
class SelfAttention(nn.Module):
    """One head, softmax(Q Kᵀ / √D) V ("Attention Is All You Need", 2017).  x (B, T, d_in) -> (B, T, d_out)."""

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token looks for
        self.key = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token can be found by
        self.value = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token hands over

    def scores(self, x: Tensor) -> Tensor:
        """How well each query (row) fits each key (column): (B, T, T)."""
        queries = self.query(x)  # (B, T, D)
        keys = self.key(x)  # (B, T, D)
        # A sum of D products has D times their variance. Undo it, or softmax is nearly one-hot, without gradient.
        return queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # (B, T, T)

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (row) takes from each (column): (B, T, T); rows sum to 1."""
        return torch.softmax(self.scores(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)

class CausalAttention(SelfAttention):
    """One head that cannot see the future, so that predicting the next token is not copying it."""

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout_rate: float, qkv_bias=False):
        super().__init__(d_in, d_out, qkv_bias)
        self.dropout = nn.Dropout(dropout_rate)  # new
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)  # new
        self.register_buffer("future", future, persistent=False)  # new: moves with the model

    def weights(self, x: Tensor) -> Tensor:
        scores = self.scores(x).masked_fill(self.future[: x.size(1), : x.size(1)], -math.inf)  # new: weight 0
        return self.dropout(torch.softmax(scores, dim=-1))  # new: forget some links while training

class MultiHeadAttention(nn.Module):
    """H `CausalAttention` heads side by side, then a projection that mixes them.  x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["emb_dim"]
        self.n_heads = config["n_heads"]
        # One matrix makes the queries, keys and values of all heads.
        self.query_key_value = Linear(width, 3 * width, bias=config["qkv_bias"])  # section 11
        self.projection = Linear(width, width)
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.query_key_value(x).view(batch, tokens, 3, self.n_heads, width // self.n_heads)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:  # section 7: x continues the tokens that the cache holds
            keys, values = cache.append(keys, values)  # (B, H, S, D) each: all S tokens so far
        # Query t stands at position S - T + t and sees the keys up to there. The kernel has that rule built in
        # for S = T; a single query sees all keys; several queries that continue a cache need a mask.
        seen = keys.size(2)
        mask = None
        if 1 < tokens < seen:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=x.device).tril(seen - tokens)
        dropout = self.dropout.p if self.training else 0.0
        # softmax(Q Kᵀ / √D) V, (B, H, T, D), in one kernel that never stores the weights (T, S)
        out = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=tokens == seen)
        out = out.transpose(1, 2).reshape(batch, tokens, width)  # (B, T, C): the heads side by side
        return self.dropout(self.projection(out))

# ---- 2. Block: attention moves information between tokens, then each is worked on alone ----
class LayerNorm(nn.Module):
    """scale · (x - mean) / √(variance + 1e-5) + shift, each token for itself (Ba et al., 2016)."""

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))  # scale
        self.bias = nn.Parameter(torch.zeros(emb_dim))  # shift

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)

class FeedForward(nn.Module):
    """Widen each token's vector four times, bend it, narrow it again.  x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: dict):
        super().__init__()
        self.expand = Linear(config["emb_dim"], 4 * config["emb_dim"])
        self.projection = Linear(4 * config["emb_dim"], config["emb_dim"])
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor) -> Tensor:
        # GELU in the form of OpenAI's model.py: ½x(1 + tanh(√(2/π)(x + 0.044715x³)))
        hidden = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.projection(hidden))  # (B, T, C)

class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.  x (B, T, C) -> (B, T, C).

    The norms stand before the steps, not on the stream (GPT-2 paper, 2.3): so x runs through all blocks
    changed only by additions, and gradients run back the same way.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.norm1 = LayerNorm(config["emb_dim"])
        self.attention = MultiHeadAttention(config)
        self.norm2 = LayerNorm(config["emb_dim"])
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.feed_forward(self.norm2(x))

# ---- 3. Model: token ids go in at the bottom, scores for the next token come out on top ----
class GPT2(nn.Module):
    """The language model (GPT-2 paper, section 2.3). ValueError for a config that cannot be."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = check_keys(config)  # section 9
        self.token_embedding = nn.Embedding(config["vocab_size"], config["emb_dim"])  # and head
        self.position_embedding = nn.Embedding(config["context_length"], config["emb_dim"])  # learned
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config["n_layers"]))
        self.final_norm = LayerNorm(config["emb_dim"])
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Weights normal with standard deviation 0.02, biases zero (OpenAI: 0.01 for positions)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (MultiHeadAttention, FeedForward)):  # `apply` comes to parts first
            # 2L of them add to the residual stream, which should not grow with depth (paper, 2.3).
            nn.init.normal_(module.projection.weight, std=0.02 / math.sqrt(2 * self.config["n_layers"]))

    def forward(self, idx: Tensor, cache: "list[KeyValueCache] | None" = None, last_only: bool = False) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V): scores for each next token; or only the last row."""
        past = cache[0].length if cache else 0
        end = past + idx.size(1)
        if end > self.config["context_length"]:
            raise ValueError(f"{end} tokens, above context_length {self.config['context_length']}")
        positions = torch.arange(past, end, device=idx.device)  # (T)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C) + (T, C)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)  # (B, T, C)
        if last_only:
            x = x[:, -1:]  # (B, 1, C): one row of the largest product will do
        x = self.final_norm(x)
        return linear(x, self.token_embedding.weight)  # (B, T, V): input and output share it

    def num_parameters(self) -> int:
        """How many numbers are trained; the head has none of its own."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT2":
        """A checkpoint, a Hugging Face folder, or `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`."""
        return load_pretrained(name_or_path)  # section 10

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in Hugging Face format: weights, config and tokenizer."""
        save_hugging_face(self, Path(folder))  # section 10

# ---- 4. Data: text becomes tokens; the target of each token is the one after it ----
IGNORE_INDEX = -100  # a target that no loss counts

@functools.lru_cache(maxsize=1)
def load_tokenizer():
    """GPT-2's byte-pair encoding (GPT-2 paper, section 2.2), a `tiktoken.Encoding`."""
    import tiktoken  # here: `--help` should not wait for it
    if (HERE / ".tiktoken").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / ".tiktoken"))
    return tiktoken.get_encoding("gpt2")

def text_to_token_ids(text: str, tokenizer) -> Tensor:
    """A prompt as token ids (1, T). In a prompt `<|endoftext|>` is ordinary text."""
    return torch.tensor([tokenizer.encode(text, disallowed_special=())], dtype=torch.long)

def token_ids_to_text(ids: Tensor | Sequence[int], tokenizer) -> str:
    """Token ids (T) or (1, T) as text. Bytes that make no whole character become �."""
    return tokenizer.decode([i for i in torch.as_tensor(ids).flatten().tolist() if i < tokenizer.n_vocab])

class GPTDataset(torch.utils.data.Dataset):
    """Windows of a text, one every `stride` tokens: (x, y), (context_length) each; y is one token later."""

    def __init__(self, token_ids: Sequence[int] | Tensor, context_length: int, stride: int | None = None):
        self.token_ids = torch.as_tensor(token_ids).flatten()
        self.context_length = context_length
        self.shift = 0  # how many tokens earlier windows begin; training changes it
        self.starts = range(0, len(self.token_ids) - context_length, stride or context_length)
        if not self.starts:
            raise ValueError(f"{len(self.token_ids)} tokens are too few for context_length {context_length}")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = max(0, self.starts[index] - self.shift)
        window = self.token_ids[start : start + self.context_length + 1].long()
        return window[:-1], window[1:]

    def scoring_windows(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows that may overlap; a target is -100 where an earlier one scored it."""
        context = self.context_length
        stride = min(stride or context, context)
        scored = 0
        for start in range(0, max(1, len(self.token_ids) - 1 - context + stride), stride):
            window = self.token_ids[start : start + context + 1].long()
            y = window[1:].clone()
            y[: scored - start] = IGNORE_INDEX
            scored = start + len(y)
            yield window[:-1], y

def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Items of any length as x (B, T), y (B, T). Padding stands behind, where no token sees it."""
    xs, ys = zip(*items)
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(xs), pad(ys, padding_value=IGNORE_INDEX)

def load_data(config: dict) -> tuple:
    """The training set, and the validation set: the held-back end of a text, or None."""
    if config["data"].lower().endswith((".json", ".jsonl")):
        return load_examples(config)  # section 8: prompts with completions, to fine-tune on
    ids = tokenize_file(config["data"])  # section 11: one long row of token ids
    n_val = min(math.ceil(len(ids) * config["val_fraction"]), config["max_val_tokens"])
    n_train = len(ids) - n_val
    counts = f"{config['data']}: {n_train:,} tokens to train on, {n_val:,} to validate"
    context = config["context_length"] if n_val else min(config["context_length"], max(1, n_train - 1))
    if n_train <= context or n_val == 1:
        raise ValueError(f"{counts}: too few for context_length {context}; lower it, or val_fraction")
    log.info("data      %s", counts)
    train_set = GPTDataset(ids[:n_train], context, config["stride"] or max(1, context // 2))
    val_set = GPTDataset(ids[n_train:], min(context, n_val - 1)) if n_val else None
    return train_set, val_set

# ---- 5. CONFIG: every setting of a run; `python gpt2.py train --KEY VALUE` changes one ----
CONFIG = {
    # The model: GPT-2 in everything but size
    "vocab_size": 50257,  # tokens in the vocabulary
    "context_length": 64,  # tokens the model sees at once
    "emb_dim": 128,  # width of a token's vector
    "n_heads": 4,  # attention heads in a block
    "n_layers": 4,  # blocks
    "dropout_rate": 0.0,  # share of values dropped while training
    "qkv_bias": True,  # a bias for queries, keys and values
    # The data
    "data": "the-verdict.txt",  # UTF-8 text, or .jsonl/.json examples
    "val_fraction": 0.1,  # share held back to validate: a text's end, or random examples
    "max_val_tokens": 100_000,  # hold back no more tokens of a text than this
    "stride": 0,  # tokens from one window to the next; 0: half the context
    # The run
    "batch_size": 6,  # windows or examples at once, in each process
    "grad_accumulation": 1,  # batches that make one optimizer step
    "epochs": 26,  # times through the training data
    "max_steps": 0,  # stop after so many optimizer steps; 0: after the epochs
    "learning_rate": 4e-3,  # the highest, reached by the warm-up
    "min_learning_rate": 1e-4,  # the last, or `learning_rate` where that is lower
    "warmup_steps": 150,  # steps up to the highest learning rate; at most a quarter of all
    "weight_decay": 0.1,  # AdamW's pull of matrices towards zero
    "grad_clip": 1.0,  # longest gradient; 0: any length
    "seed": 42,  # where all random numbers start
    # On the way, in steps; 0: once an epoch, but about ten times a run or more
    "eval_every": 0,  # measure the validation loss and show a sample so often
    "checkpoint_every": 0,  # save so often, and at each lowest validation loss
    "sample_prompt": "",  # what samples continue; else the beginning of the data
    # The machine
    "device": "auto",  # auto (an accelerator, if any), cpu, cuda, mps, xpu
    "precision": "auto",  # auto (half on CUDA; to train, on some CPUs too), fp32, bf16, fp16
    "compile": False,  # train through torch.compile
}

# ---- 6. Training: guess every next token, measure the surprise, step downhill ----
def learning_rate_at(step: int, config: dict, total_steps: int) -> float:
    """The rate of step 1, 2, …: a line up over `warmup_steps`, then half a cosine down."""
    warmup = min(config["warmup_steps"], total_steps // 4)
    if step <= warmup:
        return config["learning_rate"] * step / warmup
    progress = (step - warmup) / (total_steps - warmup)  # 0 to 1
    lowest = min(config["min_learning_rate"], config["learning_rate"])
    return lowest + (config["learning_rate"] - lowest) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(model: GPT2, config: dict) -> torch.optim.AdamW:
    """AdamW with GPT-3's betas (Brown et al., 2020, appendix B); GPT-2's are not published."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]  # do not decay
    groups = [{"params": matrices, "weight_decay": config["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].device.type in ("cpu", "cuda")  # one pass over memory: 4 times as fast
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), fused=fused)

@functools.lru_cache(maxsize=1)
def order_of_epoch(n_windows: int, seed: int, epoch: int) -> Tensor:
    """The random order in which an epoch takes its windows."""
    return torch.randperm(n_windows, generator=torch.Generator().manual_seed(hash((seed, epoch))))

def batches_of_step(dataset, step: int, run: dict, rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """The windows of step 1, 2, …: the share of process `rank`, as batches (x, y) of (B, T)."""
    config = run["config"]
    per_step = run["windows_per_step"]
    epoch, position = divmod(step - 1, math.ceil(len(dataset) / per_step))
    order = order_of_epoch(len(dataset), config["seed"], epoch)
    share = order[position * per_step : (position + 1) * per_step][rank::world]
    if isinstance(dataset, GPTDataset):  # cut elsewhere in each epoch, or the cuts are learnt too
        dataset.shift = hash((config["seed"], epoch)) % dataset.starts.step
    items = [dataset[i] for i in share.tolist()]
    if not items:  # more processes than windows: one that counts nothing
        x, y = dataset[0]
        items = [(x, torch.full_like(y, IGNORE_INDEX))]
    return [collate(items[i : i + config["batch_size"]]) for i in range(0, len(items), config["batch_size"])]

def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V), targets (B, T) -> summed cross-entropy in nats; a target of -100 is none."""
    logits = logits.flatten(0, 1).float()  # (B·T, V); half precision would round the sum
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)

@torch.inference_mode()
def evaluate(model: GPT2, dataset, *, stride: int | None = None) -> float:
    """The mean loss in nats per token, each counted once. Leaves the model in eval mode."""
    model.eval()  # no dropout
    device = next(model.parameters()).device
    windows = dataset.scoring_windows(stride) if isinstance(dataset, GPTDataset) else iter(dataset)
    batch_size = max(1, 1024 // model.config["context_length"])  # the logits take 0.2 GB
    loss = 0.0
    count = 0
    while items := list(itertools.islice(windows, batch_size)):
        x, y = collate(items)
        loss += summed_loss(model(x.to(device)), y.to(device)).item()
        count += int((y != IGNORE_INDEX).sum())
        log.info("measuring the loss: %s tokens", f"{count:,}", extra={"live": True})
    return loss / count

def train(config: dict | None = None, *, out: str | Path | None = "checkpoints", init: GPT2 | str | Path | None = None,
          resume: bool = False, overwrite: bool = False) -> Iterator[dict]:
    """Train, and yield a dict a step: its metrics (losses in nats per token), the `model`, a `sample`.

    `config` holds what differs from `CONFIG`. `out` is the folder for what the run leaves, or None. `init`
    is a model to start from, or its name. `resume` continues `out`, on one machine bit for bit; `overwrite`
    replaces it. Closing the generator saves.
    """
    folder = Path(out) if out is not None else None
    config, model, optimizer, run = start_run(config or {}, folder, init, resume, overwrite)  # section 9
    device = next(model.parameters()).device
    rank, world = join_processes(device)  # section 9
    dtype, autocast, scaler = mixed_precision(config["precision"], device)  # section 9
    scaler.load_state_dict(run["scaler"] or scaler.state_dict())
    train_set, val_set = load_data(config)
    log.info("model     %s parameters, on %s in %s", f"{model.num_parameters():,}", device, dtype)
    steps_per_epoch = math.ceil(len(train_set) / run["windows_per_step"])
    total_steps = config["epochs"] * steps_per_epoch
    last_step = min(total_steps, config["max_steps"] or total_steps)
    often = min(steps_per_epoch, math.ceil(total_steps / 10))  # what 0 means
    if run["step"] >= last_step:
        raise ValueError(f"{run['step']} of {total_steps} steps are done: raise max_steps, or start anew with init")
    network = torch.compile(model) if config["compile"] else model  # saving and sampling use the plain model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network)
    tokenizer = load_tokenizer()
    x, y = train_set[0]  # samples continue its prompt, or 5 tokens of a text
    prompt = text_to_token_ids(config["sample_prompt"], tokenizer)  # (1, T)
    prompt = prompt if prompt.numel() else x[None, : (y == IGNORE_INDEX).sum() + 1 if y[0] == IGNORE_INDEX else 5]
    save = functools.partial(save_run, folder, run, model, optimizer, scaler)  # section 9

    for step in range(run["step"] + 1, last_step + 1):
        started = time.perf_counter()
        # Dropout follows from seed, step and process alone: so a resumed run repeats it.
        torch.manual_seed(hash((config["seed"], step, rank)))
        model.train()  # a measurement or a sample left it in eval mode
        learning_rate = learning_rate_at(step, config, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        batches = batches_of_step(train_set, step, run, rank, world)
        n_targets = sum_over_processes(sum(int((y != IGNORE_INDEX).sum()) for _, y in batches))  # section 9
        loss = torch.zeros((), device=device)
        for i, (x, y) in enumerate(batches):  # the gradients of all batches add up
            later = world > 1 and i < len(batches) - 1  # exchange gradients once, with the last batch
            with network.no_sync() if later else contextlib.nullcontext():
                with autocast:
                    logits = network(x.to(device))  # (B, T, V)
                    # Divided by the targets of the whole step: so the gradients are those of one big batch.
                    batch_loss = summed_loss(logits, y.to(device)) / n_targets
                scaler.scale(batch_loss * world).backward()  # exchanging divides by `world`
            loss += batch_loss.detach()

        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"] or math.inf).item()
        loss = sum_over_processes(loss)
        # The scaler lifts small fp16 gradients, and skips a step in which they overflow.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient {grad_norm}: lower learning_rate")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        run["step"] = step
        run["tokens_seen"] += int(n_targets)
        row = {"step": step, "epoch": math.ceil(step / steps_per_epoch), "tokens_seen": run["tokens_seen"]}
        row |= {"train_loss": loss, "learning_rate": learning_rate}
        row["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
        n_tokens = world * sum(x.numel() for x, _ in batches)
        row["tokens_per_second"] = round(n_tokens / (time.perf_counter() - started), 1)
        extra = {"total_steps": last_step, "model": model}
        scheduled = step % (config["eval_every"] or often) == 0 or step == total_steps
        if val_set and (scheduled or step == last_step):
            with autocast:  # one only for max_steps is not kept: so N + N steps are 2N
                (row if scheduled else extra)["val_loss"] = evaluate(model, val_set)
        run["metrics"].append(row)
        due = step % (config["checkpoint_every"] or often) == 0 or step == last_step
        if due or row.get("val_loss", math.inf) < run["best_val_loss"]:
            saved = save(plot=step == last_step)
        if rank == 0 and (scheduled or step == last_step):
            extra["sample"] = token_ids_to_text(generate(model, prompt, 40, eos_id=tokenizer.eot_token), tokenizer)
        try:
            yield row | extra
        except GeneratorExit:  # the caller stops here
            saved = save(plot=True)
            break
    if not saved:
        raise OSError(f"step {run['step']}, the last, is not saved in {folder}")

# ---- 7. Generation: logits become probabilities, these a token, and that the next input ----
class KeyValueCache:
    """Keys and values of the tokens that one block has read; later tokens do not change them."""

    def __init__(self, context_length: int):
        self.context_length = context_length
        self.length = 0
        self.keys = None  # (B, H, context_length, D), made when the first tokens come
        self.values = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T tokens, (B, H, T, D) each; return those of all S tokens so far, (B, H, S, D)."""
        if self.keys is None:
            self.keys = keys.new_empty(*keys.shape[:2], self.context_length, keys.size(3))
            self.values = torch.empty_like(self.keys)
        start = self.length
        self.length += keys.size(2)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                             top_p: float | None = None) -> Tensor:
    """logits (B, V) -> probabilities (B, V). Temperature below 1 sharpens, above 1 flattens.

    top_k keeps the k most probable (Fan et al., 2018), top_p those that reach p (Holtzman et al., 2020).
    """
    check_sampling(temperature, top_k, top_p)  # section 9
    if temperature == 0:  # the limit: all on the most probable token
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits.dtype)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no overflow
    if top_k is not None and top_k < logits.size(-1):
        highest, tokens = logits.topk(top_k)  # (B, k) each
        logits = torch.full_like(logits, -math.inf).scatter(1, tokens, highest)  # exactly k
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)  # (B, V) each
        before = ordered.cumsum(dim=-1) - ordered  # what the more probable tokens have together
        kept = ordered.masked_fill((before >= top_p) & (before > 0), 0.0)  # never the first
        probabilities = torch.zeros_like(kept).scatter(1, tokens, kept / kept.sum(dim=-1, keepdim=True))
    return probabilities

def sample_next(logits: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                generator: torch.Generator | None = None) -> Tensor:
    """logits (B, V) -> token ids (B, 1): the most probable at temperature 0, else drawn."""
    if not logits.amax(dim=-1).isfinite().all():  # NaN if one is NaN
        raise ValueError("NaN or infinite logits: weights are damaged, or fp16 overflowed")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Drawn on the CPU: the same on every device.
    probabilities = next_token_probabilities(logits.float().cpu(), temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)

def generate(model: GPT2, idx: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, eos_id: int | None = None, generator: torch.Generator | None = None,
             use_cache: bool = True, on_token: Callable[[Tensor], None] | None = None) -> Tensor:
    """Continue the prompts idx (B, T) -> (B, T + new), new at most `max_new_tokens`. Temperature 0: greedy.

    Ends when every row has produced `eos_id`; rows that have are filled up with it. `on_token` gets each (B, 1).
    When the context is full, the model goes on from its last half, read anew.
    """
    model.eval()
    context = model.config["context_length"]
    idx = idx.to(next(model.parameters()).device)
    start = max(0, idx.size(1) - context)  # the model sees idx[:, start:]
    cache = None
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    with torch.inference_mode():  # 5 % faster than no_grad
        for _ in range(max_new_tokens):
            if idx.size(1) - start > context:
                start = idx.size(1) - max(1, context // 2)
                cache = None
            unread = idx[:, start:] if cache is None else idx[:, -1:]
            if use_cache and cache is None:
                cache = [KeyValueCache(context) for _ in model.blocks]
            logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
            new = sample_next(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if eos_id is not None:
                new = new.masked_fill(ended, eos_id)
                ended |= new == eos_id
            idx = torch.cat([idx, new], dim=1)
            if on_token:
                on_token(new)
            if ended.all():
                break
    return idx.clone()  # out here: no training on what inference mode made

# ==== Part two: a program ====
# ---- 8. Fine-tuning: the same training, but only completions count in the loss ----
ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n")

class CompletionDataset(list):
    """Prompts and completions as (x, y) of any length; y is -100 in the prompt, `<|endoftext|>` at the end."""

    def __init__(self, examples: Sequence[tuple[str, str]], context_length: int):
        self.examples = examples
        tokenizer = load_tokenizer()
        for prompt, completion in examples:
            before = tokenizer.encode(prompt, disallowed_special=()) or [tokenizer.eot_token]
            after = [*tokenizer.encode(completion, disallowed_special=()), tokenizer.eot_token]
            x = (before + after)[:-1]
            y = [IGNORE_INDEX] * (len(before) - 1) + after
            self.append((torch.tensor(x[-context_length:]), torch.tensor(y[-context_length:])))

def instruction_prompt(instruction: str, context: str = "") -> str:
    """An instruction, maybe with an input, in Stanford Alpaca's layout."""
    paired = ", paired with an input that provides further context" if context else ""
    return ALPACA.format(paired, instruction, f"### Input:\n{context}\n\n" if context else "")

def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) pairs: a JSON object a line, or a JSON list."""
    with reading(path):
        text = path.read_text(encoding="utf-8-sig").strip()
        entries = json.loads(text) if text.startswith("[") else filter(str.strip, text.split("\n"))
    examples = []
    for number, entry in enumerate(entries, start=1):
        with reading(f"{path}, entry {number}"):
            entry = json.loads(entry) if isinstance(entry, str) else entry
            if "instruction" in entry:
                entry["prompt"] = instruction_prompt(entry["instruction"], entry.get("input") or "")
                entry["completion"] = entry["output"]
            if None in (entry["prompt"], entry["completion"]):
                raise ValueError("null is no text")
            examples.append((str(entry["prompt"]), str(entry["completion"])))
    return examples

def load_examples(config: dict) -> tuple[CompletionDataset, CompletionDataset | None]:
    """The training and the validation set of a file of examples."""
    examples = read_examples(find_data(config["data"]))
    examples = [examples[i] for i in order_of_epoch(len(examples), config["seed"], 0)]  # files may be sorted
    n_val = math.ceil(len(examples) * config["val_fraction"])
    log.info("data      %s: %s examples, %s to validate", config["data"], len(examples), n_val)
    if n_val == len(examples):
        raise ValueError(f"{config['data']} leaves no example to train on: lower val_fraction")
    sets = [CompletionDataset(part, config["context_length"]) for part in (examples[n_val:], examples[:n_val])]
    return sets[0], sets[1] or None

@torch.inference_mode()
def classify(model: GPT2, dataset: CompletionDataset, labels: Sequence[str] = ()) -> list[str]:
    """For each example, the most probable of these completions, or of all in the dataset."""
    model.eval()
    labels = labels or sorted({label for _, label in dataset.examples})
    device = next(model.parameters()).device
    predicted = []
    for prompt, _ in dataset.examples:
        pairs = CompletionDataset([(prompt, label) for label in labels], model.config["context_length"])
        losses = [summed_loss(model(x[None].to(device)), y[None].to(device)).item() for x, y in pairs]
        predicted.append(labels[losses.index(min(losses))])
    return predicted

# ---- 9. Runs: settings, any machine, whole files, going on where a run stopped ----
MODEL_KEYS = tuple(CONFIG)[:7]  # those under "The model"
RESUME_MAY_CHANGE = {"max_steps", "eval_every", "checkpoint_every", "sample_prompt", "device", "compile",
                     "data", "batch_size", "grad_accumulation"}

def check_keys(config: dict, keys: Sequence[str] = MODEL_KEYS) -> dict:
    """These keys of `config`. ValueError unless each is of CONFIG's type, and in its limits."""
    for key in keys:
        value = config.get(key)
        kind = type(CONFIG[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{key} is {value!r:.80}; it must be of the type {kind.__name__}")
        low = int(key in (*MODEL_KEYS[:5], "batch_size", "grad_accumulation", "epochs"))
        high = 0.99 if key in ("dropout_rate", "val_fraction") else 10**6 if low else 10**9
        if kind in (int, float) and not low <= value <= high:
            raise ValueError(f"{key} is {value}; it must be from {low} to {high}")
    if config["emb_dim"] % config["n_heads"]:
        raise ValueError(f"emb_dim {config['emb_dim']} is not a multiple of n_heads {config['n_heads']}")
    return {key: config[key] for key in keys}

def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for values that make no sense."""
    if temperature != 0 and not 1e-4 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or from 0.0001 on")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k must be 1 or more, top_p above 0 and at most 1: here {top_k}, {top_p}")

def check_config(given: dict) -> dict:
    """`CONFIG` with what is given. ValueError for an unknown key or a value that cannot be."""
    for key in given.keys() - CONFIG.keys():
        raise ValueError(f"unknown key {key!r}: see CONFIG")
    config = check_keys(CONFIG | given, tuple(CONFIG))
    if config["vocab_size"] < CONFIG["vocab_size"]:
        raise ValueError(f"vocab_size {config['vocab_size']} is below GPT-2's 50257")
    return config

def pick_device(name: str) -> torch.device:
    """`auto` is an accelerator, if there is one; under torchrun, each process has its own."""
    if name == "auto":
        name = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"no device {name!r} here: try auto, cpu, cuda, mps, xpu") from error

def mixed_precision(name: str, device: torch.device) -> tuple:
    """(dtype, autocast, scaler). `auto` is half where CUDA or the CPU computes it."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if name == "auto":
        can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        name = "bf16" if can.get("amx_bf16") or can.get("avx512_bf16") else "fp32"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in types:
        raise ValueError(f"precision is {name!r}; it must be auto, fp32, bf16 or fp16")
    autocast = torch.autocast(device.type, types[name], enabled=name != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and name == "fp16")
    return types[name], autocast, scaler

def join_processes(device: torch.device) -> tuple[int, int]:
    """(rank of this process, number of processes), joined if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def sum_over_processes(value: float | Tensor) -> float:
    """The sum of this number over all processes."""
    total = torch.tensor(float(value), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()

def find_data(name: str) -> Path:
    """The data file, or the one of that name beside gpt2.py."""
    for path in (Path(name), HERE / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name!r} is no file: give a UTF-8 text, or .jsonl examples")

def sha256_of(name: str) -> str:
    """What tells one file from another."""
    with open(find_data(name), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@contextlib.contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn what a file's readers raise into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if "cannot be used" in str(error):
            raise
        raise ValueError(f"{source} cannot be used: {type(error).__name__}, {error!s:.300}") from error

def write_file(path: Path, write: Callable) -> None:
    """Let `write` fill a file that then takes the name `path`, which is whole or as before."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut can keep the name and lose the bytes
        os.replace(part, path)
    except (OSError, RuntimeError, ImportError) as error:  # torch.save: a full disk; no matplotlib
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error

def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write tensors and plain values, with `config` and `model` (weights by name) among them."""
    write_file(Path(path), functools.partial(torch.save, checkpoint))

def load_checkpoint(path: str | Path, mmap: bool = True) -> dict:
    """What `save_checkpoint` wrote; nothing in it is run. ValueError if it is no checkpoint."""
    with reading(path), open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is no checkpoint")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_keys(checkpoint["config"])
        return checkpoint

def start_run(given: dict, folder: Path | None, init, resume: bool, overwrite: bool) -> tuple:
    """(config, model, optimizer, what else a checkpoint keeps): new, from a model, or resumed."""
    last = folder / "last.pt" if folder else None
    if last and last.exists() and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run: give --resume, --overwrite or another --out")
    old = {}
    if resume and (overwrite or init is not None):
        raise ValueError("resume excludes init and overwrite")
    if resume:
        checkpoint = load_checkpoint(last, mmap=False)  # for the file will be replaced
        old = checkpoint["config"]
    elif init is not None:
        source = init if isinstance(init, GPT2) else GPT2.from_pretrained(init)
        old = {key: source.config[key] for key in MODEL_KEYS if key != "dropout_rate"}
    config = check_config(old | given)
    for key in old.keys() - (RESUME_MAY_CHANGE if resume else {"context_length"}):
        if config[key] != old[key]:
            raise ValueError(f"{key} must stay {old[key]!r}: leave it out, or start anew with init")
    torch.manual_seed(config["seed"])
    model = GPT2(config)
    if init is not None:
        weights = source.state_dict()
        weights["position_embedding.weight"] = weights["position_embedding.weight"][: config["context_length"]]
        with reading(f"a model for context_length {config['context_length']}"):
            model.load_state_dict(weights)
    device = pick_device(config["device"])
    optimizer = make_optimizer(model.to(device), config)
    run = {"config": config, "step": 0, "tokens_seen": 0, "best_val_loss": math.inf, "metrics": [], "scaler": {}}
    run["windows_per_step"] = config["batch_size"] * config["grad_accumulation"] * join_processes(device)[1]
    run["data_sha256"] = sha256_of(config["data"])
    if resume:
        with reading(last):
            for key in ("data_sha256", "windows_per_step"):
                if checkpoint[key] != run[key]:
                    raise ValueError(f"{key} was {checkpoint[key]}, now {run[key]}: data or batch_size?")
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, moments in optimizer.state.items():  # AdamW would write past a small one
                for key in ("exp_avg", "exp_avg_sq"):
                    if (moments[key].shape, moments[key].stride()) != (parameter.shape, parameter.stride()):
                        raise ValueError("AdamW's moments and the parameters differ in shape")
            run |= {key: checkpoint[key] for key in ("step", "tokens_seen", "best_val_loss", "metrics", "scaler")}
    keep_freed_memory()
    return config, model, optimizer, run

def save_run(folder: Path | None, run: dict, model: GPT2, optimizer, scaler, plot: bool = False) -> bool:
    """Write what a run leaves, best.pt after the lowest measurement. False if that fails."""
    if folder is None or int(os.environ.get("RANK") or 0) > 0:
        return True
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    lines = "".join(json.dumps(row) + "\n" for row in run["metrics"]).encode()
    val_loss = run["metrics"][-1].get("val_loss", math.inf)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if val_loss < run["best_val_loss"]:
            save_checkpoint(folder / "best.pt", run | {"metrics": [], "model": state["model"]})
            run["best_val_loss"] = val_loss
        elif run["best_val_loss"] == math.inf:  # best.pt is of a run that this one replaces
            (folder / "best.pt").unlink(missing_ok=True)
        write_file(folder / "metrics.jsonl", lambda file: file.write(lines))
        save_checkpoint(folder / "last.pt", run | state)
        if plot:
            write_file(folder / "loss.png", functools.partial(plot_losses, run["metrics"]))
    except OSError as error:
        log.warning("step %s was not saved: %s", run["step"], error)
        return False
    return True

def plot_losses(metrics: list[dict], file) -> None:
    """Draw the losses as PNG into an open file."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7, 4), dpi=100, layout="constrained").subplots()
    axes.plot(*zip(*((row["step"], row["train_loss"]) for row in metrics)), "#0072B2", label="training")
    if measured := [(row["step"], row["val_loss"]) for row in metrics if "val_loss" in row]:
        step, lowest = min(measured, key=lambda point: point[1])
        axes.plot(*zip(*measured), "o--", color="#D55E00", markersize=4, label="validation")
        axes.plot(step, lowest, "kv", label=f"lowest validation: {lowest:.2f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(loc="center right")
    axes.figure.savefig(file, format="png")

# ---- 10. Pretrained: the same model under other names, in the layout of Hugging Face ----
OPENAI = {"vocab_size": 50257, "context_length": 1024, "qkv_bias": True}
OPENAI_SIZES = {  # GPT-2 paper, table 2
    "gpt2": OPENAI | {"n_layers": 12, "n_heads": 12, "emb_dim": 768},
    "gpt2-medium": OPENAI | {"n_layers": 24, "n_heads": 16, "emb_dim": 1024},
    "gpt2-large": OPENAI | {"n_layers": 36, "n_heads": 20, "emb_dim": 1280},
    "gpt2-xl": OPENAI | {"n_layers": 48, "n_heads": 25, "emb_dim": 1600},
}

HUGGING_FACE_NAMES = {  # parts of names: ours, theirs
    "token_embedding": "wte", "position_embedding": "wpe", "blocks.": "h.", "final_norm": "ln_f",
    "norm1": "ln_1", "attention.query_key_value": "attn.c_attn", "attention.projection": "attn.c_proj",
    "norm2": "ln_2", "feed_forward.expand": "mlp.c_fc", "feed_forward.projection": "mlp.c_proj"}
TRANSPOSED = re.compile(r"\.c_(attn|proj|fc)\.weight$")  # stored input x output
CONFIG_NAMES = {"vocab_size": "vocab_size", "context_length": "n_positions", "emb_dim": "n_embd",
                "n_heads": "n_head", "n_layers": "n_layer", "dropout_rate": "resid_pdrop"}
HUGGING_FACE_CONFIG = {  # what a config.json must say or leave out
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                     "BF16": torch.bfloat16, "BOOL": torch.bool, "U8": torch.uint8}

def load_pretrained(name_or_path: str | Path) -> GPT2:
    """A model in float32, on the CPU, in eval mode. A path wins over OpenAI's name."""
    path = Path(name_or_path)
    tensors = {}
    if not path.exists() and str(path) not in OPENAI_SIZES:
        raise FileNotFoundError(f"no model {str(path)!r}: train one, or give {', '.join(OPENAI_SIZES)}")
    with reading(path):
        if path.is_file():
            checkpoint = load_checkpoint(path)
            config = checkpoint["config"]
            tensors = checkpoint["model"]
        elif path.is_dir():
            given = {"resid_pdrop": 0.1} | json.loads((path / "config.json").read_text("utf-8"))
            for key, needed in HUGGING_FACE_CONFIG.items():
                if given.get(key, needed) != needed:
                    raise ValueError(f"{key} is {given[key]!r}; only {needed!r} is supported")
            config = {ours: given[theirs] for ours, theirs in CONFIG_NAMES.items()} | {"qkv_bias": True}
            for file in sorted(path.glob("model*.safetensors")):
                tensors |= read_safetensors(file)
            tensors = tensors or torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
        else:
            config = OPENAI_SIZES[str(path)] | {"dropout_rate": 0.1}
            host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
            url = f"{host}/openai-community/{path}/resolve/main/pytorch_model.bin"
            with reading(f"{url} or {path}.bin in {torch.hub.get_dir()}"), contextlib.redirect_stdout(sys.stderr):
                tensors = torch.hub.load_state_dict_from_url(url, file_name=f"{path}.bin", weights_only=True)
        weights = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # old files hold the causal mask
                continue
            tensor = tensor.t() if TRANSPOSED.search(name) else tensor
            for ours, theirs in HUGGING_FACE_NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = torch.empty(tensor.shape).copy_(tensor.detach())
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights["token_embedding.weight"]):
            raise ValueError("lm_head.weight is not wte.weight; that is not supported")
        with torch.device("meta"):  # shapes without numbers
            model = GPT2(config)
        model.load_state_dict(weights, assign=True)
        return model.eval()

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors: 8 bytes header length, header {name: {dtype, shape, data_offsets}}, data."""
    with reading(path), open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read when it is used
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            raw = torch.frombuffer(data, dtype=torch.uint8, count=end - start, offset=begin + start)
            tensors[name] = raw.view(SAFETENSORS_TYPES[entry["dtype"]]).view(entry["shape"])
        return tensors

def save_hugging_face(model: GPT2, folder: Path) -> None:
    """Write what `transformers` takes for a GPT-2."""
    from tiktoken.load import read_file_cached
    ours = model.config
    config = {theirs: ours[key] for key, theirs in CONFIG_NAMES.items()} | HUGGING_FACE_CONFIG
    config |= {"architectures": ["GPT2LMHeadModel"], "n_ctx": ours["context_length"]}
    config |= {"attn_pdrop": ours["dropout_rate"], "embd_pdrop": ours["dropout_rate"]}
    # Theirs always has these biases.
    weights = {f"h.{i}.attn.c_attn.bias": torch.zeros(3 * ours["emb_dim"]) for i in range(ours["n_layers"])}
    for name, tensor in model.state_dict().items():
        for our_part, their_part in HUGGING_FACE_NAMES.items():
            name = name.replace(our_part, their_part)
        weights[name] = (tensor.t() if TRANSPOSED.search(name) else tensor).float().cpu()
    load_tokenizer()  # compares OpenAI's files with their hashes
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    contents = {"merges.txt": read_file_cached(url + "vocab.bpe")}
    contents["vocab.json"] = read_file_cached(url + "encoder.json")
    contents["config.json"] = json.dumps(config, indent=2).encode()
    if any(folder.glob("*")):
        raise ValueError(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "pytorch_model.bin", functools.partial(torch.save, weights))
    for name, content in contents.items():
        write_file(folder / name, lambda file: file.write(content))
    log.info("wrote %s, a model that sees at most %s tokens", folder, ours["context_length"])

# ---- 11. Large texts, fast CPUs: tokens in pieces, products of few rows, memory kept ----
# No token runs from a visible character into white space: so a cut there changes none.
SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)

def safe_pieces(path: Path) -> Iterator[str]:
    """A file in pieces of a million characters; their tokens are the file's."""
    rest = ""
    with reading(f"{path}, which must be plain text in UTF-8,"):
        with open(path, encoding="utf-8-sig", newline="") as file:  # line ends stay as they are
            while block := file.read(1 << 20):
                if cut := SAFE_CUT.match(block):
                    yield rest + cut.group()
                    rest = ""
                rest += block[cut.end() if cut else 0 :]
        yield rest

def tokenize_file(name: str) -> Tensor:
    """The tokens of a text, made by all cores, as uint16: 2 bytes a token."""
    cores = os.cpu_count()
    pieces = safe_pieces(find_data(name))
    tokens = array("H")
    while group := list(itertools.islice(pieces, 2 * cores)):
        for ids in load_tokenizer().encode_batch(group, num_threads=cores, allowed_special="all"):
            tokens.extend(ids)
        log.info("tokenising %s: %s tokens", name, f"{len(tokens):,}", extra={"live": True})
    if not tokens:
        raise ValueError(f"{name} is empty: give a text")
    if 201 in tokens:  # GPT-2's token for a carriage return
        log.info("%s has Windows line ends: without CR it has fewer tokens", name)
    return torch.frombuffer(tokens, dtype=torch.uint16)

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, x (..., in), weight (out, in), bias (out) -> (..., out), faster for few rows on a CPU.

    For them, PyTorch reads the weights with one core. Cut into pieces, the product is a batch that all cores
    share: on two, with GPT-2's matrices, 2.2 times as fast for one row, 1.6 times for 8.
    """
    if hasattr(weight, "packed"):
        return torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")
    rows = x.numel() // x.size(-1)
    outputs = weight.size(0)
    no_gain = rows > 128 or weight.numel() < 100_000 or weight.dtype != torch.float32
    if no_gain or torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    pieces = next(n for n in range(48, 0, -1) if outputs % n == 0)  # equal ones; more gain nothing
    same = x.reshape(rows, -1).expand(pieces, -1, -1)  # (pieces, rows, in), without a copy
    cut = weight.view(pieces, outputs // pieces, -1)  # (pieces, out / pieces, in)
    bias = x.new_zeros(1, 1, 1) if bias is None else bias.view(pieces, 1, -1)
    # same @ cutᵀ, or for few rows cut @ sameᵀ, whose kernel is faster: (pieces, rows, out / pieces)
    out = torch.baddbmm(bias, same, cut.mT) if rows > 4 else torch.baddbmm(bias.mT, cut, same.mT).mT
    return out.transpose(0, 1).reshape(*x.shape[:-1], outputs)

class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

def pack_matrices(model: GPT2) -> None:
    """Keep bf16 matrices as oneDNN reads them, too: one row 1.4 times as fast. No training after it."""
    for matrix in model.parameters():
        if matrix.dim() == 2:
            matrix.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach())

def keep_freed_memory() -> None:
    """Let glibc keep freed memory: the default run is 1.5 times as fast, GPT-2 124M 1.2 times."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: macOS, Windows
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back

# ---- 12. Command line: results go to standard output, progress and notes to standard error ----
def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters are written out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match.group()):02x}", text)

class Notes(logging.Handler):
    """Notes on standard error. A live one is overwritten on a terminal, and left out elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        live = getattr(record, "live", False)
        terminal = sys.stderr.isatty()
        if live and not terminal:
            return
        text = printable(record.getMessage())
        text = text[: os.get_terminal_size(2).columns - 1] if live else text + "\n"
        with contextlib.suppress(OSError):  # the run goes on
            print("\r\x1b[K" * terminal + text, end="", file=sys.stderr, flush=True)

def run_train(args) -> None:
    """Train. SystemExit 130 or 143 after Ctrl-C or SIGTERM, when the step is done and saved."""
    given = OPENAI_SIZES.get(args.model_size, {}) | {k: v for k, v in args.given.items() if k in CONFIG}
    run = train(given, out=args.out, init=args.init or None, resume=args.resume, overwrite=args.overwrite)
    signals = []

    def stop(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one does not wait
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended `| tee`
            os.write(2, b"\nfinishing this step, then saving\n")

    started = time.monotonic()
    for steps, row in enumerate(run, start=1):
        if steps == 1:  # before, there was nothing to save
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        left = (time.monotonic() - started) / steps * (row["total_steps"] - row["step"])
        val_loss = f"  validation {row['val_loss']:.3f}" if "val_loss" in row else ""
        log.info(f"step {row['step']}/{row['total_steps']}  epoch {row['epoch']}  loss {row['train_loss']:.3f}"
                 f"{val_loss}  {row['tokens_per_second']:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left",
                 extra={"live": "sample" not in row})
        if "sample" in row:
            log.info(textwrap.indent(textwrap.fill(row["sample"], 74), "    "))
        stopped = sum_over_processes(len(signals)) and row["step"] < row["total_steps"]
        if stopped:
            run.close()
            break
    sum_over_processes(0)  # wait for the process that saves
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        log.info("saved step %s; go on with: python gpt2.py train --resume --out %s", row["step"], args.out)
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    if not int(os.environ.get("RANK") or 0):
        args.model = str(Path(args.out, "last.pt"))
        vars(args).update(load_checkpoint(args.model)["config"])
        for number in (signal.SIGINT, signal.SIGTERM):  # saved
            signal.signal(number, signal.default_int_handler)
        if args.data.lower().endswith((".json", ".jsonl")):
            run_eval(args)
        log.info("next: python gpt2.py generate --model %s, or best.pt if any", args.model)

def run_generate(args) -> None:
    """Print texts as they are made."""
    draws = args.do_sample or args.given.keys() & {"temperature", "top_k", "top_p"}
    options = {"temperature": args.temperature if draws else 0.0, "top_k": args.top_k or None, "top_p": args.top_p}
    check_sampling(**options)  # before anything is printed
    model = load_model(args)
    tokenizer = load_tokenizer()
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == ["-"] else " ".join(args.prompt)
    end = tokenizer.eot_token
    ids = text_to_token_ids(instruction_prompt(prompt) if args.instruct else prompt, tokenizer)
    ids = ids if ids.numel() else torch.tensor([[end]])
    if ids.size(1) > model.config["context_length"]:
        log.info("of %s tokens, only the last %s are seen", ids.size(1), model.config["context_length"])

    def write(text):
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    def on_token(new):
        if new.item() < end:  # half a character waits
            write(decoder.decode(tokenizer.decode_single_token_bytes(new.item())))

    for i in range(args.num_samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        write(f"--- sample {i + 1} of {args.num_samples} ---\n" if args.num_samples > 1 else "")
        write("" if args.instruct else prompt)
        generator = torch.Generator().manual_seed(args.seed + i)
        generate(model, ids, args.max_tokens, eos_id=end, generator=generator, on_token=on_token, **options)
        write(decoder.decode(b"", final=True) + "\n")

def run_eval(args) -> None:
    """Print loss, perplexity, bits per byte and tokens; for a classification, accuracy too."""
    model = load_model(args)
    context = model.config["context_length"]
    checkpoint = load_checkpoint(args.model) if Path(args.model).is_file() and not args.all else {}
    seen = checkpoint.get("data_sha256") == sha256_of(args.data)
    config = checkpoint["config"] if seen else {"context_length": context, "val_fraction": 0.0}
    train_set, val_set = load_data(check_config(config | {"data": args.data, "stride": args.stride}))
    dataset = val_set or train_set
    if seen:
        log.info("trained on this file: measuring %s", "the part held back" if val_set else "all of it")
    is_text = isinstance(dataset, GPTDataset)
    scored = dataset.token_ids[1:] if is_text else torch.cat([y[y != IGNORE_INDEX] for _, y in dataset])
    text = load_tokenizer().decode_bytes([i for i in scored.tolist() if i != load_tokenizer().eot_token])
    loss = evaluate(model, dataset, stride=args.stride or max(1, context // 2))
    log.info("", extra={"live": True})
    report = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": len(scored)}
    report["bits_per_byte"] = loss * len(scored) / math.log(2) / max(1, len(text))
    labels = set() if is_text else {label for _, label in train_set.examples + dataset.examples}
    if 2 <= len(labels) <= 50:
        predicted = classify(model, dataset, sorted(labels))
        report["accuracy"] = sum(a == b for a, (_, b) in zip(predicted, dataset.examples)) / len(predicted)
    lines = [f"{k:<14}{v:>14,.4f}" if isinstance(v, float) else f"{k:<14}{v:>14,}" for k, v in report.items()]
    print(json.dumps(report) if args.json else "\n".join(lines))

def load_model(args) -> GPT2:
    """The model of a command; on a CPU in fp32 by default, for the same text on each."""
    model = GPT2.from_pretrained(args.model)
    check_config(model.config | {"seed": args.seed})  # vocabulary and seed
    device = pick_device(args.device)
    precision = "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision
    model.to(device, mixed_precision(precision, device)[0])
    if precision == "bf16" and device.type == "cpu" and mixed_precision("auto", device)[0] == torch.bfloat16:
        pack_matrices(model)  # section 11
    return model

OPTIONS = {  # beside keys of CONFIG
    "model": "checkpoints/last.pt",  # a checkpoint, a Hugging Face folder, gpt2, gpt2-medium, ...
    "model_size": "",  # one of OpenAI's sizes; other options win over it
    "init": "",  # a model to start from
    "resume": False,  # continue the run in --out exactly
    "overwrite": False,  # replace the run in --out
    "out": "checkpoints",  # folder for what a run leaves
    "max_tokens": 100,  # most tokens to write
    "do_sample": False,  # draw tokens; the next three imply it
    "temperature": 1.0,  # below 1 safer, above 1 wilder
    "top_k": 0,  # draw from so many most probable tokens; 0: from all
    "top_p": 1.0,  # draw from the fewest tokens that reach this probability
    "num_samples": 1,  # texts
    "instruct": False,  # the prompt is an instruction: print only the response
    "all": False,  # measure all of a file, trained on or not
    "json": False,  # print one JSON object
}
COMMANDS = {
    "train": (run_train, "train or fine-tune a model", [*list(OPTIONS)[1:6], *CONFIG]),
    "generate": (run_generate, "continue a text", ["model", *list(OPTIONS)[6:13], "seed", "device", "precision"]),
    "eval": (run_eval, "measure a model", ["model", "data", "stride", "all", "json", "device", "precision"]),
    "export": (lambda args: GPT2.from_pretrained(args.model).save_pretrained(args.folder),
               "write a model as a Hugging Face folder", ["model"]),
}

def make_parser() -> argparse.ArgumentParser:
    """The commands. An option's help is the comment beside it, in CONFIG or OPTIONS."""
    parser = argparse.ArgumentParser(prog="gpt2.py", description=__doc__.partition("\n")[0])
    parsers = parser.add_subparsers(metavar="{train,generate,eval,export}", required=True, dest="command")
    comments = dict(re.findall(r'^    "(\w+)": .+,  # (.+)$', Path(__file__).read_text("utf-8"), re.MULTILINE))
    for name, (_, text, keys) in COMMANDS.items():
        command = parsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.print_usage = parser.print_usage = lambda file: None  # an error is one line
        for key in keys:
            value = (OPTIONS | CONFIG)[key]
            kind = {"type": type(value), "metavar": type(value).__name__.upper()}
            kind["choices"] = OPENAI_SIZES if key == "model_size" else None
            if isinstance(value, bool):
                kind = {"action": argparse.BooleanOptionalAction if key in CONFIG else "store_true"}
            kind["help"] = f"{comments[key]} (default: {value})"
            command.add_argument(f"--{key}", *["--lr"] * (key == "learning_rate"), default=argparse.SUPPRESS, **kind)
        if name == "generate":
            command.add_argument("prompt", nargs="*", default=["I HAD always thought"], help="- is standard input")
        if name == "export":
            command.add_argument("folder", help="where to write it")
    return parser

def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0, or 2 after a line that says what is wrong, 130 to 143 if stopped."""
    given = vars(make_parser().parse_args(arguments))
    args = argparse.Namespace(**OPTIONS | CONFIG | given, given=given)
    log.addHandler(Notes())
    log.setLevel(logging.ERROR if int(os.environ.get("RANK") or 0) else logging.INFO)  # one speaks
    try:
        COMMANDS[args.command][0](args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        message = " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():  # a mistake of this program
            raise
        message = "out of memory: lower batch_size (raise grad_accumulation) or context_length"
    log.error("gpt2.py %s: error: %s", args.command, message)
    return 2

if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
