"""What `fastfusion.accelerate` makes of layers of other libraries: by their names, so that nothing
is imported before a model has one."""

_TIMM_ATTENTIONS = (
    "layers.attention.Attention",
    "layers.attention.AttentionRope",
    "layers.attention2d.Attention2d",
    "layers.attention2d.MultiQueryAttention2d",
    "layers.attention_pool.AttentionPoolLatent",
    "layers.attention_pool.AttentionPoolPrr",
    "layers.attention_pool2d.AttentionPool2d",
    "layers.attention_pool2d.RotAttentionPool2d",
    "layers.diff_attention.DiffAttention",
    "layers.other_pool.SimPool1d",
    "layers.other_pool.SimPool2d",
    "models.beit.Attention",
    "models.cait.ClassAttn",
    "models.cpubone.ConvAttention",
    "models.davit.WindowAttention",
    "models.eva.EvaAttention",
    "models.fastvit.Attention",
    "models.gemma4_vit.Gemma4Attention",
    "models.hiera.MaskUnitAttention",
    "models.hieradet_sam2.MultiScaleAttention",
    "models.iformer.SHMA",
    "models.lowformer.ConvAttention",
    "models.maxxvit.Attention2d",
    "models.maxxvit.AttentionCl",
    "models.metaformer.Attention",
    "models.nest.Attention",
    "models.nextvit.EfficientAttention",
    "models.pvt_v2.Attention",
    "models.swin_transformer.WindowAttention",
    "models.tiny_vit.Attention",
    "models.twins.GlobalSubSampleAttn",
    "models.twins.LocallyGroupedAttn",
    "models.visformer.Attention",
    "models.vision_transformer.DiffParallelScalingBlock",
    "models.vision_transformer.ParallelScalingBlock",
    "models.vision_transformer_relpos.RelPosAttention",
    "models.vision_transformer_sam.Attention",
    "models.volo.Attention",
)
# Qualified names and factories, as `fastfusion.register_swap` takes them.
TIMM: dict[str, str] = {
    **{f"timm.{name}": "fastfusion.integrations.timm:attention" for name in _TIMM_ATTENTIONS},
    "timm.models.vision_transformer.Block": "fastfusion.integrations.timm:block",
    "timm.layers.mlp.Mlp": "fastfusion.integrations.timm:mlp",
}
# Also of their subclasses, which differ in their processors.
DIFFUSERS: dict[str, str] = {
    f"diffusers.models.{name}": "fastfusion.integrations.diffusers:attention"
    for name in (
        "attention.AttentionModuleMixin",
        "attention_processor.Attention",
        "attention_processor.MochiAttention",
    )
}
