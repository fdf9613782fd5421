"""Models of transformers, small enough to be made for every test, and how two of them compare."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from checkout import need_library
from torch import Tensor, nn

import fastfusion as ff  # noqa: F401  (registers the name)

tr: Any = need_library("transformers")

WIDTH = 64
TEXT = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    vocab_size=99, max_position_embeddings=64,
)  # fmt: skip
IMAGE = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=32, patch_size=8,
)  # fmt: skip
SEQ2SEQ = dict(
    d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip
# Generation goes on to the last token, so that there is something to compare.
ENDLESS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1)
WHISPER = dict(
    **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=30,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
AUDIO = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, vocab_size=32,
)  # fmt: skip
RESNET = dict(
    embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
)

IDS = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
LEFT = RIGHT.flip(1)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(2, 1200, generator=torch.Generator().manual_seed(2))
MEL = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))

Inputs = Mapping[str, Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that wait for one another take four times as long for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(model_class: Any, config: Any, attention: str = "eager", seed: int = 0) -> Any:
    """A model in evaluation, with weights that make its layers differ."""
    torch.manual_seed(seed)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def twin(model: nn.Module, attention: str) -> Any:
    """The same weights, with another attention."""
    other = copy.deepcopy(model)
    for part in other.modules():
        if isinstance(part, tr.PreTrainedModel):
            part.config._attn_implementation = attention
    return other


def last(output: Any) -> Tensor:
    return output.last_hidden_state


def run(model: nn.Module, inputs: Inputs, pick: Callable[[Any], Tensor] = last) -> Tensor:
    torch.manual_seed(0)  # ViLT draws patches
    with torch.no_grad():
        return pick(model(**inputs))


def double(inputs: Inputs) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def assert_same(
    model: nn.Module,
    other: nn.Module,
    inputs: Inputs,
    pick: Callable[[Any], Tensor] = last,
    tokens: Tensor | None = None,
) -> None:
    """`other` is as near to the model in float64 as the model itself, by the accuracy rule; of what
    is padding nothing is said. (By torch's attention: eager code often takes its softmax in float32
    even so.)

    Args:
        tokens: bool, which rows of the output count.
    """
    exact = run(twin(model, "sdpa").double(), double(inputs), pick)
    plain, actual = run(model, inputs, pick), run(other, inputs, pick)
    keep = torch.ones(exact.shape[:-1], dtype=torch.bool) if tokens is None else tokens.bool()
    assert_accurate(actual[keep], exact[keep], plain[keep])


class Lora(nn.Module):
    """A low-rank adapter in the place of a linear layer, as peft puts it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))
