"""Visual question answering: a Transformer encoder per modality, attention both ways between."""

from typing import Any

import torch
from torch import Tensor, nn

import fastfusion.nn as ffnn
from fastfusion.models.parts import TwoEncoders, check_sizes, mean


class VQATransformer(TwoEncoders):
    """Answer a question about an image, both given as features.

    A Transformer encoder per modality, one :class:`fastfusion.nn.CrossModalAttention` layer (text
    attends to the image and the image to the text, from one score matrix), the mean of each
    modality over the tokens that are not padding, and a linear layer on their concatenation
    (``visual_dim + text_dim``).

    The encoders do not see each other, so several questions about one image can share its encoding:
    ``model.fuse(model.encode_visual(image)[image_index], model.encode_text(text)[text_index])``.
    :func:`fastfusion.attention_maps` reads the weights of every layer: ``"fusion"`` in both
    directions, ``"text_encoder.layers.0.self_attn"`` and so on.

    Args:
        visual_dim, text_dim: feature width of each modality, each a multiple of ``num_heads``.
        num_heads: attention heads of every layer.
        dim_feedforward: hidden width of every feed-forward part.
        num_layers: encoder layers per modality.
        num_classes: number of answers.
        dropout: probability of dropout, everywhere and in training only.
        activation, layer_norm_eps, norm_first, bias: as in ``torch.nn.TransformerEncoderLayer``.

    Raises:
        ValueError: a width or count below 1, a width that ``num_heads`` does not divide,
            ``dropout`` outside [0, 1], an unknown ``activation``.
        TypeError: a width or count that is not an int.

    The two-stream layout follows LXMERT (Tan and Bansal, 2019, https://arxiv.org/abs/1908.07490);
    attention in both directions from one score matrix is that of GLIP (Li et al., 2022,
    https://arxiv.org/abs/2112.03857).
    """

    def __init__(
        self,
        visual_dim: int,
        text_dim: int,
        num_heads: int,
        dim_feedforward: int,
        num_layers: int,
        num_classes: int,
        *,
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
            dim_feedforward=dim_feedforward, num_layers=num_layers, num_classes=num_classes,
        )  # fmt: skip
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
        self.fusion = ffnn.CrossModalAttention(
            visual_dim, text_dim, num_heads, dim_feedforward=dim_feedforward, **shared
        )
        self.output = nn.Linear(visual_dim + text_dim, num_classes, device=device, dtype=dtype)

    def fuse(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The part of :meth:`forward` after the encoders; same arguments, encoded."""
        # The fusion layer checks the arguments.
        visual, text, *weights = self.fusion(
            visual, text, visual_padding_mask, text_padding_mask, need_weights
        )
        pooled = (mean(visual, visual_padding_mask), mean(text, text_padding_mask))
        logits = self.output(torch.cat(pooled, dim=-1))
        return (logits, weights[1]) if need_weights else logits

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        visual_padding_mask: Tensor | None = None,
        text_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Score every answer.

        Args:
            visual: floating (B, Lv, visual_dim).
            text: the same dtype, (B, Lt, text_dim).
            visual_padding_mask, text_padding_mask: bool, broadcastable to (B, Lv) and (B, Lt),
                True = ignore the token.
            need_weights: also return the attention of the text over the image, the second of the
                maps that ``fastfusion.attention_maps(model, "fusion")`` reads.

        Returns:
            Logits (B, num_classes); with ``need_weights`` the pair of them and the weights (B, Lt,
            Lv), averaged over heads.

        Raises:
            ValueError: a wrong rank, width or batch size, or a mask that does not fit.
            TypeError: different dtypes, or a mask that is not bool.
        """
        self.check_pair(visual, text, self.output)
        return self.fuse(
            self.encode_visual(visual, visual_padding_mask),
            self.encode_text(text, text_padding_mask),
            visual_padding_mask,
            text_padding_mask,
            need_weights,
        )
