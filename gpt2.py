"""GPT-2 from scratch in one file: attention, the model, training, sampling, OpenAI's weights.

    python gpt2.py train                              train a small GPT-2 on the-verdict.txt
    python gpt2.py generate "I HAD always thought"    continue a text
    python gpt2.py eval --data FILE                   measure a model on a text
    python gpt2.py export FOLDER                      write a folder that other programs read

Part one is GPT-2: read it from here to "Part two", and you have met the model, its training and its
sampling, and nothing else. Part two makes it a program: data files, runs that can be interrupted,
OpenAI's weights, fast CPUs, the command line. Read it when you need it.

Letters in shapes, with their keys in a config (all keys: see CONFIG): B batch, T tokens
(time; at most `context_length`), S tokens seen so far (with a cache), C embedding width
(`emb_dim`), H heads (`n_heads`), D width of a head (C / H), V vocabulary (`vocab_size`), L layers
(`n_layers`). A comment `# (B, T, C)` is the shape of what its line makes.

The GPT-2 paper is "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), its
code github.com/openai/gpt-2. The growth of attention in named steps and several names (emb_dim,
n_heads, qkv_bias, CausalAttention, text_to_token_ids, the-verdict.txt) follow Sebastian Raschka's
book "Build a Large Language Model (From Scratch)".
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not part of GPT-2: lets Ctrl-C end the program while PyTorch loads
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


# ======================================= Part one: GPT-2 =======================================

# ---- 1. Attention: every token looks at other tokens and averages what they offer ----
#
# Three classes, one idea. The first two are for reading: one head, then one head that cannot see
# the future. The third is what the model uses: many such heads at once.


class SelfAttention(nn.Module):
    """One head: softmax(Q Kᵀ / √D) V ("Attention Is All You Need", Vaswani et al., 2017).

    x (B, T, d_in) -> (B, T, d_out); d_out is the D of the shapes below. A head is one way to look:
    each token asks with a query, every token answers with a key, and the better the two fit, the
    more of that token's value is taken. Q, K and V are the queries, keys and values of all tokens.
    """

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token looks for
        self.key = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token can be found by
        self.value = nn.Linear(d_in, d_out, bias=qkv_bias)  # what a token hands over

    def scores(self, x: Tensor) -> Tensor:
        """How well each query (row) fits each key (column): (B, T, T)."""
        queries = self.query(x)  # (B, T, D)
        keys = self.key(x)  # (B, T, D)

        # With independent entries of mean 0 and variance 1, a dot product of D of them has variance
        # D. Divided by √D, it has variance 1 for any width. Larger scores push softmax towards 0
        # and 1, where its gradient is nearly 0: queries and keys would stop learning.
        return queries @ keys.transpose(1, 2) / math.sqrt(keys.size(-1))  # (B, T, T)

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (row) takes from each token (column): (B, T, T); rows sum to 1."""
        return torch.softmax(self.scores(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ self.value(x)  # (B, T, T) @ (B, T, D) -> (B, T, D)


class CausalAttention(SelfAttention):
    """One head that cannot see the future: there stands the token to predict, ready to be copied.

    x (B, T, d_in) -> (B, T, d_out), T at most context_length. With the future hidden, all T tokens
    can learn to predict their successors in one pass. For T = 4 and equal scores, the weights are

        1    0    0    0        the first token sees itself only
        1/2  1/2  0    0
        1/3  1/3  1/3  0
        1/4  1/4  1/4  1/4      the last sees all, and takes their average
    """

    future: Tensor  # (context_length, context_length), True where a token must not look

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout_rate: float,
        qkv_bias: bool = False,
    ):
        super().__init__(d_in, d_out, qkv_bias)
        self.dropout = nn.Dropout(dropout_rate)
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)  # moves with the model

    def weights(self, x: Tensor) -> Tensor:
        """As in SelfAttention, but 0 above the diagonal, and with dropout while training."""
        tokens = x.size(1)

        # softmax turns a score of -∞ into a weight of exactly 0.
        scores = self.scores(x).masked_fill(self.future[:tokens, :tokens], -math.inf)  # (B, T, T)
        # Dropout, so that no token relies on a single other one: in training, some weights become
        # 0 and the others larger, so that rows still sum to 1 on average.
        return self.dropout(torch.softmax(scores, dim=-1))  # (B, T, T)


class MultiHeadAttention(nn.Module):
    """H causal heads side by side, then a projection that mixes them.

    x (B, T, C) -> (B, T, C)

    Each head does what CausalAttention does. It makes its queries, keys and values, D wide, from
    all C numbers of a token:

        scores = queries @ keys.transpose(2, 3) / math.sqrt(D)    # (B, H, T, T)
        scores = scores.masked_fill(future[:T, :T], -math.inf)    # as in CausalAttention
        weights = dropout(torch.softmax(scores, dim=-1))          # (B, H, T, T)
        heads = weights @ values                                  # (B, H, T, D)

    `F.scaled_dot_product_attention` computes these four lines in one kernel, which need not store
    the T × T weights; `is_causal` is the mask.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["emb_dim"]
        self.n_heads = config["n_heads"]
        self.query_key_value = nn.Linear(width, 3 * width, bias=config["qkv_bias"])
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(config["dropout_rate"])

    def split_heads(self, x: Tensor) -> Tensor:
        """Queries, keys or values of all heads (B, T, C) -> the same by head (B, H, T, D)."""
        # Heads before tokens: @ then multiplies the (T, D) matrices of each head separately.
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        # One matrix makes the queries, keys and values of all heads.
        queries, keys, values = self.query_key_value(x).chunk(3, dim=-1)  # (B, T, C) each
        queries = self.split_heads(queries)  # (B, H, T, D)
        keys = self.split_heads(keys)  # (B, H, T, D)
        values = self.split_heads(values)  # (B, H, T, D)

        # The scores, the mask, softmax and the weighted sum of values: see the docstring.
        if cache is None:
            # Unlike nn.Dropout, a function does not know whether the model is training.
            dropout_rate = self.dropout.p if self.training else 0.0
            heads = F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout_rate, is_causal=True
            )  # (B, H, T, D)
        else:  # x continues a text that was read before: see KeyValueCache
            heads = cache.attend(queries, keys, values)  # (B, H, T, D)

        x = heads.transpose(1, 2).flatten(2)  # (B, T, C): the heads side by side
        return self.dropout(self.projection(x))


# ---- 2. Block: attention moves information between tokens, then each is worked on alone ----


class LayerNorm(nn.Module):
    """Each token's vector, brought to mean 0 and variance 1, then scaled and shifted as learnt.

    x (B, T, C) -> (B, T, C). (Ba et al., 2016.) Each block adds to these vectors (see
    TransformerBlock), so they grow; normalised, every layer sees them at the same size.
    For reading: the model uses `nn.LayerNorm`, which computes the same in one kernel.
    """

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))
        self.bias = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)  # (B, T, 1)
        variance = x.var(dim=-1, correction=0, keepdim=True)  # (B, T, 1): / C, not C - 1
        # (B, T, C). 1e-5: a vector of equal numbers has variance 0.
        return self.weight * (x - mean) / torch.sqrt(variance + 1e-5) + self.bias


class FeedForward(nn.Module):
    """The MLP: make each token's vector four times as wide, apply a non-linearity, narrow it again.

    x (B, T, C) -> (B, T, C). Attention only averages values; here each token, alone, makes
    something of what it has gathered. (Without the non-linearity, the two matrices would do no more
    than one.)
    """

    def __init__(self, config: dict):
        super().__init__()
        self.expand = nn.Linear(config["emb_dim"], 4 * config["emb_dim"])
        self.projection = nn.Linear(4 * config["emb_dim"], config["emb_dim"])
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, x: Tensor) -> Tensor:
        # GELU, a smooth max(0, x), as OpenAI computes it: ½x (1 + tanh(√(2/π) (x + 0.044715 x³)))
        hidden = F.gelu(self.expand(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.projection(hidden))  # (B, T, C)


class TransformerBlock(nn.Module):
    """Attention, then the MLP, each added to the residual stream.  x (B, T, C) -> (B, T, C).

    The residual stream is x: one vector for each token, which every block reads and adds to. The
    norms stand before attention and MLP, not on the stream (GPT-2 paper, section 2.3). So x passes
    through all blocks changed by additions only, and gradients flow back the same way.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.norm1 = nn.LayerNorm(config["emb_dim"], eps=1e-5)
        self.attention = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config["emb_dim"], eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        x = x + self.feed_forward(self.norm2(x))
        return x


# ---- 3. Model: token ids go in, scores for every possible next token come out ----

SIZE_KEYS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
MODEL_KEYS = (*SIZE_KEYS, "dropout_rate", "qkv_bias")


class GPT2(nn.Module):
    """The language model (GPT-2 paper, section 2.3).

        token ids (B, T) -> token vector + position vector (B, T, C) -> L blocks -> norm
        -> `head`, a linear layer (no head of attention): a score for each next token (B, T, V)

    It reads MODEL_KEYS of a config and ignores the rest. ValueError for an impossible config.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = check_config(config, MODEL_KEYS)
        vocab_size, width = config["vocab_size"], config["emb_dim"]

        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(config["context_length"], width)
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config["n_layers"]))
        self.final_norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocab_size, bias=False)

        # One matrix (V, C), used twice: row v is the vector of token v on the way in; on the way
        # out, x is compared with every row. What is learnt at one end serves the other.
        self.head.weight = self.token_embedding.weight
        self.initialise()

    def initialise(self) -> None:
        """Draw the first weights.

        all matrices and embeddings      normal, standard deviation 0.02
        projections into the stream      0.02 / √(2L): the sum of all 2L has the variance of one
        biases                           0
        norms                            weight 1, bias 0 (as PyTorch makes them)
        """
        projection_std = 0.02 / math.sqrt(2 * self.config["n_layers"])
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):  # of attention and of the MLP, in each block
                nn.init.normal_(parameter, std=projection_std)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, cache: "list[KeyValueCache] | None" = None, last_only: bool = False
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V); (B, 1, V), those of the last token, with last_only.

        logits[b, t] scores every token as the one after idx[b, t]; softmax makes probabilities of
        these scores.

        With a cache, one for each block, idx continues the tokens that the cache holds. ValueError
        if these and idx together exceed context_length.
        """
        past = cache[0].length if cache else 0
        end = past + idx.size(1)
        if end > self.config["context_length"]:
            raise ValueError(f"{end} tokens, above context_length {self.config['context_length']}")

        # A token's vector says nothing of its place in the text: the position's vector does.
        positions = torch.arange(past, end, device=idx.device)  # (T,)
        x = self.token_embedding(idx) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)  # (B, T, C)

        if last_only:  # the head is the largest matrix: multiply one row of x, not T
            x = x[:, -1:]  # (B, 1, C)
        return self.head(self.final_norm(x))  # (B, T, V), or (B, 1, V)

    def num_parameters(self) -> int:
        """How many numbers are trained. The head is the token embedding, so it counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "GPT2":
        """The model of a checkpoint, of a run's folder or of a folder in Hugging Face format, or
        OpenAI's `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`. It is in float32, in eval mode.
        ValueError for what is no GPT-2, OSError for what cannot be found, read or downloaded."""
        return load_pretrained(name_or_path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config and tokenizer as a new folder in Hugging Face format. ValueError if
        the folder holds anything."""
        save_hugging_face(self, Path(folder))


# ---- 4. Data: text becomes tokens, and the target of each token is the one after it ----

Batch = tuple[Tensor, Tensor]  # x (B, T) and y (B, T), the tokens and their targets
IGNORE_INDEX = -100  # a target that no loss counts, as PyTorch has it


@functools.cache
def load_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding (GPT-2 paper, section 2.2), from .tiktoken beside this file.

    A token is a byte, or two tokens that often follow each other, joined: 256 bytes, 50,000 pairs,
    and `<|endoftext|>`, which stands between documents, make 50,257.
    """
    # `setdefault`: a cache folder that the user has named wins.
    if (HERE / ".tiktoken").is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(HERE / ".tiktoken"))
    return tiktoken.get_encoding("gpt2")


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """Text -> token ids (1, T). `<|endoftext|>` in it is that token, as in data."""
    return torch.tensor([tokenizer.encode(text, allowed_special="all")], dtype=torch.long)


def token_ids_to_text(ids: Tensor | Sequence[int], tokenizer: tiktoken.Encoding) -> str:
    """Token ids (T) or (1, T) -> text. Bytes that make no whole character become �.

    A vocabulary may be padded, for speed, with ids that are no token: they are left out.
    """
    known = [i for i in torch.as_tensor(ids).flatten().tolist() if i < tokenizer.n_vocab]
    return tokenizer.decode(known)


class GPTDataset(torch.utils.data.Dataset):
    """Windows of a text: item i is (x (T,), y (T,)), T the context length, y one token later.

    A window starts every `stride` tokens; the last is moved back to end with the text. So every
    token but the first is a target, if `stride` is at most T. An `offset` of 1 to `stride` shifts
    all windows to the left: with a new one in each epoch, a token is seen with more or less text
    before it. A window that would stick out at either end is moved inside.
    The x of the text 0 1 2 3 4 5 6 7, with T = 3 and a stride of 2 (y is one more, everywhere):

        offset 0    0 1 2    2 3 4    4 5 6
        offset 1    0 1 2    1 2 3    3 4 5    4 5 6

    ValueError for a text that is shorter than one window.
    """

    def __init__(
        self,
        token_ids: Sequence[int] | Tensor,
        context_length: int,
        stride: int | None = None,
        offset: int = 0,
    ):
        self.token_ids = torch.as_tensor(token_ids).flatten()
        self.context_length = context_length
        self.stride = stride or context_length
        self.offset = offset
        self.last_start = len(self.token_ids) - context_length - 1
        if self.last_start < 0:
            tokens = f"{len(self.token_ids)} tokens are too few"
            raise ValueError(f"{tokens} for context_length {context_length}: lower it")

    def __len__(self) -> int:
        return math.ceil(self.last_start / self.stride) + (2 if self.offset else 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]  # IndexError after the last
        # The first and the last window are pushed inside the text, where an offset moved them out.
        start = min(max(0, index * self.stride - self.offset), self.last_start)
        window = self.token_ids[start : start + self.context_length + 1].long()  # (T + 1,)
        return window[:-1], window[1:]


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Items of any length -> x (B, T), y (B, T).

    Padding comes last, so no token of the item sees it, and its targets do not count.
    """
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    x = pad([x for x, _ in items])
    y = pad([y for _, y in items], padding_value=IGNORE_INDEX)
    return x, y


# ---- 5. CONFIG: every setting of a run. `python gpt2.py train --KEY VALUE` changes one ----

CONFIG: dict[str, Any] = {
    # The model: GPT-2, but smaller, and without its dropout of 0.1
    "vocab_size": 50257,  # tokens in the vocabulary
    "context_length": 64,  # tokens that the model sees at once
    "emb_dim": 128,  # width of a token's vector
    "n_heads": 4,  # attention heads in a block
    "n_layers": 4,  # blocks
    "dropout_rate": 0.0,  # share of values dropped while training
    "qkv_bias": True,  # biases for queries, keys and values
    # The data
    "data": "the-verdict.txt",  # a text, a token file or examples (see RECORD_KINDS)
    "val_data": "",  # the same, to validate on; "": hold back a part of `data`
    "val_fraction": 0.1,  # the share held back: a text's end, or random examples
    "max_val_tokens": 100_000,  # hold back no more tokens of a text than this
    "stride": 0,  # tokens from one window to the next; 0: half the context
    # The run
    "batch_size": 6,  # windows or examples at once, in each process
    "grad_accumulation": 1,  # batches that make one optimizer step
    "epochs": 26.0,  # times through the training data
    "schedule_steps": 0,  # length of the run in optimizer steps; 0: `epochs` decides
    "max_steps": 0,  # stop early, after so many steps of the schedule; 0: at its end
    "learning_rate": 4e-3,  # the highest, reached at the end of the warm-up
    "min_learning_rate": 1e-4,  # the last, or `learning_rate` where that is lower
    "warmup_steps": 150,  # steps up to the highest learning rate; at most a quarter of all
    "weight_decay": 0.1,  # how strongly AdamW pulls matrices towards zero
    "grad_clip": 1.0,  # longest gradient; 0: any length
    "seed": 42,  # where all random numbers start
    # On the way. `…_every` is in steps; 0: once an epoch, but 10 to 50 times a run
    "eval_every": 0,  # measure the validation loss and show a sample
    "checkpoint_every": 0,  # save; also every ten minutes and at each lowest validation loss
    "patience": 0,  # stop after so many measurements without a lower loss; 0: never
    "sample_prompt": "",  # what samples continue; "": the beginning of the data
    # The machine
    "device": "auto",  # auto (an accelerator, if there is one), cpu, cuda, mps, xpu
    "precision": "auto",  # auto (half where the hardware computes it), fp32, bf16, fp16
    "compile": False,  # train through torch.compile
}


# ---- 6. Training: predict every next token, measure the loss, step downhill ----


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers, such as a run's seed, a step and a process.

    Their sum would not do: step 2 of seed 42 would draw what step 1 of seed 43 draws.
    """
    mixed = 0
    for number in numbers:  # a step of a linear congruential generator (L'Ecuyer, 1999) for each
        mixed = (mixed * 2862933555777941757 + number + 3037000493) % 2**63
    return mixed


def learning_rate_at(step: int, config: dict, schedule_steps: int) -> float:
    """The rate of step 1, 2, …: a line up over `warmup_steps`, then half a cosine down."""
    highest = config["learning_rate"]
    lowest = min(config["min_learning_rate"], highest)
    warmup_steps = min(config["warmup_steps"], schedule_steps // 4)
    # AdamW knows nothing of the gradients' sizes yet, so the first steps must be small.
    if step <= warmup_steps:
        return highest * step / warmup_steps

    # Large steps find the valley, small ones its bottom.
    progress = (step - warmup_steps) / (schedule_steps - warmup_steps)  # 0 to 1
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: GPT2, config: dict) -> torch.optim.Optimizer:
    """AdamW with GPT-3's betas (Brown et al., 2020, appendix B); GPT-2's are not published."""
    # Weight decay shrinks each weight a little at every step, so that only what the loss asks for
    # stays. A norm's scale near 0 would switch a value off, and biases are few: both are left out.
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},  # biases, and the weights of norms
    ]
    fused = matrices[0].device.type in ("cpu", "cuda")  # all parameters in one pass over memory
    # AdamW steps along the mean gradient of some 10 steps (0.9), divided by its usual size. 0.95,
    # not 0.999: that size is forgotten in 20 steps, so one bad batch is soon over.
    return torch.optim.AdamW(groups, lr=config["learning_rate"], betas=(0.9, 0.95), fused=fused)


def batches_of_step(
    corpus: "Corpus", step: int, config: dict, rank: int = 0, world: int = 1
) -> list[Batch]:
    """The share of process `rank` in the batches (x (B, T), y (B, T)) of step 1, 2, ….

    `world` is the number of processes, `rank` the number of this one: 0 of 1 on most machines. The
    batches depend on the step alone, so a resumed run need not remember what it has read.
    `corpus.for_epoch(seed)` holds the items of an epoch in a random order, as many in each epoch.
    """
    # Over all processes: eight do in one step what one does with eight times the grad_accumulation.
    per_step = config["batch_size"] * config["grad_accumulation"] * world
    epoch, step_in_epoch = divmod(step - 1, math.ceil(len(corpus.for_epoch(0)) / per_step))
    items = corpus.for_epoch(mix_seeds(config["seed"], epoch))

    # The share of this step, and of it every `world`-th item, beginning with the rank.
    start = step_in_epoch * per_step
    share = range(start, min(start + per_step, len(items)))[rank::world]
    chosen = [items[i] for i in share]
    # The last step of an epoch can have fewer items than there are processes. One that gets none
    # computes a batch that counts nothing, as the others wait for its gradients.
    if not chosen:
        x, y = items[0]
        chosen = [(x, torch.full_like(y, IGNORE_INDEX))]

    size = config["batch_size"]
    return [collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V), targets (B, T) -> cross-entropy in nats, summed; -100 does not count.

    For one target it is -log of the probability that the model gave it (nats: the natural log).
    A model that knows nothing gives each token 1 / V, and has a loss of log(50257) = 10.8.
    """
    logits = logits.flatten(0, 1).float()  # (B·T, V); half precision would round the sum
    # Summed, not averaged: only the caller knows how many targets the whole step has.
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    machine: "Machine",
    grad_clip: float = 0.0,
) -> tuple[float, float]:
    """One optimizer step on all batches -> (loss in nats per token, length of the gradient).

    Batches are (x (B, T), y (B, T)). Their gradients add up, then the optimizer steps once: the
    effect of one big batch, in the memory of a small one. In one process and in float32, `machine`
    is plain PyTorch:

        machine.sum(value)             float(value)
        machine.micro_batches(…)       the batches, on the device
        machine.autocast()             nothing
        machine.backward(loss)         loss.backward()
        machine.clip_gradients(…)      nn.utils.clip_grad_norm_(…)
        machine.step(optimizer)        optimizer.step()
    """
    # How many targets the whole step has, in all batches of all processes.
    n_targets = machine.sum(sum(int((y != IGNORE_INDEX).sum()) for _, y in batches))
    total = torch.zeros((), device=machine.device)

    for x, y in machine.micro_batches(network, batches):
        with machine.autocast():
            logits = network(x)  # (B, T, V)

        # Divided by the targets of the whole step, not of this batch, whose share may be smaller.
        loss = summed_loss(logits, y) / n_targets
        machine.backward(loss)  # adds to the gradients
        total += loss.detach()

    # One bad batch can have a gradient a hundred times as long as others. Clipped, it keeps its
    # direction, and weighs no more than they do.
    norm = machine.clip_gradients(optimizer, grad_clip)
    machine.step(optimizer)  # moves the weights against the gradients
    optimizer.zero_grad()  # or the next step would add to these
    return machine.sum(total), norm


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout and no gradients. Afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def evaluate(model: GPT2, batches: Iterable[Batch], machine: "Machine | None" = None) -> float:
    """The mean loss of batches (x (B, T), y (B, T)) in nats per token: each target counts once.

    With a machine of several processes, `batches` are the share of this one.

        ids = text_to_token_ids("A text of more than one token", load_tokenizer())
        loss = evaluate(model, [(ids[:, :-1], ids[:, 1:])])
    """
    device = next(model.parameters()).device
    loss = count = 0.0
    with evaluating(model):
        for x, y in batches:
            loss += summed_loss(model(x.to(device)), y.to(device)).item()
            count += int((y != IGNORE_INDEX).sum())

    return machine.sum(loss) / machine.sum(count) if machine else loss / count


def train(
    config: dict | None = None,
    *,
    out: str | Path | None = "checkpoints",
    init: GPT2 | str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Generator[dict]:
    """Train. After each step, yield a dict: the step's row of metrics.jsonl, `model`,
    `total_steps` and, when one is due, a `sample`. Losses are in nats per token.

    ValueError or OSError for what is wrong with config, data or folder, before the first step;
    FloatingPointError if the loss is no longer finite; OSError if the last save failed.

    Calling `train()` alone does nothing. Each step runs when the caller asks for its row, as in
    `for row in train(): print(row["train_loss"])`. So the caller decides what to show and when to
    stop.

    `config` holds what differs from CONFIG. `out` is the folder for what the run leaves, or None.
    `init` is a model to start from, or its name. `resume` continues the run in `out`, on one
    machine bit for bit; `overwrite` replaces it. Closing the generator saves.
    """
    with start_run(config or {}, out, init, resume, overwrite) as run:
        # run.network is this model too, as training calls it: compiled, or one of several copies.
        config, model, machine = run.config, run.model, run.machine

        for step in run.steps():
            learning_rate = learning_rate_at(step, config, run.schedule_steps)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate

            # Dropout follows from seed, step and process alone: so a resumed run repeats it.
            torch.manual_seed(mix_seeds(config["seed"], step, machine.rank))
            batches = batches_of_step(run.train_set, step, config, machine.rank, machine.world)
            model.train()
            clip = config["grad_clip"]
            loss, norm = train_step(run.network, run.optimizer, batches, machine, clip)
            row = run.count_step(batches, loss, learning_rate, norm)

            # What is due after this step. best.pt is written after each lowest measurement.
            evaluate_now = run.val_set is not None and run.is_due("eval_every")
            sample_now = run.is_due("eval_every") or step == run.total_steps
            save_now = run.is_due("checkpoint_every")

            if evaluate_now:
                with machine.autocast():
                    row["val_loss"] = evaluate(model, run.validation_batches(), machine)
                save_now = save_now or row["val_loss"] < run.best_val_loss

            # The row first: a saved step is never missing in metrics.jsonl.
            run.record(row)
            if save_now:
                run.save()

            sample = {"sample": run.sample()} if sample_now else {}
            yield row | sample | {"model": model, "total_steps": run.total_steps}


# ---- 7. Generation: logits become probabilities, these a token, and that the next input ----


class KeyValueCache:
    """The keys and values of the tokens that one block has read.

    No token sees a later one, so a later one cannot change them: generating reads each token once
    instead of the whole text again for each new token. (A query is needed only when its own token
    is read, so none is kept.) Shapes are (B, H, S, D), S the tokens so far.
    """

    def __init__(self, context_length: int):
        self.context_length = context_length
        self.length = 0
        self.keys: Tensor | None = None  # (B, H, context_length, D), made by the first tokens
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of T new tokens, (B, H, T, D) each -> of all S, (B, H, S, D) each."""
        # Room for the whole context at once: growing would copy all of it for every token.
        if self.keys is None or self.values is None:
            self.keys = keys.new_empty(*keys.shape[:2], self.context_length, keys.size(3))
            self.values = torch.empty_like(self.keys)

        start, self.length = self.length, self.length + keys.size(2)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What T new tokens take from all S, (B, H, T, D): as in MultiHeadAttention."""
        tokens = queries.size(2)
        keys, values = self.append(keys, values)  # (B, H, S, D) each

        # Query t stands at position S - T + t and sees the keys up to there. The first tokens of
        # all are the plain causal case; one new token sees all; several new ones need a mask.
        mask = None
        causal = tokens == self.length
        if 1 < tokens < self.length:
            mask = torch.ones(tokens, self.length, dtype=torch.bool, device=queries.device)
            mask = mask.tril(self.length - tokens)  # (T, S), True where a query may look
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError for options of sampling that make no sense."""
    if temperature != 0 and not 1e-4 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or at least 0.0001")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave exactly the k highest logits (B, V), the rest becomes -∞ (Fan et al., 2018)."""
    # By place, not by value: equal logits at the border would let more than k through.
    highest, tokens = logits.topk(min(k, logits.size(-1)))  # (B, k) each
    return torch.full_like(logits, -math.inf).scatter(1, tokens, highest)


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Leave the fewest tokens whose probabilities (B, V) reach p, scaled to a sum of 1.

    "Nucleus sampling", Holtzman et al., 2020.
    """
    ordered, tokens = probabilities.sort(descending=True)  # (B, V) each
    # Without the token itself, so that the one that crosses p is still kept.
    before = ordered.cumsum(dim=-1) - ordered  # what the more probable tokens have together
    dropped = before >= p
    dropped[:, 0] = False  # the first token is always kept, even if p rounds to 0
    kept = ordered.masked_fill(dropped, 0.0)
    return torch.zeros_like(kept).scatter(1, tokens, kept / kept.sum(dim=-1, keepdim=True))


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits (B, V) -> probabilities (B, V). A temperature below 1 sharpens, above 1 flattens.

    At temperature 0, the limit, the most probable token gets probability 1. For top_k and top_p,
    see keep_top_k and keep_top_p.

        probabilities = next_token_probabilities(model(ids)[:, -1])
        best = probabilities.topk(5)  # .values and .indices, (B, 5) each
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        logits, temperature = keep_top_k(logits, 1), 1.0
    logits = logits.float()  # half precision would round sums over the vocabulary
    # Shifting all logits leaves softmax as it is; with 0 the highest, nothing overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)

    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    return probabilities


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """probabilities (B, V) -> token ids (B, 1), each drawn with its probability.

    As `torch.multinomial`, but without its two waits for the device, by a race: token i arrives
    after an exponentially distributed time with mean 1 / p_i, and comes first with probability p_i.
    Such a time is `waiting` / p_i, where `waiting` has mean 1: so the first token is the one with
    the largest p_i / waiting.
    """
    waiting = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waiting).argmax(dim=-1, keepdim=True)


def generate(
    model: GPT2,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    on_token: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Continue the prompts idx (B, T) -> (B, T + new), T at least 1, new at most `max_new_tokens`.

    Temperature 0 is greedy: always the most probable token. A row ends with the token `eos_id`
    ("end of sequence"), and is filled up with it while others go on. Generation ends when all rows
    have ended, or when `on_token` returns True; it gets each new column (B, 1).

    The window slides in halves. While the text fits the context, the model sees all of it. When
    the context is full, the model goes on from the last half, read anew: positions are absolute,
    so dropping one token would change the position of all others, and the cache with them.

    ValueError for an empty prompt, for options that make no sense, and for logits that are not
    finite.

        ids = generate(model, text_to_token_ids("Once", load_tokenizer()), 40)
        text = token_ids_to_text(ids, load_tokenizer())
    """
    check_sampling(temperature, top_k, top_p)
    if idx.size(1) == 0:
        raise ValueError("the prompt has no tokens: begin with that of <|endoftext|>")

    context = model.config["context_length"]
    idx = idx.to(next(model.parameters()).device)
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    start = max(0, idx.size(1) - context)  # the model sees idx[:, start:]
    cache = None

    with evaluating(model):
        for count in range(max_new_tokens):
            # Half of it, not one token less: reading a window anew is to be rare.
            if idx.size(1) - start > context:
                start = idx.size(1) - max(1, context // 2)
                cache = None

            # A cache has read all but the newest token; without one, the whole window is read.
            unread = idx[:, start:] if cache is None else idx[:, -1:]
            if use_cache and cache is None:
                cache = [KeyValueCache(context) for _ in model.blocks]
            logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
            # Looking at numbers makes an accelerator wait: so do it once in a while.
            if count % 16 == 0 and not logits.amax(dim=-1).isfinite().all():  # amax: NaN if any is
                raise ValueError("NaN or infinite logits: the weights are damaged, or overflow")

            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                new = draw(next_token_probabilities(logits, temperature, top_k, top_p), generator)
            # A row that has ended stays ended, while others go on.
            if eos_id is not None:
                new = new.masked_fill(ended, eos_id)
                ended |= new == eos_id

            idx = torch.cat([idx, new], dim=1)  # (B, T + 1)
            if (on_token and on_token(new)) or (eos_id is not None and ended.all()):
                break
    return idx.clone()  # made outside inference mode, so that it may be trained on


# ================================= Part two: a program around it =================================

import argparse
import codecs
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import logging
import mmap
import pickle
import random
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from array import array
from datetime import timedelta
from typing import IO, NamedTuple, NoReturn, Protocol

import torch.distributed as dist
from tiktoken.load import read_file_cached
from torch.overrides import TorchFunctionMode

VERSION = "2.0"
log = logging.getLogger("gpt2")  # notes
progress = logging.getLogger("gpt2.progress")  # what a long step is doing: see Notes


# ---- 8. Data files: texts, token files, examples to fine-tune on ----

END_OF_TEXT = "<|endoftext|>"
END_AT_END = re.compile(re.escape(END_OF_TEXT) + r"\s*\Z")


class BadFile(ValueError):
    """A file that cannot be used. The message says which, where in it, and why."""


class Example(NamedTuple):
    """What fine-tuning learns from: the model is to continue the prompt with the completion."""

    prompt: str
    completion: str
    end: bool = True  # `<|endoftext|>` is to follow
    choices: tuple[str, ...] = ()  # a question's possible completions, of which one is right


# No token of GPT-2 reaches from a visible character into the white space after it. So a text may
# be cut there, and its pieces have the tokens of the whole.
# Only white space of which Python and the tokenizer say the same: to Python, \x1c is some, too.
SAFE_CUT = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def read_text(path: Path) -> Iterator[str]:
    """A text in pieces of about a million characters. BadFile if it is not UTF-8."""
    rest = ""
    try:
        # A byte order mark is not text; Windows' line ends are, or `eval` would miscount bytes.
        with open(path, encoding="utf-8-sig", newline="") as file:
            while block := file.read(1 << 20):
                # Without a byte order mark, UTF-16 passes as text with a NUL after each letter.
                if "\0" in block:
                    raise BadFile(f"{path} holds NUL characters: save the file as UTF-8 text")
                # Up to the last safe place, the block is done; the rest waits for the next block.
                if cut := SAFE_CUT.match(block):
                    yield rest + cut.group()
                    rest = ""
                rest += block[cut.end() if cut else 0 :]
        yield rest
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def not_utf8(path: Path) -> BadFile:
    """Says by line and byte where a file is not UTF-8: an editor may not show it."""
    # Read again, as bytes: the decoder knows only its place in a block.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                # Editors on Windows offer UTF-16 as "Unicode": so it is the likeliest mistake.
                utf16 = line.startswith((b"\xff\xfe", b"\xfe\xff"))
                problem = "UTF-16" if utf16 else f"not UTF-8: 0x{line[error.start]:02x}"
                where = f"{path}, line {number}, byte {error.start + 1}"
                return BadFile(f"{where} is {problem}; save it as UTF-8 text, or leave it out")
    return BadFile(f"{path} changed while it was read")


def read_json(file: IO[str]) -> Iterator[tuple[str, Any]]:
    """(place, record) for each entry of a JSON list, or each line with a JSON object."""
    # Both are called .json and .jsonl by people: the first character decides.
    is_list = file.read(1000).lstrip().startswith("[")
    file.seek(0)
    if is_list:
        yield from ((f"entry {i}", entry) for i, entry in enumerate(json.load(file), start=1))
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                rule = "each line must be a whole JSON object, or the file a JSON list"
                raise BadFile(f"line {number}: {error}; {rule}") from error


def read_table(file: IO[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    """(place, record) for each row of a table whose first row names the columns."""
    # Not split by hand: a quoted value may hold delimiters and line ends.
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 131,072 characters
    rows = csv.DictReader(file, delimiter=delimiter)
    for row in rows:
        if None in row:  # where DictReader puts what has no column
            advice = f'put a text with {delimiter!r} in it into "quotes"'
            raise BadFile(f"line {rows.line_num}: more values than columns: {advice}")
        yield f"line {rows.line_num}", row


RECORD_FORMATS: dict[str, Callable[[IO[str]], Iterator[tuple[str, Any]]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".csv": functools.partial(read_table, delimiter=","),
    ".tsv": functools.partial(read_table, delimiter="\t"),
}


def instruction_prompt(instruction: str, context: str = "") -> str:
    """An instruction, maybe with an input, in the layout of Stanford Alpaca."""
    paired = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        f"appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def instruction_of(prompt: str) -> tuple[str, str] | None:
    """The instruction and the input of a prompt in that layout; None for any other prompt."""
    layout = r"### Instruction:\n(.*?)\n\n(?:### Input:\n(.*?)\n\n)?### Response:\n$"
    found = re.search(layout, prompt, re.DOTALL)
    return (found[1], found[2] or "") if found else None


@functools.cache
def note_once(text: str) -> None:
    """Log a note once, not with every record."""
    log.info(text)


def text_of(record: dict, *keys: str, default: str | None = None) -> str:
    """The text under the first of these keys that the record has. A number is its digits."""
    value = next((record[key] for key in keys if key in record), default)
    # Labels are often numbers: {"label": 1} means the text "1".
    if type(value) in (int, float):  # not isinstance: to Python, True is an int
        note_once(f"data      {' or '.join(keys)} holds numbers: they are read as their digits")
        value = str(value)
    if not isinstance(value, str):
        raise BadFile(f"{' or '.join(keys)} is {value!r:.60}; it must be a text")
    return value


def as_pair(record: dict) -> Example:
    """A prompt and its completion; with `"end": false`, the text goes on after it."""
    # A table has no booleans: its "false" is a text.
    end = record.get("end", True) not in (False, "false")
    completion = text_of(record, "completion")
    if not END_AT_END.sub("", completion) and not end:
        raise BadFile("'completion' is empty, and \"end\" is false: nothing is to be predicted")
    return Example(text_of(record, "prompt"), completion, end)


def as_instruction(record: dict) -> Example:
    """An instruction in the words of Alpaca, Dolly, or question and answer."""
    # Alpaca says `input`, Dolly `context`; where an instruction needs none, it is empty or null.
    given = {key: value for key, value in record.items() if value not in (None, "")}
    context = text_of(given, "input", "context", default="")
    prompt = instruction_prompt(text_of(record, "instruction", "question"), context)
    return Example(prompt, text_of(record, "output", "response", "answer"))


def as_question(record: dict) -> Example:
    """A question with choices, like HellaSwag's; `answer` is the place of the right one, from 0."""
    choices, answer = record["choices"], record["answer"]
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or not all(END_AT_END.sub("", choice) for choice in choices):
        raise BadFile("'choices' must be a list of texts, none of them empty")
    # Not isinstance: to Python, True is an int.
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadFile(f"'answer' is {answer!r}; it must be from 0 to {len(choices) - 1}")
    return Example(text_of(record, "prompt"), choices[answer], False, tuple(choices))


# The first that fits counts: a row with a text and a label would pass as a text alone, too. A label
# gets a space before it, since GPT-2's tokens of words begin with one.
RECORD_KINDS: dict[tuple[str, ...], Callable[[dict], Example | str]] = {
    ("prompt", "choices", "answer"): as_question,
    ("prompt", "completion"): as_pair,
    ("instruction", "output"): as_instruction,
    ("instruction", "response"): as_instruction,
    ("question", "answer"): as_instruction,
    ("text", "label"): lambda row: Example(text_of(row, "text"), " " + text_of(row, "label")),
    ("text",): lambda row: text_of(row, "text"),
}


def parse_record(place: str, record: Any) -> Example | str:
    """A record as an example or, from {"text": …}, as a document. BadFile for other keys."""
    keys = record.keys() if isinstance(record, dict) else [f"{record!r:.40}"]
    kind = next((kind for needed, kind in RECORD_KINDS.items() if set(needed) <= set(keys)), None)
    if kind is None:
        known = " or ".join("+".join(needed) for needed in RECORD_KINDS)
        raise BadFile(f"{place}: found {', '.join(map(str, keys))}; expected {known}")
    try:
        return kind(record)
    except BadFile as error:
        raise BadFile(f"{place}: {error}") from error


def read_records(path: Path) -> Iterator[Example | str]:
    """The examples or the documents of a file of records. BadFile says where one is wrong."""
    place = ""
    try:
        # A quoted value of a table may hold line ends of any kind: none is translated.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for place, record in RECORD_FORMATS[path.suffix.lower()](file):
                yield parse_record(place, record)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise BadFile(f"{path}: {error}") from error

    if not place:
        raise BadFile(f"{path} holds no records")


def find_files(data: str) -> list[Path]:
    """The files of a `data` setting: a file, all in a folder, or several with commas between.

    A file may also lie beside gpt2.py. FileNotFoundError where nothing is found.
    """
    found: list[Path] = []
    # A name with a comma may be one file; otherwise commas separate several.
    # (Path.exists raises OSError for a name that is too long.)
    for name in [data] if os.path.exists(data) else data.split(","):
        # `if name`: Path("") would be the current folder.
        places = [path for path in (Path(name), HERE / name) if name and os.path.exists(path)]
        if not places:
            raise FileNotFoundError(f"there is no file {name!r}: give a text or a file of examples")

        # Sorted: file systems list in different orders, and a resumed run needs the same one. A
        # folder's hidden files, as .DS_Store, are not meant as data; one that is named is.
        for path in sorted(places[0].rglob("*")) if places[0].is_dir() else places[:1]:
            hidden = any(part.startswith(".") for part in path.relative_to(places[0]).parts)
            if path.is_file() and not hidden:
                found.append(path)

    if not found:
        raise FileNotFoundError(f"{data} holds no files")
    return found


def read_pieces(path: Path) -> Iterator[Example | str]:
    """The examples, the documents or the pieces of the text in a file."""
    suffix = path.suffix.lower()
    if suffix == ".bin":
        raise BadFile(f"{path} holds tokens: leave it out, it cannot be joined with other files")
    return read_records(path) if suffix in RECORD_FORMATS else read_text(path)


def fingerprint(files: Sequence[Path]) -> str:
    """The sha256 of the files' bytes: a run goes on with the data that it began with."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with the digest it is given
    return digest.hexdigest()


def text_pieces(files: Sequence[Path]) -> Iterator[str]:
    """All documents, with `<|endoftext|>` between them, in pieces that cut no token."""
    for i, path in enumerate(files):
        records = path.suffix.lower() in RECORD_FORMATS
        for j, piece in enumerate(read_pieces(path)):
            if isinstance(piece, Example):
                raise BadFile(f"{path} holds examples, where only texts are read")
            # A document is a file, or a record of one; the pieces of a text belong together.
            begins = (j == 0 and i > 0) or (j > 0 and records)
            yield (END_OF_TEXT if begins else "") + check_white_space(piece, path)


def check_white_space(text: str, source: str | Path) -> str:
    """The text. BadFile if the tokenizer would fail: it cannot take a million blanks in a row."""
    # Its own error names no file; older versions panic, which `except Exception` misses.
    # No run escapes by being cut: a piece of a text ends with a visible character (see SAFE_CUT).
    if run := re.search(r"(?<!\s)\s{200000,}", text):
        near = " ".join(text[max(0, run.start() - 30) : run.end() + 30].split())
        raise BadFile(f"{source}: over 200,000 white-space characters in a row, near {near!r}")
    return text


def tokenize(files: Sequence[Path], out: IO[bytes]) -> None:
    """Write the tokens of texts as uint16, 2 bytes a token (all 50,257 ids fit), by all cores, in
    constant memory. BadFile if there are none."""
    # Not PyTorch's number: torchrun leaves each process one, and the others only wait.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    encode = functools.partial(load_tokenizer().encode_batch, num_threads=cores or 1)
    started, count = time.perf_counter(), 0
    pieces = text_pieces(files)
    # Eight pieces keep the cores busy, and bound the memory.
    while group := list(itertools.islice(pieces, 8)):
        for ids in encode(group, allowed_special="all"):
            out.write(array("H", ids).tobytes())
            count += len(ids)
        rate = count / (time.perf_counter() - started)
        progress.info(f"tokenising: {count:,} tokens, {rate:,.0f} tokens/s")
    if count == 0:
        raise BadFile(f"{files[0]} is empty: give a text")


def map_tokens(path: Path) -> Tensor:
    """The tokens of a .bin file as uint16, bare as nanoGPT writes them; read as they are used."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise BadFile(f"{path} has {size} bytes: not tokens of two bytes each")
    # Mapped, not read: a corpus may exceed the memory. Read-only, since memory that may be written,
    # as torch.from_file's, must fit.
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that the buffer is read-only
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tokens = torch.frombuffer(mapped, dtype=torch.uint16)
    # Files of other tokenizers show it early; looking at all tokens would read the whole file.
    if (highest := int(tokens[: 1 << 20].int().max())) >= CONFIG["vocab_size"]:
        raise BadFile(f"{path} holds token {highest}: these are not GPT-2's tokens")
    return tokens


def load_examples(files: Sequence[Path]) -> list[Example]:
    """All examples of these files."""
    examples = []
    for path in files:
        for example in read_pieces(path):
            if not isinstance(example, Example):
                raise BadFile(f"{path} holds texts, where only examples are read")
            check_white_space(example.prompt + example.completion, path)
            examples.append(example)
    return examples


def shared_tokens(files: Sequence[Path], folder: Path) -> Path:
    """Where the tokens of these texts are in the folder of a run: its first process writes them,
    once, and the others map them, as a resumed run does."""
    # By name, size and time, not by content: all must know the name, and only the first reads.
    marks = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    name = hashlib.sha256(repr(marks).encode()).hexdigest()[:12]
    path = folder / f"tokens-{name}.bin"
    if process_rank() == 0 and not path.exists():
        write_file(path, functools.partial(tokenize, files))
    Machine.wait()
    return path


def read_data(data: str, folder: Path | None = None) -> Tensor | list[Example]:
    """A `data` setting as the tokens of a text, uint16, or as examples.

    With the folder of a run, a text is tokenised once, into it. BadFile for a file that cannot be
    used, FileNotFoundError where there is none.
    """
    files = find_files(data)
    if len(files) == 1 and files[0].suffix.lower() == ".bin":
        return map_tokens(files[0])
    # The first record decides, and the others must agree. Even an empty text has one piece.
    if isinstance(next(read_pieces(files[0])), Example):
        return load_examples(files)

    # On a second machine there is no such file, unless the two share a disk.
    if folder and (tokens := shared_tokens(files, folder)).exists():
        return map_tokens(tokens)
    buffer = io.BytesIO()
    tokenize(files, buffer)
    # Not `getvalue`, which would copy them all, into memory that PyTorch warns is read-only.
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint16)


class Corpus(Protocol):
    """What training and measuring ask of a data set, of whatever it is made.

    An item is (x (T,), y (T,)), and y is -100 where a target does not count.
    """

    context_length: int

    def for_epoch(self, seed: int) -> "Shuffled":
        """The items of one epoch, in a random order; each epoch has the same number."""

    def scoring_items(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Items in which each token is once a target that counts; windows may overlap."""

    def sample_prompt(self) -> list[int]:
        """The tokens that samples continue, where no other prompt was given."""

    def size(self) -> str:
        """How much it holds, for a person."""

    def labels(self) -> list[str]:
        """The classes, if it is a classification."""

    def figures(self, model: GPT2, loss: float, labels: Sequence[str]) -> dict:
        """What `eval` reports beside the loss."""


# Every step of an epoch asks for the same order: keep the last one.
@functools.lru_cache(maxsize=1)
def random_order(n_items: int, seed: int) -> Tensor:
    """A permutation of 0 … n_items - 1."""
    return torch.randperm(n_items, generator=torch.Generator().manual_seed(seed))


class Shuffled:
    """Items in a random order, each once.

    Above 16 million, they are shuffled in parts of so many: the order of 10⁹ would fill 8 GB.
    """

    PART = 2**24

    def __init__(self, items: "GPTDataset | CompletionDataset", seed: int):
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        first = place - place % self.PART
        order = random_order(min(self.PART, len(self.items) - first), self.seed + first)
        return self.items[first + int(order[place - first])]


class TextDataset(GPTDataset):
    """A text to train on or to measure."""

    def for_epoch(self, seed: int) -> Shuffled:
        """Windows cut elsewhere than in other epochs: else a token would have one context only."""
        # An offset is never 0, so that each epoch has the same number of windows.
        offset = 1 + random.Random(seed).randrange(self.stride)
        windows = GPTDataset(self.token_ids, self.context_length, self.stride, offset)
        return Shuffled(windows, seed)

    def scoring_items(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows that may overlap; a target is -100 where an earlier window scored it."""
        context = self.context_length
        stride = min(stride or context, context)
        scored = 0
        # The last window is the first one that reaches the end, and may be shorter than the others.
        for start in range(0, max(1, len(self.token_ids) - 1 - context + stride), stride):
            window = self.token_ids[start : start + context + 1].long()
            y = window[1:].clone()
            # Never negative, as no stride is longer than a window: so no target is left out.
            y[: scored - start] = IGNORE_INDEX
            scored = start + len(y)
            yield window[:-1], y

    def sample_prompt(self) -> list[int]:
        """The first five tokens after blank lines."""
        ids = self.token_ids[:1000].tolist()
        # A sample that begins with blank lines shows nothing.
        visible = (i for i, token in enumerate(ids) if load_tokenizer().decode([token]).strip())
        start = next(visible, 0)
        return ids[start : start + 5]

    def size(self) -> str:
        """How much it holds, for a person."""
        return f"{len(self.token_ids):,} tokens"

    def labels(self) -> list[str]:
        """None: a text is not a classification."""
        return []

    def figures(self, model: GPT2, loss: float, labels: Sequence[str]) -> dict:
        """Bits per byte, and the perplexity of a word, as `str.split` counts words.

        Unlike the loss of a token, both compare models whose tokenizers differ.
        """
        count = len(self.token_ids) - 1
        # The first token is not predicted, so its bytes do not count either.
        text = decoded(self.token_ids[1:])
        words = max(1, len(text.decode("utf-8", errors="replace").split()))
        # exp(710) is above the largest float, and would raise OverflowError.
        return {
            "tokens": count,
            "bits_per_byte": loss * count / math.log(2) / max(1, len(text)),
            "word_perplexity": math.exp(min(loss * count / words, 700)),
        }


class CompletionDataset(list):
    """Examples as items (x, y) of any length; y is -100 in the prompt, so that only completions
    and the closing `<|endoftext|>` count. What is longer than the context loses its beginning.
    ValueError for a completion that is longer."""

    def __init__(self, examples: Sequence[Example | tuple[str, str]], context_length: int):
        self.examples = [Example(*example) for example in examples]
        self.context_length = context_length
        rows = [self.tokens_of(example) for example in self.examples]
        super().__init__((x[-context_length:], y[-context_length:]) for x, y in rows)

        # A prompt may lose its beginning, and that is said; a completion may not.
        self.lengths = [len(x) for x, _ in rows]
        longest = max((int((y != IGNORE_INDEX).sum()) for _, y in rows), default=0)
        if longest > context_length:
            problem = f"a completion of {longest} tokens is longer than context_length"
            raise ValueError(f"{problem} {context_length}: shorten it, or raise context_length")

    @staticmethod
    def tokens_of(example: Example) -> tuple[Tensor, Tensor]:
        """x (T,) and y (T,), which is x shifted by one, and -100 in the prompt."""
        encode = functools.partial(load_tokenizer().encode, allowed_special="all")
        end = load_tokenizer().eot_token
        # Apart, as in use: the prompt is all that is known when the first token is drawn. Where it
        # is empty, the end of another text stands before it.
        prompt = encode(example.prompt) or [end]
        # Some data write the end out: it is not to come twice.
        completion = encode(END_AT_END.sub("", example.completion)) + [end] * example.end
        # The last token of the prompt predicts the first of the completion.
        y = [IGNORE_INDEX] * (len(prompt) - 1) + completion
        return torch.tensor((prompt + completion)[:-1]), torch.tensor(y)

    def for_epoch(self, seed: int) -> Shuffled:
        """The same examples in every epoch."""
        return Shuffled(self, seed)

    def scoring_items(self, stride: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples; they do not overlap, so a stride has nothing to say."""
        return iter(self)

    def sample_prompt(self) -> list[int]:
        """The prompt of the first example."""
        return load_tokenizer().encode(self.examples[0].prompt, allowed_special="all")

    def size(self) -> str:
        """How many, and how many lose their beginning."""
        cut = sum(length > self.context_length for length in self.lengths)
        note = f", {cut} of them longer than context_length {self.context_length}: they lose their "
        note += f"beginning (the longest has {max(self.lengths)} tokens)"
        return f"{len(self):,} examples" + (note if cut else "")

    def labels(self) -> list[str]:
        """The different completions, if they are 2 to 50, and come twice or more on average."""
        # A few completions that come again and again are classes; answers to questions differ.
        different = sorted({example.completion for example in self.examples})
        return different if 2 <= len(different) <= min(50, len(self) // 2) else []

    def figures(self, model: GPT2, loss: float, labels: Sequence[str]) -> dict:
        """Bits per byte, the share of exact completions, and accuracies where there are some."""
        targets = torch.cat([y[y != IGNORE_INDEX] for _, y in self])
        bits = loss * len(targets) / math.log(2)
        report: dict[str, float] = {"tokens": len(targets)}
        report["bits_per_byte"] = bits / max(1, len(decoded(targets)))
        report["exact"] = exact_share(model, self)
        if all(example.choices for example in self.examples):
            return report | choice_accuracy(model, self)

        # Those of the training set first: a small set to measure may lack some of them.
        if labels := labels or self.labels():
            truth = [example.completion for example in self.examples]
            right = map(str.__eq__, classify(model, self, labels), truth)
            report["accuracy"] = sum(right) / len(truth)
            # What always the same answer would get: an accuracy means something above that.
            report["majority"] = max(map(truth.count, set(truth))) / len(truth)
            if unknown := sorted(set(truth) - set(labels)):
                log.info(f"labels    not in the training set: {', '.join(map(repr, unknown))}")
        return report


def decoded(ids: Tensor) -> bytes:
    """The text of tokens (T,), as bytes, without `<|endoftext|>`."""
    tokenizer = load_tokenizer()
    # In parts: a list of Python's numbers is twenty times as large as the tensor.
    parts = (part.int() for part in ids.split(1 << 20))
    known = (part[part < tokenizer.eot_token].tolist() for part in parts)
    return b"".join(map(tokenizer.decode_bytes, known))


def scoring_batches(
    dataset: Corpus, stride: int | None = None, tokens: int = 1024
) -> Iterator[Batch]:
    """Batches (x (B, T), y (B, T)) for `evaluate`, of about so many tokens, each scored once."""
    items = dataset.scoring_items(stride)
    done = 0
    while chosen := list(itertools.islice(items, max(1, tokens // dataset.context_length))):
        x, y = collate(chosen)
        yield x, y
        done += int((y != IGNORE_INDEX).sum())
        progress.info(f"measuring: {done:,} tokens")


def most_probable(model: GPT2, example: Example, completions: Sequence[str]) -> tuple[str, str]:
    """Which of these completions of a prompt has the lowest loss: its sum, and its mean a token."""
    device, context = next(model.parameters()).device, model.config["context_length"]
    rows = [example._replace(completion=completion) for completion in completions]
    sums, means = {}, {}
    with evaluating(model):
        for row, (x, y) in zip(rows, CompletionDataset(rows, context), strict=True):
            loss = summed_loss(model(x[None].to(device)), y[None].to(device)).item()
            sums[row.completion] = loss
            means[row.completion] = loss / int((y != IGNORE_INDEX).sum())
    return min(sums, key=sums.__getitem__), min(means, key=means.__getitem__)


def classify(model: GPT2, dataset: CompletionDataset, labels: Sequence[str] = ()) -> list[str]:
    """For each example, the most probable of these labels, or of all completions in the set."""
    labels = labels or sorted({example.completion for example in dataset.examples})
    return [most_probable(model, example, labels)[0] for example in dataset.examples]


def choice_accuracy(model: GPT2, dataset: CompletionDataset) -> dict:
    """How often the right choice has the lowest loss: its sum or, normalised, its mean a token."""
    by_sum = by_mean = 0
    for example in dataset.examples:
        best, best_normalised = most_probable(model, example, example.choices)
        by_sum += best == example.completion
        by_mean += best_normalised == example.completion
    count = len(dataset)
    return {"accuracy": by_sum / count, "accuracy_normalised": by_mean / count}


def exact_share(model: GPT2, dataset: CompletionDataset) -> float:
    """The share of examples of whose completion every token is the most probable one.

    Each is predicted from the true tokens before it. So a completion counts that greedy generation
    would write, and all are measured by one pass, not token by token.
    """
    right = 0
    with evaluating(model):
        for x, y in scoring_batches(dataset):
            best = model(x.to(next(model.parameters()).device)).argmax(dim=-1).cpu()  # (B, T)
            right += int(((best == y) | (y == IGNORE_INDEX)).all(dim=1).sum())
    return right / len(dataset)


def evaluation_set(data: Tensor | list[Example], context_length: int, name: str) -> Corpus:
    """A data set to score; a text shorter than the context is one window."""
    if isinstance(data, list):
        return CompletionDataset(data, context_length)
    if len(data) < 2:
        raise BadFile(f"{name} has one token to measure, none to predict: give more")
    return TextDataset(data, min(context_length, len(data) - 1))


def load_data(config: dict, folder: Path | None = None) -> tuple[Corpus, Corpus | None]:
    """The data sets of a config, to train on and to validate on (or None). For `folder`, see
    read_data. ValueError, also BadFile, if the data cannot be used or leaves nothing to train on.
    """
    name, context = config["data"], config["context_length"]
    data = read_data(name, folder)
    n_val = 0 if config["val_data"] else math.ceil(len(data) * config["val_fraction"])
    # Examples are held back at random, since their files may be sorted. Of a text it is the end:
    # windows picked at random would share tokens with those that are trained on.
    if isinstance(data, list):
        order = random_order(len(data), mix_seeds(config["seed"], 0))
        data = [data[i] for i in order.tolist()]
    else:
        n_val = min(n_val, config["max_val_tokens"])

    n_train = len(data) - n_val
    if n_train == 0:
        raise ValueError(f"{name} leaves nothing to train on: lower val_fraction")
    train_set: Corpus
    if isinstance(data, list):
        train_set = CompletionDataset(data[:n_train], context)
    else:
        train_set = TextDataset(data[:n_train], context, config["stride"] or max(1, context // 2))

    if name := config["val_data"]:
        return train_set, evaluation_set(read_data(name, folder), context, name)
    return train_set, evaluation_set(data[n_train:], context, name) if n_val else None


# ---- 9. Runs: checking a config, the machine, the state of a run, whole files, going on ----

# The smallest and the largest value of a number: the last line that names a key counts.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(CONFIG, (0, 10**9)),
    **dict.fromkeys((*SIZE_KEYS, "batch_size", "grad_accumulation"), (1, 10**6)),
    "dropout_rate": (0, 0.99),
    "val_fraction": (0, 0.99),
    "epochs": (1e-6, 10**6),
}
KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_value(key: str, value: Any) -> Any:
    """The value of a key of CONFIG, as a plain value. ValueError for an impossible one."""
    kind = type(CONFIG[key])
    if isinstance(value, Path):
        value = str(value)
    if hasattr(value, "item"):  # a number of NumPy
        value = value.item()
    if kind is float and type(value) is int:
        value = float(value)
    # Not isinstance: True is an int, and would pass as 1.
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r:.80}; it must be {KIND_NAMES[kind]}")

    low, high = LIMITS[key]
    # Said with `not`, it refuses NaN, too, of which every comparison is false.
    if kind in (int, float) and not low <= value <= high:
        raise ValueError(f"{key} is {value}; it must be from {low:g} to {high:g}")
    return value


def check_config(config: dict, keys: Sequence[str] = tuple(CONFIG)) -> dict:
    """These keys of a config. ValueError for one that is missing or impossible."""
    for key in keys:
        if key not in config:
            raise ValueError(f"the config has no {key!r}")
    checked = {key: check_value(key, config[key]) for key in keys}
    width, n_heads = checked["emb_dim"], checked["n_heads"]
    if width % n_heads:
        raise ValueError(f"emb_dim {width} is not a multiple of n_heads {n_heads}")
    return checked


def check_given(given: dict) -> dict:
    """What differs from CONFIG, as plain values. ValueError for a key that CONFIG does not have."""
    for key in given.keys() - CONFIG.keys():
        near = difflib.get_close_matches(key, CONFIG, cutoff=0)
        raise ValueError(f"unknown key {key!r}: did you mean {near[0]!r}?")
    return {key: check_value(key, value) for key, value in given.items()}


# The machine: the only place that knows about ranks, DDP and loss scaling.

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The scaler's factor begins at 2^16 and is halved each time: 20 times, and it is not to blame.
MAX_SKIPPED_STEPS = 20


def pick_device(name: str) -> torch.device:
    """`auto` is an accelerator, if there is one; under torchrun, each process has its own."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        # Using a device shows whether it is there: its driver may be missing, or too old.
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"no device {name!r} here: give auto or cpu") from error


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device multiplies it, fp16 on older CUDA cards, else fp32."""
    if name not in ("auto", *PRECISIONS):
        kinds = "auto, fp32, bf16 or fp16; generate and eval know int8, too"
        raise ValueError(f"precision is {name!r}; it must be {kinds}")
    if name != "auto":
        return name
    if device.type == "cuda":
        # Compute capability 8.0 (Ampere) is the first that multiplies bf16.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # A CPU without such instructions computes bf16 by way of fp32, and slower.
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def process_rank() -> int:
    """Which process this is. The first, 0, writes and speaks: the process group decides it."""
    return dist.get_rank() if dist.is_initialized() else 0


class Machine:
    """On what, in what numbers and by how many processes a run is computed."""

    # What `sum` adds up. A count of tokens above 16 million would be rounded in float32. It is kept
    # between sums: a thread of Gloo may be the last to hold the tensor, and freeing it while Python
    # exits aborts the process.
    total = torch.zeros((), dtype=torch.float64)

    def __init__(self, device: str = "auto", precision: str = "auto"):
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        # torchrun says in the environment how many processes it started.
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
            cuda = self.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(self.device)
            # Gradients lie on the GPU and go by NCCL; Machine.sum adds on the CPU, by Gloo.
            # The others wait while the first tokenises: for a corpus, longer than half an hour.
            backend, patience = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(hours=12)
            dist.init_process_group(backend, timeout=patience)
        self.rank = process_rank()
        self.world = dist.get_world_size() if dist.is_initialized() else 1

        # Small gradients are 0 in fp16. The scaler multiplies the loss, so that they are not,
        # divides the gradients again, and skips a step in which they overflowed. Where it is not
        # enabled, it passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.skipped = 0  # steps in a row

    def autocast(self) -> torch.autocast:
        """Inside, products are computed in this machine's precision."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def prepare(self, model: GPT2, compiled: bool) -> nn.Module:
        """The model as training calls it: compiled, and exchanging its gradients."""
        network: Any = torch.compile(model) if compiled else model
        return nn.parallel.DistributedDataParallel(network) if self.world > 1 else network

    def micro_batches(self, network: Any, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches on this device. Gradients are exchanged with the last one only."""
        for i, (x, y) in enumerate(batches):
            if self.device.type == "cuda":  # pinned memory travels while the GPU computes
                x, y = x.pin_memory(), y.pin_memory()
            # Exchange once: one process may have a batch more than another, and wait for ever.
            # The caller's forward and backward run while this is at `yield`, inside no_sync.
            later = self.world > 1 and i < len(batches) - 1
            with network.no_sync() if later else contextlib.nullcontext():
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss. DDP takes the mean over processes; a sum is wanted."""
        self.scaler.scale(loss * self.world).backward()

    def clip_gradients(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> float:
        """Shorten the gradient to `grad_clip`, and return the length that it had.

        FloatingPointError if that is not finite, as with a loss that is not; with a scaler, which
        then skips the step and scales less, only after many such steps in a row.
        """
        # The length of the gradient means something only without the scaler's factor.
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Clipping to infinity only measures.
        norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item()

        # One overflow is an accident that the scaler mends; many are a learning rate too high.
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (MAX_SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            problem = f"loss or gradient overflowed: the gradient's length is {norm}"
            raise FloatingPointError(f"{problem}; begin again with a lower learning_rate")
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer step, unless the scaler has found an overflow."""
        self.scaler.step(optimizer)
        self.scaler.update()

    @staticmethod
    def sum(value: float | Tensor) -> float:
        """The sum of this number over all processes; each waits for all."""
        Machine.total.fill_(float(value))
        if dist.is_initialized():
            dist.all_reduce(Machine.total)
        return Machine.total.item()

    @staticmethod
    def wait() -> None:
        """Wait until all processes are here."""
        if dist.is_initialized():
            dist.barrier()


def free_memory(device: torch.device) -> float:
    """Bytes that the device can still give; infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, LookupError):
        text = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        return int(text.split()[0]) * 1024
    return math.inf


# Whole files.


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file that then takes the name `path`: it is whole, or as it was before.

    OSError, with the disk's reason, if it cannot be written.
    """
    # In the same folder, for renaming is one step only within a file system.
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could keep the name and lose the bytes
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # Not this file's fault: the error names another file, or, of a download, has no errno.
        name = getattr(error, "filename", None)
        if name not in (None, str(part)) or getattr(error, "errno", 0) is None:
            raise
        hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
        reason = error.__context__ if hidden else error  # torch.save hides what the disk said
        raise OSError(f"cannot write {path}: {getattr(reason, 'strerror', reason)}") from error
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write tensors and plain values, with `config` and `model` (weights by name) among them."""
    write_file(Path(path), functools.partial(torch.save, {"version": VERSION} | checkpoint))


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict:
    """What `save_checkpoint` wrote; with `mmap`, tensors are read from disk as they are used.

    Nothing in the file is run. BadFile if it is no checkpoint.
    """
    match load_pickled(Path(path), mmap):
        case {"config": dict(), "model": dict()} as checkpoint:
            return checkpoint
    raise BadFile(f"{path} is not a checkpoint: weights without a config, or no weights")


def load_pickled(path: Path, mmap: bool = True) -> Any:
    """What `torch.save` wrote: tensors and plain values, nothing that runs. BadFile if damaged."""
    with open(path, "rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        raise BadFile(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    try:
        mmap = mmap and head.startswith(b"PK")  # not the format of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as e:
        raise BadFile(f"{path} is no file of weights, or damaged: copy it again") from e


# The state of a run, in memory and in its folder.

SECONDS_BETWEEN_SAVES = 600
SPLIT_KEYS = ("val_fraction", "max_val_tokens", "stride")  # which windows there are, and where
# A resumed run refuses other values of these. (An optimizer's state holds its weight_decay, and so
# would silently undo a change.) Others, as the learning rate, may change, and that is said.
MUST_STAY = (*MODEL_KEYS, *SPLIT_KEYS, "weight_decay", "grad_clip", "seed", "precision")
# A higher rate would destroy in a few steps what the model knows.
INIT_RECIPE = {"learning_rate": 1e-4, "min_learning_rate": 1e-5, "epochs": 1.0}
STATE = ("step", "tokens_seen", "best_step", "best_val_loss", "stale")  # of Run, in checkpoints


@dataclasses.dataclass
class Run:
    """A run as `train` sees it. Its folder always holds a state from which it can go on."""

    config: dict
    folder: Path | None
    metrics: IO[bytes] | None  # metrics.jsonl, open and locked, in the first process
    machine: Machine
    model: GPT2
    train_set: Corpus
    val_set: Any  # a Corpus, or None
    data_sha256: str

    step: int = 0
    tokens_seen: int = 0
    best_step: int = 0
    best_val_loss: float = math.inf  # the lowest, after best_step
    stale: int = 0  # measurements since then
    saved_best: tuple[float, int] = (math.inf, 0)  # of the best.pt that was written
    saved_step: int = -1  # of last.pt, or of the last attempt
    step_began: float = 0.0
    failed: bool = False  # the last attempt

    def __post_init__(self) -> None:
        config, world = self.config, self.machine.world
        self.network = self.machine.prepare(self.model, config["compile"])
        self.optimizer = make_optimizer(self.model, config)
        self.items_per_step = config["batch_size"] * config["grad_accumulation"] * world
        self.steps_per_epoch = math.ceil(len(self.train_set.for_epoch(0)) / self.items_per_step)
        of_epochs = math.ceil(config["epochs"] * self.steps_per_epoch)
        self.schedule_steps = config["schedule_steps"] or of_epochs
        self.total_steps = min(self.schedule_steps, config["max_steps"] or self.schedule_steps)
        self.saved_at = time.monotonic()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to come, until the last, or until patience ends."""
        log.info(f"run       from step {self.step + 1} to {self.total_steps}")
        if self.config["compile"]:
            log.info("compile   the first steps take a minute")
        progress.info("computing the first step")
        while self.step < self.total_steps:
            # The mean, so that all stop together: their own counts may differ, since after a failed
            # save the first process goes back to an older lowest loss.
            patience = self.config["patience"]
            if patience and self.machine.sum(self.stale) >= patience * self.machine.world:
                log.info(f"stopped   {self.stale} measurements brought no lower validation loss")
                return
            self.step_began = time.perf_counter()
            yield self.step + 1

    def is_due(self, key: str) -> bool:
        """Whether `eval_every` or `checkpoint_every` falls on this step of the schedule."""
        # 0 means: once an epoch, but ten times a run at least, and fifty at most.
        interval = min(self.steps_per_epoch, math.ceil(self.schedule_steps / 10))
        interval = self.config[key] or max(interval, self.schedule_steps // 50)
        # A step of a large model takes minutes: nobody is to lose more than ten of them.
        late = time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES
        on_time = self.step % interval == 0 or self.step == self.schedule_steps
        return on_time or (late and key == "checkpoint_every")

    def count_step(
        self, batches: Sequence[Batch], loss: float, learning_rate: float, norm: float
    ) -> dict:
        """Count a step that was taken, and return its row for metrics.jsonl."""
        seconds = time.perf_counter() - self.step_began
        tokens = self.machine.sum(sum(x.numel() for x, _ in batches))
        targets = self.machine.sum(sum(int((y != IGNORE_INDEX).sum()) for _, y in batches))

        self.step += 1
        self.tokens_seen += int(targets)
        return {
            "step": self.step,
            "epoch": math.ceil(self.step / self.steps_per_epoch),
            "tokens_seen": self.tokens_seen,
            "train_loss": loss if math.isfinite(loss) else None,  # fp16 skipped the step
            "learning_rate": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_second": round(tokens / seconds, 1),
        }

    def record(self, row: dict) -> None:
        """Append a row to metrics.jsonl. A measurement lower than all before is the best."""
        if not math.isfinite(row.get("val_loss", 0.0)):
            row["val_loss"] = None  # fp16 overflowed: JSON has no NaN
        elif row.get("val_loss", math.inf) < self.best_val_loss:
            self.best_val_loss, self.best_step, self.stale = row["val_loss"], self.step, 0
        elif "val_loss" in row:
            self.stale += 1
        if self.metrics:
            try:
                self.metrics.write(json.dumps(row).encode() + b"\n")
                self.metrics.flush()
            except OSError as error:
                log.warning(f"step {self.step} is not in metrics.jsonl: {error.strerror}")

    def validation_batches(self) -> Iterator[Batch]:
        """This process's share of the validation set; about 4,000 tokens fill an accelerator."""
        tokens = 1024 if self.machine.device.type == "cpu" else 4096
        batches = scoring_batches(self.val_set, tokens=tokens)
        return itertools.islice(batches, self.machine.rank, None, self.machine.world)

    def sample(self) -> str:
        """What the model writes now, greedily. The first process alone draws it."""
        if self.machine.rank > 0:
            return ""
        tokenizer = load_tokenizer()
        text = self.config["sample_prompt"]
        prompt = tokenizer.encode(text, allowed_special="all") or self.train_set.sample_prompt()
        ids = torch.tensor([prompt or [tokenizer.eot_token]])  # (1, T)
        ids = generate(self.model, ids, 40, eos_id=tokenizer.eot_token)
        return token_ids_to_text(ids, tokenizer).rstrip("\ufffd\n ")  # half a character, and blanks

    def measure_start(self) -> None:
        """Measure the model that a run begins with: best.pt is never worse than it."""
        with self.machine.autocast():
            loss = evaluate(self.model, self.validation_batches(), self.machine)
        log.info(f"start     validation {loss:.3f}, before the first step")
        self.best_val_loss = loss if math.isfinite(loss) else math.inf
        self.save()

    def checkpoint(self) -> dict:
        """The weights, and what is known of them."""
        return {key: getattr(self, key) for key in (*STATE, "items_per_step", "data_sha256")} | {
            "config": self.config,
            "labels": self.train_set.labels(),
            "model": self.model.state_dict(),
        }

    def save(self) -> None:
        """Write last.pt, and best.pt after the lowest measurement. A failure is a warning."""
        # The others have nothing to write.
        self.failed, self.saved_step, self.saved_at = False, self.step, time.monotonic()
        if not (self.folder and self.metrics):
            return
        try:
            # best.pt first: if the machine dies between the two, last.pt names an older best.
            checkpoint = self.checkpoint()
            # Written now or not at all: after the next step these weights are gone.
            if self.best_val_loss < math.inf and self.best_step == self.step:
                save_checkpoint(self.folder / "best.pt", checkpoint)
                self.saved_best = (self.best_val_loss, self.best_step)
            # Not of this run, but of one that it replaces; find_model would prefer it to last.pt.
            if self.best_val_loss == math.inf:
                (self.folder / "best.pt").unlink(missing_ok=True)

            os.fsync(self.metrics.fileno())  # last.pt is not to be ahead of its rows
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint["scaler"] = self.machine.scaler.state_dict()
            save_checkpoint(self.folder / "last.pt", checkpoint)
        except OSError as error:
            self.failed = True
            # A measurement counts as lowest if it is lower than that of the best.pt on the disk.
            self.best_val_loss, self.best_step = self.saved_best
            log.warning(f"step {self.step} was not saved: {error}")

    def finish(self) -> None:
        """Save what is not saved yet, and draw the losses. OSError if the last save failed."""
        if self.saved_step != self.step:
            self.save()
        if self.machine.skipped:
            log.warning(f"skipped at the end, where fp16 overflowed: {self.machine.skipped}")
        if self.folder and self.metrics:
            try:
                draw = functools.partial(plot_losses, self.folder / "metrics.jsonl")
                write_file(self.folder / "loss.png", draw)
            except (ImportError, OSError, ValueError) as error:
                log.warning(f"loss.png was not drawn: {error}")

        self.machine.wait()  # no process leaves before the first has saved
        if self.failed:
            raise OSError(f"step {self.step}, the last, is not saved in {self.folder}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        # GeneratorExit is what `close` raises at the yield of `train`, between two steps. After any
        # other error a step may be half done: the last save is better than these weights.
        try:
            if kind in (None, GeneratorExit) and self.step > 0:
                self.finish()
        finally:
            if self.metrics:
                self.metrics.close()


def plot_losses(metrics: Path, file: IO[bytes]) -> None:
    """Draw the losses of metrics.jsonl as PNG into an open file."""
    from matplotlib.figure import Figure  # here, for it takes a second to import

    rows = [json.loads(line) for line in metrics.read_text("utf-8").split("\n") if line]
    trained = [(row["step"], row["train_loss"]) for row in rows]
    measured = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    # Two colours that the colour-blind can tell apart, too (Okabe and Ito, 2008).
    axes.plot(*zip(*trained, strict=True), color="#0072B2", label="training")
    if measured:
        step, lowest = min(measured, key=lambda point: point[1])
        axes.plot(*zip(*measured, strict=True), "o--", color="#D55E00", ms=4, label="validation")
        axes.plot(step, lowest, "kv", label=f"lowest validation: {lowest:.2f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(loc="center right")
    figure.savefig(file, format="png")


# Starting and resuming.


def lock(file: IO[bytes]) -> None:
    """Hold an open file for this process; the lock ends with the process, however that ends.

    BlockingIOError or PermissionError if another process holds it.
    """
    # A file whose existence is the lock would outlive a killed process; this lock cannot.
    if os.name == "nt":
        import msvcrt

        # Windows lets nobody read a locked byte: so it is one far behind the file's end.
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_folder(folder: Path, resume: bool, overwrite: bool) -> IO[bytes]:
    """Make the folder of a run, and return its metrics.jsonl, open to append, and locked.

    ValueError or OSError if the folder cannot be used: before the first step, not at the last.
    """
    holds_run = any((folder / name).exists() for name in ("last.pt", "best.pt"))
    if holds_run and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run: give --resume, --overwrite or another --out")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # It proves that the folder can be written, and holds the lock. Opened to append, since it
        # may be another process's: it is emptied once the lock is held and all else is checked.
        metrics = open(folder / "metrics.jsonl", "a+b")  # noqa: SIM115, the run closes it
    except OSError as error:
        problem = f"cannot write into {folder}: {error.strerror}"
        raise OSError(f"{problem}; give another --out") from error

    try:
        lock(metrics)
    except (BlockingIOError, PermissionError) as error:
        metrics.close()
        raise ValueError(f"another process trains in {folder}: give another --out") from error
    except OSError as error:  # some network disks know no locks
        log.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
    return metrics


def cut_metrics(metrics: IO[bytes], step: int) -> None:
    """Take away the rows after this step, and half a row: a resumed run writes them again."""
    kept = size = 0
    metrics.seek(0)
    with contextlib.suppress(ValueError, TypeError, LookupError):  # a damaged row ends them, too
        for line in metrics:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept, size = kept + 1, size + len(line)
    metrics.truncate(size)
    if kept != step:
        log.warning(f"metrics.jsonl holds {kept} rows only; the run goes on after step {step}")


def resumed_config(old: dict, given: dict) -> dict:
    """The config of a run that goes on. ValueError for a change that makes another run."""
    # A checkpoint that lacks a newer key was trained with its default.
    old = check_config(CONFIG | old)
    changes = {key: value for key, value in given.items() if value != old[key]}
    # A run keeps the precision that `auto` came to when it began.
    if changes.get("precision") == "auto":
        del changes["precision"]
    for key, value in changes.items():
        if key in MUST_STAY:
            advice = "leave it out, or begin a new run with --init and another --out"
            raise ValueError(f"{key} must stay {old[key]!r} in a resumed run: {advice}")
        log.info(f"resume    {key} is {value!r} from here on, and was {old[key]!r}")
    return check_config(old | changes)


def new_config(given: dict, source: GPT2 | None) -> dict:
    """The config of a new run, from a model or from nothing."""
    config = CONFIG | given
    if source is not None:
        # Of two values of a key the later counts: what was given overrules all others.
        fixed = {key: source.config[key] for key in MODEL_KEYS if key != "dropout_rate"}
        config = CONFIG | INIT_RECIPE | fixed | given

        # A shorter context uses the first positions of the model.
        longest = fixed.pop("context_length")
        if config["context_length"] > longest:
            raise ValueError(f"context_length of the init model is {longest}: give no more")
        for key in fixed:
            if config[key] != fixed[key]:
                raise ValueError(f"{key} of the init model is {fixed[key]}: leave {key} out")

    if config["vocab_size"] < CONFIG["vocab_size"]:
        raise ValueError(f"vocab_size {config['vocab_size']} is below the 50257 tokens of GPT-2")
    return check_config(config)


def announce(config: dict, machine: Machine, train_set: Corpus, val_set: Corpus | None) -> None:
    """Say what is coming before it takes time and memory; warn where memory is short."""
    held_back = val_set.size() if val_set else "nothing"
    log.info(f"data      {config['data']}: train on {train_set.size()}, validate on {held_back}")
    # Counted without memory: this is to warn before memory is asked for.
    with shapes_only():
        count = GPT2(config).num_parameters()
    log.info(f"model     {count:,} parameters, on {machine.device} in {machine.precision}")
    # Weights, gradients and two moments, 4 bytes each; what a batch needs comes on top.
    needed, free = 16 * count, free_memory(machine.device)
    amount = f"{needed / 1e9:.1f} GB" if needed > 1e9 else f"{needed / 1e6:.0f} MB"
    log.info(f"memory    {amount} for weights, gradients and AdamW's two moments")
    if needed > free:
        advice = "choose a smaller --model_size or --emb_dim"
        log.warning(f"memory    only {free / 1e9:.1f} GB are free: {advice}")


def load_run(path: Path) -> tuple[dict, GPT2]:
    """The last.pt of a run that is to go on, and its model. BadFile where it does not hold
    together."""
    if not path.exists():
        best = path.with_name("best.pt")
        advice = f"begin with --init {best} and another --out" if best.exists() else "leave it out"
        raise FileNotFoundError(f"there is no {path} for --resume: {advice}")
    checkpoint = load_checkpoint(path, mmap=False)  # for the file will be replaced
    if "version" not in checkpoint:
        advice = f"go on with --init {path} and another --out"
        raise BadFile(f"{path} is of an earlier version, which cut its data differently: {advice}")

    for key in STATE:
        value = checkpoint.get(key, -1)
        # Of the kind of Run's default, and not below 0, which is false for NaN, too.
        if type(value) is not type(getattr(Run, key)) or not value >= 0:
            raise BadFile(f"{path} is damaged: {key} is {value!r:.60}")
    if lacking := {"optimizer", "scaler", "items_per_step", "data_sha256"} - checkpoint.keys():
        raise BadFile(f"{path} is damaged: it has no {min(lacking)}")
    # Both from one reading: another process may be replacing the file.
    with blaming(path):
        return checkpoint, build_model(checkpoint["config"], checkpoint.pop("model"))


def make_model(config: dict, source: GPT2 | None) -> GPT2:
    """A new model, or a copy of `source`, whose context may be longer: its first positions are
    taken. ValueError if `source` has frozen parameters."""
    torch.manual_seed(config["seed"])
    if source is None:
        return GPT2(config)
    if frozen := [name for name, weight in source.named_parameters() if not weight.requires_grad]:
        raise ValueError(f"{frozen[0]} of the init model is frozen; a run trains all parameters")
    weights = source.state_dict()
    # A copy: training does not change the model that it was given.
    positions = weights["position_embedding.weight"][: config["context_length"]]
    return build_model(config, weights | {"position_embedding.weight": positions})


def restore(run: Run, checkpoint: dict) -> None:
    """Bring a run to the state of its checkpoint. ValueError where the two do not fit."""
    last = f"{run.folder}/last.pt"
    # The first process alone has read the data once more, for their digest.
    if run.machine.rank == 0 and checkpoint["data_sha256"] != run.data_sha256:
        advice = f"give that, or begin a new run with --init {last} and another --out"
        raise ValueError(f"{run.config['data']} is not what this run was trained on: {advice}")

    if checkpoint["items_per_step"] != run.items_per_step:
        old = checkpoint["items_per_step"]
        rule = f"batch_size × grad_accumulation × processes must stay {old} in a resumed run"
        batches, rest = divmod(old, run.config["batch_size"] * run.machine.world)
        advice = "give another --batch_size" if rest else f"give --grad_accumulation {batches}"
        raise ValueError(f"{rule}, and would be {run.items_per_step}: {advice}")

    for key in STATE:
        setattr(run, key, checkpoint[key])
    run.saved_best = (run.best_val_loss, run.best_step)

    state = f"the run in {run.folder} is at step {run.step} of {run.schedule_steps}"
    command = f"{resume_command(str(run.folder))} --max_steps 0"
    if run.step >= run.schedule_steps:
        # Twice what was trained, not what was asked for: a resume may have asked for less.
        in_steps = run.config["schedule_steps"]
        epochs = math.ceil(run.step / run.steps_per_epoch)
        advice = f"--schedule_steps {2 * run.step}" if in_steps else f"--epochs {2 * epochs}"
        longer = f"{command} {advice}"
        raise ValueError(f"{state}, finished: to train longer, on a longer schedule, run {longer}")
    if run.step >= run.total_steps:
        raise ValueError(f"{state}, stopped by max_steps: to finish it, run {command}")
    if 0 < run.config["patience"] <= run.stale:
        raise ValueError(f"{state}, stopped by patience: to go on, run {command} --patience 0")

    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.machine.scaler.load_state_dict(checkpoint["scaler"])
        for parameter, moments in run.optimizer.state.items():
            layout = (parameter.shape, parameter.stride())
            # PyTorch compares no shapes: a fused step would write past a moment that is smaller.
            for value in moments.values():
                if value.dim() > 0 and (value.shape, value.stride()) != layout:
                    raise ValueError("a moment and its parameter differ in shape")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise BadFile(f"{last} is damaged: its optimizer does not fit its model") from error

    if run.metrics:
        cut_metrics(run.metrics, run.step)
    run.saved_step = run.step
    log.info(f"resume    after step {run.step} of {run.total_steps}")


def start_run(
    given: dict,
    out: str | Path | None,
    init: GPT2 | str | Path | None,
    resume: bool,
    overwrite: bool,
) -> Run:
    """A run that is new, begins with a model, or goes on. What is wrong is found before a step,
    and what costs nothing is checked first."""
    if resume and (out is None or overwrite or init is not None):
        raise ValueError("resume needs the folder of a run, and excludes init and overwrite")
    if out == "":
        raise ValueError("out is an empty name: give a folder")
    folder = Path(out) if out is not None else None

    # Values, files and folder first: a mistake is not to be found after a long download.
    given = check_given(given)
    checkpoint, model = load_run(folder / "last.pt") if resume and folder else ({}, None)
    config = resumed_config(checkpoint["config"], given) if resume else CONFIG | given
    files = find_files(config["data"])
    if config["val_data"]:
        find_files(config["val_data"])
    machine = Machine(config["device"], config["precision"])

    # The lock is the run's: it is given back here only if anything fails from here on.
    with contextlib.ExitStack() as stack:
        metrics = None
        if folder and machine.rank == 0:
            metrics = stack.enter_context(open_folder(folder, resume, overwrite))
        source = GPT2.from_pretrained(init) if isinstance(init, (str, Path)) else init
        if not resume:
            config = new_config(given, source)
        config["precision"] = machine.precision  # what `auto` came to

        train_set, val_set = load_data(config, folder)
        announce(config, machine, train_set, val_set)
        model = (model or make_model(config, source)).to(machine.device)
        digest = fingerprint(files) if machine.rank == 0 else ""
        run = Run(config, folder, metrics, machine, model, train_set, val_set, digest)

        # Only now are the rows of a run that is replaced lost: a mistake until here left it whole.
        if resume:
            restore(run, checkpoint)
        elif metrics:
            metrics.truncate(0)
        if source is not None and run.val_set is not None:
            run.measure_start()
        stack.pop_all()
        return run


# ---- 10. Pretrained: the same model under other names, in other people's files ----

ALIKE = {"vocab_size": 50257, "context_length": 1024, "qkv_bias": True, "dropout_rate": 0.1}
OPENAI_SIZES = {  # GPT-2 paper, table 2; the rates are GPT-3's for models of such sizes, table 2.1
    "gpt2": ALIKE | {"n_layers": 12, "n_heads": 12, "emb_dim": 768, "learning_rate": 6e-4},
    "gpt2-medium": ALIKE | {"n_layers": 24, "n_heads": 16, "emb_dim": 1024, "learning_rate": 3e-4},
    "gpt2-large": ALIKE | {"n_layers": 36, "n_heads": 20, "emb_dim": 1280, "learning_rate": 2.5e-4},
    "gpt2-xl": ALIKE | {"n_layers": 48, "n_heads": 25, "emb_dim": 1600, "learning_rate": 2e-4},
}

CONFIG_NAMES = {  # ours -> Hugging Face's
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "dropout_rate": "resid_pdrop",
}
FIXED_CONFIG: dict[str, tuple] = {  # what a config.json may say; the first where it says nothing
    "model_type": ("gpt2",),
    # Three names of one function, the one of FeedForward.
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
BLOCK_NAMES = {  # of each block: ours -> theirs
    "norm1": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "norm2": "ln_2",
    "feed_forward.expand": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
# Theirs that are stored input × output: OpenAI's code multiplies x @ W, nn.Linear x @ W.T.
TRANSPOSED = re.compile(r".*\.c_(attn|proj|fc)\.weight")


def hugging_face_names(n_layers: int) -> dict[str, str]:
    """Our names of all tensors -> theirs."""
    names = {"token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight"}
    modules = {"final_norm": "ln_f"}
    for i in range(n_layers):
        modules |= {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for ours, theirs in BLOCK_NAMES.items()}
    for ours, theirs in modules.items():
        names |= {f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}
    return names


class SkipInitialisation(TorchFunctionMode):
    """Inside, nothing is drawn for new modules: their values are about to come from a file."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # On the meta device, normal_ imports torch._dynamo: a whole second, to draw nothing.
        # It hands its tensor on by name, and what is to be returned is that tensor.
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, modules have shapes, and neither memory nor values."""
    with torch.device("meta"), SkipInitialisation():
        yield


def build_model(config: dict, weights: dict[str, Tensor], zero_biases: bool = False) -> GPT2:
    """A model with these weights, under our names, copied to float32 in memory of its own.

    ValueError, before anything is built, unless names and shapes are those of the config; with
    `zero_biases`, a bias may be missing.
    """
    config = check_config(config, MODEL_KEYS)
    # A hostile config could ask for a million layers: look before building.
    if config["n_layers"] > len(weights):
        raise ValueError(f"n_layers is {config['n_layers']}, but there are {len(weights)} tensors")
    with shapes_only():
        model = GPT2(config)

    expected = dict(model.named_parameters())
    weights = {name: tensor for name, tensor in weights.items() if name != "head.weight"}
    if zero_biases:
        biases = {name: p for name, p in expected.items() if name.endswith(".bias")}
        weights = {name: torch.zeros(p.shape) for name, p in biases.items()} | weights
    if odd := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'unknown'}")

    copies = {}
    for name, tensor in weights.items():
        wanted = list(expected[name].shape)
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} is {list(tensor.shape)}, by the config it is {wanted}")
        # Memory of its own: the file may change, and its layout may be another.
        copies[name] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())
    # `assign` puts the copies in place of shapes without memory, which unties the head. Not strict,
    # for the head has no copy; that no other name is missing was checked above.
    model.load_state_dict(copies, strict=False, assign=True)
    model.head.weight = model.token_embedding.weight
    return model


def model_from_tensors(tensors: dict[str, Any], config: dict, transposed: bool) -> GPT2:
    """A model of somebody else's tensors. ValueError if they are of another kind of model.

    `transposed` says whether matrices are stored input × output, as in Hugging Face's files.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # torch.compile, DDP, FSDP and others put their names before ours.
        name = re.sub(r"^((_orig_mod|_?module|model|transformer)\.)+", "", name)
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # old files hold the causal mask
            continue
        if name.startswith(("score.", "classifier.", "multiple_choice_head.")):
            raise ValueError(f"{name} is a head of {len(tensor)} labels: not a language model")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is quantised ({tensor.dtype}): give floating-point weights")
        found[name] = tensor

    # A tied file may hold only one of these; an untied one has a head of its own.
    head = found.pop("lm_head.weight", found.get("wte.weight"))
    # Two copies of one matrix are fine; two different ones are a model that this one cannot be.
    if head is not None and not torch.equal(head, found.setdefault("wte.weight", head)):
        raise ValueError("lm_head.weight is not wte.weight: an untied head is not supported")

    n_layers = min(config["n_layers"], len(found))  # build_model refuses a config that says more
    names = {theirs: ours for ours, theirs in hugging_face_names(n_layers).items()}
    weights = {
        names.get(name, name): tensor.t() if transposed and TRANSPOSED.match(name) else tensor
        for name, tensor in found.items()
    }
    # nanoGPT can train without biases, which is the same as with biases of 0.
    return build_model(config, weights, zero_biases=not transposed)


# Reading files and folders.

SAFETENSORS_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_TYPES |= {"BOOL": "bool", "U8": "uint8", "I8": "int8"}  # masks, quantised weights
SAFETENSORS_TYPES |= {"I16": "int16", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn"}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: 8 bytes length of the header, header, data. BadFile if damaged.

    The header is JSON: {name: {dtype, shape, data_offsets}}.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise BadFile(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
        begin = 8 + int.from_bytes(head, "little")
        try:
            # A damaged length must not ask for its exabytes of memory.
            header = json.loads(file.read(min(begin - 8, 10**8)))
            header.pop("__metadata__", None)
            size = path.stat().st_size
            data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            tensors = {}

            # Of a file that was cut off, a slice is too short for its shape: that is an error.
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                raw = data[begin + start : begin + end].clone()  # aligned, as it need not be there
                dtype = getattr(torch, SAFETENSORS_TYPES[entry["dtype"]])
                tensors[name] = raw.view(dtype).view(entry["shape"])
            return tensors
        except (ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
            raise BadFile(f"{path} is damaged, or not complete: {error!s:.80}") from error


def write_safetensors(tensors: dict[str, Tensor], file: IO[bytes]) -> None:
    """Write float32 tensors as `read_safetensors` reads them."""
    # "pt", for PyTorch, is what `transformers` looks for before it reads on.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.contiguous().numpy().tobytes())


def read_json_file(path: Path) -> dict:
    """A JSON object that belongs to a model. BadFile if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(path.read_text("utf-8")), dict):
            return value
    raise BadFile(f"{path} is not a JSON object")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one, or several shards. BadFile if one is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            shards = sorted(set(read_json_file(index).get("weight_map", {}).values()))
            if missing := [shard for shard in shards if not (folder / shard).exists()]:
                raise BadFile(f"{folder} lacks {missing[0]}, one of its files of weights")
            return [folder / shard for shard in shards]
        if found := sorted(folder.glob(name.replace(".", "-*."))):  # shards without an index
            return found

    tensorflow = any("tf_model" in file.name or ".ckpt" in file.name for file in folder.iterdir())
    kind = "weights of TensorFlow only" if tensorflow else "no model.safetensors"
    raise BadFile(f"{folder} holds {kind}: give a folder that `transformers` saved with PyTorch")


def check_vocabulary(folder: Path) -> None:
    """BadFile if the folder has a tokenizer of its own: its tokens mean other words than ours."""
    if (folder / "vocab.json").exists():
        vocabulary = read_json_file(folder / "vocab.json")
    elif (folder / "tokenizer.json").exists():
        vocabulary = (read_json_file(folder / "tokenizer.json").get("model") or {}).get("vocab", {})
    else:
        return
    if vocabulary != json.loads(openai_file("encoder.json")):
        raise BadFile(f"{folder} has a tokenizer of its own: only GPT-2's is supported")


def load_folder(folder: Path) -> GPT2:
    """The model of a folder in Hugging Face format."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise BadFile(f"{folder} is an adapter: merge it into its model")
        raise BadFile(f"{folder} is no model: no config.json or best.pt")
    given = {"resid_pdrop": 0.1} | read_json_file(folder / "config.json")
    # GPT-2's first configs say n_ctx only.
    given.setdefault("n_positions", given.get("n_ctx"))
    for key, allowed in FIXED_CONFIG.items():
        if given.get(key, allowed[0]) not in allowed:
            raise BadFile(f"{folder}: {key} is {given[key]!r}; only {allowed[0]!r} is supported")
    check_vocabulary(folder)

    config = {ours: given.get(theirs) for ours, theirs in CONFIG_NAMES.items()} | {"qkv_bias": True}
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        read = read_safetensors if file.suffix == ".safetensors" else load_pickled
        tensors |= read(file)
    return model_from_tensors(tensors, check_config(config, MODEL_KEYS), transposed=True)


def load_file(path: Path) -> GPT2:
    """The model of a checkpoint: one of ours, or nanoGPT's ckpt.pt."""
    if path.suffix == ".safetensors":
        raise BadFile(f"{path} holds weights without a config: give its folder")
    checkpoint = load_pickled(path)
    if isinstance(checkpoint, dict) and "model_args" in checkpoint:
        names = CONFIG_NAMES | {"context_length": "block_size", "dropout_rate": "dropout"}
        args = checkpoint["model_args"]
        config = {ours: args.get(theirs) for ours, theirs in names.items()} | {"qkv_bias": True}
        config = check_config(config, MODEL_KEYS)
        log.info("nanoGPT computes GELU exactly, OpenAI's code does not: logits differ a little")
        return model_from_tensors(checkpoint["model"], config, transposed=False)
    checkpoint = load_checkpoint(path)
    return build_model(checkpoint["config"], checkpoint["model"])


def download(name: str) -> GPT2:
    """One of OpenAI's models, downloaded once into the cache of torch.hub."""
    host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{host}/openai-community/{name}/resolve/main/model.safetensors"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info(f"download  {url}")
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}): put that file at {path}") from error
    try:
        tensors = read_safetensors(path)
    except BadFile as error:  # such as a download that the other end broke off
        raise BadFile(f"{error}; delete it, and it will be downloaded again") from error
    return model_from_tensors(tensors, OPENAI_SIZES[name], transposed=True)


def find_model(name_or_path: str | Path) -> Path | None:
    """The file or folder of a model; None for a name of OpenAI's. A path wins over a name.

    Of a run's folder it is best.pt, else last.pt.
    """
    path = Path(name_or_path)
    for found in (path / "best.pt", path / "last.pt"):
        if found.exists():
            return found

    named = str(name_or_path) in OPENAI_SIZES  # "./gpt2" is a path
    if named and path.is_dir() and not (path / "config.json").exists():
        raise BadFile(f"a folder {path} that is no model hides OpenAI's {path}: rename it")
    if path.exists():
        return path
    if not named:
        advice = f"make one with python gpt2.py train, or give one of {', '.join(OPENAI_SIZES)}"
        raise FileNotFoundError(f"there is no model {str(name_or_path)!r}: {advice}")
    return None


@contextlib.contextmanager
def blaming(source: str | Path) -> Iterator[None]:
    """What is wrong with a config or with tensors inside is a BadFile that names their source."""
    try:
        yield
    except BadFile:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(f"{source}: {error}") from error


def load_pretrained(name_or_path: str | Path) -> GPT2:
    """A model in float32, on the CPU, in eval mode. BadFile or OSError where that fails."""
    path = find_model(name_or_path)
    with blaming(path or name_or_path):
        if path is None:
            return download(str(name_or_path)).eval()
        return (load_folder(path) if path.is_dir() else load_file(path)).eval()


# Writing a folder.


def openai_file(name: str) -> bytes:
    """One of the files of OpenAI's vocabulary: encoder.json, vocab.bpe."""
    load_tokenizer()  # which says where they are, and compares them with their hashes
    url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    return read_file_cached(url)


def write_bytes(content: bytes, file: IO[bytes]) -> None:
    """Write these bytes: what `write_file` is to do with a small file."""
    file.write(content)


def json_bytes(value: dict) -> bytes:
    """A JSON file for people, as bytes."""
    return json.dumps(value, indent=2).encode()


def folder_files(config: dict) -> dict[str, bytes]:
    """What a folder holds beside the weights, by name: what other programs must know."""
    hf_config = {theirs: config[ours] for ours, theirs in CONFIG_NAMES.items()}
    hf_config |= {key: values[0] for key, values in FIXED_CONFIG.items()}
    # Said in full: converters to other formats do not know the defaults of transformers.
    hf_config |= {"architectures": ["GPT2LMHeadModel"], "n_ctx": config["context_length"]}
    hf_config |= dict.fromkeys(("attn_pdrop", "embd_pdrop"), config["dropout_rate"])
    if config["vocab_size"] != load_tokenizer().n_vocab:
        log.warning("exported without a tokenizer: the vocabulary is not GPT-2's")
        return {"config.json": json_bytes(hf_config)}

    # Without these, text goes on after its end, and llama.cpp ends it at every comma.
    end = load_tokenizer().eot_token
    ends = {"bos_token_id": end, "eos_token_id": end}
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokens |= {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config["context_length"]}
    return {
        "config.json": json_bytes(hf_config | ends),
        "generation_config.json": json_bytes(ends),
        "tokenizer_config.json": json_bytes(tokens),
        "vocab.json": openai_file("encoder.json"),
        "merges.txt": openai_file("vocab.bpe"),
    }


def save_hugging_face(model: GPT2, folder: Path) -> None:
    """Write a new folder that `transformers`, CTranslate2, llama.cpp and vLLM read."""
    if folder.is_file() or any(folder.glob("*")):
        raise ValueError(f"{folder} is not empty: give a new folder")
    config = dict(model.config)
    weights = dict[str, Tensor](model.named_parameters())
    n_tokens = load_tokenizer().n_vocab
    if config["vocab_size"] > n_tokens:  # padded for speed: the tokens beyond are nobody's
        config["vocab_size"] = n_tokens
        weights["token_embedding.weight"] = weights["token_embedding.weight"][:n_tokens]
        log.info(f"the vocabulary is cut to the {n_tokens:,} tokens of GPT-2")

    tensors = {}
    for ours, theirs in hugging_face_names(config["n_layers"]).items():
        # A model without qkv_bias has none of these; added zeros change nothing.
        if ours.endswith("query_key_value.bias"):
            weights.setdefault(ours, torch.zeros(3 * config["emb_dim"]))
        if ours not in weights:
            raise ValueError(f"the model has no {ours}: it is not as GPT2 made it")
        tensor = weights[ours].detach().float().cpu()
        tensors[theirs] = tensor.t() if TRANSPOSED.match(theirs) else tensor

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", functools.partial(write_safetensors, tensors))
    for name, content in folder_files(config).items():
        write_file(folder / name, functools.partial(write_bytes, content))
    log.info(f"wrote {folder}, a model that sees at most {config['context_length']} tokens")


# ---- 11. Fast CPUs: faster modules for a loaded model, int8 weights, memory that is kept ----


class FewRowsLinear(nn.Module):
    """`nn.Linear` for a model that generates: faster for few rows, in fp32 on a CPU.

    PyTorch reads the weights of such a product with one core. Cut into pieces, it becomes a batch
    of products that all cores share: on two, with GPT-2's matrices, 2.2 times as fast for one
    row, 1.6 times for 8. Up to 4 rows, weights times columns is faster than rows times weights.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        outputs, inputs = self.weight.shape
        # 48 pieces are enough to keep all cores busy: more were measured, and gain nothing.
        pieces = next(n for n in range(48, 0, -1) if outputs % n == 0)
        self.pieces = self.weight.detach().view(pieces, outputs // pieces, inputs)
        bias = torch.zeros(outputs) if self.bias is None else self.bias.detach()
        self.piece_bias = bias.view(pieces, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        # Of a product of many rows PyTorch gives each core a part itself.
        if rows > 128:
            return F.linear(x, self.weight, self.bias)

        pieces = self.pieces  # (pieces, out / pieces, in)
        # Every piece multiplies the same rows.
        same = x.reshape(rows, -1).expand(len(pieces), -1, -1)  # (pieces, rows, in), not copied
        if rows > 4:
            out = torch.baddbmm(self.piece_bias, same, pieces.mT)  # (pieces, rows, out / pieces)
        else:
            out = torch.baddbmm(self.piece_bias.mT, pieces, same.mT).mT
        return out.transpose(0, 1).reshape(*x.shape[:-1], -1)


def largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row (N, M) -> (N, 1), and never 0."""
    return torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True).clamp_(min=1e-12)


class Int8Linear(nn.Module):
    """A matrix as int8, with one scale for each row: the largest absolute value becomes 127.

    A quarter of the memory of fp32, and so about a quarter of the time of reading it, which is
    what generating a token costs. The rows of x become int8, too, for the product of two int8
    matrices is what processors have instructions for (VNNI, AMX): reading is faster as well.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        # A scale for each row: one large weight costs precision in its own row only.
        scale = largest(weight) / 127  # (out, 1)
        self.weight = (weight / scale).round_().to(torch.int8)  # (out, in)
        self.scale = scale.flatten()  # (out,)
        self.bias = None if linear.bias is None else linear.bias.detach()  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))  # (rows, in)
        step = largest(rows) / 127  # (rows, 1)
        digits = (rows / step).round_().to(torch.int8)
        # int8 times int8, summed in int32, is exact; the scales come afterwards.
        out = torch._int_mm(digits, self.weight.T) * step  # (rows, out)
        out *= self.scale
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """The token embedding, looked up in the rows of an int8 head."""

    def __init__(self, head: Int8Linear):
        super().__init__()
        self.head = head

    def forward(self, idx: Tensor) -> Tensor:
        return self.head.weight[idx].float() * self.head.scale[idx, None]


def speed_up(model: GPT2, precision: str) -> GPT2:
    """Swap faster modules into a model on a CPU that will not be trained, saved or exported."""
    swap = {"fp32": FewRowsLinear, "int8": Int8Linear}.get(precision)
    if swap is None:
        return model

    # A small fp32 matrix stays in the cores' caches: cutting it up costs more than it gains.
    smallest = 100_000 if precision == "fp32" else 0
    # A list, since modules are replaced while they are visited.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.weight.numel() >= smallest:
                setattr(module, name, swap(child))

    if isinstance(model.head, Int8Linear):  # one matrix does both, as before
        model.token_embedding = Int8Embedding(model.head)  # type: ignore[assignment]
    return model


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: the default run is 1.5 times as fast, GPT-2 124M 1.2 times."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: macOS, Windows
        # Freed and mapped anew for every step, large blocks cost a page fault for each 4 KB.
        libc = ctypes.CDLL("libc.so.6")
        # The numbers are those of glibc's malloc.h.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def give_back_memory() -> None:
    """Let glibc return freed memory to the system: in int8 and bf16, the weights in fp32."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ---- 12. Command line: results go to standard output, progress and notes to standard error ----


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters are written out."""
    # Not only escape, \x1b: \x9b begins commands, too, and \r lets a text hide what is before it.
    # Tab and line end stay.
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def duration(seconds: float) -> str:
    """Seconds for a person: 0:09, 12:05, 3 h 05 min, 278 days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02}"
    return f"{hours} h {minutes_left:02} min" if hours < 48 else f"{hours // 24} days"


class Notes(logging.Handler):
    """Notes on standard error, from the first process, and below them one live line.

    On a terminal, the live line is overwritten by the next. Elsewhere it is printed at first and
    then every 30 seconds, so that a log can be watched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = False  # the cursor stands behind a live line
        self.printed_at = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """Print a note, or show a live line."""
        # One process speaks, unless another one dies.
        if process_rank() > 0 and record.levelno < logging.ERROR:
            return
        text = printable(record.getMessage())
        with contextlib.suppress(OSError, ValueError):  # standard error is closed: the run goes on
            if record.name != progress.name:
                self.clear()
                print(text, file=sys.stderr, flush=True)
            elif sys.stderr.isatty():
                # A line that wraps could not be taken away again: `\r\x1b[K` clears one row.
                width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
                print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
                self.live = True
            elif time.monotonic() - self.printed_at > 30:
                print(text, file=sys.stderr, flush=True)
                self.printed_at = time.monotonic()

    def clear(self) -> None:
        """Take a live line away, before something else is printed."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.live = False


notes = Notes()


class Stop:
    """What Ctrl-C and SIGTERM do to a run: the first lets the step finish and the run save."""

    def __init__(self) -> None:
        self.signal = 0
        # Python calls `receive` between two of its own instructions, and a product of large
        # matrices is one. What must not wait, a thread does: it reads the signals' numbers.
        self.numbers, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno())
        threading.Thread(target=self.watch, daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        """Remember the signal; the run is stopped after its step."""
        self.signal = number

    def watch(self) -> None:
        """Say what the first signal does; the second ends the process at once."""
        self.numbers.recv(1)
        # Not `print`: the main thread may be inside one. The same Ctrl-C may have ended `| tee`.
        with contextlib.suppress(OSError):
            if process_rank() == 0:
                os.write(2, b"\nfinishing this step, then saving; once more to stop at once\n")
        # `timeout`, systemd and torchrun may send one request twice, to a process and to its group.
        said = time.monotonic()
        while True:
            number = self.numbers.recv(1)[0]
            if time.monotonic() - said > 1:
                os._exit(128 + number)

    @staticmethod
    def close() -> None:
        """Back to the usual: nothing needs to be finished any more."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def quoted(words: Sequence[str]) -> str:
    """Words as a command line, to be pasted."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def resume_command(out: str) -> str:
    """What goes on with a run, to be pasted: quoted, and with torchrun where that was used."""
    start = ["python", "gpt2.py"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        count = os.environ["LOCAL_WORLD_SIZE"]
        start = ["torchrun", "--standalone", f"--nproc_per_node={count}", "gpt2.py"]
    return quoted([*start, "train", "--resume", "--out", out])


def show_step(row: dict, rates: Sequence[float], seconds_left: float) -> None:
    """The line of a step: live, or as a note with a sample below it where there is one."""
    loss = "skipped" if row["train_loss"] is None else f"{row['train_loss']:.3f}"
    val_loss = f"  validation {row['val_loss']:.3f}" if row.get("val_loss") is not None else ""
    line = (
        f"step {row['step']}/{row['total_steps']}  epoch {row['epoch']}  loss {loss}{val_loss}  "
        f"{sum(rates) / len(rates):,.0f} tokens/s"
    )
    if seconds_left > 0:  # unknown at the first step
        line += f"  {duration(seconds_left)} left"

    if not row.get("sample"):
        progress.info(line)
        return
    log.info(line)
    for paragraph in filter(str.strip, row["sample"].splitlines()):
        log.info(textwrap.fill(paragraph, 74, initial_indent="    ", subsequent_indent="    "))


def training_settings(args: argparse.Namespace) -> dict:
    """The keys of CONFIG that were given, after those that --model_size stands for."""
    given = {key: value for key, value in args.given.items() if key in CONFIG}
    if not args.model_size:
        return given
    size = OPENAI_SIZES[args.model_size]
    lowest = {"min_learning_rate": size["learning_rate"] / 10}
    return {key: size[key] for key in (*SIZE_KEYS, "learning_rate")} | lowest | given


def run_train(args: argparse.Namespace) -> None:
    """Train. SystemExit 130 or 143 after Ctrl-C or SIGTERM, when the step is done and saved."""
    keep_freed_memory()
    given = training_settings(args)
    how = {"init": args.init or None, "resume": args.resume, "overwrite": args.overwrite}
    if args.auto_resume and Path(args.out, "last.pt").exists():
        how = {"resume": True}
    run = train(given, out=args.out, **how)

    stop = None
    rates: list[float] = []
    times: list[float] = []
    started = time.monotonic()
    for count, row in enumerate(run, start=1):
        stop = stop or Stop()  # before the first step, there is nothing to save

        # Means of the last twenty: single steps jump, and the first holds the start-up, too.
        rates = [*rates[-19:], row["tokens_per_second"]]
        times = [*times[-20:], time.monotonic()]
        pace = (times[-1] - times[0]) / max(1, len(times) - 1)  # seconds a step
        seconds_left = pace * (row["total_steps"] - row["step"])
        show_step(row, rates, seconds_left)

        if count == 10 and seconds_left > 86400:
            advice = "lower --epochs or the model's size, give --max_steps, or raise --stride"
            log.warning(f"time      this run takes {duration(seconds_left)}: {advice}")

        # All processes stop at the same step, whichever of them got the signal. After the last step
        # the run ends and saves anyway.
        if Machine.sum(stop.signal) and row["step"] < row["total_steps"]:
            run.close()  # which saves
            stop.close()
            log.info(f"saved step {row['step']}; go on with: {resume_command(args.out)}")
            raise SystemExit(128 + (stop.signal or signal.SIGTERM))  # 0: another process got it

    # All is saved: a signal ends at once what comes now.
    Stop.close()
    if process_rank() == 0:
        close_run(args, row, time.monotonic() - started)


def close_run(args: argparse.Namespace, row: dict, seconds: float) -> None:
    """What a person wants to know after a run, of which `row` was the last: how it went, what it
    left, what to type next."""
    folder = Path(args.out)
    state = load_checkpoint(folder / "last.pt")
    names = ("last.pt", "best.pt", "metrics.jsonl", "loss.png")
    files = ", ".join(name for name in names if (folder / name).exists())
    log.info(f"done      {state['step']:,} steps in {duration(seconds)}; {folder} holds {files}")
    if (folder / "best.pt").exists():
        when = f"after step {state['best_step']}" if state["best_step"] else "before the first step"
        log.info(f"lowest    validation {state['best_val_loss']:.3f} {when}: that model is best.pt")
        if "val_loss" not in row:  # max_steps was no multiple of eval_every
            log.info(f"          step {row['step']} was not measured: last.pt may be better")

    model = find_model(folder)
    prompt: list[str] = []
    file = find_files(state["config"]["data"])[0]
    first = next(read_records(file)) if file.suffix.lower() in RECORD_FORMATS else ""

    if isinstance(first, Example):
        # What `eval` would say of this model, with the settings of the run.
        config = state["config"]
        machine = ["--device", config["device"], "--precision", config["precision"]]
        data = config["val_data"] or config["data"]
        run_eval(parse(["eval", "--model", str(model), "--data", data, *machine]))

        # The first prompt is a good one to try. --instruct puts an instruction into its layout
        # again; `--` lets a prompt begin with a dash.
        asked = instruction_of(first.prompt)
        text, given = asked or (first.prompt, "")
        prompt = ["--instruct", f"--input={given}"] if asked else []
        prompt += ["--", text] if text.startswith("-") else [text]

    words = ["python", "gpt2.py", "generate", "--model", str(model), *prompt]
    log.info(f"next      {quoted(words)}")


def checkpoint_of(model: str | Path) -> dict:
    """What a checkpoint holds; nothing for a model in another format."""
    path = find_model(model)
    with contextlib.suppress(BadFile):
        if path and path.is_file():
            return load_checkpoint(path)
    return {}


def load_for_use(args: argparse.Namespace) -> GPT2:
    """The model of a command that does not train. On a CPU in fp32, unless asked otherwise: so
    that a text is the same on every CPU."""
    device, precision = pick_device(args.device), args.precision
    if precision == "auto" and device.type == "cpu":
        precision = "fp32"
    if precision != "int8":
        precision = pick_precision(precision, device)
    elif device.type != "cpu" or not hasattr(torch, "_int_mm"):
        raise ValueError("precision int8 is for CPUs: give bf16")

    model = GPT2.from_pretrained(args.model)
    if model.config["vocab_size"] < CONFIG["vocab_size"]:
        raise ValueError(f"{args.model} has a vocabulary smaller than GPT-2's 50257 tokens")
    model.to(device, PRECISIONS.get(precision))  # int8 is left to speed_up
    if device.type == "cpu":
        model = speed_up(model, precision)
        give_back_memory()
    return model


class Reply:
    """What a model writes after a prompt, decoded as tokens come: whole characters only, and
    nothing that may yet turn out to be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.shown = 0  # characters of the text
        self.tokens = 0
        self.ended = ""  # "end", "stop", or in the end "length"

    def add(self, token: int) -> None:
        """Take the next token, unless the reply has ended."""
        tokenizer = load_tokenizer()
        if self.ended or token == tokenizer.eot_token:
            self.ended = self.ended or "end"
            return
        self.tokens += 1
        if token < tokenizer.eot_token:  # a padded vocabulary has tokens beyond
            self.text += self.decoder.decode(tokenizer.decode_single_token_bytes(token))
        # A stop text may begin in one token and end in another: search the text, not the token.
        if found := [at for at in map(self.text.find, self.stops) if at >= 0]:
            self.text = self.text[: min(found)]
            self.ended = "stop"

    def finish(self) -> None:
        """No token comes any more."""
        if self.ended != "stop":
            self.text += self.decoder.decode(b"", final=True)
        self.ended = self.ended or "length"

    def news(self) -> str:
        """What is certain and was not shown yet: a stop text may have begun in the tail."""
        tail = 0 if self.ended else max(map(len, self.stops), default=1) - 1
        begin, self.shown = self.shown, max(self.shown, len(self.text) - tail)
        return self.text[begin : self.shown]


def read_prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts of a command line: words, a file of prompts, or standard input."""
    if args.prompts:
        path = Path(args.prompts)
        lines = sys.stdin.read() if args.prompts == "-" else "".join(read_text(path))
        # Not `splitlines`, which also cuts at characters that may stand inside a prompt.
        for number, line in enumerate(filter(str.strip, lines.split("\n")), start=1):
            if line.lstrip().startswith("{"):
                try:
                    yield text_of(json.loads(line), "prompt")
                except (ValueError, RecursionError) as error:
                    raise BadFile(f"{args.prompts}, prompt {number}: {error}") from error
            else:
                yield line.removesuffix("\r")
    elif args.prompt == ["-"] or (not args.prompt and is_piped(sys.stdin)):
        text = sys.stdin.read()
        # A shell ends what it pipes with a line end; Alpaca's frame has one of its own.
        yield text if text.endswith("### Response:\n") else text.removesuffix("\n")
    else:
        yield " ".join(args.prompt) if args.prompt else "I HAD always thought"


def is_piped(stream: IO[str]) -> bool:
    """Whether a pipe or a file stands behind this stream."""
    # Not isatty: a service's standard input is no terminal, and reading it could take for ever.
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def sampling_options(args: argparse.Namespace) -> dict:
    """How tokens are chosen: greedily, unless drawing was asked for in one way or another."""
    draws = args.do_sample or args.given.keys() & {"temperature", "top_k", "top_p"}
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    check_sampling(**options)
    check_value("seed", args.seed)
    if "" in args.stop:
        raise ValueError("stop is an empty text: give some characters")
    if args.input and not args.instruct:
        raise ValueError("input belongs to an instruction: give --instruct, too")

    for name, most in (("max_tokens", 10**9), ("num_samples", 10**4)):
        if not 1 <= vars(args)[name] <= most:
            raise ValueError(f"{name} is {vars(args)[name]}; it must be from 1 to {most}")

    if draws and args.temperature > 0:
        return options
    if args.num_samples > 1:
        log.info("without drawing, all samples are the same: give --do_sample")
    return {"temperature": 0.0}


def run_generate(args: argparse.Namespace) -> None:
    """Print what a model writes after each prompt."""
    options = sampling_options(args)
    if args.prompts and args.prompt:
        raise ValueError("prompts of a file and a prompt of your own exclude each other")
    prompts = list(read_prompts(args))
    if not prompts:
        raise BadFile(f"{args.prompts} holds no prompts")
    model = load_for_use(args)

    if options["temperature"] > 0:
        # Another text each time, and the seed is said: so that a good one can be had again.
        seed = args.given.get("seed", random.randrange(10**6))
        log.info(f"seed      {seed}")
        device = next(model.parameters()).device
        options["generator"] = torch.Generator(device).manual_seed(seed)

    for prompt in prompts:
        answer(model, prompt, args, options)


def prompt_tokens(model: GPT2, text: str) -> Tensor:
    """A prompt as tokens (1, T), with notes on what a person may not expect."""
    tokenizer = load_tokenizer()
    ids = text_to_token_ids(check_white_space(text, "the prompt"), tokenizer)
    context = model.config["context_length"]
    if ids.size(1) > context:
        log.info(f"of {ids.size(1)} tokens, only the last {context} are seen")
    if text.endswith(" "):
        log.info("the prompt ends with a space; GPT-2's tokens begin with one: better leave it out")
    return ids if ids.numel() else torch.tensor([[tokenizer.eot_token]])


def write_out(text: str) -> None:
    """Print text at once. A file gets what the model wrote; a terminal is protected from it."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def answer(model: GPT2, prompt: str, args: argparse.Namespace, options: dict) -> None:
    """Print the samples of one prompt: one as it is made, several when they are done."""
    text = instruction_prompt(prompt, args.input) if args.instruct else prompt
    ids = prompt_tokens(model, text)
    replies = [Reply(args.stop) for _ in range(args.num_samples)]
    # An instruction is answered, any other prompt is continued.
    before = "" if args.instruct or args.only_new else prompt
    streams = len(replies) == 1 and not args.json

    def on_token(new: Tensor) -> bool:
        """Show what a column of new tokens (B, 1) adds; True ends the generation."""
        for reply, token in zip(replies, new.flatten().tolist(), strict=True):
            reply.add(token)
        if streams:
            write_out(replies[0].news())
        else:
            progress.info(f"tokens so far: {max(reply.tokens for reply in replies)}")
        return all(reply.ended for reply in replies)

    # A streamed prompt is seen at once, while the model still reads it.
    if streams:
        write_out(before)
    started = time.perf_counter()
    rows = ids.expand(len(replies), -1)
    end = load_tokenizer().eot_token
    generate(model, rows, args.max_tokens, eos_id=end, on_token=on_token, **options)
    seconds = time.perf_counter() - started

    notes.clear()
    for i, reply in enumerate(replies, start=1):
        reply.finish()
        if args.json:
            row = {"prompt": prompt, "text": reply.text, "tokens": reply.tokens}
            write_out(json.dumps(row | {"seconds": round(seconds, 3), "ended": reply.ended}) + "\n")
        elif streams:
            write_out(reply.news() + "\n")
        else:
            write_out(f"--- sample {i} of {len(replies)} ---\n{before}{reply.text}\n")
    count = sum(reply.tokens for reply in replies)
    log.info(f"{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s")


def data_to_measure(args: argparse.Namespace, context_length: int) -> tuple[Corpus, list[str]]:
    """The data set that `eval` measures, and the labels that the model was trained on.

    Of the file that a checkpoint was trained on, it is the part that was held back.
    """
    # A checkpoint knows its data by the bytes: a copy under another name is the same data.
    files = find_files(args.data)
    checkpoint = checkpoint_of(args.model)
    labels = checkpoint.get("labels", [])

    # With val_data, nothing of `data` was held back: all of it was trained on.
    trained = CONFIG | checkpoint.get("config", {})
    held_back = checkpoint and not args.all and not trained["val_data"]
    if held_back and checkpoint.get("data_sha256") == fingerprint(files):
        config = check_config(trained | {"data": args.data})
        train_set, val_set = load_data(config)
        part = "the part held back" if val_set else "all of it"
        log.info(f"data      the model was trained on this: measuring {part}")
        return val_set or train_set, labels
    dataset = evaluation_set(read_data(args.data), context_length, args.data)
    log.info(f"data      {args.data}: {dataset.size()}")
    return dataset, labels


def run_eval(args: argparse.Namespace) -> None:
    """Print loss, perplexity and what else can be said of the data."""
    check_value("stride", args.stride)
    find_files(args.data)  # before a model is loaded
    model = load_for_use(args)
    context = model.config["context_length"]
    dataset, labels = data_to_measure(args, context)
    # Half a context overlaps: only at the beginning has a token fewer than that to be judged by.
    loss = evaluate(model, scoring_batches(dataset, args.stride or max(1, context // 2)))
    report = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    report |= dataset.figures(model, loss, labels)

    notes.clear()
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
        print(f"{name:<20}{shown:>14}")


def run_export(args: argparse.Namespace) -> None:
    """Write a model as a folder in Hugging Face format."""
    GPT2.from_pretrained(args.model).save_pretrained(args.folder)


def run_tokenize(args: argparse.Namespace) -> None:
    """Write the tokens of texts into one file, which `train --data` maps."""
    *names, out = args.paths
    if not names or Path(out).suffix != ".bin":
        raise ValueError(f"give texts, then the file to write: {out} does not end in .bin")
    files = [path for name in names for path in find_files(name)]
    write_file(Path(out), lambda file: tokenize(files, file))
    log.info(f"wrote {out}: {Path(out).stat().st_size // 2:,} tokens")


def run_info(args: argparse.Namespace) -> None:
    """Say what a model is: its size, and how it came to be."""
    path, checkpoint = find_model(args.model), checkpoint_of(args.model)
    # What OpenAI's names stand for is known without a download.
    config = OPENAI_SIZES[args.model] if path is None else GPT2.from_pretrained(path).config
    with shapes_only():
        count = GPT2(config).num_parameters()

    rows: dict[str, Any] = {"model": path or f"{args.model} of OpenAI", "parameters": f"{count:,}"}
    rows |= {key: config[key] for key in MODEL_KEYS}
    if "step" in checkpoint:
        trained = checkpoint["config"]
        rows |= {"step": checkpoint["step"], "tokens_seen": f"{checkpoint['tokens_seen']:,}"}
        rows |= {key: trained[key] for key in ("data", "learning_rate", "precision", "seed")}
        if checkpoint["best_val_loss"] < math.inf:
            rows["lowest validation"] = f"{checkpoint['best_val_loss']:.4f}"
        rows["version"] = checkpoint.get("version", "1")

    for name, value in rows.items():
        print(f"{name:<20}{printable(str(value))}")


# The table of options: a group, and in it each option with its meaning. What is not a key of CONFIG
# has its default in DEFAULTS.

OPTIONS = {
    "model": {
        "model": "a checkpoint, a run's folder, a Hugging Face folder, or a name of OpenAI's",
        "model_size": "a size of OpenAI's, with a learning rate for it",
        "init": "a model to start from, trained gently",
        "vocab_size": "tokens in the vocabulary, at least GPT-2's 50257",
        "context_length": "tokens that the model sees at once",
        "emb_dim": "width of a token's vector, a multiple of n_heads",
        "n_heads": "attention heads in a block",
        "n_layers": "blocks",
        "dropout_rate": "share of values dropped while training",
        "qkv_bias": "biases for queries, keys and values",
    },
    "data": {
        "data": "texts, a .bin of tokens, examples (.jsonl, .json, .csv, .tsv), or a folder",
        "val_data": "validate on this file instead of a part of --data",
        "val_fraction": "share held back to validate",
        "max_val_tokens": "hold back no more tokens of a text than this",
        "stride": "tokens from one window to the next; 0: half the context",
        "all": "measure all of a file, trained on or not",
    },
    "run": {
        "out": "folder for what the run leaves",
        "resume": "continue the run in --out exactly",
        "auto_resume": "continue the run in --out if there is one",
        "overwrite": "replace the run in --out",
        "batch_size": "windows or examples at once, in each process",
        "grad_accumulation": "batches that make one optimizer step",
        "epochs": "times through the data; 0.5 is half of it",
        "schedule_steps": "length of the run in optimizer steps, instead of --epochs",
        "max_steps": "stop early, after so many steps of the run; 0: at its end",
        "learning_rate": "the highest learning rate; --lr is short for it",
        "min_learning_rate": "the last learning rate",
        "warmup_steps": "steps up to the highest learning rate, at most a quarter of all",
        "weight_decay": "AdamW's pull of matrices towards zero",
        "grad_clip": "longest gradient; 0: any length",
        "eval_every": "steps between measurements; 0: an epoch, but 10 to 50 times a run",
        "checkpoint_every": "steps between saves; 0: as above",
        "patience": "stop after so many measurements without a lower one; 0: never",
        "sample_prompt": "what samples continue, instead of the beginning of the data",
    },
    "text": {
        "max_tokens": "most tokens to write",
        "do_sample": "draw tokens; the next three options imply it",
        "temperature": "of drawing: below 1 safer, above 1 wilder; 0: greedy",
        "top_k": "draw from so many most probable tokens",
        "top_p": "draw from the fewest tokens that reach this probability",
        "num_samples": "texts for each prompt, computed together",
        "stop": "end before this text; may be given several times",
        "prompts": "a file with a prompt, or a JSON object with one, on each line",
        "instruct": "the prompt is an instruction: print only the response",
        "input": "with --instruct, the input of the instruction",
        "only_new": "print the text without its prompt",
    },
    "machine": {
        "seed": "where all random numbers start (default: 42; to generate, a new one each time)",
        "device": "auto, cpu, cuda, mps or xpu",
        "precision": "auto, fp32, bf16 or fp16; for generate and eval also int8",
        "compile": "train through torch.compile",
        "json": "print JSON objects",
    },
}
DEFAULTS: dict[str, Any] = {
    **CONFIG,
    **dict.fromkeys(("resume", "auto_resume", "overwrite", "all", "json"), False),
    **dict.fromkeys(("do_sample", "instruct", "only_new"), False),
    **dict.fromkeys(("model_size", "init", "prompts", "input"), ""),
    "model": "checkpoints/last.pt",
    "out": "checkpoints",
    "max_tokens": 100,
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "num_samples": 1,
    "stop": [],
}
ARGPARSE_DETAILS: dict[str, dict] = {  # what argparse is to know beside type and default
    "data": {"nargs": "+", "action": "extend", "metavar": "FILE", "type": str},
    "model_size": {"choices": list(OPENAI_SIZES), "type": str},
    "top_k": {"type": int, "metavar": "INT"},
    "top_p": {"type": float, "metavar": "FLOAT"},
    "stop": {"action": "append", "metavar": "TEXT"},
}

TRAIN_OPTIONS = ("model_size", "init", "out", "resume", "auto_resume", "overwrite", *CONFIG)
TEXT_OPTIONS = ("model", *OPTIONS["text"], "seed", "device", "precision", "json")
EVAL_OPTIONS = ("model", "data", "stride", "all", "device", "precision", "json")


class Command(NamedTuple):
    """A command: its function, what it does, its positional argument and how many, its options."""

    run: Callable[[argparse.Namespace], None]
    meaning: str
    positional: str
    number: str | None
    options: Sequence[str]


COMMANDS = {
    "train": Command(run_train, "train or fine-tune a model", "files", "*", TRAIN_OPTIONS),
    "generate": Command(run_generate, "continue a text", "prompt", "*", TEXT_OPTIONS),
    "eval": Command(run_eval, "measure a model", "files", "*", EVAL_OPTIONS),
    "export": Command(run_export, "write a folder for other programs", "folder", None, ("model",)),
    "tokenize": Command(run_tokenize, "write the tokens of texts into one file", "paths", "+", ()),
    "info": Command(run_info, "say what a model is", "model", None, ()),
}
POSITIONALS = {
    "files": "the same as --data",
    "paths": "texts, then the .bin file to write",
    "prompt": "the text to continue; - is standard input",
    "folder": "where to write it",
    "model": OPTIONS["model"]["model"],
}


class HelpFormatter(argparse.HelpFormatter):
    """Help whose words are not broken at hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, printable(f"{self.prog}: error: {' '.join(message.split())}") + "\n")


def add_option(group: Any, key: str, meaning: str) -> None:
    """Add an option to a group of a parser. Only what is given will be in the result."""
    default = DEFAULTS[key]
    if key in ARGPARSE_DETAILS:
        how = ARGPARSE_DETAILS[key]
    elif isinstance(default, bool):  # what a run stores can also be switched off again
        how = {"action": argparse.BooleanOptionalAction if key in CONFIG else "store_true"}
    else:
        how = {"type": type(default), "metavar": type(default).__name__.upper()}
    names = [f"--{key}", "--lr"] if key == "learning_rate" else [f"--{key}"]
    # `is not`: a default of 0 equals False, and is to be shown.
    if default not in ("", None, []) and default is not False and "default" not in meaning:
        meaning += f" (default: {default})"
    group.add_argument(*names, default=argparse.SUPPRESS, help=meaning, **how)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="gpt2.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"gpt2.py {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.meaning,
            description=command.meaning,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        about = POSITIONALS[command.positional]
        subparser.add_argument(command.positional, nargs=command.number, help=about)
        for title, group in OPTIONS.items():
            section = subparser.add_argument_group(title)
            for key in (key for key in group if key in command.options):
                add_option(section, key, group[key])
    return parser


def hint(typed: str, options: Sequence[str]) -> str:
    """What was probably meant by an option that a command does not have."""
    name = typed.lstrip("-").partition("=")[0]
    longer = [option for option in options if name and option.startswith(name)]
    near = longer or difflib.get_close_matches(name, options, cutoff=0.75)
    return f"; did you mean --{near[0]}?" if near else ""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command with their defaults; those that were given are in `.given`."""
    # --learning-rate is --learning_rate; argparse itself makes --no-compile. A word with a space,
    # or after a bare --, is a prompt and stays as it is.
    option = re.compile(r"^(--(?:no-)?)([\w-]+)(?==|$)")
    options = itertools.takewhile("--".__ne__, words)
    typed = [option.sub(lambda name: name[1] + name[2].replace("-", "_"), word) for word in options]
    words = [*typed, *words[len(typed) :]]

    # Only what was given is there: a resumed run must tell a default from a wish.
    parser = make_parser()
    known, unknown = parser.parse_known_args(words)
    given = vars(known)
    if unknown:
        advice = hint(unknown[0], COMMANDS[known.command].options)
        parser.error(f"{known.command} does not know {unknown[0]}{advice}")
    if given["command"] in ("train", "eval") and (files := given["files"] + given.get("data", [])):
        if len(files) > 1 and (
            odd := [file for file in files if "," in file and Path(file).exists()]
        ):
            parser.error(f"{odd[0]}: give a file whose name has a comma alone, or in a folder")
        given["data"] = ",".join(files)
    return argparse.Namespace(**DEFAULTS | given, given=given)


# Errors that need not be bugs of this program; any other is a traceback at once.
EXPECTED = (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError)


def what_went_wrong(error: Exception) -> str | None:
    """One line for a person, about an error that is not a bug of this program; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # a stream has no file name
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if type(error).__module__.startswith("requests"):  # with which tiktoken downloads
        advice = "copy the folder .tiktoken, which came with gpt2.py, beside it"
        return f"GPT-2's vocabulary is not here, and cannot be downloaded: {advice}"
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)):
        return text
    # PyTorch has no exception class for this on a CPU: its text is all there is.
    if isinstance(error, MemoryError) or re.search("out of memory|n't allocate memory", text):
        return "out of memory: lower batch_size, context_length, emb_dim or num_samples"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: leave --compile out, or mend this: {text:.200}"
    return None


def give_up_output() -> None:
    """Let what is still to be printed go nowhere: nobody reads it, or the disk is full."""
    # Python flushes standard output once more when it ends: it would fail again, and say so.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0; 2 after a line that says what is wrong; 130 to 143 stopped."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        print((__doc__ or "").partition("\n\nPart one")[0])
        return 0

    args = parse(words)
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return 0
    # Statuses as the shell gives them: 128 + the number of the signal.
    # (BrokenPipeError is an OSError, too: it must come before EXPECTED.)
    except BrokenPipeError:  # as `| head -1` does
        give_up_output()
        return 141
    except KeyboardInterrupt:
        notes.clear()
        if sys.stderr.isatty():  # the terminal shows ^C: its prompt belongs on a new line
            print(file=sys.stderr)
        return 130
    except EXPECTED as error:
        message = what_went_wrong(error)
        if message is None:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

    # The message first: output that still waits in the buffer may fail again, as on a full disk.
    log.error(f"gpt2.py {args.command}: error: {message}")
    try:
        sys.stdout.flush()
    except OSError:
        give_up_output()
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, a closed stream is None
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # Whatever the locale: Windows' encodings, and C's, lack most characters that GPT-2 can write.
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    sys.exit(main())
