#!/usr/bin/env bash
# xformers 0.0.35: PagedBlockDiagonalGappyKeysMask.from_seqlens, and that of its causal subclass, raise for every
# input. The method asks for as many kv_seqstarts as kv_seqlen ("kv_seqstarts = [1, 1]" for two batch elements in its
# docstring) and hands them to _GappySeqInfo.from_seqlens_gappy, which asks for one more start than lengths, also for
# paged masks, to which it would append that one itself further down. Such masks come from make_paged alone.
# Seen: ValueError "len(seqstarts)=[1, 1] should be len(seqlens)=[2, 3]"; with a start more, AssertionError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/pip" install --quiet --no-deps xformers==0.0.35
"$folder/env/bin/python" - <<'PYTHON'
import torch
from xformers.ops.fmha.attn_bias import (
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalGappyKeysMask,
)

pages = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
for kind in (PagedBlockDiagonalGappyKeysMask, PagedBlockDiagonalCausalWithOffsetGappyKeysMask):
    for starts, expected in (([1, 1], ValueError), ([1, 1, 8], AssertionError)):
        try:
            kind.from_seqlens([1, 2], starts, [2, 3], pages, 4)
        except (ValueError, AssertionError) as error:
            print(kind.__name__, starts, type(error).__name__, error)
            assert type(error) is expected, error
        else:
            raise SystemExit(f"{kind.__name__} was made of {starts}")
PYTHON
