"""The tests of gpt2.py, in its order: one class a section, with its name.

    python -m pytest -q                             all of them, without a network
    python -m pytest -q -k TestTraining             one section; "not notebook" leaves out the longest test
    GPT2_LONG_TESTS=1 python -m pytest -q           also real kills and signals, a terminal, a full disk

Models are tiny and random: a test says whether the program does what it claims, not whether a model is good.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # threads only wait at this size; and every sum has one order

import io
import itertools
import json
import logging
import math
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gpt2

approx = pytest.approx
cases = pytest.mark.parametrize
read = gpt2.GPT2.from_pretrained
pytestmark = pytest.mark.filterwarnings("error")  # nothing here may warn
long_test = pytest.mark.skipif(not os.environ.get("GPT2_LONG_TESTS"), reason="only with GPT2_LONG_TESTS=1")
HERE = Path(__file__).resolve().parent
VERDICT = (HERE / "the-verdict.txt").read_text(encoding="utf-8")
END = 50256  # <|endoftext|>
TINY = {"vocab_size": 61, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2,
        "dropout_rate": 0.0, "qkv_bias": True}
SMALL = TINY | {"vocab_size": 50257, "emb_dim": 8, "n_heads": 2, "n_layers": 1}  # speaks GPT-2's tokens

@pytest.fixture(autouse=True)
def clean_process():
    """The command line changes its process: signals and log handlers. Put them back. And begin at one seed."""
    torch.manual_seed(0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    gpt2.log.handlers.clear()
    gpt2.log.setLevel(logging.NOTSET)
@pytest.fixture
def cli(capfd, monkeypatch, tmp_path):
    """gpt2.py as a function, in an empty folder: cli("eval", "--stride", 3) -> .code, .out, .err."""
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
def start(*arguments, **options):
    """gpt2.py as a process of its own, killed after 100 seconds: no test waits for ever."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen([sys.executable, HERE / "gpt2.py", *map(str, arguments)], text=True, **pipes)
    threading.Thread(target=lambda: (time.sleep(100), process.kill()), daemon=True).start()
    return process
def refused(cause, call, error=ValueError):
    """The call raises this error, and its message names the cause (a regular expression)."""
    with pytest.raises(error) as caught:
        call()
    assert re.search(cause, str(caught.value), re.DOTALL), str(caught.value)
def fail(error):
    return lambda *arguments, **named: (_ for _ in ()).throw(error)
def at_call(k, act, function):
    """`function`, but its k-th call does `act` first."""
    calls = itertools.count(1)
    return lambda *arguments: (next(calls) == k and act(), function(*arguments))[1]
def lively(config, scale=0.3, seed=0):
    """A model whose logits differ by more than rounding; those of an untrained one hardly do."""
    torch.manual_seed(seed)
    model = gpt2.GPT2(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model
def some_ids(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
def save_model(model, path):
    gpt2.save_checkpoint(path, {"config": model.config, "model": model.state_dict()})
    return path
def speaking(path, tokens, after=1):
    """Save a real model that says these tokens after a prompt of `after`: its positions alone decide."""
    model = gpt2.GPT2(SMALL | {"context_length": after + len(tokens) + 9, "emb_dim": 32})
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
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
def numbers(rows, *without):
    dropped = {"tokens_per_second", "sample", "total_steps", "model", *without}
    return [{key: value for key, value in row.items() if key not in dropped} for row in rows]
def assert_close(rows, reference, *without):
    for row, expected in zip(numbers(rows, *without), numbers(reference, *without), strict=True):
        assert row == approx(expected, rel=1e-4)
def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
def load(path):
    return gpt2.load_checkpoint(path, mmap=False)
def assert_same_run(folder, reference, best=True):
    """Two folders hold the same metrics, weights and moments, and the same best weights."""
    assert numbers(metrics_of(folder)) == numbers(metrics_of(reference))
    ours, theirs = load(folder / "last.pt"), load(reference / "last.pt")
    assert all(same(ours[key], theirs[key]) for key in ("step", "tokens_seen", "model", "optimizer"))
    if best:
        ours, theirs = load(folder / "best.pt"), load(reference / "best.pt")
        assert same(ours["step"], theirs["step"]) and same(ours["model"], theirs["model"])
def words(config):
    flags = [f"--{'' if value else 'no-'}{key}" for key, value in config.items() if isinstance(value, bool)]
    return flags + [f"--{key}={value}" for key, value in config.items() if not isinstance(value, bool)]
def write(path, text):
    Path(path).write_text(text, encoding="utf-8", newline="")
    return path
def write_lines(path, *entries):
    return write(path, "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries))
@pytest.fixture(scope="session")
def tokenizer():
    return gpt2.load_tokenizer()
@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Two epochs of 7 steps, the last with fewer windows. The text comes twice: so its end can be learnt."""
    path = write(tmp_path_factory.mktemp("text") / "short.txt", VERDICT[:400] * 2)
    return SMALL | {"dropout_rate": 0.1, "data": str(path), "batch_size": 3, "grad_accumulation": 2,
                    "epochs": 2, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "fp32"}
@pytest.fixture(scope="session")
def one_window(tmp_path_factory, tokenizer):
    path = write(tmp_path_factory.mktemp("one") / "one.txt", tokenizer.decode(tokenizer.encode(VERDICT)[:9]))
    return SMALL | {"data": str(path), "val_fraction": 0.0, "epochs": 5, "learning_rate": 1e-3, "precision": "fp32"}
@pytest.fixture(scope="session")
def whole(tmp_path_factory, config):
    """The folder of a run that nothing disturbed, and in it folders 1, 2, ... as each step left it."""
    folder = tmp_path_factory.mktemp("whole")
    for row in gpt2.train(config | {"checkpoint_every": 1}, out=folder):
        shutil.copytree(folder, folder / str(row["step"]), ignore=shutil.ignore_patterns("?", "1?"))
    return folder
@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    rows = [{"prompt": f"{'very ' * (i % 4)}good {i}", "completion": " ham"} for i in range(8)]
    rows += [{"prompt": f"win {i}" * (i % 3), "completion": " spam!"} for i in range(7)]
    return write_lines(tmp_path_factory.mktemp("examples") / "examples.jsonl", *rows)

# ---- One independent reference: GPT-2 with loops, in float64, under OpenAI's names ----
def openai_weights(model):
    """The model's weights under the names of OpenAI's file, whose matrices are input x output."""
    ours = model.state_dict()
    theirs = {"wte.weight": ours["token_embedding.weight"], "wpe.weight": ours["position_embedding.weight"]}
    stems = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.query_key_value",
             "attn.c_proj": "attention.projection", "mlp.c_fc": "feed_forward.expand",
             "mlp.c_proj": "feed_forward.projection"}
    layers = range(model.config["n_layers"])
    pairs = [(f"h.{i}.{their}", f"blocks.{i}.{our}") for i in layers for their, our in stems.items()]
    for their, our in [*pairs, ("ln_f", "final_norm")]:
        weight = ours[f"{our}.weight"]
        theirs[f"{their}.weight"] = weight.t().contiguous() if weight.dim() == 2 else weight
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
                query = parts[t][0][head]
                scores = [(query @ key[head]).item() / math.sqrt(size) for _, key, _ in parts[: t + 1]]
                shares = [math.exp(score - max(scores)) for score in scores]
                outputs.append(sum(a / sum(shares) * v[head] for a, (_, _, v) in zip(shares, parts)))
            stream[t] = x + dense(torch.cat(outputs), block + "attn.c_proj")
        for t, x in enumerate(stream):
            hidden = dense(norm(x, block + "ln_2"), block + "mlp.c_fc")
            bent = torch.tensor([gelu(v) for v in hidden.tolist()], dtype=torch.float64)
            stream[t] = x + dense(bent, block + "mlp.c_proj")
    return torch.stack([w["wte.weight"] @ norm(x, "ln_f") for x in stream])

# ==== Part one ====
class TestAttention:
    @torch.no_grad()
    @cases("causal", [False, True])
    def test_one_head_is_the_formula(self, causal):
        head = gpt2.CausalAttention(6, 4, 7, 0.0, True) if causal else gpt2.SelfAttention(6, 4, True)
        x = torch.randn(2, 5, 6)
        q, k, v = (layer(x) for layer in (head.query, head.key, head.value))
        for b, t in itertools.product(range(2), range(5)):
            n_seen = t + 1 if causal else 5
            shares = [math.exp(float(q[b, t] @ k[b, s]) / math.sqrt(4)) for s in range(n_seen)]
            weights = torch.tensor(shares + [0.0] * (5 - n_seen)) / sum(shares)
            assert torch.allclose(head.weights(x)[b, t], weights, atol=1e-6)
            assert torch.allclose(head(x)[b, t], weights @ v[b], atol=1e-6)
    def test_attention_dropout_drops_links_and_then_values(self):
        """With a single token each head has one link, dropped or doubled; and so is then each value."""
        many = gpt2.MultiHeadAttention(TINY | {"dropout_rate": 0.5})
        many.projection.weight.data = torch.eye(12)
        many.projection.bias.data.zero_()
        x = torch.randn(500, 1, 12)
        ratio = (many(x) / many.eval()(x)).detach().round(decimals=2)
        heads = (ratio > 0).view(500, 3, 4).any(-1).float().mean()  # half, but for those that lost all values
        assert ratio.unique().tolist() == [0, 4] and heads.item() == approx(0.5 * 15 / 16, abs=0.05)
        single = gpt2.CausalAttention(12, 4, 500, 0.5)
        kept = (single.weights(x.transpose(0, 1)) > 0).sum() / (500 * 501 / 2)
        assert kept.item() == approx(0.5, abs=0.05)

class TestBlock:
    def test_feed_forward_dropout_drops_its_output(self):
        feed_forward = gpt2.FeedForward(TINY | {"dropout_rate": 0.5})
        x = torch.randn(50, 12)
        ratio = (feed_forward(x) / feed_forward.eval()(x)).detach().round(decimals=3)
        assert ratio.unique().tolist() == [0, 2]

class TestModel:
    @cases("bias", [True, False])
    @cases("heads", [1, 2, 3, 6])
    def test_it_is_the_reference_over_heads_bias_and_lengths(self, heads, bias):
        model = lively(TINY | {"n_heads": heads, "qkv_bias": bias})
        for length in (1, 2, 5, 8):
            idx = some_ids(2, length, seed=length)
            expected = torch.stack([reference_logits(openai_weights(model), heads, row) for row in idx])
            assert torch.allclose(model(idx).double(), expected, atol=1e-4)
    @cases("scale", [1e-3, 0.02, 1.0, 3.0])
    def test_it_is_the_reference_where_epsilon_and_the_form_of_gelu_matter(self, scale):
        model = lively(TINY | {"n_layers": 3}, scale).double()
        expected = reference_logits(openai_weights(model), 3, some_ids(8))
        assert torch.allclose(model(some_ids(1, 8))[0], expected, rtol=1e-8, atol=1e-9 * scale)
    @cases("chunks", [[1] * 8, [3, 1, 4], [5, 3], [6, 2], [1, 7], [8]])
    def test_read_in_chunks_with_a_cache_it_is_the_reference(self, chunks):
        model = lively(TINY)
        idx = some_ids(3, 8)
        expected = torch.stack([reference_logits(openai_weights(model), 3, row) for row in idx])
        cache = [gpt2.KeyValueCache(8) for _ in model.blocks]
        with torch.no_grad():
            logits = torch.cat([model(part, cache) for part in idx.split(chunks, dim=1)], dim=1)
            assert torch.allclose(logits.double(), expected, atol=1e-4)
            assert torch.allclose(model(idx, last_only=True).double(), expected[:, -1:], atol=1e-4)
        refused("9.* 8", lambda: model(idx[:, :1], cache))  # the cache is full
        refused("9.* 8", lambda: model(some_ids(1, 9)))
    def test_embedding_dropout_acts_on_the_sum_of_token_and_position(self):
        model = lively(TINY | {"dropout_rate": 0.5, "n_layers": 1})
        for layer in (model.blocks[0].attention.projection, model.blocks[0].feed_forward.projection):
            layer.weight.data.zero_()  # such a block adds nothing to the stream
            layer.bias.data.zero_()
        streams = []
        model.final_norm.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].detach()))
        model.train()(some_ids(8, 8))
        model.eval()(some_ids(8, 8))
        assert (streams[0] / streams[1]).round(decimals=3).unique().tolist() == [0, 2]
    def test_initial_weights_have_the_stated_spread_and_such_a_model_guesses(self):
        model = gpt2.GPT2(TINY | {"vocab_size": 900, "emb_dim": 96, "n_layers": 8, "context_length": 200})
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / 4 if "projection" in name else 0.02  # 2 · 8 layers: the root is 4
                assert parameter.std().item() == approx(std, rel=0.05), name
            else:
                assert (parameter == (1.0 if "norm" in name and "weight" in name else 0.0)).all(), name
        ids = some_ids(2, 200, vocab=900)
        assert gpt2.summed_loss(model(ids), ids.roll(1, 0)).item() / 400 == approx(math.log(900), abs=0.1)

class TestData:
    def test_text_to_ids_and_back(self, tokenizer):
        text = "Hello, 🙂 <|endoftext|> world"
        ids = gpt2.text_to_token_ids(text, tokenizer)
        assert ids.tolist() == [tokenizer.encode_ordinary(text)] and END not in ids
        assert all(gpt2.token_ids_to_text(i, tokenizer) == text for i in (ids, ids[0], ids[0].tolist()))
        assert gpt2.token_ids_to_text([0, END, 50257], tokenizer) == "!<|endoftext|>"  # nothing is beyond
    @cases("stride, shift, starts", [(None, 0, [0, 4, 8]), (1, 0, range(12)), (3, 0, [0, 3, 6, 9]),
                                     (9, 0, [0, 9]), (5, 3, [0, 2, 7])])
    def test_windows_begin_every_stride_less_the_shift_and_targets_are_one_ahead(self, stride, shift, starts):
        dataset = gpt2.GPTDataset(torch.arange(16)[None], 4, stride)
        dataset.shift += shift  # training does
        windows = [dataset[i] for i in range(len(dataset))]
        assert [x.tolist() for x, _ in windows] == [list(range(begin, begin + 4)) for begin in starts]
        assert all(torch.equal(x + 1, y) and x.dtype == y.dtype == torch.long for x, y in windows)
    @cases("change, n_val", [({}, 515), ({"max_val_tokens": 100}, 100), ({"val_fraction": 0.0}, 0),
                             ({"val_fraction": 0.00021}, 2), ({"context_length": 4629, "stride": 7}, 515)])
    def test_the_end_of_the_tokens_is_held_back_and_the_rest_cut_into_windows(self, tokenizer, change, n_val):
        train_set, val_set = gpt2.load_data(gpt2.CONFIG | change)
        ids = tokenizer.encode(VERDICT)
        assert train_set.token_ids.tolist() == ids[: 5145 - n_val]
        assert (val_set.token_ids.tolist() if val_set else []) == ids[5145 - n_val :]
        assert train_set.starts.step == change.get("stride", 32)  # else half the context
    def test_too_few_tokens_are_refused_but_a_text_held_back_from_nothing_may_be_short(self):
        for key, value in (("context_length", 4630), ("max_val_tokens", 1)):
            refused("too few .*context.*val_fraction", lambda: gpt2.load_data(gpt2.CONFIG | {key: value}))
        for context, used in ((5144, 5144), (5145, 5144), (9999, 5144), (64, 64)):
            train_set, _ = gpt2.load_data(gpt2.CONFIG | {"val_fraction": 0.0, "context_length": context})
            assert train_set.context_length == used
    def test_a_validation_text_shorter_than_the_context_is_measured_whole(self, tokenizer):
        _, val_set = gpt2.load_data(gpt2.CONFIG | SMALL | {"max_val_tokens": 5})
        ids = torch.tensor([tokenizer.encode(VERDICT)[-5:]])
        model = lively(SMALL)
        expected = gpt2.summed_loss(model(ids[:, :-1]), ids[:, 1:]).item() / 4
        assert gpt2.evaluate(model, val_set) == approx(expected, rel=1e-5)

class TestConfig:
    def test_the_default_values_and_their_model(self):
        assert gpt2.CONFIG == {
            "vocab_size": 50257, "context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4,
            "dropout_rate": 0.0, "qkv_bias": True, "data": "the-verdict.txt", "val_fraction": 0.1,
            "max_val_tokens": 100_000, "stride": 0, "batch_size": 6, "grad_accumulation": 1, "epochs": 26,
            "max_steps": 0, "learning_rate": 4e-3, "min_learning_rate": 1e-4, "warmup_steps": 150,
            "weight_decay": 0.1, "grad_clip": 1.0, "seed": 42, "eval_every": 0, "checkpoint_every": 0,
            "sample_prompt": "", "device": "auto", "precision": "auto", "compile": False}
        with torch.device("meta"):
            assert gpt2.GPT2(gpt2.CONFIG).num_parameters() == 7_234_432
    @cases("key", gpt2.CONFIG)
    def test_a_value_of_another_type_or_out_of_its_limits_names_its_key(self, key):
        kind = type(gpt2.CONFIG[key])
        bad = [None, b"x", [1], "x" if kind is not str else 1] + [2.5] * (kind is int)
        if kind in (int, float):
            low = int(key in (*list(gpt2.CONFIG)[:5], "batch_size", "grad_accumulation", "epochs"))
            high = 0.99 if key in ("dropout_rate", "val_fraction") else 10**6 if low else 10**9
            bad += [True, low - 1, math.nan, math.inf, high + (1 if kind is int else 0.001)]
            fitting = {"n_heads": 1} if key == "emb_dim" else {"emb_dim": 10**6} if key == "n_heads" else {}
            for good in (high, 50257 if key == "vocab_size" else low):
                assert gpt2.check_config(fitting | {key: good})[key] == good
        for value in bad:
            refused(key, lambda: gpt2.check_config({key: value}))
    def test_what_does_not_fit_together_is_named(self):
        refused("epohcs", lambda: gpt2.check_config({"epohcs": 3}))
        refused("vocab_size 61", lambda: gpt2.check_config({"vocab_size": 61}))  # a run needs all of GPT-2's
        refused("emb_dim 13 .* n_heads 3", lambda: gpt2.GPT2(TINY | {"emb_dim": 13}))
        for key in TINY:
            refused(key, lambda: gpt2.GPT2({name: value for name, value in TINY.items() if name != key}))

class TestTraining:
    def test_the_learning_rate_rises_in_a_line_over_at_most_a_quarter_and_falls_in_half_a_cosine(self):
        schedule = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10}
        expected = {1: 0.1, 5: 0.5, 10: 1.0, 35: 0.1 + 0.45 * (1 + 0.5**0.5), 60: 0.55, 110: 0.1}
        assert {step: gpt2.learning_rate_at(step, schedule, 110) for step in expected} == approx(expected)
        schedule = {"learning_rate": 1.0, "min_learning_rate": 0.0, "warmup_steps": 150}
        rates = [gpt2.learning_rate_at(step, schedule, 40) for step in range(1, 41)]
        assert rates[:10] == approx([0.1 * step for step in range(1, 11)]) and 0.99 < rates[10] < 1.0
        assert [gpt2.learning_rate_at(step, schedule, 3) for step in (1, 2, 3)] == approx([0.75, 0.25, 0])
        assert gpt2.learning_rate_at(1, schedule | {"warmup_steps": 0, "min_learning_rate": 0.3}, 1) == 0.3
        assert gpt2.learning_rate_at(40, schedule | {"min_learning_rate": 3.0}, 40) == 1.0  # never up again
    def test_only_matrices_decay(self):
        model = gpt2.GPT2(TINY)
        groups = gpt2.make_optimizer(model, {"weight_decay": 0.3, "learning_rate": 1e-3}).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in model.parameters()}
        assert all(group["betas"] == (0.9, 0.95) and group["fused"] for group in groups)
    def test_the_schedule_moves_norms_and_biases_too(self, one_window):
        """AdamW's first step moves each number by the learning rate: so this says which rate each had."""
        given = one_window | {"warmup_steps": 10, "epochs": 40, "weight_decay": 0.0}
        row = next(gpt2.train(given, out=None, init=lively(SMALL)))
        assert row["learning_rate"] == approx(1e-4)
        for name, before in lively(SMALL).state_dict().items():
            moved = (row["model"].state_dict()[name] - before).abs().max().item()
            assert moved == approx(1e-4, rel=0.02), name
    def epochs(self, n, world=1, **config):
        """The windows that each of four epochs takes, in order; a step takes 6 in each process."""
        dataset = [(torch.tensor([i]), torch.tensor([i])) for i in range(n)]
        run = {"config": gpt2.CONFIG | {"batch_size": 4} | config, "windows_per_step": 6 * world}
        steps = math.ceil(n / (6 * world))
        taken = []
        for step, rank in itertools.product(range(1, 4 * steps + 1), range(world)):
            batches = gpt2.batches_of_step(dataset, step, run, rank, world)
            assert all(len(y) <= 4 for _, y in batches)
            taken += [i for _, y in batches for i in y.flatten().tolist() if i != -100]
        return [tuple(taken[i : i + n]) for i in range(0, len(taken), n)]
    def test_windows_are_shuffled_anew_in_each_epoch_and_each_is_taken_once(self):
        epochs = self.epochs(38) + self.epochs(38, seed=7)
        assert all(sorted(epoch) == list(range(38)) and list(epoch) != sorted(epoch) for epoch in epochs)
        assert len(set(epochs)) == 8 and epochs[:4] == self.epochs(38)  # only the same seed repeats them
    def test_processes_share_the_windows_and_one_without_any_counts_nothing(self):
        for epoch, alone in zip(self.epochs(26, world=4), self.epochs(26), strict=True):
            assert sorted(epoch) == list(range(26)) and set(epoch[:24]) == set(alone[:24])
        dataset = [(torch.tensor([5]), torch.tensor([6]))]
        (x, y), = gpt2.batches_of_step(dataset, 1, {"config": gpt2.CONFIG, "windows_per_step": 24}, 1, 4)
        assert (x.tolist(), y.tolist(), dataset[0][1].tolist()) == ([[5]], [[-100]], [6])
    def test_windows_are_cut_elsewhere_in_each_epoch(self):
        dataset = gpt2.GPTDataset(range(400), 20, 8)
        run = {"config": gpt2.CONFIG | {"seed": 1}, "windows_per_step": 6}
        shifts = set()
        for epoch in range(60):
            batches = [gpt2.batches_of_step(dataset, epoch * 8 + step, run, 0, 1) for step in range(1, 9)]
            starts = sorted(x[0].item() for (x, _), in batches for x in x)
            shifts.add(8 - starts[1])
            assert starts == [max(0, start - (8 - starts[1])) for start in range(0, 380, 8)]
        assert shifts == set(range(8))
    def test_the_same_batch_is_dropped_out_differently_in_every_step(self, one_window):
        still = one_window | {"learning_rate": 0.0, "min_learning_rate": 0.0}
        for rate, kinds in ((0.5, 5), (0.0, 1)):
            rows = gpt2.train(still | {"dropout_rate": rate}, out=None)
            assert len({row["train_loss"] for row in rows}) == kinds
    @cases("stride", [None, 8, 5, 1, 1000])
    @cases("length", [9, 16, 17, 25, 30])
    def test_evaluate_counts_each_token_once_with_the_context_its_stride_leaves(self, stride, length):
        model = lively(TINY | {"dropout_rate": 0.5})
        ids = some_ids(length)
        step = min(stride or 8, 8)
        total = 0.0
        for t in range(1, length):
            begin = max(0, math.ceil((t - 8) / step)) * step  # the first window that reaches t
            total -= torch.log_softmax(model(ids[None, begin:t])[0, -1], dim=-1)[ids[t]].item()
        loss = gpt2.evaluate(model.train(), gpt2.GPTDataset(ids, 8), stride=stride)
        assert loss == approx(total / (length - 1), rel=1e-5) and not model.training
    def test_evaluate_takes_some_thousand_tokens_at_once(self):
        taken = []
        model = gpt2.GPT2(TINY)
        model.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0].numel()))
        gpt2.evaluate(model, gpt2.GPTDataset(some_ids(2049), 8))
        assert taken == [1024, 1024]
    @cases("kind", ["text", "examples"])
    def test_accumulated_batches_equal_one_big_batch(self, config, examples, kind):
        """Also when examples differ in length, where a mean of means would be another number."""
        base = config | {"dropout_rate": 0.0, "max_steps": 3}
        base |= {"data": str(examples), "context_length": 12} if kind == "examples" else {}
        runs = [list(gpt2.train(base | {"batch_size": size, "grad_accumulation": 6 // size}, out=None))
                for size in (6, 2, 1)]
        assert runs[0][0]["train_loss"] == approx(math.log(50257), abs=0.1)  # a mean, not a sum
        assert_close(runs[1], runs[0])
        assert_close(runs[2], runs[0])
    @cases("clip, used", [(0.0, None), (0.01, 0.01), (1e6, None)])
    def test_the_gradient_is_reported_before_it_is_clipped(self, tmp_path, config, clip, used):
        row, = gpt2.train(config | {"grad_clip": clip, "max_steps": 1}, out=tmp_path)
        free = next(gpt2.train(config | {"grad_clip": 0.0}, out=None))
        assert row["grad_norm"] == free["grad_norm"] > 0.05
        means = [state["exp_avg"] for state in load(tmp_path / "last.pt")["optimizer"]["state"].values()]
        norm = math.sqrt(sum(mean.double().square().sum().item() for mean in means))
        assert norm == approx(0.1 * (used or row["grad_norm"]), rel=1e-3)  # AdamW takes a tenth
    def test_a_run_counts_its_epochs_and_tokens_and_measures_ten_times(self, whole, config, one_window):
        n_windows = len(gpt2.load_data(gpt2.CONFIG | config)[0])
        rows = metrics_of(whole)
        assert [row["step"] for row in rows] == list(range(1, 15)) and n_windows % 6
        assert [row["epoch"] for row in rows] == [1] * 7 + [2] * 7
        assert [rows[i]["tokens_seen"] for i in (0, 5, 6, 13)] == [48, 48 * 6, 8 * n_windows, 16 * n_windows]
        assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6, 8, 10, 12, 14]
        assert all("sample" in row for row in gpt2.train(one_window | {"epochs": 25}, out=None))  # each epoch
    def test_a_row_is_true_and_max_steps_leaves_the_schedule_alone(self, config, whole, tokenizer):
        train_set, val_set = gpt2.load_data(gpt2.CONFIG | config)
        rows = []
        for row in gpt2.train(config | {"max_steps": 5, "eval_every": 3}, out=None):
            rows.append(row)
            assert ("sample" in row) == ("val_loss" in row) == (row["step"] in (3, 5))
            if "sample" in row:
                assert row["val_loss"] == gpt2.evaluate(row["model"], val_set)
                text = gpt2.generate(row["model"], train_set.token_ids[None, :5].long(), 40, eos_id=END)
                assert row["sample"] == gpt2.token_ids_to_text(text, tokenizer)
        assert numbers(rows, "val_loss") == numbers(metrics_of(whole)[:5], "val_loss")
    def test_measuring_saving_sampling_and_drawing_in_between_change_nothing(self, whole, config, tmp_path):
        busy = config | {"eval_every": 1, "checkpoint_every": 5, "sample_prompt": "Else"}
        for row in gpt2.train(busy, out=tmp_path):
            assert row["sample"].startswith("Else") and torch.rand(1) < 1
        assert numbers(metrics_of(tmp_path), "val_loss") == numbers(metrics_of(whole), "val_loss")
        ours, theirs = load(tmp_path / "last.pt"), load(whole / "last.pt")
        assert same(ours["model"], theirs["model"]) and same(ours["optimizer"], theirs["optimizer"])
        other = next(gpt2.train(config | {"seed": 7}, out=None))
        assert other["train_loss"] != metrics_of(whole)[0]["train_loss"]
    def test_best_is_the_model_of_the_lowest_loss_and_training_on_leaves_it(self, config, tmp_path):
        """At so high a learning rate the lowest loss is soon behind. It is saved at once, others when due."""
        data = str(write(tmp_path / "once.txt", VERDICT[:700]))
        given = config | {"data": data, "learning_rate": 0.1, "eval_every": 1, "checkpoint_every": 3}
        _, val_set = gpt2.load_data(gpt2.CONFIG | given)
        losses = []
        for row in gpt2.train(given, out=tmp_path):
            losses.append(row["val_loss"])
            if row["step"] in (3, 6, 9, 12, 14) or losses[-1] == min(losses):
                saved = row["step"]
            assert load(tmp_path / "last.pt")["step"] == saved
            best = load(tmp_path / "best.pt")
            assert best["step"] == losses.index(min(losses)) + 1
            assert gpt2.evaluate(read(tmp_path / "best.pt"), val_set) == approx(min(losses), rel=1e-6)
        assert best["step"] < 12 and best["config"] == gpt2.CONFIG | given and "optimizer" not in best
    def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_leaves_the_save(self, config, tmp_path):
        for spoil in (lambda norm: norm.weight.data.fill_(math.nan),
                      lambda norm: norm.bias.register_hook(lambda gradient: gradient * math.inf)):
            run = gpt2.train(config | {"checkpoint_every": 1}, out=tmp_path, overwrite=True)
            spoil(next(run)["model"].final_norm)
            refused("step 2.*learning_rate", lambda: next(run), FloatingPointError)
            assert load(tmp_path / "last.pt")["step"] == len(metrics_of(tmp_path)) == 1
    def test_fp16_skips_steps_whose_scaled_gradient_is_infinite(self, config, tmp_path, monkeypatch):
        """CUDA's scaler, here on the CPU, with a scale at which some steps overflow."""
        scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
        parts = torch.float32, torch.autocast("cpu", enabled=False), scaler
        monkeypatch.setattr(gpt2, "mixed_precision", lambda name, device: parts)
        before = None
        for row in gpt2.train(config | {"max_steps": 5}, out=tmp_path):
            after = row["model"].token_embedding.weight.detach().clone()
            assert before is None or torch.equal(before, after) == (row["grad_norm"] is None)
            before = after
        scaler.update(3.0)
        next(gpt2.train({"max_steps": 0}, out=tmp_path, resume=True))
        assert 1e36 < scaler.get_scale() < 0.6e38  # halved on the way, and a resumed run goes on with that
    def test_precision_says_in_what_numbers_is_trained_and_measured(self, config, whole):
        rows = list(gpt2.train(config | {"precision": "bf16", "max_steps": 2}, out=None))
        for key, row, full in zip(("train_loss", "val_loss"), rows, metrics_of(whole)):
            assert row[key] != full[key] and row[key] == approx(full[key], rel=0.01)
        val_set = gpt2.load_data(gpt2.CONFIG | config)[1]
        assert gpt2.evaluate(rows[1]["model"], val_set) != rows[1]["val_loss"]  # measured here in fp32
        assert rows[1]["model"].token_embedding.weight.dtype == torch.float32
    def test_training_starts_from_a_model_and_leaves_it_alone(self, config, whole):
        source = read(whole / "last.pt")
        given = {key: value for key, value in config.items() if key not in TINY}
        for init, rate in ((whole / "last.pt", 0.3), (source, 0.3), (source, 0.0)):
            row = next(gpt2.train(given | {"dropout_rate": rate}, out=None, init=init))
            assert row["model"].config == SMALL | {"dropout_rate": rate}
            assert {part.p for part in row["model"].modules() if isinstance(part, nn.Dropout)} == {rate}
            assert row["train_loss"] < metrics_of(whole)[0]["train_loss"]
        assert same(source.state_dict(), read(whole / "last.pt").state_dict())
        for change in ({"emb_dim": 16}, {"n_layers": 2}, {"qkv_bias": False}, {"context_length": 9}):
            refused(*change, lambda: next(gpt2.train(given | change, out=None, init=whole / "last.pt")))
    def test_init_with_a_shorter_context_trains_its_first_positions(self, config, whole):
        given = config | {"context_length": 5, "weight_decay": 0.0}
        row = next(gpt2.train(given, out=None, init=whole / "last.pt"))
        start = read(whole / "last.pt").position_embedding.weight[:5]
        moved = (row["model"].position_embedding.weight - start).abs().amax(-1)
        assert moved.shape == (5,) and 0 < moved.min() <= moved.max() < 2 * row["learning_rate"]
    def test_two_processes_train_as_one_and_stop_together(self, config, tmp_path):
        """At half the batch each; in step 8, in which fewer windows are left, a signal reaches the second."""
        script = write(tmp_path / "two.py", """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import gpt2
real = gpt2.learning_rate_at
def strike(step, *rest):
    if step == 8 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return real(step, *rest)
gpt2.learning_rate_at = strike
try:
    gpt2.main(["train", "--out", "run", *sys.argv[2:]])
except SystemExit as stop:
    sys.stdout.write(f"{stop.code}\\n")  # at once: both write here
""")
        plain = config | {"dropout_rate": 0.0}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [script, HERE, *words(plain | {"batch_size": 1, "grad_accumulation": 3})]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stdout.split()) == (0, ["143", "143"]), done.stderr
        assert done.stderr.count("saved step 8; go on") == 1  # only the first process speaks
        alone = list(gpt2.train(plain, out=None))
        folder = tmp_path / "run"
        assert_close(metrics_of(folder), alone[:8])
        refused("windows_per_step .*6.* 3", lambda: next(gpt2.train(out=folder, resume=True)))
        rows = gpt2.train({"batch_size": 2}, out=folder, resume=True)
        assert_close(rows, alone[8:])  # one process goes on with the run of two

class TestGeneration:
    @cases("context, length, new", [(8, 3, 30), (8, 8, 9), (8, 20, 12), (5, 2, 17), (1, 1, 4), (8, 4, 0)])
    def test_greedy_text_goes_on_from_the_last_half_when_the_context_is_full(self, context, length, new):
        model = lively(TINY | {"context_length": context, "dropout_rate": 0.5})
        idx = prompt = some_ids(2, length)
        begin = max(0, length - context)
        for _ in range(new):
            if idx.size(1) - begin > context:
                begin = idx.size(1) - max(1, context // 2)
            idx = torch.cat([idx, model(idx[:, begin:])[:, -1].argmax(-1, keepdim=True)], dim=1)
        for use_cache in (True, False):
            text = gpt2.generate(model.train(), prompt, new, use_cache=use_cache)
            assert torch.equal(text, idx) and not model.training
        model(text[:, -1:]).sum().backward()  # what was written can be trained on
    @cases("temperature", [0.5, 2.0])
    @cases("top_k", [None, 1, 3, 50])
    @cases("top_p", [None, 1e-60, 0.3, 0.8, 1.0])
    def test_the_distribution_is_the_written_out_one(self, temperature, top_k, top_p):
        logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 2
        ours = gpt2.next_token_probabilities(logits, temperature, top_k, top_p)
        for row, probabilities in zip(logits.tolist(), ours.tolist(), strict=True):
            order = sorted(range(9), key=lambda i: -row[i])[: top_k or 9]
            weights = {i: math.exp(row[i] / temperature) for i in order}
            kept = {}
            for i in order:
                if not kept or sum(kept.values()) < (top_p or 1.0) * sum(weights.values()):
                    kept[i] = weights[i]
            assert probabilities == approx([kept.get(i, 0) / sum(kept.values()) for i in range(9)], abs=1e-6)
    def test_draws_follow_the_distribution_the_generator_and_the_options(self):
        logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(30_000, 3)
        drawn = gpt2.sample_next(logits, 1.0, generator=torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn.flatten(), minlength=3) / 30_000
        assert drawn.shape == (30_000, 1) and torch.allclose(shares, torch.softmax(logits[0], 0), atol=0.01)
        assert gpt2.next_token_probabilities(logits[:1], 0).tolist() == [[0, 0, 1]]
        assert (gpt2.next_token_probabilities(torch.zeros(1, 9), top_k=3) > 0).sum() == 3  # of equals too
        texts = [gpt2.generate(lively(TINY), some_ids(2, 4), 20).tolist()]
        for seed, options in ((3, {"top_k": 1}), (3, {"top_p": 1e-9}), (3, {}), (3, {}), (4, {})):
            options |= {"temperature": 2.0, "generator": torch.Generator().manual_seed(seed)}
            texts.append(gpt2.generate(lively(TINY), some_ids(2, 4), 20, **options).tolist())
        assert texts[0] == texts[1] == texts[2] != texts[3] == texts[4] != texts[5]
    def test_the_end_of_text_stops_a_row_and_fills_it(self):
        model = lively(TINY)
        free = gpt2.generate(model, some_ids(3, 4), 12)[:, 4:].tolist()
        eos = free[0][3]  # the first row says it early
        columns = []
        gpt2.generate(model, some_ids(3, 4), 12, eos_id=eos, on_token=columns.append)
        for row, expected in zip(torch.cat(columns, dim=1).tolist(), free, strict=True):
            end = expected.index(eos) + 1 if eos in expected else 12
            assert row == (expected[:end] + [eos] * 12)[: len(row)]
        alone = gpt2.generate(model, some_ids(3, 4)[:1], 12, eos_id=eos)[0, 4:].tolist()
        assert alone == free[0][: free[0].index(eos) + 1]  # there it stops
    def test_options_prompts_and_logits_that_make_no_sense_are_refused(self):
        bad = [("temperature", value) for value in (-1.0, 9e-5, math.nan, math.inf)] + [("top_k", 0)]
        for key, value in bad + [("top_p", value) for value in (0.0, 1.1, math.nan)]:
            refused(key, lambda: gpt2.sample_next(torch.zeros(1, 4), **{"temperature": 1.0} | {key: value}))
        for temperature, value in itertools.product((0.0, 1e-4, 1.0), (math.nan, math.inf)):
            refused("logits", lambda: gpt2.sample_next(torch.tensor([[0.0, 1.0], [value, 0.0]]), temperature))
            logits = torch.tensor([[1e38, -1e38, -math.inf]])  # the last is a token that must not come
            assert gpt2.sample_next(logits, temperature, 1, 1.0).item() == 0

# ==== Part two ====
class TestFineTuning:
    def test_examples_come_as_pairs_or_instructions_as_lines_or_a_list(self, tmp_path):
        entries = [{"prompt": "p", "completion": " c"}, {"instruction": "do", "input": "", "output": "done"},
                   {"instruction": "do", "input": "this", "output": "it"}, {"prompt": 1, "completion": 2}]
        lines = write_lines(tmp_path / "a.jsonl", *entries)
        whole = write(tmp_path / "b.json", "\ufeff\n" + json.dumps(entries, indent=2))
        below = "Below is an instruction that describes a task"
        rest = "Write a response that appropriately completes the request.\n\n### Instruction:\ndo\n\n"
        further = "paired with an input that provides further context"
        assert gpt2.read_examples(lines) == gpt2.read_examples(whole) == [
            ("p", " c"), (f"{below}. {rest}### Response:\n", "done"),
            (f"{below}, {further}. {rest}### Input:\nthis\n\n### Response:\n", "it"), ("1", "2")]
    def test_a_line_of_json_ends_at_a_line_feed_and_not_at_u2028(self, tmp_path):
        pairs = [(f"a{end}b", " c") for end in ("\u2028", "\u2029", "\x85")]
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        assert gpt2.read_examples(write_lines(tmp_path / "a.jsonl", *rows)) == pairs
    def test_only_the_completion_and_the_end_are_targets(self, tokenizer):
        pairs = [("one two", " three four"), ("", "<|endoftext|>"), ("a b c d e f g h", " y z")]
        (x, y), (a, b), (c, d) = gpt2.CompletionDataset(pairs, 8)
        assert x.tolist() == tokenizer.encode("one two three four")
        assert y.tolist() == [-100, *tokenizer.encode(" three four"), END]
        text = tokenizer.encode("<|endoftext|>", disallowed_special=())
        assert a.tolist() == [END, *text] and b.tolist() == [*text, END]  # no prompt: an end token
        assert c.tolist() == tokenizer.encode(" c d e f g h y z")  # what is too long loses its beginning
        assert d.tolist() == [-100] * 5 + [*tokenizer.encode(" y z"), END]
    def test_examples_are_shuffled_by_the_seed_before_some_are_held_back(self, examples):
        given = gpt2.CONFIG | {"data": str(examples), "val_fraction": 0.35, "context_length": 12}
        train_set, val_set = gpt2.load_data(given)
        assert (len(train_set), len(val_set)) == (9, 6) and max(len(x) for x, _ in train_set + val_set) <= 12
        assert sorted(train_set.examples + val_set.examples) == sorted(gpt2.read_examples(examples))
        assert {label for _, label in val_set.examples} == {" ham", " spam!"}
        assert gpt2.load_data(given)[1].examples == val_set.examples
        assert gpt2.load_data(given | {"seed": 1})[1].examples != val_set.examples
        assert gpt2.load_data(given | {"val_fraction": 0.0})[1] is None
        refused("val_fraction", lambda: gpt2.load_data(given | {"val_fraction": 0.95}))
    def test_fine_tuning_learns_to_classify(self, cli, tmp_path):
        texts = ("see you at noon on", " ham"), ("win more money now on", " spam")
        rows = [{"prompt": f"{a} {i}", "completion": b} for i in range(6) for a, b in texts]
        options = {"data": write_lines(tmp_path / "a.jsonl", *rows), "val_fraction": 0.0, "emb_dim": 16}
        result = cli("train", *words(SMALL | options), "--epochs=25", "--lr=0.03", "--out=out")
        assert "measuring all of it" in result.err and "accuracy              1.0000" in result.out
        assert re.search(r"    (see you at noon on \d ham|win more money now on \d spam)", result.err)
        model = read("out/last.pt").train()
        model.apply(lambda part: setattr(part, "p", 0.9))  # each dropout's
        pairs = [(row["prompt"], row["completion"]) for row in rows]
        assert gpt2.classify(model, gpt2.CompletionDataset(pairs, 8)) == [label for _, label in pairs]
        report = json.loads(cli("eval", "--model", "out/last.pt", "--data", options["data"], "--json").out)
        assert report["accuracy"] == 1.0 and report["loss"] < 0.5
        assert cli("generate", "see you at noon on 4", "--model=out/last.pt").out == "see you at noon on 4 ham\n"

OTHER = {  # values that make another run
    "vocab_size": 50258, "context_length": 7, "emb_dim": 16, "n_heads": 4, "n_layers": 2, "dropout_rate": 0.2,
    "qkv_bias": False, "val_fraction": 0.2, "max_val_tokens": 5, "stride": 3, "epochs": 3, "seed": 43,
    "learning_rate": 2e-3, "min_learning_rate": 1e-5, "warmup_steps": 3, "weight_decay": 0.2,
    "grad_clip": 2.0, "precision": "bf16"}

class Trap:  # unpickled without care, this writes a file
    def __reduce__(self):
        return open, ("trapped", "w")

class TestRuns:
    @cases("step", range(1, 14))
    def test_resumed_from_any_step_a_run_is_bit_for_bit_the_same(self, whole, tmp_path, step):
        folder = shutil.copytree(whole / str(step), tmp_path / "run")
        torch.manual_seed(step)
        assert [row["step"] for row in gpt2.train(out=folder, resume=True)] == list(range(step + 1, 15))
        assert_same_run(folder, whole)
    @cases("eval_every, steps", [(0, (3, 4)), (3, (4, 6))])
    def test_some_steps_and_the_others_are_the_whole(self, config, tmp_path, eval_every, steps):
        """N steps and N more are 2N; a measurement made only because the first N ended is forgotten."""
        given = config | {"eval_every": eval_every, "checkpoint_every": 100}
        list(gpt2.train(given, out=tmp_path / "whole"))
        for step in steps:
            folder = tmp_path / str(step)
            assert "val_loss" in list(gpt2.train(given | {"max_steps": step}, out=folder))[-1]
            refused(f"{step} of 14 steps.*max_steps", lambda: next(gpt2.train(out=folder, resume=True)))
            list(gpt2.train({"max_steps": 0}, out=folder, resume=True))
            assert_same_run(folder, tmp_path / "whole", best=False)
    @cases("key", OTHER)
    def test_resume_refuses_another_value_of_a_key_that_makes_another_run(self, whole, key):
        refused(key, lambda: next(gpt2.train({key: OTHER[key]}, out=whole, resume=True)))
    def test_resume_takes_other_values_of_the_rest(self, whole, config, tmp_path, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
        folder = shutil.copytree(whole / "2", tmp_path / "run")
        gpt2.save_checkpoint(folder / "last.pt", load(folder / "last.pt") | {"best_val_loss": 0.5})
        data = str(shutil.copy(config["data"], tmp_path / "same.txt"))
        given = {"max_steps": 4, "eval_every": 3, "checkpoint_every": 9, "sample_prompt": "He",
                 "device": "cpu", "compile": True, "data": data, "batch_size": 2, "grad_accumulation": 3}
        assert given.keys() | OTHER.keys() == gpt2.CONFIG.keys()
        rows = list(gpt2.train(given, out=folder, resume=True))
        assert len(compiled) == 1 and len(rows) == 2 and rows[0]["sample"].startswith("He")
        assert [row["step"] for row in metrics_of(folder) if "val_loss" in row] == [2, 3]
        assert load(folder / "best.pt")["step"] == 2 and load(folder / "last.pt")["best_val_loss"] == 0.5
        for change in ({"data": str(HERE / "README.md")}, {"batch_size": 1}, {"grad_accumulation": 1}):
            refused("data or batch_size", lambda: next(gpt2.train(change, out=folder, resume=True)))
    def test_a_checkpoint_that_does_not_fit_is_not_continued(self, whole, tmp_path):
        """AdamW would write past moments that are too small."""
        for key in ("optimizer", "model", "step", "metrics", "scaler", "config", "exp_avg", "exp_avg_sq"):
            folder = shutil.copytree(whole / "3", tmp_path / key)
            for odd in (torch.zeros(8, 24), torch.zeros(1).expand(24, 8)):  # the latter is one in memory
                checkpoint = load(whole / "3" / "last.pt")
                states = checkpoint["optimizer"]["state"].values()
                moments = next(state for state in states if state["exp_avg"].shape == (24, 8))
                if checkpoint.pop(key, None) is None:
                    moments[key] = odd
                gpt2.save_checkpoint(folder / "last.pt", checkpoint)
                refused(f"last.pt.*({key}|shape)", lambda: next(gpt2.train(out=folder, resume=True)))
    def test_a_run_is_replaced_with_overwrite_only_and_at_the_first_save(self, whole, config, tmp_path):
        folder = shutil.copytree(whole / "12", tmp_path / "run")
        refused("--resume.*--overwrite.*--out", lambda: next(gpt2.train(config, out=folder)))
        run = gpt2.train(config | {"val_fraction": 0.0, "checkpoint_every": 2}, out=folder, overwrite=True)
        next(run)
        assert load(folder / "last.pt")["step"] == 12 and (folder / "best.pt").exists()
        next(run)
        assert load(folder / "last.pt")["step"] == 2 and not (folder / "best.pt").exists()
    def test_the_picture_shows_both_losses_and_the_lowest(self, monkeypatch):
        from matplotlib.figure import Figure
        drawn = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: drawn.append(figure.axes[0]))
        rows = [{"step": 1, "train_loss": 9.0}, {"step": 2, "train_loss": 5.0, "val_loss": 6.5},
                {"step": 3, "train_loss": 4.0, "val_loss": 7.5}]
        gpt2.plot_losses(rows[:1], io.BytesIO())  # without a measurement
        gpt2.plot_losses(rows, io.BytesIO())
        lines = [list(zip(*line.get_data())) for line in drawn[1].lines]
        assert lines == [[(1, 9.0), (2, 5.0), (3, 4.0)], [(2, 6.5), (3, 7.5)], [(2, 6.5)]]
        assert drawn[1].get_ylim()[0] == 0 and "6.50" in drawn[1].get_legend().get_texts()[2].get_text()
    @cases("call", ["fsync", "replace"])
    def test_a_failed_save_leaves_whole_files_and_the_run_goes_on(self, config, tmp_path, call, monkeypatch, caplog):
        """For every k, the k-th call fails once. Only where that spoils the last save is there an error."""
        given = config | {"max_steps": 3, "eval_every": 1, "checkpoint_every": 1, "learning_rate": 0.02}
        real = getattr(os, call)
        list(gpt2.train(given, out=tmp_path / "whole"))
        for k in range(1, 11):  # best.pt, metrics.jsonl and last.pt in each step, and the picture
            folder = tmp_path / str(k)
            caplog.clear()
            monkeypatch.setattr(os, call, at_call(k, fail(OSError(28, "No space left on device")), real))
            run = gpt2.train(given, out=folder)
            failed = min((k + 2) // 3, 3)
            for step in (1, 2, 3):
                next(run)
                names = set(os.listdir(folder))
                assert names <= {"best.pt", "last.pt", "loss.png", "metrics.jsonl"}  # no part of a file
                assert all(read(folder / name) for name in names & {"best.pt", "last.pt"})
                assert "metrics.jsonl" not in names or len(metrics_of(folder)) in (step - 1, step)
                saved = step - 1 if step == failed and k < 10 else step
                assert (load(folder / "last.pt")["step"] if "last.pt" in names else 0) == saved
            assert f"step {failed} " in caplog.text and "No space left" in caplog.text
            if failed == 3:
                refused("step 3, the last, is not saved", lambda: next(run), OSError)
            else:
                assert list(run) == []
                assert_same_run(folder, tmp_path / "whole")
    def test_a_damaged_checkpoint_is_named_and_nothing_in_it_is_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        good = save_model(lively(TINY), tmp_path / "good.pt").read_bytes()
        for content in (b"", b"words " * 99, good[:9000], good[:-1], pickle.dumps(Trap())):
            Path("bad.pt").write_bytes(content)
            refused("bad.pt", lambda: read("bad.pt"))
        weights = lively(TINY).state_dict()
        whole = {"config": TINY, "model": weights}
        for odd in ([1], {"model": weights}, whole | {"model": Trap()}, whole | {"model": {}},
                    whole | {"config": TINY | {"n_heads": 5}}, whole | {"model": weights | {"more": weights}},
                    whole | {"model": weights | {"final_norm.bias": torch.ones(5)}}):
            torch.save(odd, "bad.pt")
            refused("bad.pt", lambda: read("bad.pt"))
        assert not Path("trapped").exists()
    @cases("device, name, ability, dtype", [
        ("cuda", "auto", (8, 0), torch.bfloat16), ("cuda", "auto", (7, 5), torch.float16),
        ("cuda", "fp32", (8, 0), torch.float32), ("cpu", "auto", "amx", torch.bfloat16),
        ("cpu", "auto", "avx512_bf16", torch.bfloat16), ("cpu", "auto", "avx512_f", torch.float32),
        ("cpu", "fp16", "amx", torch.float16), ("mps", "auto", "amx", torch.float32)])
    def test_auto_is_an_accelerator_and_the_precision_it_has(self, monkeypatch, device, name, ability, dtype):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ability)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {ability: True, "amx_bf16": ability == "amx"})
        for owner, part in ((torch, "autocast"), (torch.amp, "GradScaler")):
            monkeypatch.setattr(owner, part, lambda *arguments, enabled: (*arguments, enabled))
        scaled = device == "cuda" and dtype == torch.float16
        parts = gpt2.mixed_precision(name, torch.device(device))
        assert parts == (dtype, (device, dtype, dtype != torch.float32), (device, scaled))
        found = None if device == "cpu" else torch.device(device, 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch, "ones", lambda count, device: torch.zeros(count))
        assert str(gpt2.pick_device("auto")) == device
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert str(gpt2.pick_device("auto")) == ("cuda:3" if device == "cuda" else device)
        monkeypatch.setattr(torch, "ones", fail(RuntimeError("no driver")))
        refused(f"no device '{device}", lambda: gpt2.pick_device(device))
    @long_test
    def test_a_run_under_kill_9_can_be_resumed_to_the_same_end(self, config, tmp_path):
        given = config | {"epochs": 4, "eval_every": 1, "checkpoint_every": 1}
        list(gpt2.train(given, out=tmp_path / "whole"))
        for i in range(4):
            folder = tmp_path / str(i)
            while not (folder / "last.pt").exists() or load(folder / "last.pt")["step"] < 28:
                how = ["--resume"] if (folder / "last.pt").exists() else words(given)
                with start("train", *how, "--out", folder) as process:
                    if any(line.startswith("step ") for line in iter(process.stderr.readline, "")):
                        time.sleep(random.uniform(0, 0.4))  # no matter where it strikes
                    process.kill()
            assert_same_run(folder, tmp_path / "whole")
    @long_test
    @cases("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
    def test_a_real_signal_saves_and_says_how_to_go_on(self, config, tmp_path, name, status):
        given = config | {"epochs": 4000, "eval_every": 1, "checkpoint_every": 10_000}
        with start("train", *words(given), "--out", tmp_path) as process:
            assert any(line.startswith("step 2/") for line in iter(process.stderr.readline, ""))
            process.send_signal(getattr(signal, name))
            notes = process.communicate(timeout=60)[1]
        assert process.returncode == status and "--resume" in notes and "Traceback" not in notes
        assert len(metrics_of(tmp_path)) == load(tmp_path / "last.pt")["step"] > 1
    @long_test
    def test_a_full_disk_keeps_the_last_save(self, config, tmp_path, caplog, request):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = f"mount -t tmpfs -o size=8m tmpfs {disk}"  # one checkpoint fits in, not two
        if subprocess.run(mount, shell=True, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk], check=True))
        run = gpt2.train(config | {"val_fraction": 0.0, "checkpoint_every": 1}, out=disk)
        next(run)
        before = (disk / "last.pt").read_bytes()
        next(run)
        assert (disk / "last.pt").read_bytes() == before and not list(disk.glob("*.part"))
        assert "step 2 was not saved" in caplog.text
        refused("step 2.* not saved", run.close, OSError)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool, "I64": torch.int64}
def write_safetensors(path, tensors, **edit):
    """A writer of the format, from its description; `edit` spoils the entry of one tensor."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
        entry = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        header[name] = entry | (edit if name == "h.0.ln_1.weight" else {})
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
def edit_config(folder, **changes):
    """Change config.json; a key that becomes "gone" is left out."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    kept = {key: value for key, value in config.items() if value != "gone"}
    write(folder / "config.json", json.dumps(kept))
@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder that a tiny model without biases for queries, keys and values was exported to."""
    folder = tmp_path_factory.mktemp("exported") / "deep" / "folder"
    lively(TINY | {"qkv_bias": False, "dropout_rate": 0.2}).bfloat16().save_pretrained(folder)
    return folder
@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "folder")

class TestPretrained:
    @cases("name, layers, heads, width, parameters", [
        ("gpt2", 12, 12, 768, 124_439_808), ("gpt2-medium", 24, 16, 1024, 354_823_168),
        ("gpt2-large", 36, 20, 1280, 774_030_080), ("gpt2-xl", 48, 25, 1600, 1_557_611_200)])
    def test_openais_sizes(self, name, layers, heads, width, parameters):
        sizes = {"n_layers": layers, "n_heads": heads, "emb_dim": width}
        fixed = {"vocab_size": 50257, "context_length": 1024, "qkv_bias": True}
        assert gpt2.OPENAI_SIZES[name] == sizes | fixed and len(gpt2.OPENAI_SIZES) == 4
        with torch.device("meta"):
            assert gpt2.GPT2(gpt2.OPENAI_SIZES[name] | {"dropout_rate": 0.1}).num_parameters() == parameters
    def test_export_writes_openais_names_and_layout_and_gives_the_model_back(self, exported):
        weights = openai_weights(lively(TINY | {"qkv_bias": False}).bfloat16().float())  # no bias: zeros
        tensors = torch.load(exported / "pytorch_model.bin", weights_only=True)
        assert same(tensors, weights) and tensors["h.0.attn.c_attn.weight"].shape == (12, 36)
        assert json.loads((exported / "config.json").read_text("utf-8")) == {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_positions": 8,
            "n_ctx": 8, "n_embd": 12, "n_head": 3, "n_layer": 2, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "resid_pdrop": 0.2, "attn_pdrop": 0.2,
            "embd_pdrop": 0.2}
        assert same(openai_weights(read(exported)), weights)
        assert read(exported).config == TINY | {"dropout_rate": 0.2}
    def test_vocabulary_and_merges_stand_under_their_names_and_alone(self, exported, tmp_path):
        vocabulary = json.loads((exported / "vocab.json").read_text("utf-8"))
        assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1 == END
        assert (exported / "merges.txt").read_text("utf-8").splitlines()[1] == "Ġ t"
        assert sorted(os.listdir(exported)) == ["config.json", "merges.txt", "pytorch_model.bin", "vocab.json"]
        write(tmp_path / "other", "")  # perhaps weights, which would be read instead of the new
        refused("not empty", lambda: read(exported).save_pretrained(tmp_path))
    @cases("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @cases("prefix", ["", "transformer."])
    @cases("files", [["model"], ["model-1", "model-2"], []])
    def test_a_folder_of_each_kind_is_read(self, folder, dtype, prefix, files):
        """One file or several, or that of older folders; with the causal masks of older files, and a head."""
        tensors = {prefix + name: tensor.to(dtype) for name, tensor in openai_weights(lively(TINY)).items()}
        for i, mask in enumerate((torch.uint8, torch.bool) if prefix else ()):
            tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=mask).tril()
            tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
            tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
        torch.save({} if files else tensors, folder / "pytorch_model.bin")
        for i, file in enumerate(files):
            part = {name: tensors[name] for name in sorted(tensors)[i :: len(files)]}
            write_safetensors(folder / f"{file}.safetensors", part)
        model = read(folder)
        assert same(openai_weights(model), openai_weights(lively(TINY).to(dtype).float()))
        assert not model.training and all(p.requires_grad for p in model.parameters())
    def test_a_config_that_would_be_computed_wrongly_or_does_not_fit_is_refused(self, exported, tmp_path):
        for key, value, cause in (
                ("model_type", "llama", 0), ("activation_function", "gelu", 0), ("n_embd", "gone", "n_embd"),
                ("layer_norm_epsilon", 1e-6, 0), ("scale_attn_by_inverse_layer_idx", True, 0),
                ("scale_attn_weights", False, 0), ("tie_word_embeddings", False, 0), ("n_head", 5, "n_heads"),
                ("n_embd", "wide", "emb_dim"), ("n_layer", 10**12, "n_layers"), ("n_layer", 1, "blocks.1"),
                ("n_layer", 3, "blocks.2"), ("n_positions", 9, "position_embedding")):
            folder = shutil.copytree(exported, tmp_path / "folder", dirs_exist_ok=True)
            edit_config(folder, **{key: value})
            refused(f"folder.*{cause or f'{key}.*{value}'}", lambda: read(folder))
            if not cause:  # left out, it is as OpenAI has it
                edit_config(folder, **{key: "gone"}, resid_pdrop="gone")
                assert read(folder).config["dropout_rate"] == 0.1
    def test_causal_masks_of_layers_10_and_up_of_an_old_file_are_left_out(self, folder):
        model = lively(TINY | {"n_layers": 12, "emb_dim": 6})
        weights = openai_weights(model)
        edit_config(folder, n_layer=12, n_embd=6)
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(12)}
        torch.save(weights | masks, folder / "pytorch_model.bin")
        assert same(read(folder).state_dict(), model.state_dict())
        for name in ("lm_head", "extra"):  # other weights are not left out
            torch.save(weights | {f"{name}.weight": weights["wte.weight"] + 1}, folder / "pytorch_model.bin")
            refused(f"folder.*{name}", lambda: read(folder))
    def test_a_damaged_file_is_named_and_nothing_in_it_is_run(self, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        path = folder / "model.safetensors"
        for edit in ({"data_offsets": [10**9, 10**9 + 48]}, {"data_offsets": [0, 1, 2]}, {"shape": [11]},
                     {"shape": ["x"]}, {"dtype": "F4"}):
            write_safetensors(path, openai_weights(lively(TINY)), **edit)
            refused("model.safetensors", lambda: read(folder))
        deep = (10**5).to_bytes(8, "little") + b"[" * 10**5
        for content in (path.read_bytes()[:-100], b"", b"\2\0\0\0\0\0\0\0[]", b"words " * 99, deep):
            path.write_bytes(content)
            refused("model.safetensors", lambda: read(folder))
        path.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        refused("folder", lambda: read(folder))
        assert not Path("trapped").exists()
    def test_a_size_is_downloaded_from_the_hub_and_what_exists_comes_first(self, monkeypatch, tmp_path):
        asked = []
        monkeypatch.setitem(gpt2.OPENAI_SIZES, "gpt2", {key: TINY[key] for key in gpt2.OPENAI_SIZES["gpt2"]})
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: (
            asked.append((url, options)) or openai_weights(lively(TINY))))
        for variable, host in (("", "https://huggingface.co"), ("http://mirror", "http://mirror")):
            monkeypatch.setenv("HF_ENDPOINT", variable)
            model = read("gpt2")
            url = f"{host}/openai-community/gpt2/resolve/main/pytorch_model.bin"
            assert asked.pop() == (url, {"file_name": "gpt2.bin", "weights_only": True})
        assert same(model.state_dict(), lively(TINY).state_dict()) and model.config["dropout_rate"] == 0.1
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail(OSError("no route")))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
        refused(f"http://mirror.*gpt2.*{tmp_path}.*no route", lambda: read("gpt2"))  # which file to look at
        save_model(lively(TINY, seed=5), tmp_path / "gpt2")
        assert same(read("gpt2").state_dict(), lively(TINY, seed=5).state_dict())

class TestLargeTexts:
    def test_tokens_of_pieces_are_those_of_the_whole(self, tmp_path, tokenizer, monkeypatch):
        """Files read in blocks of a few characters, so that every place is somewhere a cut."""
        rng = random.Random(0)
        odd = [" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u2028", "\u3000", "\xa0", "\0", "\x0b", "12",
               "<|endoftext|>", "'s", "é", "🙂", "漢", " the", "!?", "\ufeff", "word", "a"]
        class Blocks(io.TextIOWrapper):
            def read(self, size=-1):
                return super().read(rng.randint(1, 40))
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
        monkeypatch.setattr(gpt2, "open", lambda path, **more: Blocks(io.FileIO(path), **more), raising=False)
        for number in range(60):
            text = "".join(rng.choice(odd) for _ in range(300))
            tokens = gpt2.tokenize_file(str(write(tmp_path / f"{number}.txt", text)))
            assert tokens.tolist() == tokenizer.encode(text.removeprefix("\ufeff"), allowed_special="all")
            assert tokens.dtype == torch.uint16
    def test_a_byte_order_mark_is_no_text_and_what_is_no_text_is_refused(self, tmp_path, tokenizer, caplog):
        path = tmp_path / "some.txt"
        path.write_bytes(b"\xef\xbb\xbfhello world")
        assert gpt2.tokenize_file(str(path)).tolist() == tokenizer.encode("hello world")
        caplog.set_level("INFO")
        for content, noted in ((b"one\ntwo", False), (b"one\r\ntwo", True)):
            path.write_bytes(content)
            gpt2.tokenize_file(str(path))
            assert ("Windows line ends" in caplog.text) == noted
        for content, cause in ((b"", "empty"), (b"\xef\xbb\xbf", "empty"), (b"caf\xe9 au", "UTF-8.*0xe9")):
            path.write_bytes(content)
            refused(f"some.txt.*{cause}|0xe9", lambda: gpt2.tokenize_file(str(path)))
    @cases("rows, outputs, pieces, columns", [
        (1, 336, 48, 1), (4, 336, 48, 4), (5, 336, 48, 7), (128, 336, 48, 7), (129, 336, 0, 0), (1, 240, 0, 0),
        (2, 250, 25, 2), (1, 331, 1, 1), (1, 330, 33, 1)])
    def test_few_rows_are_multiplied_in_pieces_with_the_same_result(self, monkeypatch, rows, outputs, pieces, columns):
        cuts = []
        real = torch.baddbmm
        monkeypatch.setattr(torch, "baddbmm", lambda *parts: cuts.append(parts[2].shape[::2]) or real(*parts))
        weight = torch.randn(outputs, 400)  # from 250 · 400 = 100,000 numbers on
        x = torch.randn(1, rows, 400)
        for bias in (torch.randn(outputs), None):
            expected = nn.functional.linear(x, weight, bias)
            assert torch.equal(gpt2.linear(x, weight, bias), expected)  # with gradients: as PyTorch does it
            with torch.no_grad():
                assert torch.allclose(gpt2.linear(x, weight, bias), expected, atol=1e-4)
        with torch.no_grad():
            gpt2.linear(x.double(), weight.double())  # other types, too
        assert cuts == ([(pieces, columns)] * 2 if pieces else [])

OPTIONS = {  # of each command, beside keys of CONFIG
    "train": {"model_size": "", "init": "", "resume": False, "overwrite": False, "out": "checkpoints"},
    "generate": {"model": "checkpoints/last.pt", "max_tokens": 100, "do_sample": False, "temperature": 1.0,
                 "top_k": 0, "top_p": 1.0, "num_samples": 1, "instruct": False},
    "eval": {"model": "checkpoints/last.pt", "all": False, "json": False},
    "export": {"model": "checkpoints/last.pt"}}
KEYS = {"train": [*gpt2.CONFIG], "generate": ["seed", "device", "precision"],
        "eval": ["data", "stride", "device", "precision"], "export": []}

# A command line, a colon, and what its error says; two spaces or more end both.
BAD_LINES = """
nonsense:nonsense               train --epohcs 3:--epohcs       train --epoch 3:--epoch
train extra:extra               train --epochs many:many        train --epochs 0:epochs is 0
train --n_heads 3:n_heads 3     train --device warp:warp        train --precision fp8:fp8
generate --model good.pt --seed -1:seed is -1   generate --seed x:--seed        generate --resume:--resume
export:folder                   generate:last.pt                train --init missing:missing
train --data missing.txt:missing        train --data latin.txt:latin.txt.*UTF-8
train --data empty.txt:empty.txt        train --data short.txt:short.txt.*context_length
train --data broken.json:n.json         train --data broken.jsonl:broken.jsonl, entry 2
train --data number.jsonl:entry 1       train --data keys.jsonl:keys.jsonl, entry 1.*prompt
train --data null.jsonl:output          train --data single.jsonl:val_fraction
train --data empty.jsonl:empty.js       train --vocab_size 61:vocab_size
train --resume --out nowhere:No such file.*nowhere  train --resume --out run --emb_dim 16:emb_dim.* 8
train --out run:--resume.*--over        train --init good.pt --emb_dim 16:emb_dim.* 8
train --resume --out run:max_steps      train --init good.pt --context_length 32:context_length 32
train --model_size gpt3:gpt3.*gpt2-m    generate --model missing.pt:missing.pt.*gpt2-xl
generate --model words.pt:no checkpoint  generate --model good.pt --temperature -1:temperature
generate --model trap.pt:trap.pt        generate --model good.pt --top_k -1:top_k
generate --model few.pt:vocab_size 61   generate --model good.pt --top_p 0:top_p
eval --model few.pt:vocab_size 61       generate --model good.pt --precision x:'x'
export new --model missing:missing      eval --model good.pt --data missing.txt:missing
export a.pt --model few.pt:a.pt         eval --model good.pt --data keys.jsonl:entry 1
eval --model good.pt --data one.txt:one.txt  eval --model good.pt --data latin.txt:UTF-8
eval --model good.pt --stride -5:stride is -5   train --data none.jsonl:entry 1.*null  train --data .:no file
"""
Terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})

@pytest.fixture(scope="session")
def shelf(tmp_path_factory, config):
    """A folder with good files and bad ones."""
    folder = tmp_path_factory.mktemp("shelf")
    save_model(lively(SMALL), folder / "good.pt")
    save_model(lively(TINY), folder / "few.pt")
    list(gpt2.train(config | {"max_steps": 1}, out=folder / "run"))
    files = {"latin.txt": b"caf\xe9 au lait", "empty.txt": b"", "short.txt": b"hello there", "one.txt": b"a",
             "broken.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "empty.jsonl": b"",
             "keys.jsonl": b'{"text": "a"}\n', "number.jsonl": b"7\n", "broken.json": b'[{"prompt": ]',
             "null.jsonl": b'{"instruction": "x", "input": "y"}\n', "words.pt": b"words " * 99, "a.pt": b"a",
             "none.jsonl": b'{"prompt": "a", "completion": null}\n',
             "single.jsonl": b'{"prompt": "a", "completion": "b"}\n', "trap.pt": pickle.dumps(Trap())}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
@pytest.fixture
def at_shelf(shelf, cli, monkeypatch):
    monkeypatch.chdir(shelf)
    return cli

class TestCommandLine:
    @cases("line, cause", [case.split(":") for case in re.findall(r"\S.*?:.*?(?=\s{2,}|\n)", BAD_LINES)])
    def test_a_bad_command_line_is_one_line_and_status_2(self, at_shelf, shelf, line, cause):
        before = sorted(shelf.rglob("*"))
        result = at_shelf(*line.split())
        *notes, last = result.err.splitlines()
        assert (result.code, result.out, last[:7]) == (2, "", "gpt2.py") and re.search(cause, last), last
        assert all(note[:6] in ("data  ", "model ") for note in notes) and sorted(shelf.rglob("*")) == before
    @cases("command", OPTIONS)
    def test_help_shows_every_option_with_its_meaning_and_default(self, cli, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "300")
        blocks = cli(command, "--help").out.split("\n  --")[1:]
        shown = {re.match(r"\w+", block).group(): " ".join(block.split()) for block in blocks}
        options = OPTIONS[command] | {key: gpt2.CONFIG[key] for key in KEYS[command]}
        assert shown.keys() == options.keys()
        for key, value in options.items():
            assert re.fullmatch(rf"{key}.* [a-z]{{3}}.* \(default: {re.escape(str(value))}\)", shown[key])
    def test_train_says_what_it_does_and_what_comes_next(self, cli, config, monkeypatch):
        """With a clock by which each step lasts 50 seconds, and what it measures 7."""
        seconds, ticks = itertools.count(9, 50), itertools.count(9, 7)
        clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=lambda: next(ticks))
        monkeypatch.setattr(gpt2, "time", clock)
        result = cli("train", *words(config | {"max_steps": 5, "eval_every": 2}), "--out", "new/run")
        rows = metrics_of(Path("new/run"))
        assert (result.code, result.out, rows[0]["tokens_per_second"]) == (0, "", 6.9)  # of 48 targets
        steps = [line for line in result.err.splitlines() if line.startswith("step ")]
        for line, row, left in zip(steps, (rows[1], rows[3], rows[4]), ("2:30", "0:50", "0:00"), strict=True):
            assert re.match(rf"step {row['step']}/5 .*{row['train_loss']:.3f}  validation .* {left} ", line)
        said = "172 tokens to train on, 20 to validate", "403,008 parameters", "    I HAD always thought"
        assert all(part in result.err for part in said)
        assert "generate --model new/run/last.pt" in result.err.splitlines()[-1]
        write("e.jsonl", '{"prompt": "one two three", "completion": " four"}\n' * 3)
        assert cli("train", *words(config | {"data": "e.jsonl", "max_steps": 1}), "--out", "third").code == 0
        assert cli("train", "--resume", "--max_steps", 2, "--out", "third").out.startswith("loss")  # as `eval` says it
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # Ctrl-C ends that at once
        assert metrics_of(Path("third"))[0]["tokens_per_second"] == 1.1  # of 2 x 4 tokens, 4 of them targets
        monkeypatch.setenv("RANK", "1")  # only the first process speaks and writes
        result = cli("train", *words(config | {"max_steps": 1}), "--out", "second")
        assert (result.code, result.err, Path("second").exists()) == (0, "", False)
    def test_every_key_is_an_option_and_so_is_where_to_begin(self, cli, config, monkeypatch):
        full = {"qkv_bias": False, "max_steps": 1, "seed": 5, "sample_prompt": "He said", "device": "cpu"}
        full |= gpt2.CONFIG | config | full | {"precision": "fp32"}
        assert cli("train", *words(full)).code == 0 and load("checkpoints/last.pt")["config"] == full
        sizes = {key: SMALL[key] for key in SMALL if key != "dropout_rate"}
        monkeypatch.setitem(gpt2.OPENAI_SIZES, "gpt2", sizes)
        given = words({key: value for key, value in config.items() if key not in TINY} | {"max_steps": 1})
        for how in ("--model_size gpt2 --n_heads 4 --overwrite", "--resume --max_steps 2",
                    "--init checkpoints/best.pt --overwrite"):
            assert cli("train", *(given if "resume" not in how else ()), *how.split()).code == 0
            assert read("checkpoints/last.pt").config == SMALL | {"n_heads": 4}
    @cases("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
    def test_a_signal_within_a_step_saves_it_and_says_how_to_go_on(self, cli, config, whole, name, status):
        number = getattr(signal, name)
        strike = at_call(3, lambda: signal.raise_signal(number), gpt2.learning_rate_at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpt2, "learning_rate_at", strike)
            result = cli("train", *words(config | {"checkpoint_every": 99, "eval_every": 99}), "--out=run")
        assert result.code == status and "train --resume --out run" in result.err.splitlines()[-1]
        assert "finishing this step" in result.err
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one would not wait
        assert sorted(os.listdir("run")) == ["last.pt", "loss.png", "metrics.jsonl"]
        assert len(metrics_of(Path("run"))) == load("run/last.pt")["step"] == 3
        assert cli("train", "--resume", "--eval_every", 2, "--out", "run").code == 0
        assert same(load("run/last.pt")["model"], load(whole / "last.pt")["model"])
    def test_what_a_machine_lacks_is_one_line_and_a_bug_is_not(self, cli, monkeypatch):
        errors = {MemoryError(): "batch_size", RuntimeError("CUDA out of memory"): "batch_size",
                  OSError("disk\non fire"): "disk on fire", FloatingPointError("no number"): "no number"}
        for error, cause in errors.items():
            monkeypatch.setattr(gpt2, "load_data", fail(error))
            result = cli("train")
            assert result.code == 2 and re.search(f"error: .*{cause}", result.err.splitlines()[-1])
        monkeypatch.setattr(gpt2, "load_data", fail(KeyboardInterrupt()))
        assert cli("train").code == 130 and not Path("checkpoints").exists()
        monkeypatch.setattr(gpt2, "load_data", fail(RuntimeError("shape")))
        refused("shape", lambda: cli("train"), RuntimeError)
    def test_generate_continues_the_prompt_and_ends_at_the_end_of_text(self, at_shelf, tokenizer, tmp_path):
        def text(*options, model="good.pt"):
            result = at_shelf("generate", *options, "--model", model)
            assert (result.code, result.err) == (0, "")
            return result.out
        new = gpt2.generate(read("good.pt"), gpt2.text_to_token_ids("Once upon", tokenizer), 12, eos_id=END)
        assert text("Once upon", "--max_tokens", 12) == gpt2.token_ids_to_text(new, tokenizer) + "\n"
        assert text().startswith("I HAD always thought")
        new = gpt2.generate(read("good.pt"), torch.tensor([[END]]), 5, eos_id=END)[:, 1:]
        assert text("", "--max_tokens", 5) == gpt2.token_ids_to_text(new, tokenizer) + "\n"  # a text begins
        path = speaking(tmp_path / "a.pt", [*tokenizer.encode(" and so."), END, *tokenizer.encode(" More")])
        assert text("Once", model=path) == "Once and so.\n"
        asked = tokenizer.encode(gpt2.instruction_prompt("Is it?"))  # its answer alone is printed
        speaking(path, tokenizer.encode("Yes.") + [END], after=len(asked))
        assert text("Is it?", "--instruct", model=path) == "Yes.\n"
    def test_a_character_of_several_tokens_is_printed_whole_and_at_once(self, cli, tokenizer):
        text = " A🙂é漢字B"
        speaking("says.pt", [*tokenizer.encode(text), END])
        speaking("half.pt", [tokenizer.encode("🙂")[0], END])
        assert cli("generate", "Say", "--model", "half.pt").out == "Say\ufffd\n"
        said = []
        screen = SimpleNamespace(write=said.append, flush=lambda: said.append("flush"), isatty=bool)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            assert gpt2.main(["generate", "Say", "--model", "says.pt"]) == 0
        assert "".join(said).replace("flush", "") == f"Say{text}\n"
        assert {"🙂", "漢", "B"} <= set(said) and said.count("flush") > len(text)
    def test_control_characters_never_reach_a_terminal(self, cli, tokenizer):
        said = tokenizer.encode("\x1b[2J\tx\n\x07")
        speaking("beeps.pt", [*said, END], after=len(tokenizer.encode("\x9bp")))
        assert cli("generate", "\x9bp", "--model", "beeps.pt").out == "\x9bp\x1b[2J\tx\n\x07\n"
        assert "\x1b" not in cli("generate", "--model", "\x1b[2J").err  # nor by an error
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", Terminal())
            assert gpt2.main(["generate", "\x9bp", "--model", "beeps.pt"]) == 0
            assert sys.stdout.getvalue() == "\\x9bp\\x1b[2J\tx\n\\x07\n"
        assert gpt2.printable("".join(map(chr, range(256)))).count("\\x") == 32 - 2 + 33
    def test_live_lines_are_for_terminals_and_fit_them(self, monkeypatch):
        monkeypatch.setattr(os, "get_terminal_size", {2: os.terminal_size((20, 24))}.get)  # of standard error
        gpt2.log.addHandler(gpt2.Notes())
        gpt2.log.setLevel(logging.INFO)
        shown = "\r\x1b[K" + "x" * 19 + "\r\x1b[K" + "y" * 30 + "\n"
        for screen, expected in ((Terminal(), shown), (io.StringIO(), "y" * 30 + "\n")):
            monkeypatch.setattr(sys, "stderr", screen)
            gpt2.log.info("x" * 30, extra={"live": True})
            gpt2.log.info("y" * 30)
            assert screen.getvalue() == expected
        screen.write = fail(OSError("full"))
        gpt2.log.info("a note that nobody can read stops nothing")
    def test_a_sampling_option_implies_drawing_and_one_text_is_the_first_of_several(self, at_shelf):
        def text(options):
            return at_shelf("generate", "Once", "--model=good.pt", "--max_tokens=9", *options.split()).out
        greedy, drawn = text(""), text("--do_sample")
        for options in ("--temperature 1", "--top_k 60000", "--top_p 1", "--top_k 0"):
            assert text(options) == drawn != greedy
        for options in ("--temperature 0", "--top_k 1", "--top_p 1e-9"):
            assert text(options) == greedy
        parts = re.split(r"--- sample (\d) of 3 ---\n", text("--do_sample --num_samples 3"))
        assert parts[:2] == ["", "1"] and parts[3::2] == ["2", "3"] and len(set(parts[2::2])) == 3
        assert parts[2] == drawn and text("--do_sample --seed 43") == parts[4]
    def test_a_long_prompt_is_noted(self, at_shelf):
        for prompt, noted in ((" one" * 9, True), (" one" * 8, False)):
            result = at_shelf("generate", prompt, "--model", "good.pt", "--max_tokens", 1)
            assert result.code == 0 and bool(re.search("9 tokens.* 8 ", result.err)) == noted
    def test_a_prompt_from_standard_input_and_a_closed_pipe_end_quietly(self, at_shelf, monkeypatch):
        """The one real process: `echo Once | python gpt2.py generate - ... | head -c 1`."""
        options = ["--model", "good.pt", "--max_tokens", 5]
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nupön\n"))  # as echo sends it
        assert at_shelf("generate", "-", *options).out == at_shelf("generate", "Once\nupön", *options).out
        assert at_shelf("generate", "Once", "upon", *options).out == at_shelf("generate", "Once upon", *options).out
        with start("generate", "-", "--model", "good.pt", "--max_tokens", 10**6) as process:
            process.stdin.write("Once\n")
            process.stdin.close()
            assert process.stdout.read(1) == "O"
            process.stdout.close()
            assert process.stderr.read() == "" and process.wait() == 141
    @cases("has", [False, bool(torch.cpu.get_capabilities().get("avx512_bf16"))])
    def test_precision_says_in_what_numbers_a_model_computes(self, at_shelf, config, monkeypatch, has):
        def pack(model, real=gpt2.pack_matrices):
            real(model)
            packed.append([part.weight.data.zero_() for part in model.modules() if isinstance(part, nn.Linear)])
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has})  # auto is fp32 even so
        monkeypatch.setattr(gpt2, "pack_matrices", pack)
        losses, packed = [], []
        for name in ("auto", "fp32", "bf16", "fp16"):
            options = ["--model=good.pt", "--data", config["data"], "--json", "--precision", name]
            losses.append(json.loads(at_shelf("eval", *options).out)["loss"])
        assert losses[0] == losses[1] and losses == approx([losses[0]] * 4, rel=0.02) and len({*losses}) == 3
        assert len(packed) == has  # bf16 alone, and then only packed copies are used
    def test_eval_reports_loss_perplexity_and_bits_of_each_token_once(self, at_shelf, tmp_path, tokenizer):
        text = VERDICT[:300] + "<|endoftext|>Ünïcode 🙂 counts in bytes."
        path = write(tmp_path / "text.txt", text)
        ids = tokenizer.encode(text, allowed_special="all")
        n_bytes = len(text.replace("<|endoftext|>", "").encode()) - len(tokenizer.decode(ids[:1]))
        for given, stride in (([], 4), (["--stride", 1], 1), (["--stride", 8], 8)):
            loss = gpt2.evaluate(read("good.pt"), gpt2.GPTDataset(ids, 8), stride=stride)
            expected = {"loss": loss, "perplexity": math.exp(loss), "tokens": len(ids) - 1,
                        "bits_per_byte": loss * (len(ids) - 1) / math.log(2) / n_bytes}
            options = ["eval", "--model", "good.pt", "--data", path, *given]
            assert json.loads(at_shelf(*options, "--json").out) == approx(expected, rel=1e-6)
            table = at_shelf(*options).out.split()
            assert table[:2] == ["loss", f"{loss:.4f}"] and table[4:6] == ["tokens", str(len(ids) - 1)]
    def test_eval_measures_what_was_held_back_unless_all_is_asked_for(self, cli, config, whole):
        def report(data, *options):
            result = cli("eval", "--model", whole / "last.pt", "--json", "--data", data, *options)
            assert ("held back" in result.err) == ("--all" not in options and str(data) != "other.txt")
            return json.loads(result.out)
        n_train, n_val = (len(part.token_ids) for part in gpt2.load_data(gpt2.CONFIG | config))
        copy = report(shutil.copy(config["data"], "copy.txt"), "--stride", 8)  # known by its bytes
        assert (copy["loss"], copy["tokens"]) == approx((metrics_of(whole)[-1]["val_loss"], n_val - 1), rel=1e-5)
        assert report(config["data"], "--all")["tokens"] == n_train + n_val - 1
        assert report(write("other.txt", VERDICT[:800]))["tokens"] > n_train
    def test_eval_of_examples_reports_accuracy_over_2_to_50_labels(self, at_shelf, tmp_path):
        model, losses, reports = read("good.pt"), [], []
        for label in (" 0", " 1"):
            pairs = gpt2.CompletionDataset([(f"{i} is", label) for i in range(51)], 8)
            losses.append([gpt2.summed_loss(model(x[None]), y[None]).item() for x, y in pairs])
        model.final_norm.weight.data.mul_(1e5)  # its perplexity has an upper end
        save_model(model, tmp_path / "loud.pt")
        for n, path in ((1, "good.pt"), (50, "good.pt"), (51, tmp_path / "loud.pt"), (2, "good.pt")):
            rows = [{"prompt": f"{i} is", "completion": f" {i % n}"} for i in range(51)]
            data = write_lines(tmp_path / "a.jsonl", *rows)
            reports.append(json.loads(at_shelf("eval", "--model", path, "--data", data, "--json").out))
        assert ["accuracy" in report for report in reports] == [False, True, False, True]
        total = sum(losses[i % 2][i] for i in range(51))
        right = sum(losses[i % 2][i] < losses[1 - i % 2][i] for i in range(51)) / 51
        expected = [total / 102, math.exp(total / 102), 102, total / math.log(2) / 102, right]
        assert list(reports[-1].values()) == approx(expected) and 0 < right < 1
        assert reports[2]["perplexity"] == math.exp(700)
    @long_test
    def test_on_a_real_terminal_control_characters_are_written_out(self, tmp_path, tokenizer):
        pty = pytest.importorskip("pty")
        path = speaking(tmp_path / "beeps.pt", tokenizer.encode("\x1b[2J\x07") + [END])
        ours, theirs = pty.openpty()
        with start("generate", "p", "--model", path, stdout=theirs, stderr=theirs) as process:
            assert process.wait() == 0
        assert os.read(ours, 1000).decode().replace("\r\n", "\n") == "p\\x1b[2J\\x07\n"  # by now all is there
        os.close(theirs)
        os.close(ours)

class TestProject:
    @pytest.fixture
    def notebook(self):
        return json.loads((HERE / "walkthrough.ipynb").read_text("utf-8"))
    def assert_ran(self, notebook):
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)) and cells
        for output in (output for cell in cells for output in cell["outputs"]):
            assert output["output_type"] != "error" and output.get("name") != "stderr", output
    def test_the_notebook_has_readable_ids_and_was_run_from_top_to_bottom(self, notebook):
        self.assert_ran(notebook)
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        ids = [cell["id"] for cell in notebook["cells"]]
        readable = r"(?![0-9a-f-]{8,}$)[a-z][a-z0-9-]{2,63}"
        assert len(set(ids)) == len(ids) and all(re.fullmatch(readable, i) for i in ids)
        text = (HERE / "walkthrough.ipynb").read_text("utf-8")
        assert len(text.encode()) < 2_500_000
        assert not re.search(r"!\[[^]]*\]\(\s*https?:|<img[^>]*src=.{0,2}https?:", text)
    def test_the_notebook_runs(self, tmp_path):
        folder = shutil.copytree(HERE, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", "checkpoints", ".venv"))
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        done = subprocess.run([*command, "walkthrough.ipynb"], cwd=folder, env=environment, timeout=1500,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        self.assert_ran(json.loads((folder / "walkthrough.ipynb").read_text("utf-8")))
    def test_the_readme_names_the_two_commands_its_links_exist_and_requirements_are_pinned(self):
        text = (HERE / "README.md").read_text("utf-8")
        assert "python -m pytest -q" in text and "python gpt2.py train" in text
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (HERE / target).exists(), target
        lines = (HERE / "requirements.txt").read_text("utf-8").splitlines()
        packages = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        assert packages.keys() == {"torch", "tiktoken", "matplotlib", "jupyter", "pytest"}
