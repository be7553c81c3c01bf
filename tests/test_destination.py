"""Checks of --out: no input of a run is moved or mixed with it; every name fits the file system."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import infer
from lora_core.atomic_files import atomic_write
from lora_core.config import Config, DataConfig, PriorConfig, ValidationConfig
from lora_core.errors import UserError
from lora_core.formats import run_file_names
from lora_core.runs import destination
from lora_core.runs.run_folder import Run
from training.checks import config_checks

OPTIONS = {
    "--data.images": lambda path: {"data": DataConfig(images=path)},
    "--data.cache": lambda path: {"data": DataConfig(images="elsewhere", cache=path)},
    "--model": lambda path: {"model": path},
    "--model-config": lambda path: {"model_config": path},
    "--vae": lambda path: {"vae": path},
    "--validation.images": lambda path: {"validation": ValidationConfig(images=path)},
    "--prior.images": lambda path: {"prior": PriorConfig("a cat", images=path)},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_folder_with_what_the_run_reads_is_refused(
    tmp_path: Path, option: str, overwrite: bool
) -> None:
    out = tmp_path / "project"
    (inside := out / "a" / "b").mkdir(parents=True)
    (out / "config.toml").write_text("")
    linked = tmp_path / "linked"
    linked.symlink_to(inside)
    for given, word in (
        (inside, "holds"),
        (out, "is"),
        (linked, "holds"),
        (out / "." / "a" / ".." / "a", "holds"),
    ):
        config = replace(Config(out=str(out), overwrite=overwrite), **OPTIONS[option](str(given)))
        with pytest.raises(UserError, match=rf"{word} {option} .*name another --out"):
            config_checks.check_run_folder(config)
    assert inside.is_dir() and not (tmp_path / "project.bak").exists()


@pytest.mark.parametrize("option", config_checks.CODE)
def test_code_of_ones_own_is_not_moved_away(tmp_path: Path, option: str) -> None:
    (out := tmp_path / "run").mkdir()
    (out / "config.toml").touch()
    (out / "mine.py").touch()
    section, _, name = option.rpartition(".")
    given: dict = {name: f"{out}/mine.py:mine"}
    given = {section: replace(getattr(Config(), section), **given)} if section else given
    with pytest.raises(UserError, match=f"holds --{option} .*mine.py: --overwrite would move"):
        config_checks.check_run_folder(replace(Config(out=str(out), overwrite=True), **given))
    config_checks.check_run_folder(
        replace(Config(out=str(tmp_path / "new"), overwrite=True), **given)
    )


def test_a_run_below_the_images_is_fine_until_it_is_moved(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    config = Config(
        out=str(tmp_path / "photos" / "run"), data=DataConfig(images=str(tmp_path / "photos"))
    )
    config_checks.check_run_folder(config)
    with pytest.raises(UserError, match=r"lies in --data\.images"):
        config_checks.check_run_folder(replace(config, overwrite=True))
    config_checks.check_run_folder(replace(config, out=str(tmp_path / "run"), model="a/hub-id"))


@pytest.mark.parametrize(
    "held", [("notes.txt",), ("a.png", "b.png"), ("src/main.py",), ("runs/one/metrics.jsonl",)]
)
def test_only_runs_are_overwritten(tmp_path: Path, held: tuple[str, ...]) -> None:
    for name in held:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    with pytest.raises(UserError, match=r"moves runs only.*name another --out"):
        destination.check_overwritten(tmp_path / "out")
    for mark in ("config.toml", "metrics.jsonl", ".lock"):
        (tmp_path / "out" / mark).touch()
        destination.check_overwritten(tmp_path / "out")
        (tmp_path / "out" / mark).unlink()


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    for name in (
        "config.toml",
        "one/config.toml",
        "two/metrics.jsonl",
        "checkpoints/3/state.json",
        "samples/1.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"other runs in it \(one, two\)"):
        destination.check_overwritten(tmp_path)


@pytest.mark.parametrize("letter", ["x", "é", "猫"])
def test_the_longest_name_that_passes_is_the_longest_that_can_be_written(
    tmp_path: Path, letter: str
) -> None:
    limit, size = os.pathconf(tmp_path, "PC_NAME_MAX"), len(letter.encode())
    fits = []
    for count in range(limit // size, 0, -1):
        out = tmp_path / (letter * count)
        try:
            destination.check_file_names(out)
        except UserError as error:
            assert "shorten the name by" in str(error)
            continue
        fits.append(count)
        break
    for count, works in ((fits[0], True), (fits[0] + 1, False)):
        run = Run.open(tmp_path / (letter * count))
        try:
            for name in run_file_names(f"{run.folder.name}-1000000"):  # of a checkpoint
                with atomic_write(run.folder / name) as temporary:
                    temporary.touch()
            assert works
        except (OSError, UserError):
            assert not works


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    out = tmp_path.joinpath(*["x" * 200] * 20, "run")
    with pytest.raises(UserError, match="a path of"):
        destination.check_file_names(out)
    for option in ("--data.cache", "--prior.images"):
        long = (
            {"data": DataConfig(images="here", cache="y" * 300)}
            if "cache" in option
            else {"prior": PriorConfig("a cat", images="y" * 300)}
        )
        with pytest.raises(UserError, match=f"{option} leads to a file name of 300 bytes"):
            config_checks.check_run_folder(replace(Config(out=str(tmp_path / "o")), **long))


def test_a_picture_with_too_long_a_name_is_refused_before_it_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("x" * 240 + ".png")  # fits, but not while it is written
    assert infer.main(["--model", "nowhere", "--prompt", "a", "--out", str(out)]) == 2
    assert "--out leads to a file name of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "held", ["metadata.jsonl", "captions.jsonl", ".photo.jpg.tmp", "notes.txt"]
)
def test_only_runs_are_resumed(tmp_path: Path, held: str) -> None:
    (tmp_path / held).write_text('{"file_name": "a.png", "text": "a cat"}\n')
    for resume, cure in (
        (True, "name the folder of the run to resume"),
        (False, "name another --out"),
    ):
        with pytest.raises(UserError, match=rf"holds {held} and none of a run's .*; {cure}"):
            config_checks.check_run_folder(Config(out=str(tmp_path), resume=resume))
        with pytest.raises(UserError, match=cure):
            Run.open(tmp_path, resume=resume)
    (tmp_path / "config.toml").touch()  # even then nothing of others is cut or cleared away
    Run.open(tmp_path, resume=True)
    assert (tmp_path / held).read_text().startswith("{")


@pytest.mark.parametrize(
    "mark", ["config.toml", "metrics.jsonl", "checkpoints", "class_images", ".lock"]
)
def test_the_beginning_of_a_run_is_resumed_or_moved(tmp_path: Path, mark: str) -> None:
    (out := tmp_path / "out").mkdir()
    (out / mark).touch() if "." in mark else (out / mark).mkdir()
    (out / "x.txt").touch()
    for resume in (True, False):
        config_checks.check_run_folder(Config(out=str(out), resume=resume, overwrite=not resume))


def test_a_place_where_no_folder_can_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "away")
    for name, told in (
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("link", "link to .*away, which does not exist"),
        ("link/a", "link to"),
    ):
        with pytest.raises(UserError, match=rf"{told}.*name another --out"):
            config_checks.check_run_folder(Config(out=str(tmp_path / name)))
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path
    )  # root may write everywhere
    with pytest.raises(UserError, match="read-only or another user's"):
        config_checks.check_run_folder(Config(out=str(tmp_path / "new" / "run")))


def test_a_link_and_a_mount_point_are_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run := tmp_path / "disk" / "run").mkdir(parents=True)
    (run / "config.toml").touch()
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match=f"name {run} or another --out"):
        destination.check_overwritten(tmp_path / "link")
    destination.check_overwritten(run)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == run)
        with pytest.raises(UserError, match="is mounted; name a folder in it"):
            destination.check_overwritten(run)

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(
        UserError, match=r"cannot move .*run to run.bak \(Device or resource busy\)"
    ):
        Run.open(run, overwrite=True)
