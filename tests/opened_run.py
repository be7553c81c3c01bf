"""The parts of a run as `train.train` opens them, for tests that look at a part by itself."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

import train
from lora_core.config import Config
from lora_core.runs.run_folder import Run
from training import processes, setup, starting_lora
from training.checkpoints import Checkpoints
from training.inputs.step_inputs import InputSource, make_step_inputs
from training.log import Log
from training.samples import SampleImages
from training.scores import Scorer
from training.setup import Data, Model, Optimization
from training.stages import begin_stage, set_learning_rates
from training.step import StepFunctions, optimizer_step


@dataclass
class OpenedRun:
    config: Config
    functions: StepFunctions
    data: Data
    model: Model
    optimization: Optimization
    run: Run
    samples: SampleImages
    checkpoints: Checkpoints
    log: Log
    scorer: Scorer
    source: InputSource

    def take_steps(self, count: int) -> None:
        """The first steps of the first stage."""
        stage = self.config.stages[0]
        begin_stage(stage, self.config, self.model, self.optimization)
        self.source.begin_stage(stage, range(count))
        for number, batch in enumerate(self.data.batches(self.config, 0, count)):
            set_learning_rates(stage, number, self.config, self.optimization)
            inputs = make_step_inputs(self.source, batch, stage, number, check=True)
            optimizer_step(
                self.functions, stage, self.config, self.model, self.optimization, True, inputs
            )


def open_parts(config: Config) -> OpenedRun:
    """Everything that exists before the first step of a run; its folder is not locked."""
    config, functions = train.resolve_functions(config, None, train.training_step)
    setup.check_before_opening(config, functions.loss, None)
    config = starting_lora.resolve_start(config)
    data = setup.open_data(config)
    model = setup.open_model(config)
    setup.check_captions(data, model)
    optimization = setup.open_optimizer(config, model.groups, model.rate_ratios)
    with ExitStack() as stack:
        run = stack.enter_context(processes.open_run(config))
        samples = SampleImages(config, data, model, optimization)
        data = setup.add_class_images(config, data, run, samples.draw_class_images)
        checkpoints = Checkpoints(run, config, data, model, optimization)
        checkpoints.restore(0.0)
        log = Log(run, config, data, model, optimization)
    scorer = Scorer(config, data, model, optimization)
    source = InputSource(config, data, model, reads_attention=functions.reads_attention)
    return OpenedRun(
        config, functions, data, model, optimization, run, samples, checkpoints, log, scorer, source
    )


def latent_files(cache: Path) -> list[Path]:
    """The files of a cache but those of captions."""
    files = cache.glob("*/*.safetensors")
    return [file for file in files if "prompt_embeds" not in load_file(file)]
