"""
Writes a merged model as what it is: a copy of the base's files with a few changed tensors.

Unchanged bytes are copied inside the kernel; of the others one chunk per worker is in memory at a time.
"""

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import InputError, one_line
from align.merge.checkpoints import FLOATS, ITEM_SIZES, Checkpoint, StoredTensor
from align.merge.plan import BASE_WRAPPER, EMBEDDING, MergedTensor, MergePlan, find_adapter_file, refuse_unknown

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

COPY_BYTES = 64 << 20  # between two steps of the progress bar


def write_files(plan: MergePlan, folder: Path, workers: int, check: bool, report: Callable[[int], None]) -> None:
    """
    Writes the plan's files and their index into `folder`; `report` gets every count of bytes written.

    With `check` a NaN or an infinity raises InputError, in changed tensors and in copied ones.
    """
    lock = threading.Lock()

    def count(size: int) -> None:
        with lock:
            report(size)

    pool = ThreadPoolExecutor(workers)
    with ExitStack() as stack:
        outs, copies, merges = [], [], []
        for file, tensors in plan.files.items():
            outs.append(stack.enter_context((folder / file).open("wb", buffering=0)))
            header = _header(tensors)
            outs[-1].write(header)
            for tensor, offset, size in _runs(tensors, len(header)):
                job = (tensor, offset, outs[-1].fileno())
                copies.append((*job, size)) if tensor.is_copy else merges.append(job)
        try:
            jobs = [pool.submit(_copy, *job, count) for job in copies]
            import torch  # takes two seconds, in which the kernel copies

            torch.set_num_threads(1)  # the workers are the threads
            jobs += [pool.submit(_merge, *job, check, count) for job in merges]
            if check:
                copied = [tensor for tensor in plan.tensors if tensor.is_copy and tensor.dtype in FLOATS]
                jobs += [pool.submit(_check_copied, tensor) for tensor in copied]
            for done in as_completed(jobs):
                done.result()
            list(pool.map(os.fsync, outs))
        finally:
            pool.shutdown(cancel_futures=True)  # before the files are closed
    if list(plan.files) != ["model.safetensors"]:
        places = {tensor.name: file for file, tensors in plan.files.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(tensors: list[MergedTensor]) -> bytes:
    """The head of a safetensors file: its own length in 8 bytes, then JSON, padded so that the data is aligned."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(tensors: list[MergedTensor], offset: int) -> Iterator[tuple[MergedTensor, int, int]]:
    """
    What one job writes: a first tensor, its offset in the new file, and a number of bytes. Unchanged tensors that are
    neighbours in the old file too make one run; every other tensor is a run of its own.
    """
    first, begin = None, offset
    for tensor in tensors:
        distance = offset - begin
        follows = (
            first is not None
            and first.is_copy
            and tensor.is_copy
            and (tensor.source.path, tensor.source.offset) == (first.source.path, first.source.offset + distance)
        )
        if not follows:
            if first is not None:
                yield first, begin, distance
            first, begin = tensor, offset
        offset += tensor.nbytes
    if first is not None:
        yield first, begin, offset - begin


def _copy(tensor: MergedTensor, offset: int, out: int, size: int, count: Callable[[int], None]) -> None:
    """Copies `size` bytes from where `tensor` lies in the base to `offset` in `out`, inside the kernel if it can."""
    path, start = tensor.source.path, tensor.source.offset
    with path.open("rb", buffering=0) as source:
        done = 0
        while done < size:
            left = min(COPY_BYTES, size - done)
            try:
                copied = os.copy_file_range(source.fileno(), out, left, start + done, offset + done)
            except OSError as error:  # between some file systems, and on some, the kernel does not copy
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                block = os.pread(source.fileno(), min(left, 1 << 20), start + done)
                copied = _write(out, memoryview(block), offset + done)
            if not copied:
                raise InputError(f"{path} became shorter while it was copied: did something else change it?")
            done += copied
            count(copied)


def _write(out: int, memory: memoryview, offset: int) -> int:
    size = len(memory)
    while memory:
        written = os.pwrite(out, memory, offset)
        memory, offset = memory[written:], offset + written
    return size


def _merge(tensor: MergedTensor, offset: int, out: int, check: bool, count: Callable[[int], None]) -> None:
    from align.merge.arithmetic import all_finite, as_bytes, merged_chunks

    for start, values in merged_chunks(tensor):
        if check and not all_finite(values):
            raise _not_finite(tensor.name, (tensor.update.b if tensor.update else tensor.source).path)
        count(_write(out, as_bytes(values), offset + start * ITEM_SIZES[tensor.dtype]))


def _check_copied(tensor: MergedTensor) -> None:
    from align.merge.arithmetic import is_finite

    if not is_finite(tensor.source):
        raise _not_finite(tensor.name, tensor.source.path)


def verify_files(plan: MergePlan, written: Checkpoint, samples: int = 16) -> None:
    """
    Reads back what was written: every tensor in its place, with its shape and dtype; the first chunk of some changed
    tensors computed again, the first and last bytes of some unchanged ones compared with the base.
    """
    found = written.tensors
    planned = {tensor.name: (tensor, file) for file, tensors in plan.files.items() for tensor in tensors}
    for name, (tensor, file) in planned.items():
        other = found.get(name)
        if other is None or (other.dtype, other.shape, other.path.name) != (tensor.dtype, tensor.shape, file):
            raise OSError(errno.EIO, f"{name} was not written as planned")
    for kind in (True, False):
        tensors = [tensor for tensor, _ in planned.values() if tensor.is_copy == kind]
        for tensor in tensors[:: max(1, len(tensors) // samples)]:
            if not _reads_back(tensor, found[tensor.name]):
                raise OSError(errno.EIO, f"{tensor.name} reads back other than it was written: is the disk failing?")


def _reads_back(tensor: MergedTensor, written: StoredTensor) -> bool:
    from align.merge.arithmetic import as_bytes, merged_chunks

    if not tensor.is_copy:
        _, values = next(merged_chunks(tensor))
        expected = bytes(as_bytes(values))
        return _bytes(written, 0, len(expected)) == expected
    end = max(0, written.nbytes - 4096)
    return all(_bytes(tensor.source, start, 4096) == _bytes(written, start, 4096) for start in (0, end))


def check_finite(written: Checkpoint) -> None:
    """The check of values for a model that was not written chunk by chunk."""
    from align.merge.arithmetic import is_finite

    for name, tensor in written.tensors.items():
        if tensor.dtype in FLOATS and not is_finite(tensor):
            raise _not_finite(name, "the adapter")


def _not_finite(name: str, cause: object) -> InputError:
    hint = "--verify False writes it all the same"
    return InputError(f"{name} would hold NaN or infinity: did the run that wrote {cause} diverge? {hint}")


def _bytes(tensor: StoredTensor, start: int, size: int) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + start)
        return file.read(min(size, tensor.nbytes - start))


def merge_through_peft(
    base: Path, base_config: "PretrainedConfig", adapter: Path, config: dict, folder: Path, dtype: str | None
) -> None:
    """What cannot be streamed: PEFT merges the whole model in memory and transformers saves it into `folder`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    from align.merge.arithmetic import TORCH_DTYPES

    if config["peft_type"] not in list(PeftType):
        known = ", ".join(sorted(PeftType))
        raise InputError(f"{adapter}/adapter_config.json: peft_type is {config['peft_type']!r}, none of {known}")
    refuse_unknown(adapter, config, {each.name for each in fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])})
    try:
        weights = load_peft_weights(str(adapter), device="cpu")
    except Exception as error:  # torch.load has no error class of its own
        raise InputError(f"{find_adapter_file(adapter)} cannot be read ({one_line(error)}): copy it again") from None
    if "niter" in str(config.get("init_lora_weights")):  # PEFT finds the base's part anew, with random numbers
        logger.warning(
            "Warning: init_lora_weights of %s is %s, whose change of the base is not found twice alike: the merged "
            "model is close to the trained one, and not equal.",
            *(adapter, config["init_lora_weights"]),
        )
    loading = {"torch_dtype": TORCH_DTYPES.get(dtype or "", "auto")}
    model_class = AutoModelForCausalLM
    if config.get("task_type") == "SEQ_CLS":
        model_class = AutoModelForSequenceClassification
        heads = [value for name, value in weights.items() if name.endswith(("score.weight", "classifier.weight"))]
        if heads:
            base_config.num_labels = heads[0].shape[0]
    try:
        model, loaded = model_class.from_pretrained(base, config=base_config, output_loading_info=True, **loading)
    except (OSError, ValueError) as error:
        raise InputError(f"{base} cannot be loaded: {one_line(error)}") from None
    held = {name.removeprefix("base_model.model.").replace(".modules_to_save.", ".") for name in weights}
    if lacking := sorted(set(loaded["missing_keys"]) - held):  # of a format whose names were not read before
        raise InputError(f"{base} holds no weights for {lacking[0]}: copy or download it again")
    rows = [value.shape[0] for name, value in weights.items() if EMBEDDING.search(BASE_WRAPPER.sub("", name))]
    if rows and max(rows) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(rows))
    before = hash_tensors(model)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, TypeError) as error:  # PEFT's words for an adapter that does not fit
        raise InputError(f"{adapter}: {one_line(error)}") from None
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise InputError(f"{adapter}: {config['peft_type']} changes no weights, so cannot merge")
    has_bases = bool(rows) or any(map(BASE_WRAPPER.search, weights))
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=has_bases)
    if homeless := sorted(set(weights) - set(placed)):
        raise InputError(f"{adapter}: {homeless[0]} finds no place in {base}")
    lacking = sorted(name for name in set(placed) - set(weights) if ".lora_" in name)
    if lacking:
        logger.warning(
            "Warning: %s lacks %d tensors that its adapter_config.json names, such as %s: there the merged "
            "model equals the base.",
            *(adapter, len(lacking), lacking[0]),
        )
    tuner = adapted.base_model
    adapts = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    merged = merge_as_trained(adapted)
    after = hash_tensors(merged)
    changed = {name for name, digest in before.items() if after.get(name) != digest}
    zeros = [each for each in adapts if not any(f"{name}.".startswith(f"{each}.") for name in changed)]
    what = "zero or too small for the base's numbers"
    tell_zeros(find_adapter_file(adapter), zeros, len(adapts), is_base=not changed, what=what)
    merged.generation_config = GenerationConfig()  # an invalid one could not be saved; the base's own file is copied
    try:
        merged.save_pretrained(folder)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # the disk's
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        raise
    (folder / "generation_config.json").unlink(missing_ok=True)


def hash_tensors(model: "PreTrainedModel") -> dict[str, str]:
    """A hash of each tensor by its name."""
    import torch
    import xxhash

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return {
        name: xxhash.xxh3_128(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def tell_zeros(adapter: Path, zeros: Sequence[str], updates: int, is_base: bool, what: str = "zero") -> None:
    """Warns of updates that change nothing: `zeros` are their modules, `adapter` is its file, `what` says why."""
    if is_base:
        logger.warning("Warning: every update of %s is %s, so the merged model is the base.", adapter, what)
    elif zeros:
        logger.warning(
            "Warning: %d of %d updates of %s are %s, such as that of %s: nothing was learnt there.",
            *(len(zeros), updates, adapter, what, zeros[0]),
        )


def merge_as_trained(adapted: "PeftModel") -> "PreTrainedModel":
    """PEFT's merge; where head and embedding are one tensor and one of them was trained, only that one changes."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (getattr(end, "base_layer", end) for end in ends)
    adapts = any(isinstance(end, BaseTunerLayer) for end in ends)
    if adapts and head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged = adapted.merge_and_unload()
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None and not torch.equal(head.weight, embedding.weight):
        for config in (merged.config, merged.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    return merged
