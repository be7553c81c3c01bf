"""What train.py and infer.py print without arguments: a page with the most used lines."""

TRAIN_PAGE = """train.py: fine-tune a text-to-image model with LoRA, DoRA or learned tokens

  python train.py --preset character --model MODEL --data.images FOLDER \\
      --data.caption "a photo of TOK" --out runs/mine        presets: character, style, object
  python train.py configs/toy_pti.toml --optimizer.lr 1e-4 --stages.0.steps 200 --overwrite
  python train.py CONFIG.toml --resume
  python train.py --from-kohya train_network_config.toml --dataset dataset.toml

MODEL is a folder in the diffusers layout, a file, or a hub id. A config in TOML comes first, and
flags win over it. The run writes its LoRA and before_after.png into the folder of --out.

before and after a run:
  python train.py CONFIG.toml --plan             the GPU memory that it needs, and what saves some
  python train.py CONFIG.toml --preview-density  the noise levels that it trains on
  python train.py --compare RUN_A RUN_B          the difference of two runs and its standard error
  python train.py --list losses                  what an option chooses from; --list: every list

  --help                        every option with its unit and default
  --version                     of lora_core, torch, diffusers and transformers
  --tyro-print-completion bash  completion of flags for the installed lora-train (docs/training.md)

Flags of diffusers, kohya and lora_pti are answered with those here: try --network_dim 16.
"""

INFER_PAGE = """infer.py: draw images with a text-to-image model and LoRA files

  python infer.py --model MODEL --lora runs/mine:0.8 --prompt "a photo of TOK" --out toy.png
  python infer.py --model MODEL --lora a.safetensors --lora b.safetensors:0.5 --prompts FILE.txt
  python infer.py --model MODEL --lora runs/mine --prompt "a photo of TOK" \\
      --grid strength=0:1.2:0.3 --grid seed=0:4 --out sheet.png

MODEL is a folder in the diffusers layout, a file, or a hub id. A LoRA is a file of any known
format or the folder of a run, with its strength behind a colon.

  python infer.py --from toy.png --seed 7 --out again.png   an image's recipe, with one change
  python infer.py --list samplers                           what an option chooses from

  --help                        every option with its unit and default
  --version                     of lora_core, torch, diffusers and transformers
  --tyro-print-completion bash  completion of flags for the installed lora-infer (docs/training.md)

Flags of other programs are answered with those here: try --num_inference_steps 30.
"""
