"""`import fastfusion.nn as nn` in place of `import torch.nn as nn`: the only line that changes."""

import importlib
import inspect
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from nn_cases import assert_same

import fastfusion as ff

OURS = {
    "CrossAttention",
    "CrossModalAttention",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
}
DROP_INS = sorted(OURS - {"CrossAttention", "CrossModalAttention"})


def test_every_other_name_is_torchs() -> None:
    for name in dir(torch.nn):
        if name.startswith("__"):
            continue
        same = getattr(ff.nn, name) is getattr(torch.nn, name)
        assert same != (name in OURS), name
    assert set(dir(torch.nn)) | OURS <= set(dir(ff.nn))
    namespace: dict[str, Any] = {}
    exec("from fastfusion.nn import *", namespace)
    assert namespace["Linear"] is torch.nn.Linear
    assert namespace["MultiheadAttention"] is ff.nn.MultiheadAttention
    assert namespace["CrossAttention"] is ff.nn.CrossAttention


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match=r"module 'fastfusion.nn' has no attribute 'Nonsense'"):
        ff.nn.Nonsense  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"fastfusion.nn.nonsense"):
        importlib.import_module("fastfusion.nn.nonsense")


def test_a_name_added_to_torch_later_is_seen() -> None:
    torch.nn.SomethingNew = 1  # type: ignore[attr-defined]
    try:
        assert ff.nn.SomethingNew == 1
    finally:
        del torch.nn.SomethingNew  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    ["functional", "init", "utils", "utils.rnn", "parallel", "modules", "modules.linear",
     "attention", "attention.bias", "parameter"],
)  # fmt: skip
def test_submodules_are_torchs(name: str) -> None:
    theirs = importlib.import_module("torch.nn." + name)
    spec = theirs.__spec__
    ours = importlib.import_module("fastfusion.nn." + name)
    assert ours is theirs
    assert theirs.__spec__ is spec and theirs.__name__ == "torch.nn." + name


def test_a_submodule_that_torch_has_not_loaded() -> None:
    """In a fresh process, where the usual finder would load a second copy of it."""
    script = (
        "import fastfusion.nn.attention.flex_attention as a, fastfusion.nn.functional as F\n"
        "import torch.nn.attention.flex_attention as b, torch\n"
        "assert a is b and a.__name__ == 'torch.nn.attention.flex_attention'\n"
        "assert F is torch.nn.functional\n"
        "from fastfusion.nn.utils.rnn import pad_sequence\n"
        "assert pad_sequence is torch.nn.utils.rnn.pad_sequence\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# What torch's have not: by name only.
MORE = {
    ("TransformerDecoder", "forward"): [("cache", None)],
    ("MultiheadAttention", "forward"): [
        ("window", None), ("softcap", None), ("alibi_slopes", None),
        ("segment_ids_q", None), ("segment_ids_k", None), ("prefix_len", None),
        ("sinks", None), ("position_table", None), ("position_index", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DROP_INS)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_torchs(method: str, name: str) -> None:
    ours, theirs = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(getattr(nn, name), method)).parameters.values()
        ]
        for nn in (ff.nn, torch.nn)
    )
    more = ours[len(theirs) :]
    assert ours[: len(theirs)] == theirs
    assert [(key, default) for key, _, default in more] == MORE.get((name, method), [])
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in more)


# A script as users write them; only its first line changes.
SCRIPT = '''
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_


class PositionalEncoding(nn.Module):
    def __init__(self, width: int, length: int = 32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x):
        return x + self.table[: x.size(1)]


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, padding_idx=0)
        self.position = PositionalEncoding(16)
        self.transformer = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, source, target):
        causal = nn.Transformer.generate_square_subsequent_mask(target.size(1))
        x = self.transformer(
            self.position(self.embedding(source)),
            self.position(self.embedding(target)),
            tgt_mask=causal,
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
            tgt_is_causal=True,
        )
        return self.head(x)


class Classifier(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 24, dropout=0.0, activation="gelu", norm_first=norm_first, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16))
        self.pool = nn.MultiheadAttention(16, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x, padding):
        x = self.encoder(x, src_key_padding_mask=padding)
        query = self.query.expand(x.size(0), -1, -1)
        pooled, weights = self.pool(query, x, x, key_padding_mask=padding)
        return self.head(pooled.squeeze(1)), weights


class Captioner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, 0.0), 2)

    def forward(self, target, memory):
        mask = torch.ones(len(target), len(target), dtype=torch.bool).triu(1)
        return self.decoder(target, memory, tgt_mask=mask)


def train(model, *inputs):
    """Three steps of SGD, then the outputs in eval mode.

    Adam would blow up rounding: the gradient of a key's bias is 0 but for the last bit.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        out = model(*inputs)
        loss = sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        out = model(*inputs)
    return losses, out, model.state_dict()


torch.manual_seed(0)
source = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0]])
target = torch.randint(1, 20, (2, 6))
features, padding = torch.randn(2, 5, 16), source == 0
results = [train(Translator(), source, target)]
results += [train(Classifier(norm_first), features, padding) for norm_first in (True, False)]
results += [train(Captioner(), torch.randn(4, 2, 16), torch.randn(7, 2, 16))]
'''


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_users_script() -> None:
    results = []
    for first_line in ("import torch.nn as nn", "import fastfusion.nn as nn"):
        script = types.ModuleType("script")
        exec(first_line + SCRIPT, script.__dict__)
        results.append(script.results)
    assert_same(results[1], results[0], "the script")


def test_importing_adds_nothing_heavy() -> None:
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastfusion.nn\n"
        "added = {m for m in sys.modules if m not in before}\n"
        "packages = {'triton', 'transformers', 'onnx', 'matplotlib', 'numpy', 'PIL'}\n"
        "print(*(m for m in added if m in packages or m.startswith('torch._dynamo')))"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""
