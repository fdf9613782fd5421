"""Models of transformers with random weights, from their configurations: as their authors publish
them ("base"), or small ones of the same structure for tests ("tiny")."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
Built = tuple[nn.Module, Inputs]
_Maker = Callable[[bool, int], Built]

MAKERS: dict[str, _Maker] = {}


def build(name: str, tiny: bool = False, batch: int = 1) -> Built:
    """A model in eval mode, the same one each time, and keyword arguments of a call. Of a batch,
    the last entry has padding."""
    torch.manual_seed(0)
    model, inputs = MAKERS[name](tiny, batch)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms do something
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), inputs


def _maker(name: str) -> Callable[[_Maker], _Maker]:
    def keep(make: _Maker) -> _Maker:
        MAKERS[name] = make
        return make

    return keep


def _sizes(tiny: bool, layers: int = 2, **base: Any) -> dict[str, Any]:
    """Of a configuration: nothing but what differs from its defaults, or a small model."""
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    return {**small, "num_hidden_layers": layers} if tiny else base


def _words(batch: int, length: int, tiny: bool) -> Tensor:
    return torch.randint(200, 300 if tiny else 20000, (batch, length))


def _mask(batch: int, length: int) -> Tensor:
    """1 for a token; the last entry of several is a third shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[-1, length - length // 3 :] = 0
    return mask


def _text(batch: int, length: int, tiny: bool) -> Inputs:
    return {"input_ids": _words(batch, length, tiny), "attention_mask": _mask(batch, length)}


def _vocabulary(tiny: bool) -> dict[str, Any]:
    return {"vocab_size": 300} if tiny else {}


def _image(tiny: bool) -> dict[str, Any]:
    return {"image_size": 32, "patch_size": 8} if tiny else {}


@_maker("LXMERT")
def _lxmert(tiny: bool, batch: int) -> Built:
    from transformers import LxmertConfig, LxmertModel

    sizes = _sizes(tiny)
    if tiny:
        del sizes["num_hidden_layers"]
        sizes |= {"l_layers": 2, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 24}
    config = LxmertConfig(**sizes, **_vocabulary(tiny))
    words, boxes = (7, 5) if tiny else (20, 36)
    return LxmertModel(config), {
        **_text(batch, words, tiny),
        "visual_feats": torch.randn(batch, boxes, config.visual_feat_dim),
        "visual_pos": torch.rand(batch, boxes, 4),
        "visual_attention_mask": _mask(batch, boxes),
        "token_type_ids": torch.zeros(batch, words, dtype=torch.long),
    }


@_maker("ViLT")
def _vilt(tiny: bool, batch: int) -> Built:
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(**_sizes(tiny), **_vocabulary(tiny), **_image(tiny))
    size = config.image_size
    return ViltModel(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "pixel_values": torch.randn(batch, 3, size, size),
        "pixel_mask": torch.ones(batch, size, size, dtype=torch.long),
    }


@_maker("VisualBERT")
def _visual_bert(tiny: bool, batch: int) -> Built:
    from transformers import VisualBertConfig, VisualBertModel

    width = 24 if tiny else 2048
    config = VisualBertConfig(**_sizes(tiny), **_vocabulary(tiny), visual_embedding_dim=width)
    boxes = 5 if tiny else 36
    return VisualBertModel(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "visual_embeds": torch.randn(batch, boxes, width),
        "visual_attention_mask": _mask(batch, boxes),
    }


@_maker("FLAVA")
def _flava(tiny: bool, batch: int) -> Built:
    from transformers import FlavaConfig, FlavaModel

    sizes = _sizes(tiny)
    more = {"hidden_size": 32, "projection_dim": 16} if tiny else {}
    config = FlavaConfig(
        text_config={**sizes, **_vocabulary(tiny)},
        image_config={**sizes, **_image(tiny)},
        multimodal_config=sizes,
        **more,
    )
    size = config.image_config.image_size
    return FlavaModel(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "pixel_values": torch.randn(batch, 3, size, size),
    }


def _blip_config(tiny: bool) -> Any:
    from transformers import BlipConfig

    sizes = _sizes(tiny)
    special = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    text = {**sizes, **_vocabulary(tiny)}
    if tiny:
        text |= {"encoder_hidden_size": 32, "max_position_embeddings": 40, **special}
    image = {**sizes, **_image(tiny)}
    return BlipConfig(text_config=text, vision_config=image, projection_dim=16 if tiny else 512)


@_maker("BLIP text decoder")
def _blip_text(tiny: bool, batch: int) -> Built:
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    config = _blip_config(tiny).text_config
    config.is_decoder = True
    patches = 17 if tiny else 577
    return BlipTextLMHeadModel(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "encoder_hidden_states": torch.randn(batch, patches, config.encoder_hidden_size),
        "encoder_attention_mask": torch.ones(batch, patches, dtype=torch.long),
        "use_cache": False,
    }


@_maker("BLIP captioning")
def _blip(tiny: bool, batch: int) -> Built:
    from transformers import BlipForConditionalGeneration

    config = _blip_config(tiny)
    size = config.vision_config.image_size
    return BlipForConditionalGeneration(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "pixel_values": torch.randn(batch, 3, size, size),
    }


@_maker("BridgeTower")
def _bridgetower(tiny: bool, batch: int) -> Built:
    from transformers import BridgeTowerConfig, BridgeTowerModel

    sizes = _sizes(tiny)
    if tiny:  # heads of the image encoder are 64 wide
        sizes |= {"hidden_size": 64, "intermediate_size": 128}
    towers = sizes | ({"num_hidden_layers": 3} if tiny else {})
    image = {k: v for k, v in towers.items() if k in ("hidden_size", "num_hidden_layers")}
    config = BridgeTowerConfig(
        **sizes,
        text_config={**towers, **_vocabulary(tiny)},
        vision_config={**image, **_image(tiny)},
    )
    size = config.vision_config.image_size
    return BridgeTowerModel(config), {
        **_text(batch, 6 if tiny else 20, tiny),
        "pixel_values": torch.randn(batch, 3, size, size),
        "pixel_mask": torch.ones(batch, size, size, dtype=torch.long),
    }


@_maker("BLIP-2 Q-Former")
def _qformer(tiny: bool, batch: int) -> Built:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    more = {"encoder_hidden_size": 24} if tiny else {}
    config = Blip2QFormerConfig(**_sizes(tiny, 3), **more)
    patches = 11 if tiny else 257
    return Blip2QFormerModel(config), {
        "query_embeds": torch.randn(batch, 6 if tiny else 32, config.hidden_size),
        "encoder_hidden_states": torch.randn(batch, patches, config.encoder_hidden_size),
        "encoder_attention_mask": _mask(batch, patches),
    }


def _grounding_dino_of(prefix: str, tiny: bool, batch: int) -> Built:
    import transformers

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = getattr(transformers, f"{prefix}GroundingDinoConfig")
    if tiny:
        config = kind(
            backbone_config=transformers.SwinConfig(
                image_size=96, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 4], window_size=4,
                out_indices=[2, 3, 4],
            ),
            text_config=transformers.BertConfig(
                **text, intermediate_size=64, vocab_size=1100
            ),
            d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=10,
            max_text_len=16,
        )  # fmt: skip
        names, size = [7, 8], 96
    else:
        config = kind()
        names, size = [*range(2000, 2014)], 320
    words = torch.tensor([[101, *names, 1012, *names[:1], 1012, 102]]).expand(batch, -1)
    model = getattr(transformers, f"{prefix}GroundingDinoForObjectDetection")(config)
    return model, {
        "input_ids": words.clone(),
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(batch, 3, size, size),
    }


@_maker("Grounding DINO")
def _grounding_dino(tiny: bool, batch: int) -> Built:
    return _grounding_dino_of("", tiny, batch)


@_maker("MM-Grounding-DINO")
def _mm_grounding_dino(tiny: bool, batch: int) -> Built:
    return _grounding_dino_of("MM", tiny, batch)


@_maker("Perceiver")
def _perceiver(tiny: bool, batch: int) -> Built:
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    if tiny:
        config = PerceiverConfig(
            num_latents=12, d_latents=32, d_model=24, num_blocks=2, num_self_attends_per_block=2,
            num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=32, v_channels=32,
            vocab_size=300, max_position_embeddings=16,
        )  # fmt: skip
    else:  # deepmind/language-perceiver, but for 256 of its 2,048 bytes
        config = PerceiverConfig(qk_channels=256, v_channels=1280, max_position_embeddings=256)
    length = config.max_position_embeddings
    words = torch.randint(6, config.vocab_size, (batch, length))
    return PerceiverForMaskedLM(config), {"inputs": words, "attention_mask": _mask(batch, length)}


@_maker("MiniLM")
def _minilm(tiny: bool, batch: int) -> Built:
    from transformers import BertConfig, BertModel

    base = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    config = BertConfig(**_sizes(tiny, **base, num_attention_heads=12), **_vocabulary(tiny))
    return BertModel(config), _text(batch, 6 if tiny else 20, tiny)


@_maker("ViT")
def _vit(tiny: bool, batch: int) -> Built:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(**_sizes(tiny), **_image(tiny))
    size = config.image_size
    return ViTModel(config), {"pixel_values": torch.randn(batch, 3, size, size)}


def _two_towers(name: str, tiny: bool, batch: int) -> Built:
    import transformers

    sizes = _sizes(tiny)
    more = {"projection_dim": 16} if tiny and name == "CLIP" else {}
    text = {"max_position_embeddings": 16, **_vocabulary(tiny)} if tiny else {}
    config = getattr(transformers, f"{name}Config")(
        text_config={**sizes, **text}, vision_config={**sizes, **_image(tiny)}, **more
    )
    size = config.vision_config.image_size
    words = config.text_config.max_position_embeddings
    return getattr(transformers, f"{name}Model")(config), {
        **_text(batch, words if name == "Siglip" else 6 if tiny else 16, tiny),
        "pixel_values": torch.randn(batch, 3, size, size),
    }


@_maker("CLIP")
def _clip(tiny: bool, batch: int) -> Built:
    return _two_towers("CLIP", tiny, batch)


@_maker("SigLIP")
def _siglip(tiny: bool, batch: int) -> Built:
    return _two_towers("Siglip", tiny, batch)


def _whisper_config(tiny: bool) -> Any:
    from transformers import WhisperConfig

    if not tiny:  # openai/whisper-base
        return WhisperConfig(
            d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
            decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        )  # fmt: skip
    return WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=20, max_target_positions=16, vocab_size=300, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


@_maker("Whisper encoder")
def _whisper_encoder(tiny: bool, batch: int) -> Built:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = _whisper_config(tiny)
    frames = 2 * config.max_source_positions
    return WhisperEncoder(config), {
        "input_features": torch.randn(batch, config.num_mel_bins, frames)
    }


@_maker("Whisper decoder")
def _whisper_decoder(tiny: bool, batch: int) -> Built:
    from transformers.models.whisper.modeling_whisper import WhisperDecoder

    config = _whisper_config(tiny)
    frames = config.max_source_positions
    return WhisperDecoder(config), {
        "input_ids": _words(batch, 6 if tiny else 24, tiny),
        "encoder_hidden_states": torch.randn(batch, frames, config.d_model),
        "use_cache": False,
    }


@_maker("DETR")
def _detr(tiny: bool, batch: int) -> Built:
    from transformers import DetrConfig, DetrModel, ResNetConfig

    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4}
    backbone = ResNetConfig(**(small if tiny else {}), out_features=["stage4"])
    heads = ("encoder_attention_heads", "decoder_attention_heads")
    widths = ("encoder_ffn_dim", "decoder_ffn_dim")
    sizes = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_queries": 10,
        **dict.fromkeys(heads, 4), **dict.fromkeys(widths, 64),
    }  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
        backbone_config=backbone, **(sizes if tiny else {}),
    )  # fmt: skip
    size = 64 if tiny else 320
    return DetrModel(config), {"pixel_values": torch.randn(batch, 3, size, size)}
