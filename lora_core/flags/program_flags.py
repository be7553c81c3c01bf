"""The flags of other programs that draw images or merge files, and what each is here."""

from __future__ import annotations

from lora_core.flags.flag_values import (
    COMPVIS,
    DIFFUSERS,
    DISTILL,
    KOHYA,
    MIXOFSHOW,
    OTHERS,
    OtherFlag,
    read_precision,
    read_sum,
)

DRAW_FLAGS = (
    OtherFlag("pretrained_model_name_or_path", (DIFFUSERS,), "--model {}"),
    OtherFlag("pretrained_model", (MIXOFSHOW,), "--model {}"),
    OtherFlag("ckpt", (KOHYA, COMPVIS), "--model {}"),
    OtherFlag("ckpt_path", (KOHYA,), "--model {}"),
    OtherFlag("network_weights lora_weights", (KOHYA,), "--lora {}"),
    OtherFlag("network_mul", (KOHYA,), "--lora PATH:{}"),
    OtherFlag("network_module", (KOHYA,), "", "every kind of --lora is recognized by its keys"),
    OtherFlag(
        "textual_inversion_embeddings",
        (KOHYA,),
        "",
        "learned tokens next to a --lora are loaded with it",
    ),
    OtherFlag("num_inference_steps", (DIFFUSERS,), "--steps {}"),
    OtherFlag("skip_guidance_layers", (DIFFUSERS,), "--skip-layers {}"),
    OtherFlag("skip_layer_guidance_scale", (DIFFUSERS,), "--skip-layer-scale {}"),
    OtherFlag("skip_layer_guidance_start", (DIFFUSERS,), "--skip-layer-start {}"),
    OtherFlag("skip_layer_guidance_stop", (DIFFUSERS,), "--skip-layer-stop {}"),
    OtherFlag("ddim_steps", (COMPVIS,), "--steps {}"),
    OtherFlag("guidance_scale", (DIFFUSERS,), "--guidance {}"),
    OtherFlag("scale", (KOHYA, COMPVIS), "--guidance {}"),
    OtherFlag("cfg_scale", (OTHERS,), "--guidance {}"),
    OtherFlag("negative_prompt", (DIFFUSERS, MIXOFSHOW, KOHYA), "--negative {}"),
    OtherFlag("W", (KOHYA, COMPVIS), "--width {}"),
    OtherFlag("H", (KOHYA, COMPVIS), "--height {}"),
    OtherFlag("num_images_per_prompt", (DIFFUSERS,), "--count {}"),
    OtherFlag("images_per_prompt", (KOHYA,), "--count {}"),
    OtherFlag("n_samples", (COMPVIS,), "--count {}"),
    OtherFlag("n_iter", (KOHYA, COMPVIS), "--count {}"),
    OtherFlag("batch_size", (KOHYA,), "--batch {}"),
    OtherFlag("from_file", (KOHYA, COMPVIS), "--prompts {}"),
    OtherFlag("outdir", (KOHYA, COMPVIS), "--out {}/image.png"),
    OtherFlag("output_dir", (KOHYA,), "--out {}/image.png"),
    OtherFlag("save_dir", (MIXOFSHOW,), "--out {}/image.png"),
    OtherFlag("ddim_eta", (KOHYA, COMPVIS), "--sampler-args eta={}"),
    OtherFlag("image_path", (KOHYA,), "--init-image {}"),
    OtherFlag("mask_path", (KOHYA,), "--mask {}"),
    OtherFlag("fp16", (KOHYA,), "--precision fp16"),
    OtherFlag("bf16", (KOHYA,), "--precision bf16"),
    OtherFlag("torch_dtype", (DIFFUSERS,), "--precision {}"),
    OtherFlag("xformers sdpa", (KOHYA,), "", "attention always uses torch's SDPA"),
    OtherFlag(
        "prompt_rewrite",
        (MIXOFSHOW,),
        '--region "x0,y0,x1,y1: PROMPT"',
        "in pixels (left, top, right, bottom), once for each box",
    ),
)
MERGE_FLAGS = (
    OtherFlag("models", (KOHYA,), "mix {} --out OUT", "each file with its weight", read_sum),
    OtherFlag(
        "ratios",
        (KOHYA,),
        "",
        'the weights stand in the sum, merge.py mix "0.7*a.safetensors + 0.3*b.safetensors"',
    ),
    OtherFlag("save_to", (KOHYA,), "--out {}"),
    OtherFlag("save_path", (DISTILL, MIXOFSHOW), "--out {}"),
    OtherFlag("dst_path", (KOHYA,), "--out {}"),
    OtherFlag("sd_model", (KOHYA,), "fold {} SUM --out OUT"),
    OtherFlag("new_rank", (KOHYA,), "--rank {}"),
    OtherFlag("dim", (KOHYA,), "--rank {}"),
    OtherFlag(
        "new_conv_rank conv_dim", (KOHYA,), "", "--rank, --max-error and --energy are of all layers"
    ),
    OtherFlag(
        "dynamic_method",
        (KOHYA,),
        "",
        "sv_fro is --energy (a share of the squared norm); --max-error and --budget also choose "
        "ranks",
    ),
    OtherFlag(
        "dynamic_param", (KOHYA,), "", "it is the value of --energy, --max-error or --budget"
    ),
    OtherFlag("save_precision", (KOHYA,), "--dtype {}", read=read_precision),
    OtherFlag("precision load_precision", (KOHYA,), "", "sums are computed in fp32 or better"),
    OtherFlag("concat", (KOHYA,), "", "sums of LoRA files are concatenated, so they are exact"),
    OtherFlag("shuffle", (KOHYA,), "", "nothing is shuffled"),
    OtherFlag(
        "lbws", (KOHYA,), "", "write the weights of blocks behind a file, merge.py mix 'a@MID=0.5'"
    ),
    OtherFlag("no_metadata", (KOHYA,), "", "a result has its recipe in its header"),
    OtherFlag("model_org", (KOHYA,), "distill {} TUNED --out OUT"),
    OtherFlag("model_tuned", (KOHYA,), "distill BASE {} --out OUT"),
    OtherFlag("base_model", (DISTILL,), "distill {} TUNED --out OUT"),
    OtherFlag("target_model", (DISTILL,), "distill BASE {} --out OUT"),
    OtherFlag("clamp_quantile", (DISTILL, KOHYA), "", "factors are not clamped"),
    OtherFlag("min_diff", (KOHYA,), "", "a layer without a difference is left out"),
    OtherFlag("concept_cfg", (MIXOFSHOW,), "fuse A B --base MODEL --out OUT", "files, no JSON"),
    OtherFlag("pretrained_models", (MIXOFSHOW,), "fuse A B --base {} --out OUT"),
    OtherFlag(
        "optimize_textenc_iters optimize_unet_iters",
        (MIXOFSHOW,),
        "",
        "the least squares of merge.py fuse are solved exactly, without iterations",
    ),
    OtherFlag("src_path", (KOHYA,), "convert {} --out OUT"),
)
