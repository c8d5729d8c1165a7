"""Every test. `python -m pytest -q` runs them, without a network; GPT2_LONG_TESTS=1 adds 48 kills of a run.

The models are tiny and their weights random, so a test says whether the program computes what it claims, not
whether a model is good. References are written out with loops: slow, and hard to get wrong.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for models this small threads only wait; and every process sums in one order

import ast
import errno
import functools
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
TINY = {"vocab_size": 61, "context_length": 8, "emb_dim": 12, "n_heads": 3, "n_layers": 2, "dropout_rate": 0.0,
        "qkv_bias": True}  # fmt: skip
TRAINABLE = {**TINY, "vocab_size": 50257, "emb_dim": 8, "n_heads": 2, "n_layers": 1}  # speaks GPT-2's tokens
# Not CONFIG's: that may change.
RECIPE = {"stride": 8, "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 2}
SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
pytestmark = pytest.mark.filterwarnings("error")  # nothing here may warn


# --- helpers and fixtures -----------------------------------------------------------------------------------


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
    """gpt2.py as a function: cli("generate", "--top_k", 3) -> .code, .out, .err; raises what main does."""

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
    """An eval model whose logits differ by more than rounding; those of an untrained one hardly do."""
    torch.manual_seed(seed)
    model = gpt2.GPT2(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def some_ids(*shape, vocab=61, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def save_model(model, path):
    gpt2.save_checkpoint(path, {"config": model.config, "model": model.state_dict()})
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
    return {**TRAINABLE, "dropout_rate": 0.1, "data": str(text), "batch_size": 4, "grad_accumulation": 2,
            "epochs": 2, **RECIPE}  # fmt: skip


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
    return {**config, "epochs": 4, "eval_every": 1, "checkpoint_every": 1}


@pytest.fixture(scope="session")
def long_whole(tmp_path_factory, long_config):
    folder = tmp_path_factory.mktemp("long_whole")
    list(gpt2.train(long_config, out=folder))
    return folder


# --- 1. attention and block ---------------------------------------------------------------------------------


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
@pytest.mark.parametrize("outputs", [50257, 50261, 65536])  # 29 pieces, none (a prime number), 32
@pytest.mark.parametrize("rows", [1, 2, 8, 128, 129])
def test_linear_with_few_rows_is_linear(rows, outputs, bias):
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, 4), torch.randn(1, rows, 4)
    bias = torch.randn(outputs) if bias else None
    expected = F.linear(x, weight, bias)
    with torch.no_grad():
        few = gpt2.linear(x, weight, bias)
    assert few.shape == (1, rows, outputs) and torch.allclose(few, expected, atol=1e-5)
    assert torch.equal(gpt2.linear(x, weight, bias), expected)  # with gradients


# --- 2. model -----------------------------------------------------------------------------------------------


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


def test_the_chunked_loss_is_not_rounded_in_half_precision():
    model, ids = lively(TINY), some_ids(2, 8)
    model.chunked_loss = True
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets=ids)
    model.chunked_loss = False
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(ids, targets=ids).item(), rel=0.02)


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


# --- 3. cache -----------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="cache .* 8"):
        cache[0].append(torch.zeros(2, 1, 3, 1, 4))


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


# --- 4. data ------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="4 tokens make no window.* context_length 4 .* 5"):
        gpt2.GPTDataset(range(4), 4, 1)


@pytest.mark.parametrize("context, stride", [(0, 1), (4, 0), (4, -1)])
def test_windows_without_length_or_stride_are_refused(context, stride):
    with pytest.raises(ValueError, match="at least 1"):
        gpt2.GPTDataset(range(9), context, stride)


def tokens_of(path, val_fraction=0.0):
    """A text's tokens as training gets them: (to train on, to validate)."""
    config = {**gpt2.CONFIG, "data": str(path), "val_fraction": val_fraction, "context_length": 1, "stride": 0}
    return [part and part.token_ids.tolist() for part in gpt2.load_data(config)]


def odd_text(rng, length):
    """Random text full of what tokenisers and readers of lines treat specially."""
    odd = [" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u2028", "\u3000", "\xa0", "\0", "\x0b",
           "<|endoftext|>", "'s", "é", "🙂", "漢", "12", "!?", "\ufeff"]  # fmt: skip
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
        assert tokens_of(path)[0] == tokenizer.encode(text, allowed_special="all")


def test_a_text_of_several_blocks_is_tokenised_as_a_whole(tmp_path, tokenizer):
    text = odd_text(random.Random(1), 30_000) * 18 + "the end"
    assert len(text) > 2**20
    (tmp_path / "big.txt").write_text(text, encoding="utf-8", newline="")
    text = text.removeprefix("\ufeff")
    first, second = tokens_of(tmp_path / "big.txt", 0.3)
    cut = int(len(text) * 0.7)
    assert first == tokenizer.encode(text[:cut], allowed_special="all")
    assert second == tokenizer.encode(text[cut:], allowed_special="all")


def test_a_text_of_several_rounds_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (tmp_path / "long.txt").write_text("a line of text\n" * 180_000, encoding="utf-8")
    with caplog.at_level(logging.INFO, "gpt2"):
        ids, _ = gpt2.load_text(tmp_path / "long.txt")
    assert len(ids) == 5 * 180_000
    assert [record.getMessage()[:16] for record in caplog.records] == ["tokenising: 78 %"]


@pytest.mark.parametrize("before", ["", "one\r\ntwo\nthr", "\ufeffé" * 5, "a" * 8191 + "é", "🎈" * 20_000])
def test_text_that_is_not_utf8_is_refused_with_its_byte(before, tmp_path):
    (tmp_path / "latin.txt").write_bytes(before.encode() + b"\xe9e\n")
    with pytest.raises(ValueError, match=f"byte {len(before.encode()) + 1:,} of the file is 0xe9"):
        tokens_of(tmp_path / "latin.txt")


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello world")
    assert tokens_of(tmp_path / "bom.txt")[0] == tokenizer.encode("hello world")


def test_text_to_ids_and_back(tokenizer):
    text = "Hello, 🙂 <|endoftext|> world"
    ids = gpt2.text_to_token_ids(text, tokenizer)
    assert ids.shape == (1, len(tokenizer.encode_ordinary(text))) and tokenizer.eot_token not in ids
    assert gpt2.token_ids_to_text(ids, tokenizer) == text
    assert gpt2.token_ids_to_text(ids[0].tolist(), tokenizer) == text
    assert gpt2.token_ids_to_text([60_000], tokenizer) == "�"  # beyond the vocabulary
    assert gpt2.text_to_token_ids("", tokenizer).shape == (1, 0)


def test_a_folder_named_by_the_user_is_where_the_vocabulary_is_looked_for(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2.load_tokenizer.__wrapped__()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    gpt2.load_tokenizer.__wrapped__()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(HERE / ".tiktoken")


def completions(pairs, context_length):
    return gpt2.CompletionDataset(pairs, context_length)


def write_lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def test_fine_tuning_data_comes_as_pairs_or_instructions_as_lines_or_a_list(tmp_path):
    entries = [{"prompt": "p\u2028q", "completion": " c"}, {"instruction": "do", "output": "done"},
               {"instruction": "do", "input": "this", "output": "it"}, {"instruction": "x", "input": "",
               "output": "y"}]  # fmt: skip
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
    x, y = completions([("one two", " three four")], 10)[0]
    prompt, completion = tokenizer.encode("one two"), tokenizer.encode(" three four")
    assert x.tolist() == prompt + completion
    assert y.tolist() == [-100] * (len(prompt) - 1) + completion + [tokenizer.eot_token]


def test_a_long_example_loses_the_left_of_its_prompt(tokenizer):
    dataset = completions([("a b c d e f g h", " y z"), ("a", " b")], 5)
    x, y = dataset[0]
    assert dataset.n_cut == 1
    assert x.tolist() == tokenizer.encode(" f g h y z")
    assert y.tolist() == [-100, -100, *tokenizer.encode(" y z"), tokenizer.eot_token]


def test_an_empty_prompt_becomes_end_of_text(tokenizer):
    x, y = completions([("", " yes")], 5)[0]
    assert x.tolist() == [tokenizer.eot_token, *tokenizer.encode(" yes")] and -100 not in y


def test_examples_are_shuffled_before_the_split(examples):
    config = {**gpt2.CONFIG, "data": str(examples), "val_fraction": 0.4}
    train_set, val_set = gpt2.load_data(config)
    assert len(val_set) == 6 and len(train_set) == 9
    assert sorted(train_set.examples + val_set.examples) == sorted(gpt2.read_examples(examples))
    assert train_set.examples + val_set.examples != gpt2.read_examples(examples)
    assert gpt2.load_data({**config, "seed": 1})[1].examples != val_set.examples


# --- 5. training: its parts ---------------------------------------------------------------------------------

SCHEDULE = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10, "decay_steps": 0}


@pytest.mark.parametrize("step, rate", [(1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (1000, 0.1)])
def test_the_learning_rate_rises_in_a_line_falls_in_half_a_cosine_and_stays(step, rate):
    assert gpt2.learning_rate_at(step, SCHEDULE, 110) == pytest.approx(rate)


def test_a_low_learning_rate_lowers_the_lowest():
    """`--learning_rate 1e-4` alone is what fine-tuning asks for."""
    lowest = [gpt2.check_config(given)["min_learning_rate"] for given in ({}, {"learning_rate": 1e-4})]
    assert lowest == [gpt2.CONFIG["min_learning_rate"], 2.5e-5]


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
        runs = [
            list(gpt2.train({**base, "batch_size": size, "grad_accumulation": 8 // size}, out=None))
            for size in (8, 4, 1)
        ]
        assert runs[0][0]["train_loss"] == pytest.approx(math.log(50257), abs=0.1)  # a mean, not a sum
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
    config = {**TRAINABLE, "data": str(tmp_path / "line.txt"), "val_fraction": 0.0, "emb_dim": 16,
              "epochs": 40, "learning_rate": 0.05, "min_learning_rate": 0.005, "warmup_steps": 5,
              "sample_prompt": "The quick"}  # fmt: skip
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


def test_a_dataset_takes_what_text_to_token_ids_gives(tokenizer):
    ids = gpt2.text_to_token_ids("one and two and three", tokenizer)
    assert torch.equal(gpt2.GPTDataset(ids, 2)[1][0], ids[0, 2:4])


def test_scoring_windows_hold_each_target_once():
    for length in range(9, 40):
        for stride in (None, 1, 3, 8):
            dataset, seen = gpt2.GPTDataset(list(range(length)), 8), []
            for x, y in dataset.scoring_windows(stride):
                seen += y[y != -100].tolist()
                assert all(b == -100 or b == a + 1 for a, b in zip(x.tolist(), y.tolist()))
            assert seen == list(range(1, length))


@pytest.mark.parametrize("stride", [8, 9, 12, 1000])
def test_a_stride_above_the_context_passes_over_nothing(stride):
    windows = gpt2.GPTDataset(torch.arange(101), 8).scoring_windows(stride)
    assert [int(target) for _, y in windows for target in y if target != gpt2.IGNORE_INDEX] == list(range(1, 101))


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_an_error(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}"):
        gpt2.evaluate(lively(TINY), gpt2.GPTDataset(torch.arange(20), 8), stride=stride)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_draws_no_random_number_and_puts_the_mode_back(training):
    model = lively({**TINY, "dropout_rate": 0.5}).train(training)
    dataset, state = gpt2.GPTDataset(some_ids(40), 8), torch.get_rng_state()
    assert gpt2.evaluate(model, dataset) == gpt2.evaluate(model, dataset)  # no dropout
    assert torch.equal(state, torch.get_rng_state()) and model.training == training


def test_padding_changes_no_loss(tokenizer, examples):
    model = lively({**TRAINABLE, "context_length": 12})
    dataset = completions(gpt2.read_examples(examples), 12)
    assert len({len(x) for x, _ in dataset}) > 2
    alone = [(model(x[None], targets=y[None]).item(), int((y != -100).sum())) for x, y in dataset]
    together = gpt2.evaluate(model, dataset)
    assert together == pytest.approx(sum(loss for loss, _ in alone) / sum(count for _, count in alone), rel=1e-5)
    x, y = gpt2.collate([dataset[i] for i in range(len(dataset))])
    assert model(x, targets=y).item() == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


# --- 6. training: runs --------------------------------------------------------------------------------------


def test_a_run_leaves_its_four_files(whole, config):
    assert sorted(path.name for path in whole.iterdir()) == ["best.pt", "last.pt", "loss.png", "metrics.jsonl"]
    rows = metrics_of(whole)
    keys = {"step", "epoch", "tokens_seen", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row.keys() - {"val_loss"} == keys for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    best = torch.load(whole / "best.pt", weights_only=True)
    model = gpt2.GPT2.from_pretrained(whole / "best.pt")
    _, val_set = gpt2.load_data({**gpt2.CONFIG, **config})
    lowest = min(row["val_loss"] for row in rows if "val_loss" in row)
    assert gpt2.evaluate(model, val_set) == pytest.approx(lowest, rel=1e-6) and not model.training
    assert best["config"] == {**gpt2.CONFIG, **config} and "optimizer" not in best


def test_the_picture_shows_both_losses_and_their_names(whole):
    def drawn(metrics):
        file = io.BytesIO()
        gpt2.plot_losses(metrics, file)
        return file.getvalue()

    rows = metrics_of(whole)
    assert (whole / "loss.png").read_bytes() == drawn(rows) and drawn(rows).startswith(b"\x89PNG")
    assert drawn(rows) != drawn(numbers(rows, ["val_loss"])) != drawn(numbers(rows[:-1], ["val_loss"]))


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
    assert [row["step"] for row in rows if "sample" in row] == [6, 12] and {row["total_steps"] for row in rows} == {12}
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


@pytest.mark.parametrize("step", [4, 6, 11])  # a stop within an epoch is measured, and forgotten on going on
def test_some_steps_and_the_others_are_the_whole(whole, config, tmp_path, step):
    assert "val_loss" in list(gpt2.train({**config, "max_steps": step}, out=tmp_path))[-1]
    list(gpt2.train({"max_steps": 12}, out=tmp_path, resume=True))
    assert_same_run(tmp_path, whole)


def test_best_is_not_replaced_by_a_worse_one_after_a_resume(config, tmp_path):
    """Step 3, where `max_steps` stops the run, is measured for once. That it was good is not forgotten."""
    list(gpt2.train({**config, "max_steps": 3}, out=tmp_path))
    last = gpt2.load_checkpoint(tmp_path / "last.pt", mmap=False)
    gpt2.save_checkpoint(tmp_path / "last.pt", {**last, "best_val_loss": 0.5})
    list(gpt2.train({"max_steps": 6}, out=tmp_path, resume=True))
    assert gpt2.load_checkpoint(tmp_path / "best.pt")["step"] == 3
    assert [row["step"] for row in metrics_of(tmp_path) if "val_loss" in row] == [6]


def test_a_config_of_numpy_numbers_leaves_plain_ones(config, tmp_path):
    import numpy

    given = {**config, "learning_rate": numpy.float64(1e-3), "dropout_rate": numpy.float64(0.1), "max_steps": 1}
    list(gpt2.train(given, out=tmp_path))
    assert gpt2.GPT2.from_pretrained(tmp_path / "last.pt").config["dropout_rate"] == 0.1
    assert gpt2.load_checkpoint(tmp_path / "last.pt")["config"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("change", [lambda model: model.bfloat16(), lambda model: model.requires_grad_(False)])
def test_a_model_that_could_not_be_resumed_is_not_trained(config, change):
    with pytest.raises(ValueError, match="token_embedding.weight is frozen or not float32"):
        next(gpt2.train(config, out=None, init=change(gpt2.GPT2(config))))


def test_another_eval_every_forgets_no_measurement(config, tmp_path):
    *_, row = gpt2.train({**config, "max_steps": 6}, out=tmp_path)
    next(gpt2.train({"max_steps": 12, "eval_every": 5}, out=tmp_path, resume=True))
    assert gpt2.load_checkpoint(tmp_path / "last.pt")["metrics"][5]["val_loss"] == row["val_loss"]


def test_a_run_that_writes_nothing_keeps_no_copy_of_its_weights(config, monkeypatch):
    runs = []

    class Seen(gpt2.Run):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(self)

    monkeypatch.setattr(gpt2, "Run", Seen)
    assert any("val_loss" in row for row in gpt2.train(config, out=None)) and runs[0].best is None


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
    assert 0 < step < 24 and len(metrics_of(tmp_path)) == step
    result = cli("train", "--resume", "--out", tmp_path)
    assert result.code == 0 and result.out == ""
    assert_same_run(tmp_path, long_whole)


@pytest.mark.parametrize(
    "change", [{"emb_dim": 32}, {"learning_rate": 0.5}, {"seed": 1}, {"epochs": 3}, {"dropout_rate": 0.0},
    {"val_fraction": 0.2}, {"precision": "bf16"}, {"weight_decay": 0.0}], )  # fmt: skip
def test_an_option_that_contradicts_the_checkpoint_is_named(whole, change):
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=rf"{key} .*{value!r} contradicts"):
        next(gpt2.train(change, out=whole, resume=True))


STATE = ("optimizer", "state", 2)


@pytest.mark.parametrize("path, value, message", [
    ((*STATE, "exp_avg"), torch.zeros(3), "exp_avg is .*3,"),
    ((*STATE, "exp_avg_sq"), None, "exp_avg_sq is an odd NoneType"),
    ((*STATE, "exp_avg_sq"), torch.full((24, 8), math.nan), "NaN"), ((*STATE, "step"), torch.ones(2), "step is"),
    ((*STATE, "step"), torch.tensor(1.0).to_sparse(), "step is"),
    ((*STATE, "more"), torch.ones(1), "more has no place"),
    (STATE, {}, "is missing"), (("optimizer", "state"), 3, "continued"), (("optimizer",), [], "continued"),
    (("step",), -1, "step is -1"), (("step",), "3", "step is '3'"), (("step",), 1, "metrics"),
    (("tokens_seen",), 0.5, "tokens_seen"), (("best_val_loss",), math.nan, "best_val_loss"),
    (("metrics", 0, "val_loss"), {"a": 1}, "val_loss"),
    (("metrics", 1, "train_loss"), 10**400, "train_loss"),
    (("metrics",), [], "metrics"), (("metrics",), [{"step": 1}, {"step": 2}], "train_loss"),
    (("model", "final_norm.bias"), torch.zeros(9), "final_norm.bias"),
    (("windows_per_step",), torch.zeros(9), "tensor for windows_per_step"),
])  # fmt: skip
def test_a_checkpoint_with_odd_values_is_not_continued(config, tmp_path, path, value, message):
    train_until(2, config, tmp_path)
    checkpoint = gpt2.load_checkpoint(tmp_path / "last.pt", mmap=False)
    assert checkpoint["optimizer"]["state"][2]["exp_avg"].shape == (24, 8)
    inner = functools.reduce(lambda outer, key: outer[key], path[:-1], checkpoint)
    inner[path[-1]] = value
    gpt2.save_checkpoint(tmp_path / "last.pt", checkpoint)
    with pytest.raises(ValueError, match=message):
        next(gpt2.train(out=tmp_path, resume=True))


def test_resume_tells_examples_from_a_text_of_the_same_bytes(fine_tuning, tmp_path):
    train_until(2, fine_tuning, tmp_path / "run")
    shutil.copy(fine_tuning["data"], tmp_path / "same.txt")
    shutil.copy(fine_tuning["data"], tmp_path / "same.json")
    with pytest.raises(ValueError, match="not the text"):
        next(gpt2.train({"data": str(tmp_path / "same.txt")}, out=tmp_path / "run", resume=True))


def test_a_link_in_a_folder_reaches_no_file_outside(config, tmp_path, exported):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("mine")
    (folder / ".lock").symlink_to(outside)
    with pytest.raises(OSError):
        next(gpt2.train(config, out=folder))
    (folder / ".lock").unlink()
    for name in ("last.pt.part", "model.safetensors.part", "metrics.jsonl"):
        (folder / name).symlink_to(outside)
    train_until(1, config, folder)
    gpt2.GPT2.from_pretrained(folder / "last.pt").save_pretrained(folder)
    assert outside.read_text() == "mine" and not (folder / "metrics.jsonl").is_symlink()


def test_a_folder_under_a_files_name_is_noticed_before_any_is_replaced(tmp_path):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(OSError, match="config.json: it is a folder"):
        lively(TRAINABLE).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


def test_a_run_whose_loss_is_zero_is_continued(config, tmp_path):
    train_until(2, config, tmp_path)
    checkpoint = gpt2.load_checkpoint(tmp_path / "last.pt", mmap=False)
    checkpoint["metrics"][1]["train_loss"] = 0.0
    gpt2.save_checkpoint(tmp_path / "last.pt", checkpoint)
    assert next(gpt2.train(out=tmp_path, resume=True))["step"] == 3


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
    with pytest.raises(ValueError, match="has done 12 steps.* --init"):
        next(gpt2.train(out=whole, resume=True))
    with pytest.raises(FileNotFoundError, match="to resume"):
        next(gpt2.train(out=tmp_path, resume=True))


def test_a_run_that_reached_its_max_steps_says_to_raise_them(config, tmp_path):
    list(gpt2.train({**config, "max_steps": 2}, out=tmp_path))
    with pytest.raises(ValueError, match="has done 2 steps.* raise --max_steps"):
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
    """A call of `os` that fails while `fails`."""

    def __init__(self, monkeypatch, call="fsync", number=errno.ENOSPC):
        self.fails, self.number, real = True, number, getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args: self.fail() if self.fails else real(*args))

    def fail(self):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_save_that_fails_warns_keeps_the_old_one_and_training_goes_on(
    whole, config, tmp_path, monkeypatch, caplog, call, number
):
    run = gpt2.train({**config, "checkpoint_every": 2}, out=tmp_path)
    next(run), next(run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    disk = FailingDisk(monkeypatch, call, number)
    next(run), next(run)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # no .part either
    assert "step 4 was not saved" in caplog.text and os.strerror(number) in caplog.text
    disk.fails = False
    list(run)
    assert_same_run(tmp_path, whole)


def test_a_last_save_that_fails_is_an_error(config, tmp_path, monkeypatch):
    FailingDisk(monkeypatch)
    rows = []
    with pytest.raises(OSError, match="step 3, the last, could not be saved"):
        for row in gpt2.train({**config, "max_steps": 3}, out=tmp_path / "run"):
            rows.append(row)
    assert len(rows) == 3 and not [path for path in tmp_path.rglob("*") if path.is_file()]
    run = gpt2.train(config, out=tmp_path / "run")
    next(run)
    with pytest.raises(OSError, match="step 1 could not be saved"):
        run.close()


@pytest.fixture
def small_disk(tmp_path):
    """A real one of 8 MB, with room for one checkpoint of about 5 MB and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    size = ["-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not mount or subprocess.run([mount, *size], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)  # also when a failure left a file open


def test_a_full_disk_keeps_the_last_save(small_disk, config, caplog):
    run = gpt2.train({**config, "val_fraction": 0.0, "checkpoint_every": 1}, out=small_disk)
    next(run)
    before = (small_disk / "last.pt").read_bytes()
    next(run)
    assert (small_disk / "last.pt").read_bytes() == before and not list(small_disk.glob("*.part"))
    assert "step 2 was not saved" in caplog.text
    with pytest.raises(OSError, match="could not be saved"):
        run.close()
    assert gpt2.load_checkpoint(small_disk / "last.pt")["step"] == 1 and not list(small_disk.glob("*.part"))


def test_a_folder_that_vanishes_is_made_again(config, tmp_path, caplog):
    run = gpt2.train({**config, "max_steps": 2, "checkpoint_every": 1}, out=tmp_path / "run")
    next(run)
    shutil.rmtree(tmp_path / "run")
    assert [row["step"] for row in run] == [2] and not caplog.text.count("not saved")
    assert gpt2.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_a_folder_that_is_gone_for_good_is_one_clear_error_at_the_end(config, tmp_path, caplog):
    run = gpt2.train({**config, "max_steps": 3, "checkpoint_every": 1}, out=tmp_path / "run")
    next(run)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    next(run)
    assert "step 2 was not saved: " in caplog.text and "File exists" in caplog.text
    next(run)
    with pytest.raises(OSError, match="step 3, the last, could not be saved"):
        next(run)


def test_what_is_read_during_training_is_always_whole(long_config, tmp_path):
    process, read = start("train", *words(long_config), "--out", tmp_path), set()
    try:
        wait_for_step(process)
        while process.poll() is None:
            for name in ("last.pt", "best.pt"):
                assert gpt2.GPT2.from_pretrained(tmp_path / name).num_parameters() > 0
            read.add(gpt2.load_checkpoint(tmp_path / "last.pt")["step"])
            steps = [row["step"] for row in metrics_of(tmp_path)]  # read once: the next time there may be more
            assert steps == list(range(1, len(steps) + 1))
    finally:
        process.kill()
        process.communicate()
    assert len(read) > 2  # so it was read while it changed


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_save(config, tmp_path):
    model = gpt2.GPT2({**TRAINABLE, "dropout_rate": 0.1})
    run = gpt2.train({**config, "checkpoint_every": 1}, out=tmp_path, init=model)
    next(run), next(run)
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step [23].* nan .*learning rate 0.000978"):
        next(run)
    assert (tmp_path / "last.pt").read_bytes() == before and gpt2.load_checkpoint(tmp_path / "last.pt")["step"] == 2


def torchrun(*words):
    """What a command by two processes prints on standard output."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, config):
    """Seven steps by two processes at half the batch, without dropout."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = words({**config, "dropout_rate": 0.0, "batch_size": 2, "max_steps": 7})
    torchrun("train", *options, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def one_process(config):
    return list(gpt2.train({**config, "dropout_rate": 0.0}, out=None))


def assert_close_rows(rows, reference):
    for row, expected in zip(numbers(rows), numbers(reference), strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_two_processes_at_half_the_batch_train_as_one(two_processes, one_process):
    assert_close_rows(metrics_of(two_processes), one_process[:7])


def test_two_processes_share_an_evaluation_and_report_it_once(two_processes, config, cli):
    command = ["eval", "--json", "--data", config["data"], "--model", two_processes / "last.pt"]
    report = json.loads(torchrun(*command))
    assert report == pytest.approx(json.loads(cli(*command).out), rel=1e-5)


def test_one_process_goes_on_with_a_run_of_two(two_processes, one_process, config, tmp_path):
    folder = shutil.copytree(two_processes, tmp_path / "run")
    with pytest.raises(ValueError, match="8 windows a step.* 4"):
        next(gpt2.train(out=folder, resume=True))
    rows = list(gpt2.train({"batch_size": 4, "max_steps": 0}, out=folder, resume=True))
    assert_close_rows(rows, one_process[7:])


def test_training_starts_from_a_model(whole, config, tmp_path):
    """--init: the same weights, a shorter context, the dropout of the run."""
    config = {**config, "context_length": 5, "stride": 5, "dropout_rate": 0.0}
    model = gpt2.GPT2.from_pretrained(whole / "last.pt")
    first, same = (next(gpt2.train(config, out=None, init=init)) for init in (whole / "last.pt", model))
    assert numbers([first]) == numbers([same])
    assert first["train_loss"] < metrics_of(whole)[0]["train_loss"]
    train_until(1, {**config, "learning_rate": 1e-9, "min_learning_rate": 0.0}, tmp_path, init=whole / "last.pt")
    start, moved = gpt2.load_checkpoint(whole / "last.pt"), gpt2.load_checkpoint(tmp_path / "last.pt")
    assert moved["config"]["context_length"] == 5 and moved["config"]["dropout_rate"] == 0.0
    for name, tensor in moved["model"].items():
        assert torch.allclose(tensor, start["model"][name][: len(tensor)], atol=1e-6)


def test_a_run_that_cannot_begin_leaves_the_model_as_it_was(config):
    model = lively({**TRAINABLE, "context_length": 32})
    with pytest.raises(FileNotFoundError):
        next(gpt2.train({**config, "context_length": 16, "data": "missing.txt"}, out=None, init=model))
    assert model.config["context_length"] == 32 and len(model.position_embedding.weight) == 32


def test_a_model_object_is_trained_in_place(config):
    model = gpt2.GPT2({**TRAINABLE, "dropout_rate": 0.1})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    next(gpt2.train(config, out=None, init=model))
    assert model.training and not same_state(before, model.state_dict())


# --- 7. sampling --------------------------------------------------------------------------------------------


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
        alone = gpt2.generate(
            model, idx[i : i + 1], 20, temperature=1.0, top_k=20, generator=[seeded[i].manual_seed(i)]
        )
        assert torch.equal(alone[0], batch[i])
    greedy = gpt2.generate(model, idx, 20)
    assert not torch.equal(batch, greedy)


def test_the_end_of_text_stops_a_row_and_fills_it():
    model, idx = lively(TINY), some_ids(2, 4)

    def draw(idx, **options):
        seeded = [torch.Generator().manual_seed(i) for i in range(len(idx))]
        return gpt2.generate(model, idx, 12, temperature=2.0, generator=seeded, **options)

    free = draw(idx)
    new = [i for i in range(5, 12) if free[0, i] not in free[0, 4:i] and free[0, i] not in free[1, 4:]]
    at, eos = new[0], int(free[0, new[0]])  # row 0 alone says this, first here
    columns = []
    stopped = draw(idx, eos_id=eos, on_token=columns.append)
    assert torch.equal(stopped[1], free[1]) and torch.equal(stopped[0, :at], free[0, :at])
    assert (stopped[0, at:] == eos).all()
    assert torch.equal(torch.cat(columns, dim=1), stopped[:, 4:])
    alone = draw(idx[:1], eos_id=eos)
    assert torch.equal(alone, free[:1, : at + 1])


@pytest.mark.parametrize("change", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": math.nan}, {"max_new_tokens": -1}, {"idx": torch.zeros(3, dtype=torch.long)},
    {"idx": torch.zeros(1, 0, dtype=torch.long)}, {"idx": torch.tensor([[61]])}, {"idx": torch.tensor([[3, -1]])},
])  # fmt: skip
def test_arguments_of_generate_that_make_no_sense_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        gpt2.generate(lively(TINY), **{"idx": some_ids(1, 3), "max_new_tokens": 2, **change})


def test_a_generator_too_few_is_an_error():
    with pytest.raises(ValueError):
        gpt2.sample_next(torch.zeros(3, 9), temperature=1.0, generator=[torch.Generator()])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature, value):
    model = lively(TINY)
    model.final_norm.bias.data.fill_(value)
    with pytest.raises(ValueError, match="NaN"):
        gpt2.generate(model, some_ids(1, 3), 2, temperature=temperature)


def test_logits_may_be_large_and_some_minus_infinity():
    logits = torch.tensor([[1e38, 0.0, -math.inf]])
    for temperature in (0.0, 1e-4, 1.0):
        assert gpt2.sample_next(logits, temperature).item() == 0
    with pytest.raises(ValueError, match="infinite"):
        gpt2.sample_next(torch.full((1, 3), -math.inf), 1.0)


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


def test_what_was_generated_can_be_trained_on():
    model = lively(TINY)
    for new in (0, 3):
        model(gpt2.generate(model, some_ids(1, 4), new)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_new_token_gives_the_prompt():
    assert torch.equal(gpt2.generate(lively(TINY), some_ids(2, 4), 0), some_ids(2, 4))


# --- 8. pretrained ------------------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}


def write_safetensors(path, tensors, edit=lambda header: None):
    """An independent writer of the format; `edit` may spoil the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def reference_logits(tensors, n_heads, n_layers, idx):
    """GPT-2 from tensors under OpenAI's names, as openai/gpt-2's model.py computes it."""
    w = {name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def dense(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.size(1)]
    for i in range(n_layers):
        q, k, v = dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        out = []
        for q, k, v in zip(*(part.chunk(n_heads, dim=-1) for part in (q, k, v))):
            scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
            out.append(scores.softmax(-1) @ v)
        x = x + dense(torch.cat(out, dim=-1), f"h.{i}.attn.c_proj")
        h = dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + dense(F.gelu(h, approximate="tanh"), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, folder it was exported to, the folder's tensors)."""
    folder = tmp_path_factory.mktemp("exported") / "folder"
    model = lively(TINY)
    model.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in gpt2.read_safetensors(folder / "model.safetensors").items()}
    return SimpleNamespace(model=model, folder=folder, tensors=tensors)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the exported folder, to spoil."""
    return shutil.copytree(exported.folder, tmp_path / "folder")


def test_exported_tensors_mean_the_same_to_openais_code(exported):
    idx = some_ids(2, 8)
    theirs = reference_logits(exported.tensors, 3, 2, idx)
    assert torch.allclose(theirs, exported.model(idx), atol=1e-4)
    assert exported.tensors["transformer.h.0.attn.c_attn.weight"].shape == (12, 36)
    assert exported.tensors["transformer.h.1.mlp.c_fc.weight"].shape == (12, 48)


def test_export_writes_these_files_and_nothing_else(exported):
    names = ["config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in exported.folder.iterdir()) == names
    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    expected = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61,
                "n_positions": 8, "n_ctx": 8, "n_embd": 12, "n_head": 3, "n_layer": 2,
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
                "eos_token_id": 50256, "tie_word_embeddings": True, "n_inner": None, "resid_pdrop": 0.0,
                "attn_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    tokenizer = json.loads((exported.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "GPT2Tokenizer" and tokenizer["model_max_length"] == 8
    kept = {hashlib.sha256(path.read_bytes()).digest() for path in (HERE / ".tiktoken").iterdir()}
    assert {hashlib.sha256((exported.folder / name).read_bytes()).digest() for name in names[1::3] + [names[4]]} >= kept


def as_safetensors(folder, tensors):
    write_safetensors(folder / "model.safetensors", tensors)


def as_shards(folder, tensors):
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        write_safetensors(folder / shard, {name: tensors[name] for name in part})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_pytorch(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", ["prefix", "bare", "masks and head"])
@pytest.mark.parametrize("write", [as_safetensors, as_shards, as_pytorch])
def test_a_hugging_face_folder_of_each_kind_is_read(exported, folder, write, style, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in exported.tensors.items()}
    if style != "prefix":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    expected = reference_logits(tensors, 3, 2, some_ids(2, 8))
    if style == "masks and head":
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-10000.0)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    write(folder, tensors)
    model = gpt2.GPT2.from_pretrained(folder)
    assert torch.allclose(model(some_ids(2, 8)), expected, atol=1e-4)
    assert not model.training and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert model.config == TINY


def test_a_model_without_query_bias_exports_zeros(tmp_path):
    model = lively({**TINY, "qkv_bias": False})
    model.save_pretrained(tmp_path)
    back = gpt2.GPT2.from_pretrained(tmp_path)
    assert back.config["qkv_bias"] and (back.blocks[1].attention.query_key_value.bias == 0).all()
    assert torch.allclose(back(some_ids(2, 8)), model(some_ids(2, 8)), atol=1e-5)


def test_a_checkpoint_gives_the_model_back(tmp_path):
    model = lively(TINY)
    back = gpt2.GPT2.from_pretrained(save_model(model, tmp_path / "a.pt"))
    assert same_state(back.state_dict(), model.state_dict()) and back.config == model.config and not back.training


REFUSED = {"model_type": "llama", "activation_function": "gelu", "layer_norm_epsilon": 1e-6, "n_inner": 99,
           "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
           "reorder_and_upcast_attn": True, "add_cross_attention": True,
           "tie_word_embeddings": False}  # fmt: skip


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}), encoding="utf-8")


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(folder, key):
    edit_config(folder, **{key: REFUSED[key]})
    with pytest.raises(ValueError, match=f"{key} is {REFUSED[key]!r}"):
        gpt2.GPT2.from_pretrained(folder)
    edit_config(folder, **{key: "gone"})  # left out, it has the value that GPT-2 has
    gpt2.GPT2.from_pretrained(folder)


def test_n_inner_may_say_four_times_the_width(exported, folder):
    edit_config(folder, n_inner=48)
    read, expected = gpt2.GPT2.from_pretrained(folder), gpt2.GPT2.from_pretrained(exported.folder)
    assert read.config == expected.config and same_state(read.state_dict(), expected.state_dict())


def spoil(change):
    """A way to spoil a folder: change its tensors and write them again."""

    def act(folder, tensors):
        tensors = dict(tensors)
        change(tensors)
        write_safetensors(folder / "model.safetensors", tensors)

    return act


def spoil_header(edit):
    return lambda folder, tensors: write_safetensors(folder / "model.safetensors", tensors, edit)


def cut_file(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def deep_json(folder, tensors):
    text = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def leave_folder(folder, tensors):
    as_shards(folder, tensors)
    (folder / "a.safetensors").rename(folder.parent / "a.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("a.safetensors", "../a.safetensors"))


def lose_shard(folder, tensors):
    as_shards(folder, tensors)
    (folder / "b.safetensors").unlink()


LN = "transformer.h.0.ln_1.weight"
WTE = "transformer.wte.weight"
BAD_FOLDERS = {
    "no config": (lambda folder, tensors: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder, tensors: (folder / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda folder, tensors: (folder / "config.json").write_text("[]"), "config.json"),
    "config without n_embd": (lambda folder, tensors: edit_config(folder, n_embd="gone"), "n_embd"),
    "config with words": (lambda folder, tensors: edit_config(folder, n_embd="wide"), "emb_dim"),
    "config with absurd size": (lambda folder, tensors: edit_config(folder, n_layer=10**12), "n_layers"),
    "no weights": (lambda folder, tensors: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "missing tensor": (spoil(lambda t: t.pop(LN)), "norm1.weight is missing|ln_1.weight"),
    "extra tensor": (spoil(lambda t: t.update(extra=torch.zeros(2))), "extra"),
    "wrong shape": (spoil(lambda t: t.update({LN: torch.zeros(13)})), r"\(13,\)"),
    "whole numbers": (spoil(lambda t: t.update({LN: torch.zeros(12, dtype=torch.int64)})), "I64|int64"),
    "NaN": (spoil(lambda t: t.update({LN: torch.full((12,), math.nan)})), "norm1.weight|ln_1.weight"),
    "a head of its own": (spoil(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), "lm_head.weight differs"),
    "cut file": (cut_file, "model.safetensors"),
    "empty file": (lambda folder, tensors: (folder / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "header of 2^63 bytes": (huge_header, "model.safetensors"),
    "deep header": (deep_json, "model.safetensors"),
    "header is a list": (
        lambda folder, tensors: (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0[]"),
        "model.safetensors",
    ),
    "overlap": (spoil_header(lambda h: h[LN].update(data_offsets=h[WTE]["data_offsets"])), LN),
    "offsets beyond the file": (spoil_header(lambda h: h[LN].update(data_offsets=[10**9, 10**9 + 48])), "h.0.ln_1"),
    "negative offsets": (spoil_header(lambda h: h[LN].update(data_offsets=[-48, 0])), LN),
    "wrong length": (spoil_header(lambda h: h[LN].update(shape=[11])), LN),
    "negative shape": (spoil_header(lambda h: h[LN].update(shape=[-12, -1])), "model.safetensors"),
    "shape of words": (spoil_header(lambda h: h[LN].update(shape=["x"])), LN),
    "unknown type": (spoil_header(lambda h: h[LN].update(dtype="F4")), "F4"),
    "entry is no object": (spoil_header(lambda h: h.update({LN: 3})), "model.safetensors"),
    "three offsets": (spoil_header(lambda h: h[LN].update(data_offsets=[0, 1, 2])), "model.safetensors"),
    "index leaves the folder": (leave_folder, "index"),
    "shard missing": (lose_shard, "b.safetensors"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_gives_one_clear_error(exported, folder, kind):
    act, message = BAD_FOLDERS[kind]
    act(folder, exported.tensors)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        gpt2.GPT2.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_names_covers_every_parameter(name):
    with torch.device("meta"):
        model = gpt2.GPT2({**gpt2.OPENAI_SIZES[name], "dropout_rate": 0.1})
    theirs = set(gpt2.hugging_face_names(model.config).values())
    ends = ["ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"h.{i}.{end}" for i in range(model.config["n_layers"]) for end in ends} | {"ln_f"}
    expected = {f"{stem}.{part}" for stem in expected for part in ("weight", "bias")} | {"wte.weight", "wpe.weight"}
    assert theirs == expected and len(expected) == len(dict(model.named_parameters()))


@pytest.fixture
def hub(exported, tmp_path, monkeypatch):
    """A server on this machine in the hub's place: hub.answer is (status, body, length it claims)."""
    hub = SimpleNamespace(asked=[], answer=None, cache=tmp_path / "torch" / "hub" / "checkpoints")
    hub.file = (exported.folder / "model.safetensors").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            status, body, length = hub.answer
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setitem(gpt2.OPENAI_SIZES, "gpt2", {key: TINY[key] for key in TINY if key != "dropout_rate"})
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


def test_a_size_is_downloaded_once(hub, exported):
    hub.answer = (200, hub.file, len(hub.file))
    for _ in range(2):
        model = gpt2.GPT2.from_pretrained("gpt2")
    assert hub.asked == ["/openai-community/gpt2/resolve/main/model.safetensors"]
    assert torch.allclose(model(some_ids(1, 8)), exported.model(some_ids(1, 8)), atol=1e-5)
    assert len(list(hub.cache.iterdir())) == 1


@pytest.mark.parametrize("kind", ["half", "claims half", "missing", "a page"])
def test_a_download_that_fails_leaves_nothing(hub, kind):
    half, page = hub.file[: len(hub.file) // 2], b"<html>log in</html>"
    answers = {"half": (200, half, len(hub.file)), "claims half": (200, half, len(half)),
               "missing": (404, b"", 0), "a page": (200, page, len(page))}  # fmt: skip
    hub.answer = answers[kind]
    with pytest.raises(OSError, match="/openai-community/gpt2/.* could not be downloaded"):
        gpt2.GPT2.from_pretrained("gpt2")
    assert list(hub.cache.iterdir()) == []
    hub.answer = (200, hub.file, len(hub.file))
    gpt2.GPT2.from_pretrained("gpt2")  # nothing half is in the way


# --- 9. command line ----------------------------------------------------------------------------------------


class Trap:
    """Unpickled without care, this writes a file."""

    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with one good model and every bad file."""
    folder = tmp_path_factory.mktemp("shelf")
    model = lively(TRAINABLE)
    save_model(model, folder / "good.pt")
    good = (folder / "good.pt").read_bytes()

    def checkpoint(name, **changes):
        whole = {"format": "gpt2.py 1", "config": model.config, "model": model.state_dict(), **changes}
        torch.save({key: value for key, value in whole.items() if value is not None}, folder / name)

    files = {
        "empty.txt": b"", "blank.txt": b" \n\t\n", "short.txt": b"hello there",
        "latin1.txt": "caf\xe9 ".encode("latin-1") * 99, "utf16.txt": (VERDICT[:999]).encode("utf-16"),
        "one.txt": b"a", "empty.jsonl": b"", "blank.jsonl": b"\n\n",
        "broken.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n',
        "deep.jsonl": b"[" * 100_000, "deep.json": b'{"a":' * 100_000, "number.jsonl": b"7\n",
        "types.jsonl": b'\n{"prompt": "a", "completion": 3}\n', "keys.jsonl": b'{"text": "a"}\n',
        "null.jsonl": b'{"instruction": null, "output": "x"}\n', "broken.json": b'[{"prompt": ]',
        "list.json": b"[1, 2]", "latin1.jsonl": '{"prompt": "\xe9"}'.encode("latin-1"),
        "single.jsonl": b'{"prompt": "a", "completion": "b"}\n',
        "input.jsonl": b'{"instruction": "a", "input": 3, "output": "x"}', "nothing.pt": b"", "letter.pt": b"G",
        "spaces.json": json.dumps(2 * [{"prompt": "", "completion": "b" + " " * 1_500_000 + "c"}]).encode(),
        "end.pt": good[:-43] + b"\1" + good[-42:],
        "words.pt": b"these are words\n" * 9, "cut.pt": good[: len(good) // 2],
        "flipped.pt": good[:600_000] + bytes([good[600_000] ^ 255]) + good[600_001:],
        "foreign.pt": pickle.dumps({"model": SimpleNamespace(a=1)}), "trap.pt": pickle.dumps(Trap()),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_model(gpt2.GPT2({**TRAINABLE, "vocab_size": 50}), folder / "small.pt")
    loud = lively(TRAINABLE)
    loud.final_norm.weight.data.fill_(1e38)
    save_model(loud, folder / "loud.pt")
    torch.save({"format": "gpt2.py 1", "config": {}, "model": Trap()}, folder / "zipped_trap.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", b"\0" * 20_000_000)
    checkpoint("version.pt", format="gpt2.py 99")
    checkpoint("no_config.pt", config=None)
    checkpoint("no_model.pt", model=None)
    checkpoint("no_width.pt", config={key: value for key, value in model.config.items() if key != "emb_dim"})
    checkpoint("absurd.pt", config={**model.config, "emb_dim": 10**15})
    checkpoint("wide.pt", config={**model.config, "emb_dim": 65_536})
    checkpoint("word.pt", config={**model.config, "n_heads": "two"})
    checkpoint("no_weights.pt", model={})
    same, weights = torch.zeros(256), model.state_dict()
    checkpoint("shared.pt", model={name: same[: tensor.numel()].view(tensor.shape) if tensor.numel() <= 256 else tensor
                                   for name, tensor in weights.items()})  # fmt: skip
    checkpoint("expanded.pt", model={name: same[:1].expand(tensor.shape) for name, tensor in weights.items()})
    laugh = [1]
    for _ in range(40):
        laugh = [laugh, laugh]
    checkpoint("laugh.pt", config={**model.config, "vocab_size": laugh})
    checkpoint("odd.pt", model={**weights, "final_norm.bias": torch.zeros(8).to(torch.complex64)})
    for name, theirs, tensor in (
        ("odd_head", "lm_head.weight", model.token_embedding.weight.detach().to_sparse()),
        ("odd_matrix", "h.0.attn.c_attn.weight", torch.zeros(8, 24, device="meta")),
    ):
        model.save_pretrained(folder / name)
        tensors = gpt2.read_safetensors(folder / name / "model.safetensors")
        tensors = {key: value.clone() for key, value in tensors.items()} | {theirs: tensor}
        torch.save(tensors, folder / name / "pytorch_model.bin")
        (folder / name / "model.safetensors").unlink()
    checkpoint("sparse.pt", model={name: tensor.to_sparse() for name, tensor in weights.items()})
    checkpoint("numbers.pt", model={"token_embedding.weight": 3})
    checkpoint("nan.pt", model={**model.state_dict(), "final_norm.bias": torch.full((8,), math.nan)})
    for name, source in (("weights_only", "good.pt"), ("damaged", "cut.pt")):
        (folder / name).mkdir()
        shutil.copy(folder / source, folder / name / "last.pt")
    (folder / "hollow").mkdir()
    checkpoint("hollow/last.pt", optimizer={}, finished=False)
    model.save_pretrained(folder / "hf")
    shutil.copytree(folder / "hf", folder / "hf_cut")
    cut_file(folder / "hf_cut", None)
    shutil.copytree(folder / "hf", folder / "hf_gelu")
    edit_config(folder / "hf_gelu", activation_function="gelu")
    return folder


BAD_COMMANDS = [  # what is typed, and what the one line must hold
    ("", "COMMAND"), ("trian", "trian"), ("train extra", "extra"),
    ("train --lr 1", "gpt2.py train: error: unrecognized arguments: --lr 1 (see gpt2.py train --help)"),
    ("train --learning-rate 1", "are written with _"), ("train --learn 1", "--learn"), ("--learn", "COMMAND"),
    ("train --emb_dim", "emb_dim"), ("train --emb_dim 0", "emb_dim"), ("train --emb_dim -4", "emb_dim"),
    ("train --emb_dim x", "emb_dim"), ("train --emb_dim 1.5", "emb_dim"),
    ("train --emb_dim 10 --n_heads 4", "emb_dim 10"), ("train --n_heads 0", "n_heads"),
    ("train --n_layers 0", "n_layers"), ("train --n_layers 1e3", "n_layers"),
    ("train --context_length 0", "context_length"), ("train --vocab_size 100", "vocab_size"),
    ("train --dropout_rate 1", "dropout_rate"), ("train --dropout_rate -0.1", "dropout_rate"),
    ("train --dropout_rate nan", "dropout_rate"), ("train --batch_size 0", "batch_size"),
    ("train --grad_accumulation 0", "grad_accumulation"), ("train --epochs 0", "epochs"),
    ("train --max_steps -1", "max_steps"), ("train --learning_rate 0", "learning_rate"),
    ("train --learning_rate inf", "learning_rate"), ("train --learning_rate 1e-5 --min_learning_rate 1e-4", "is above"),
    ("train --min_learning_rate -1", "min_learning_rate"), ("train --warmup_steps -1", "warmup_steps"),
    ("train --decay_steps -1", "decay_steps"), ("train --weight_decay -1", "weight_decay"),
    ("train --grad_clip -1", "grad_clip"), ("train --grad_clip nan", "grad_clip"),
    ("train --seed -1", "seed"), ("train --seed 99999999999", "seed"),
    ("train --val_fraction 1", "val_fraction"), ("train --stride -1", "stride"),
    ("train --eval_every -1", "eval_every"), ("train --checkpoint_every -1", "checkpoint_every"),
    ("train --device nosuch", "nosuch"), ("train --device cuda:99", "cuda:99"),
    ("train --precision fp61", "fp61"), ("train --qkv_bias yes", "yes"), ("train --model_size gpt3", "gpt3"),
    ("train --data missing.txt", "missing.txt"), ("train --data hf", "hf"),
    ("train --data empty.txt", "empty.txt"), ("train --data blank.txt", "blank.txt"),
    ("train --data latin1.txt", "not UTF-8"), ("train --data utf16.txt", "not UTF-8"),
    ("train --data short.txt", "2 tokens to train on"), ("train --context_length 5000", "context_length"),
    ("train --data broken.jsonl", "line 2"), ("train --data types.jsonl", "line 2"),
    ("train --data keys.jsonl", "line 1"), ("train --data number.jsonl", "line 1"),
    ("train --data null.jsonl", "line 1"), ("train --data deep.jsonl", "deep.jsonl"),
    ("train --data deep.json", "deep.json"), ("train --data empty.jsonl", "empty.jsonl"),
    ("train --data blank.jsonl", "blank.jsonl"), ("train --data broken.json", "broken.json"),
    ("train --data list.json", "list.json, item 1"), ("train --data latin1.jsonl", "not UTF-8"),
    ("train --data single.jsonl", "single.jsonl"), ("train --data input.jsonl", "line 1"),
    ("train --resume", "to resume"), ("train --resume --out weights_only", "--init"),
    ("train --resume --out damaged", "damaged"), ("train --resume --out hollow", "hollow"),
    ("train --out damaged", "--overwrite"), ("train --out good.pt", "good.pt is no folder"),
    ("train --init missing.pt", "missing.pt"), ("train --init good.pt --emb_dim 32", "emb_dim"),
    ("train --init good.pt --context_length 64", "context_length"), ("train --init cut.pt", "cut.pt"),
    ("generate a b", "b"), ("generate", "python gpt2.py train"),
    ("generate --model missing.pt", "missing.pt"), ("generate --model nothing.pt", "nothing.pt"),
    ("generate --model letter.pt", "letter.pt"), ("generate --model end.pt", "end.pt"),
    ("generate --model words.pt", "words.pt"), ("generate --model cut.pt", "cut.pt"),
    ("generate --model flipped.pt", "flipped.pt"), ("generate --model foreign.pt", "foreign.pt"),
    ("generate --model trap.pt", "trap.pt"), ("generate --model zipped_trap.pt", "zipped_trap.pt"),
    ("generate --model list.pt", "list"), ("generate --model other.pt", "other.pt"),
    ("generate --model bomb.pt", "bomb.pt"), ("generate --model version.pt", "version.pt"),
    ("generate --model no_config.pt", "config"), ("generate --model no_model.pt", "model"),
    ("generate --model no_width.pt", "emb_dim"), ("generate --model absurd.pt", "emb_dim"),
    ("generate --model wide.pt", "shape"), ("generate --model word.pt", "n_heads"),
    ("generate --model no_weights.pt", "is missing"), ("generate --model numbers.pt", "numbers.pt"),
    ("generate --model nan.pt", "final_norm.bias"), ("generate --model weights_only", "give weights_only/last.pt"),
    ("generate --model hf_cut", "safetensors"), ("generate --model hf_gelu", "activation_function"),
    ("generate --model good.pt --temperature -1", "temperature"),
    ("generate --model good.pt --temperature nan", "temperature"),
    ("generate --model good.pt --temperature hot", "temperature"),
    ("generate --model good.pt --top_k 0", "top_k"), ("generate --model good.pt --top_k 1.5", "top_k"),
    ("generate --model good.pt --top_p 0", "top_p"), ("generate --model good.pt --top_p 1.01", "top_p"),
    ("generate --model good.pt --top_p nan", "top_p"),
    ("generate --model good.pt --num_samples 0", "num_samples"), ("generate --model laugh.pt", "vocab_size is"),
    ("generate --model odd_head", "ordinary tensors"), ("generate --model odd_matrix", "ordinary tensors"),
    ("generate --model odd.pt", "odd Tensor"), ("train --data spaces.json", "tokenizing"),
    ("generate --model good.pt --num_samples 1001", "1000"), ("generate --model shared.pt", "claim more"),
    ("generate --model sparse.pt", "sparse.pt"), ("generate --model expanded.pt", "claim more"),
    ("train --emb_dim 65536 --n_heads 1 --n_layers 1000", "GB of memory"),
    ("generate --model good.pt --max_tokens -1", "max_tokens"),
    ("generate --model good.pt --seed -1", "seed"), ("generate --model good.pt --device nosuch", "nosuch"),
    ("generate --model good.pt --device meta", "meta"), ("generate --model good.pt --seed x", "seed"),
    ("eval", "python gpt2.py train"), ("eval --model good.pt --data missing.txt", "missing.txt"),
    ("eval --model good.pt --stride 0", "stride"), ("eval --model good.pt --stride 9", "from 1 to 8"),
    ("eval --model small.pt --data short.txt", "vocabulary of 50"), ("generate --model small.pt", "vocabulary of 50"),
    ("eval --model loud.pt --data short.txt", "the loss is"),
    ("generate --model hf_cut/model.safetensors", "give the folder hf_cut"),
    ("eval --model good.pt --data empty.txt", "empty.txt"),
    ("eval --model good.pt --data one.txt", "one token"),
    ("eval --model good.pt --data latin1.txt", "not UTF-8"),
    ("eval --model good.pt --data broken.jsonl", "line 2"), ("eval --model cut.pt", "cut.pt"),
    ("eval --model good.pt --device nosuch", "nosuch"), ("export", "FOLDER"),
    ("export new", "python gpt2.py train"), ("export good.pt --model good.pt", "good.pt is no folder"),
    ("export new --model cut.pt", "cut.pt"), ("export new --model hf_gelu", "activation_function"),
    ("export good.pt/new --model good.pt", "good.pt"),
]  # fmt: skip


def contents(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("typed, message", BAD_COMMANDS, ids=[typed or "nothing" for typed, _ in BAD_COMMANDS])
def test_bad_input_gives_one_line_and_changes_nothing(shelf, cli, monkeypatch, typed, message):
    monkeypatch.chdir(shelf)
    before = contents(shelf)
    result = cli(*shlex.split(typed))
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and "error: " in result.err and message in result.err
    assert "Traceback" not in result.err and contents(shelf) == before


def test_an_error_of_the_program_itself_is_one_line_and_status_2(tmp_path):
    process = start("generate", "--top_k", 0, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1) and "top_k" in err


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
])  # fmt: skip
def test_too_little_memory_says_what_to_lower(cli, monkeypatch, error):
    monkeypatch.setattr(gpt2, "load_model", lambda args: (_ for _ in ()).throw(error))
    result = cli("generate")
    assert result.code == 2 and result.err.count("\n") == 1 and "lower --batch_size" in result.err


def test_a_compiler_that_is_missing_is_one_line(cli, monkeypatch):
    error = type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no compiler\nmore")
    monkeypatch.setattr(gpt2, "load_model", lambda args: (_ for _ in ()).throw(error))
    result = cli("generate")
    assert result.code == 2 and result.err.count("\n") == 1 and "leave out --compile" in result.err


def test_an_error_stands_below_a_live_line(monkeypatch):
    pty = pytest.importorskip("pty")

    def load(args):
        gpt2.log.info("half way", extra={"live": True})
        raise ValueError("no such thing")

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(gpt2, "load_model", load)
        patch.setattr(sys, "stderr", terminal)
        assert gpt2.main(["generate"]) == 2
        shown = b""
        while shown.count(b"\n") < 2:
            shown += os.read(ours, 1000)
    os.close(ours)
    assert shown.decode() == "half way\r\ngpt2.py generate: error: no such thing\r\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), NotImplementedError("a bug"), KeyError("a bug")])
def test_a_bug_is_not_taken_for_bad_input(cli, monkeypatch, error):
    monkeypatch.setattr(gpt2, "load_model", lambda args: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match="a bug"):
        cli("generate")


def help_of(cli, monkeypatch, command):
    """What --help says, option by option."""
    monkeypatch.setenv("COLUMNS", "1000")
    result = cli(command, "--help")
    assert result.code == 0 and result.err == ""
    return {re.search(r"--(\w+)", part).group(1): part for part in re.split(r"\n  (?=-)", result.out)[1:]}


def test_help_shows_every_key_with_its_default(cli, monkeypatch):
    shown = help_of(cli, monkeypatch, "train")
    assert [key for key, default in gpt2.CONFIG.items() if f"(default: {default})" not in shown[key]] == []
    source = (HERE / "gpt2.py").read_text(encoding="utf-8")
    for key in gpt2.CONFIG:  # the comment beside a key is its help
        comment = re.search(rf'^    "{key}": .*,  # (.*)$', source, re.MULTILINE).group(1)
        assert comment in shown[key]


@pytest.mark.parametrize("command, options", [("generate", {"max_tokens": 100, "num_samples": 1, "seed": 42,
    "model": "checkpoints/last.pt", "device": "auto"}), ("eval", {"data": "the-verdict.txt",
    "model": "checkpoints/last.pt", "device": "auto"}), ("export", {"model": "checkpoints/last.pt"}),
    ("train", {"out": "checkpoints"}), ])  # fmt: skip
def test_help_of_each_command_shows_defaults(cli, monkeypatch, command, options):
    shown = help_of(cli, monkeypatch, command)
    assert [name for name, default in options.items() if f"(default: {default})" not in shown[name]] == []


def test_train_accepts_every_key(cli, text, tmp_path):
    ours = {"vocab_size": 50258, "context_length": 7, "emb_dim": 6, "n_heads": 3, "n_layers": 2,
            "dropout_rate": 0.2, "qkv_bias": False, "data": str(text), "val_fraction": 0.2, "stride": 5,
            "batch_size": 3, "grad_accumulation": 2, "epochs": 3, "max_steps": 1, "learning_rate": 2e-3,
            "min_learning_rate": 2e-4, "warmup_steps": 3, "decay_steps": 9, "weight_decay": 0.2,
            "grad_clip": 2.0, "seed": 5, "eval_every": 2, "checkpoint_every": 3, "sample_prompt": "No 100%",
            "device": "cpu", "precision": "fp32", "compile": False, "chunked_loss": True}  # fmt: skip
    assert ours.keys() == gpt2.CONFIG.keys()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = cli("train", *words(ours), "--out", tmp_path)
    assert result.code == 0 and result.out == "" and "python gpt2.py generate" in result.err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert gpt2.load_checkpoint(tmp_path / "last.pt")["config"] == ours


def test_train_says_what_it_will_do_and_what_comes_next(cli, config, tmp_path):
    notes = cli("train", *words(config), "--out", tmp_path / "a run").err.splitlines()
    train_set, val_set = gpt2.load_data({**gpt2.CONFIG, **config})
    n_train, n_val = (f"{len(part.token_ids):,}" for part in (train_set, val_set))
    assert notes[0].endswith(f": {n_train} tokens to train on, {n_val} tokens to validate")
    count = f"{gpt2.GPT2(config).num_parameters():,}"
    assert notes[1] == f"model     {count} parameters: 1 layers, 2 heads, width 8, context 8"
    assert notes[2:4] == ["device    cpu, fp32", "steps     1 to 12, 6 an epoch"]
    assert re.fullmatch(r"step 12/12  epoch 2  loss \d+\.\d{3}  validation \d.*tokens/s  0:00 left", notes[-4])
    assert notes[-3].startswith("    I HAD always thought")
    assert notes[-2].startswith("done      training loss") and notes[-2].endswith("loss.png shows the way")
    assert notes[-1] == f"next      python gpt2.py generate --model '{tmp_path / 'a run' / 'last.pt'}'"
    notes = cli("train", *words(config), "--out", tmp_path / "a run").err.splitlines()
    assert notes[4].startswith("saving    in ") and notes[4].endswith("the first save replaces the run that is there")


def test_model_size_sets_the_sizes_and_keys_given_win(cli, monkeypatch, tmp_path):
    def show(config, **options):
        raise ValueError(json.dumps(config))
        yield

    monkeypatch.setattr(gpt2, "train", show)
    result = cli("train", "--model_size", "gpt2-medium", "--n_layers", 3, "--out", tmp_path)
    given = json.loads(result.err.partition("error: ")[2])
    assert given == {**gpt2.OPENAI_SIZES["gpt2-medium"], "n_layers": 3}


def forced(tokens, columns=1):
    """A model that says these tokens one after the other, whatever it is given; then the end of text."""

    class Forced(nn.Module):
        config = {**TRAINABLE, "context_length": 1000}

        def __init__(self):
            super().__init__()
            self.weight, self.left = nn.Parameter(torch.zeros(1)), list(tokens)

        def new_cache(self):
            return []

        def forward(self, idx, cache=None, last_only=False):
            token = self.left.pop(0) if self.left else 50256
            return F.one_hot(torch.full((idx.size(0), 1), token), 50257).float() * 50

    return Forced()


class Recorder(io.TextIOWrapper):
    """A standard output that keeps each piece written to it."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return len(text)


def say(monkeypatch, tokens, *arguments):
    """The pieces that `generate` writes when its model says `tokens`."""
    monkeypatch.setattr(gpt2.GPT2, "from_pretrained", lambda name: forced(tokens))
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", recorder)
        assert gpt2.main(["generate", *arguments, "--model", "forced", "--device", "cpu"]) == 0
    return [piece for piece in recorder.pieces if piece]


def test_a_character_of_several_tokens_is_printed_whole(monkeypatch, tokenizer):
    text = " A🙂é漢字B"
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text)
    pieces = say(monkeypatch, tokens, "Say:")
    assert "".join(pieces) == f"Say:{text}\n" and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5  # as they come, not at once


def test_half_a_character_at_the_end_is_shown_as_such(monkeypatch, tokenizer):
    assert "".join(say(monkeypatch, tokenizer.encode("🙂")[:1], "Say:")) == "Say:\ufffd\n"


def test_an_instruction_is_asked_in_its_layout_and_the_answer_alone_is_printed(monkeypatch, tokenizer):
    asked = []
    monkeypatch.setattr(gpt2, "prompt_ids", lambda text: asked.append(text) or torch.zeros(1, 1, dtype=torch.long))
    assert "".join(say(monkeypatch, tokenizer.encode("Yes."), "Is it?", "--instruct")) == "Yes.\n"
    assert asked == [gpt2.instruction_prompt("Is it?")]


def test_control_characters_are_written_out_on_a_terminal_only(monkeypatch, tokenizer):
    tokens = tokenizer.encode("\x1b[2J\tx\n\x07")
    assert "".join(say(monkeypatch, tokens, "\x9bp")) == "\x9bp\x1b[2J\tx\n\x07\n"
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(gpt2.GPT2, "from_pretrained", lambda name: forced(tokens))
        assert gpt2.main(["generate", "\x9bp", "--model", "forced", "--device", "cpu"]) == 0
        shown = b""
        while shown.count(b"\n") < 2:  # a terminal hands over what it has, not what was written at once
            shown += os.read(ours, 1000)
    os.close(ours)
    assert shown.decode().replace("\r\n", "\n") == "\\x9bp\\x1b[2J\tx\n\\x07\n"


@pytest.fixture
def at_shelf(shelf, cli, monkeypatch):
    """The command line, in the folder with the good model."""
    monkeypatch.chdir(shelf)
    return cli


def test_generate_continues_the_prompt_greedily(at_shelf, tokenizer):
    model = gpt2.GPT2.from_pretrained("good.pt")
    new = gpt2.generate(model, gpt2.text_to_token_ids("Once upon", tokenizer), 12, eos_id=50256)
    result = at_shelf("generate", "Once upon", "--model", "good.pt", "--max_tokens", 12)
    assert result.code == 0 and result.out == gpt2.token_ids_to_text(new, tokenizer) + "\n" and result.err == ""


def test_a_dash_reads_the_prompt_from_standard_input(at_shelf, monkeypatch):
    options = ["--model", "good.pt", "--max_tokens", 5]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Once\nupön".encode()), encoding="latin-1"))
    out = at_shelf("generate", "-", *options).out
    assert out == at_shelf("generate", "Once\nupön", *options).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Once\nupön\r\n".encode())))
    assert at_shelf("generate", "-", *options).out == out  # as echo sends it


def test_an_error_while_writing_stands_on_a_line_of_its_own(at_shelf):
    result = at_shelf("generate", "Once", "--model", "loud.pt")
    assert (result.code, result.out) == (2, "Once\n") and "NaN or infinite" in result.err


def test_output_may_go_to_a_stream_of_a_notebook(at_shelf, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert gpt2.main(["generate", "Once", "--model", "good.pt", "--max_tokens", "1"]) == 0
    assert sys.stdout.getvalue().startswith("Once")


def test_eval_says_how_many_examples_are_cut(at_shelf):
    row = json.dumps({"prompt": "a b c", "completion": " d e f g h i j k"})
    Path("long.jsonl").write_text(row + "\n" + row.replace(" b c", ""), encoding="utf-8")
    error = at_shelf("eval", "--model", "good.pt", "--data", "long.jsonl").err
    assert "2 examples are longer than the context" in error
    Path("long.jsonl").unlink()


def test_a_sample_without_a_prompt_is_text_only():
    model = lively(TRAINABLE)
    assert not gpt2.sample_text(model, "").startswith("<|endoftext|>")


def test_an_empty_prompt_starts_a_text(at_shelf, tokenizer):
    new = gpt2.generate(gpt2.GPT2.from_pretrained("good.pt"), torch.tensor([[50256]]), 5, eos_id=50256)
    result = at_shelf("generate", "", "--model", "good.pt", "--max_tokens", 5)
    assert result.out == gpt2.token_ids_to_text(new[:, 1:], tokenizer) + "\n"


def test_of_several_samples_the_first_is_that_of_one(at_shelf):
    options = ["generate", "Once", "--model", "good.pt", "--max_tokens", 9, "--do_sample"]
    one, again, three = at_shelf(*options), at_shelf(*options), at_shelf(*options, "--num_samples", 3)
    parts = re.split(r"^--- sample (\d) of 3 ---\n", three.out, flags=re.MULTILINE)
    assert parts[:2] == ["", "1"] and parts[3::2] == ["2", "3"]
    assert parts[2] == one.out == again.out and len({*parts[2::2]}) == 3
    assert at_shelf(*options, "--seed", 43).out == parts[4]


@pytest.mark.parametrize("option", [["--temperature", 1.0], ["--top_k", 60_000], ["--top_p", 1.0]])
def test_a_sampling_option_implies_sampling(at_shelf, option):
    start = ["generate", "Once", "--model", "good.pt", "--max_tokens", 9]
    assert at_shelf(*start, *option).out == at_shelf(*start, "--do_sample").out != at_shelf(*start).out
    assert at_shelf(*start, "--temperature", 0).out == at_shelf(*start).out


def test_a_prompt_longer_than_the_context_is_noted(at_shelf):
    result = at_shelf(
        "generate", "one two three four five six seven eight nine", "--model", "good.pt", "--max_tokens", 1
    )
    assert result.code == 0 and re.search(r"prompt has 9 tokens.* last 8", result.err)


def test_a_closed_pipe_ends_quietly(shelf):
    with start("generate", "Once", "--model", shelf / "good.pt", "--max_tokens", 100_000) as process:
        assert process.stdout.read(1) == "O"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(timeout=60) == 141


def test_training_ends_when_nobody_reads_its_notes(long_config, tmp_path):
    with start("train", *words(long_config), "--out", tmp_path / "run") as process:
        assert process.stderr.read(1) == "d"
        process.stderr.close()
        assert process.stdout.read() == "" and process.wait(timeout=60) == 141


def test_an_exported_folder_generates_the_same_text(at_shelf, tmp_path):
    assert at_shelf("export", tmp_path / "folder", "--model", "good.pt").code == 0
    options = ["generate", "Once", "--max_tokens", 20, "--temperature", 1.3, "--model"]
    assert at_shelf(*options, tmp_path / "folder").out == at_shelf(*options, "good.pt").out


def test_eval_of_a_text_reports_loss_perplexity_bits_and_tokens(at_shelf, text, tokenizer):
    ids = tokenizer.encode(VERDICT[:1500])
    model = gpt2.GPT2.from_pretrained("good.pt")
    for stride in (4, 8):
        loss = gpt2.evaluate(model, gpt2.GPTDataset(ids, 8), stride=stride)
        expected = {"loss": loss, "perplexity": math.exp(loss), "tokens": len(ids) - 1}
        n_bytes = len(VERDICT[:1500].encode()) - len(tokenizer.decode_single_token_bytes(ids[0]))
        expected["bits_per_byte"] = loss * (len(ids) - 1) / math.log(2) / n_bytes
        options = ["--stride", stride] if stride != 4 else []  # half the context if not given
        result = at_shelf("eval", "--model", "good.pt", "--data", text, "--json", *options)
        assert json.loads(result.out) == pytest.approx(expected, rel=1e-6)
    table = at_shelf("eval", "--model", "good.pt", "--data", text, "--stride", 8).out
    assert re.search(rf"^loss +{loss:.4f}\b", table) and re.search(rf"^tokens +{len(ids) - 1}\b", table, re.MULTILINE)


def test_eval_of_fine_tuning_data_reports_accuracy_and_a_table(at_shelf, tmp_path, tokenizer):
    data = [(f"Text {i}:", [" spam", " ham", " maybe so"][i % 3]) for i in range(12)]
    path = write_lines(tmp_path / "a.jsonl", *[{"prompt": p, "completion": c} for p, c in data])
    model, counts = gpt2.GPT2.from_pretrained("good.pt"), {}
    for prompt, truth in data:  # written out: the completion, and its end, that is most probable after the prompt
        scores = {}
        for label in (" ham", " maybe so", " spam"):
            ids = tokenizer.encode(prompt) + tokenizer.encode(label) + [50256]
            begin = len(tokenizer.encode(prompt))
            log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], dim=-1)
            scores[label] = sum(float(log_p[t - 1, ids[t]].detach()) for t in range(begin, len(ids)))
        predicted = max(scores, key=scores.get)
        counts[truth, predicted] = counts.get((truth, predicted), 0) + 1
    accuracy = sum(count for (truth, predicted), count in counts.items() if truth == predicted) / 12
    report = json.loads(at_shelf("eval", "--model", "good.pt", "--data", path, "--json").out)
    assert report["accuracy"] == pytest.approx(accuracy)
    assert report["loss"] == pytest.approx(gpt2.evaluate(model, completions(data, 8)), rel=1e-6)
    assert report["tokens"] == 4 * 2 + 4 * 2 + 4 * 3
    *_, title, heads, one, two, three = at_shelf("eval", "--model", "good.pt", "--data", path).out.splitlines()
    assert title == "rows: true, columns: predicted"
    assert re.findall(r"'[^']*'", heads) == ["' ham'", "' maybe so'", "' spam'"]
    for row, truth in zip((one, two, three), (" ham", " maybe so", " spam")):
        expected = [counts.get((truth, label), 0) for label in (" ham", " maybe so", " spam")]
        assert row.startswith(repr(truth)) and list(map(int, row.split()[-3:])) == expected


def test_fine_tuning_learns_to_classify(at_shelf, tmp_path):
    data = [
        {"prompt": f"{'win money' if i % 2 else 'see you'} {i}", "completion": " spam" if i % 2 else " ham"}
        for i in range(16)
    ]
    path = write_lines(tmp_path / "a.jsonl", *data)
    options = {"data": path, "epochs": 25, "learning_rate": 0.01, "warmup_steps": 2, "val_fraction": 0.0, "emb_dim": 32}
    assert at_shelf("train", *words({**TRAINABLE, **options}), "--out", tmp_path / "out").code == 0
    report = json.loads(at_shelf("eval", "--model", tmp_path / "out/last.pt", "--data", path, "--json").out)
    assert report["accuracy"] == 1.0 and report["loss"] < 0.3


def test_without_a_checkpoint_the_two_ways_to_one_are_named(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = cli("generate").err
    assert "python gpt2.py train" in error and "--model gpt2" in error


# --- 10. notebook and tree ----------------------------------------------------------------------------------

NOTEBOOK = HERE / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def test_the_notebook_is_nbformat_4_5_and_was_run_from_top_to_bottom(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) > 10


def test_the_notebook_ran_without_errors_or_warnings(notebook):
    assert outputs(notebook)
    assert not [o for o in outputs(notebook) if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_the_notebook_has_readable_ids_of_its_own(notebook):
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{2,63}", i) and not re.fullmatch(r"[0-9a-f-]{8,}", i) for i in ids)


def test_the_notebook_is_small_and_needs_nothing_from_elsewhere(notebook):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|Users|usr|opt)/", text), "an absolute path"
    assert not re.search(r"!\[[^]]*\]\(\s*https?:|<img[^>]*src=.{0,2}https?:", text), "a picture from elsewhere"


def test_the_notebook_runs(tmp_path):
    assert NOTEBOOK.is_file()
    folder = shutil.copytree(HERE, tmp_path / "copy", ignore=shutil.ignore_patterns(".git", "checkpoints", ".venv"))
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "walkthrough.ipynb"]
    command += ["--output-dir", str(tmp_path), "--output", "executed.ipynb"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    assert not [o for o in outputs(executed) if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_requirements_are_pinned():
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+", package) for package in packages)
    assert [package.partition("==")[0] for package in packages] == [
        "torch",
        "tiktoken",
        "matplotlib",
        "jupyter",
        "pytest",
    ]


def test_the_readme_names_the_test_command_and_its_links_exist():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert "python -m pytest -q" in text
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        assert target.startswith("http") or (HERE / target).exists(), target


def test_the_vocabulary_files_are_those_that_tiktoken_expects():
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (HERE / ".tiktoken").iterdir()}
    bpe = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    encoder = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert hashes == {bpe, encoder}
    names = {path.name for path in (HERE / ".tiktoken").iterdir()}
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    assert names == {hashlib.sha1((address + name).encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")}


def test_the_program_imports_the_standard_library_torch_tiktoken_and_matplotlib_only():
    modules = set()
    for node in ast.walk(ast.parse((HERE / "gpt2.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"torch", "tiktoken", "matplotlib"}
