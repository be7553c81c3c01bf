"""Mix-of-Show's example of a tutorial: a concept, its options and its prompts, in tiny."""

import json
from pathlib import Path

import yaml

from tests.conftest import save_photos
from tests.tiny_pipeline import DEEP_UNET, pipeline

# the options of Mix-of-Show's own options/train/EDLoRA, of a person with masks
OPTIONS = """
name: EDLoRA_hermione_RV51
manual_seed: 0
mixed_precision: fp16
gradient_accumulation_steps: 1

# dataset and data loader settings
datasets:
  train:
    name: LoraDataset
    concept_list: data/mixofshow_example_data/hermione.json
    use_caption: true
    use_mask: true
    instance_transform:
      - { type: HumanResizeCropFinalV3, size: 16, crop_p: 0.5 }
      - { type: ToTensor }
      - { type: Normalize, mean: [ 0.5 ], std: [ 0.5 ] }
      - { type: ShuffleCaption, keep_token_num: 1 }
      - { type: EnhanceText, enhance_type: human }
    replace_mapping:
      <TOK>: <hermione1> <hermione2>
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 2

  val_vis:
    name: PromptDataset
    prompts: data/mixofshow_example_data/test_woman.txt
    num_samples_per_prompt: 2
    latent_size: [ 4,64,64 ]
    replace_mapping:
      <TOK>: <hermione1> <hermione2>
    batch_size_per_gpu: 4

models:
  pretrained_path: model
  enable_edlora: true  # true means ED-LoRA, false means vallina LoRA
  finetune_cfg:
    text_embedding:
      enable_tuning: true
      lr: !!float 1e-3
    text_encoder:
      enable_tuning: true
      lora_cfg:
        rank: 2
        alpha: 1.0
        where: CLIPAttention
      lr: !!float 1e-5
    unet:
      enable_tuning: true
      lora_cfg:
        rank: 4
        alpha: 1.0
        where: Attention
      lr: !!float 1e-4
  new_concept_token: <hermione1>+<hermione2>
  initializer_token: <rand-0.013>+b
  noise_offset: 0.01
  attn_reg_weight: 0.01
  reg_full_identity: false
  use_mask_loss: true
  gradient_checkpoint: false
  enable_xformers: true

# path
path:
  pretrain_network: ~

# training settings
train:
  optim_g:
    type: AdamW
    lr: !!float 0.0 # no use since we define different component lr in model
    weight_decay: 0.01
    betas: [ 0.9, 0.999 ] # align with taming

  # dropkv
  unet_kv_drop_rate: 0
  scheduler: linear
  emb_norm_threshold: !!float 5.5

# validation settings
val:
  val_during_save: true
  compose_visualize: true
  alpha_list: [0, 0.7] # 0 means only visualize embedding (without lora weight)
  sample:
    num_inference_steps: 2
    guidance_scale: 7.5

# logging settings
logger:
  print_freq: 1
  save_checkpoint_freq: !!float 10000
"""


def save_example(folder: Path) -> Path:
    """A folder in which the tutorial's two commands run; returns the file of options."""
    place = folder / "data/mixofshow_example_data"
    photos = save_photos(place / "image", captions="a <TOK> b", count=3)
    for name, ending in (("caption", ".txt"), ("mask", ".mask.png")):
        (place / name).mkdir()
        for number in range(3):
            kept = f"{number}{ending.replace('.mask', '')}"
            (photos / f"{number}{ending}").rename(place / name / kept)
    concept = {"instance_prompt": "photo of a <TOK>", "instance_data_dir": "image"}
    concept |= {"caption_dir": "caption", "mask_dir": "mask"}
    (place / "hermione.json").write_text(json.dumps([concept]))
    (place / "test_woman.txt").write_text("a <TOK>\n<TOK> b\n")
    pipeline(blocks=DEEP_UNET).save_pretrained(folder / "model")
    file = place / "EDLoRA_hermione_RV51.yml"
    file.write_text(OPTIONS)
    assert isinstance(yaml.safe_load(OPTIONS), dict)
    return file
