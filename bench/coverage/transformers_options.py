"""What the encoders of transformers need to be small: sizes by the names that configs use, and each family's own."""

from __future__ import annotations

from typing import Any

TOWERS = ("vision", "audio", "text_model", "_encoder", "vit_model")

# for every config that knows the name, with a value of this type
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "embedding_size": 48,
    "embed_dim": 48,
    "d_model": 48,
    "num_hidden_layers": 4,
    "encoder_layers": 4,
    "decoder_layers": 1,
    "depth": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "num_heads": 4,
    "n_heads": 4,
    "head_dim": 12,
    "d_kv": 12,
    "intermediate_size": 96,
    "encoder_ffn_dim": 96,
    "d_ff": 96,
    "hidden_dim": 96,
    "image_size": 64,
    "patch_size": 8,
    "vocab_size": 120,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "projection_dim": 32,
    "num_labels": 5,
}

# encoder types that no registry lists
MORE = (
    "pixtral", "speech_to_text", "speecht5", "moonshine", "dpr", "bert-generation", "splinter", "canine", "xlnet",
    "mamba", "mamba2", "depth_anything", "eomt", "zoedepth", "marian", "pegasus", "layoutlmv3", "markuplm", "lilt",
    "switch_transformers", "longt5", "nllb-moe", "radio", "upernet", "superpoint", "flava_image_model",
)  # fmt: skip

# language models, decoders and models of several inputs that a registry or a tower's name brought in; types without
# a model of their own; what needs a package that is not here
_NO_ENCODER = (
    "mra",  # without its CUDA kernel its attention is nothing but zeros
    "audioflamingo3", "aya_vision", "cohere2_vision", "emu3", "emu3_text_model", "gemma3n_vision", "granite4_vision",
    "granite4_vision_text", "higgs_audio_v2", "higgs_audio_v2_tokenizer", "hyperclovax_vision_v2", "llama4",
    "llava_onevision", "mllama", "mllama_text_model", "molmo2_text", "modernvbert", "ultravbert", "qwen2_audio",
    "shieldgemma2", "vision-encoder-decoder", "vision-text-dual-encoder", "timm_backbone", "timm_wrapper",
    "edgetam_prompt_encoder", "edgetam_video_prompt_encoder", "sam_prompt_encoder", "sam2_prompt_encoder",
    "sam2_video_prompt_encoder", "sam_hq_prompt_encoder", "sam3_tracker_prompt_encoder",
    "sam3_tracker_video_prompt_encoder", "sam3_geometry_encoder", "sam3_lite_text_geometry_encoder",
    "sam3_detr_encoder", "sam3_lite_text_detr_encoder", "dinat", "kosmos_2_text_model", "kosmos_2_5_text_model",
    "pocket_tts_audio_tokenizer_decoder", "pp_chart2table_vision", "gemma4_unified_audio", "gemma4_unified_vision",
    "idefics_vision", "blt_local_encoder", "deepseek_ocr2_vision", "unlimited_ocr_vision", "parakeet_ctc", "lasr_ctc",
    "granite_speech5_ctc", "siglip", "siglip2", "metaclip_2", "tipsv2", "pe_audio", "pe_audio_video",
    "pocket_tts_audio_tokenizer", "pix2struct_text_model", "sam3_vision_model", "imagegpt", "omniasr_ctc",
    "apertus1p5_vision_tokenizer",
)  # fmt: skip
# towers without a batch dimension, as those of the Qwen-VL and GLM-V families that are listed
_SAME_TOWER = (
    "cohere_compass_vision", "cosmos3_edge_vision", "ernie4_5_vl_moe_vision", "glm_image_vision", "hunyuan_vl_vision",
    "kimi_k25_vision", "lfm3_vl_vision", "minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision",
    "minimax_m3_vl_vision", "muse_glimmer_vision", "muse_spark_vision", "video_llama_3_vision", "glm4v_moe_vision",
    "qwen3_5_moe_vision", "qwen3_vl_moe_vision", "qwen4_exp_vision", "exaone4_5_vision", "glm5_next_vision",
    "qwen2_5_omni_vision_encoder", "qwen3_omni_moe_vision_encoder", "glm_ocr_vision", "paddleocr_vl_vision",
    "hy_v4_vl_vision",
)  # fmt: skip
# towers whose inputs or sizes only their own processors and checkpoints make
_OWN_PROCESSOR = (
    "vibevoice_acoustic_tokenizer_encoder", "sam3_lite_text_text_model", "florence_vision", "edgetam_vision_model",
    "depth_pro", "dots3_note_audio_encoder", "dots3_note_vision_encoder", "bridgetower_vision_model",
    "pe_audio_encoder", "pe_audio_video_encoder", "pe_video_encoder", "mimi_encoder", "phi4_multimodal_audio",
    "pocket_tts_audio_tokenizer_encoder", "moonshine_streaming_encoder", "muse_spark_audio", "gemma3n_audio",
    "gemma4_audio", "fun_asr_nano_encoder", "qwen3_asr_encoder", "qwen2_5_omni_audio_encoder",
    "qwen3_omni_moe_audio_encoder", "nemotron3_5_transcribe_asr_audio", "nemotron3_diarization_audio",
    "audioflamingo3_encoder", "granite_speech5_encoder", "granite_speech_encoder", "granite_speech_plus_encoder",
    "gemma4_vision", "molmo2_vision", "inkling_vision", "inkling2_vision", "inkling_audio", "mlcd_vision_model",
    "t5gemma2_encoder", "deformable_detr", "deepseek_ocr2_encoder", "unlimited_ocr_vision_encoder",
    "nemotron3_5_transcribe_audio", "t5gemma", "wavtokenizer_encoder",
)  # fmt: skip
LEFT_OUT = _NO_ENCODER + _SAME_TOWER + _OWN_PROCESSOR

# where the class that AutoModel makes has a decoder too, or is none
CLASSES = {
    "bart": "BartEncoder", "mbart": "MBartEncoder", "mvp": "MvpEncoder", "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "t5gemma": "T5GemmaEncoderModel",
    "whisper": "WhisperEncoder", "moonshine": "MoonshineEncoder", "speech_to_text": "Speech2TextEncoder",
    "speecht5": "SpeechT5EncoderWithSpeechPrenet", "marian": "MarianEncoder", "pegasus": "PegasusEncoder",
    "switch_transformers": "SwitchTransformersEncoderModel", "longt5": "LongT5EncoderModel",
    "nllb-moe": "NllbMoeEncoder", "altclip_text_model": "AltCLIPTextModel", "funnel": "FunnelBaseModel",
    "data2vec-audio": "Data2VecAudioModel", "depth_anything": "DepthAnythingForDepthEstimation",
    "zoedepth": "ZoeDepthForDepthEstimation", "eomt": "EomtForUniversalSegmentation",
    "upernet": "UperNetForSemanticSegmentation", "superpoint": "SuperPointForKeypointDetection",
    "fsmt": "FSMTEncoder", "dpr": "DPRQuestionEncoder", "blip_text_model": "BlipTextModel",
    "dab-detr": "DabDetrModel", "yolos": "YolosModel", "dpt": "DPTForDepthEstimation",
    "vit_mae": "ViTMAEModel", "qwen2_vl_vision": "Qwen2VisionTransformerPretrainedModel",
    "ernie4_5_vl_moe_vision": "Ernie4_5_VLMoeVisionTransformerPretrainedModel",
    "gemma4_vision": "Gemma4VisionModel", "t5gemma2_encoder": "T5Gemma2Encoder", "splinter": "SplinterModel",
    "granite_speech_encoder": "GraniteSpeechCTCEncoder", "granite_speech_plus_encoder": "GraniteSpeechPlusCTCEncoder",
}  # fmt: skip

_CONVS: dict[str, Any] = {  # 1500 samples of sound make 23 frames
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 3),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_STAGES: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 24, "window_size": 4, "patch_size": 4}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4]}
_VIDEO: dict[str, Any] = {"num_frames": 4, "tubelet_size": 2, "patch_size": 16}
_NATIVE: dict[str, Any] = {"out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2}
_SAM: dict[str, Any] = {"window_size": 4, "global_attn_indexes": [1, 3], "mlp_dim": 96, "output_channels": 32}
_VIT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}
_TAPS: dict[str, Any] = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
_EOS: dict[str, Any] = {"eos_token_id": 110}

# families that are tried once more, with outputs of every layer
ALL_LAYERS = ("vit", "bert", "wav2vec2")

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer", "sew",
            "sew-d", "speecht5", "omniasr_audio",
        ),
        _CONVS,
    ),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), _STAGES),
    **dict.fromkeys(("pvt", "pvt_v2", "segformer", "glpn"), _PYRAMID),
    **dict.fromkeys(("qwen2_5_vl_vision", "glm4v_vision", "qwen3_vl_vision", "qwen3_5_vision"), _NATIVE),
    **dict.fromkeys(("sam_vision_model", "sam_hq_vision_model", "got_ocr2_vision", "slanext_vision"), _SAM),
    **dict.fromkeys(
        ("clip_text_model", "metaclip_2_text_model", "clipseg_text_model", "groupvit_text_model"), _EOS
    ),
    "videomae": _VIDEO,
    "vivit": {"num_frames": 4, "tubelet_size": [2, 16, 16]},
    "timesformer": {"num_frames": 4, "patch_size": 16},
    "vjepa2": {
        "crop_size": 64, "frames_per_clip": 4, "patch_size": 16, "pred_hidden_size": 48, "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 1, "mlp_ratio": 2.0,
    },
    "videoprism_vision_model": {
        "num_frames": 4, "tubelet_size": [1, 16, 16], "num_spatial_layers": 3, "num_temporal_layers": 2,
    },
    "clip": {"vision_config": _VIT, "text_config": _VIT | _EOS | {"vocab_size": 120, "max_position_embeddings": 64}},
    "xclip_vision_model": {"num_frames": 2, "mit_num_attention_heads": 4, "mit_hidden_size": 48},
    "yolos": {"image_size": [64, 64], "num_detection_tokens": 5},
    "dpt": {
        "num_hidden_layers": 8, "backbone_out_indices": [1, 3, 5, 7], "neck_hidden_sizes": [16, 24, 32, 48],
        "fusion_hidden_size": 16,
    },
    "depth_anything": {
        "backbone_config": {"model_type": "dinov2", **_VIT, **_TAPS},
        "neck_hidden_sizes": [16, 16, 24, 24], "fusion_hidden_size": 16, "reassemble_hidden_size": 48, "patch_size": 8,
        "head_hidden_size": 8,
    },
    "zoedepth": {
        "backbone_config": {"model_type": "beit", **_VIT, **_TAPS},
        "neck_hidden_sizes": [16, 16, 24, 24], "fusion_hidden_size": 16, "backbone_hidden_size": 48, "patch_size": 8,
        "bottleneck_features": 16, "num_relative_features": 8,
    },
    "eomt": {"num_queries": 7, "num_blocks": 1, "num_upscale_blocks": 1},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
    "clap_audio_model": {
        "spec_size": 64, "num_mel_bins": 16, "depths": [2, 2], "num_attention_heads": [2, 4],
        "patch_embeds_hidden_size": 24, "window_size": 4, "patch_size": 4, "num_hidden_layers": 2, "hidden_size": 48,
    },
    "whisper": {"max_source_positions": 40, "num_mel_bins": 16},
    "qwen2_audio_encoder": {"max_source_positions": 40, "num_mel_bins": 16},
    "voxtral_encoder": {"max_source_positions": 40, "num_mel_bins": 16},
    "moss_transcribe_diarize_audio": {"max_source_positions": 40, "num_mel_bins": 16},
    "glmasr_encoder": {"num_mel_bins": 16},
    "voxtral_realtime_encoder": {"num_mel_bins": 16},
    "lasr_encoder": {"num_mel_bins": 16, "subsampling_conv_channels": 16, "conv_kernel_size": 8},
    "parakeet_encoder": {"num_mel_bins": 16, "subsampling_conv_channels": 16},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
    "moonshine": {"encoder_num_hidden_layers": 4, "encoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4},
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "output_hidden_size": 48},
    "mllama_vision_model": {
        "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 2, "intermediate_layers_indices": [1],
        "vision_output_dim": 96, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    "llama4_vision_model": {
        "vision_output_dim": 96, "intermediate_size": 192, "projector_input_dim": 96, "projector_output_dim": 96,
    },
    "qwen2_vl_vision": {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2},
    "deepseek_ocr2_sam_vision_model": {**_SAM, "downsample_channels": [32, 48]},
    "unlimited_ocr_sam_vision_model": {**_SAM, "downsample_channels": [32, 48]},
    "siglip2_vision_model": {"num_patches": 64},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 48},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48, "seq_len": 40},
    "vitdet": {"window_size": 4, "window_block_indices": [0, 2], "pretrain_image_size": 64},
    "sam3_vit_model": {"window_size": 4, "global_attn_indexes": [1, 3]},
    "lw_detr_vit": {"window_block_indices": [0, 2]},
    "hiera": {
        "depths": [1, 2, 2], "num_heads": [1, 2, 4], "embed_dim": 16, "image_size": [64, 64], "patch_size": [7, 7],
        "num_query_pool": 2, "masked_unit_size": [4, 4], "masked_unit_attention": [True, False, False],
    },
    "levit": {
        "image_size": 128, "hidden_sizes": [32, 48], "num_attention_heads": [2, 4], "depths": [2, 2], "key_dim": [8, 8],
        "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": [["Subsample", 8, 4, 4, 2, 2]], "patch_size": 16,
    },
    "mobilevit": {"patch_size": 2},
    "mobilevitv2": {"patch_size": 2},
    "perceiver": {
        "num_latents": 20, "d_latents": 48, "num_self_attends_per_block": 4, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
    "bit": {"embedding_size": 64, "hidden_sizes": [128, 128, 256, 256], "depths": [1, 1, 1, 1]},
    "vitpose_backbone": {"image_size": [64, 64], "patch_size": [8, 8]},
    "lilt": {"max_2d_position_embeddings": 128, "channel_shrink_ratio": 4},
    "swin2sr": {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 24, "window_size": 8, "patch_size": 1},
    "clvp_encoder": {"hidden_size": 128},  # its rotary embedding has 32 channels at least
    "neomme": {"head_dim": 16},
    "flaubert": {"emb_dim": 48, "n_layers": 4},
    "xlm": {"emb_dim": 48, "n_layers": 4},
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "groups_width": 16, "depths": [1, 2, 2, 1]},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
    "dinov3_convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "poolformer": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
    "align_vision_model": {"width_coefficient": 0.5, "depth_coefficient": 1.0},
    "esm": {"vocab_size": 120, "mask_token_id": 3, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "funnel": {"block_sizes": [2, 2], "num_decoder_layers": 1, "d_head": 12, "n_head": 4, "d_inner": 96},
    "reformer": {
        "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 12, "feed_forward_size": 96, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "distilbert": {"dim": 48, "hidden_dim": 96, "n_layers": 4, "n_heads": 4},
    "mobilebert": {"intra_bottleneck_size": 32, "embedding_size": 32},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "xmod": {"default_language": "en_XX"},
    "focalnet": {"embed_dim": 24, "depths": [2, 2], "hidden_sizes": [24, 48], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "patch_size": 4},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2},
    "longformer": {"attention_window": 4},
    "big_bird": {"attention_type": "original_full"},
    "nystromformer": {"num_landmarks": 22, "segment_means_seq_len": 22},
    "canine": {"local_transformer_stride": 8, "downsampling_rate": 2, "num_hash_buckets": 64},
    "mamba": {"state_size": 8, "expand": 2, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 1, "chunk_size": 8},
    "layoutlmv3": {"input_size": 64, "visual_embed": False, "coordinate_size": 8, "shape_size": 8},
    "layoutlm": {"max_2d_position_embeddings": 128},
    "step3p5_vision": {"mlp_ratio": 2.0, "max_position_embeddings": 64},
}  # fmt: skip
