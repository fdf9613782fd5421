"""Retrieval across modalities: an encoder for each, and a re-ranker that sees both at once."""

from typing import Any

import torch
from torch import Tensor, nn

import fastfusion.nn as ffnn
from fastfusion.models.parts import TwoEncoders, check_sizes, mean
from fastfusion.nn._checks import check_counts


class RetrievalTransformer(TwoEncoders):
    """Find the picture of a text, or the text of a picture, both given as features.

    A Transformer encoder per modality; the mean over the tokens that are not padding, or all tokens
    of a picture side by side (``visual_len``), projected and of unit length, is what a whole
    collection is searched by, with one product (:meth:`embed_visual`, :meth:`embed_text`). For the
    few that such a search finds, :meth:`match` looks at both sequences at once: a
    :class:`fastfusion.nn.CrossModalAttention` layer between their encodings, and a linear layer on
    both means. :meth:`forward` is the score that pairs are ranked by in the end, the sum of both.

    Args:
        visual_dim, text_dim: feature width of each modality, each a multiple of ``num_heads``.
        num_heads: attention heads of every layer.
        dim_feedforward: hidden width of every feed-forward part.
        num_layers: encoder layers per modality.
        embedding_dim: width of the vectors that are searched.
        visual_len: how many tokens every picture has. Its vector then knows where in the picture
            something is from the start, which a mean has to learn.
        dropout: probability of dropout, everywhere and in training only.
        activation, layer_norm_eps, norm_first, bias: as in ``torch.nn.TransformerEncoderLayer``.

    Raises:
        ValueError: a width or count below 1, a width that ``num_heads`` does not divide,
            ``dropout`` outside [0, 1], an unknown ``activation``.
        TypeError: a width or count that is not an int.

    Two encoders and a learned temperature as in CLIP (Radford et al., 2021,
    https://arxiv.org/abs/2103.00020), fusion after alignment, for the pairs that are hard, as in
    ALBEF (Li et al., 2021, https://arxiv.org/abs/2107.07651).
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        embedding_dim: int,
        *,
        visual_len: int | None = None,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(
            num_heads, dropout, activation, visual_dim=visual_dim, text_dim=text_dim,
            dim_feedforward=dim_feedforward, num_layers=num_layers,
        )  # fmt: skip
        check_counts(
            embedding_dim=embedding_dim, visual_len=1 if visual_len is None else visual_len
        )
        shared: dict[str, Any] = {
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "norm_first": norm_first,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        super().__init__(visual_dim, text_dim, num_heads, dim_feedforward, num_layers, **shared)
        self.visual_len = visual_len
        pooled = visual_dim * (visual_len or 1)
        self.visual_projection = nn.Linear(pooled, embedding_dim, device=device, dtype=dtype)
        self.text_projection = nn.Linear(text_dim, embedding_dim, device=device, dtype=dtype)
        # CLIP's start; what grows is the logarithm, so that the factor stays positive.
        self.log_scale = nn.Parameter(torch.full((), 2.659, device=device, dtype=dtype))
        self.fusion = ffnn.CrossModalAttention(
            visual_dim, text_dim, num_heads, dim_feedforward=dim_feedforward, **shared
        )
        self.output = nn.Linear(visual_dim + text_dim, 1, device=device, dtype=dtype)

    def embed_visual(self, visual: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Vectors (B, embedding_dim) of unit length, of encoded pictures.

        Raises:
            ValueError: pictures of another number of tokens than `visual_len`.
        """
        if self.visual_len is None:
            pooled = mean(visual, padding_mask)
        elif visual.shape[1] != self.visual_len:
            raise ValueError(f"visual must have {self.visual_len} tokens, got {visual.shape[1]}")
        else:
            if padding_mask is not None:
                hidden = padding_mask.expand(visual.shape[:2]).unsqueeze(-1)
                visual = visual.masked_fill(hidden, 0.0)
            pooled = visual.flatten(1)
        return nn.functional.normalize(self.visual_projection(pooled), dim=-1)

    def embed_text(self, text: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Vectors (B, embedding_dim) of unit length, of encoded texts."""
        return nn.functional.normalize(self.text_projection(mean(text, padding_mask)), dim=-1)

    def scale(self) -> Tensor:
        """What cosines are multiplied by, at most 100."""
        return self.log_scale.exp().clamp(max=100.0)

    def similarity(self, visual: Tensor, text: Tensor) -> Tensor:
        """Scores (Bv, Bt) of every picture with every text, of their vectors."""
        return self.scale() * visual @ text.T

    def match(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """What looking at both adds to the score of each pair (B,); arguments as in
        :meth:`forward`, encoded."""
        # The fusion layer checks the arguments.
        visual, text = self.fusion(visual, text, visual_padding_mask, text_padding_mask)
        pooled = (mean(visual, visual_padding_mask), mean(text, text_padding_mask))
        return self.output(torch.cat(pooled, dim=-1)).squeeze(-1)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Score pairs: picture n with text n.

        Args:
            visual: floating (B, Lv, visual_dim).
            text: the same dtype, (B, Lt, text_dim).
            visual_padding_mask, text_padding_mask: bool, broadcastable to (B, Lv) and (B, Lt),
                True = ignore the token.

        Returns:
            Scores (B,), the greater the better the pair.

        Raises:
            ValueError: a wrong rank, width or batch size, or a mask that does not fit.
            TypeError: different dtypes, or a mask that is not bool.
        """
        self.check_pair(visual, text, self.output)
        visual = self.encode_visual(visual, visual_padding_mask)
        text = self.encode_text(text, text_padding_mask)
        vectors = (
            self.embed_visual(visual, visual_padding_mask),
            self.embed_text(text, text_padding_mask),
        )
        cosine = (vectors[0] * vectors[1]).sum(dim=-1)
        return self.scale() * cosine + self.match(
            visual, text, visual_padding_mask, text_padding_mask
        )
