"""A plugin of pytest that runs xformers' own tests of attention on fastfusion's, on the CPU, where
xformers has no operator that they could test:

    cd CHECKOUT
    PYTHONPATH=$FASTFUSION/tests/integrations pytest -p xformers_own_tests \\
        tests/test_mem_eff_attention.py

CHECKOUT is xformers' repository at the tag of the installed version; its tests need scipy. Inputs
and tolerances are theirs, but that a batch is of 13 instead of 300.
"""

from typing import Any

import torch
from xformers import ops
from xformers.ops import fmha

from fastfusion.integrations import xformers as ours


class _OnTheCpu:
    """What an operator says of itself."""

    NAME = "fastfusion"
    OPERATOR = ours.memory_efficient_attention
    SUPPORTED_DEVICES = {"cpu"}
    SUPPORTED_DTYPES = {torch.float, torch.half, torch.bfloat16}
    SUPPORTED_MAX_K = 1024
    SUPPORTED_ATTN_BIAS_TYPES = [
        type(None),
        torch.Tensor,
        *(
            kind
            for kind in vars(fmha.attn_bias).values()
            if isinstance(kind, type)
            and issubclass(kind, fmha.attn_bias.AttentionBias)
            and kind is not fmha.attn_bias.AttentionBias
        ),
    ]
    SUPPORTS_DROPOUT = True
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_BMGHK = True
    SUPPORTS_ATTN_BIAS_GRAD = True
    _TEST_BATCH_SIZES = [1, 13]

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def not_supported_reasons(cls, inputs: Any) -> list[str]:
        reasons = super().not_supported_reasons(inputs)  # type: ignore[misc]
        return [reason for reason in reasons if "A100" not in reason]


class Forward(_OnTheCpu, fmha.AttentionFwOpBase):  # type: ignore[misc]
    pass


class Backward(_OnTheCpu, fmha.AttentionBwOpBase):  # type: ignore[misc]
    pass


fmha.ALL_FW_OPS[:] = [Forward]
fmha.ALL_BW_OPS[:] = [Backward]


def _without_op(function: Any) -> Any:
    def call(*args: Any, op: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


for _name in (
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
):
    for _module in (ops, fmha):
        setattr(_module, _name, _without_op(getattr(ours, _name)))
