"""Configs of the parts of published models: text encoders, denoisers, VAEs and schedulers.

Values are from the parts' config.json files: the repositories that models.published names,
Qwen/Qwen3-4B and -8B, and mistralai/Mistral-Small-3.2-24B-Instruct-2506.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# ---------------------------------------------------------------- text encoders

CLIP_L: Config = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    hidden_act="quick_gelu",
    max_position_embeddings=77,
    vocab_size=49408,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    architectures=["CLIPTextModel"],
    model_type="clip_text_model",
)
# OpenCLIP's ViT-H; Stable Diffusion 2 reads the state before the last of its 24 layers, so the last
# is left out.
CLIP_H = CLIP_L | dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    projection_dim=512,
    hidden_act="gelu",
)
BIG_G = CLIP_L | dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    architectures=["CLIPTextModelWithProjection"],
)
CLIP_L_PROJECTED = CLIP_L | dict(architectures=["CLIPTextModelWithProjection"])
T5_XXL: Config = dict(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    architectures=["T5EncoderModel"],
    model_type="t5",
)
QWEN3_4B: Config = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    attention_bias=False,
    tie_word_embeddings=True,
    bos_token_id=151643,
    eos_token_id=151645,
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
)
QWEN3_8B = QWEN3_4B | dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
# Mistral Small 3.2: a language model that also reads images, which FLUX.2 does not show it.
MISTRAL_SMALL: Config = dict(
    text_config=dict(
        model_type="mistral",
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1000000000.0,
        sliding_window=None,
    ),
    vision_config=dict(
        model_type="pixtral",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        head_dim=64,
        hidden_act="silu",
        image_size=1540,
        patch_size=14,
        rope_theta=10000.0,
    ),
    image_token_index=10,
    spatial_merge_size=2,
    multimodal_projector_bias=False,
    projector_hidden_act="gelu",
    vision_feature_layer=-1,
    tie_word_embeddings=False,
    architectures=["Mistral3ForConditionalGeneration"],
    model_type="mistral3",
)

# ---------------------------------------------------------------- denoisers

PLAIN_DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
PLAIN_UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
UNET_1: Config = dict(
    _class_name="UNet2DConditionModel",
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
    down_block_types=[CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    up_block_types=[PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
)
UNET_2 = UNET_1 | dict(
    attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
)
UNET_XL = UNET_2 | dict(
    sample_size=128,
    block_out_channels=[320, 640, 1280],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN],
    up_block_types=[CROSS_UP, CROSS_UP, PLAIN_UP],
)
UNET_REFINER = UNET_XL | dict(
    block_out_channels=[384, 768, 1536, 1536],
    transformer_layers_per_block=4,
    attention_head_dim=[6, 12, 24, 24],
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
    down_block_types=[PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN],
    up_block_types=[PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP],
)
MASKED = dict(in_channels=9)
FLUX_TRANSFORMER: Config = dict(
    _class_name="FluxTransformer2DModel",
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
)
SD3_TRANSFORMER: Config = dict(
    _class_name="SD3Transformer2DModel",
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    caption_projection_dim=1536,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)
SD35_MEDIUM = SD3_TRANSFORMER | dict(
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))
)
SD35_LARGE = SD3_TRANSFORMER | dict(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)
FLUX2_TRANSFORMER: Config = dict(
    _class_name="Flux2Transformer2DModel",
    patch_size=1,
    in_channels=128,
    num_layers=8,
    num_single_layers=48,
    num_attention_heads=48,
    attention_head_dim=128,
    joint_attention_dim=15360,
    timestep_guidance_channels=256,
    mlp_ratio=3.0,
    axes_dims_rope=[32, 32, 32, 32],
    rope_theta=2000,
    eps=1e-6,
)
KLEIN_4B = FLUX2_TRANSFORMER | dict(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
KLEIN_9B = KLEIN_4B | dict(
    num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288
)

# ---------------------------------------------------------------- VAEs and schedulers

VAE: Config = dict(
    _class_name="AutoencoderKL",
    sample_size=512,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.18215,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
VAE_XL = VAE | dict(sample_size=1024, scaling_factor=0.13025)
VAE_FLUX = VAE | dict(
    sample_size=1024,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
VAE_SD3 = VAE_FLUX | dict(scaling_factor=1.5305, shift_factor=0.0609)
VAE_FLUX2: Config = dict(
    _class_name="AutoencoderKLFlux2",
    sample_size=1024,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=32,
    patch_size=[2, 2],
    batch_norm_eps=0.0001,
    batch_norm_momentum=0.1,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
STEPS_XL: Config = dict(
    _class_name="EulerDiscreteScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    steps_offset=1,
    prediction_type="epsilon",
    timestep_spacing="leading",
)
STEPS = STEPS_XL | dict(_class_name="DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
FLOW: Config = dict(
    _class_name="FlowMatchEulerDiscreteScheduler",
    num_train_timesteps=1000,
    shift=3.0,
    use_dynamic_shifting=True,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
)
FLOW_SD3: Config = dict(
    _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0
)
V_PREDICTION = dict(prediction_type="v_prediction")
