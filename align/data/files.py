"""Files of rows, as they come: JSON lines, JSON, CSV and Parquet, compressed or not, each row with its place.

A row stays JSON text until it is used, so a column may have another type in each row: a date, a number or a list in a
column that nobody asked for stops nothing, and an object has just the keys that it has in the file.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import xxhash
from datasets import Dataset, IterableDataset
from datasets.data_files import get_data_patterns, resolve_pattern
from datasets.table import MemoryMappedTable

from align.data.formats import RowError, without_nones
from align.errors import InputError
from align.output import CACHES, naming_a_full
from align.whole import replace_file, write_file

logger = logging.getLogger(__name__)

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ROW, PLACE, UNREADABLE = "_row", "_place", "_unreadable"  # JSON text, file and number, what is wrong with the row
SCHEMA = pa.schema({ROW: pa.string(), PLACE: pa.string(), UNREADABLE: pa.string()})
BATCH = 1000  # rows written at once
BETWEEN = re.compile(r"[ \t\r\n,]*")  # two values of a JSON file
CHUNK = 1 << 20  # characters or bytes read at once


def find_kind(path: Path) -> str:
    """The ending that says how to read a file, without that of its compression."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def is_readable(path: Path) -> bool:
    return find_kind(path) in KINDS


# ---------------------------------------------------------------- rows


def read_rows(file: str) -> Iterator[dict[str, str]]:
    """The rows of a file that are not empty: each as JSON text, with its place, and why it cannot be read if so."""
    path = Path(file)
    readers = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    try:
        for number, text, reason in readers.get(find_kind(path), _read_parquet)(path):
            yield {ROW: text, PLACE: f"{path.name}, row {number}", UNREADABLE: reason}
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, csv.Error, pa.ArrowInvalid) as error:
        raise InputError(f"--dataset_name: {path} cannot be read: {' '.join(str(error).split())}") from error


def _open(path: Path) -> IO[bytes]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    file = openers.get(path.suffix.lower(), open)(path, "rb")
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise InputError(f"--dataset_name: {path} is UTF-16; save it as UTF-8")
    return file


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    return io.BufferedReader(_ZstandardFile(path))


class _ZstandardFile(io.RawIOBase):
    """All frames of a file. The library's own reader takes a file that breaks off for a whole one."""

    def __init__(self, path: Path):
        self.file, self.ready = path.open("rb"), b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard  # the only compression here that Python does not bring

        while not self.ready:
            block = self.frame.unused_data if self.frame and self.frame.eof else b""
            block = block or self.file.read(CHUNK)
            if not block:
                if self.frame and not self.frame.eof:
                    raise EOFError("it breaks off before its end")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = self.frame.decompress(block)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def _read_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                text, reason = line.decode("utf-8").strip(), ""
            except UnicodeDecodeError as error:
                text, reason = "", f"not UTF-8 at byte {error.start + 1}"
            if text or reason:
                yield number, text, reason


def _read_json(path: Path) -> Iterator[tuple[int, str, str]]:
    """The objects of a list, or one after the other; a single object that holds nothing but a list gives that list."""
    decoder, number = json.JSONDecoder(object_pairs_hook=_make_object), 0
    with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
        text = file.read(CHUNK).lstrip()
        is_list = text.startswith("[")
        position = int(is_list)
        while True:
            if between := BETWEEN.match(text, position):
                position = between.end()
            try:
                value, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if more := file.read(max(CHUNK, len(text) - position)):
                    text, position = text[position:] + more, 0
                    continue
                if text[position:].strip() != ("]" if is_list else ""):
                    reason = f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos - position + 1}"
                    raise InputError(
                        f"--dataset_name: {path}, row {number + 1}: {reason}; what follows is not read"
                    ) from error
                return
            except (ValueError, RecursionError) as error:
                raise InputError(f"--dataset_name: {path}, row {number + 1}: {error}") from None
            for each in _rows_within(value) if number == 0 and not is_list else [value]:
                number += 1
                yield number, json.dumps(each), ""


def _rows_within(value: Any) -> list:
    """The rows of an object that holds nothing but a list of them; else the object is the row."""
    values = list(value.values()) if isinstance(value, dict) else []
    if len(values) == 1 and isinstance(values[0], list):
        objects = [each for each in values[0] if isinstance(each, dict) and not each.keys() & {"role", "from"}]
        return values[0] if len(objects) == len(values[0]) else [value]
    return [value]


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """Every cell is text: what looks like a number, a date or NA stays as it is written."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as binary:
        lines = (line.decode("utf-8", errors="surrogateescape") for line in binary)
        first = next((line for line in lines if line.strip("\ufeff\r\n ")), "").removeprefix("\ufeff")
        wanted = "\t,;" if find_kind(path) == ".tsv" else ",;\t"  # spreadsheets of some countries use ;
        separator = next((each for each in wanted if each in first), ",")
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if twice := {name for name in header if header.count(name) > 1}:
            raise InputError(f"--dataset_name: {path} has more than one column {min(twice)!r}; rename or remove one")
        for number in itertools.count(1):
            try:
                cells = next(reader)
                while not cells:  # a blank line
                    cells = next(reader)
                reason = "" if len(cells) == len(header) else f"{len(cells)} cells, but {len(header)} columns"
                "".join(cells).encode("utf-8")
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    raise InputError(
                        f"--dataset_name: {path}, row {number}: a quote is opened and not closed"
                    ) from error
                reason = f"no CSV: {error}"
            except UnicodeEncodeError:
                reason = "not UTF-8"
            yield number, "" if reason else json.dumps(dict(zip(header, cells, strict=True))), reason


def _read_parquet(path: Path) -> Iterator[tuple[int, str, str]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH):
        for row in batch.to_pylist():
            number += 1
            values = {key: without_nones(value) for key, value in row.items()}
            yield number, json.dumps(values, default=_as_text), ""


def _as_text(value: Any) -> Any:
    """A date or a decimal number as text; where text is wanted, bytes are refused."""
    return {"bytes": str(value)} if isinstance(value, bytes) else str(value)


def parse_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that came from a file."""
    if row[UNREADABLE]:
        raise RowError(row[UNREADABLE])
    try:
        values = json.loads(row[ROW], object_pairs_hook=_make_object)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RowError:
        raise
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets within brackets
        raise RowError(f"not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise RowError(f"{type(values).__name__}, not an object with columns")
    return values


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"the key `{next(name for name in names if names.count(name) > 1)}` twice in one object")
    return made


def check_characters(text: str, row: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Refuses halves of characters, which JSON can hold, in the `columns` that are used of `row`, read from `text`."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    for column in columns:
        try:
            json.dumps(row.get(column), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(f"column `{column}` holds half a character (a lone surrogate), which is not text") from None


def show_rows(batch: Mapping[str, list]) -> dict[str, list]:
    """Gives whoever reads a data set of such rows their columns."""
    rows = [parse_row(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    columns = dict.fromkeys(column for row in rows for column in row)
    return {column: [row.get(column) for row in rows] for column in columns}


# ---------------------------------------------------------------- data sets


def load_files(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """The rows of all files, written to the cache once for each content."""
    names = list(map(str, files))
    if streaming:
        return IterableDataset.from_generator(_generate, gen_kwargs={"files": names})
    content = xxhash.xxh3_128()
    for file in files:
        content.update(f"{file.name} {file.stat().st_size} {checksum(file)} {checksum(Path(__file__))}".encode())
    target = Path(datasets.config.HF_DATASETS_CACHE) / "align" / f"rows-{content.hexdigest()}.arrow"
    if not is_sound(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            naming_a_full(target.parent, CACHES),
            replace_file(target) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
        ):
            rows = []
            for row in _generate(names):
                rows.append(row)
                if len(rows) == BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    rows = []
            writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
        with naming_a_full(target.parent, CACHES):
            seal(target, [target])
    rows = Dataset(MemoryMappedTable.from_file(str(target)), fingerprint=content.hexdigest())
    return rows.with_transform(show_rows)


def _generate(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        yield from read_rows(file)


def find_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder: `datasets` finds the split in a file's name. The log names the others."""
    splits = {}
    for split, patterns in get_data_patterns(str(folder)).items():
        files = [file for pattern in patterns for file in _resolve(pattern, folder)]
        if files := list(filter(is_readable, files)):
            splits[str(split)] = files
    if not splits:
        raise InputError(f"--dataset_name: {folder} holds no file that ends in {', '.join(KINDS)}")
    used = {file.resolve() for files in splits.values() for file in files}
    others = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.resolve() not in used]
    names = [str(file.relative_to(folder)) for file in others]
    names = [name for name in names if not name.lower().startswith(("readme", "license", ".")) and "/." not in name]
    if names:
        logger.warning(f"{folder}: not read: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}")
    return splits


def _resolve(pattern: str, folder: Path) -> list[Path]:
    try:
        return [Path(file) for file in resolve_pattern(pattern, str(folder))]
    except FileNotFoundError:  # another pattern of the same split may find some
        return []


def checksum(file: Path) -> str:
    content = xxhash.xxh3_128()
    with open(file, "rb") as blocks:
        while block := blocks.read(CHUNK):
            content.update(block)
    return content.hexdigest()


def seal(target: Path, files: Iterable[Path]) -> None:
    """Writes down beside `target` what its files hold."""
    sums = {file.name: checksum(file) for file in files}
    write_file(target.with_suffix(".sums"), json.dumps(sums))


def is_sound(target: Path) -> bool:
    """Whether the files of `target` are as they were sealed; damaged ones are named in the log and removed."""
    seal = target.with_suffix(".sums")
    try:
        sums = json.loads(seal.read_text(encoding="utf-8"))
        if all(checksum(target.parent / name) == sums[name] for name in sums):
            return True
        logger.warning(f"{target} in the cache is damaged, and is made anew")
    except FileNotFoundError:
        pass  # not made yet, or not to its end
    except (ValueError, TypeError):
        logger.warning(f"{seal} in the cache is damaged, and is made anew")
    for file in (seal, *target.parent.glob(f"{target.stem}*.arrow")):
        file.unlink(missing_ok=True)
    return False
