"""Where layers of transformers keep what `fastfusion.encoder_layer` and `decoder_layer` take.

Layers of one family differ in the names of their classes alone; the table holds those whose code
was compared with the family's, in the version `TESTED`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

TESTED = "5.23"


@dataclass(frozen=True)
class Structure:
    """Names of modules in a layer, with dots between those that lie in one another.

    Attributes:
        attention: knows the number of heads, the scale, and the configuration.
        projections: linear layers of query, key, value and output.
        feed_forward: linear layer, activation, linear layer.
        norms: layer norms, of attention, of attention to a memory and of the feed-forward.
        norm_first: whether they come before these, else behind the residuals.
        dropouts: modules, which have to be idle.
        heads, scaling: attributes of the attention.
        absent: modules that a layer may have and that the op has not.
        unset: attributes that change the way of computing, with the module that has them.
        memory: attention to a memory, and linear layers of its query and output; () of encoders.
        memory_keys: in that attention, linear layers of its keys and values.
        clamp: of float16 results to finite numbers: "always", "infinite" (where there is one that
            is not finite) or None.
    """

    attention: str
    projections: tuple[str, ...]
    feed_forward: tuple[str, ...]
    norms: tuple[str, ...]
    norm_first: bool
    dropouts: tuple[str, ...] = ()
    heads: str = "num_heads"
    scaling: str = "scaling"
    absent: tuple[str, ...] = ()
    unset: tuple[tuple[str, str], ...] = ()
    memory: tuple[str, ...] = ()
    memory_keys: tuple[str, ...] = ()
    clamp: str | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All modules of which something is read, the layer itself ("") first, then each behind
        the one that it lies in."""
        leaves = (
            self.attention, *self.projections, *self.memory, *self.feed_forward, *self.norms,
            *self.dropouts,
            *(name for name, _ in self.unset),
        )  # fmt: skip
        found = dict.fromkeys(way for name in leaves for way in _ways(name))
        return tuple(sorted(found, key=lambda name: (name.count(".") + bool(name), name)))

    @cached_property
    def tree(self) -> tuple[tuple[int, str], ...]:
        """Of each but the layer: the place in `names` of what it lies in, and its name there."""
        places = {name: place for place, name in enumerate(self.names)}
        parts = (name.rpartition(".") for name in self.names[1:])
        return tuple((places[parent], child) for parent, _, child in parts)

    def place(self, name: str) -> int:
        return self.names.index(name)


def _ways(name: str) -> Iterator[str]:
    yield ""
    parts = name.split(".")
    for count in range(bool(name), len(parts) + bool(name)):
        yield ".".join(parts[:count])


def _inside(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


_BERT = Structure(
    "attention.self",
    (*_inside("attention.self", "query", "key", "value"), "attention.output.dense"),
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ("attention.output.LayerNorm", "output.LayerNorm"),
    norm_first=False,
    dropouts=("attention.output.dropout", "output.dropout"),
    heads="num_attention_heads",
    unset=(("", "chunk_size_feed_forward"),),
)
_ALBERT = Structure(
    "attention",
    _inside("attention", "query", "key", "value", "dense"),
    ("ffn", "activation", "ffn_output"),
    ("attention.LayerNorm", "full_layer_layer_norm"),
    norm_first=False,
    dropouts=("attention.output_dropout",),
    heads="num_attention_heads",
    unset=(("", "chunk_size_feed_forward"),),
)
_DISTILBERT = Structure(
    "attention",
    _inside("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    _inside("ffn", "lin1", "activation", "lin2"),
    ("sa_layer_norm", "output_layer_norm"),
    norm_first=False,
    dropouts=("ffn.dropout",),
    heads="n_heads",
    unset=(("ffn", "chunk_size_feed_forward"),),
)
_VIT = Structure(
    "attention",
    _inside("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    _inside("mlp", "fc1", "activation_fn", "fc2"),
    ("layernorm_before", "layernorm_after"),
    norm_first=True,
    dropouts=("dropout",),
    heads="num_attention_heads",
)
_CLIP = Structure(
    "self_attn",
    _inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    _inside("mlp", "fc1", "activation_fn", "fc2"),
    ("layer_norm1", "layer_norm2"),
    norm_first=True,
    scaling="scale",
)


def _bart(norm_first: bool, clamp: str) -> Structure:
    return Structure(
        "self_attn",
        _inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "activation_fn", "fc2"),
        ("self_attn_layer_norm", "final_layer_norm"),
        norm_first=norm_first,
        clamp=clamp,
    )


def _bart_decoder(norm_first: bool) -> Structure:
    return Structure(
        "self_attn",
        _inside("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "activation_fn", "fc2"),
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        norm_first=norm_first,
        memory=("encoder_attn", *_inside("encoder_attn", "q_proj", "out_proj")),
        memory_keys=("k_proj", "v_proj"),
    )


def _wav2vec2(norm_first: bool) -> Structure:
    inside = ("intermediate_dense", "intermediate_act_fn", "output_dense")
    return Structure(
        "attention",
        _inside("attention", "q_proj", "k_proj", "v_proj", "out_proj"),
        _inside("feed_forward", *inside),
        ("layer_norm", "final_layer_norm"),
        norm_first=norm_first,
        dropouts=("dropout", *_inside("feed_forward", "intermediate_dropout", "output_dropout")),
        absent=("adapter_layer",),
    )


_ENCODERS = (
    (
        _BERT,
        """bert.BertLayer bert_generation.BertGenerationLayer camembert.CamembertLayer
        data2vec_text.Data2VecTextLayer electra.ElectraLayer ernie.ErnieLayer roberta.RobertaLayer
        roc_bert.RoCBertLayer xlm_roberta.XLMRobertaLayer""",
    ),
    (_ALBERT, "albert.AlbertLayer"),
    (_DISTILBERT, "distilbert.TransformerBlock"),
    (
        _VIT,
        """audio_spectrogram_transformer.ASTLayer deit.DeiTLayer ijepa.IJepaLayer vit.ViTLayer
        vit_mae.ViTMAELayer vit_msn.ViTMSNLayer vivit.VivitLayer""",
    ),
    (
        _CLIP,
        """altclip.AltCLIPEncoderLayer clip.CLIPEncoderLayer clipseg.CLIPSegEncoderLayer
        metaclip_2.MetaClip2EncoderLayer sam3_lite_text.Sam3LiteTextTextEncoderLayer
        siglip.SiglipEncoderLayer siglip2.Siglip2EncoderLayer x_clip.XCLIPEncoderLayer""",
    ),
    (
        _bart(norm_first=True, clamp="always"),
        """audioflamingo3.AudioFlamingo3EncoderLayer blenderbot.BlenderbotEncoderLayer
        m2m_100.M2M100EncoderLayer mbart.MBartEncoderLayer pegasus.PegasusEncoderLayer
        whisper.WhisperEncoderLayer""",
    ),
    (
        _bart(norm_first=False, clamp="infinite"),
        """bart.BartEncoderLayer blenderbot_small.BlenderbotSmallEncoderLayer
        marian.MarianEncoderLayer plbart.PLBartEncoderLayer
        time_series_transformer.TimeSeriesTransformerEncoderLayer""",
    ),
    (
        _wav2vec2(norm_first=False),
        """data2vec_audio.Data2VecAudioEncoderLayer hubert.HubertEncoderLayer sew.SEWEncoderLayer
        unispeech.UniSpeechEncoderLayer unispeech_sat.UniSpeechSatEncoderLayer
        wav2vec2.Wav2Vec2EncoderLayer""",
    ),
    (
        _wav2vec2(norm_first=True),
        """hubert.HubertEncoderLayerStableLayerNorm unispeech.UniSpeechEncoderLayerStableLayerNorm
        unispeech_sat.UniSpeechSatEncoderLayerStableLayerNorm
        wav2vec2.Wav2Vec2EncoderLayerStableLayerNorm""",
    ),
)  # fmt: skip

_DECODERS = (
    (
        _bart_decoder(norm_first=True),
        """blenderbot.BlenderbotDecoderLayer m2m_100.M2M100DecoderLayer mbart.MBartDecoderLayer
        pegasus.PegasusDecoderLayer pegasus_x.PegasusXDecoderLayer
        pp_formulanet.PPFormulaNetDecoderLayer whisper.WhisperDecoderLayer""",
    ),
    (
        _bart_decoder(norm_first=False),
        """bart.BartDecoderLayer blenderbot_small.BlenderbotSmallDecoderLayer
        marian.MarianDecoderLayer plbart.PLBartDecoderLayer""",
    ),
)  # fmt: skip

# Where a package has models of more than one kind.
_PACKAGES = {"data2vec_text": "data2vec", "data2vec_audio": "data2vec"}

Table = dict[str, tuple[str, Structure]]


def _table(families: Iterable[tuple[Structure, str]]) -> Table:
    """By the name of the class: the module that has it, and its structure."""
    found = {}
    for structure, classes in families:
        for name in classes.split():
            model, _, kind = name.partition(".")
            package = _PACKAGES.get(model, model)
            found[kind] = f"transformers.models.{package}.modeling_{model}", structure
    return found


ENCODER_LAYERS, DECODER_LAYERS = _table(_ENCODERS), _table(_DECODERS)
