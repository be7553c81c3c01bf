"""Fine-tune a text-to-image model with LoRA, DoRA, learned tokens, or all of them in stages.

    python train.py configs/toy_pti.toml --optimizer.name adamw --stages.0.steps 200
    python train.py --model MODEL --data.images FOLDER --data.caption "a photo of TOK" --out OUT
    python train.py --preset character --model MODEL --data.images FOLDER --data.caption "..."
    python train.py --compare RUN_A RUN_B          # paired difference on the same images and noise
    python train.py --compare "RUNS_A*" --against "RUNS_B*"    # the same over seeds
    python train.py CONFIG.toml --preview-density  # which noise levels a config trains on
    python train.py CONFIG.toml --plan             # the GPU memory that it needs, and options
    python train.py --data.images FOLDER --data.prepare blip face     # captions and masks by models
    python train.py --list losses                  # or schedules, kinds ...: what there is
    python train.py --from-kohya CONFIG.toml       # the config of kohya's train_network.py

`training_step` is the function to read first, then `train`. `train(config, loss=fn)` takes another
loss (`--loss FILE:FN`), `train(config, step=fn)` a whole step (`--step FILE:FN`).
"""

# ruff: noqa: E402 -- --help is answered before torch is imported
from __future__ import annotations

import sys
from collections.abc import Sequence

from lora_core.config import Config
from lora_core.flags.command_line import parse_command_line, parser_of, show_help, top_flags
from lora_core.flags.instant_answers import Script, answer_at_start, answer_instantly
from lora_core.flags.script_pages import TRAIN_PAGE
from lora_core.flags.trainer_flags import TRAIN_FLAGS
from lora_core.plugin_lists import LIST_FLAG, print_list
from training.comparisons.compare_options import COMPARE_EXAMPLE, CompareRuns, asks_for_comparison

EXAMPLE = (
    "python train.py configs/toy_pti.toml --optimizer.name adamw --out runs/adamw\n\n"
    "or: python train.py --compare RUN_A RUN_B\n\nor: python train.py CONFIG.toml --preview-density"
    "\n\nor: python train.py --preset character|style|object --model MODEL --data.images FOLDER ..."
    "\n\nor: python train.py --data.images FOLDER --data.prepare blip face"
    "\n\nor: python train.py CONFIG.toml --plan\n\nor: python train.py --list losses"
)
PREVIEW_FLAG, PLAN_FLAG = "--preview-density", "--plan"


def show_train_help(words: Sequence[str]) -> None:
    """Prints the help of a run's options, or of a comparison's."""
    if asks_for_comparison(words):
        example = COMPARE_EXAMPLE
        show_help(CompareRuns, prog="train.py", example=example, takes_file=False)
    show_help(Config, prog="train.py", example=EXAMPLE)


def train_flags(words: Sequence[str]) -> set[str]:
    """The names of the flags that a command line may have."""
    return top_flags(CompareRuns if asks_for_comparison(words) else Config)


SCRIPT = Script(
    "lora-train", TRAIN_PAGE, show_train_help, TRAIN_FLAGS, train_flags, parser_of(Config)
)
answer_at_start(__name__, sys.argv, SCRIPT)  # before torch is imported

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lora_core import plugins
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion import losses, masked_losses
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import add_noise
from lora_core.diffusion.prediction import to_loss_space
from lora_core.errors import exit_status
from lora_core.runs import destination
from training import processes, results, run_presets, setup, starting_lora
from training.checkpoints import Checkpoints
from training.comparisons import comparing
from training.cuda_graph import GraphReplay, call_eagerly
from training.inputs.prepared_files import prepare_files, split_prepare_words
from training.inputs.step_inputs import InputSource, StepInputs, make_step_inputs
from training.log import Log
from training.memory import memory_advice, plan_table
from training.probes import effects
from training.samples import SampleImages, save_sample_grid
from training.scores import Scorer
from training.setup import Model
from training.signals import Signals
from training.stages import begin_stage, remaining_stages, resolve_group_numbers, set_learning_rates
from training.step import (
    Loss,
    Step,
    StepFunctions,
    denoise,
    encode_conditioning,
    lazy_members,
    optimizer_step,
)
from training.translation import pivotal_commands
from training.translation.kohya_command import FROM_KOHYA, read_kohya_command


def training_step(model: Model, x: StepInputs, config: Config, loss: Loss) -> Tensor:
    """[b] losses of one micro-batch, weighted by noise level. Depends on its arguments alone and
    reads nothing back from the device, so that a CUDA graph can capture it.
    """
    prediction, space = model.family.prediction, config.noise.space
    x_t = add_noise(x.x0, x.eps_in, x.level)
    cond = encode_conditioning(model, x.text, x.sizes)
    maps: list[AttentionMap] | None = [] if getattr(loss, "reads_attention", False) else None
    out = denoise(model, x_t, x.level, cond, x.inpaint, maps)
    out, target, form = to_loss_space(prediction, space, out, x.x0, x.eps, x.level)
    output = StepOutput(
        out, target, x.x0, x.eps, x_t, x.level, form, x.mask, x.is_prior, x.number,
        lazy=lazy_members(model, x, x_t, cond, maps), t_max=model.family.schedule.t_max,
        network=prediction, token_positions=x.caption_tokens.learned,
        unweighted_mask=x.unweighted_mask, caption_tokens=x.caption_tokens,
        schedule=model.family.schedule, readings=x.readings, is_loser=x.is_loser,
    )  # fmt: skip
    rows = loss(output)
    losses.check_loss_shape(rows, loss, len(x.is_prior))
    if getattr(loss, "weighting", None) == "none":
        return rows
    return rows * losses.loss_weights(
        config.weighting, x.level, prediction, space=space, **config.weighting_arg
    )


def train(config: Config, *, loss: Loss | None = None, step: Step = training_step) -> Path:
    """Train as the config describes; returns the folder of the finished run. Raises UserError,
    where possible before heavy work, for a config that cannot be carried out.
    """
    began = time.perf_counter()
    config, functions = resolve_functions(config, loss, step)
    with Signals() as signals, ExitStack() as stack:
        config = stack.enter_context(processes.join_run(config))
        setup.check_before_opening(config, functions.loss, functions.own_step)
        config = starting_lora.resolve_start(config)
        data = setup.open_data(config)
        model = setup.open_model(config, weights_itself=functions.weights_itself)
        setup.check_captions(data, model)
        optimization = setup.open_optimizer(config, model.groups, model.rate_ratios)
        run = stack.enter_context(processes.open_run(config))
        samples = SampleImages(config, data, model, optimization)
        data = setup.add_class_images(config, data, run, samples.draw_class_images)
        checkpoints = Checkpoints(run, config, data, model, optimization)
        start = checkpoints.restore(began)
        setup.describe_start(config, data, model, run)
        log = Log(run, config, data, model, optimization)
        scorer = Scorer(config, data, model, optimization)
        source = InputSource(config, data, model, reads_attention=functions.reads_attention)
        replay = GraphReplay() if config.cuda_graph else call_eagerly
        stack.enter_context(checkpoints.advice_on_interrupt())
        log.validate_start(start, scorer)
        with signals.deferred() as stop, log.progress(start):
            for stage, first, begin, last in remaining_stages(config.stages, start):
                begin_stage(stage, config, model, optimization)
                source.begin_stage(stage, range(begin, last))
                advance = partial(optimizer_step, functions, stage, config, model, optimization)
                for number, batch in enumerate(data.batches(config, begin, last), begin):
                    check = number == begin  # reads values back: in a stage's first step only
                    set_learning_rates(stage, number - first, config, optimization)
                    inputs = make_step_inputs(source, batch, stage, number, check=check)
                    result = replay(partial(advance, check), inputs, key=first)
                    optimization.update_average_()
                    done = number + 1
                    effects.check_step(source, functions, optimization, stage, batch, inputs)
                    log.add_step(done, stage, result, inputs)
                    if is_due(done, config.validation.every):
                        log.validate(done, scorer)
                    if is_due(done, config.samples.every):
                        log.add_samples(done, save_sample_grid(samples, run, done))
                    if stop.received() or is_due(done, config.save_every):
                        checkpoints.write(done, log)  # last: all before it is done
                    stop.raise_if_received()
        return results.finish_run(log, checkpoints, scorer, samples)


def resolve_functions(
    config: Config, loss: Loss | None, step: Step
) -> tuple[Config, StepFunctions]:
    """(config, functions): the loss and step of a run, and the config with their names, from which
    they are found again if a file defines them, and with a learning rate for each group. Arguments
    that are given replace the config's loss and step; --loss-arg is bound to the loss. Raises
    UserError for a name that cannot be resolved.
    """
    config = resolve_group_numbers(config)
    if step is not training_step:
        config = replace(config, step=plugins.name_function(step))
    elif config.step:
        step = plugins.find_plugin(config.step, {}, "step")
        given = ("model", "inputs", "config", "loss")
        plugins.check_call(step, f"step {config.step}", f"fn({', '.join(given)})", *given)
    if loss is None:
        loss = plugins.find_plugin(config.loss, losses.LOSSES, "loss", config.loss_arg)
        plugins.check_call(loss, f"loss {config.loss}", "fn(step)", "step")
    else:
        loss = plugins.bind_arguments(loss, plugins.function_name(loss), config.loss_arg)
        name, arguments = plugins.name_and_arguments(loss, losses.LOSSES)
        config = replace(config, loss=name, loss_arg=arguments)
    loss = masked_losses.scale_masked_loss(loss, config.mask_scale)
    if config.prior.outside_mask:
        loss = masked_losses.add_outside_preservation(loss, config.prior.outside_mask)
    if config.prior.swap:
        loss = losses.add_preservation(loss, config.prior.swap_weight)
    return config, StepFunctions(step, loss, None if step is training_step else step)


def is_due(step: int, every: int) -> bool:
    """Whether an action that is due every `every` steps (0: never) is due after `step` steps."""
    return every > 0 and step % every == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 for a UserError, whose message is
    printed, 128 + the number of the signal that ended it (Ctrl-C 130, SIGTERM 143, SIGHUP 129).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if (status := answer_instantly(SCRIPT, words)) is not None:
        return status
    return exit_status(partial(run_train_command, words))


def run_train_command(words: list[str]) -> None:
    """Train, compare runs, write captions and masks, preview noise levels, plan memory, or list
    what options choose from.
    """
    if asks_for_comparison(words):
        comparing.compare_finished_runs(words, training_step)
        return
    if words[:1] == [LIST_FLAG]:
        print_list(words[1:])
        return
    if FROM_KOHYA in [word.partition("=")[0] for word in words]:
        translated = read_kohya_command(words)
        if translated is not None:
            train_config(translated)
        return
    words, annotators = split_prepare_words(words)
    options = [word for word in words if word not in (PREVIEW_FLAG, PLAN_FLAG)]
    preset, options = run_presets.take_preset(options)
    config = parse_command_line(Config, options, prog="train.py", example=EXAMPLE, preset=preset)
    if annotators is not None:
        prepare_files(config, annotators)
        return
    if preset:
        config = run_presets.fit_intervals(config, options)
    if preset and processes.is_first():
        print(f"preset: {preset}; the config file and flags win over it")
    if PREVIEW_FLAG in words:
        print(f"plot: {results.preview_noise_levels(config)}")
        return
    if PLAN_FLAG in words:
        shown = [word for word in words if word != PLAN_FLAG]
        plan_table.print_plan(*resolve_functions(config, None, training_step), shown)
        return
    if config.overwrite and words and not words[0].startswith("-"):
        given = {"the config file": words[0]}
        destination.check_apart_from_inputs(config.out, given, overwrite=True)
    train_config(config)


def train_config(config: Config) -> None:
    """Train and print the folder; where memory lacks, the error says what would fit."""
    resolve = partial(resolve_functions, config, None, training_step)
    with memory_advice.explained(config, resolve):
        folder = train(config)
    if processes.is_first():
        print(f"done: {folder}; look at before_after.png, and open report.html in a browser")


def lora_pti(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_pti; returns its exit status."""
    return pivotal_commands.run_pti_command(sys.argv[1:] if argv is None else argv, train)


def lora_ppim(argv: Sequence[str] | None = None) -> int:
    """The command line of the installed lora_ppim; returns its exit status."""
    return pivotal_commands.run_ppim_command(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
