"""Every test. `python -m pytest -q` runs them without a network; GPT2_LONG_TESTS=1 kills a training run 50 times.

The models are tiny and their weights random, so a test says whether the program computes what it claims, not
whether a model is good. References are written out with loops: slow, and hard to get wrong.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for models this small threads only wait; and every process sums in one order

import ast
import contextlib
import hashlib
import http.server
import io
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
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt2

HERE = Path(__file__).resolve().parent
VERDICT = (HERE / "the-verdict.txt").read_text(encoding="utf-8")
PROGRAM = str(HERE / "gpt2.py")
TINY = {"vocab_size": 61, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2, "dropout_rate": 0.0}
TINY["qkv_bias"] = True
TRAINABLE = {**TINY, "vocab_size": 50257, "emb_dim": 8, "n_heads": 2, "n_layers": 1}  # speaks GPT-2's tokens
SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
pytestmark = pytest.mark.filterwarnings("error")  # nothing here may warn


# --- helpers and fixtures -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_process():
    """The command line changes its process: signals and log handlers. Put them back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)
    gpt2.log.handlers.clear()
    gpt2.log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tokenizer():
    return gpt2.load_tokenizer()


@pytest.fixture
def cli(capsys):
    """gpt2.py as a function: cli("generate", "--top_k", 3) -> .code, .out, .err. An exception is a failed test."""

    def call(*arguments):
        capsys.readouterr()
        gpt2.log.handlers.clear()
        try:
            code = gpt2.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


def lively(config, seed=0):
    """An eval model whose logits differ by more than rounding: an untrained one says nearly the same everywhere."""
    torch.manual_seed(seed)
    model = gpt2.GPT2(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def some_ids(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def save_model(model, path):
    gpt2.save_checkpoint(path, {"format": "gpt2.py 1", "config": model.config, "model": model.state_dict()})
    return path


def same_state(a, b):
    """Whether two nested states hold bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def numbers(rows, also_without=()):
    """What must repeat in rows of metrics."""
    dropped = {"tokens_per_second", "sample", "total_steps", *also_without}
    return [{key: value for key, value in row.items() if key not in dropped} for row in rows]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_run(folder, reference):
    """Two folders hold the same metrics, weights, optimizer state and best weights."""
    assert numbers(metrics_of(folder)) == numbers(metrics_of(reference))
    last, expected = (gpt2.load_checkpoint(path / "last.pt") for path in (folder, reference))
    assert last["step"] == expected["step"] and last["finished"] and expected["finished"]
    assert same_state(last["model"], expected["model"]) and same_state(last["optimizer"], expected["optimizer"])
    best, expected = (gpt2.load_checkpoint(path / "best.pt") for path in (folder, reference))
    assert best["step"] == expected["step"] and same_state(best["model"], expected["model"])


def train_until(step, config, out, **options):
    """Train, stop after `step` by closing the generator."""
    run = gpt2.train(config, out=out, **options)
    for row in run:
        if row["step"] == step:
            run.close()
            return


def words(config):
    """A config as command line options."""
    out = []
    for key, value in config.items():
        out += [f"--{key}" if value else f"--no-{key}"] if isinstance(value, bool) else [f"--{key}", str(value)]
    return out


def start(*arguments, **options):
    """gpt2.py as a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, PROGRAM, *map(str, arguments)], **options)


def wait_for_step(process):
    """Read a training process's notes until its first step is done; the lines read."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step "):
            return lines
    raise AssertionError(f"no step was made: {lines}")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A short training text, whose last step of an epoch is smaller than the others."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(VERDICT[:1500], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config(text):
    """A run with dropout and accumulation: 6 steps an epoch."""
    return {**TRAINABLE, "dropout_rate": 0.1, "data": str(text), "batch_size": 4, "grad_accumulation": 2, "epochs": 2,
            "warmup_steps": 2}  # fmt: skip


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """Fine-tuning data of unequal lengths."""
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    pairs = [(f"{'very ' * (i % 4)}good {i}", " ham") if i % 2 else (f"win {i}" * (i % 3), " spam") for i in range(15)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fine_tuning(config, examples):
    return {**config, "data": str(examples), "batch_size": 2, "context_length": 12}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, config):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    list(gpt2.train(config, out=folder))
    return folder


@pytest.fixture(scope="session")
def long_config(config):
    """A run that lasts long enough to be struck from outside, and notes and saves every step."""
    return {**config, "epochs": 5, "eval_every": 1, "checkpoint_every": 1}


@pytest.fixture(scope="session")
def long_whole(tmp_path_factory, long_config):
    folder = tmp_path_factory.mktemp("long_whole")
    list(gpt2.train(long_config, out=folder))
    return folder


# --- 1. attention and block -----------------------------------------------------------------------------------


@torch.no_grad()
def written_out_attention(head, x, causal):
    """softmax(QKᵀ/√D)V with loops."""
    q, k, v = (x @ layer.weight.T + layer.bias for layer in (head.query, head.key, head.value))
    out = torch.zeros_like(v)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            seen = range(t + 1 if causal else x.size(1))
            scores = [math.exp(float(q[b, t] @ k[b, s]) / math.sqrt(k.size(-1))) for s in seen]
            for s in seen:
                out[b, t] += scores[s] / sum(scores) * v[b, s]
    return out


def test_self_attention_is_the_formula():
    torch.manual_seed(0)
    head, x = gpt2.SelfAttention(6, 4, qkv_bias=True), torch.randn(2, 5, 6)
    assert torch.allclose(head(x), written_out_attention(head, x, causal=False), atol=1e-6)


def test_causal_attention_is_the_formula_over_the_past():
    torch.manual_seed(0)
    head, x = gpt2.CausalAttention(6, 4, 7, 0.0, qkv_bias=True), torch.randn(2, 5, 6)
    assert torch.allclose(head(x), written_out_attention(head, x, causal=True), atol=1e-6)


def test_causal_weights_sum_to_one_and_are_exactly_zero_in_the_future():
    torch.manual_seed(0)
    weights = gpt2.CausalAttention(6, 4, 7, 0.0).weights(torch.randn(2, 5, 6))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5), atol=1e-6)
    assert (weights.triu(1) == 0).all() and (weights.tril() + torch.ones(5, 5).triu(1) > 0).all()


def test_the_last_token_sees_the_same_with_and_without_the_mask():
    torch.manual_seed(0)
    free, causal, x = gpt2.SelfAttention(6, 4), gpt2.CausalAttention(6, 4, 5, 0.0), torch.randn(2, 5, 6)
    causal.load_state_dict(free.state_dict())  # the mask is no weight
    assert torch.allclose(free(x)[:, -1], causal(x)[:, -1], atol=1e-6)
    assert not torch.allclose(free(x)[:, 0], causal(x)[:, 0], atol=1e-3)


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    head, x = gpt2.CausalAttention(6, 4, 5, 0.5), torch.randn(2, 5, 6)
    assert not torch.equal(head(x), head(x))
    assert torch.equal(head.eval()(x), head(x))


def test_attention_without_bias_has_none():
    assert gpt2.SelfAttention(6, 4).query.bias is None and gpt2.CausalAttention(6, 4, 5, 0.0).value.bias is None
    assert gpt2.MultiHeadAttention({**TINY, "qkv_bias": False}).query_key_value.bias is None


def test_multi_head_attention_is_single_heads_side_by_side_and_a_projection():
    torch.manual_seed(0)
    many, x = gpt2.MultiHeadAttention(TINY), torch.randn(2, 7, 12)
    parts_w, parts_b = many.query_key_value.weight.split(12), many.query_key_value.bias.split(12)
    heads = []
    for h in range(3):
        head = gpt2.CausalAttention(12, 4, 8, 0.0, qkv_bias=True)
        for layer, w, b in zip((head.query, head.key, head.value), parts_w, parts_b):
            layer.weight.data, layer.bias.data = w[4 * h : 4 * h + 4].detach(), b[4 * h : 4 * h + 4].detach()
        heads.append(head(x))
    side_by_side = torch.cat(heads, dim=-1)
    assert torch.allclose(many(x), F.linear(side_by_side, many.projection.weight, many.projection.bias), atol=1e-6)


def test_layer_norm_is_that_of_torch_and_the_formula():
    torch.manual_seed(0)
    ours, theirs, x = gpt2.LayerNorm(12), nn.LayerNorm(12), torch.randn(2, 5, 12) * 3 + 1
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x), ours.weight * (x - mean) / torch.sqrt(variance + 1e-5) + ours.bias, atol=1e-5)


def test_layer_norm_puts_epsilon_inside_the_root():
    x = torch.tensor([[0.001, -0.001]])  # variance 1e-6, a tenth of epsilon
    assert torch.allclose(gpt2.LayerNorm(2)(x), x / math.sqrt(1e-6 + 1e-5), atol=1e-6)


def test_feed_forward_is_the_tanh_form_of_gelu_between_two_matrices():
    torch.manual_seed(0)
    block, x = gpt2.FeedForward(TINY), torch.randn(2, 5, 12) * 4
    h = F.linear(x, block.expand.weight, block.expand.bias)
    assert h.shape == (2, 5, 48)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    assert torch.allclose(block(x), F.linear(h, block.projection.weight, block.projection.bias), atol=1e-6)


def test_block_adds_each_step_to_the_stream_after_norming_its_input():
    torch.manual_seed(0)
    block, x = gpt2.TransformerBlock(TINY), torch.randn(2, 5, 12)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    middle = x + block.attention(block.norm1(x))
    assert torch.allclose(block(x), middle + block.feed_forward(block.norm2(middle)), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", range(1, 10))
def test_linear_with_few_rows_is_linear(rows, bias):
    torch.manual_seed(rows)
    weight, x = torch.randn(50257, 4), torch.randn(1, rows, 4)
    bias = torch.randn(50257) if bias else None
    expected = F.linear(x, weight, bias)
    with torch.no_grad():
        few = gpt2.linear(x, weight, bias)
    assert few.shape == (1, rows, 50257) and torch.allclose(few, expected, atol=1e-5)
    assert torch.equal(gpt2.linear(x, weight, bias), expected)  # with gradients


# --- 2. model -------------------------------------------------------------------------------------------------


def test_no_logit_depends_on_a_later_token():
    model, idx = lively(TINY), some_ids(2, 8)
    before = model(idx)
    for t in range(8):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 61
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # each from t on saw the change


@pytest.mark.parametrize("name, count", SIZES.items())
def test_parameter_count_of_the_openai_sizes(name, count):
    with torch.device("meta"):
        model = gpt2.GPT2({**gpt2.OPENAI_SIZES[name], "dropout_rate": 0.1})
    assert model.num_parameters() == count and model.config["context_length"] == 1024


@pytest.mark.parametrize("width", [128, 512])
def test_untrained_loss_is_that_of_guessing_and_the_spread_of_the_logits(width):
    torch.manual_seed(0)
    model = gpt2.GPT2({**TINY, "vocab_size": 50257, "emb_dim": width, "n_heads": 4, "context_length": 64}).eval()
    with torch.no_grad():
        loss = model(some_ids(8, 64, vocab=50257), targets=some_ids(8, 64, vocab=50257, seed=2)) / 512
    assert float(loss) == pytest.approx(math.log(50257) + 0.5 * 0.02**2 * width, abs=0.02)


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = gpt2.GPT2({**TINY, "vocab_size": 500, "emb_dim": 64, "n_heads": 4, "n_layers": 8, "context_length": 100})
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(16) if "projection" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            seen.add(std)
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name
    assert len(seen) == 2


def test_the_head_is_the_token_embedding():
    model, idx = lively(TINY), some_ids(2, 8)
    kept = []
    model.final_norm.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = model(idx)
    assert torch.allclose(logits, kept[0] @ model.token_embedding.weight.T, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in model.state_dict().values())


def test_last_only_gives_the_last_row():
    model, idx = lively(TINY), some_ids(2, 8)
    assert model(idx, last_only=True).shape == (2, 1, 61)
    assert torch.allclose(model(idx, last_only=True), model(idx)[:, -1:], atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
def test_with_targets_the_model_gives_the_summed_loss(chunked):
    model, idx, targets = lively(TINY), some_ids(2, 8), some_ids(2, 8, seed=2)
    targets[0, :3] = -100
    log_p = torch.log_softmax(model(idx), dim=-1)
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(2) for t in range(8) if targets[b, t] >= 0)
    model.chunked_loss = chunked
    loss = model(idx, targets=targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.token_embedding.weight.grad.abs().sum() > 0


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="9 tokens .* 8"):
        lively(TINY)(some_ids(1, 9))


@pytest.mark.parametrize(
    "change",
    [{"emb_dim": 13}, {"n_heads": 0}, {"n_layers": True}, {"dropout_rate": 1.0}, {"vocab_size": 2.5},
     {"qkv_bias": "yes"}, {"context_length": None}, {"dropout_rate": math.nan}],
)  # fmt: skip
def test_a_model_config_out_of_bounds_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        gpt2.GPT2({**TINY, **change})


@pytest.mark.parametrize("key", TINY)
def test_a_model_config_without_a_key_names_it(key):
    with pytest.raises(ValueError, match=key):
        gpt2.GPT2({name: value for name, value in TINY.items() if name != key})


# --- 3. cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunks", [[1] * 8, [3, 1, 4], [5, 3], [1, 7], [8]])
def test_cached_logits_are_the_uncached_ones(batch, chunks):
    model, idx, cache = lively(TINY), some_ids(batch, 8), lively(TINY).new_cache()
    with torch.no_grad():
        parts = [model(part, cache) for part in idx.split(chunks, dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), model(idx), atol=1e-4)
    assert all(layer.length == 8 for layer in cache)


def test_a_full_cache_is_refused():
    model = lively(TINY)
    cache = model.new_cache()
    model(some_ids(1, 8), cache)
    with pytest.raises(ValueError, match="8"):
        model(some_ids(1, 1), cache)
    with pytest.raises(ValueError, match="cache holds 8"):
        cache[0].append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))


@pytest.mark.parametrize("length, new", [(3, 5), (3, 30), (8, 9), (20, 12)])
def test_greedy_text_is_the_same_with_and_without_the_cache_before_and_past_the_context(length, new):
    model, idx = lively(TINY), some_ids(2, length)
    cached = gpt2.generate(model, idx, new)
    assert cached.shape == (2, length + new)
    assert torch.equal(cached, gpt2.generate(model, idx, new, use_cache=False))


def test_past_the_context_the_model_goes_on_from_its_last_half():
    model, idx, start = lively(TINY), some_ids(1, 5), 0
    ours = gpt2.generate(model, idx, 25)
    for _ in range(25):
        if idx.size(1) - start > 8:
            start = idx.size(1) - 4
        idx = torch.cat([idx, model(idx[:, start:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours, idx)


# --- 4. data --------------------------------------------------------------------------------------------------


def test_facts_of_the_verdict(tokenizer):
    ids = tokenizer.encode(VERDICT)
    assert (len(VERDICT), len(ids), len(set(ids))) == (20479, 5145, 1416)
    digest = hashlib.sha256((HERE / "the-verdict.txt").read_bytes()).hexdigest()
    assert digest == "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"


def test_the_split_is_by_characters(tokenizer):
    train_set, val_set = gpt2.load_data({**gpt2.CONFIG, "val_fraction": 0.1})
    cut = int(20479 * 0.9)
    assert train_set.token_ids.tolist() == tokenizer.encode(VERDICT[:cut])
    assert val_set.token_ids.tolist() == tokenizer.encode(VERDICT[cut:])
    assert len(train_set.token_ids) + len(val_set.token_ids) == pytest.approx(5145, abs=2)


@pytest.mark.parametrize("stride, starts", [(None, [0, 4, 8]), (1, range(12)), (3, [0, 3, 6, 9]), (9, [0, 9])])
def test_windows_begin_every_stride_and_targets_are_one_ahead(stride, starts):
    dataset = gpt2.GPTDataset(list(range(100, 116)), 4, stride)
    assert len(dataset) == len(starts)
    for (x, y), begin in zip(dataset, starts):
        assert x.tolist() == list(range(100 + begin, 104 + begin)) and y.tolist() == (x + 1).tolist()
        assert x.dtype == y.dtype == torch.long


def test_one_window_needs_one_token_more_than_the_context():
    assert len(gpt2.GPTDataset(range(5), 4, 1)) == 1
    with pytest.raises(ValueError, match="4 tokens make no window: context_length 4 takes 5"):
        gpt2.GPTDataset(range(4), 4, 1)


@pytest.mark.parametrize("context, stride", [(0, 1), (4, 0), (4, -1)])
def test_windows_without_length_or_stride_are_refused(context, stride):
    with pytest.raises(ValueError, match="at least 1"):
        gpt2.GPTDataset(range(9), context, stride)


def odd_text(rng, length):
    """Random text full of what tokenisers and readers of lines treat specially."""
    odd = [" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u2028", "\u3000", "\xa0", "\0", "\x0b", "<|endoftext|>", "'s", "é",
           "🙂", "漢", "12", "!?", "\ufeff"]  # fmt: skip
    return "".join(rng.choice([*odd, "word", "a", " the"]) for _ in range(length))


def test_tokenising_in_pieces_is_tokenising_the_whole(tmp_path, tokenizer, monkeypatch):
    rng, whole_blocks = random.Random(0), gpt2.read_blocks
    for number in range(60):
        text = odd_text(rng, 300)
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8", newline="")
        text = text.removeprefix("\ufeff")

        def small_blocks(*arguments, rng=rng):
            text, at = "".join(whole_blocks(*arguments)), 0
            while at < len(text):
                yield text[at : (at := at + rng.randint(1, 40))]

        monkeypatch.setattr(gpt2, "read_blocks", small_blocks)
        pieces = gpt2.tokenize_file(path, 0, len(text), tokenizer)
        assert pieces.tolist() == tokenizer.encode(text, allowed_special="all")


def test_a_text_of_several_blocks_is_tokenised_as_a_whole(tmp_path, tokenizer):
    text = odd_text(random.Random(1), 30_000) * 18 + "the end"
    assert len(text) > 2**20
    (tmp_path / "big.txt").write_text(text, encoding="utf-8", newline="")
    text = text.removeprefix("\ufeff")
    first, second = gpt2.load_text(tmp_path / "big.txt", 0.3, tokenizer)
    cut = int(len(text) * 0.7)
    assert first.tolist() == tokenizer.encode(text[:cut], allowed_special="all")
    assert second.tolist() == tokenizer.encode(text[cut:], allowed_special="all")


def test_text_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path, tokenizer):
    (tmp_path / "latin.txt").write_bytes(b"one\r\ntwo\nthr\xe9e\n")
    with pytest.raises(ValueError, match="line 3, byte 4: 0xe9"):
        gpt2.load_text(tmp_path / "latin.txt", 0.1, tokenizer)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello world")
    assert gpt2.load_text(tmp_path / "bom.txt", 0.0, tokenizer)[0].tolist() == tokenizer.encode("hello world")


def test_text_to_ids_and_back(tokenizer):
    text = "Hello, 🙂 <|endoftext|> world"
    ids = gpt2.text_to_token_ids(text, tokenizer)
    assert ids.shape == (1, len(tokenizer.encode_ordinary(text))) and tokenizer.eot_token not in ids
    assert gpt2.token_ids_to_text(ids, tokenizer) == text
    assert gpt2.token_ids_to_text(ids[0].tolist(), tokenizer) == text
    assert gpt2.token_ids_to_text([60_000], tokenizer) == "�"  # beyond the vocabulary
    assert gpt2.text_to_token_ids("", tokenizer).shape == (1, 0)


def test_a_folder_named_by_the_user_is_where_the_vocabulary_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2.use_own_vocabulary()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    gpt2.use_own_vocabulary()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(HERE / ".tiktoken")


def write_lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def test_fine_tuning_data_comes_as_pairs_or_instructions_as_lines_or_a_list(tmp_path):
    entries = [{"prompt": "p\u2028q", "completion": " c"}, {"instruction": "do", "output": "done"},
               {"instruction": "do", "input": "this", "output": "it"}, {"instruction": "x", "input": "", "output": "y"}]  # fmt: skip
    examples = gpt2.read_examples(write_lines(tmp_path / "a.jsonl", *entries))
    (tmp_path / "b.json").write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")
    assert gpt2.read_examples(tmp_path / "b.json") == examples
    assert examples[0] == ("p\u2028q", " c")
    below = "Below is an instruction that describes a task"
    rest = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert examples[1] == (f"{below}. {rest}do\n\n### Response:\n", "done")
    further = "paired with an input that provides further context"
    assert examples[2] == (f"{below}, {further}. {rest}do\n\n### Input:\nthis\n\n### Response:\n", "it")
    assert examples[3] == (f"{below}. {rest}x\n\n### Response:\n", "y")


def test_only_the_completion_and_the_end_are_targets(tokenizer):
    x, y = gpt2.CompletionDataset([("one two", " three four")], 10, tokenizer)[0]
    prompt, completion = tokenizer.encode("one two"), tokenizer.encode(" three four")
    assert x.tolist() == prompt + completion
    assert y.tolist() == [-100] * (len(prompt) - 1) + completion + [tokenizer.eot_token]


def test_a_long_example_loses_the_left_of_its_prompt(tokenizer):
    dataset = gpt2.CompletionDataset([("a b c d e f g h", " y z"), ("a", " b")], 5, tokenizer)
    x, y = dataset[0]
    assert dataset.n_cut == 1
    assert x.tolist() == tokenizer.encode(" f g h y z")
    assert y.tolist() == [-100, -100, *tokenizer.encode(" y z"), tokenizer.eot_token]


def test_an_empty_prompt_becomes_end_of_text(tokenizer):
    x, y = gpt2.CompletionDataset([("", " yes")], 5, tokenizer)[0]
    assert x.tolist() == [tokenizer.eot_token, *tokenizer.encode(" yes")] and -100 not in y


def test_examples_are_shuffled_before_the_split(examples):
    config = {**gpt2.CONFIG, "data": str(examples), "val_fraction": 0.4}
    train_set, val_set = gpt2.load_data(config)
    assert len(val_set) == 6 and len(train_set) == 9
    assert sorted(train_set.examples + val_set.examples) == sorted(gpt2.read_examples(examples))
    assert train_set.examples + val_set.examples != gpt2.read_examples(examples)
    assert gpt2.load_data({**config, "seed": 1})[1].examples != val_set.examples


# --- 5. training: its parts -----------------------------------------------------------------------------------

SCHEDULE = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10, "decay_steps": 0}


@pytest.mark.parametrize(
    "step, rate", [(1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (1000, 0.1)]
)
def test_the_learning_rate_rises_in_a_line_falls_in_half_a_cosine_and_stays(step, rate):
    assert gpt2.learning_rate_at(step, SCHEDULE, 110) == pytest.approx(rate)


def test_the_learning_rate_at_odd_corners():
    at = gpt2.learning_rate_at
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert at(35, SCHEDULE, 110) == pytest.approx(quarter)
    assert at(35, {**SCHEDULE, "decay_steps": 110}, 10_000) == pytest.approx(quarter)  # decay_steps wins
    assert at(1, {**SCHEDULE, "warmup_steps": 0}, 10) > 0.95
    assert at(7, SCHEDULE, 7) == pytest.approx(0.7) and at(10, SCHEDULE, 10) == 1.0  # warm-up fills the run
    assert at(1, {**SCHEDULE, "warmup_steps": 0}, 1) == pytest.approx(0.1)


def test_only_tensors_of_two_dimensions_decay():
    model = gpt2.GPT2(TINY)
    groups = gpt2.make_optimizer(model, {"weight_decay": 0.3, "learning_rate": 1e-3}).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.dim() >= 2 else 0.0 for p in model.parameters()}
    assert all(group["betas"] == (0.9, 0.95) for group in groups)


def test_accumulated_batches_equal_one_big_batch(config, fine_tuning):
    """Also for examples of unequal length, where a mean of means would be another number."""
    for base in (config, fine_tuning):
        base = {**base, "dropout_rate": 0.0, "max_steps": 5}
        runs = [list(gpt2.train({**base, "batch_size": size, "grad_accumulation": 8 // size}, out=None)) for size in (8, 4, 1)]
        for rows in runs[1:]:
            for row, reference in zip(rows, runs[0], strict=True):
                assert row["tokens_seen"] == reference["tokens_seen"]
                for key in ("train_loss", "grad_norm"):
                    assert row[key] == pytest.approx(reference[key], rel=2e-4)


def first_moments(folder):
    """The norm of AdamW's mean gradient after one step: a tenth of the gradient's that it was given."""
    states = gpt2.load_checkpoint(folder / "last.pt")["optimizer"]["state"].values()
    return math.sqrt(sum(float(state["exp_avg"].double().square().sum()) for state in states))


@pytest.mark.parametrize("clip, used", [(0.0, None), (0.01, 0.01), (1e6, None)])
def test_grad_norm_is_reported_before_clipping_and_the_update_uses_the_clipped_gradient(tmp_path, config, clip, used):
    row = next(gpt2.train({**config, "grad_clip": clip, "max_steps": 1}, out=tmp_path))
    free = next(gpt2.train({**config, "grad_clip": 0.0, "max_steps": 1}, out=None))
    assert row["grad_norm"] == free["grad_norm"] > 0.05
    assert first_moments(tmp_path) == pytest.approx(0.1 * (used or row["grad_norm"]), rel=1e-3)


def test_one_batch_is_learnt_by_heart(tmp_path):
    (tmp_path / "line.txt").write_text("The quick brown fox jumps over the lazy dog.", encoding="utf-8")
    config = {**TRAINABLE, "data": str(tmp_path / "line.txt"), "val_fraction": 0.0, "emb_dim": 16, "epochs": 40,
              "learning_rate": 0.05, "min_learning_rate": 0.005, "warmup_steps": 5, "sample_prompt": "The quick"}  # fmt: skip
    rows = list(gpt2.train(config, out=None))
    assert rows[0]["train_loss"] > 10 and rows[-1]["train_loss"] < 0.05
    assert "brown fox jumps over the lazy" in rows[-1]["sample"] and "val_loss" not in rows[-1]


@pytest.mark.parametrize("stride", [None, 8, 5, 1])
@pytest.mark.parametrize("length", [30, 9, 25])
def test_evaluate_scores_each_token_once_with_enough_context(stride, length):
    model, ids = lively(TINY), some_ids(length)
    step, total = stride or 8, 0.0
    for t in range(1, length):
        begin = max(0, math.ceil((t - 8) / step)) * step  # the first window that reaches t
        assert t - begin > 8 - step or begin == 0
        total -= torch.log_softmax(model(ids[None, begin:t])[0, -1], dim=-1)[ids[t]].item()
    loss = gpt2.evaluate(model, gpt2.GPTDataset(ids, 8), stride=stride)
    assert loss == pytest.approx(total / (length - 1), rel=1e-5)


def test_scoring_windows_hold_each_target_once():
    for length in range(9, 40):
        for stride in (None, 1, 3, 8):
            dataset, seen = gpt2.GPTDataset(list(range(length)), 8), []
            for x, y in dataset.scoring_windows(stride):
                seen += y[y != -100].tolist()
                assert all(b == -100 or b == a + 1 for a, b in zip(x.tolist(), y.tolist()))
            assert seen == list(range(1, length))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_draws_no_random_number_and_puts_the_mode_back(training):
    model = lively({**TINY, "dropout_rate": 0.5}).train(training)
    dataset, state = gpt2.GPTDataset(some_ids(40), 8), torch.get_rng_state()
    assert gpt2.evaluate(model, dataset) == gpt2.evaluate(model, dataset)  # no dropout
    assert torch.equal(state, torch.get_rng_state()) and model.training == training


def test_padding_changes_no_loss(tokenizer, examples):
    model = lively({**TRAINABLE, "context_length": 12})
    dataset = gpt2.CompletionDataset(gpt2.read_examples(examples), 12, tokenizer)
    assert len({len(x) for x, _ in dataset}) > 2
    alone = [(model(x[None], targets=y[None]).item(), int((y != -100).sum())) for x, y in dataset]
    together = gpt2.evaluate(model, dataset)
    assert together == pytest.approx(sum(loss for loss, _ in alone) / sum(count for _, count in alone), rel=1e-5)
    x, y = gpt2.collate([dataset[i] for i in range(len(dataset))])
    assert model(x, targets=y).item() == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


# --- 6. training: runs ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_four_files(whole, config):
    assert sorted(path.name for path in whole.iterdir()) == ["best.pt", "last.pt", "loss.png", "metrics.jsonl"]
    rows = metrics_of(whole)
    keys = {"step", "epoch", "tokens_seen", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row.keys() - {"val_loss"} == keys for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = torch.load(whole / "best.pt", weights_only=True)
    model = gpt2.GPT2.from_pretrained(whole / "best.pt")
    _, val_set = gpt2.load_data({**gpt2.CONFIG, **config})
    lowest = min(row["val_loss"] for row in rows if "val_loss" in row)
    assert gpt2.evaluate(model, val_set) == pytest.approx(lowest, rel=1e-6) and not model.training
    assert best["config"] == {**gpt2.CONFIG, **config} and "optimizer" not in best


def test_every_window_is_used_once_an_epoch(whole, config):
    """42 windows of 8 targets in 6 steps: the last step takes what is left."""
    train_set, _ = gpt2.load_data({**gpt2.CONFIG, **config})
    rows = metrics_of(whole)
    assert [row["epoch"] for row in rows] == [1] * 6 + [2] * 6
    assert len(train_set) % 8 and rows[5]["tokens_seen"] == 8 * len(train_set)
    assert rows[4]["tokens_seen"] == 8 * 8 * 5 and rows[11]["tokens_seen"] == 2 * 8 * len(train_set)


def test_a_seed_settles_a_run(whole, config):
    run = gpt2.train(config, out=None)
    rows = [row for row in run if torch.rand(1) is not None]  # what the caller draws between steps changes nothing
    assert numbers(rows) == numbers(metrics_of(whole))
    other = next(gpt2.train({**config, "seed": 7}, out=None))
    assert other["train_loss"] != rows[0]["train_loss"]


def test_measuring_saving_and_sampling_change_nothing(whole, config, tmp_path):
    busy = {**config, "eval_every": 1, "checkpoint_every": 5, "sample_prompt": "something else"}
    list(gpt2.train(busy, out=tmp_path))
    without = ["val_loss"]
    assert numbers(metrics_of(tmp_path), without) == numbers(metrics_of(whole), without)
    assert all("val_loss" in row for row in metrics_of(tmp_path))
    busy, plain = gpt2.load_checkpoint(tmp_path / "last.pt"), gpt2.load_checkpoint(whole / "last.pt")
    assert same_state(busy["model"], plain["model"]) and same_state(busy["optimizer"], plain["optimizer"])


@pytest.mark.parametrize("step", [1, 4, 6, 9])  # within epoch 1, its end, within epoch 2
def test_a_run_closed_and_resumed_is_the_run(whole, config, tmp_path, step):
    train_until(step, config, tmp_path)
    checkpoint = gpt2.load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == step and not checkpoint["finished"]
    torch.manual_seed(step)
    list(gpt2.train(out=tmp_path, resume=True))
    assert_same_run(tmp_path, whole)


def test_six_and_six_steps_are_twelve(whole, config, tmp_path):
    list(gpt2.train({**config, "max_steps": 6}, out=tmp_path))
    list(gpt2.train({"max_steps": 12}, out=tmp_path, resume=True))
    assert_same_run(tmp_path, whole)


def test_fine_tuning_resumes_exactly(fine_tuning, tmp_path):
    list(gpt2.train(fine_tuning, out=tmp_path / "whole"))
    for step in (2, 5):
        train_until(step, fine_tuning, tmp_path / str(step))
        list(gpt2.train(out=tmp_path / str(step), resume=True))
        assert_same_run(tmp_path / str(step), tmp_path / "whole")


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_resume_finishes_the_run(long_whole, long_config, tmp_path, cli, name, status):
    process = start("train", *words({**long_config, "checkpoint_every": 10_000}), "--out", tmp_path)
    wait_for_step(process)
    process.send_signal(getattr(signal, name))
    notes = process.communicate(timeout=60)[1]
    assert process.returncode == status and "--resume" in notes and "Traceback" not in notes
    step = gpt2.load_checkpoint(tmp_path / "last.pt")["step"]
    assert 0 < step < 30 and len(metrics_of(tmp_path)) == step
    result = cli("train", "--resume", "--out", tmp_path)
    assert result.code == 0 and result.out == ""
    assert_same_run(tmp_path, long_whole)


@pytest.mark.parametrize(
    "change",
    [{"emb_dim": 32}, {"learning_rate": 0.5}, {"seed": 1}, {"epochs": 3}, {"dropout_rate": 0.0}, {"val_fraction": 0.2},
     {"precision": "bf16"}, {"weight_decay": 0.0}],
)  # fmt: skip
def test_an_option_that_contradicts_the_checkpoint_is_named(whole, change):
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"{key} .*{value!r} contradicts"):
        next(gpt2.train(change, out=whole, resume=True))


def test_resume_wants_the_same_text_and_windows_a_step(config, tmp_path):
    train_until(2, config, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(VERDICT[:1400], encoding="utf-8")
    with pytest.raises(ValueError, match="not the text"):
        next(gpt2.train({"data": str(other)}, out=tmp_path, resume=True))
    with pytest.raises(ValueError, match="8 windows a step.* 16"):
        next(gpt2.train({"batch_size": 8}, out=tmp_path, resume=True))
    next(gpt2.train({"batch_size": 8, "grad_accumulation": 1}, out=tmp_path, resume=True))


def test_a_finished_run_is_not_resumed_and_a_missing_one_neither(whole, tmp_path):
    with pytest.raises(ValueError, match="all 12 steps .* done"):
        next(gpt2.train(out=whole, resume=True))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        next(gpt2.train(out=tmp_path, resume=True))


def test_an_unfinished_run_is_not_replaced_without_overwrite(config, tmp_path):
    train_until(2, config, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        next(gpt2.train(config, out=tmp_path))
    assert (tmp_path / "last.pt").read_bytes() == before
    train_until(1, {**config, "seed": 3}, tmp_path, overwrite=True)
    assert gpt2.load_checkpoint(tmp_path / "last.pt")["config"]["seed"] == 3


def test_a_finished_run_is_replaced_at_the_first_save_only(whole, config, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = gpt2.train({**config, "val_fraction": 0.0, "checkpoint_every": 3}, out=folder)
    next(run), next(run)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    next(run)
    assert gpt2.load_checkpoint(folder / "last.pt")["step"] == 3 and len(metrics_of(folder)) == 3
    assert not (folder / "best.pt").exists() and not (folder / "loss.png").exists()  # those were the old run's
    run.close()


def test_a_second_training_into_a_folder_is_refused_until_the_first_is_gone(long_config, tmp_path):
    process = start("train", *words(long_config), "--out", tmp_path)
    try:
        wait_for_step(process)
        with pytest.raises(ValueError, match=f"process {process.pid} is training into"):
            next(gpt2.train(long_config, out=tmp_path))
    finally:
        process.kill()
        process.communicate()
    assert next(gpt2.train(out=tmp_path, resume=True))["step"] > 1  # killed, it holds no lock


def test_killed_at_any_moment_a_run_can_be_resumed_to_the_same_end(long_whole, long_config, tmp_path):
    rng, folder = random.Random(), tmp_path / "run"
    for _ in range(50 if os.environ.get("GPT2_LONG_TESTS") else 2):
        has_begun = (folder / "last.pt").exists()
        if has_begun and gpt2.load_checkpoint(folder / "last.pt")["finished"]:
            assert_same_run(folder, long_whole)
            shutil.rmtree(folder)
            has_begun = False
        how = ["--resume"] if has_begun else words(long_config)
        process = start("train", *how, "--out", folder)
        wait_for_step(process)
        time.sleep(rng.uniform(0, 0.7))
        process.kill()  # kill -9
        process.communicate()
    if not gpt2.load_checkpoint(folder / "last.pt")["finished"]:
        list(gpt2.train(out=folder, resume=True))
    assert_same_run(folder, long_whole)
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "loss.png", "metrics.jsonl"]


class FailingDisk:
    """os.fsync that fails while `full`."""

    def __init__(self, monkeypatch):
        self.full, real = True, os.fsync
        monkeypatch.setattr(os, "fsync", lambda number: self.fail() if self.full else real(number))

    def fail(self):
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_warns_keeps_the_old_one_and_training_goes_on(whole, config, tmp_path, monkeypatch, caplog):
    run = gpt2.train({**config, "checkpoint_every": 2}, out=tmp_path)
    next(run), next(run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    disk = FailingDisk(monkeypatch)
    next(run), next(run)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # no .part either
    assert "step 4 was not saved" in caplog.text and "No space left" in caplog.text
    disk.full = False
    list(run)
    assert_same_run(tmp_path, whole)


def test_a_last_save_that_fails_is_an_error(config, tmp_path, monkeypatch):
    FailingDisk(monkeypatch)
    rows = []
    with pytest.raises(OSError, match="step 3, the last, could not be saved"):
        for row in gpt2.train({**config, "max_steps": 3}, out=tmp_path):
            rows.append(row)
    assert len(rows) == 3 and list(tmp_path.iterdir()) == []
    run = gpt2.train(config, out=tmp_path)
    next(run)
    with pytest.raises(OSError, match="step 1 could not be saved"):
        run.close()


def test_a_full_disk_keeps_the_last_save(config, tmp_path, caplog):
    """A real one, with room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    size = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not mount or subprocess.run([mount, *size], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        run = gpt2.train({**config, "val_fraction": 0.0, "checkpoint_every": 1}, out=disk)
        next(run)
        before = (disk / "last.pt").read_bytes()  # about 5 MB: a second one beside it does not fit
        next(run)
        assert (disk / "last.pt").read_bytes() == before and not list(disk.glob("*.part"))
        assert "step 2 was not saved" in caplog.text
        with pytest.raises(OSError, match="could not be saved"):
            run.close()
        assert gpt2.load_checkpoint(disk / "last.pt")["step"] == 1 and not list(disk.glob("*.part"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_save(config, tmp_path):
    model = gpt2.GPT2(TRAINABLE)
    run = gpt2.train({**config, "checkpoint_every": 1}, out=tmp_path, init=model)
    next(run), next(run)
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 3 has loss nan .* learning rate 0.000"):
        next(run)
    assert (tmp_path / "last.pt").read_bytes() == before and gpt2.load_checkpoint(tmp_path / "last.pt")["step"] == 2


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, config):
    """Seven steps by two processes at half the batch, without dropout."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = words({**config, "dropout_rate": 0.0, "batch_size": 2, "max_steps": 7})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, PROGRAM, "train", *options, "--out", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one_process(config):
    return list(gpt2.train({**config, "dropout_rate": 0.0}, out=None))


def assert_close_rows(rows, reference):
    for row, expected in zip(numbers(rows), numbers(reference), strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_two_processes_at_half_the_batch_train_as_one(two_processes, one_process):
    assert_close_rows(metrics_of(two_processes), one_process[:7])


def test_one_process_goes_on_with_a_run_of_two(two_processes, one_process, config, tmp_path):
    folder = shutil.copytree(two_processes, tmp_path / "run")
    with pytest.raises(ValueError, match="8 windows a step; 1 processes now take 4"):
        next(gpt2.train(out=folder, resume=True))
    rows = list(gpt2.train({"batch_size": 4, "max_steps": 0}, out=folder, resume=True))
    assert_close_rows(rows, one_process[7:])


def test_training_starts_from_a_model(whole, config):
    """--init: the same weights, a shorter context, the dropout of the run."""
    model = gpt2.GPT2.from_pretrained(whole / "last.pt")
    run = gpt2.train({**config, "context_length": 5, "dropout_rate": 0.0}, out=None, init=whole / "last.pt")
    given = gpt2.train({**config, "context_length": 5, "dropout_rate": 0.0}, out=None, init=model)
    first, same = next(run), next(given)
    assert numbers([first]) == numbers([same])
    assert first["train_loss"] < metrics_of(whole)[0]["train_loss"]
    assert model.config["context_length"] == 5 and model.position_embedding.weight.shape[0] == 5
    assert model.config["dropout_rate"] == 0.0 and model.training


# --- 7. sampling ----------------------------------------------------------------------------------------------


def written_out_distribution(logits, temperature, top_k, top_p):
    """The probabilities of one row, with lists."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if temperature == 0:
        return [1.0 if i == order[0] else 0.0 for i in range(len(logits))]
    weights = {i: math.exp(logits[i] / temperature) for i in order[: top_k or len(order)]}
    if top_p is not None:
        total, reached, kept = sum(weights.values()), 0.0, {}
        for i in order[: len(weights)]:
            if reached < top_p:
                kept[i] = weights[i]
            reached += weights[i] / total
        weights = kept
    return [weights.get(i, 0.0) / sum(weights.values()) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 9, 1000])
@pytest.mark.parametrize("top_p", [None, 0.001, 0.5, 0.9, 1.0])
def test_the_distribution_is_the_written_out_one(temperature, top_k, top_p):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)) * 2
    ours = gpt2.next_token_probabilities(logits, temperature, top_k, top_p)
    expected = torch.tensor([written_out_distribution(row, temperature, top_k, top_p) for row in logits.tolist()])
    assert torch.allclose(ours, expected, atol=1e-6)


def test_top_k_keeps_exactly_k_among_equals():
    assert (gpt2.next_token_probabilities(torch.zeros(2, 9), top_k=4) > 0).sum(-1).tolist() == [4, 4]


def test_draws_follow_the_distribution_and_the_generator():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = gpt2.sample_next(logits.expand(4000, 4), 0.8, 3, None, generator)
    share = torch.bincount(drawn.flatten(), minlength=4) / 4000
    assert drawn.shape == (4000, 1) and share[3] == 0
    assert torch.allclose(share, gpt2.next_token_probabilities(logits, 0.8, 3)[0], atol=0.03)
    assert torch.equal(drawn, gpt2.sample_next(logits.expand(4000, 4), 0.8, 3, None, generator.manual_seed(0)))


def test_a_row_draws_the_same_alone_and_in_a_batch():
    model, idx = lively(TINY), some_ids(3, 4)
    seeded = [torch.Generator().manual_seed(i) for i in range(3)]
    batch = gpt2.generate(model, idx, 20, temperature=1.0, top_k=20, generator=seeded)
    for i in range(3):
        alone = gpt2.generate(model, idx[i : i + 1], 20, temperature=1.0, top_k=20, generator=[seeded[i].manual_seed(i)])
        assert torch.equal(alone[0], batch[i])
    greedy = gpt2.generate(model, idx, 20)
    assert not torch.equal(batch, greedy)


def test_the_end_of_text_stops_a_row_and_fills_it():
    model, idx = lively(TINY), some_ids(2, 4)
    free = gpt2.generate(model, idx, 12)
    new = [i for i in range(5, 12) if free[0, i] not in free[0, 4:i] and free[0, i] not in free[1, 4:]]
    at, eos = new[0], int(free[0, new[0]])  # row 0 alone says this, first here
    columns = []
    stopped = gpt2.generate(model, idx, 12, eos_id=eos, on_token=columns.append)
    assert torch.equal(stopped[1], free[1]) and torch.equal(stopped[0, :at], free[0, :at])
    assert (stopped[0, at:] == eos).all()
    assert torch.equal(torch.cat(columns, dim=1), stopped[:, 4:])
    alone = gpt2.generate(model, idx[:1], 12, eos_id=eos)
    assert torch.equal(alone, free[:1, : at + 1])


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.1}, {"top_p": math.nan}, {"max_new_tokens": -1}, {"idx": torch.zeros(3, dtype=torch.long)},
     {"idx": torch.zeros(1, 0, dtype=torch.long)}],
)  # fmt: skip
def test_arguments_of_generate_that_make_no_sense_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        gpt2.generate(lively(TINY), **{"idx": some_ids(1, 3), "max_new_tokens": 2, **change})


def test_a_generator_too_few_is_an_error():
    with pytest.raises(ValueError):
        gpt2.generate(lively(TINY), some_ids(3, 3), 2, temperature=1.0, generator=[torch.Generator()])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature):
    model = lively(TINY)
    model.final_norm.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        gpt2.generate(model, some_ids(1, 3), 2, temperature=temperature)


def test_a_long_prompt_is_cropped_to_its_end():
    model, idx = lively(TINY), some_ids(2, 30)
    long = gpt2.generate(model, idx, 10)
    assert torch.equal(long[:, :30], idx)
    assert torch.equal(long[:, 22:], gpt2.generate(model, idx[:, 22:], 10))


@pytest.mark.parametrize("training", [True, False])
def test_generate_is_without_dropout_and_puts_the_mode_back(training):
    model, idx = lively({**TINY, "dropout_rate": 0.5}).train(training), some_ids(1, 4)
    assert torch.equal(gpt2.generate(model, idx, 9), gpt2.generate(model.eval(), idx, 9))

    def fail(column):
        raise KeyError

    model.train(training)
    with pytest.raises(KeyError):
        gpt2.generate(model, idx, 9, on_token=fail)
    assert model.training == training


def test_no_new_token_gives_the_prompt():
    assert torch.equal(gpt2.generate(lively(TINY), some_ids(2, 4), 0), some_ids(2, 4))
