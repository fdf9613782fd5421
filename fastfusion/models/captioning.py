"""Captions: a Transformer encoder over a picture, and a decoder that writes about it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastfusion.nn as ffnn
from fastfusion.models.parts import PADDING, TokenEmbedding, check_sizes, encoder
from fastfusion.nn._checks import check_counts, check_sequences

START, END = 2, 3  # numbers of the words around every caption


class CaptioningTransformer(nn.Module):
    """Write a text about an image that is given as features.

    A Transformer encoder over the image's tokens, a word embedding, a Transformer decoder (each
    word sees those before it and all of the image), and a linear layer over all words (Vaswani et
    al., "Attention Is All You Need", 2017; over images Cornia et al., "Meshed-Memory Transformer
    for Image Captioning", 2020, without its memory). Texts are word numbers: 0 is padding, 1 an
    unknown word, 2 the start and 3 the end.

    Args:
        width: feature width of image and words, a multiple of ``num_heads``.
        num_heads: attention heads of every layer.
        dim_feedforward: hidden width of every feed-forward part.
        num_encoder_layers, num_decoder_layers: layers over the image and over the words.
        words: how many word numbers there are.
        max_length: the most words of a text, its start counted.
        dropout: probability of dropout, everywhere and in training only.
        activation: ``"relu"``, ``"gelu"`` or a function of one tensor.

    Raises:
        ValueError: a width or count below 1, a width that ``num_heads`` does not divide,
            ``dropout`` outside [0, 1], an unknown ``activation``.
        TypeError: a width or count that is not an int.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dim_feedforward: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        words: int,
        max_length: int,
        *,
        dropout: float = 0.1,
        activation: Any = "relu",
    ) -> None:
        super().__init__()
        check_sizes(
            num_heads, dropout, activation, width=width, dim_feedforward=dim_feedforward,
            num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers,
            words=words, max_length=max_length,
        )  # fmt: skip
        self.width, self.max_length = width, max_length
        self.visual_encoder = encoder(
            width, num_heads, dim_feedforward, num_encoder_layers,
            dropout=dropout, activation=activation,
        )  # fmt: skip
        self.embedding = TokenEmbedding(words, width, max_length)
        layer = ffnn.TransformerDecoderLayer(
            width, num_heads, dim_feedforward, dropout, activation, batch_first=True
        )
        self.decoder = ffnn.TransformerDecoder(layer, num_decoder_layers)
        self.output = nn.Linear(width, words)

    def encode(self, visual: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Encode images (B, Lv, width), in and out; the mask is that of :meth:`forward`."""
        if not torch.compiler.is_compiling():
            check_sequences({"visual": visual}, (self.width,), (self.output,))
        return self.visual_encoder(visual, src_key_padding_mask=padding_mask)

    def forward(
        self, visual: Tensor, text: Tensor, visual_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Score every word as the one behind each word of a text.

        Args:
            visual: floating (B, Lv, width).
            text: int64 (B, L), word numbers from the start on; padding only behind the end.
            visual_padding_mask: bool (B, Lv), True = ignore the token.

        Returns:
            Logits (B, L, words). What stands at padding means nothing.

        Raises:
            ValueError: a wrong rank, width or batch size, a text that is too long.
            TypeError: a text that is not int64, a mask that is not bool.
        """
        if not torch.compiler.is_compiling():
            _check_text(text, visual)
        memory = self.encode(visual, visual_padding_mask)
        return self.decode(memory, text, visual_padding_mask)

    def decode(
        self, memory: Tensor, text: Tensor, memory_padding_mask: Tensor | None = None
    ) -> Tensor:
        """The part of :meth:`forward` behind the encoder."""
        embedded = self.embedding.embed(text)
        # Nothing before its end is padding, so the causal mask hides all that a word may not see.
        mask = nn.Transformer.generate_square_subsequent_mask(
            text.shape[1], device=embedded.device, dtype=embedded.dtype
        )
        hidden = self.decoder(
            embedded,
            memory,
            tgt_mask=mask,
            memory_key_padding_mask=memory_padding_mask,
            tgt_is_causal=True,
        )
        return self.output(hidden)

    @torch.no_grad()
    def generate(
        self,
        visual: Tensor,
        visual_padding_mask: Tensor | None = None,
        *,
        max_length: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> Tensor:
        """Write a text about each image, the most probable word at a time or by beam search.

        A beam search keeps the ``num_beams`` most probable beginnings; those that have ended stay
        among them. Of the last ones it returns that with the greatest log-probability over its
        number of words (its end counted, its start not) to the power ``length_penalty``.

        Args:
            visual, visual_padding_mask: as of :meth:`forward`.
            max_length: the most words behind the start, by default as many as the model can.
            num_beams: 1 takes the most probable word at a time.
            length_penalty: 0 compares probabilities, 1 their mean per word.
            use_cache: keep keys and values of the words so far; otherwise all are computed anew for
                each word.

        Returns:
            int64 (B, L): the start, words, the end unless ``max_length`` came first, padding.

        Raises:
            ValueError: arguments out of range, or those of :meth:`forward`; with a cache in
                training, where parts drop out.
        """
        limit = self.max_length - 1 if max_length is None else max_length
        if not 1 <= limit < self.max_length:
            raise ValueError(f"max_length must be from 1 to {self.max_length - 1}, got {limit}")
        check_counts(num_beams=num_beams)
        memory = self.encode(visual, visual_padding_mask).repeat_interleave(num_beams, 0)
        if visual_padding_mask is not None:
            visual_padding_mask = visual_padding_mask.repeat_interleave(num_beams, 0)
        cache: Any = None
        if use_cache:
            cache = self.decoder.new_cache(memory, limit, visual_padding_mask)

        batch, device = visual.shape[0], visual.device
        text = torch.full((batch * num_beams, 1), START, device=device)
        # All beams begin alike: only the first counts until they differ.
        score = torch.full((batch, num_beams), -torch.inf, device=device)
        score[:, 0] = 0.0
        first = torch.arange(batch, device=device).unsqueeze(1) * num_beams
        for _ in range(limit):
            if cache is None:
                logits = self.decode(memory, text, visual_padding_mask)[:, -1]
            else:
                embedded = self.embedding.embed(text[:, -1:], text.shape[1] - 1)
                logits = self.output(self.decoder(embedded, None, cache=cache))[:, 0]
            rows = functional.log_softmax(logits.float(), dim=-1)
            ended = ((text[:, -1] == END) | (text[:, -1] == PADDING)).unsqueeze(1)
            rows = rows.masked_fill(ended, -torch.inf)
            rows[:, PADDING] = torch.where(ended[:, 0], 0.0, -torch.inf)
            total = score.unsqueeze(2) + rows.view(batch, num_beams, -1)
            score, place = total.flatten(1).topk(num_beams, dim=1)
            beam = (first + place // rows.shape[1]).flatten()
            text = torch.cat([text[beam], (place % rows.shape[1]).view(-1, 1)], dim=1)
            if bool(((text[:, -1] == END) | (text[:, -1] == PADDING)).all()):
                break
            if cache is not None and num_beams > 1:
                cache.reorder(beam)
        length = (text != PADDING).sum(dim=1).view(batch, num_beams) - 1
        best = (score / length.to(score.dtype) ** length_penalty).argmax(dim=1, keepdim=True)
        text = text[(first + best).flatten()]
        return text[:, : int((text != PADDING).sum(dim=1).max())]


def _check_text(text: Tensor, visual: Tensor) -> None:
    if text.dtype != torch.int64:
        raise TypeError(f"text must be int64, got {text.dtype}")
    if text.dim() != 2 or text.shape[0] != visual.shape[0]:
        raise ValueError(
            f"text must have shape ({visual.shape[0]}, length), the batch of visual "
            f"{tuple(visual.shape)}, got {tuple(text.shape)}"
        )
