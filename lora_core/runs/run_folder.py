"""The folder of a run: atomic files, logs in JSON lines, checkpoints without pickle.

A resumed run loses no step and repeats none in the logs.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.atomic_files import TEMPORARY, atomic_write, disk_errors, sync_to_disk
from lora_core.errors import UserError
from lora_core.json_files import INTEGER, LONGEST_JSON, parse_object
from lora_core.optim.wrapped_tensors import TensorParts, plain_tensors, split_tensor
from lora_core.runs.lock import LOCK, FolderLock
from lora_core.text import read_text, shorten_value

K = TypeVar("K", bound=Hashable)
SUMS = "checksums.b2"  # of a checkpoint's two files, as b2sum writes and checks them
LOGS = ("metrics", "val")  # names of the logs, which a resumed run cuts
# Names in a run's folder; only the last ones where it ended at its very beginning.
MARKS = ("config.toml", "metrics.jsonl", "checkpoints", LOCK, "class_images")
STEP_FIELD = {"step": INTEGER}  # of a line of a log
STATE_FIELDS = {"step": INTEGER, "bytes": INTEGER}  # of a checkpoint's state.json


class Checkpoint(NamedTuple):
    """The state of a run after a number of steps."""

    step: int  # steps done
    tensors: dict[str, Tensor]  # on the CPU
    meta: Any  # JSON


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, possibly one that has only begun."""
    return any((folder / mark).exists() for mark in MARKS)


def first_names(folder: Path) -> str:
    """The first three names in a folder, for an error message."""
    held = sorted(path.name for path in folder.iterdir())
    return ", ".join(held[:3]) + (" ..." if len(held) > 3 else "")


@contextlib.contextmanager
def hold_run(
    out: Path | str, *, resume: bool, overwrite: bool, keep: int | None
) -> Iterator["Run"]:
    """The run in `out`, as `Run.open` opens it, locked against other processes inside the block.

    Raises UserError where another process has the lock, or the disk refuses. A new run that a
    UserError ends before its first step leaves nothing behind, so that the corrected command needs
    no --overwrite.
    """
    folder = Path(os.path.abspath(out))
    is_new = not folder.exists()
    run = None
    with disk_errors(folder):
        lock = FolderLock.hold(folder)
    try:
        run = Run.open(out, resume=resume, overwrite=overwrite, keep=keep)
        lock = lock.follow(run.folder)
        yield run
    except UserError:
        lock.release()  # its file is in the folder
        if run and not resume:
            run.remove_unstarted()
        if is_new:
            with contextlib.suppress(OSError):  # the run has begun
                folder.rmdir()
        raise
    finally:
        lock.release()


class Run:
    """An open run folder.

    `step` is always the number of completed steps: a checkpoint or log line with step n is the
    state after n steps. Without `writes`, in a process that is not the first of a run, `write`,
    `log` and `save_checkpoint` do nothing.
    """

    def __init__(self, folder: Path, *, keep: int | None, writes: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.writes = writes

    @classmethod
    def open(
        cls,
        out: Path | str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        keep: int | None = None,
    ) -> "Run":
        """Opens the run in `out`: a new one, or with `resume` the existing one.

        `keep`: the number of newest checkpoints that are kept (None: all). A folder with anything
        in it is refused without `resume` or `overwrite`, which moves it to OUT.bak (an older
        OUT.bak to OUT.bak.1, .2 ...). `resume` cuts the logs after the newest whole checkpoint and
        removes files that a killed process left half written.
        """
        if keep is not None and keep < 1:
            raise UserError(f"the number of checkpoints to keep is {keep}; expected at least 1")
        folder, occupied = cls.check_folder(out, resume=resume, overwrite=overwrite)
        if occupied and overwrite:
            _back_up(folder)
        run = cls(folder, keep=keep)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if resume:
                run._rewind()
        return run

    @staticmethod
    def check_folder(out: Path | str, *, resume: bool, overwrite: bool) -> tuple[Path, bool]:
        """(the folder, whether anything is in it); changes nothing.

        Raises UserError where `open` would refuse it.
        """
        folder = Path(os.path.abspath(out))
        if resume and overwrite:
            raise UserError(
                "--resume and --overwrite were both given; "
                "choose to go on with the old run or to start a new one"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{out} is a file; name a folder for the run")
        occupied = folder.exists() and any(path.name != LOCK for path in folder.iterdir())
        if resume and not occupied:
            raise UserError(f"there is no run in {out} to resume; leave --resume out to start one")
        if occupied and not overwrite and not is_run(folder):
            held, marks = first_names(folder), ", ".join(MARKS[:3])
            wanted = "the folder of the run to resume" if resume else "another --out"
            raise UserError(f"{out} holds {held} and none of a run's {marks}; name {wanted}")
        if occupied and not resume and not overwrite:
            raise UserError(
                f"{out} already holds a run; pass --resume to go on with it, "
                f"--overwrite to move it to {folder.name}.bak, or name another --out"
            )
        return folder, occupied

    def remove_unstarted(self) -> None:
        """Removes the config of a run that ended before anything else was written."""
        if {path.name for path in self.folder.iterdir()} == {"config.toml"}:
            (self.folder / "config.toml").unlink()

    def write(self, name: str, text: str) -> Path:
        """Writes a text file of the run atomically and returns its path."""
        if not self.writes:
            return self.folder / name
        with atomic_write(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.folder / name

    def log(self, entry: dict[str, Any], *, to: str = "metrics") -> None:
        """Appends a line, which has a "step", to OUT/<to>.jsonl and flushes it.

        A line that does not fit on the disk is removed again.
        """
        if type(entry.get("step")) is not int:
            raise ValueError(
                f"a line of {to}.jsonl has step {entry.get('step')!r}; "
                "expected the number of steps done, by which a resumed run cuts"
            )
        if not self.writes:
            return
        path = self.folder / f"{to}.jsonl"
        line = (json.dumps(entry) + "\n").encode()
        with disk_errors(path), open(path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], meta: Any) -> Path:
        """Writes checkpoints/<step>/ atomically, removes those beyond `keep`; returns the folder.

        It holds state.safetensors, state.json and their checksums. `meta`: anything that JSON can
        hold. `flatten_state` makes both from nested state.
        """
        folder = self.folder / "checkpoints" / str(step)
        if not self.writes:
            return folder
        folder.parent.mkdir(exist_ok=True)
        temporary = folder.with_name(f".{step}.{secrets.token_hex(4)}.tmp")
        try:
            with disk_errors(folder):
                temporary.mkdir()
                save_file(_unshare(tensors), temporary / "state.safetensors")
                size = (temporary / "state.safetensors").stat().st_size
                text = json.dumps({"step": step, "bytes": size, "meta": meta})
                (temporary / "state.json").write_text(text, encoding="utf-8")
                (temporary / SUMS).write_text(_checksums(temporary), encoding="utf-8")
                for path in (*temporary.iterdir(), temporary):
                    sync_to_disk(path)
                _remove_folder(folder)  # only a run that saves one step twice has it
                os.replace(temporary, folder)
                sync_to_disk(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self.keep:
            for old in self._checkpoints()[self.keep :]:
                _remove_folder(old)
        return folder

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none.

        Prints a line for each damaged one that is skipped. Raises UserError where all of them
        are damaged, and for one that cannot be read now: it may be whole.
        """
        folders = self._checkpoints()
        for folder in folders:
            try:
                return _read_checkpoint(folder)
            except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
                print(f"checkpoint {folder} is damaged ({error}) and passed over", flush=True)
            except OSError as error:
                advice = f"try again, or remove {folder} to go back to the one before it"
                reason = error.strerror or error
                raise UserError(
                    f"checkpoint {folder} cannot be read ({reason}); {advice}"
                ) from error
        if folders:
            raise UserError(
                f"{self.folder} has no whole checkpoint to resume from; "
                f"start again with --overwrite, which moves it to {self.folder.name}.bak"
            )
        return None

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, damaged or not; None where there is none."""
        return next((int(folder.name) for folder in self._checkpoints()), None)

    def _checkpoints(self) -> list[Path]:
        """Folders of checkpoints, newest first."""
        found = (self.folder / "checkpoints").glob("*")
        folders = [path for path in found if re.fullmatch(r"\d+", path.name) and path.is_dir()]
        return sorted(folders, key=lambda path: int(path.name), reverse=True)

    def _rewind(self) -> None:
        """Removes everything after the newest whole checkpoint, and temporary files."""
        for path in [path for path in self.folder.rglob(".*") if TEMPORARY.fullmatch(path.name)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        checkpoint = self.load_checkpoint()
        # Without a checkpoint everything is repeated, the validation before the first step too.
        step = checkpoint.step if checkpoint else -1
        for folder in self._checkpoints():
            if int(folder.name) > step:
                _remove_folder(folder)
        for path in [self.folder / f"{name}.jsonl" for name in LOGS]:
            if not path.is_file():
                continue
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_done_by(line, step)]
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(kept))


def nonfinite_names(tensors: Mapping[K, Tensor]) -> list[K]:
    """The names of the tensors that hold NaN or infinity. One sync with the device."""
    floating: list[tuple[K, Tensor]] = []
    for name, tensor in tensors.items():
        parts = [part.detach() for part in plain_tensors(tensor)]
        floating += [(name, t) for t in parts if t.is_floating_point() and t.numel()]
    if not floating:
        return []
    device = max((t.device for _, t in floating), key=lambda d: d.type != "cpu")
    exact = torch.float32 if device.type == "mps" else torch.float64
    wide = [t if t.element_size() > 1 else t.float() for _, t in floating]
    largest = [torch.linalg.vector_norm(t, math.inf).to(device, exact) for t in wide]
    are_finite = torch.stack(largest).isfinite().tolist()
    bad = [name for (name, _), is_finite in zip(floating, are_finite) if not is_finite]
    return list(dict.fromkeys(bad))


def flatten_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """(flat tensors, JSON) from nested dicts, lists, tuples, tensors, numbers, strings, None.

    `unflatten_state` gives the same tree, floats to the bit, with TensorParts in the place of
    tensors that consist of others. Raises TypeError naming the place of anything else. Tensors are
    not copied.
    """
    tensors: dict[str, Tensor] = {}

    def encode(node: Any, path: str) -> Any:
        if isinstance(node, Tensor) and (parts := split_tensor(node)) is not None:
            return {"$": "parts", "items": encode(dict(parts), path)}
        if isinstance(node, Tensor):
            name = path if path not in tensors else f"{path}#{len(tensors)}"
            tensors[name] = node.detach()
            return {"$": "tensor", "name": name}
        if node is None or isinstance(node, (bool, str)) or type(node) is int:
            return node
        if isinstance(node, float):  # json writes a text that reads back as the same double
            is_finite = math.isfinite(node)
            return float(node) if is_finite else {"$": "float", "text": repr(float(node))}
        if isinstance(node, (list, tuple)):
            items = [encode(item, f"{path}/{i}".lstrip("/")) for i, item in enumerate(node)]
            return items if isinstance(node, list) else {"$": "tuple", "items": items}
        if isinstance(node, dict):
            values = [encode(value, f"{path}/{key}".lstrip("/")) for key, value in node.items()]
            if all(type(key) is str and key != "$" for key in node):
                return dict(zip(node, values))
            keys = [encode(key, f"{path}/key") for key in node]
            return {"$": "dict", "items": [list(pair) for pair in zip(keys, values)]}
        raise TypeError(
            f"{path or 'the state'} is a {type(node).__name__}; "
            "a checkpoint holds tensors, numbers, strings, None, lists, tuples, dicts"
        )

    return tensors, encode(tree, "")


def unflatten_state(tensors: dict[str, Tensor], meta: Any) -> Any:
    """The inverse of `flatten_state`. Raises ValueError where a file has anything else."""
    if isinstance(meta, list):
        return [unflatten_state(tensors, item) for item in meta]
    if not isinstance(meta, dict):
        return meta
    if "$" not in meta:
        return {key: unflatten_state(tensors, value) for key, value in meta.items()}
    kind, name, text, items = (meta.get(key) for key in ("$", "name", "text", "items"))
    if kind == "tensor" and isinstance(name, str) and name in tensors:
        return tensors[name]
    if kind == "float" and isinstance(text, str):
        return float(text)
    if kind == "tuple" and isinstance(items, list):
        return tuple(unflatten_state(tensors, items))
    if kind == "parts" and isinstance(items, dict) and "$" not in items:
        return TensorParts(unflatten_state(tensors, items))
    if kind == "dict" and isinstance(items, list):
        return _unflatten_items(tensors, items)
    raise ValueError(f"{shorten_value(meta)} is no part of a state")


def _unflatten_items(tensors: dict[str, Tensor], items: list[Any]) -> dict[Any, Any]:
    """The dictionary of a list of [key, value]; its keys are no texts alone."""
    table = {}
    for item in items:
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"{shorten_value(item)} is no key with its value")
        key, value = unflatten_state(tensors, item)
        if not isinstance(key, Hashable):
            raise ValueError(f"{shorten_value(key)} is no key")
        table[key] = value
    return table


def _read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises ValueError and others where it is damaged."""
    text = read_text(folder / "state.json", LONGEST_JSON)
    state = parse_object(text, "its state.json", "the file is damaged", STATE_FIELDS)
    size = (folder / "state.safetensors").stat().st_size
    if size != state["bytes"] or state["step"] != int(folder.name):
        raise ValueError("its files do not belong together")
    sums = folder / SUMS  # older checkpoints have none
    if sums.is_file() and sums.read_bytes() != _checksums(folder).encode():
        raise ValueError(f"its files are not those of {SUMS}")
    tensors = load_file(folder / "state.safetensors")
    if bad := nonfinite_names(tensors):
        raise ValueError(f"{bad[0]} holds NaN or infinity")
    return Checkpoint(state["step"], tensors, state.get("meta"))


def _unshare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as contiguous CPU tensors without shared memory, which safetensors refuses.

    Prodigy's d, for example, is one tensor in the state of every group.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if (pointer := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()
        seen.add(pointer)
        apart[name] = tensor
    return apart


def _checksums(folder: Path) -> str:
    """Lines of b2sum for a checkpoint's files; takes a second per gigabyte."""
    lines = []
    for name in ("state.json", "state.safetensors"):
        with open(folder / name, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'blake2b').hexdigest()}  {name}\n")
    return "".join(lines)


def _is_done_by(line: bytes, step: int) -> bool:
    """Whether a log line was written at or before `step`; False for an incomplete last line."""
    if not line.endswith(b"\n"):
        return False
    try:
        return parse_object(line.decode(), "a line", "", STEP_FIELD)["step"] <= step
    except ValueError:
        return False


def _back_up(folder: Path) -> None:
    """Moves OUT to OUT.bak, and an OUT.bak that is already there to the first free OUT.bak.N."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(
            f"--overwrite would move {folder}, in which this command runs; "
            "start it from another folder"
        )
    backup = folder.with_name(folder.name + ".bak")
    try:
        if os.path.lexists(backup):
            numbered = (folder.with_name(f"{backup.name}.{n}") for n in itertools.count(1))
            backup.rename(next(path for path in numbered if not os.path.lexists(path)))
        folder.rename(backup)
    except OSError as error:
        # a mount point, a layer of a container, another user's folder, a name too long
        raise UserError(
            f"--overwrite cannot move {folder} to {backup.name} ({error.strerror}); "
            "name another --out"
        ) from error


def _remove_folder(folder: Path) -> None:
    """Renames a folder, then removes it: if killed in between, the rest has an unused name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        folder.rename(gone)
        shutil.rmtree(gone)
