"""The models that the benchmarks build, from three libraries, with random weights and inputs that run them.

    names("timm"); build("transformers", "llama") -> (model, example_inputs)

Nothing is downloaded. torchvision and timm models have their own sizes. Those of transformers are built from small
configurations, one row of a table each, which keep what makes an architecture hard to cut: grouped queries, rotary and
relative positions, sliding windows, experts, gated feed-forwards, parallel branches, convolutions over positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import secateur as sc

VOCABULARY, PICTURE = 200, 150
"""How many tokens there are; the one in the place of which a part of a picture is put."""
SIDE = 320
"""Of the images that detectors are given."""


def names(source: str) -> list[str]:
    """Every float model of `source`: "torchvision", "timm" or "transformers"."""
    if source == "transformers":
        return list(TRANSFORMERS)
    if source == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return [name for name in torchvision.models.list_models() if not name.startswith("quantized")]


def build(source: str, name: str, sides: Sequence[int] = ()) -> tuple[Any, Any]:
    """The model with random weights, the same each time, and inputs for it as `secateur.find_groups` takes them.

    The images for a model of timm have the first of these sides, in pixels, that it takes; else its own.
    """
    torch.manual_seed(0)
    if source == "transformers":
        return from_transformers(*TRANSFORMERS[name])
    return from_timm(name, sides) if source == "timm" else from_torchvision(name)


def from_timm(name: str, sides: Sequence[int]) -> tuple[Any, Any]:
    import timm

    config = timm.get_pretrained_cfg(name)
    for side in sides if config is not None else ():
        with contextlib.suppress(Exception):  # there are many ways in which models say that they need another size
            model = timm.create_model(name, **({"img_size": side} if config.fixed_input_size else {})).eval()
            images = torch.randn(1, config.input_size[0], side, side)
            with torch.no_grad():
                model(images)
            return model, images
    model = timm.create_model(name)
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def from_torchvision(name: str) -> tuple[Any, Any]:
    import torchvision

    headed = ("rcnn", "fcos", "ssd", "retina", "deeplab", "fcn_", "lraspp")
    kwargs: dict[str, Any] = {"weights_backbone": None} if any(part in name for part in headed) else {}
    kwargs |= {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if any(part in name for part in ("rcnn", "fcos", "retinanet")):
        kwargs |= {"min_size": SIDE, "max_size": SIDE}  # else detectors scale every image up to 800 pixels
    return torchvision.models.get_model(name, weights=None, **kwargs), torchvision_inputs(name)


def torchvision_inputs(name: str) -> Any:
    if name.startswith("raft"):
        return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)
    if any(part in name for part in ("rcnn", "fcos", "ssd", "retinanet")):
        return ([torch.rand(3, SIDE, SIDE)],)
    if name.startswith(("r3d", "mc3", "r2plus1d", "s3d")):
        return torch.randn(1, 3, 14, 224, 224) if name == "s3d" else torch.randn(1, 3, 8, 112, 112)
    if name.startswith("mvit"):
        return torch.randn(1, 3, 16, 224, 224)
    if name.startswith("swin3d"):
        return torch.randn(1, 3, 8, 64, 64)
    side = 299 if name == "inception_v3" else 224
    return torch.randn(1, 3, side, side)


def from_transformers(kind: str, config: Mapping[str, Any], inputs: Callable[[], Any]) -> tuple[Any, Any]:
    """A model of the class `kind`, whose configuration class it names itself."""
    import transformers

    cls = getattr(transformers, kind)
    return cls(cls.config_class(**config)), inputs()


# Inputs, all as keyword arguments.


def tokens(length: int = 12) -> Tensor:
    return torch.randint(5, VOCABULARY, (2, length))


def text() -> dict[str, Any]:
    """Two sequences, the second shorter and padded."""
    seen = torch.ones(2, 12, dtype=torch.long)
    seen[1, 9:] = 0
    return {"input_ids": tokens(), "attention_mask": seen}


def causal() -> dict[str, Any]:
    return {**text(), "use_cache": False}


def unmasked() -> dict[str, Any]:
    """For recurrent models, which take no mask."""
    return {"input_ids": tokens(), "use_cache": False}


def seq2seq() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": tokens(7), "use_cache": False}


def image(side: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


def image_and_text() -> dict[str, Any]:
    return {**text(), **image(32)()}


def masked_patches() -> dict[str, Any]:
    """The noise says which patches are left out."""
    return {**image(32)(), "noise": torch.rand(2, 16)}


def video() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 4, 3, 32, 32)}


def pictured(count: int, shape: tuple[int, ...] = (2, 3, 16, 16)) -> Callable[[], sc.Example]:
    """Two sequences, in each of which `count` tokens stand for a picture; of the outputs, the logits are read."""

    def made() -> sc.Example:
        ids = tokens().clamp(max=PICTURE - 1)
        ids[:, 2 : 2 + count] = PICTURE
        inputs = {"input_ids": ids, "pixel_values": torch.randn(*shape), "use_cache": False}
        return sc.Example(inputs, lambda out: out.logits)

    return made


def waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 4000), "attention_mask": torch.ones(2, 4000, dtype=torch.long)}


def spectrogram() -> dict[str, Any]:
    """As Whisper takes it: (batch, mels, frames)."""
    return {"input_features": torch.randn(1, 20, 64), "decoder_input_ids": tokens(7)[:1], "use_cache": False}


def frames() -> dict[str, Any]:
    """As the audio transformers take it: (batch, frames, mels)."""
    return {"input_values": torch.randn(1, 64, 32)}


def boxed_text() -> dict[str, Any]:
    """Words with their boxes on a page."""
    corner = torch.randint(0, 30, (2, 12, 2))
    return {**text(), "bbox": torch.cat([corner, corner + 20], -1)}


def series() -> dict[str, Any]:
    return {"past_values": torch.randn(2, 32, 3)}


# Configurations, by the names that most architectures share.

WIDTHS = MappingProxyType(
    {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
)
VOCAB = MappingProxyType({"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
TEXT = MappingProxyType({**WIDTHS, **VOCAB, "max_position_embeddings": 64})
GROUPED = MappingProxyType({**TEXT, "num_key_value_heads": 2})
EXPERTS = MappingProxyType(  # transformers' default, a grouped product, has no float64 kernel and wants even widths
    {**GROUPED, "experts_implementation": "batched_mm", "num_experts_per_tok": 2, "moe_intermediate_size": 48}
)
GPT = MappingProxyType({**VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64})
T5 = MappingProxyType(
    {**VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    | {"relative_attention_num_buckets": 8, "decoder_start_token_id": 0}
)
HALVES = MappingProxyType(
    {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    | {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 96}
)
BART = MappingProxyType({**HALVES, **VOCAB, "max_position_embeddings": 64, "decoder_start_token_id": 2})
VIT = MappingProxyType({**WIDTHS, "image_size": 32, "patch_size": 8})
SWIN = MappingProxyType(
    {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
)
STAGES = MappingProxyType({"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]})
PYRAMID = MappingProxyType({**STAGES, "num_attention_heads": [1, 2, 3, 4]})
RESNET = MappingProxyType({**STAGES, "model_type": "resnet", "embedding_size": 16, "layer_type": "basic"})
LAST = MappingProxyType({**RESNET, "out_features": ["stage4"]})
THREE = MappingProxyType({**RESNET, "out_features": ["stage2", "stage3", "stage4"]})
FOUR = MappingProxyType({**STAGES, "model_type": "convnext", "out_features": ["stage1", "stage2", "stage3", "stage4"]})
UPER = MappingProxyType({"backbone_config": dict(FOUR)})
SQUARE = MappingProxyType({"image_size": 64})
DETR = MappingProxyType({**HALVES, "num_queries": 10, "num_labels": 5, "backbone_config": dict(LAST)})
SPEECH = MappingProxyType(
    {**WIDTHS, "vocab_size": 32, "conv_dim": [32, 48, 64], "conv_kernel": [10, 4, 3], "conv_stride": [5, 4, 4]}
    | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
)
CLIP = MappingProxyType(
    {"text_config": dict(TEXT, projection_dim=48), "vision_config": dict(VIT, projection_dim=48), "projection_dim": 48}
)
MAMBA = MappingProxyType({**VOCAB, "hidden_size": 64, "num_hidden_layers": 2})

# The table: name -> (class, configuration, inputs).

Row = tuple[str, Mapping[str, Any], Callable[[], Any]]

ENCODERS: Mapping[str, Row] = MappingProxyType({
    "bert": ("BertForSequenceClassification", TEXT, text),
    "roberta": ("RobertaForSequenceClassification", dict(TEXT, type_vocab_size=1), text),
    "distilbert": ("DistilBertForSequenceClassification", dict(
        VOCAB, dim=64, n_layers=2, n_heads=4, hidden_dim=128), text),
    "albert": ("AlbertForSequenceClassification", dict(TEXT, embedding_size=32), text),
    "electra": ("ElectraForSequenceClassification", dict(TEXT, embedding_size=32), text),
    "deberta": ("DebertaForSequenceClassification", dict(
        TEXT, relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False), text),
    "deberta_v2": ("DebertaV2ForSequenceClassification", dict(
        TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False), text),
    "mpnet": ("MPNetForSequenceClassification", TEXT, text),
    "xlnet": ("XLNetForSequenceClassification", dict(
        VOCAB, d_model=64, n_layer=2, n_head=4, d_inner=128), lambda: {**text(), "use_mems": False}),
    "roformer": ("RoFormerForSequenceClassification", dict(TEXT, embedding_size=32), text),
    "convbert": ("ConvBertForSequenceClassification", dict(TEXT, embedding_size=32, head_ratio=2), text),
    "squeezebert": ("SqueezeBertForSequenceClassification", dict(TEXT, embedding_size=64), text),
    "mobilebert": ("MobileBertForSequenceClassification", dict(
        TEXT, embedding_size=32, intra_bottleneck_size=32), text),
    "fnet": ("FNetForSequenceClassification", TEXT, lambda: {"input_ids": tokens()}),
    "modernbert": ("ModernBertForSequenceClassification", dict(TEXT, local_attention=8), text),
    "esm": ("EsmForSequenceClassification", dict(TEXT, position_embedding_type="rotary"), text),
    "layoutlm": ("LayoutLMForSequenceClassification", dict(TEXT, max_2d_position_embeddings=64), boxed_text),
})  # fmt: skip

DECODERS: Mapping[str, Row] = MappingProxyType({
    "gpt2": ("GPT2LMHeadModel", GPT, causal),
    "gpt_neo": ("GPTNeoForCausalLM", dict(
        TEXT, num_layers=2, num_heads=4, window_size=8, attention_types=[[["global", "local"], 1]]), causal),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT, causal),
    "gptj": ("GPTJForCausalLM", dict(GPT, rotary_dim=8), causal),
    "codegen": ("CodeGenForCausalLM", dict(GPT, rotary_dim=8), causal),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT, causal),
    "opt": ("OPTForCausalLM", dict(TEXT, ffn_dim=128, word_embed_proj_dim=32), causal),
    "bloom": ("BloomForCausalLM", dict(MAMBA, n_layer=2, n_head=4), causal),
    "mpt": ("MptForCausalLM", dict(VOCAB, d_model=64, n_layers=2, n_heads=4), causal),
    "falcon": ("FalconForCausalLM", TEXT, causal),
    "falcon_grouped": ("FalconForCausalLM", dict(
        TEXT, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=128), causal),
    "llama": ("LlamaForCausalLM", GROUPED, causal),
    "mistral": ("MistralForCausalLM", dict(GROUPED, sliding_window=8), causal),
    "mixtral": ("MixtralForCausalLM", dict(EXPERTS, num_local_experts=4), causal),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, causal),
    "qwen2_moe": ("Qwen2MoeForCausalLM", dict(EXPERTS, num_experts=4, shared_expert_intermediate_size=96), causal),
    "qwen3": ("Qwen3ForCausalLM", dict(GROUPED, head_dim=32), causal),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(EXPERTS, head_dim=32, num_experts=4), causal),
    "gemma": ("GemmaForCausalLM", dict(GROUPED, head_dim=32), causal),
    "gemma2": ("Gemma2ForCausalLM", dict(GROUPED, head_dim=32, sliding_window=8), causal),
    "gemma3": ("Gemma3ForCausalLM", dict(
        GROUPED, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]), causal),
    "phi": ("PhiForCausalLM", dict(TEXT, partial_rotary_factor=0.5), causal),
    "phi3": ("Phi3ForCausalLM", GROUPED, causal),
    "stablelm": ("StableLmForCausalLM", GROUPED, causal),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED, causal),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, causal),
    "cohere": ("CohereForCausalLM", GROUPED, causal),
    "granite": ("GraniteForCausalLM", GROUPED, causal),
    "gpt_oss": ("GptOssForCausalLM", dict(EXPERTS, head_dim=16, num_local_experts=4, sliding_window=8), causal),
    "deepseek_v3": ("DeepseekV3ForCausalLM", dict(
        EXPERTS, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=24, q_lora_rank=40, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16), causal),
    "mamba": ("MambaForCausalLM", dict(MAMBA, state_size=8, time_step_rank=6), unmasked),
    "mamba2": ("Mamba2ForCausalLM", dict(
        MAMBA, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=4), unmasked),
    "rwkv": ("RwkvForCausalLM", dict(MAMBA, attention_hidden_size=96, intermediate_size=128), unmasked),
    "jamba": ("JambaForCausalLM", dict(
        EXPERTS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        use_mamba_kernels=False, mamba_dt_rank=6), causal),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", dict(
        GROUPED, num_hidden_layers=3, lru_width=64, attention_window_size=8), causal),
})  # fmt: skip

PAIRS: Mapping[str, Row] = MappingProxyType({
    "t5": ("T5ForConditionalGeneration", T5, seq2seq),
    "mt5": ("MT5ForConditionalGeneration", dict(T5, feed_forward_proj="gated-gelu"), seq2seq),
    "switch": ("SwitchTransformersForConditionalGeneration", dict(
        T5, num_decoder_layers=2, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1), seq2seq),
    "bart": ("BartForConditionalGeneration", BART, seq2seq),
    "mbart": ("MBartForConditionalGeneration", BART, seq2seq),
    "pegasus": ("PegasusForConditionalGeneration", BART, seq2seq),
    "marian": ("MarianMTModel", BART, seq2seq),
    "m2m_100": ("M2M100ForConditionalGeneration", BART, seq2seq),
    "whisper": ("WhisperForConditionalGeneration", dict(
        BART, num_mel_bins=20, max_source_positions=32, max_target_positions=16), spectrogram),
})  # fmt: skip

VISION: Mapping[str, Row] = MappingProxyType({
    "vit": ("ViTForImageClassification", VIT, image()),
    "deit": ("DeiTForImageClassificationWithTeacher", VIT, image()),
    "swin": ("SwinForImageClassification", SWIN, image()),
    "swinv2": ("Swinv2ForImageClassification", SWIN, image()),
    "beit": ("BeitForImageClassification", dict(VIT, use_relative_position_bias=True), image()),
    "dinov2": ("Dinov2ForImageClassification", VIT, image()),
    "dinov2_gated": ("Dinov2WithRegistersForImageClassification", dict(VIT, use_swiglu_ffn=True), image()),
    "dinov3": ("DINOv3ViTModel", dict(VIT, num_register_tokens=4), image()),
    "vit_mae": ("ViTMAEForPreTraining", dict(
        VIT, decoder_hidden_size=48, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=96), masked_patches),
    "clip": ("CLIPModel", CLIP, image_and_text),
    "siglip": ("SiglipModel", CLIP, image_and_text),
    "blip": ("BlipForImageTextRetrieval", dict(CLIP, image_text_hidden_size=48), image_and_text),
    "detr": ("DetrForObjectDetection", DETR, image(64)),
    "conditional_detr": ("ConditionalDetrForObjectDetection", DETR, image(64)),
    "deformable_detr": ("DeformableDetrForObjectDetection", dict(
        DETR, backbone_config=dict(THREE), disable_custom_kernels=True), image(64)),
    "rt_detr": ("RTDetrForObjectDetection", dict(
        HALVES, encoder_layers=1, encoder_hidden_dim=64, encoder_in_channels=[32, 48, 64], num_queries=10, num_labels=5,
        decoder_in_channels=[64, 64, 64], backbone_config=dict(THREE, model_type="rt_detr_resnet")), image(64)),
    "yolos": ("YolosForObjectDetection", dict(VIT, image_size=[32, 32], num_detection_tokens=10), image()),
    "segformer": ("SegformerForSemanticSegmentation", dict(PYRAMID, decoder_hidden_size=48), image(64)),
    "upernet": ("UperNetForSemanticSegmentation", dict(
        UPER, hidden_size=48, auxiliary_in_channels=48, auxiliary_channels=32), image(64)),
    "convnext": ("ConvNextForImageClassification", STAGES, image(64)),
    "convnextv2": ("ConvNextV2ForImageClassification", STAGES, image(64)),
    "mobilevit": ("MobileViTForImageClassification", dict(
        SQUARE, hidden_sizes=[48, 64, 80], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 96]), image(64)),
    "mobilevitv2": ("MobileViTV2ForImageClassification", dict(
        SQUARE, width_multiplier=0.25, n_attn_blocks=[1, 1, 1]), image(64)),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", dict(SQUARE, depth_multiplier=0.35), image(64)),
    "resnet": ("ResNetForImageClassification", dict(RESNET, layer_type="bottleneck"), image(64)),
    "regnet": ("RegNetForImageClassification", dict(STAGES, embedding_size=16, groups_width=8), image(64)),
    "poolformer": ("PoolFormerForImageClassification", STAGES, image(64)),
    "dpt": ("DPTForDepthEstimation", dict(
        VIT, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=32,
        neck_hidden_sizes=[16, 24, 32, 48]), image()),
    "glpn": ("GLPNForDepthEstimation", dict(PYRAMID, decoder_hidden_size=32), image(64)),
    "pvt": ("PvtForImageClassification", dict(PYRAMID, image_size=64), image(64)),
    "cvt": ("CvtForImageClassification", dict(SQUARE, embed_dim=[16, 48, 96], depth=[1, 2, 3]), image(64)),
    "levit": ("LevitForImageClassification", dict(
        SQUARE, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[8, 8, 8]), image(64)),
    "efficientnet": ("EfficientNetForImageClassification", dict(
        SQUARE, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640), image(64)),
    "focalnet": ("FocalNetForImageClassification", dict(
        SQUARE, embed_dim=24, hidden_sizes=[48, 96], depths=[1, 2]), image(64)),
    "hiera": ("HieraForImageClassification", dict(
        SQUARE, image_size=[64, 64], embed_dim=32, depths=[1, 1, 2, 1]), image(64)),
    "videomae": ("VideoMAEForVideoClassification", dict(VIT, num_frames=4, tubelet_size=2), video),
    "vilt": ("ViltForImageAndTextRetrieval", dict(TEXT, image_size=32, patch_size=8), image_and_text),
})  # fmt: skip

SIGNALS: Mapping[str, Row] = MappingProxyType({
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH, waveform),
    "wav2vec2_large": ("Wav2Vec2ForSequenceClassification", dict(
        SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True, classifier_proj_size=32), waveform),
    "hubert": ("HubertForCTC", SPEECH, waveform),
    "wavlm": ("WavLMForCTC", dict(SPEECH, num_buckets=16, max_bucket_distance=32), waveform),
    "ast": ("ASTForAudioClassification", dict(
        WIDTHS, patch_size=8, frequency_stride=6, time_stride=6, max_length=64, num_mel_bins=32), frames),
    "patchtst": ("PatchTSTForPrediction", dict(
        WIDTHS, d_model=64, ffn_dim=128, num_input_channels=3, context_length=32, patch_length=4, patch_stride=4,
        prediction_length=8), series),
})  # fmt: skip

LLAMA = MappingProxyType({"text_config": dict(GROUPED, model_type="llama"), "image_token_id": PICTURE})
GEMMA = MappingProxyType(dict(GROUPED, model_type="gemma", head_dim=16))
EYE = MappingProxyType(dict(VIT, image_size=16, model_type="siglip_vision_model"))

TALKING: Mapping[str, Row] = MappingProxyType({
    "llava": ("LlavaForConditionalGeneration", dict(LLAMA, vision_config=dict(VIT, image_size=16)), pictured(4)),
    "paligemma": ("PaliGemmaForConditionalGeneration", dict(
        LLAMA, text_config=dict(GEMMA), vision_config=dict(EYE), projection_dim=64), pictured(4)),
    "gemma3_vision": ("Gemma3ForConditionalGeneration", dict(
        LLAMA, text_config=dict(GEMMA, model_type="gemma3_text"), vision_config=dict(EYE), mm_tokens_per_image=4,
        image_token_index=PICTURE), pictured(4)),
    "smolvlm": ("SmolVLMForConditionalGeneration", dict(
        LLAMA, vision_config=dict(EYE, model_type="smolvlm_vision"), scale_factor=2), pictured(1, (2, 1, 3, 16, 16))),
    "internvl": ("InternVLForConditionalGeneration", dict(LLAMA, vision_config=dict(
        VIT, image_size=[32, 32], patch_size=[8, 8], model_type="internvl_vision")), pictured(4, (2, 3, 32, 32))),
})  # fmt: skip

TRANSFORMERS: Mapping[str, Row] = MappingProxyType({**ENCODERS, **DECODERS, **PAIRS, **VISION, **SIGNALS, **TALKING})
