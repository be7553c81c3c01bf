"""Mix-of-Show's validation images of an ED-LoRA with this project's infer.py.

    accelerate launch test_edlora.py -opt experiments/NAME.yml/NAME.yml \
        --lora-path experiments/NAME.yml/models/edlora_model-latest.pth --save-dir images

For each strength of val.alpha_list (0: the learned tokens alone) the folder gets
validation_edlora_STRENGTH/ with num_samples_per_prompt images of each prompt and, with
compose_visualize, a sheet of all strengths. --lora-path may be the folder of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import infer
from lora_core.errors import UserError, exit_status
from lora_core.text import read_text
from training.translation.edlora_options import flatten_options, read_options


def run_validation(argv: Sequence[str] | None = None) -> int:
    """Draw the images that a file of options describes; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-opt", required=True, help="YAML file of options", metavar="FILE")
    parser.add_argument("--lora-path", required=True, help=".pth or run folder", metavar="FILE")
    parser.add_argument("--save-dir", required=True, help="folder for the images", metavar="DIR")
    given, further = parser.parse_known_args(argv)

    def carry_out() -> int:
        options = flatten_options(read_options(Path(given.opt)))
        folder = Path(given.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = write_prompts(options, folder, is_run=Path(given.lora_path).is_dir())
        common = [*infer_words(options), "--prompts", str(prompts), "--overwrite", *further]
        kind = "edlora" if options.get("models.enable_edlora", True) else "lora"
        alphas = options.get("val.alpha_list") or [1.0]
        count = str(options.get("datasets.val_vis.num_samples_per_prompt", 1))
        for alpha in alphas:
            place = folder / f"validation_{kind}_{alpha}"
            place.mkdir(exist_ok=True)
            lora = ["--lora", f"{given.lora_path}:{alpha}", "--count", count]
            if status := infer.main([*common, *lora, "--out", str(place / "image.png")]):
                return status
        if options.get("val.compose_visualize"):
            grid = f"strength={','.join(map(str, alphas))}"
            sheet = ["--lora", given.lora_path, "--grid", grid, "--out", str(folder / "sheet.png")]
            return infer.main([*common, *sheet])
        return 0

    return exit_status(carry_out)


def write_prompts(options: dict[str, Any], folder: Path, *, is_run: bool) -> Path:
    """A file of the validation prompts, in which the concepts of a .pth are put for their word."""
    file = Path(str(options.get("datasets.val_vis.prompts")))
    if not file.is_file():
        raise UserError(f"datasets.val_vis.prompts is {file}, which is no file; correct it")
    text = read_text(file)
    for word, concepts in (options.get("datasets.val_vis.replace_mapping") or {}).items():
        text = text if is_run else text.replace(str(word), str(concepts))
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def infer_words(options: dict[str, Any]) -> list[str]:
    """Model, sampler, steps, guidance, seed and size as flags of infer.py."""
    words = ["--model", str(options.get("models.pretrained_path")), "--sampler", "dpmpp_2m"]
    words += ["--steps", str(int(options.get("val.sample.num_inference_steps", 50)))]
    words += ["--guidance", str(options.get("val.sample.guidance_scale", 7.5))]
    words += ["--seed", str(options.get("manual_seed") or 0)]
    return words


if __name__ == "__main__":
    sys.exit(run_validation())
