"""The tests of gpt2.py, in its order: one class a section, with its name.

    python -m pytest -q                         all of them, without a network
    python -m pytest -q -k TestTraining         one section; "not notebook": not the longest test
    GPT2_LONG_TESTS=1 python -m pytest -q       also kills, signals, a terminal, a full disk
    GPT2_REAL_WEIGHTS=1 python -m pytest -q     also OpenAI's 124M, which needs a network

Models are tiny and random: a test says whether the program does what it claims, not whether a model
is good.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # threads only wait at this size; and every sum has one order

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import fmean as mean
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
import torch
from torch import nn

import gpt2

approx = pytest.approx
cases = pytest.mark.parametrize
read = gpt2.GPT2.from_pretrained
pytestmark = pytest.mark.filterwarnings("error")  # nothing here may warn
long_test = pytest.mark.skipif(not os.environ.get("GPT2_LONG_TESTS"), reason="GPT2_LONG_TESTS=1")

HERE = Path(__file__).resolve().parent
VERDICT = (HERE / "the-verdict.txt").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
END = 50256  # <|endoftext|>
VOCABULARY = {  # OpenAI's files, under the names that `transformers` gives them
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
TINY = {"vocab_size": 61, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2}
TINY |= {"dropout_rate": 0.0, "qkv_bias": True}
SMALL = TINY | {"vocab_size": 50257, "emb_dim": 8, "n_heads": 2, "n_layers": 1}  # GPT-2's tokens


# ---- Fixtures ----


@pytest.fixture(autouse=True)
def clean_process():
    """The command line changes its process: signals, log handlers. Put them back after a test.
    Notes are on, as there."""
    torch.manual_seed(0)
    gpt2.log.setLevel(logging.INFO)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    gpt2.log.handlers.clear()


@pytest.fixture
def cli(capfd, monkeypatch, tmp_path):
    """gpt2.py as a function in an empty folder: cli("eval", "--stride", 3) -> .code, .out, .err."""

    def call(*arguments):
        capfd.readouterr()
        gpt2.log.handlers.clear()
        try:
            code = gpt2.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's tokenizer."""
    return gpt2.load_tokenizer()


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A short run of two epochs. The text comes twice, so that its held-back end can be learnt."""
    path = write(tmp_path_factory.mktemp("text") / "short.txt", VERDICT[:400] * 2)
    given = {"data": str(path), "batch_size": 3, "grad_accumulation": 2, "epochs": 2.0}
    given |= {"learning_rate": 1e-3, "warmup_steps": 2, "dropout_rate": 0.1, "precision": "fp32"}
    return SMALL | given


@pytest.fixture(scope="session")
def whole(tmp_path_factory, config):
    """The folder of a run that nothing disturbed; in it folders 1, 2, … as each step left it."""
    folder = tmp_path_factory.mktemp("whole")
    for row in gpt2.train(config | {"checkpoint_every": 1}, out=folder):
        kept = shutil.ignore_patterns(*map(str, range(row["step"])))  # the folders before this one
        shutil.copytree(folder, folder / str(row["step"]), ignore=kept)
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """A file of 15 examples with two labels and prompts of several lengths."""
    rows = [{"prompt": f"{'very ' * (i % 4)}good {i}", "completion": " ham"} for i in range(8)]
    rows += [{"prompt": f"win {i}" * (i % 3), "completion": " spam!"} for i in range(7)]
    return write_lines(tmp_path_factory.mktemp("examples") / "examples.jsonl", *rows)


# ---- Helpers ----


def write(path, content):
    """Write a file of text or of bytes, in a new folder if need be, and return its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(path, *entries):
    """Write a file with a JSON object on each line, and return its path."""
    return write(path, "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))


def start(*arguments, seconds=300, **options):
    """gpt2.py as a process of its own, killed in the end: no test waits for ever."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, HERE / "gpt2.py", *map(str, arguments)]
    process = subprocess.Popen(command, text=True, **pipes | options)
    watch = threading.Timer(seconds, process.kill)
    watch.daemon = True
    watch.start()
    return process


def calling(function, *given):
    """The command line of a Python that calls a function of this file with these words."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_gpt2; "
    code += f"test_gpt2.{function.__name__}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *given]


def refused(cause, call, error=ValueError):
    """The call raises this error, and its message names the cause (a regular expression)."""
    with pytest.raises(error) as caught:
        call()
    assert re.search(cause, str(caught.value), re.DOTALL), str(caught.value)


def raising(error):
    """A function that raises this error, whatever it is called with."""

    def fail(*arguments, **named):
        raise error

    return fail


def at_call(k, act, function):
    """`function`, but before its k-th call comes `act`."""
    calls = itertools.count(1)

    def wrapped(*arguments, **named):
        if next(calls) == k:
            act()
        return function(*arguments, **named)

    return wrapped


def before_step(monkeypatch, k, act):
    """`act` comes before the k-th step that is trained from here on."""
    monkeypatch.setattr(gpt2, "learning_rate_at", at_call(k, act, gpt2.learning_rate_at))


def lively(config, scale=0.3, seed=0):
    """A model whose logits differ by more than rounding; those of an untrained one hardly do."""
    torch.manual_seed(seed)
    model = gpt2.GPT2(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model


def some_ids(*shape, vocab=61, seed=1):
    """Random token ids of this shape."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def save_model(model, path):
    """Save a model as a checkpoint without a run, and return its path."""
    gpt2.save_checkpoint(path, {"config": model.config, "model": model.state_dict()})
    return path


def speaking(path, tokens, after=1):
    """Save a real model that says these tokens after a prompt of `after` tokens: only positions
    decide what it says. Its vocabulary is padded, as many are."""
    size = {"vocab_size": 50304, "context_length": after + len(tokens) + 9, "emb_dim": 32}
    model = gpt2.GPT2(SMALL | size)
    kinds = sorted(set(tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        for i, token in enumerate(kinds):
            model.token_embedding.weight[token, i] = 1.0
        for t, token in enumerate(tokens):
            model.position_embedding.weight[after - 1 + t, kinds.index(token)] = 100.0
    return save_model(model, path)


def same(a, b):
    """Whether two nests of dicts, lists, tensors and values are equal bit for bit, and in type."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def numbers(rows, *without):
    """The rows of a run without what may differ between equal runs."""
    dropped = {"tokens_per_second", "sample", "total_steps", "model", *without}
    return [{key: value for key, value in row.items() if key not in dropped} for row in rows]


def assert_close(rows, reference):
    """Two runs have the same rows up to rounding."""
    for row, expected in zip(numbers(rows), numbers(reference), strict=True):
        assert row == approx(expected, rel=1e-4)


def metrics_of(folder):
    """The rows of a folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def left_in(folder):
    """What a run has left in its folder, beside the tokens of its data."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("tokens-"))


def sha256(path):
    """The digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path):
    """A checkpoint, in memory of its own."""
    return gpt2.load_checkpoint(path, mmap=False)


def assert_same_run(folder, reference):
    """Two folders hold the same metrics, weights and moments, and the same best weights."""
    assert numbers(metrics_of(folder)) == numbers(metrics_of(reference))
    for name in ("last.pt", "best.pt"):
        ours, theirs = load(folder / name), load(reference / name)
        for key in ("step", "tokens_seen", "model", "optimizer"):
            assert same(ours.get(key), theirs.get(key)), (name, key)


def words(config):
    """A config as words of the command line."""
    return [
        f"--{'' if value else 'no-'}{key}" if type(value) is bool else f"--{key}={value}"
        for key, value in config.items()
    ]


# ---- One independent reference: GPT-2 with loops, in float64, under OpenAI's names ----


def openai_weights(model):
    """The model's weights under the names of OpenAI's file, whose matrices are input × output."""
    ours, theirs = model.state_dict(), {}
    names = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    parts = {"ln_1": "norm1", "attn.c_attn": "attention.query_key_value"}
    parts |= {"attn.c_proj": "attention.projection", "ln_2": "norm2"}
    parts |= {"mlp.c_fc": "feed_forward.expand", "mlp.c_proj": "feed_forward.projection"}
    for i in range(model.config["n_layers"]):
        names |= {f"h.{i}.{their}": f"blocks.{i}.{our}" for their, our in parts.items()}
    for their, our in names.items():
        weight = ours[f"{our}.weight"]
        matrix = weight.dim() == 2 and their.startswith("h.")
        theirs[f"{their}.weight"] = weight.t().contiguous() if matrix else weight
        if their not in ("wte", "wpe"):
            theirs[f"{their}.bias"] = ours.get(f"{our}.bias", weight.new_zeros(len(weight)))
    return theirs


def reference_logits(weights, n_heads, ids):
    """GPT-2 as the paper tells it: T token ids -> logits (T, V)."""

    def norm(x, name):
        mean = sum(x.tolist()) / width
        variance = sum((value - mean) ** 2 for value in x.tolist()) / width
        return (x - mean) / math.sqrt(variance + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def dense(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu(v):
        return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    w = {name: tensor.double() for name, tensor in weights.items()}
    width = w["wte.weight"].size(1)
    size = width // n_heads
    stream = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(ids)]

    for block in (f"h.{i}." for i in range(99) if f"h.{i}.ln_1.weight" in w):
        parts = [dense(norm(x, block + "ln_1"), block + "attn.c_attn").split(width) for x in stream]
        for t, x in enumerate(stream):
            outputs = []
            for head in (slice(h * size, (h + 1) * size) for h in range(n_heads)):
                query, seen = parts[t][0][head] / math.sqrt(size), parts[: t + 1]
                scores = [(query @ key[head]).item() for _, key, _ in seen]
                shares = [math.exp(score - max(scores)) for score in scores]
                taken = [share * seen[s][2][head] for s, share in enumerate(shares)]
                outputs.append(sum(taken) / sum(shares))
            stream[t] = x + dense(torch.cat(outputs), block + "attn.c_proj")
        for t, x in enumerate(stream):
            hidden = dense(norm(x, block + "ln_2"), block + "mlp.c_fc")
            bent = torch.tensor([gelu(v) for v in hidden.tolist()], dtype=torch.float64)
            stream[t] = x + dense(bent, block + "mlp.c_proj")

    return torch.stack([w["wte.weight"] @ norm(x, "ln_f") for x in stream])


# ==== Part one ====


class Stub(nn.Module):
    """Stands in for a GPT2: a function makes its logits (B, V) of the ids (B, T) that it reads."""

    def __init__(self, logits_of, context=8):
        super().__init__()
        self.config = {"context_length": context}
        self.logits_of = logits_of
        self.blocks = nn.ModuleList()
        self.anchor = nn.Parameter(torch.zeros(1))  # says on which device the model is
        self.read = []  # what each call was given

    def forward(self, idx, cache=None, last_only=False):
        self.read.append(idx.tolist())
        return self.logits_of(idx)[:, None]


def successor(ids):
    """Logits (B, 30) of the rule "after token t comes t + 1"."""
    return nn.functional.one_hot(ids[:, -1] + 1, 30).float()


def seeded(seed):
    """A generator of random numbers that begins at this seed."""
    return torch.Generator().manual_seed(seed)


class TestAttention:
    @cases("causal", [False, True])
    def test_one_head_is_the_formula(self, causal):
        head = gpt2.CausalAttention(6, 4, 7, 0.0) if causal else gpt2.SelfAttention(6, 4)
        x = torch.randn(2, 5, 6)
        q, k, v = (layer(x) for layer in (head.query, head.key, head.value))

        shares = (q @ k.mT / math.sqrt(4)).exp()
        shares = shares.tril() if causal else shares
        weights = shares / shares.sum(dim=-1, keepdim=True)
        assert torch.allclose(head.weights(x), weights, atol=1e-6)
        assert torch.allclose(head(x), weights @ v, atol=1e-6)

    @cases("bias", [False, True])
    def test_queries_keys_and_values_have_biases_where_qkv_bias_says_so(self, bias):
        given = {"qkv_bias": True} if bias else {}  # where nothing is said, there are none
        heads = gpt2.SelfAttention(6, 4, **given), gpt2.CausalAttention(6, 4, 7, 0.0, **given)
        for head in heads:
            layers = (head.query, head.key, head.value)
            assert [layer.bias is not None for layer in layers] == [bias] * 3

    def test_dropout_drops_links_and_then_outputs_while_training(self):
        """With a single token a head has one link, dropped or doubled, and so is each output."""
        many = gpt2.MultiHeadAttention(TINY | {"dropout_rate": 0.5})
        nn.init.eye_(many.projection.weight)
        nn.init.zeros_(many.projection.bias)
        x = torch.randn(500, 1, 12)
        ratio = (many(x) / many.eval()(x)).detach().round(decimals=2)
        assert ratio.unique().tolist() == [0, 4]

        # Half of the heads keep their link; of those, one in 2⁴ loses all four outputs.
        alive = (ratio > 0).view(500, 3, 4).any(dim=-1).float().mean()
        assert alive.item() == approx(0.5 * 15 / 16, abs=0.05)


class TestBlock:
    def test_the_norm_to_read_is_pytorchs(self):
        """Also for a vector of equal numbers, whose variance is 0."""
        norm, theirs = gpt2.LayerNorm(12), nn.LayerNorm(12, eps=1e-5)
        norm.weight.data, norm.bias.data = theirs.weight.data, theirs.bias.data = torch.randn(2, 12)
        x = torch.cat([3 * torch.randn(2, 5, 12) + 1, torch.ones(2, 1, 12)], dim=1)
        torch.testing.assert_close(norm(x), theirs(x))

    def test_feed_forward_dropout_drops_its_output_while_training(self):
        layer, x = gpt2.FeedForward(TINY | {"dropout_rate": 0.5}), torch.randn(50, 12)
        ratio = (layer(x) / layer.eval()(x)).detach().round(decimals=3)
        assert ratio.unique().tolist() == [0, 2]


class TestModel:
    @cases("scale", [1e-3, 0.02, 1.0, 3.0])
    @cases("heads, bias", [(1, True), (2, False), (3, True), (6, False)])
    def test_it_is_the_reference_over_heads_bias_and_lengths(self, heads, bias, scale):
        """Small weights show the norms' epsilon, and large ones the form of GELU."""
        model = lively(TINY | {"n_heads": heads, "qkv_bias": bias, "n_layers": 3}, scale).double()
        weights = openai_weights(model)
        for length in (1, 2, 5, 8):
            idx = some_ids(2, length, seed=length)
            expected = torch.stack([reference_logits(weights, heads, row) for row in idx])
            near = {"rtol": 1e-8, "atol": 1e-9 * scale}
            assert torch.allclose(model(idx), expected, **near)
            assert torch.allclose(model(idx, last_only=True), expected[:, -1:], **near)

    @cases("chunks", [[1] * 8, [3, 1, 4], [5, 3], [6, 2], [1, 7], [8]])
    def test_read_in_pieces_with_a_cache_it_is_the_reference(self, chunks):
        model, idx = lively(TINY), some_ids(3, 8)
        weights = openai_weights(model)
        expected = torch.stack([reference_logits(weights, 3, row) for row in idx])

        cache = [gpt2.KeyValueCache(8) for _ in model.blocks]
        logits = torch.cat([model(part, cache) for part in idx.split(chunks, dim=1)], dim=1)
        assert torch.allclose(logits.double(), expected, atol=1e-4)
        refused("9.*8", lambda: model(idx[:, :1], cache))  # the cache is full

    @cases("bias, count", [(True, 4620), (False, 4620 - 2 * 3 * 12)])
    def test_the_head_is_the_token_embedding_and_counts_once(self, bias, count):
        model = gpt2.GPT2(TINY | {"qkv_bias": bias})
        assert model.head.weight is model.token_embedding.weight
        assert model.num_parameters() == count

        # So a step of training moves both, and the rows of tokens that were only scored, too.
        model(some_ids(1, 8)).square().sum().backward()
        assert (model.token_embedding.weight.grad != 0).any(dim=-1).all()

    def test_embedding_dropout_acts_on_the_sum_of_token_and_position(self):
        model, streams = lively(TINY | {"dropout_rate": 0.5, "n_layers": 1}), []
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
        model.train()(some_ids(8, 8))
        model.eval()(some_ids(8, 8))
        ratio = (streams[0] / streams[1]).detach().round(decimals=3)
        assert ratio.unique().tolist() == [0, 2]

    def test_initial_weights_have_the_stated_spread(self):
        size = {"vocab_size": 900, "emb_dim": 96, "n_layers": 8, "context_length": 200}
        for name, parameter in gpt2.GPT2(TINY | size).named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / 4 if "projection" in name else 0.02  # 2 · 8 layers: the root is 4
                assert parameter.std().item() == approx(std, rel=0.05), name
                assert parameter.mean().item() == approx(0, abs=std / 20), name
            else:
                one = "norm" in name and name.endswith("weight")
                assert (parameter == (1.0 if one else 0.0)).all(), name


WINDOWS = {(None, 0): [0, 4, 8, 11], (11, 0): [0, 11], (4, 1): [0, 3, 7, 11, 11]}
WINDOWS |= {(3, 2): [0, 1, 4, 7, 10, 11], (5, 5): [0, 0, 5, 10, 11]}  # where each begins


class TestData:
    def test_the_tokenizer_is_gpt2s(self, tokenizer):
        assert gpt2.text_to_token_ids("Hello, world", tokenizer).tolist() == [[15496, 11, 995]]
        assert tokenizer.n_vocab == 50257
        ids = gpt2.text_to_token_ids(VERDICT, tokenizer)[0]
        assert (len(VERDICT), len(ids), len(ids.unique())) == (20479, 5145, 1416)

    @pytest.mark.usefixtures("tokenizer")  # which has been read from the copy before
    @cases("chosen", ["elsewhere", None])
    def test_the_vocabulary_is_the_copy_here_unless_the_user_chose(self, monkeypatch, chosen):
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        if chosen:
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", chosen)
        gpt2.load_tokenizer.cache_clear()
        gpt2.load_tokenizer()
        assert os.environ["TIKTOKEN_CACHE_DIR"] == (chosen or str(gpt2.HERE / ".tiktoken"))

    def test_text_becomes_ids_and_the_same_text_again(self, tokenizer):
        text = "Hello, 🙂 <|endoftext|> world"
        ids = gpt2.text_to_token_ids(text, tokenizer)
        assert ids.shape == (1, ids.numel()) and ids.dtype == torch.long
        assert ids.tolist()[0].count(END) == 1  # the token, not its letters
        for form in (ids, ids[0], ids[0].tolist()):
            assert gpt2.token_ids_to_text(form, tokenizer) == text

    def test_half_a_character_is_a_sign_and_an_unknown_token_is_nothing(self, tokenizer):
        assert gpt2.token_ids_to_text(tokenizer.encode("🙂")[:1], tokenizer) == "�"
        assert gpt2.token_ids_to_text([0, END, 50257, 50303], tokenizer) == "!<|endoftext|>"

    @cases("stride, offset", WINDOWS)
    def test_windows_begin_every_stride_and_targets_are_one_ahead(self, stride, offset):
        dataset = gpt2.GPTDataset(torch.arange(16)[None], 4, stride, offset)
        assert len(dataset) == len(WINDOWS[stride, offset])
        for (x, y), start in zip(dataset, WINDOWS[stride, offset], strict=True):
            assert x.tolist() == list(range(start, start + 4))
            assert y.tolist() == list(range(start + 1, start + 5))

    def test_a_text_must_fill_one_window(self):
        assert len(gpt2.GPTDataset(range(5), 4)) == 1
        for n in (4, 0):
            refused(f"{n} .*context_length 4", lambda n=n: gpt2.GPTDataset(range(n), 4))

    def test_items_of_any_length_make_a_batch_whose_padding_counts_for_nothing(self):
        items = [(some_ids(n, seed=n), some_ids(n, seed=n + 50)) for n in (3, 8, 1)]
        x, y = gpt2.collate(items)
        assert x.shape == y.shape == (3, 8)
        assert (y != -100).sum(dim=1).tolist() == [3, 8, 1]
        model = lively(TINY)
        apart = sum(gpt2.summed_loss(model(x[None]), y[None]) for x, y in items)
        assert gpt2.summed_loss(model(x), y).item() == approx(apart.item(), rel=1e-5)


class TestConfig:
    def test_the_default_values_and_the_size_of_their_model(self):
        model = {"vocab_size": 50257, "context_length": 64, "emb_dim": 128, "n_heads": 4}
        model |= {"n_layers": 4, "dropout_rate": 0.0, "qkv_bias": True}
        data = {"data": "the-verdict.txt", "val_data": "", "val_fraction": 0.1}
        data |= {"max_val_tokens": 100_000, "stride": 0}
        length = {"batch_size": 6, "grad_accumulation": 1, "epochs": 26.0, "schedule_steps": 0}
        rate = {"learning_rate": 4e-3, "min_learning_rate": 1e-4, "warmup_steps": 150}
        rest = {"max_steps": 0, "weight_decay": 0.1, "grad_clip": 1.0, "seed": 42}
        on_the_way = {"eval_every": 0, "checkpoint_every": 0, "patience": 0, "sample_prompt": ""}
        machine = {"device": "auto", "precision": "auto", "compile": False}
        assert model | data | length | rate | rest | on_the_way | machine == gpt2.CONFIG
        assert gpt2.GPT2(gpt2.CONFIG).num_parameters() == 7_234_432

    @cases("key", gpt2.CONFIG)
    def test_a_value_of_another_kind_is_refused_with_its_key(self, key):
        kind, bad = type(gpt2.CONFIG[key]), [None, b"x", [1], {}]
        bad += [1] if kind is str else ["1"]
        bad += [1.5, True] if kind is int else [True] if kind is float else [0, 1]
        bad += [math.nan, math.inf, -math.inf, -1] if kind in (int, float) else []
        for value in bad:
            refused(key, lambda value=value: gpt2.check_config(gpt2.CONFIG | {key: value}))
            refused(key, lambda value=value: gpt2.check_given({key: value}))

    def test_a_number_that_cannot_be_meant_is_refused_with_its_key(self):
        impossible = dict.fromkeys(("vocab_size", "context_length", "emb_dim", "n_heads"), 0)
        impossible |= dict.fromkeys(("n_layers", "batch_size", "grad_accumulation", "epochs"), 0)
        impossible |= {"dropout_rate": 1.0, "val_fraction": 1.0}  # nothing would be left
        impossible |= {"emb_dim": 10**7, "max_steps": 10**10}  # for hours, for ever
        for key, value in impossible.items():
            refused(f"{key}.*must be", lambda key=key, value=value: gpt2.check_given({key: value}))

    def test_numbers_that_people_use_are_taken(self):
        least = {"batch_size": 1, "grad_accumulation": 1, "epochs": 0.001, "seed": 0}
        least |= dict.fromkeys(("stride", "max_steps", "warmup_steps", "patience", "eval_every"), 0)
        least |= dict.fromkeys(("dropout_rate", "val_fraction", "weight_decay", "grad_clip"), 0.0)
        most = {"vocab_size": 50304, "emb_dim": 1600, "context_length": 100_000, "n_layers": 48}
        most |= {"max_steps": 600_000, "max_val_tokens": 10**9, "seed": 20261129}
        assert (gpt2.check_given(least), gpt2.check_given(most)) == (least, most)

    def test_numbers_of_numpy_and_paths_become_plain_values(self):
        import numpy as np

        given = {"emb_dim": np.int64(64), "learning_rate": np.float32(0.5), "epochs": np.int32(3)}
        given |= {"compile": np.bool_(True), "data": Path("a.txt")}
        plain = {"emb_dim": 64, "learning_rate": 0.5, "epochs": 3.0, "compile": True}
        assert (checked := gpt2.check_given(given)) == plain | {"data": "a.txt"}
        assert [type(value) for value in checked.values()] == [int, float, float, bool, str]

    def test_what_does_not_exist_or_fit_together_is_named(self):
        refused("epohcs.*epochs", lambda: gpt2.check_given({"seed": 1, "epohcs": 3}))
        refused("emb_dim 13 .* n_heads 3", lambda: gpt2.GPT2(TINY | {"emb_dim": 13}))
        refused("n_heads 3", lambda: gpt2.check_config(gpt2.CONFIG | {"n_heads": 3}))
        refused("seed", lambda: gpt2.check_config({"epochs": 1.0}, ("epochs", "seed")))


# ---- Helpers of training and runs ----

STEPS = 16  # of the runs that `config` describes: two epochs of 8, in whose last is one window
RARELY = {"checkpoint_every": 99, "eval_every": 99}
FP16 = {"precision": "fp16", "batch_size": 1, "grad_accumulation": 1, "eval_every": 99}


# Another value of these keys makes another run: resuming refuses it.
KEPT = {"vocab_size": 50304, "context_length": 9, "emb_dim": 16, "n_heads": 1, "n_layers": 2}
KEPT |= {"dropout_rate": 0.2, "qkv_bias": False, "val_fraction": 0.2, "max_val_tokens": 9}
KEPT |= {"stride": 3, "weight_decay": 0.2, "grad_clip": 2.0, "seed": 7, "precision": "bf16"}


SAID = {"epochs": 3.0, "schedule_steps": 20, "learning_rate": 5e-4}  # may change, which is said
SAID |= {"min_learning_rate": 1e-5, "warmup_steps": 5}


# What a last.pt may not hold: where, and what stands there.
ODD_STATES = [("step", "x"), ("step", -5), ("tokens_seen", None), ("best_val_loss", "low")]
ODD_STATES += [("model", 7), ("config", [1]), ("optimizer", 7), ("config/n_heads", 3)]
ODD_STATES += [("config/emb_dim", 10), ("model/more", torch.ones(2))]
ODD_STATES += [("model/final_norm.bias", torch.ones(5)), ("optimizer/param_groups", [])]
ODD_STATES += [(key, "gone") for key in ("step", "model", "optimizer", "scaler", "items_per_step")]
ODD_STATES += [("optimizer/state/2/exp_avg", torch.zeros(3))]  # AdamW would write past its end
ODD_STATES += [("optimizer/state/0/exp_avg_sq", torch.zeros(1).expand(50257, 8))]  # one number
SPOILS = {  # what makes each loss, or only its gradient, no number any more
    "loss": lambda norm: norm.weight.data.fill_(math.nan),
    "gradient": lambda norm: norm.bias.register_hook(lambda gradient: gradient * math.inf),
}


def work_of_torchrun(settings, *words):
    """One of two processes that torchrun starts. A step takes one second, and saving takes time."""
    dropped = json.loads(settings)
    clock, evaluate, measured, save = itertools.count(), gpt2.evaluate, [], gpt2.save_checkpoint
    gpt2.time = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: next(clock))
    if os.environ["RANK"] == "1":
        gpt2.tokenize = None  # the first process does it for both
    gpt2.save_checkpoint = lambda *given: time.sleep(0.2) or save(*given)
    take(dropped, out="whole")
    assert load("whole/last.pt")["step"] == 4  # nobody has left before that
    take(dropped | {"max_steps": 2}, out="halves")
    refused("another --batch_size", lambda: go_on("halves", batch_size=2))
    take({"max_steps": 0}, out="halves", resume=True)

    def counting(model, batches, machine):
        batches = list(batches)
        measured.extend(int((y != -100).sum()) for _, y in batches)
        return evaluate(model, batches, machine)

    gpt2.evaluate, score = counting, gpt2.scoring_batches
    gpt2.scoring_batches = lambda data, **given: score(data, tokens=8)  # three, for two processes
    if os.environ["RANK"] == "1":
        before_step(pytest.MonkeyPatch(), 8, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        gpt2.main(["train", "--out", "run", *words])
    except SystemExit as stop:
        sys.stdout.write(f"{stop.code} {sum(measured)}\n")  # at once: both write here


class Trap:
    """Unpickled without care, this writes a file."""

    def __reduce__(self):
        return open, ("trapped", "w")


def take(config, **options):
    """Train to the end; all rows."""
    return list(gpt2.train(config, **{"out": None} | options))


def go_on(folder, **changes):
    """Resume a run for one step; its row."""
    return next(gpt2.train(changes, out=folder, resume=True))


def epochs_of(dataset, count=4, **settings):
    """The items (x, y) that each epoch takes, in their order."""
    given = gpt2.CONFIG | {"batch_size": 4, "grad_accumulation": 2} | settings
    n_items = len(dataset.for_epoch(0))
    n_steps = math.ceil(n_items / 8)
    found = []
    for epoch in range(count):
        taken = []
        for step in range(1, n_steps + 1):
            batches = gpt2.batches_of_step(dataset, epoch * n_steps + step, given)
            assert len(batches) <= 2 and all(len(x) <= 4 for x, _ in batches)
            taken += [row for x, y in batches for row in zip(x.tolist(), y.tolist(), strict=True)]
        found.append(taken)
        assert len(taken) == n_items
    return found


def mean_loss(model, batches, dtype=None):
    """The mean loss of batches by PyTorch's own formula, computed in this dtype."""
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = [model(x).flatten(0, 1).float() for x, _ in batches]
    targets = torch.cat([y.flatten() for _, y in batches])
    return nn.functional.cross_entropy(torch.cat(logits), targets).item()


def held_back(config):
    """The batches that a run of this config is measured on."""
    return list(gpt2.scoring_batches(gpt2.load_data(gpt2.CONFIG | config)[1]))


@pytest.fixture(scope="session")
def one_window(tmp_path_factory, tokenizer):
    """A run of 5 steps, each on the same window, with nothing held back."""
    text = tokenizer.decode(tokenizer.encode(VERDICT)[:9])
    path = write(tmp_path_factory.mktemp("one") / "one.txt", text)
    given = {"data": str(path), "val_fraction": 0.0, "batch_size": 2, "epochs": 5.0}
    return SMALL | given | {"learning_rate": 1e-3, "precision": "fp32"}


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the whole run's folder as this step left it."""
    return lambda step: shutil.copytree(whole / str(step), tmp_path / "run")


# ---- 6. Training ----


class TestTraining:
    def test_mixed_seeds_differ_and_are_the_same_on_every_machine(self):
        seeds = [gpt2.mix_seeds(*pair) for pair in itertools.product(range(50), repeat=2)]
        assert len(set(seeds)) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
        assert gpt2.mix_seeds(42, 3, 1) == 7874481785581792685

    def test_the_rate_rises_in_a_line_over_at_most_a_quarter_then_falls_in_half_a_cosine(self):
        schedule = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10}
        expected = {1: 0.1, 5: 0.5, 10: 1.0, 35: 0.1 + 0.45 * (1 + 0.5**0.5), 60: 0.55, 110: 0.1}
        rates = {step: gpt2.learning_rate_at(step, schedule, 110) for step in expected}
        assert rates == approx(expected)

        short = schedule | {"min_learning_rate": 0.0, "warmup_steps": 150}
        rates = [gpt2.learning_rate_at(step, short, 40) for step in range(1, 41)]
        assert rates[:10] == approx([0.1 * step for step in range(1, 11)]) and 0.99 < rates[10] < 1
        rates = [gpt2.learning_rate_at(step, short, 3) for step in (1, 2, 3)]
        assert rates == approx([0.75, 0.25, 0])  # too short for a warm-up
        assert gpt2.learning_rate_at(40, short | {"min_learning_rate": 3.0}, 40) == 1.0

    def test_only_matrices_decay(self):
        model = gpt2.GPT2(TINY)
        groups = gpt2.make_optimizer(model, gpt2.CONFIG | {"weight_decay": 0.3}).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in model.parameters()}
        assert all(group["betas"] == (0.9, 0.95) and group["fused"] for group in groups)

    def test_every_parameter_follows_the_schedule(self, one_window):
        """AdamW's first step moves each number by the learning rate: so this shows what it was."""
        given = one_window | {"warmup_steps": 10, "epochs": 40.0, "weight_decay": 0.0}
        row = next(gpt2.train(given, out=None, init=lively(SMALL)))
        assert row["learning_rate"] == approx(1e-4)
        for name, before in lively(SMALL).state_dict().items():
            moved = (row["model"].state_dict()[name] - before).abs().max().item()
            assert moved == approx(1e-4, rel=0.02), name

    def test_each_epoch_takes_every_example_once_in_another_order(self):
        dataset = gpt2.CompletionDataset([("a", f" {i}") for i in range(38)], 8)
        orders = epochs_of(dataset) + epochs_of(dataset, seed=7)
        assert all(sorted(order) == sorted(orders[0]) for order in orders)
        assert all(orders.count(order) == 1 for order in orders)
        assert epochs_of(dataset) == orders[:4]  # the same seed repeats them

    @cases("length, context, stride", [(100, 10, 5), (101, 10, 10), (99, 8, 3), (17, 16, 16)])
    def test_in_each_epoch_every_token_but_the_first_is_a_target(self, length, context, stride):
        """Also the last ones, and where windows do not overlap."""
        for epoch in epochs_of(gpt2.TextDataset(range(length), context, stride), 20):
            assert {token for _, y in epoch for token in y} == set(range(1, length))
            assert all(y == [token + 1 for token in x] for x, y in epoch)

    @cases("stride", [4, 8])
    def test_each_epoch_cuts_the_text_elsewhere(self, stride):
        epochs = epochs_of(gpt2.TextDataset(range(80), 8, stride), 40)
        cuts = [{x[0] for x, _ in epoch} - {0, 71} for epoch in epochs]
        assert {start for cut in cuts for start in cut} == set(range(1, 71))
        assert len({min(b) - min(a) for a, b in itertools.pairwise(cuts)}) > 2  # at random

    @cases("clip, share", [(0.0, 1.0), (1e6, 1.0), (0.5, None)])
    def test_a_step_is_that_of_one_big_batch_also_where_targets_are_unequal(self, clip, share):
        """With plain gradient descent (any optimizer will do) the weights show the gradient."""
        ids = some_ids(5, 9)
        x, y = ids[:, :-1], ids[:, 1:].clone()
        y[0, :7] = y[3, 2:] = -100
        model = lively(TINY, scale=1.0)
        expected = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert length > 1

        for sizes in ([5], [2, 3], [1, 1, 3]):
            trained = lively(TINY, scale=1.0)
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
            found = gpt2.train_step(trained, optimizer, batches, gpt2.Machine("cpu", "fp32"), clip)
            assert found == approx((expected.item(), length), rel=1e-4)
            changes = zip(model.parameters(), trained.parameters(), gradients, strict=True)
            for before, after, gradient in changes:
                moved = 0.1 * gradient * (share or clip / length)
                torch.testing.assert_close(before - after, moved, rtol=1e-3, atol=1e-5)

    def test_gradients_are_exchanged_with_the_last_batch_of_a_step_only(self):
        machine, apart = gpt2.Machine("cpu", "fp32"), []
        machine.world = 2
        network = SimpleNamespace(no_sync=lambda: apart.append(1) or contextlib.nullcontext())
        batches = [(some_ids(1, 3), some_ids(1, 3))] * 3
        assert [len(apart) for _ in machine.micro_batches(network, batches)] == [1, 2, 2]
        assert machine.sum(2**24 + 1) == 2**24 + 1  # tokens, counted exactly

    def test_a_run_clips_its_gradient_and_reports_it_before_that(self, config, tmp_path):
        rows = [take(config | {"grad_clip": 0.01, "max_steps": 1}, out=tmp_path)[0]]
        rows += take(config | {"grad_clip": 0.0, "max_steps": 1})
        assert rows[0]["grad_norm"] == rows[1]["grad_norm"] > 0.05
        states = load(tmp_path / "last.pt")["optimizer"]["state"].values()
        total = sum(state["exp_avg"].double().square().sum().item() for state in states)
        assert math.sqrt(total) == approx(0.1 * 0.01, rel=1e-3)  # AdamW takes a tenth

    def test_evaluate_is_a_mean_over_tokens_not_over_batches(self):
        model, ids = lively(TINY | {"dropout_rate": 0.5}), some_ids(7, 9)
        x, y = ids[:, :-1], ids[:, 1:].clone()
        y[0, 1:] = -100
        batches = [(x[:1], y[:1]), (x[1:], y[1:])]
        expected = mean_loss(model, batches)
        assert gpt2.evaluate(model.train(), iter(batches)) == approx(expected, rel=1e-6)
        assert model.training and torch.is_grad_enabled()

    def test_a_run_counts_its_epochs_and_tokens(self, whole, config, examples):
        rows = metrics_of(whole)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["epoch"] for row in rows] == [1] * 8 + [2] * 8
        # Of 43 windows of 8 tokens, a step takes 6, and the last of an epoch takes one.
        assert [rows[i]["tokens_seen"] for i in (0, 6, 7, 15)] == [48, 48 * 7, 43 * 8, 2 * 43 * 8]
        given = {"data": str(examples), "context_length": 12, "epochs": 1.0, "val_fraction": 0.0}
        rows = take(config | given | {"eval_every": 99})
        assert rows[-1]["tokens_seen"] == 8 * 2 + 7 * 3  # " ham" and " spam!", each with its end

    def test_a_run_is_measured_once_an_epoch_or_as_asked(self, config, whole, one_window):
        assert [row["step"] for row in metrics_of(whole) if "val_loss" in row] == [*range(2, 17, 2)]
        given = one_window | {"epochs": 25.0, "batch_size": 1, "val_data": one_window["data"]}
        changes = [({}, [2, 4]), ({"eval_every": 3}, [3]), ({"val_data": ""}, [2, 4])]
        for change, steps in [*changes, ({"epochs": 75.0}, [3])]:  # of 150 steps: fifty times
            rows = take(given | {"max_steps": 5} | change)
            measured = [] if "val_data" in change else steps
            assert [row["step"] for row in rows if "val_loss" in row] == measured
            assert [row["step"] for row in rows if "sample" in row] == [*steps, 5]

    def test_a_row_is_true_and_max_steps_leaves_the_schedule_alone(self, config, whole, tokenizer):
        prompt = gpt2.load_data(gpt2.CONFIG | config)[0].token_ids[None, :5].long()
        rows = take(config | {"max_steps": 3, "eval_every": 3})
        row = rows[-1]
        loss = mean_loss(row["model"].eval(), held_back(config))
        assert row["val_loss"] == approx(loss, rel=1e-6)
        ids = gpt2.generate(row["model"], prompt, 40, eos_id=END)
        assert row["sample"] == gpt2.token_ids_to_text(ids, tokenizer).rstrip("\ufffd")
        assert row["total_steps"] == 3
        assert numbers(rows, "val_loss") == numbers(metrics_of(whole)[:3], "val_loss")

    def test_only_dropout_differs_where_steps_see_the_same_and_learn_nothing(self, one_window):
        still = one_window | {"learning_rate": 0.0, "min_learning_rate": 0.0}
        assert len({row["train_loss"] for row in take(still | {"dropout_rate": 0.5})}) == 5
        assert len({(row["train_loss"], row["grad_norm"]) for row in take(still)}) == 1

    def test_measuring_and_saving_change_nothing(self, whole, config, tmp_path):
        """Nor does patience, as long as the loss falls. And a row is in its file at once."""
        busy = config | {"eval_every": 1, "checkpoint_every": 5, "sample_prompt": "Else"}
        for row in gpt2.train(busy | {"patience": 1}, out=tmp_path):
            assert row["sample"].startswith("Else") and torch.rand(1) < 1
            assert metrics_of(tmp_path)[-1].items() <= row.items()
            row["model"].eval()
        assert numbers(metrics_of(tmp_path), "val_loss") == numbers(metrics_of(whole), "val_loss")
        ours, theirs = load(tmp_path / "last.pt"), load(whole / "last.pt")
        assert same(ours["model"], theirs["model"]) and same(ours["optimizer"], theirs["optimizer"])
        other = next(gpt2.train(config | {"seed": 7}, out=None))
        assert other["train_loss"] != metrics_of(whole)[0]["train_loss"]

    @cases("precision, dtype", [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
    def test_precision_says_in_what_numbers_is_trained_and_measured(self, config, precision, dtype):
        """With a lively model, whose losses depend on that."""
        given = config | {"precision": precision, "dropout_rate": 0.0, "eval_every": 1}
        given |= {"batch_size": 1, "grad_accumulation": 1}
        source = lively(SMALL, scale=1.0)
        row = next(gpt2.train(given, out=None, init=source))
        train_set, _ = gpt2.load_data(gpt2.CONFIG | given)
        first = gpt2.batches_of_step(train_set, 1, gpt2.CONFIG | given)
        losses = {"train_loss": (source, first), "val_loss": (row["model"], held_back(config))}
        for key, (model, batches) in losses.items():
            assert row[key] == approx(mean_loss(model, batches, dtype), rel=1e-6)
            other = torch.bfloat16 if dtype is None else None
            assert row[key] != approx(mean_loss(model, batches, other), rel=1e-6)
        assert {weight.dtype for weight in row["model"].parameters()} == {torch.float32}

    @cases("change", [{"emb_dim": 16}, {"n_layers": 2}, {"qkv_bias": False}, {"context_length": 9}])
    def test_a_model_of_another_shape_or_a_frozen_one_is_refused(self, config, whole, change):
        source, given = read(whole), config | change
        refused(next(iter(change)), lambda: next(gpt2.train(given, out=None, init=source)))
        source.final_norm.weight.requires_grad_(False)
        refused("final_norm.weight", lambda: next(gpt2.train(config, out=None, init=source)))

    def test_a_shorter_context_trains_the_first_positions(self, config, whole):
        given = config | {"context_length": 5, "weight_decay": 0.0}
        row = next(gpt2.train(given, out=None, init=whole / "last.pt"))
        before = read(whole / "last.pt").position_embedding.weight[:5]
        moved = (row["model"].position_embedding.weight - before).abs().amax(-1)
        assert moved.shape == (5,) and 0 < moved.min() <= moved.max() < 2 * row["learning_rate"]

    def test_a_run_from_a_model_is_gentle_unless_told_otherwise(self, config, whole):
        source = read(whole / "last.pt")
        given = {key: config[key] for key in ("data", "batch_size", "precision")}
        rows = take(given, init=source)
        rates = [row["learning_rate"] for row in rows]
        assert len(rows) == 15 and rows[-1]["epoch"] == 1  # 43 windows, 3 at once
        assert (max(rates), rates[-1]) == approx((1e-4, 1e-5))
        assert same(source.state_dict(), read(whole / "last.pt").state_dict())  # a copy is trained
        told = given | {"learning_rate": 3e-3, "epochs": 2.0, "warmup_steps": 1}
        row = next(gpt2.train(told | {"dropout_rate": 0.3}, out=None, init=source))
        assert (row["learning_rate"], row["total_steps"]) == (3e-3, 30)
        assert row["model"].config == SMALL | {"dropout_rate": 0.3}

    def test_best_is_never_worse_than_the_beginning(self, config, whole, tmp_path):
        """It learns another text, and so forgets the one that it is measured on."""
        other = write(tmp_path / "other.txt", "Blue, green! " * 40)
        given = config | {"data": str(other), "val_data": config["data"], "max_steps": 3}
        given |= {"learning_rate": 3.0, "warmup_steps": 0, "eval_every": 1, "checkpoint_every": 9}
        run = gpt2.train(given, out=tmp_path / "run", init=whole)
        losses = [next(run)["val_loss"]]
        for name in ("last.pt", "best.pt"):
            assert load(tmp_path / "run" / name)["step"] == 0  # if it dies now, it can go on
        losses += [row["val_loss"] for row in run]

        state = load(tmp_path / "run" / "last.pt")
        before = mean_loss(read(whole), held_back(given))
        assert min(losses) > before
        assert (state["best_step"], state["best_val_loss"]) == (0, approx(before, rel=1e-6))
        assert same(read(tmp_path / "run").state_dict(), read(whole).state_dict())

    @cases("epochs, steps, taken, epoch", [(0.5, 0, 4, 1), (1.1, 0, 9, 2), (0.5, 10, 10, 2)])
    def test_a_schedule_in_parts_of_an_epoch_or_in_steps(self, config, epochs, steps, taken, epoch):
        given = {"epochs": epochs, "schedule_steps": steps, "eval_every": 99, "max_steps": 30}
        rows = take(config | given)
        assert "val_loss" in rows[-1]  # the last step is measured anyway
        assert (len(rows), rows[-1]["epoch"]) == (taken, epoch)
        assert rows[-1]["learning_rate"] == approx(1e-4)  # the lowest, at the end

    @cases("init, n_steps", [(False, 3), (True, 2)])
    def test_patience_ends_a_run_and_more_goes_on(self, config, whole, tmp_path, init, n_steps):
        still = {"learning_rate": 0.0, "min_learning_rate": 0.0, "eval_every": 1, "patience": 2}
        assert len(take(config | still, out=tmp_path, init=whole if init else None)) == n_steps
        refused("--resume.* --patience 0", lambda: go_on(tmp_path))
        rows = take({"patience": 4}, out=tmp_path, resume=True)
        assert [row["step"] for row in rows] == [n_steps + 1, n_steps + 2]

    def test_patience_counts_from_the_lowest_loss_on(self, config, monkeypatch):
        losses = iter([5.0, 6.0, 4.0, 6.0, 6.0])
        monkeypatch.setattr(gpt2, "evaluate", lambda *given: next(losses))
        assert len(take(config | {"eval_every": 1, "patience": 2})) == 5

    @cases("spoil", SPOILS)
    def test_a_loss_that_is_no_number_ends_a_run_but_not_for_good(self, config, tmp_path, spoil):
        run = gpt2.train(config | {"checkpoint_every": 1}, out=tmp_path)
        SPOILS[spoil](next(run)["model"].final_norm)
        refused("learning_rate", lambda: next(run), FloatingPointError)
        assert load(tmp_path / "last.pt")["step"] == len(metrics_of(tmp_path)) == 1
        row = go_on(tmp_path, learning_rate=1e-4)
        assert (row["step"], row["learning_rate"]) == (2, approx(1e-4))

    @pytest.mark.filterwarnings("default")  # of the compiler
    def test_a_compiled_run_leaves_a_plain_model(self, config, examples, tmp_path, monkeypatch):
        """Examples have many lengths; each must not be compiled anew. Any backend shows that."""
        graphs = []

        def eager(graph, inputs):
            graphs.append(graph)
            return graph.forward

        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=eager))
        given = {"data": str(examples), "context_length": 20, "batch_size": 1, "epochs": 1.0}
        given = config | given | {"grad_accumulation": 1, "dropout_rate": 0.0}
        rows = take(given | {"compile": True}, out=tmp_path)
        assert_close(rows, take(given))
        assert len(rows) == 13 and 1 <= len(graphs) <= 4
        for name in ("last.pt", "best.pt"):
            assert load(tmp_path / name)["model"].keys() == gpt2.GPT2(SMALL).state_dict().keys()
            assert read(tmp_path / name).config["context_length"] == 20


READ = [  # (context, tokens of the prompt, what the model reads in each step)
    (8, 3, [[0, 1, 2], [3], [4], [5], [6], [7], [5, 6, 7, 8], [9], [10], [11], [12]]),
    (8, 8, [[0, 1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 8], [9]]),  # as long as the context
    (8, 11, [[3, 4, 5, 6, 7, 8, 9, 10], [8, 9, 10, 11], [12]]),  # longer
    (5, 4, [[0, 1, 2, 3], [4], [4, 5], [6], [7], [8], [8, 9]]),
    (1, 2, [[1], [2], [3]]),
]


class TestGeneration:
    def test_top_k_leaves_exactly_k_even_of_equals_and_temperature_0_leaves_one(self):
        logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
        kept = gpt2.keep_top_k(logits, 2)
        assert kept[0].tolist() == [-math.inf, 3.0, 2.0, -math.inf]
        assert sorted(kept[1].tolist()) == [-math.inf, -math.inf, 5.0, 5.0]
        assert torch.equal(gpt2.keep_top_k(logits, 99), logits)  # more than there are
        assert gpt2.next_token_probabilities(logits[:1], 0).tolist() == [[0, 1, 0, 0]]

    @cases("temperature", [0.5, 1.0, 2.0])
    @cases("top_k", [None, 1, 3, 50])
    @cases("top_p", [None, 1e-60, 0.3, 0.8, 1.0])  # the second is 0 in float32
    def test_the_distribution_is_the_written_out_one(self, temperature, top_k, top_p):
        logits = torch.randn(2, 9, generator=seeded(0)) * 2
        ours = gpt2.next_token_probabilities(logits, temperature, top_k, top_p)
        for row, probabilities in zip(logits.tolist(), ours.tolist(), strict=True):
            order = sorted(range(9), key=lambda i: -row[i])[: top_k or 9]
            weights = {i: math.exp(row[i] / temperature) for i in order}
            kept = {}
            for i in order:
                if not kept or sum(kept.values()) < (top_p or 1.0) * sum(weights.values()):
                    kept[i] = weights[i]
            expected = [kept.get(i, 0) / sum(kept.values()) for i in range(9)]
            assert probabilities == approx(expected, abs=1e-6)

    @cases("dtype", [torch.bfloat16, torch.float16])
    @cases("top_p", [0.5, 0.9])
    def test_top_p_is_not_summed_in_half_precision_at_gpt2s_vocabulary(self, dtype, top_p):
        logits = torch.randn(1, 50257, generator=seeded(0)).to(dtype)
        ours = gpt2.next_token_probabilities(logits, top_p=top_p)[0].double()
        exact = torch.softmax(logits[0].double(), dim=-1)
        count = int((exact.sort(descending=True).values.cumsum(dim=0) < top_p).sum()) + 1

        kept = ours > 0
        assert int(kept.sum()) == approx(count, abs=3)
        assert torch.allclose(ours, exact * kept / exact[kept].sum(), rtol=1e-4, atol=0)

    @cases("options", [{"temperature": 0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.75}])
    def test_generate_draws_as_its_options_say_and_leaves_other_randomness_alone(self, options):
        logits, before = torch.tensor([1.0, 2.0, 3.0, 4.0]).log(), torch.get_rng_state()
        options = {"temperature": 1.0} | options
        shares = gpt2.next_token_probabilities(logits[None], **options)[0]

        model = Stub(lambda ids: logits.expand(len(ids), -1))
        ids = torch.zeros(4000, 1, dtype=torch.long)
        texts = [gpt2.generate(model, ids, 2, generator=seeded(n), **options) for n in (0, 0, 1)]
        found = torch.bincount(texts[0][:, 1:].flatten(), minlength=4) / 8000
        assert found.tolist() == approx(shares.tolist(), abs=0.02)
        assert torch.equal(found > 0, shares > 0)
        assert torch.equal(texts[0], texts[1]) and torch.equal(torch.get_rng_state(), before)
        assert torch.equal(texts[0], texts[2]) == (options["temperature"] == 0)

    @cases("context, length, windows", READ)
    def test_a_full_context_goes_on_from_its_last_half(self, context, length, windows):
        model = Stub(successor, context)
        text = gpt2.generate(model, torch.arange(length)[None], len(windows))
        assert text.tolist() == [list(range(length + len(windows)))]
        assert model.read == [[window] for window in windows]

    def test_a_real_model_uses_the_cache_unless_told_otherwise(self):
        """Beyond its context, too; the drawn text is one that any wrong logits would change."""
        texts, sizes, scored = [], [], set()
        for use_cache in (True, False):
            model = lively(TINY | {"dropout_rate": 0.5}).train()  # generating drops nothing
            model.blocks[1].register_forward_pre_hook(lambda _, x: sizes.append(x[0].size(1)))
            model.head.register_forward_pre_hook(lambda _, x: scored.add(x[0].size(1)))
            draws = {"temperature": 1.0, "generator": seeded(0), "use_cache": use_cache}
            texts.append(gpt2.generate(model, some_ids(2, 3), 12, **draws))
        cached, plain = [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4], [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]
        assert sizes == cached + plain and scored == {1}  # the last token alone
        assert torch.equal(*texts) and len(texts[0].unique()) > 8

    def test_rows_that_end_apart_are_filled_with_the_end(self):
        prompts, columns = torch.tensor([[4, 5], [6, 7], [1, 2], [9, 8]]), []
        text = gpt2.generate(Stub(successor), prompts, 20, eos_id=9, on_token=columns.append)
        assert text.tolist() == [
            [4, 5, 6, 7, 8, 9, 9, 9, 9],
            [6, 7, 8, 9, 9, 9, 9, 9, 9],
            [1, 2, 3, 4, 5, 6, 7, 8, 9],  # the last to end ends the whole
            [9, 8, 9, 9, 9, 9, 9, 9, 9],  # an end in the prompt is none
        ]
        assert all(column.shape == (4, 1) for column in columns)
        assert torch.equal(torch.cat(columns, dim=1), text[:, 2:])

    def test_on_token_stops_by_true(self):
        prompts = torch.tensor([[3], [1]])
        text = gpt2.generate(Stub(successor), prompts, 9, on_token=lambda column: column[0] == 6)
        assert text.tolist() == [[3, 4, 5, 6], [1, 2, 3, 4]]

    @cases("new", [0, 3])
    def test_the_prompt_stays_and_what_is_written_can_be_trained_on(self, new):
        model, prompt = lively(TINY), some_ids(2, 4)
        text = gpt2.generate(model, prompt, new)
        text[0, 0] += 1  # a tensor like any other, with memory of its own
        assert text.shape == (2, 4 + new) and torch.equal(prompt, some_ids(2, 4))
        model(text).sum().backward()

    @cases("training", [True, False])
    def test_dropout_and_gradients_are_off_inside_and_as_before_afterwards(self, training):
        def on_token(new):
            assert not model.training and not torch.is_grad_enabled()
            raise RuntimeError("stop")

        model, ids = lively(TINY).train(training), some_ids(1, 2)
        refused("stop", lambda: gpt2.generate(model, ids, 2, on_token=on_token), RuntimeError)
        assert model.training == model.blocks[0].training == training and torch.is_grad_enabled()

    @cases("temperature", [0.0, 1.0])
    @cases("row", [[math.nan, 0.0], [0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
    def test_logits_that_are_not_finite_are_refused_in_any_row(self, row, temperature):
        model = Stub(lambda ids: torch.tensor([[0.0, 1.0], row]))
        refused("logits", lambda: gpt2.generate(model, some_ids(2, 1), 1, temperature=temperature))

    def test_logits_that_become_nan_in_a_long_text_are_refused(self):
        model = Stub(lambda ids: successor(ids % 20) + (math.nan if len(model.read) > 5 else 0.0))
        refused("logits", lambda: gpt2.generate(model, torch.zeros(1, 1, dtype=torch.long), 40))

    def test_options_that_make_no_sense_are_refused_before_anything_is_read(self):
        model = Stub(successor)
        bad = {"temperature": (-1.0, 9e-5, math.nan, math.inf), "top_k": (0, -5)}
        bad |= {"top_p": (0.0, -0.1, 1.1, math.nan)}
        refused("no tokens", lambda: gpt2.generate(model, some_ids(1, 0), 3))
        for key, value in ((name, value) for name in bad for value in bad[name]):
            with pytest.raises(ValueError, match=key):
                gpt2.generate(model, some_ids(1, 1), 3, **{"temperature": 1.0} | {key: value})
        assert not model.read


# ==== Part two ====


# ---- 8. Data files ----

ASKED = " Write a response that appropriately completes the request.\n\n### Instruction:\ndo\n\n"
BELOW = "Below is an instruction that describes a task"  # Stanford Alpaca's two layouts
ALONE = f"{BELOW}.{ASKED}### Response:\n"
PAIRED = f"{BELOW}, paired with an input that provides further context.{ASKED}"
PAIRED += "### Input:\nthis\n\n### Response:\n"
ZERO = PAIRED.replace("this", "0")
PAIR = {"prompt": "p", "completion": " c"}
NO_TEXTS = [(b"", "empty"), (b"one\ntwo\r\ncaf\xe9 au", "line 3, byte 4.*0xe9")]
NO_TEXTS += [(b"one\n" * 600_000 + b"caf\xc3", "line 600001, byte 4.*0xc3")]  # half a character
NO_TEXTS += [("one\n".encode("utf-16"), "UTF-16"), ("one\n".encode("utf-16-le"), "NUL")]
NO_TEXTS += [(f"a one{' ' * 10**6}two b", "white-space.* near '(a one )?two")]  # it would panic
TABLES = [("a.csv", "\ufeffcompletion,prompt,end\r\n c,p,false\r\n", [("p", " c", False, ())])]
TABLES += [("a.csv", 'prompt,completion\n"a, ""b""\r\nd",1\n', [('a, "b"\r\nd', "1", True, ())])]
TABLES += [("A.TSV", "prompt\tcompletion\na, b\t c\n", [("a, b", " c", True, ())])]
TABLES += [("a.csv", 'text\n"one, two"\nthree\n', ["one, two", "three"])]
TABLES += [("a.csv", "text\n" + "a" * 200_000, ["a" * 200_000])]
BAD_RECORDS = [
    ("a.jsonl", "", ""),
    ("a.json", '[{"prompt": "a", "completion": "b"}, 5]', "entry 2"),
    ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "line 2"),
    ("a.jsonl", '{\n"prompt": "a", "completion": "b"}\n', "line 1.*list"),
    ("a.jsonl", '{"messages": [{"role": "user"}]}\n', "messages.*completion"),
    ("a.jsonl", '{"prompt": "a", "completion": null}\n', "line 1.*completion"),
    ("a.jsonl", '{"prompt": "a", "choices": ["b"], "answer": 1}\n', "answer.*1"),
    ("a.jsonl", '{"prompt": "a", "choices": ["b"], "answer": -1}\n', "answer.*-1"),
    ("a.jsonl", '{"prompt": "a", "choices": "bc", "answer": 0}\n', "choices"),
    ("a.jsonl", '{"prompt": "a", "choices": ["", "b"], "answer": 1}\n', "choices"),
    ("a.csv", "prompt,completion,end\na,<|endoftext|>,false\n", "line 2.*predict"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2, byte 14.*0xe9"),
    ("a.jsonl", f'{{"text": {"1" * 5000}}}\n', "line 1"),  # above what Python reads
    ("a.jsonl", '{"text": "a"}\n{"text": true}\n', "line 2.*True"),
    ("a.csv", "prompt,completion\nhi\n", "line 2.*completion"),
    ("a.csv", "prompt,completion\nhi,yes, please\n", "line 2"),  # an unquoted comma
]
RECORDS = [
    (PAIR, ("p", " c", True, ())),
    (PAIR | {"end": False}, ("p", " c", False, ())),
    ({"prompt": 1, "completion": 2.5}, ("1", "2.5", True, ())),
    ({"instruction": "do", "output": "done"}, (ALONE, "done", True, ())),
    ({"instruction": "do", "input": None, "output": "done"}, (ALONE, "done", True, ())),
    ({"instruction": "do", "input": "this", "output": "it"}, (PAIRED, "it", True, ())),
    ({"instruction": "do", "context": "this", "response": "it"}, (PAIRED, "it", True, ())),
    ({"instruction": "do", "input": 0, "output": 1}, (ZERO, "1", True, ())),
    ({"question": "do", "answer": "done"}, (ALONE, "done", True, ())),
    (PAIR | {"choices": [" a", " b"], "answer": 1}, ("p", " b", False, (" a", " b"))),
    ({"text": "p", "label": "spam"}, ("p", " spam", True, ())),
    ({"text": "p", "more": "x"}, "p"),
]
PROMPTS = [" ".join(VERDICT.split()[i * 7 : i * 7 + 2]) for i in range(20)]


def tokens_in(data):
    """The tokens of a `data` setting."""
    return gpt2.read_data(str(data)).tolist()


def records_in(path):
    """The examples and documents of a file."""
    return list(gpt2.read_records(path))


def measured(cli, data, model, *given):
    """What `eval --json` says."""
    return json.loads(cli("eval", "--data", data, "--model", model, "--json", *given).out)


def losses_of(model, prompt, completion, end=True):
    """The losses of a completion's tokens in nats, in float64, each text read alone."""
    encode = gpt2.load_tokenizer().encode
    ids = encode(prompt) + encode(completion) + [END] * end
    chances = model(torch.tensor([ids]))[0].double().log_softmax(dim=-1)
    return [-chances[t - 1, ids[t]].item() for t in range(len(encode(prompt)), len(ids))]


@pytest.fixture(scope="session")
def choosy(tmp_path_factory):
    """The checkpoint of a model that has an opinion of its own about each text."""
    model = lively(SMALL | {"context_length": 16}, scale=2.0)
    nn.init.zeros_(model.final_norm.bias)  # which says the same everywhere
    return save_model(model, tmp_path_factory.mktemp("choosy") / "choosy.pt")


class TestDataFiles:
    def test_texts_in_pieces_have_the_tokens_of_the_whole(self, tmp_path, tokenizer, monkeypatch):
        """Files read in blocks of a few characters, so that every place is somewhere a cut."""
        rng = random.Random(0)
        odd = [" ", "  ", "\n", "\r\n", "\r", "\t", "\x1c", "\x85", "\u2028", "\u3000", "\xa0"]
        odd += ["\x0b", "12", "<|endoftext|>", "'s", "é", "🙂", "漢", " the", "!?", "\ufeff", "a"]

        class Blocks(io.TextIOWrapper):
            def read(self, size=-1):
                return super().read(rng.randint(1, 40))

        def open_in_blocks(path, **options):
            return Blocks(io.FileIO(path), **options)

        monkeypatch.setattr(gpt2, "open", open_in_blocks, raising=False)
        for mark in ("", "\ufeff") * 30:  # a byte order mark is no text
            text = "".join(rng.choice(odd) for _ in range(300)).lstrip("\ufeff")
            expected = tokenizer.encode(text, allowed_special="all")
            assert tokens_in(write(tmp_path / "a.txt", mark + text)) == expected

    def test_a_large_text_is_never_whole_in_memory(self, tmp_path, monkeypatch):
        pieces = list(gpt2.read_text(path := write(tmp_path / "large.txt", VERDICT * 150)))
        assert "".join(pieces) == VERDICT * 150 and max(map(len, pieces)) < 1_200_000
        assert gpt2.fingerprint([path]) == sha256(path)  # of all its bytes

        count, written = itertools.count(), []  # tokens are written while the text is read
        monkeypatch.setattr(gpt2, "text_pieces", lambda _: (f"{next(count)}" for _ in range(40)))
        gpt2.tokenize([path], SimpleNamespace(write=lambda _: written.append(next(count))))
        assert len(written) == 40 and written[0] < 20

    @cases("content, cause", NO_TEXTS)
    def test_what_is_no_text_is_named_by_its_place(self, tmp_path, content, cause):
        refused(f"some.txt.*{cause}", lambda: tokens_in(write(tmp_path / "some.txt", content)))

    def test_many_blanks_are_read_at_once(self, tmp_path):
        """A search that begins anew at each of them takes half a minute."""
        text, began = "a" + " " * 199_000 + VERDICT * 15, time.perf_counter()
        assert len(tokens_in(write(tmp_path / "a.txt", text))) > 15 * 5145
        assert time.perf_counter() - began < 5

    @cases("record, expected", RECORDS)
    def test_each_kind_of_record_is_understood(self, tmp_path, record, expected):
        assert records_in(write_lines(tmp_path / "a.jsonl", record)) == [expected]

    def test_records_come_as_lines_or_a_list_whatever_the_suffix_case(self, tmp_path):
        rows = [PAIR | {"prompt": f"a{end}b"} for end in ("\u2028", "\u2029", "\x85")]
        lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        listed = "\ufeff\n" + json.dumps(rows, indent=2)
        files = {"a.jsonl": lines, "B.JSONL": "\ufeff" + lines, "C.Json": listed}
        for name, content in files.items():
            found = gpt2.read_data(str(write(tmp_path / name, content)))
            assert found == [(row["prompt"], " c", True, ()) for row in rows]

    @cases("name, content, expected", TABLES)
    def test_a_table_is_read_by_its_header(self, tmp_path, name, content, expected):
        assert records_in(write(tmp_path / name, content)) == expected

    @cases("name, content, cause", BAD_RECORDS)
    def test_a_record_of_no_use_is_named_and_what_was_found(self, tmp_path, name, content, cause):
        refused(f"{name}.*{cause}", lambda: records_in(write(tmp_path / name, content)))

    def test_of_a_huge_set_each_item_comes_once_in_an_order_that_fits_the_memory(self):
        count = 2**24 + 5  # shuffled in parts of 2²⁴; the order of 10⁹ items would fill 8 GB
        items, began = gpt2.Shuffled(range(count), seed=3), time.perf_counter()
        assert {items[i] for i in range(2**24, count)} == set(range(2**24, count))
        assert len(items) == count and 2**20 < max(items[i] for i in range(99)) < 2**24
        assert time.perf_counter() - began < 10  # a part is shuffled once, not for each of them

    def test_no_file_is_dropped_and_no_hint_names_what_a_command_lacks(self, cli):
        parsed = gpt2.parse(["train", "a", "--data", "b", "--data", "c", "d"])
        assert parsed.data == parsed.given["data"] == "a,b,c,d"  # for `eval` and for `train`
        assert "eval does not know --batch_size\n" in cli("eval", "--batch_size", 5).err

    def test_documents_of_folders_and_files_are_joined_by_the_token(self, cli, tokenizer):
        files = {"d/b.txt": "two", "d/c/a.JSONL": '{"text": "three"}\n{"text": "four"}'}
        files |= {"d/a.txt": "one\n", "d/.hidden": b"\xff", "d/.git/config": b"\xff"}
        files |= dict.fromkeys(("x,y.txt", "xzy.txt", "x/.y/z.txt"), "five")
        for name, content in files.items():
            write(Path(name), content)
        one, *parts = [tokenizer.encode(text) for text in ("one\n", "two", "three", "four", "five")]
        assert tokens_in("d") == [*one, END, *parts[0], END, *parts[1], END, *parts[2]]
        assert tokens_in("d/b.txt,d/a.txt") == [*parts[0], END, *one]
        assert tokens_in(",".join(["xzy.txt", *["d/b.txt"] * 99])).count(END) == 99
        assert tokens_in("x,y.txt") == parts[3]  # one file, whose name has a comma
        assert tokens_in("the-verdict.txt") == tokenizer.encode(VERDICT)  # beside gpt2.py
        assert tokens_in(write(Path("the-verdict.txt"), "one\n")) == one  # here comes first
        assert tokens_in("x/.y") == parts[3]  # the folder that is named may be hidden

    @cases("data", ["no", "a.txt,no.txt", "a.txt,a.jsonl", "a.jsonl,a.txt", "a.bin,a.txt"])
    def test_files_that_are_missing_or_do_not_fit_are_named(self, cli, data):
        Path("no").mkdir()  # a folder without files
        write("a.txt", "one")
        write("a.bin", "ab")
        write_lines("a.jsonl", PAIR)
        result = cli("train", "--data", data)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert ("no" if "no" in data else "a.") in result.err

    def test_only_the_completion_and_one_end_are_targets(self, tokenizer):
        encode = tokenizer.encode
        rows = [("one two", " three four"), ("", " a"), ("one", " b", False)]
        rows += [("<|endoftext|>a", " b<|endoftext|>\n")]
        (x, y), (from_nothing, _), (_, open_end), (a, b) = gpt2.CompletionDataset(rows, 8)
        assert x.tolist() == encode("one two three four")
        assert y.tolist() == [-100, *encode(" three four"), END]
        assert from_nothing.tolist() == [END, *encode(" a")]
        assert open_end.tolist() == encode(" b")
        assert a.tolist() == [END, *encode("a b")]
        assert b.tolist() == [-100, *encode(" b"), END]

    def test_examples_longer_than_the_context_are_cut_and_counted(self, tokenizer, cli, choosy):
        rows = [("a b c d e f g h i", " y z"), ("a b c d e f g", " z"), ("a", " b c d e f g h")]
        (x, y), (whole_x, _), _ = gpt2.CompletionDataset(rows, 8)  # 11, 8 and 8 tokens and the end
        assert x.tolist() == tokenizer.encode(" d e f g h i y z")
        assert y.tolist() == [-100] * 5 + [*tokenizer.encode(" y z"), END]
        assert whole_x.tolist() == tokenizer.encode("a b c d e f g z")
        refused("9.*context_length", lambda: gpt2.CompletionDataset([("a", " b c d e f g h i")], 8))

        rows = [{"prompt": "a " * n, "completion": " b"} for n in (3, 14, 30, 20)]  # and 2 tokens
        note = cli("eval", "--model", choosy, "--data", write_lines("a.jsonl", *rows)).err
        assert re.search(r"4 examples.*\b2 .*context_length 16.*longest has 32\b", note)

    def test_examples_are_held_back_by_the_seed(self, examples, monkeypatch):
        given = gpt2.CONFIG | {"data": str(examples), "val_fraction": 0.35, "context_length": 12}
        train_set, val_set = gpt2.load_data(given)
        assert (len(train_set), len(val_set)) == (9, 6)
        assert sorted(train_set.examples + val_set.examples) == sorted(records_in(examples))
        assert {example.completion for example in val_set.examples} == {" ham", " spam!"}
        assert gpt2.load_data(given)[1].examples == val_set.examples
        assert gpt2.load_data(given | {"seed": 1})[1].examples != val_set.examples
        assert gpt2.load_data(given | {"val_fraction": 0.0})[1] is None
        refused("val_fraction", lambda: gpt2.load_data(given | {"val_fraction": 0.95}))
        # A file of its own to validate on: nothing is held back.
        assert [*map(len, gpt2.load_data(given | {"val_data": str(examples)}))] == [15, 15]
        monkeypatch.setattr(gpt2, "process_rank", lambda: 1)  # the same ones in each process
        assert gpt2.load_data(given)[1].examples == val_set.examples

    def test_of_a_text_the_end_is_held_back(self, tokenizer):
        ids = tokenizer.encode(VERDICT)  # 5,145 tokens
        for change, n_val in (({}, 515), ({"max_val_tokens": 99}, 99), ({"val_fraction": 0.0}, 0)):
            train_set, val_set = gpt2.load_data(gpt2.CONFIG | change)
            assert train_set.token_ids.tolist() == ids[: 5145 - n_val]
            assert (val_set.token_ids.tolist() if val_set else []) == ids[5145 - n_val :]
            assert (train_set.context_length, train_set.stride) == (64, 32)
        assert gpt2.load_data(gpt2.CONFIG | {"context_length": 1})[0].stride == 1
        for change in ({"context_length": 5000}, {"val_fraction": 0.99}, {"max_val_tokens": 1}):
            refused("token", lambda change=change: gpt2.load_data(gpt2.CONFIG | change))

    def test_tokenize_writes_a_file_that_is_used_as_its_texts(self, cli, tokenizer, config, choosy):
        write(Path("one.txt"), "<|endoftext|>One thing. " * 9)
        write(Path("docs.jsonl"), '{"text": "Two."}\n{"text": "Ünïcode 🙂."}')
        assert cli("tokenize", "one.txt", "docs.jsonl", "out.bin").code == 0
        text = "<|endoftext|>One thing. " * 9 + "<|endoftext|>Two.<|endoftext|>Ünïcode 🙂."
        ids = tokenizer.encode(text, allowed_special="all")
        assert Path("out.bin").read_bytes() == b"".join(t.to_bytes(2, "little") for t in ids)
        assert tokens_in("out.bin") == tokens_in("one.txt,docs.jsonl") == ids
        assert measured(cli, "out.bin", choosy) == measured(cli, "one.txt,docs.jsonl", choosy)
        assert take(config | {"data": "out.bin", "max_steps": 1})

        write(Path("bad.txt"), b"caf\xe9")
        for wrong in (["one.txt", "out.txt"], ["new.bin"], ["one.txt", "bad.txt", "new.bin"]):
            assert cli("tokenize", *wrong).code == 2
        assert sorted(os.listdir()) == ["bad.txt", "docs.jsonl", "one.txt", "out.bin"]

    @cases("tokens", [[], [7, 50257, 7], [55432, 308, 1, 0]])  # the last are llm.c's first
    def test_tokens_that_are_not_gpt2s_are_refused(self, tmp_path, tokens):
        path = write(tmp_path / "some.bin", b"".join(t.to_bytes(2, "little") for t in tokens))
        refused("some.bin", lambda: tokens_in(path))
        refused("some.bin", lambda: tokens_in(write(path, b"\1\0\2")))

    @pytest.mark.skipif(os.name == "nt", reason="Windows would write the file's zeros")
    def test_a_corpus_may_be_larger_than_the_memory(self, tmp_path):
        os.truncate(write(tmp_path / "large.bin", b""), 2**40)  # zeros, none of them on the disk
        assert len(gpt2.map_tokens(tmp_path / "large.bin")) == 2**39

    @cases("context, count", [(8, 5), (1025, 5), (2500, 2)])
    def test_a_batch_scores_about_a_thousand_tokens_or_one_window(self, context, count):
        dataset = gpt2.TextDataset(torch.arange(5001), context)
        run = SimpleNamespace(machine=gpt2.Machine("cpu", "fp32"), val_set=dataset)
        for batches in (gpt2.scoring_batches(dataset), gpt2.Run.validation_batches(run)):
            sizes = [int((y != -100).sum()) for _, y in batches]
            assert (len(sizes), sum(sizes)) == (count, 5000)

    @cases("different, copies, count", [(1, 9, 0), (2, 1, 0), (2, 2, 2), (50, 2, 50), (51, 2, 0)])
    def test_labels_are_2_to_50_completions_that_come_twice(self, different, copies, count):
        rows = [("p", f" {i}") for i in range(different)] * copies
        assert len(gpt2.CompletionDataset(rows, 8).labels()) == count

    def test_classify_takes_the_most_probable_label_not_the_best_mean(self, choosy):
        labels, model = [" ham", " spam", " not spam"], read(choosy)
        dataset = gpt2.CompletionDataset([(prompt, " ham") for prompt in PROMPTS], 16)
        losses = [[losses_of(model, prompt, label) for label in labels] for prompt in PROMPTS]
        by_sum = [min(zip(map(sum, row), labels, strict=True))[1] for row in losses]
        by_mean = [min(zip(map(mean, row), labels, strict=True))[1] for row in losses]
        assert gpt2.classify(model, dataset, labels) == by_sum != by_mean and len(set(by_sum)) > 1

    def test_accuracies_of_questions_are_those_of_direct_computation(self, choosy, cli):
        choices, model = [" no", " of the thing", " a b"], read(choosy)
        rows, rights, hits = [], [], []
        for i, prompt in enumerate(PROMPTS):
            losses = [losses_of(model, prompt, choice, end=False) for choice in choices]
            best = [min(range(3), key=lambda c: by(losses[c])) for by in (sum, mean)]
            answer = (*best, 0, 1)[i % 4]
            rows.append({"prompt": prompt, "choices": choices, "answer": answer})
            rights += losses[answer]
            hits.append([answer == choice for choice in best])
        report = measured(cli, write_lines("questions.jsonl", *rows), choosy)
        by_sum, by_mean = map(mean, zip(*hits, strict=True))
        assert (report["accuracy"], report["accuracy_normalised"]) == (by_sum, by_mean)
        assert by_sum != by_mean and report["loss"] == approx(mean(rights), rel=1e-5)
        assert "majority" not in report

    def test_exact_is_the_share_of_completions_that_would_be_said(self, cli, tokenizer):
        speaking("says.pt", [*tokenizer.encode(" New York"), END])
        said = [{"prompt": "of", "completion": " New York"}]
        said += [{"prompt": "to", "completion": " New", "end": False}]  # LAMBADA's last word
        not_said = [{"prompt": "to", "completion": text} for text in (" New", " Old York", " York")]
        report = measured(cli, write_lines("a.jsonl", *said, *not_said), "says.pt")
        assert (report["exact"], report["tokens"]) == (2 / 5, 3 + 1 + 2 + 3 + 2)
        # 11 tokens, and the 31 bytes of " New York New New Old York York".
        assert report["bits_per_byte"] == approx(report["loss"] * 11 / math.log(2) / 31)
        assert "accuracy" not in report  # these are no labels

    @cases("stride", [None, 1, 3, 8, 20])
    @cases("count", [2, 8, 9, 10, 17, 95])
    def test_eval_of_a_text_is_what_tokens_and_bytes_cost(self, cli, tokenizer, stride, count):
        text = VERDICT[:300] + " <|endoftext|>Ünïcode 🙂 counts in bytes."
        ids = tokenizer.encode(text, allowed_special="all")[:count]
        text, model = tokenizer.decode(ids), read(save_model(lively(SMALL), "good.pt"))
        nats, step = 0.0, min(stride or 4, 8)
        for t in range(1, len(ids)):  # each token in the first window of 8 that reaches so far
            begin = max(0, math.ceil((t - 8) / step)) * step
            logits = model(torch.tensor([ids[begin:t]]))[0, -1].double()
            nats -= logits.log_softmax(dim=-1)[ids[t]].item()

        scored = text.removeprefix(tokenizer.decode(ids[:1])).replace("<|endoftext|>", "")
        loss, bits = nats / (len(ids) - 1), nats / math.log(2)
        expected = {"loss": loss, "perplexity": math.exp(loss), "tokens": len(ids) - 1}
        expected["bits_per_byte"] = bits / len(scored.encode())
        expected["word_perplexity"] = math.exp(nats / len(scored.split()))
        given = ["eval", write("a.txt", text), "--model=good.pt"]
        given += [f"--stride={stride}"] if stride else []
        assert json.loads(cli(*given, "--json").out) == approx(expected, rel=1e-4)
        table = [line.split() for line in cli(*given).out.splitlines()]
        assert [name for name, _ in table] == list(expected)
        assert float(table[0][1]) == approx(loss, abs=2e-4)

    def test_labels_are_those_of_the_training_set(self, cli, config, examples):
        given = {"data": str(examples), "val_fraction": 0.05, "context_length": 16, "max_steps": 1}
        take(config | given, out="run")
        report = measured(cli, examples, "run")
        assert report["accuracy"] in (0, 1) and report["majority"] == 1  # one was held back
        rows = [PAIR | {"completion": text} for text in (" ham", " ham", " ham", "spam!", "spam!")]
        result = cli("eval", "--model=run", write_lines("b.jsonl", *rows), "--json")
        assert "'spam!'" in result.err  # without its blank it is another label
        report = json.loads(result.out)
        assert report["accuracy"] <= report["majority"] == 3 / 5


# ---- 9. Runs ----


class TestRuns:
    @cases("ability, precision", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
    def test_auto_is_the_half_precision_of_a_cuda_card(self, monkeypatch, ability, precision):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ability)
        assert gpt2.pick_precision("auto", torch.device("cuda")) == precision

    def test_fp16_loses_no_small_gradients_and_skips_steps_that_overflow(self, config, tmp_path):
        """On the CPU, too. Without scaling of the loss, most gradients would be 0."""
        row = next(gpt2.train(config | FP16 | {"checkpoint_every": 1}, out=tmp_path))
        plain = next(gpt2.train(config | FP16 | {"precision": "fp32"}, out=None))
        assert row["grad_norm"] == approx(plain["grad_norm"], rel=0.05)  # as if nothing was scaled
        state = load(tmp_path / "last.pt")
        moments = [state["exp_avg"].flatten() for state in state["optimizer"]["state"].values()]
        assert (torch.cat(moments) != 0).float().mean() > 0.95

        state["scaler"]["scale"] = 2.0**24  # too much, until it has been halved some times
        gpt2.save_checkpoint(tmp_path / "last.pt", state)
        before, skipped = state["model"]["final_norm.bias"], 0
        for row in gpt2.train({"max_steps": 13}, out=tmp_path, resume=True):
            after = row["model"].final_norm.bias.detach().clone()
            assert torch.equal(before, after) == (row["grad_norm"] is None)
            skipped += row["grad_norm"] is None
            before = after
        assert 1 <= skipped < 12
        assert load(tmp_path / "last.pt")["scaler"]["scale"] == 2.0 ** (24 - skipped)

    @cases("spoil", SPOILS)
    def test_a_run_in_fp16_that_only_skips_steps_ends_with_an_error(self, config, tmp_path, spoil):
        run = gpt2.train(config | FP16 | {"checkpoint_every": 99}, out=tmp_path)
        SPOILS[spoil](next(run)["model"].final_norm)
        refused("learning_rate", lambda: list(run), FloatingPointError)
        assert 10 < len(metrics_of(tmp_path)) < 40

    def test_where_a_loss_is_no_number_rows_are_json_and_it_is_said(self, config, tmp_path, caplog):
        given = config | FP16 | {"eval_every": 1, "max_steps": 1}
        take(given, out=tmp_path, init=lively(SMALL, scale=300))
        assert "skipped at the end, where fp16 overflowed: 1" in caplog.text
        text = (tmp_path / "metrics.jsonl").read_text("utf-8")
        json.loads(text, parse_constant=raising(AssertionError(text)))
        size = (tmp_path / "loss.png").read_bytes()[16:24]  # where a PNG says it
        assert [int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")] == [700, 400]

    def test_rank_without_world_size_is_one_process_that_writes(self, cli, config, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        result = cli("train", *words(config | {"max_steps": 1}), "--out", "run")
        assert result.code == 0 and "step 1/1" in result.err
        assert load("run/last.pt")["step"] == 1

    def test_two_processes_train_as_one_and_stop_together(self, config, tmp_path):
        """At half the batch each. In step 8 one window is left, and a signal reaches the second."""
        text = write(tmp_path / "the.txt", " the" * 60)  # each window is like the others
        dropped = SMALL | {"data": str(text), "dropout_rate": 0.5, "schedule_steps": 4}
        dropped |= {"batch_size": 1, "precision": "fp32", "warmup_steps": 0}
        plain = config | {"dropout_rate": 0.0}
        given = words(plain | {"batch_size": 1, "grad_accumulation": 3})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node=2", "--no-python"]
        command += calling(work_of_torchrun, json.dumps(dropped), *given)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

        codes, measured = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
        assert codes == ("143", "143")
        assert sum(map(int, measured)) == 4 * 19  # they share what is measured four times
        assert done.stderr.count("saved step 8") == 1  # only the first process speaks

        rows, alone = metrics_of(tmp_path / "run"), take(plain)
        assert_close(rows, alone[:8])
        assert {row["tokens_per_second"] for row in rows[:7]} == {48}  # of both: a step takes 1 s
        refused("6.* 3.*--grad_accumulation 6", lambda: go_on(tmp_path / "run"))
        assert_close(take({"batch_size": 2}, out=tmp_path / "run", resume=True), alone[8:])

        # With dropout: each process has its own, and a resumed run has it again.
        assert_same_run(tmp_path / "halves", tmp_path / "whole")
        first = metrics_of(tmp_path / "whole")[0]["train_loss"]
        assert first != approx(next(gpt2.train(dropped, out=None))["train_loss"], rel=1e-5)

    def test_a_text_is_tokenised_once_into_the_folder_of_its_run(self, config, copied, monkeypatch):
        """Another text under the same name is another one, and one to validate on has its own."""
        folder, given = copied(2), config | {"val_data": config["data"], "max_steps": 1}
        for content in (VERDICT[:300], VERDICT[300:600]):
            text = write(folder / "text.txt", content)
            take(given | {"data": str(text)}, out=folder / "new", overwrite=True)
            found = [gpt2.map_tokens(path).tolist() for path in folder.glob("new/tokens-*.bin")]
            assert tokens_in(text) in found and tokens_in(config["data"]) in found

        monkeypatch.setattr(gpt2, "tokenize", raising(AssertionError("tokenised again")))
        assert go_on(folder)["step"] == 3

    @cases("step", range(1, STEPS))
    def test_resumed_from_any_step_a_run_is_bit_for_bit_the_same(self, whole, copied, step):
        folder = copied(step)
        torch.manual_seed(step)
        after = min(step + 2, STEPS)
        rows = take({"max_steps": after}, out=folder, resume=True)
        assert [row["step"] for row in rows] == list(range(step + 1, after + 1))
        assert_same_run(folder, whole / str(after))

    def test_a_run_that_goes_on_in_another_process_is_the_same(self, whole, copied):
        folder, environment = copied(14), os.environ | {"PYTHONHASHSEED": "7"}
        with start("train", "--resume", "--out", folder, env=environment) as process:
            notes = process.communicate()[1]
        assert process.returncode == 0 and "14" in re.search("resume .*", notes)[0], notes
        assert_same_run(folder, whole)

    @cases("key", KEPT)
    def test_a_change_that_makes_another_run_is_refused(self, copied, key):
        folder = copied(2)
        refused(key, lambda: go_on(folder, **{key: KEPT[key]}))
        assert go_on(folder, **{key: load(folder / "last.pt")["config"][key]})["step"] == 3

    @cases("key", SAID)
    def test_a_change_of_the_schedule_is_said_and_done(self, config, whole, copied, caplog, key):
        row = go_on(copied(2), **{key: SAID[key]})
        assert re.search(rf"{key}.*{SAID[key]:g}.*{(gpt2.CONFIG | config)[key]:g}", caplog.text)
        n_steps = {"epochs": 24, "schedule_steps": 20}.get(key, STEPS)
        changed = gpt2.CONFIG | config | {key: SAID[key]}
        assert row["total_steps"] == n_steps
        assert row["learning_rate"] == gpt2.learning_rate_at(3, changed, n_steps)
        assert row["learning_rate"] != metrics_of(whole)[2]["learning_rate"]

    def test_what_does_not_change_the_run_may_change(self, copied, config, tmp_path, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
        data = str(shutil.copy(config["data"], tmp_path / "same.txt"))
        given = {"max_steps": 5, "eval_every": 3, "checkpoint_every": 9, "sample_prompt": "He"}
        given |= {"device": "cpu", "compile": True, "patience": 9, "val_data": data}
        given |= {"data": data, "batch_size": 2, "grad_accumulation": 3}
        assert gpt2.CONFIG.keys() == given.keys() | KEPT.keys() | SAID.keys()
        rows = take(given, out=copied(2), resume=True)
        assert len(compiled) == 1 and rows[0]["sample"].startswith("He")
        assert [row["step"] for row in rows if "val_loss" in row] == [3]

    def test_other_data_are_refused(self, copied):
        folder = copied(2)
        refused("README.md.*--init.*--out", lambda: go_on(folder, data=str(HERE / "README.md")))
        assert load(folder / "last.pt")["step"] == len(metrics_of(folder)) == 2

    @cases("options", [{"out": None}, {"init": "gpt2"}, {"overwrite": True}])
    def test_resume_needs_a_run_of_its_own(self, copied, tmp_path, options):
        refused("resume", lambda: next(gpt2.train(**{"out": copied(2), "resume": True} | options)))
        refused(str(tmp_path), lambda: go_on(tmp_path), FileNotFoundError)
        (tmp_path / "run" / "last.pt").unlink()  # killed between the two files of its first save
        refused("--init .*best.pt", lambda: go_on(tmp_path / "run"), FileNotFoundError)

    @cases("epochs, steps, stop", [(0.25, 0, 0), (2.0, 2, 0), (2.0, 0, 2), (0.25, 0, 2)])
    def test_what_a_finished_run_advises_goes_on(self, config, tmp_path, epochs, steps, stop):
        given = {"epochs": epochs, "schedule_steps": steps, "max_steps": stop, "eval_every": 99}
        assert len(take(config | given, out=tmp_path)) == 2
        with pytest.raises(ValueError, match=r"finished|beyond max_steps") as told:
            go_on(tmp_path, epochs=epochs if stop else epochs / 3)  # a third is finished, too
        advice = re.findall(r"--(\w+) ([\d.]+)", str(told.value))
        given = {key: type(gpt2.CONFIG[key])(value) for key, value in advice}
        assert go_on(tmp_path, **given)["step"] == 3

    def test_a_run_goes_on_in_the_precision_that_auto_was(self, config, tmp_path, monkeypatch):
        """It began where the CPU computes bf16 and goes on where that does not."""
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        folder, begun = tmp_path / "run", config | {"precision": "auto", "schedule_steps": 3}
        take(begun, out=tmp_path / "whole")
        next(gpt2.train(begun, out=folder))
        assert load(folder / "last.pt")["config"]["precision"] == "bf16"

        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        refused("precision.*bf16", lambda: go_on(folder, precision="fp32"))
        take({"precision": "auto"}, out=folder, resume=True)
        assert_same_run(folder, tmp_path / "whole")

    @cases("place, value", [*ODD_STATES, ("config", Trap())])
    def test_a_save_that_does_not_hold_together_is_refused(self, copied, monkeypatch, place, value):
        monkeypatch.chdir(copied(3))
        state = part = load("last.pt")
        *path, key = [int(name) if name.isdigit() else name for name in place.split("/")]
        for name in path:
            part = part[name]
        part[key] = value
        if value == "gone":
            del part[key]
        torch.save(state, "last.pt")
        refused(f"last.pt|{key}", lambda: go_on("."))
        assert len(metrics_of(Path())) == 3 and not Path("trapped").exists()

    def test_rows_after_the_last_save_are_cut_and_written_again(self, whole, copied):
        folder = copied(14)
        shutil.copy(whole / "16" / "metrics.jsonl", folder)
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 17, "ep')  # a kill within a row
        take({}, out=folder, resume=True)
        assert_same_run(folder, whole)

    @cases("line", ["", "7", "[]", '{"a": 1}', '{"step": "x"}', "words"])
    def test_rows_that_are_lost_or_damaged_are_warned_of(self, copied, caplog, line):
        folder = copied(14)
        first = (folder / "metrics.jsonl").read_text("utf-8").partition("\n")[0]
        write(folder / "metrics.jsonl", f"{first}\n{line}\n")
        assert go_on(folder)["step"] == 15
        assert [row["step"] for row in metrics_of(folder)] == [1, 15]
        assert "metrics.jsonl holds 1 rows only" in caplog.text

    def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(self, config, whole, tmp_path):
        run = gpt2.train(config | {"checkpoint_every": 2}, out=tmp_path)
        next(run)
        refused("another process", lambda: next(gpt2.train(config, out=tmp_path)))  # before a save
        next(run)
        refused("another process", lambda: go_on(tmp_path))
        refused("another", lambda: next(gpt2.train(config, out=tmp_path, overwrite=True)))
        run.close()
        take({}, out=tmp_path, resume=True)  # the lock is gone with the run
        assert_same_run(tmp_path, whole)

    def test_a_disk_without_locks_is_trained_on_with_a_warning(self, config, monkeypatch, cli):
        monkeypatch.setattr(gpt2, "lock", raising(OSError(37, "No locks available")))
        result = cli("train", *words(config | {"max_steps": 1}))
        assert result.code == 0 and "cannot be locked" in result.err

    def test_on_windows_a_byte_is_locked_that_nobody_reads(self, tmp_path, monkeypatch):
        held = []
        stand_in = SimpleNamespace(LK_NBLCK=2, locking=lambda *given: held.append(given[1:]))
        monkeypatch.setitem(sys.modules, "msvcrt", stand_in)
        with open(tmp_path / "metrics.jsonl", "ab") as file, monkeypatch.context() as windows:
            windows.setattr(os, "name", "nt")
            gpt2.lock(file)
            held.append(file.tell())
            assert gpt2.quoted(["a b", "c"]) == '"a b" c'  # not in the quotes of other shells
        assert held == [(2, 1), 2**30] and not os.path.getsize(tmp_path / "metrics.jsonl")

    @cases("out", ["file", "file/below", "folder"])
    def test_a_folder_is_tried_before_the_first_step(self, config, tmp_path, monkeypatch, out):
        write(tmp_path / "file", "precious")
        (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
        monkeypatch.setattr(gpt2, "train_step", raising(AssertionError("a step was taken")))
        refused(out, lambda: next(gpt2.train(config, out=tmp_path / out)), OSError)
        assert (tmp_path / "file").read_text() == "precious"

    def test_a_run_is_replaced_with_overwrite_only_and_at_the_first_save(self, copied, config):
        folder = copied(12)
        write(folder / "last.pt.part", "left by a kill")
        refused("--resume.*--overwrite.*--out", lambda: next(gpt2.train(config, out=folder)))
        last = shutil.move(folder / "last.pt", folder / "moved.pt")  # best.pt is a run's, too
        refused("--resume.*--overwrite.*--out", lambda: next(gpt2.train(config, out=folder)))
        shutil.move(last, folder / "last.pt")
        wrong = config | {"context_length": 999}
        refused("999", lambda: next(gpt2.train(wrong, out=folder, overwrite=True)))
        assert len(metrics_of(folder)) == 12
        given = config | {"val_fraction": 0.0, "checkpoint_every": 2, "max_steps": 2}
        run = gpt2.train(given, out=folder, overwrite=True)
        next(run)
        assert load(folder / "last.pt")["step"] == 12 and (folder / "best.pt").exists()
        assert len(list(run)) == 1
        assert load(folder / "last.pt")["step"] == len(metrics_of(folder)) == 2
        assert left_in(folder) == ["last.pt", "loss.png", "metrics.jsonl"]

    @cases("epochs, every, saved", [(2.0, 0, [2, 4, 6, 8]), (20.0, 0, [8]), (2.0, 3, [3, 6])])
    def test_a_run_is_saved_on_the_way(self, config, tmp_path, epochs, every, saved):
        given = {"val_fraction": 0.0, "epochs": epochs, "checkpoint_every": every}
        path, steps = tmp_path / "last.pt", []
        for row in itertools.islice(gpt2.train(config | given, out=tmp_path), 8):
            steps += [row["step"]] if path.exists() and load(path)["step"] == row["step"] else []
        assert steps == saved

    def test_a_run_is_saved_when_ten_minutes_have_passed(self, config, tmp_path, monkeypatch):
        a_clock(monkeypatch, step=200.2)
        run, path, saved = gpt2.train(config | RARELY, out=tmp_path), tmp_path / "last.pt", []
        for row in itertools.islice(run, 7):
            saved.append(load(path)["step"] if path.exists() else 0)
            assert "val_loss" not in row
        assert saved == [0, 0, 3, 3, 3, 6, 6]

    def test_best_is_the_model_of_the_lowest_loss_and_training_on_leaves_it(self, config, tmp_path):
        """At so high a rate the lowest loss is soon behind. It is saved at once."""
        given = config | {"data": str(write(tmp_path / "once.txt", VERDICT[:700]))}
        given |= {"learning_rate": 0.1, "eval_every": 1, "checkpoint_every": 4, "max_steps": 9}
        losses = []
        for row in gpt2.train(given, out=tmp_path):
            losses.append(row["val_loss"])
            best = load(tmp_path / "best.pt")
            assert best["step"] == best["best_step"] == losses.index(min(losses)) + 1
            assert load(tmp_path / "last.pt")["step"] >= row["step"] // 4 * 4
        assert mean_loss(read(tmp_path), held_back(given)) == approx(min(losses), rel=1e-6)
        assert 1 < best["step"] < 9 and load(tmp_path / "last.pt")["step"] == 9

    def test_a_checkpoint_holds_what_its_format_says(self, whole):
        """Whoever changes the format must still read this one, and says so by another version."""
        best, last = load(whole / "best.pt"), load(whole / "last.pt")
        keys = {"version", "config", "model", "labels", "items_per_step", "data_sha256", "stale"}
        keys |= {"step", "tokens_seen", "best_step", "best_val_loss"}
        assert best.keys() == keys and last.keys() == keys | {"optimizer", "scaler"}
        assert last["version"] == gpt2.VERSION == "2.0"
        assert last["config"].keys() == gpt2.CONFIG.keys()
        assert [len(group["params"]) for group in last["optimizer"]["param_groups"]] == [6, 10]

    @cases("call, a_step", [("fsync", 3), ("replace", 2)])  # best.pt, metrics.jsonl, last.pt
    def test_a_failed_save_harms_nothing(self, config, tmp_path, call, a_step, monkeypatch, caplog):
        """For every k, the k-th call fails once. It is an error only where the last save fails."""
        given = {"max_steps": 2, "eval_every": 1, "checkpoint_every": 1, "learning_rate": 0.02}
        take(config | given, out=tmp_path / "whole")
        real, error = getattr(os, call), OSError(28, "No space left on device")
        for k in range(1, 2 * a_step + 2):
            folder = tmp_path / str(k)
            others = shutil.ignore_patterns("*.pt", "*.jsonl", "*.png")
            shutil.copytree(tmp_path / "whole", folder, ignore=others)  # the tokens are there
            caplog.clear()
            monkeypatch.setattr(os, call, at_call(k, raising(error), real))
            failed = math.ceil(k / a_step)  # in "step 3": the picture
            run = gpt2.train(config | given, out=folder)
            for step in (1, 2):
                next(run)
                assert all(read(path) for path in folder.glob("*.pt"))
                assert not list(folder.glob("*.part"))
                assert step == failed or load(folder / "last.pt")["step"] == step
            if failed == 2:
                refused("step 2.*not saved", lambda run=run: next(run), OSError)
            else:
                assert list(run) == []
                assert_same_run(folder, tmp_path / "whole")
            assert "No space left" in caplog.text

    @cases("third, kept", [(4.0, 3), (6.0, 1)])
    @cases("resumed", [False, True])
    def test_best_is_the_lowest_saved(self, config, tmp_path, monkeypatch, third, kept, resumed):
        """Measured are 5, 3 and a third; the disk is full when 3 is to be saved."""
        losses = iter([5.0, 3.0, third])
        monkeypatch.setattr(gpt2, "evaluate", lambda *given: next(losses))
        run = gpt2.train(config | {"eval_every": 1, "checkpoint_every": 9}, out=tmp_path)
        next(run)
        if resumed:
            run.close()
            run = gpt2.train({}, out=tmp_path, resume=True)
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
            next(run)
        next(run)
        assert load(tmp_path / "best.pt")["step"] == kept

    def test_after_an_error_inside_a_step_the_last_save_stays(self, config, tmp_path, monkeypatch):
        """The weights may be changed by half."""
        before_step(monkeypatch, 4, raising(RuntimeError("a bug")))
        run = gpt2.train(config | {"checkpoint_every": 2, "eval_every": 9}, out=tmp_path)
        refused("a bug", lambda: list(run), RuntimeError)
        assert load(tmp_path / "last.pt")["step"] == 2

    def test_a_stopped_run_says_why_its_save_failed(self, config, tmp_path, monkeypatch, caplog):
        next(run := gpt2.train(config, out=tmp_path))
        monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
        refused("step 1.*not saved", run.close, OSError)
        assert "No space left" in caplog.text

    @cases("figure", [None, SimpleNamespace(Figure=raising(ValueError("no font")))])
    def test_a_run_without_a_picture_succeeds(self, cli, config, monkeypatch, figure):
        """Matplotlib is not installed; or it is, and drawing fails."""
        monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
        result = cli("train", *words(config | {"max_steps": 1}), "--out", "run")
        assert result.code == 0 and "loss.png" in result.err
        assert left_in("run") == ["last.pt", "metrics.jsonl"]

    def test_the_picture_shows_both_losses_and_the_lowest(self, whole, monkeypatch):
        from matplotlib.figure import Figure

        drawn = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
        gpt2.plot_losses(whole / "metrics.jsonl", io.BytesIO())
        trained = [(row["step"], row["train_loss"]) for row in metrics_of(whole)]
        measured = [(r["step"], r["val_loss"]) for r in metrics_of(whole) if "val_loss" in r]
        lines = [list(zip(*line.get_data(), strict=True)) for line in drawn[0].lines]
        assert lines == [trained, measured, [min(measured, key=lambda point: point[1])]]
        assert drawn[0].get_ylim()[0] == 0 and len(drawn[0].get_legend().get_texts()) == 3

    @long_test
    def test_a_run_under_kill_9_can_be_resumed_to_the_same_end(self, config, tmp_path):
        given = config | {"epochs": 3.0, "eval_every": 1, "checkpoint_every": 1}
        take(given, out=tmp_path / "whole")
        for i in range(4):
            folder = tmp_path / str(i)
            while not (folder / "last.pt").exists() or load(folder / "last.pt")["step"] < 24:
                how = ["--resume"] if (folder / "last.pt").exists() else words(given)
                with start("train", *how, "--out", folder) as process:
                    if any(line.startswith("step ") for line in iter(process.stderr.readline, "")):
                        time.sleep(random.uniform(0, 0.4))  # no matter where it strikes
                    process.kill()
            assert_same_run(folder, tmp_path / "whole")

    @long_test
    def test_a_full_disk_loses_nothing_saved(self, config, tmp_path, caplog, request):
        mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", tmp_path]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", tmp_path], check=True))
        given = config | {"val_fraction": 0.0, "checkpoint_every": 1}
        run, path = gpt2.train(given, out=tmp_path), tmp_path / "last.pt"
        next(run)
        before = path.read_bytes()
        with open(tmp_path / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        for step in range(2, 16):
            next(run)
            assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))
            assert f"step {step} was not saved" in caplog.text
        (tmp_path / "filler").unlink()
        assert len(list(run)) == 1
        assert load(path)["step"] == len(metrics_of(tmp_path)) == 16


# ---- 10. Pretrained ----

LETTERS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}
LETTERS |= {torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL"}


WRONG_CONFIG = {"model_type": "llama", "activation_function": "gelu", "layer_norm_epsilon": 1e-6}
WRONG_CONFIG |= {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
WRONG_CONFIG |= {"tie_word_embeddings": False, "n_embd": "wide", "n_head": 5, "n_positions": 9}


OTHER_WEIGHTS = {  # what is said of them, and what is other than in GPT-2
    "score.weight is a head of 2 labels": {"score.weight": torch.ones(2, 12)},
    "quantised": {"h.0.mlp.c_fc.weight": torch.ones(12, 48, dtype=torch.int8)},
    "untied": {"lm_head.weight": torch.ones(61, 12)},
    "extra": {"extra.weight": torch.ones(61, 12)},
    "position_embedding": {"wpe.weight": torch.ones(8)},
    "1.*2.bias is missing": {"h.1.ln_2.bias": None},
    "token_embedding.weight is missing": {"wte.weight": None},
}


NO_MODELS = {"adapter": "adapter_config.json adapter_model.safetensors", "config.json": "readme.md"}
NO_MODELS |= {"TensorFlow": "config.json tf_model.h5", "model.safetensors": "config.json"}


def write_tensors(path, tensors, **edit):
    """A writer of safetensors, from its description; `edit` spoils the entry of one tensor."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entry = {"dtype": LETTERS[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
        header[name] = entry | (edit if name == "h.0.ln_1.weight" else {})
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(path):
    """A strict reader of float32 safetensors, from its description: no gap, no overlap, no rest."""
    content = path.read_bytes()
    begin = end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers asks for it
    assert content[8:9] == b"{" and begin % 8 == 0
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (begin + offset for offset in entry["data_offsets"])
        assert entry.keys() == {"dtype", "shape", "data_offsets"}
        assert (start, entry["dtype"]) == (end, "F32")
        values = torch.frombuffer(bytearray(content[start:stop]), dtype=torch.float32)
        tensors[name], end = values.view(entry["shape"]), stop
    assert end == len(content)
    return tensors


def read_json_of(folder, name="config.json"):
    """The content of a JSON file of a folder."""
    return json.loads((folder / name).read_text("utf-8"))


def edit_config(folder, **changes):
    """Change config.json; a key that becomes "gone" is left out."""
    config = {key: x for key, x in (read_json_of(folder) | changes).items() if x != "gone"}
    write(folder / "config.json", json.dumps(config))


def nano_checkpoint(model, bias=True, **changes):
    """What nanoGPT saves: its own names of the config, OpenAI's of weights, output × input."""
    weights = {}
    for name, tensor in openai_weights(model).items():
        if bias or not name.endswith(".bias"):
            matrix = tensor.dim() == 2 and name.startswith("h.")
            weights["_orig_mod.transformer." + name] = tensor.t() if matrix else tensor
    weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
    args = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 8, "vocab_size": 61}
    return {"model_args": args | {"bias": bias, "dropout": 0.0} | changes, "model": weights}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder that a tiny model without biases for queries, keys and values was exported to."""
    folder = tmp_path_factory.mktemp("exported") / "deep" / "folder"
    lively(TINY | {"qkv_bias": False, "dropout_rate": 0.2}).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path, monkeypatch):
    """A copy of it, in a working directory of its own, with the weights of lively(TINY)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, "folder")
    write_tensors(Path("folder/model.safetensors"), openai_weights(lively(TINY)))
    return Path("folder")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder instead of Hugging Face's hub, and a tiny gpt2; the place of its weights."""
    monkeypatch.setenv("HF_ENDPOINT", f"{tmp_path.as_uri()}/hub")
    monkeypatch.setenv("TORCH_HOME", "home")
    monkeypatch.setitem(gpt2.OPENAI_SIZES, "gpt2", TINY | {"dropout_rate": 0.1})
    monkeypatch.chdir(tmp_path)
    return write(Path("hub/openai-community/gpt2/resolve/main/model.safetensors"), "")


class TestPretrained:
    @cases("name", gpt2.OPENAI_SIZES)
    def test_openais_sizes_are_those_of_the_readme(self, cli, caplog, name):
        row = re.search(rf"\| `{name}` \| (.*)", README)[1]
        sizes, parameters, rate, memory, *_ = row.split(" | ")
        fixed = {"vocab_size": 50257, "context_length": 1024, "qkv_bias": True, "dropout_rate": 0.1}
        sizes = zip(("n_layers", "n_heads", "emb_dim"), map(int, sizes.split(",")), strict=True)
        size = fixed | dict(sizes) | {"learning_rate": float(rate)}
        assert gpt2.OPENAI_SIZES[name] == size and len(gpt2.OPENAI_SIZES) == 4
        assert re.search(rf"parameters +{parameters}\n", cli("info", name).out)

        # And so is the memory that a run of it says it needs.
        data = SimpleNamespace(size=lambda: "a text")
        gpt2.announce(gpt2.CONFIG | size, gpt2.Machine("cpu", "fp32"), data, None)
        assert f"{memory} for weights" in caplog.text

    def test_an_export_has_openais_names_and_layout_and_is_read_back(self, exported):
        weights = openai_weights(lively(TINY | {"qkv_bias": False}).bfloat16().float())
        tensors = read_tensors(exported / "model.safetensors")  # a bias that is missing is 0
        assert same(tensors, weights) and tensors["h.0.attn.c_attn.weight"].shape == (12, 36)
        said = {"vocab_size": 61, "n_positions": 8, "n_ctx": 8, "n_embd": 12, "n_head": 3}
        said |= {"n_layer": 2, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        said |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
        said |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        said |= dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.2)
        assert read_json_of(exported) == said | {"tie_word_embeddings": True}
        assert same(openai_weights(read(exported)), weights)
        assert read(exported).config == TINY | {"dropout_rate": 0.2}
        assert sorted(os.listdir(exported)) == ["config.json", "model.safetensors"]  # no tokenizer

    def test_an_export_says_where_texts_end_and_cuts_a_padded_vocabulary(self, tmp_path):
        padded, new = lively(SMALL | {"vocab_size": 50304}), tmp_path / "new"
        padded.save_pretrained(new)
        assert padded.config["vocab_size"] == 50304
        weight = read_tensors(new / "model.safetensors")["wte.weight"]
        assert torch.equal(weight, padded.token_embedding.weight[:50257])
        assert read(new).config == SMALL
        ends = {"bos_token_id": END, "eos_token_id": END}
        assert read_json_of(new).items() >= ends.items()
        assert read_json_of(new, "generation_config.json") == ends
        tokens = read_json_of(new, "tokenizer_config.json")
        assert tokens["model_max_length"] == 8 and tokens["tokenizer_class"] == "GPT2Tokenizer"
        assert {tokens[key] for key in ("bos_token", "eos_token", "unk_token")} == {"<|endoftext|>"}

    def test_an_export_read_as_transformers_does_says_the_same(self, cli):
        """A GPT-2 that knows nothing of ours but the files in the folder."""
        model, new = lively(SMALL | {"n_layers": 2, "dropout_rate": 0.1}), Path("new")
        assert cli("export", new, "--model", save_model(model, "model.pt")).code == 0
        weights, said = read_tensors(new / "model.safetensors"), read_json_of(new)
        ids = some_ids(1, 8, vocab=50257)
        expected = reference_logits(weights, said["n_head"], ids[0])
        assert torch.allclose(model(ids)[0].double(), expected, atol=1e-4)
        assert {name: sha256(new / name) for name in VOCABULARY} == VOCABULARY
        assert len(os.listdir(new)) == 6  # with the weights and three files of JSON

    def test_a_model_whose_parts_were_changed_is_not_exported(self, tmp_path):
        model = lively(SMALL)
        nn.utils.parametrizations.weight_norm(model.blocks[0].feed_forward.expand)
        refused("feed_forward.expand.weight", lambda: model.save_pretrained(tmp_path / "new"))

    @cases("old", ["other.bin", "model/config.json"])
    def test_only_a_new_folder_is_exported_to(self, tmp_path, exported, old):
        write(tmp_path / old, "")  # perhaps weights, which would be read instead of the new
        refused("not empty", lambda: read(exported).save_pretrained(tmp_path))

    @cases("prefix", ["", "transformer.", "module._orig_mod.transformer.", "_module.", "model."])
    @cases("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_a_folder_of_each_kind_is_read(self, folder, prefix, dtype):
        """With a prefix there are a head and masks, as in older files."""
        model = lively(TINY | {"n_layers": 11, "emb_dim": 6}).to(dtype).float()
        edit_config(folder, n_layer=11, n_embd=6)
        weights = {name: tensor.to(dtype) for name, tensor in openai_weights(model).items()}
        tensors = {prefix + name: tensor for name, tensor in weights.items()}
        for layer, mask in ((0, torch.uint8), (10, torch.bool)) if prefix else ():
            tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=mask).tril()
            tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            tensors["lm_head.weight"] = weights["wte.weight"].clone()
        if prefix == "model.":  # a tied file may hold the head alone
            del tensors["model.wte.weight"]
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        assert same(read(folder).state_dict(), model.state_dict())
        write_tensors(folder / "model.safetensors", tensors)
        torch.save({}, folder / "pytorch_model.bin")  # which is not read any more
        assert same(read(folder).state_dict(), model.state_dict()) and not read(folder).training

    def test_shards_are_read_by_an_index_or_all_and_a_missing_one_is_said(self, folder):
        (folder / "model.safetensors").unlink()
        weights = openai_weights(lively(TINY))
        shards = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
        index = {name: shards[i % 2] for i, name in enumerate(weights)}
        for shard in shards:
            part = {name: weights[name] for name in index if index[name] == shard}
            write_tensors(folder / shard, part)
        assert same(read(folder).state_dict(), lively(TINY).state_dict())
        write_tensors(folder / "model-old.safetensors", {"wte.weight": weights["wte.weight"] + 1})
        write(folder / "model.safetensors.index.json", json.dumps({"weight_map": index}))
        assert same(read(folder).state_dict(), lively(TINY).state_dict())
        (folder / shards[1]).unlink()
        refused(shards[1], lambda: read(folder))

    def test_a_config_may_say_the_same_in_other_words(self, folder):
        others = [{"activation_function": name} for name in ("gelu_pytorch_tanh", "gelu_fast")]
        others += [{"n_positions": "gone"}, {"n_ctx": "gone", "n_positions": 8}, {"n_inner": None}]
        others += [{"model_type": "gone", "activation_function": "gone", "resid_pdrop": "gone"}]
        for change in others:
            edit_config(folder, **change)
            assert torch.equal(read(folder)(some_ids(1, 8)), lively(TINY)(some_ids(1, 8)))
        assert read(folder).config["dropout_rate"] == 0.1  # as OpenAI has it

    @cases("key", WRONG_CONFIG)
    def test_a_config_that_does_not_fit_is_refused(self, folder, key):
        edit_config(folder, **{key: WRONG_CONFIG[key]})
        ours = {"n_embd": "emb_dim", "n_head": "n_heads", "n_positions": "position_embedding"}
        refused(f"folder.*{ours.get(key, key)}", lambda: read(folder))
        edit_config(folder, n_layer=3)
        refused("folder", lambda: read(folder))

    @cases("cause", OTHER_WEIGHTS)
    def test_weights_of_another_kind_of_model_are_refused(self, folder, cause):
        weights = openai_weights(lively(TINY)) | OTHER_WEIGHTS[cause]
        weights = {key: value for key, value in weights.items() if value is not None}
        write_tensors(folder / "model.safetensors", weights)
        refused(f"folder.*{cause}", lambda: read(folder))

    @cases("cause", NO_MODELS)
    def test_a_folder_that_holds_no_model_says_what_it_is(self, tmp_path, cause):
        for name in NO_MODELS[cause].split():
            write(tmp_path / "some" / name, "{}")
        refused(f"some.*{cause}", lambda: read(tmp_path / "some"))

    @cases("name", ["vocab.json", "tokenizer.json"])
    def test_a_tokenizer_that_is_not_gpt2s_is_refused(self, folder, name):
        lively(SMALL).save_pretrained("new")
        words = read_json_of(Path("new"), "vocab.json")
        said = words if name == "vocab.json" else {"model": {"vocab": words}}
        write(folder / name, json.dumps(said))
        assert read(folder)
        words["Ġthe"], words["Ġof"] = words["Ġof"], words["Ġthe"]
        write(folder / name, json.dumps(said))
        refused("folder.*tokenizer", lambda: read(folder))

    @cases("bias", [True, False])
    def test_nanogpts_checkpoint_is_read_with_zeros_for_biases_it_lacks(self, tmp_path, bias):
        """Also one in the format that torch.save had before PyTorch 1.6."""
        model, form = lively(TINY), {"_use_new_zipfile_serialization": bias}
        torch.save(nano_checkpoint(model, bias), tmp_path / "ckpt.pt", **form)
        for name, parameter in model.named_parameters():
            parameter.data.mul_(bias or not name.endswith(".bias"))
        found = read(tmp_path / "ckpt.pt")
        assert same(found.state_dict(), model.state_dict()) and found.config == TINY
        assert gpt2.main(["info", str(tmp_path / "ckpt.pt")]) == 0

    def test_what_is_no_checkpoint_is_named_and_nothing_in_it_is_run(self, cli):
        weights = lively(TINY).state_dict()
        good = {"config": TINY, "model": weights}
        bad = [weights, [1], good | {"model": {}}, good | {"model": [1]}, good | {"config": 5}]
        bad += [good | {"config": TINY | {"n_heads": 5}}, good | {"config": TINY | {"emb_dim": 6}}]
        bad += [good | {"model": weights | more} for more in ({"x": {}}, {"final_norm.bias": 5})]
        bad += [good | {"model": Trap()}, {"model_args": {}, "model": Trap()}]
        for content in bad:
            torch.save(content, "bad.pt")
            refused("bad.pt", lambda: read("bad.pt"))
        assert not Path("trapped").exists()

    def test_a_million_layers_are_refused_before_one_is_built(self, folder, monkeypatch):
        edit_config(folder, n_layer=10**6)
        checkpoint = {"config": TINY | {"n_layers": 10**6}, "model": lively(TINY).state_dict()}
        torch.save(checkpoint, "ours.pt")
        torch.save(nano_checkpoint(lively(TINY), n_layer=10**6), "nano.pt")
        monkeypatch.setattr(gpt2, "TransformerBlock", raising(SystemExit("a layer was built")))
        for name in ("folder", "ours.pt", "nano.pt"):
            refused(name, lambda name=name: read(name))

    def test_a_damaged_file_is_named_and_nothing_in_it_is_run(self, folder):
        good = save_model(lively(TINY), Path("good.pt")).read_bytes()
        trap = pickle.dumps(Trap(), 2)
        for content in (b"", b"words " * 99, good[:9000], good[:-1], trap):
            refused("bad.pt", lambda content=content: read(write(Path("bad.pt"), content)))
            refused("bad.pt", lambda: gpt2.load_checkpoint("bad.pt", mmap=False))  # as to resume
        path = folder / "model.safetensors"
        good = path.read_bytes()
        for content in (good[:-100], b"", b"\2\0\0\0\0\0\0\0[]", b"word " * 99):
            path.write_bytes(content)
            refused("model.safetensors", lambda: read(folder))
        for edit in ({"data_offsets": [10**9, 10**9 + 48]}, {"shape": ["x"]}, {"dtype": "F4"}):
            write_tensors(path, openai_weights(lively(TINY)), **edit)
            refused("model.safetensors", lambda: read(folder))
        path.unlink()
        write(folder / "pytorch_model.bin", trap)
        refused("folder", lambda: read(folder))
        write(folder / "config.json", '{"n_embd": 12')
        refused("folder.config.json", lambda: read(folder))
        assert not Path("trapped").exists()

    @cases("name", ["folder/model.safetensors", "ckpt.pt"])
    def test_a_git_lfs_pointer_says_how_to_get_the_weights(self, folder, name):
        write(Path(name), "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\n")
        refused(f"{name}.*git lfs pull", lambda: read(name.partition("/")[0]))

    def test_a_checkpoint_of_the_version_before_is_read_but_not_resumed(self, tmp_path):
        weights = lively(TINY).state_dict()
        del weights["head.weight"]  # the tied head is new, and so is the key "version"
        torch.save({"config": TINY, "model": weights, "step": 5}, tmp_path / "last.pt")
        assert same(read(tmp_path).state_dict(), lively(TINY).state_dict())
        refused("earlier version.*--init", lambda: go_on(tmp_path))

    def test_of_a_runs_folder_the_best_model_is_read_else_the_last(self, tmp_path):
        for name, seed in (("last.pt", 1), ("best.pt", 2)):
            save_model(lively(TINY, seed=seed), tmp_path / name)
            assert same(read(str(tmp_path)).state_dict(), lively(TINY, seed=seed).state_dict())

    def test_a_name_is_downloaded_once_and_what_lies_here_comes_first(self, hub, caplog):
        write_tensors(hub, openai_weights(lively(TINY)))
        assert same(read("gpt2").state_dict(), lively(TINY).state_dict())
        hub.unlink()
        assert same(read("gpt2").state_dict(), lively(TINY).state_dict())
        assert caplog.text.count("download ") == 1  # half a gigabyte is not loaded in silence
        assert not read("gpt2").training
        save_model(lively(TINY, seed=5), "gpt2")
        assert same(read("gpt2").state_dict(), lively(TINY, seed=5).state_dict())

    def test_offline_the_address_and_the_file_to_put_there_are_named(self, hub, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # where nobody answers
        address = "http://127.0.0.1:1/openai-community/gpt2/resolve/main/model.safetensors"
        path = Path("home/hub/checkpoints/gpt2.safetensors")
        refused(f"{address}.*{path}", lambda: read("gpt2"), OSError)
        refused("delete it", lambda: write(path, b"half") and read("gpt2"))  # a connection broke
        write_tensors(path, openai_weights(lively(TINY)))
        assert same(read("gpt2").state_dict(), lively(TINY).state_dict())

    def test_a_folder_called_gpt2_is_a_model_or_says_that_it_hides_one(self, hub):
        Path("gpt2").mkdir()
        refused("folder gpt2", lambda: read("gpt2"))
        save_model(lively(TINY, seed=3), "gpt2/best.pt")  # a run with --out gpt2
        assert same(read("gpt2").state_dict(), lively(TINY, seed=3).state_dict())
        refused("gpt3.*gpt2-xl", lambda: read("gpt3"), FileNotFoundError)

    @pytest.mark.skipif(
        not os.environ.get("GPT2_REAL_WEIGHTS"), reason="GPT2_REAL_WEIGHTS=1: 0.5 GB"
    )
    def test_openais_weights_say_of_turing_what_others_report(self, tokenizer):
        prompt = "Alan Turing theorized that computers would one day become"
        expected = " the most powerful machines on the planet.\n\nThe computer is a machine that "
        expected += "can perform complex calculations, and it can perform these calculations in a "
        expected += "way that is very similar to the human brain."
        ids = gpt2.text_to_token_ids(prompt, tokenizer)
        ids = gpt2.generate(read("gpt2"), ids, len(tokenizer.encode(expected)))
        assert gpt2.token_ids_to_text(ids, tokenizer) == prompt + expected


# ---- 11. Fast CPUs ----


def fast_parts(model):
    """The kinds of faster modules that a model has."""
    kinds = {gpt2.FewRowsLinear, gpt2.Int8Linear, gpt2.Int8Embedding}
    return {type(module) for module in model.modules()} & kinds


def bytes_of(model):
    """The memory of all tensors that a model's modules hold, each once."""
    held = [value for module in model.modules() for value in vars(module).values()]
    tensors = [x for x in held if isinstance(x, torch.Tensor)]
    storages = [x.untyped_storage() for x in (*tensors, *model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class TestFastCPUs:
    @cases("rows", [1, 2, 4, 5, 63, 128, 129])
    @cases("outputs", [48, 336, 250, 331, 29])
    @cases("bias", [True, False])
    def test_products_of_few_rows_equal_those_of_a_plain_linear(self, rows, outputs, bias):
        linear, x = nn.Linear(40, outputs, bias=bias), torch.randn(rows, 40)
        fast = gpt2.FewRowsLinear(linear)
        assert len(fast.pieces) > 20 or outputs == 331  # some for each core; 331 is a prime
        for shape in ((rows, 40), (1, rows, 40), (rows, 1, 40)):
            found, expected = fast(x.view(shape)), linear(x.view(shape))
            assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)

    @cases("rows", [1, 8, 63, 64, 200])
    @cases("width", [64, 48, 24, 12, 7])
    @cases("bias", [True, False])
    @torch.no_grad()
    def test_int8_products_are_those_of_a_plain_linear_up_to_rounding(self, rows, width, bias):
        linear, x = nn.Linear(width, 96, bias=bias), torch.randn(2, rows, width)
        linear.weight.mul_(torch.logspace(-3, 3, 96)[:, None])  # each row has its own scale
        linear.weight[7] = 0  # as a padded vocabulary may have it
        found, expected = gpt2.Int8Linear(linear)(x), linear(x)
        size = x.abs() @ linear.weight.abs().t() + expected.abs() + 1e-9
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert ((found - expected).abs() / size).max() < 0.02

    def test_int8_keeps_no_other_copy_of_a_matrix_and_looks_tokens_up_in_it(self):
        size = SMALL | {"emb_dim": 64, "n_heads": 4, "n_layers": 2}
        model, plain, ids = lively(size), lively(size), some_ids(3, 5, vocab=50257)
        assert bytes_of(gpt2.speed_up(model, "int8")) <= 0.3 * bytes_of(plain)
        found, expected = model.token_embedding(ids), plain.token_embedding(ids)
        assert found.shape == (3, 5, 64) and (found - expected).abs().max() < 0.01

    @cases("precision, near", [("auto", 1e-5), ("int8", 0.3), ("bf16", 0.05), ("fp16", 0.01)])
    def test_generate_and_eval_use_the_fast_parts(self, cli, monkeypatch, precision, near):
        """By default they compute in fp32, also where the CPU computes bf16."""

        def spy(module, *given, real=gpt2.GPT2.forward, **named):
            used.append((frozenset(fast_parts(module)), next(module.parameters()).dtype))
            return real(module, *given, **named)

        model = lively(SMALL | {"emb_dim": 192, "context_length": 32}, scale=1.0)
        nn.init.zeros_(model.final_norm.bias)  # and it says more than one word
        options = ["--json", "--precision", precision, "--model", save_model(model, "model.pt")]
        ids = gpt2.generate(model, torch.tensor([[END]]), 20, eos_id=END)
        windows = gpt2.TextDataset(tokens_in(write("a.txt", VERDICT[:400])), 32)
        loss, used = gpt2.evaluate(model, gpt2.scoring_batches(windows, 16)), []
        monkeypatch.setattr(gpt2.GPT2, "forward", spy)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})

        said = json.loads(cli("generate", "<|endoftext|>", "--max_tokens=20", *options).out)
        report = json.loads(cli("eval", "a.txt", *options).out)
        kinds = {"auto": {gpt2.FewRowsLinear}, "int8": {gpt2.Int8Linear, gpt2.Int8Embedding}}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        assert len(used) > 20 and set(used) == {(frozenset(kinds.get(precision, ())), dtype)}
        assert report["loss"] == approx(loss, abs=near)
        if precision == "auto":
            text = gpt2.token_ids_to_text(ids[:, 1:], gpt2.load_tokenizer())
            assert said["text"] == text and len(set(ids[0].tolist())) > 9

    @pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked for it")
    def test_freed_memory_is_kept_for_the_next_step(self):
        """Or each step would ask the system for it anew, and take half as long again."""
        code = "import gpt2, torch; pages = lambda: int(open('/proc/self/statm').read().split()[1])"
        code += "; gpt2.keep_freed_memory(); n = pages(); torch.ones(10**8); print(pages() - n)"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True)
        assert int(done.stdout) > 10_000  # of 4 KB

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it in /proc")
    def test_free_memory_is_more_than_nothing_uses_and_less_than_all(self):
        unused, all_pages = map(os.sysconf, ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        free = gpt2.free_memory(torch.device("cpu")) / os.sysconf("SC_PAGE_SIZE")
        assert unused * 0.9 < free < all_pages

    def test_a_model_read_trained_or_saved_is_plain(self, config, whole, cli):
        assert not fast_parts(read(whole))
        for row in gpt2.train(config | {"max_steps": 1}, init=whole / "last.pt", out="run"):
            assert not fast_parts(row["model"])
        assert set(load("run/last.pt")["model"]) == set(lively(config).state_dict())
        assert "int8" in cli("train", "--precision=int8", "--max_steps=1").err
        assert not Path("checkpoints").exists()

    def test_only_the_command_line_keeps_freed_memory(self, cli, config, monkeypatch):
        monkeypatch.setattr(gpt2, "keep_freed_memory", raising(OSError("it was asked for")))
        assert take(config | {"max_steps": 1})
        assert "it was asked for" in cli("train", *words(config)).err


# ---- 12. Command line ----


Terminal = type("Terminal", (io.StringIO,), {"isatty": lambda _: True, "fileno": lambda _: 2})


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, config):
    """A folder with good files and bad ones."""
    folder = tmp_path_factory.mktemp("shelf")
    save_model(lively(SMALL), folder / "good.pt")
    save_model(lively(TINY), folder / "few.pt")
    take(config | {"max_steps": 1}, out=folder / "run")
    texts = {"good.txt": VERDICT[:2000], "one.txt": "a", "empty.txt": "", "asked.txt": 'Once\n{"a'}
    for name, text in (texts | dict.fromkeys(("x,y.txt", "weights.safetensors"), "a")).items():
        write(folder / name, text)
    return folder


@pytest.fixture
def at_shelf(shelf, cli, monkeypatch, tmp_path):
    """The command line in the folder `shelf`, where no download can succeed."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(shelf)
    return cli


@pytest.fixture
def written(at_shelf):
    """`generate` with the model good.pt and these words: 9 tokens, of which it sees 8 at once."""
    return lambda *given: at_shelf("generate", "--model=good.pt", "--max_tokens=9", *given)


@pytest.fixture
def say(cli):
    """What `generate` prints for these words, from a model that says what it is told to.

    say(["A", " b"], "Say", "--only_new"): the model's tokens, then words of the command line.
    """

    def call(pieces, *given, after=1):
        encode = gpt2.load_tokenizer().encode
        tokens = [i for piece in pieces for i in encode(piece, allowed_special="all")]
        result = cli("generate", *given, "--model", speaking("says.pt", tokens, after=after))
        assert result.code == 0, result.err
        return result.out

    return call


def a_clock(monkeypatch, tick=1e-6, step=0):
    """Give gpt2.py a clock; each look at it moves it by `tick`, each training step by `step`."""
    rate, now = gpt2.learning_rate_at, [1000.0]

    def look():
        now[0] += tick
        return now[0]

    def learning_rate_at(*given):
        now[0] += step
        return rate(*given)

    monkeypatch.setattr(gpt2, "time", SimpleNamespace(monotonic=look, perf_counter=look))
    monkeypatch.setattr(gpt2, "learning_rate_at", learning_rate_at)
    monkeypatch.setattr(gpt2, "notes", gpt2.Notes())  # which remembers when it spoke


def pasted(result, command):
    """The words after `python gpt2.py` of the command that a result's last line tells to type."""
    start, found, rest = result.err.splitlines()[-1].partition(f"python gpt2.py {command}")
    assert start and found, result.err
    return [command, *shlex.split(rest)]


def ctrl_c_in_terminal(given, shown):
    """Run gpt2.py in a real terminal; once it has shown this, type Ctrl-C -> (status, screen)."""
    spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    ours = shlex.join(map(str, [sys.executable, HERE / "gpt2.py", *given]))
    command = [sys.executable, "-c", spawn, "sh", "-c", f"stty cols 40; exec {ours}"]
    screen, typed = b"", 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while block := os.read(process.stdout.fileno(), 1 << 16):
            screen += block
            if shown in screen and not typed:
                typed = os.write(process.stdin.fileno(), b"\x03")
    return process.returncode, screen.decode().replace("\r\n", "\n")


def train_and_hang(*given):
    """Train; step 2 takes hours, in a function that is not Python, and two signals come."""

    def hang():
        for seconds in (0.5, 0.6, 2.5):  # a request that comes twice at once is one
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        threading.Timer(2, write, ("waited", "")).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)

    before_step(pytest.MonkeyPatch(), 2, hang)
    gpt2.main(["train", *given])


# Command lines, each with what its error names.
BAD_LINES = [
    ("train --epohcs 3", "did you mean --epochs"),
    ("generate --temp 3", "did you mean --temperature"),
    ("train --epochs many", "many"),
    ("train --precision int8", "'int8'"),
    ("train --device xpu", "'xpu'"),
    ("train --vocab_size 61", "vocab_size 61"),
    ("train good.txt missing.txt", "missing.txt"),
    ("train --init gpt2 --val_data missing.txt", "missing.txt"),  # before a download
    ("train one.txt", "val_fraction"),
    ("train --init gpt2 --out run", "--resume"),  # before a download
    ("generate --model gpt2 --temperature -1", "temperature is -1"),  # before a download
    ("generate --model gpt2 --max_tokens 0", "max_tokens is 0"),
    ("generate --model good.pt --num_samples 10001", "from 1 to 10000"),
    ("generate --model good.pt --max_tokens 1000000001", "from 1 to 1000000000"),
    ("generate --model few.pt", "few.pt"),
    ("generate --model good.pt --do_sample --seed -1", "seed is -1"),
    ("generate --model good.pt --input a", "--instruct"),
    ("generate Once --model good.pt --prompts good.txt", "exclude each other"),
    ("generate --model good.pt --prompts asked.txt", "asked.txt, prompt 2"),
    ("generate --model good.pt --prompts empty.txt", "empty.txt"),
    ("info ./gpt2", "no model './gpt2'"),  # a path, not OpenAI's name
    ("info weights.safetensors", "give its folder"),
    ("train x,y.txt good.txt", "x,y.txt"),
    ("eval --model gpt2 --stride -5", "stride is -5"),
    ("eval --model gpt2 --data missing.txt", "missing.txt"),
    ("eval --model good.pt --data one.txt", "one.txt"),
]


STOPS = [(["orl"], " Hello w"), (["orld", "wo"], " Hello "), ([" "], "")]
STOPS += [(["again", "lo wo"], " Hel"), (["lo wo", "again"], " Hel")]  # the first in the text
STOPS += [(["again!"], " Hello world again")]  # begins, but does not come
STOPS += [(["!", " world aga"], " Hello")]  # a token that may begin the longest is held back


class TestCommandLine:
    @cases("line, named", BAD_LINES)
    def test_a_bad_command_line_is_one_line_and_status_2(self, at_shelf, shelf, line, named):
        before, result = set(shelf.rglob("*")), at_shelf(*line.split())
        *notes, last = result.err.splitlines()
        assert (result.code, result.out, last[:7]) == (2, "", "gpt2.py") and named in last, last
        assert not any(note.startswith(("gpt2.py", "usage", "Traceback", " ")) for note in notes)
        made = {re.sub("-.*", "", path.name) for path in set(shelf.rglob("*")) - before}
        assert made <= {"checkpoints", "metrics.jsonl", "tokens"}  # where a run would have been

    @cases("command", gpt2.COMMANDS)
    def test_help_shows_every_option_with_its_default(self, cli, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "300")
        text = re.sub(r"\n {9,}", " ", cli(command, "--help").out)
        shown = dict(re.findall(r"^  --(\w+)(.*)", text, re.MULTILINE))
        keys = {"train": "model_size init out resume auto_resume overwrite"}
        keys["train"] += " " + " ".join(gpt2.CONFIG)
        keys["generate"] = "model prompts instruct input only_new max_tokens num_samples stop seed"
        keys["generate"] += " do_sample temperature top_k top_p device precision json"
        keys |= {"eval": "model data stride all device precision json", "export": "model"}
        assert sorted(shown) == sorted(keys.get(command, "").split())
        defaults = gpt2.CONFIG | {"max_tokens": 100, "temperature": 1.0, "num_samples": 1}
        for key, value in defaults.items():
            assert key not in shown or value in ("", False) or f"(default: {value}" in shown[key]

    def test_alone_it_shows_examples_that_parse_and_with_version_its_version(self, cli):
        result = cli()
        examples = re.findall(r"python gpt2\.py (.*?)(?:   |\n|$)", result.out)
        assert result.code == 0 and len(examples) >= 4
        for example in examples:
            gpt2.parse(shlex.split(example))
        assert cli("--version").out.split() == ["gpt2.py", gpt2.VERSION]
        assert gpt2.__doc__.partition("\n")[0] in " ".join(cli("--help").out.split())

    def test_train_says_what_it_does_before_during_and_after(self, cli, config, monkeypatch):
        a_clock(monkeypatch, step=50)
        monkeypatch.setattr(gpt2, "free_memory", lambda device: 10**5)
        given = config | {"max_steps": 5, "eval_every": 2}
        result = cli("train", *words(given), "--out", "a run/it's")
        rows = metrics_of(Path("a run/it's"))
        lowest = min(rows, key=lambda row: row.get("val_loss", math.inf))
        assert (result.code, result.out, rows[0]["tokens_per_second"]) == (0, "", 1.0)  # 48 targets

        before, *steps, after = re.split(r"^step ", result.err, flags=re.MULTILINE)
        for part in ("short.txt", "403,008 parameters", "cpu", "fp32", "172 tokens", "20 tokens"):
            assert part in before
        assert re.search(r"6 MB for weights[^.]*\n.*0\.0 GB are free: .*--emb_dim", before)
        time_left = (" 2:30 left", " 1:40 left", " 0:50 left")
        for line, row in zip(steps, rows[:4], strict=True):
            assert line.startswith(f"{row['step']}/5 ") and f"loss {row['train_loss']:.3f} " in line
            assert row["step"] == 1 or time_left[row["step"] - 2] in line
        assert "\n    I HAD always" in after  # as the text begins
        assert f"{lowest['val_loss']:.3f} after step {lowest['step']}" in after and "4:10" in after
        assert all(name in after for name in ("best.pt", "last.pt", "loss.png", "metrics.jsonl"))
        assert pasted(result, "generate")[-1] == "a run/it's/best.pt"
        assert cli(*pasted(result, "generate"), "--max_tokens", 3).code == 0

    @cases("step, shown", [(15_000, ["25 h 00 min"]), (14_000, [])])  # seconds a step; six are left
    def test_a_run_of_more_than_a_day_is_warned_of(self, cli, config, monkeypatch, step, shown):
        a_clock(monkeypatch, step=step)
        result = cli("train", *words(config | {"eval_every": 99}))
        assert re.findall("this run takes (.*): lower", result.err) == shown

    @cases("seconds, shown", [(59.6, "1:00"), (9, "0:09"), (725, "12:05"), (3599.7, "1 h 00 min")])
    def test_times_are_those_of_a_clock(self, seconds, shown):
        assert gpt2.duration(seconds) == shown
        assert [gpt2.duration(hours * 3600) for hours in (48, 6677)] == ["2 days", "278 days"]

    @cases("between", ["_", "-"])
    def test_every_key_is_an_option_with_dashes_too(self, cli, config, between):
        full = gpt2.CONFIG | config | {"max_steps": 1, "seed": 5, "sample_prompt": "He-said"}
        full |= {"qkv_bias": False, "device": "cpu", "patience": 7, "schedule_steps": 9}
        given = {key.replace("_", between): value for key, value in full.items()}
        assert cli("train", *words(given)).code == 0
        assert load("checkpoints/last.pt")["config"] == full

    @cases("given", [{}, {"n_heads": 4, "learning_rate": 0.5, "min_learning_rate": 0.1}])
    def test_a_model_size_sets_size_and_rate_unless_given(self, cli, config, monkeypatch, given):
        small = {key: SMALL[key] for key in SMALL if key not in ("dropout_rate", "qkv_bias")}
        monkeypatch.setitem(gpt2.OPENAI_SIZES, "gpt2-medium", small | {"learning_rate": 3e-4})
        rest = {key: config[key] for key in config.keys() - TINY.keys() - {"learning_rate"}}
        rest |= {"max_steps": 1} | given
        assert cli("train", *words(rest), "--model_size=gpt2-medium").code == 0
        rates = {"learning_rate": 3e-4, "min_learning_rate": 3e-5}
        assert load("checkpoints/last.pt")["config"] == approx(gpt2.CONFIG | small | rates | rest)

    def test_init_takes_each_kind_of_model_and_trains_it_gently(self, cli, config, whole):
        rest = {key: config[key] for key in ("data", "batch_size", "precision")} | {"max_steps": 1}
        assert cli("export", "exported", "--model", whole).code == 0
        for init in (whole / "best.pt", whole, "exported"):
            assert cli("train", "--init", init, *words(rest), "--overwrite").code == 0
            saved, name = load("checkpoints/last.pt"), "token_embedding.weight"
            assert saved["config"]["learning_rate"] == 1e-4
            moved = load(whole / "best.pt")["model"][name] - saved["model"][name]
            assert 0 < moved.abs().max() < 1e-3
        worse = cli("train", "--init", init, *words(rest), "--lr=9", "--overwrite")
        assert " before the first step: that model is best.pt" in worse.err

    @cases("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
    def test_a_signal_saves_and_says_what_next(self, cli, config, whole, monkeypatch, name, status):
        number, folder = getattr(signal, name), Path("the run")
        before_step(monkeypatch, 3, lambda: signal.raise_signal(number))
        result = cli("train", *words(config | RARELY), "--out", folder)
        assert result.code == status and "once more" in result.err
        assert left_in(folder) == ["last.pt", "loss.png", "metrics.jsonl"]
        assert len(metrics_of(folder)) == load(folder / "last.pt")["step"] == 3
        assert cli(*pasted(result, "train"), "--eval_every", 2).code == 0
        assert same(load(folder / "last.pt")["model"], load(whole / "last.pt")["model"])

    def test_a_signal_in_the_very_last_step_ends_a_finished_run(self, cli, config, monkeypatch):
        before_step(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        result = cli("train", *words(config | {"max_steps": 3}))
        assert result.code == 0 and load("checkpoints/last.pt")["step"] == 3
        assert "--resume" not in result.err and pasted(result, "generate")
        assert "step 3 was not measured" in result.err
        # Nothing is left to be finished: a signal ends the program as any other.
        assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == (signal.SIG_DFL, -1)

    def test_a_second_signal_does_not_wait_for_the_step(self, config, tmp_path):
        command = calling(train_and_hang, *words(config), "--checkpoint_every=1", "--out=run")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 130 and (tmp_path / "waited").exists()
        assert done.stderr.count("once more") == 1
        assert load(tmp_path / "run/last.pt")["step"] == 1

    def test_a_run_of_torchrun_goes_on_with_torchrun(self, cli, config, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
        last = cli("train", *words(config)).err.splitlines()[-1]
        assert "torchrun --standalone --nproc_per_node=2 gpt2.py train --resume" in last
        monkeypatch.setattr(gpt2, "process_rank", lambda: 1)
        assert "no.txt" in cli("eval", "--data", "no.txt").err  # each says what ends it

    def test_auto_resume_begins_a_run_and_goes_on_with_one(self, cli, config, whole):
        """The same command each time, as a scheduler gives it; the first time it was killed before
        a save."""
        again = ["--auto_resume", "--overwrite"]
        write(Path("checkpoints/metrics.jsonl"), '{"step": 1}\n')
        first = cli("train", *words(config | {"max_steps": 3}), *again)
        assert first.code == 0 and load("checkpoints/last.pt")["step"] == 3
        assert cli("train", *words(config | {"max_steps": 0}), *again).code == 0
        assert same(load("checkpoints/last.pt")["model"], load(whole / "last.pt")["model"])

    def test_a_fine_tuning_run_ends_with_what_eval_says_of_it(self, cli, config, examples):
        given = config | {"data": str(examples), "val_fraction": 0.2, "max_steps": 2}
        result = cli("train", *words(given), "--out", "run")
        table = dict(line.split() for line in result.out.splitlines())
        assert result.code == 0 and float(table["accuracy"]) in (0, 0.3333, 0.6667, 1)
        assert int(table["tokens"]) < 15  # of three examples
        assert cli("eval", "--model", "run", "--data", examples).out == result.out
        asked = json.loads(cli(*pasted(result, "generate"), "--max_tokens", 1, "--json").out)
        assert asked["prompt"] == "good 0"
        one = write_lines("one.jsonl", {"prompt": "good 1", "completion": " ham"})
        result = cli("train", *words(given | {"val_data": str(one)}), "--out", "other")
        assert re.search("tokens +2\n", result.out)  # of that file, not of the training set

    def test_after_instructions_the_command_at_the_end_gives_one(self, cli, config):
        row = {"instruction": "-Say", "input": "to me", "output": "it"}
        given = config | {"data": str(write_lines("a.jsonl", row)), "val_fraction": 0.0}
        result = cli("train", *words(given | {"context_length": 64, "max_steps": 1}))
        asked = gpt2.parse(pasted(result, "generate"))
        assert (asked.prompt, asked.input, asked.instruct) == (["-Say"], "to me", True)

    @long_test
    def test_the_fine_tuning_recipes_of_the_readme_learn_what_they_say(self, tmp_path):
        text = (HERE / "README.md").read_text("utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        (tmp_path / "gpt2.py").symlink_to(HERE / "gpt2.py")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        shell = {"cwd": tmp_path, "env": os.environ | {"PATH": path}}
        for data, learnt in (("spam.jsonl", " -> spam\n"), ("tell.json", "Edith Wharton\n")):
            (recipe,) = (block for block in blocks if data in block and "generate" in block)
            done = subprocess.run(["sh", "-ec", recipe], capture_output=True, text=True, **shell)
            assert done.returncode == 0 and done.stdout.endswith(learnt), done.stderr
            assert "1.0000" in re.search("accuracy.*|$", done.stdout)[0] or data == "tell.json"

    def test_generate_continues_the_prompt_as_the_model_does(self, written, tokenizer, monkeypatch):
        def expected(prompt):
            ids = gpt2.generate(read("good.pt"), gpt2.text_to_token_ids(prompt, tokenizer), 9)
            return gpt2.token_ids_to_text(ids, tokenizer) + "\n"

        assert written("Once upon").out == written("Once", "upon").out == expected("Once upon")
        with open(os.devnull) as nothing:  # as from cron
            monkeypatch.setattr(sys, "stdin", nothing)
            assert written().out == expected("I HAD always thought")
        assert written("One<|endoftext|>Two").out == expected("One<|endoftext|>Two")
        assert written("").out == expected("<|endoftext|>").removeprefix("<|endoftext|>")
        assert written("--", "--up-to-date").out == expected("--up-to-date")
        assert re.search(r"^9 tokens in .* tokens/s$", written("Once").err, re.MULTILINE)

    def test_pipes_are_utf_8_whatever_the_locale_says(self, shelf):
        environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
        given = ["generate", "--model", shelf / "good.pt", "--max_tokens", 1]
        with start(*given, env=environment, encoding="utf-8") as process:
            assert process.communicate("Ünï 漢")[0].startswith("Ünï 漢")

    @cases("given", [[], ["-"]])
    @cases("sent", ["  Once\nup \n", "### Response:\n", "a\n\n"])
    def test_a_piped_prompt_keeps_its_blanks(self, written, monkeypatch, tmp_path, given, sent):
        """A shell ends what it pipes with a line end; an instruction's frame has one of its own."""
        asked = sent if "Response" in sent else sent[:-1]
        with write(tmp_path / "sent.txt", sent).open() as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            rows = [written(*words, "--json").out for words in (given, [asked])]
        piped, typed = map(json.loads, rows)
        assert (piped["prompt"], piped["text"]) == (asked, typed["text"])

    @cases("pipe", [False, True])
    def test_prompts_are_lines_or_json_objects_of_a_file(self, say, monkeypatch, pipe):
        lines = ["Once\n\n", '{"prompt": "Say"}\r\n', '{"prompt": "<|endoftext|>"}\n']
        write("asked.txt", "".join([*lines, " Th\u2028r\fice\r\n"]))
        with open("asked.txt", encoding="utf-8", newline="") as sent:
            monkeypatch.setattr(sys, "stdin", sent)
            given = ["--prompts", "-" if pipe else "asked.txt", "--json", "--stop", "."]
            rows = [json.loads(line) for line in say([" and so", "."], *given).splitlines()]
        prompts = ["Once", "Say", "<|endoftext|>", " Th\u2028r\fice"]
        assert [row["prompt"] for row in rows] == prompts
        assert [row["text"] for row in rows[:3]] == [" and so"] * 3

    def test_json_is_an_object_for_each_sample(self, say):
        pieces = [" and", " so", "<|endoftext|>"]
        asked = [["--max_tokens", 2], ["--stop", "o"], []]
        expected = [(" and so", 2, "length"), (" and s", 2, "stop"), (" and so", 2, "end")]
        for given, (text, tokens, ended) in zip(asked, expected, strict=True):
            lines = say(pieces, "Once", "--json", "--num_samples", 2, *given).splitlines()
            rows = [json.loads(line) for line in lines]
            times = [row.pop("seconds") for row in rows]
            assert all(0 < seconds < 60 and len(f"{seconds}") <= 6 for seconds in times)
            assert rows == [{"prompt": "Once", "text": text, "tokens": tokens, "ended": ended}] * 2

    @cases("samples", [1, 2])
    @cases("stops, text", STOPS)
    def test_a_stop_text_ends_before_it(self, say, stops, text, samples):
        given = [f"--stop={stop}" for stop in stops] + ["--num_samples", samples]
        said = say([" Hello", " world", " again", "<|endoftext|>"], "Say", *given)
        assert re.sub("--- sample . of 2 ---\n", "", said) == f"Say{text}\n" * samples

    @cases("samples", [1, 2])
    def test_only_new_leaves_the_prompt_out(self, say, samples):
        said = say([" Hi", "<|endoftext|>"], "Say", "--only_new", "--num_samples", samples)
        assert "Say" not in said and said.count(" Hi\n") == samples

    @cases("given", [[], ["--input", "Tea or coffee?"]])
    def test_an_instruction_is_framed_and_only_the_response_printed(self, say, tokenizer, given):
        frame = gpt2.instruction_prompt("Choose.", *given[1:])
        assert ("### Input:\nTea or coffee?\n" in frame) == bool(given)
        after = len(tokenizer.encode(frame))  # the model says it after so many tokens only
        said = say(["Tea", ".", "<|endoftext|>"], "Choose.", "--instruct", *given, after=after)
        assert said == "Tea.\n"

    def test_a_drawn_seed_is_said_and_gives_the_texts_again(self, written):
        common = ["Once", "--do_sample", "--num_samples=2", "--only_new"]
        results = [written(*common) for _ in range(3)]
        texts = [text for result in results for text in re.split("--- sample .*", result.out)[1:]]
        assert len(set(texts)) == 6
        for result in results:
            (line,) = (line for line in result.err.splitlines() if line.startswith("seed"))
            assert written(*common, "--seed", line.split()[-1]).out == result.out
        assert "seed" not in written(*common, "--temperature", 0).err

    def test_a_sampling_option_implies_drawing(self, written):
        def text(options):
            return written("Once", "--seed=0", *options.split()).out

        greedy, drawn = text(""), text("--do_sample")
        for options in ("--temperature 1", "--top_k 60000", "--top_p 1"):
            assert text(options) == drawn != greedy
        for options in ("--temperature 0", "--top_k 1", "--top_p 1e-9", "--do_sample --top-k 1"):
            assert text(options) == greedy

    def test_what_a_person_may_not_expect_is_noted(self, written):
        def notes(*given):
            noted = ("of 9 tokens", "the prompt ends", "--do_sample", "error")  # only 8 are seen, …
            return [text for text in noted if text in written(*given).err]

        assert notes(" one" * 8) == notes("Once", "--num_samples", 2, "--do_sample") == []
        assert notes(" one" * 9) == ["of 9 tokens"]
        assert notes("Once ") == ["the prompt ends"]
        assert notes("a" + " " * 10**6) == ["error"]  # it would kill the tokenizer
        assert notes("Once", "--num_samples", 2) == ["--do_sample"]

    def test_a_character_of_several_tokens_is_printed_whole_and_at_once(self, cli, tokenizer):
        text = " A🙂é漢字B"
        speaking("says.pt", [*tokenizer.encode(text), 50300, END])  # 50300 is no token
        said = []
        screen = SimpleNamespace(write=said.append, flush=lambda: said.append("now"), isatty=bool)
        with contextlib.redirect_stdout(screen):
            assert gpt2.main(["generate", "Say", "--model", "says.pt"]) == 0
        assert "".join(said).replace("now", "") == f"Say{text}\n"
        said = [text for text in said if text]
        assert all(said[said.index(whole) + 1] == "now" for whole in ("🙂", "漢", "B"))
        assert cli("generate", "Say", "--model=says.pt", "--max_tokens=2").out == "Say A�\n"

    def test_control_characters_never_reach_a_terminal(self, cli, tokenizer, monkeypatch):
        tokens = [*tokenizer.encode("\x1b[2J\tx\n\x07"), END]
        speaking("beeps.pt", tokens, after=len(tokenizer.encode("\x9bp")))
        asked = ["generate", "\x9bp", "--model", "beeps.pt"]
        assert cli(*asked).out == "\x9bp\x1b[2J\tx\n\x07\n"  # a file gets what was said
        for given in (("generate", "--model", "\x1b[2J"), ("train", "--\x1b[2J"), ("\x1b[2J",)):
            assert "\x1b" not in cli(*given).err
        for samples in (1, 2):
            monkeypatch.setattr(sys, "stdout", Terminal())
            assert gpt2.main([*asked, f"--num_samples={samples}"]) == 0
            assert sys.stdout.getvalue().count("\\x9bp\\x1b[2J\tx\n\\x07\n") == samples
            assert "\x1b" not in sys.stdout.getvalue()

    def test_live_lines_fit_a_terminal_and_are_wiped_before_results(self, at_shelf, monkeypatch):
        sizes = {1: os.terminal_size((80, 24)), 2: os.terminal_size((20, 24))}
        monkeypatch.setattr(os, "get_terminal_size", sizes.__getitem__)
        monkeypatch.setattr(sys, "stderr", Terminal())
        at_shelf("eval", "--model", "good.pt", "--data", "good.txt")
        before, *shown, rest = sys.stderr.getvalue().split("\r\x1b[K")
        live = [line for line in shown if not line.endswith("\n")]  # which notes do
        assert before == rest == "" and len(live) > 1
        assert all(0 < len(line) < 20 for line in live)
        monkeypatch.setattr(sys, "stderr", Terminal())
        at_shelf("generate", "a", "--model", "good.pt", "--num_samples", 2, "--max_tokens", 4)
        assert re.search(r"\b4\b[^\r\n]*\r\x1b\[K8 tokens in", sys.stderr.getvalue())

    def test_a_step_that_overflowed_in_fp16_is_shown_as_skipped(self, caplog):
        row = {"step": 3, "total_steps": 9, "epoch": 1, "train_loss": None, "sample": "so"}
        gpt2.show_step(row, rates=[100.0], seconds_left=7)
        assert re.search("step 3/9 .*skipped.* 100 tokens/s .*0:07", caplog.text)

    def test_elsewhere_a_long_step_prints_plain_lines(self, at_shelf, monkeypatch):
        a_clock(monkeypatch, tick=20)  # seconds from one look at it to the next
        monkeypatch.setattr(sys, "stderr", log := io.StringIO())
        assert at_shelf("eval", "--model", "good.pt", "--data", HERE / "the-verdict.txt").code == 0
        assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
        counts = re.findall("measuring: (.*) tokens", log.getvalue())
        assert (len(counts), counts[0]) == (5, "1,028")  # of ten

    def test_nobody_listens_and_the_run_goes_on(self, cli, config, monkeypatch):
        monkeypatch.setattr(sys, "stderr", screen := Terminal())
        monkeypatch.setattr(screen, "write", raising(OSError("full")), raising=False)
        assert gpt2.main(["train", *words(config | {"max_steps": 1})]) == 0

    def test_eval_measures_what_was_held_back_unless_all_is_asked_for(self, cli, config):
        rows = take(config | {"data": shutil.copy(config["data"], "here.txt")}, out="ran")
        model = shutil.move("ran/last.pt", "m.ckpt")  # a checkpoint, whatever its name
        data = shutil.move("here.txt", "there.txt")  # which is known by its bytes
        held_back = measured(cli, data, model, "--stride", 8)
        assert held_back["tokens"] == 19
        assert held_back["loss"] == approx(rows[-1]["val_loss"], rel=1e-5)
        assert measured(cli, data, model, "--all")["tokens"] == 191
        other = write("other.txt", VERDICT[:800])
        assert measured(cli, other, model)["tokens"] > 172

        take(config | {"max_steps": 1, "val_data": other}, out="run")  # which holds nothing back
        assert measured(cli, config["data"], "run")["tokens"] == 191

    def test_eval_and_generate_take_folders_as_models(self, cli, config, whole):
        result = cli("export", "new/folder", "--model", whole)
        assert (result.code, result.out) == (0, "") and re.search(r"\b8 tokens", result.err)
        models = (whole / "best.pt", whole, "new/folder")
        texts = {cli("generate", "--model", model, "--max_tokens", 5).out for model in models}
        losses = [measured(cli, config["data"], model, "--all")["loss"] for model in models]
        assert len(texts) == 1 and losses[0] == losses[1] == approx(losses[2], rel=1e-6)

    def test_info_says_what_a_model_is(self, cli, config, whole):
        best = load(whole / "best.pt")
        said = dict(line.split(maxsplit=1) for line in cli("info", whole).out.splitlines())
        assert said["model"] == str(whole / "best.pt") and said["parameters"] == "403,008"
        assert all(said[key] == str(config[key]) for key in TINY)
        assert (said["step"], said["data"]) == (str(best["step"]), config["data"])
        assert f"{best['best_val_loss']:.4f}" in said["lowest"] and said["version"] == gpt2.VERSION

    @cases("given, first", [(["generate", "--max_tokens", 10**6], "O"), (["eval"], "")])
    def test_a_closed_pipe_ends_quietly_with_status_141(self, shelf, monkeypatch, given, first):
        """`echo Once | python gpt2.py generate … | head -c 1`, and `eval … | true`."""
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        with start(*given, "--model", shelf / "good.pt") as process:
            process.stdin.write("Once\n")
            process.stdin.close()
            assert process.stdout.read(len(first)) == first  # at once
            process.stdout.close()
            assert not re.search("Traceback|rror", process.stderr.read())
        assert process.returncode == 141

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
    def test_a_full_disk_is_one_line_and_status_2(self, shelf, monkeypatch):
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        given = ["eval", shelf / "good.txt", "--model", shelf / "good.pt"]
        with open("/dev/full", "w") as full, start(*given, stdout=full) as process:
            *notes, last = process.stderr.read().splitlines()
        assert process.returncode == 2 and re.match("gpt2.py eval: error: No space", last)
        assert all(note.startswith(("data", "measuring", "tokenising")) for note in notes)

    @pytest.mark.skipif(os.name == "nt", reason="Windows' shell closes nothing")
    def test_closed_streams_are_no_error(self, shelf):
        given = ["eval", shelf / "good.txt", "--json", "--model", shelf / "good.pt"]
        command = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, HERE / "gpt2.py", *given]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and json.loads(done.stdout)["tokens"]

    @cases("text", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory"])
    def test_out_of_memory_is_one_line_with_advice(self, cli, monkeypatch, text):
        for error in (RuntimeError(text), MemoryError()):
            monkeypatch.setattr(gpt2, "load_data", raising(error))
            result = cli("train")
            assert result.code == 2 and "batch_size" in result.err.splitlines()[-1]

    def test_a_loss_that_overflows_is_one_line_with_advice(self, cli, config):
        result = cli("train", *words(config | {"learning_rate": 1e9, "warmup_steps": 0}))
        assert result.code == 2 and "lower learning_rate" in result.err.splitlines()[-1]

    def test_without_the_vocabulary_it_says_which_folder_to_copy(self, cli, monkeypatch):
        import requests

        unreachable = requests.ConnectionError("HTTPSConnectionPool: name or service not known")
        monkeypatch.setattr(gpt2, "load_tokenizer", raising(unreachable))
        result = cli("tokenize", write("a.txt", "text"), "a.bin")
        assert result.code == 2 and ".tiktoken" in result.err and "HTTPS" not in result.err

    @cases("bug", [RuntimeError("shape"), TypeError("a"), RuntimeError("no such memory format")])
    def test_a_bug_stays_a_traceback(self, cli, monkeypatch, bug):
        monkeypatch.setattr(gpt2, "load_data", raising(bug))
        with pytest.raises(type(bug)):
            cli("train")

    def test_ctrl_c_while_pytorch_loads_ends_without_a_traceback(self, tmp_path):
        """tiktoken is loaded just before. Whoever imports gpt2, a notebook, keeps Python's way."""
        write(tmp_path / "tiktoken.py", "import signal; signal.raise_signal(signal.SIGINT)")
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}"}
        options = {"env": environment, "capture_output": True, "text": True}
        ended = subprocess.run([sys.executable, HERE / "gpt2.py"], **options)
        assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
        code = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); import gpt2"
        assert "KeyboardInterrupt" in subprocess.run([sys.executable, "-c", code], **options).stderr

    def test_ctrl_c_before_the_first_step_ends_without_a_traceback(self, cli, monkeypatch):
        def load_data(*given):
            gpt2.progress.info("tokenising")
            raise KeyboardInterrupt

        monkeypatch.setattr(gpt2, "load_data", load_data)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
        monkeypatch.setattr(sys, "stderr", Terminal())
        assert cli("train").code == 130
        assert sys.stderr.getvalue().endswith("tokenising\r\x1b[K\n")  # for the prompt

    @long_test
    def test_compile_without_a_compiler_is_one_line(self, config, tmp_path):
        environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        given = [*words(config | {"compile": True, "max_steps": 1}), "--out", tmp_path / "run"]
        with start("train", *given, env=environment) as process:
            notes = process.stderr.read()
        assert process.returncode == 2 and "--compile" in notes.splitlines()[-1], notes
        assert "Traceback" not in notes and len(notes.splitlines()) < 12

    @long_test
    def test_ctrl_c_on_a_terminal_ends_a_text_and_saves_a_run(self, shelf, config, tmp_path):
        given = ["generate", "Once", "--model", shelf / "good.pt", "--max_tokens", 10**6]
        status, screen = ctrl_c_in_terminal(given, b"Once")
        assert status == 130 and "Traceback" not in screen and screen.endswith("\n")
        given = [*words(config | {"epochs": 4000.0, "eval_every": 10_000}), "--out", tmp_path]
        status, screen = ctrl_c_in_terminal(["train", *given], b"step 3/")
        assert status == 130 and "--resume" in screen and "Traceback" not in screen
        assert len(metrics_of(tmp_path)) == load(tmp_path / "last.pt")["step"] > 1


# ---- The project around it ----


def commands_of(text):
    """The words after `python gpt2.py`, or after `torchrun … gpt2.py`, wherever a text shows it."""
    shown = r"(?:python|torchrun[^\n`]*) gpt2\.py([^\n`]*)"
    for line in re.findall(shown, text.replace("\\\n", " ")):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        yield list(itertools.takewhile(lambda word: set(word) - set("|&;<>()"), lexer))


CARD = "gpt2.py walkthrough.ipynb the-verdict.txt requirements.txt test_gpt2.py README.md .ci"
CARD += " .github .gitignore .gitattributes .ruff.toml .tiktoken .images"  # and nothing else


def ran(notebook):
    """Check that every cell ran, once, in order, and without an error or a warning."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)) and code
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    return code


class TestProject:
    def test_the_walkthrough_shows_every_cell_as_it_ran_and_needs_no_network(self):
        text = (HERE / "walkthrough.ipynb").read_text("utf-8")
        assert ran(json.loads(text)) and len(text.encode()) < 2_000_000
        assert not re.search(r"!\[[^]]*\]\(\s*https?:|<img[^>]*src=.{0,2}https?:", text)
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)

    def test_the_notebook_runs_from_top_to_bottom(self, tmp_path, monkeypatch, capsys):
        for name in ("gpt2.py", "the-verdict.txt"):
            shutil.copy(HERE / name, tmp_path)
        shutil.copytree(HERE / ".tiktoken", tmp_path / ".tiktoken")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        book = nbformat.read(HERE / "walkthrough.ipynb", as_version=4)

        def show(cell, cell_index):
            with capsys.disabled():
                print(f"cell {cell_index + 1} of {len(book.cells)}: {cell.id}", flush=True)

        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(book, timeout=3600, resources=where, on_cell_start=show).execute()
        ran(book)

    def test_what_the_readme_links_to_exists(self):
        targets = re.findall(r'(?:\]\(|src="|href=")([^)#"\s]+)', README)
        here = [target for target in targets if not target.startswith("https://")]
        assert len(here) > 3 and [target for target in here if not (HERE / target).exists()] == []

    def test_the_commands_of_the_readme_are_understood(self):
        commands = list(commands_of(README))
        assert {"train", "generate", "eval", "export"} <= {words[0] for words in commands if words}
        for given in filter(None, commands):
            gpt2.parse(given)
        assert "python -m pytest -q" in README and "pip install -r requirements.txt" in README

    def test_requirements_are_pinned_and_no_others_than_the_cards(self):
        text = (HERE / "requirements.txt").read_text("utf-8")
        run, tests = (re.findall(r"(\w+)==[\d.]+\n", part) for part in text.split("# tests\n"))
        assert sorted(run) == ["jupyter", "matplotlib", "tiktoken", "torch"]
        assert "pytest" in tests and len(run + tests) + 1 == len(text.splitlines())

    def test_nothing_else_lies_at_the_top_level(self):
        if not shutil.which("git") or not (HERE / ".git").exists():
            pytest.skip("this is no repository")
        command = ["git", "-C", HERE, "ls-files", "-z"]
        tracked = subprocess.run(command, capture_output=True, text=True).stdout.split("\0")
        assert {name.split("/")[0] for name in tracked if name} <= set(CARD.split())

    def test_the_text_and_the_vocabulary_are_the_originals(self):
        story = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
        assert sha256(HERE / "the-verdict.txt") == story
        address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
        names = [hashlib.sha1(f"{address}{x}".encode()) for x in ("vocab.bpe", "encoder.json")]
        files = [HERE / ".tiktoken" / name.hexdigest() for name in names]
        assert sorted(files) == sorted((HERE / ".tiktoken").iterdir())
        assert [sha256(path) for path in files] == list(VOCABULARY.values())
