"""Answers on the disk as they come: a run that is killed keeps them, and --resume goes on behind them."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from align import __version__
from align.errors import InputError
from align.whole import write_file

UNFINISHED, SETTINGS, FINISHED = "generations.unfinished.jsonl", "generation_settings.json", "generations.jsonl"
# Flags that change no text, or whose effect is in the tokens of the prompts or the files of the model
LEFT_OUT = tuple(
    """model_name_or_path tokenizer_name_or_path peft_model model_revision token trust_remote_code
    trust_remote_code_tokenizer prompt prompt_file dataset_name dataset_split column_name dataset_max_samples
    use_hpu_graphs limit_hpu_graphs skip_probe""".split()
)
# Files whose content counts; weights count by size and time
READ = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = (".safetensors", ".bin", ".model", ".py")


def describe_settings(
    arguments: Sequence[Any], folders: dict[str, Path | None], encoded: list[list[int]], world_size: int
) -> dict[str, Any]:
    """All that answers depend on: the values of flags, and what stands for the contents of folders and prompts."""
    flags = {name: value for group in arguments for name, value in vars(group).items() if name not in LEFT_OUT}
    prompts = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    files = {name: _fingerprint(folder) if folder else None for name, folder in folders.items()}
    return {"version": __version__, "cards": world_size, "prompts": prompts, "files": files, "flags": flags}


def _fingerprint(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in READ:
            content.update(path.name.encode() + path.read_bytes())
        elif path.suffix in WEIGHTS:
            about = path.stat()
            content.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
    return content.hexdigest()


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if then.get("prompts") != now["prompts"]:
        yield "the prompts are others"
    files = then.get("files") or {}
    for name, fingerprint in now["files"].items():
        if files.get(name) != fingerprint:
            yield f"the files of --{name} are others"
    flags = then.get("flags") or {}
    for name, value in now["flags"].items():
        if flags.get(name) != value:
            yield f"--{name} was {flags.get(name)}, now {value}"
    for name in ("cards", "version"):
        if then.get(name) != now[name]:
            yield f"{name}: {then.get(name)}, now {now[name]}"


class KeptAnswers:
    """The answers of a run in its output folder, each a JSON line with its number, in the order of their coming.

    When all are there they get their final name, in the order of the prompts. `answers` has what an earlier run left,
    by place from 0.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], number: int, resumes: bool, overwrites: bool):
        """`number` answers are wanted. Raises `InputError` where the folder holds another run."""
        self.folder, self.settings, self.number = folder, settings, number
        self.answers: dict[int, dict[str, Any]] = {}
        self.bytes = 0  # bytes of the file that is there, without a line that breaks off
        self.file: IO[bytes] | None = None
        self.is_finished = False
        if overwrites:
            return
        self._read()
        self.is_finished = not self.answers and (folder / FINISHED).exists()
        if not self.answers and not self.is_finished:
            return
        if not resumes:
            what = "another run" if self.is_finished else f"{len(self.answers)} answers of a run that was not finished"
            way = "" if self.is_finished else "add --resume to go on, "
            raise InputError(f"--output_dir: {folder} holds {what}; {way}choose another, or add --overwrite_output_dir")
        self._compare()

    def _read(self) -> None:
        path = self.folder / UNFINISHED
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for row, line in enumerate(lines[:-1], 1):  # the last one breaks off, or is empty
            try:
                answer = json.loads(line)
                self.answers[answer.pop("number") - 1] = answer
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(
                    f"--output_dir: {path}, row {row}: is damaged; remove the row, or add --overwrite_output_dir"
                ) from error
            self.bytes += len(line) + 1

    def _compare(self) -> None:
        path = self.folder / SETTINGS
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {path} cannot be read: {error}; add --overwrite_output_dir instead") from error
        if differences := list(_differences(then, json.loads(json.dumps(self.settings)))):
            raise InputError(
                f"--resume: {self.folder} was begun with other settings: {'; '.join(differences)}; give the same, or "
                "begin anew with --overwrite_output_dir instead of --resume"
            )

    def has(self, places: Sequence[int]) -> bool:
        return self.is_finished or all(place in self.answers for place in places)

    def open(self) -> None:
        """Begins to write: behind the answers that are there, or in place of what an earlier run left."""
        self.file = (self.folder / UNFINISHED).open("ab")
        self.file.truncate(self.bytes)
        write_json(self.folder / SETTINGS, self.settings)
        (self.folder / FINISHED).unlink(missing_ok=True)

    def add(self, answers: dict[int, dict[str, Any]]) -> None:
        """Answers by place, on the disk when this returns."""
        if self.file is None:
            raise ValueError("`open` comes first")
        lines = [to_json({"number": place + 1} | answer) + "\n" for place, answer in answers.items()]
        self.file.write("".join(lines).encode("utf-8"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers |= answers

    def finish(self) -> None:
        write_json(self.folder / FINISHED, [self.answers[place] for place in range(self.number)])
        (self.folder / UNFINISHED).unlink()
        if self.file is not None:
            self.file.close()


def to_json(content: Any, **options: Any) -> str:
    """Text stays readable in every script."""
    return json.dumps(content, ensure_ascii=False, **options)


def write_json(path: Path, content: dict | list[dict]) -> None:
    """Writes an object as JSON, or a list as JSON lines; the file appears whole or not at all."""
    lines = [to_json(content, indent=2)] if isinstance(content, dict) else map(to_json, content)
    write_file(path, "".join(f"{line}\n" for line in lines))
