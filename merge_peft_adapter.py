"""Merges a LoRA adapter into its base model, shard by shard: a 70B model needs no more memory than a small one.

python merge_peft_adapter.py --adapter_model_name sft --output_name sft/final_merged_checkpoint
"""

import argparse
import fnmatch
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from align import __version__
from align.cli import SWITCH, Parser, run_script
from align.errors import DISK_FULL, InputError, one_line
from align.merge.checkpoints import (
    TORCH_NAMES,
    Checkpoint,
    NotStreamableError,
    find_folder,
    identify_folder,
    open_checkpoint,
    read_json,
    same_bytes,
)
from align.merge.plan import (
    SCALED,
    Adapter,
    MergePlan,
    find_adapter_file,
    find_missing,
    find_untouched,
    find_zeros,
    open_adapter,
    plan_merge,
)
from align.merge.writing import check_finite, merge_through_peft, tell_zeros, verify_files, write_files
from align.models.guard import (
    QUANTIZATION_KEYS,
    check_adapter,
    check_folder,
    check_head,
    check_layers,
    check_sizes,
    check_weights,
    load_config,
)
from align.ranges import limit
from align.whole import replace_folder, restore_folder

logger = logging.getLogger("merge_peft_adapter")

DTYPES = {TORCH_NAMES[name]: name for name in ("F32", "F16", "BF16")}
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken"),
    *("chat_template*", "spiece.model", "sentencepiece*.model", "tokenization_*.py", "tekken.json"),
)
TOKENIZER_FOLDERS = ("additional_chat_templates",)
VOCABULARIES = (  # a tokenizer has at least one of them
    *("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model", "sentencepiece*.model"),
    "tekken.json",
)
MODEL_FILES = (
    *("config.json", "generation_config.json", "*processor_config.json", "params.json", "*.py"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
RECORD = "merge_info.json"
MANIFEST = "manifest.json"  # that sft.py and dpo.py leave beside an adapter


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--adapter_model_name", required=True, help="adapter: a folder or a hub name")
    parser.add_argument("--base_model_name", help="base model: a folder or a hub name (default: the adapter's own)")
    parser.add_argument("--output_name", required=True, help="folder for the merged model")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the merged model (default: the base's)")
    parser.add_argument("--overwrite", **SWITCH, help="replace the model in --output_name")
    parser.add_argument("--verify", **{**SWITCH, "default": True}, help="check what is written")
    workers = min(4, len(os.sched_getaffinity(0)))
    parser.add_argument("--num_workers", type=int, default=workers, help="threads (default: one a core, at most 4)")
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload the merged model to this hub repository")
    limit(parser)
    return parser.parse(argv)


def find_base(named: str | None, adapter: str, recorded: str | None) -> tuple[str, Path]:
    """The base model's name and folder: the one on the command line, else the one that the adapter was trained on."""
    patterns = (*MODEL_FILES, *TOKENIZER_FILES, RECORD, "*.index.json")
    name = named or recorded
    if not name:
        raise InputError(f"--base_model_name: missing, and {adapter}/adapter_config.json names no base; give one")
    flag = "--base_model_name" if named else f"--base_model_name: not given; that of {adapter}/adapter_config.json"
    folder = find_folder(name, flag, *patterns, "model*.safetensors")
    if not (Path(name).is_dir() or any(folder.glob("model*.safetensors"))):
        folder = find_folder(name, flag, *patterns, "pytorch_model*.bin")
    if named and recorded and named != recorded and Path(named).resolve() != Path(recorded).resolve():
        logger.warning("Warning: the adapter was trained on %s, not on --base_model_name %s.", recorded, named)
    return name, folder


def check_base(adapter: Path, name: str, base: Path, is_named: bool) -> None:
    """Finds that a local base's files are others than those the adapter was trained on, if its run has noted them."""
    facts = read_json(adapter / MANIFEST).get("facts") if (adapter / MANIFEST).is_file() else None
    trained_on = facts.get("--model_name_or_path") if isinstance(facts, dict) else None
    is_hash = isinstance(trained_on, str) and re.fullmatch("[0-9a-f]{32}", trained_on)  # of the hub: name and commit
    if not (is_hash and Path(name).is_dir() and (base / "config.json").is_file()):
        return
    if identify_folder(base) != trained_on:
        what = f"{base} is not what {adapter} was trained on: its weights or its config.json are others"
        if not is_named:
            raise InputError(f"--base_model_name: not given; {what}. Give --base_model_name to merge into it anyway")
        logger.warning("Warning: %s.", what)


def check_output(output: Path, overwrite: bool, inputs: dict[str, Path]) -> None:
    for flag, folder in inputs.items():
        if folder.resolve() == output.resolve() or output.resolve() in folder.resolve().parents:
            raise InputError(f"--output_name: {output} is or holds {flag} {folder}; name another folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output_name: {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise InputError(f"--output_name: {output} exists; add --overwrite to replace it, or name another folder")
        if not (output / "config.json").exists():
            raise InputError(f"--output_name: {output} holds no model, so it stays; name another folder")


def check_disk(output: Path, needed: int) -> None:
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--output_name: {parent} has {free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB"
        )


def read_record(path: Path) -> list[dict]:
    merges, needed = read_json(path).get("merges"), ("base_model", "adapter", "adapter_sha256")
    if not isinstance(merges, list) or not all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in needed) for each in merges
    ):
        raise InputError(f"{path} is damaged: it lists what is merged in already; copy it again, or remove it")
    return merges


def record_merge(base_name: str, base: Path, adapter_name: str, adapter: Path) -> list[dict]:
    """What the base's own record says, and this merge; warns when the same adapter is in the base already."""
    merges = read_record(base / RECORD) if (base / RECORD).exists() else []
    sha256 = hashlib.sha256()
    with find_adapter_file(adapter).open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    digest = sha256.hexdigest()
    if any(merge["adapter_sha256"] == digest for merge in merges):
        logger.warning("Warning: %s already holds this adapter; merging it again applies it twice.", base_name)
    return [*merges, {"base_model": base_name, "adapter": adapter_name, "adapter_sha256": digest}]


def write_companions(folder: Path, base: Path, tokenizer: Path, config: dict | None, merges: list[dict]) -> None:
    """Everything but the weights: configuration, tokenizer, lineage, model card."""
    for name in TOKENIZER_FOLDERS:
        if (tokenizer / name).is_dir():
            shutil.copytree(tokenizer / name, folder / name, dirs_exist_ok=True)
    for source, patterns in ((base, MODEL_FILES), (tokenizer, TOKENIZER_FILES)):
        for path in source.iterdir():
            belongs = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
            if belongs and path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    if config is not None and config != read_json(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / RECORD).write_text(json.dumps({"merges": merges, "version": __version__}, indent=2) + "\n")
    root = merges[0]["base_model"]
    steps = "".join(f"{n}. {m['adapter']} (sha256 {m['adapter_sha256'][:16]})\n" for n, m in enumerate(merges, 1))
    link = f"base_model: {root}\n" if root.count("/") == 1 and not Path(root).exists() else ""
    (folder / "README.md").write_text(
        f"---\n{link}library_name: transformers\ntags:\n- lora\n- merged\n---\n\n"
        f"# {Path(merges[-1]['adapter']).name}, merged\n\n"
        f"Base model: {root}\n\nAdapters merged into it, in order:\n\n{steps}"
    )


def find_tokenizer(adapter: Path, base: Path) -> Path:
    """The adapter's folder where it holds a tokenizer that is whole, else the base's."""
    if not (adapter / "tokenizer_config.json").exists():
        return base
    if any(path for name in VOCABULARIES for path in adapter.glob(name)):
        return adapter
    logger.warning("Warning: the tokenizer of %s has no vocabulary (tokenizer.json); the base's is taken.", adapter)
    return base


def compare_vocabularies(tokenizer: Path, embedded: int | None) -> None:
    path = tokenizer / "tokenizer_config.json"
    if not path.exists():
        logger.warning("Warning: neither adapter nor base has a tokenizer, so the merged model has none.")
        return
    tokens = read_json(path).get("added_tokens_decoder", {})
    try:
        beyond = [token["content"] for number, token in tokens.items() if int(number) >= (embedded or math.inf)]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: added_tokens_decoder is not tokens by number: copy or download it again") from None
    if beyond:
        logger.warning("Warning: the tokenizer has tokens beyond the model's %d: %s.", embedded, " ".join(beyond))


def report_gaps(plan: MergePlan, adapter: Adapter) -> None:
    """Warns of an adapter that changes less than it says."""
    zeros = find_zeros(adapter)
    others = adapter.tokens or adapter.values or adapter.base_values
    is_base = 0 < len(zeros) == len(adapter.parts) and not others
    tell_zeros(adapter.file, zeros, len(adapter.parts), is_base)
    if missing := find_missing(plan, adapter):
        logger.warning(
            "Warning: %s lacks %s, which its adapter_config.json names: there the merged model equals the base.",
            *(adapter.file, ", ".join(missing)),
        )
    if untouched := find_untouched(plan, adapter):
        logger.warning(
            "Warning: %s changes %d modules and not %d others that its target_modules name, such as %s.",
            *(adapter.file, len(adapter.parts), len(untouched), untouched[0]),
        )


def report_scale(adapter: Adapter, model_type: str) -> None:
    """Warns of an adapter that means another model before its merge than after it."""
    adapts = adapter.tokens or any("lora_embedding_A" in parts for parts in adapter.parts.values())
    if adapts and model_type in SCALED and not adapter.config.get("peft_version"):
        logger.warning(
            "Warning: %s adapts the embedding of a %s model, whose scale PEFT leaves out until the merge: the merged "
            "model does not say what the adapter says; train the whole embedding (modules_to_save), or none of it.",
            *(adapter.file, model_type),
        )


def report_lost(plan: MergePlan, written: Checkpoint, adapter: Adapter) -> None:
    """Warns of updates that are not zero and too small for the numbers that they are added to."""
    updated = [tensor for tensor in plan.tensors if tensor.update]
    lost = [tensor for tensor in updated if same_bytes(tensor.source, written.tensors[tensor.name])]
    told = {f"{module}.weight" for module in find_zeros(adapter)} if lost else ()
    lost = [tensor for tensor in lost if tensor.name not in told]
    if lost:
        wider = "" if lost[0].dtype == "F32" else "; --dtype float32 keeps small ones"
        logger.warning(
            "Warning: %d of %d updates of %s change no number in %s, such as that of %s%s.",
            *(len(lost), len(updated), adapter.file, TORCH_NAMES[lost[0].dtype], lost[0].name, wider),
        )


def write_weights(plan: MergePlan, folder: Path, adapter: Adapter, workers: int, verify: bool) -> None:
    changed = sum(not tensor.is_copy for tensor in plan.tensors)
    logger.info("Merging: %d of %d tensors change; %d workers", changed, len(plan.tensors), workers)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=None) as progress:
        write_files(plan, folder, workers, verify, progress.update)
    if verify:
        written = open_checkpoint(folder)
        verify_files(plan, written)
        report_lost(plan, written, adapter)


def push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=repository)
    except OSError as error:
        reason = one_line(error)
        raise InputError(f"--push_to_hub: {folder} is complete, but {repository} did not take it ({reason})") from None


def main(argv: list[str] | None = None) -> None:
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # no card is needed: a training run may hold them all
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's doing
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # as any other ending, this clears up
    start = time.monotonic()

    # Check
    adapter = find_folder(args.adapter_model_name, "--adapter_model_name", "adapter_*", *TOKENIZER_FILES)
    adapter_config = check_adapter(adapter, "--adapter_model_name")
    base_name, base = find_base(args.base_model_name, str(adapter), adapter_config.get("base_model_name_or_path"))
    check_base(adapter, base_name, base, is_named=args.base_model_name is not None)
    output = Path(os.path.realpath(os.path.expanduser(args.output_name)))
    try:
        if output.is_symlink():  # what is left of a link once all are followed
            raise InputError(f"--output_name: {output} is a link that leads back to itself; remove it")
        restore_folder(output)
    except (OSError, ValueError) as error:  # a name that is too long, or the root, which has none
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"--output_name: {output} cannot be written ({reason}); name another folder") from None
    check_output(output, args.overwrite, {"--base_model_name": base, "--adapter_model_name": adapter})
    if args.push_to_hub:
        from align.hub import check_login

        check_login(args.push_to_hub)

    # Plan
    check_folder(base, "--base_model_name", trust_remote_code=True)  # copied, and not run
    content = read_json(base / "config.json")
    base_config = {key: value for key, value in content.items() if value or key not in QUANTIZATION_KEYS}
    if not base_config.get("model_type"):
        raise InputError(f"--base_model_name: {base}/config.json has no model_type; copy or download it again")
    dtype = DTYPES.get(args.dtype)
    try:
        opened, checkpoint = open_adapter(adapter, adapter_config), open_checkpoint(base)
        report_scale(opened, base_config["model_type"])
        check_layers(checkpoint, base_config, "--base_model_name")
        wants_head = adapter_config.get("task_type") == "CAUSAL_LM"
        check_head(checkpoint, base_config, "--base_model_name", wants_head)
        check_sizes(checkpoint, base_config, "--base_model_name", has_head=adapter_config.get("task_type") != "SEQ_CLS")
        plan = plan_merge(checkpoint, base_config, opened, dtype)
        report_gaps(plan, opened)
    except NotStreamableError as reason:
        plan = None
        logger.info("Merging through PEFT, with the whole model in memory: %s", reason)
        check_folder(base, "--base_model_name")
        loadable = load_config(base, "--base_model_name", for_merge=True)
        has_head = adapter_config.get("task_type") != "SEQ_CLS"
        check_weights(base, loadable, "--base_model_name", has_head=has_head)
    needed = plan.nbytes if plan else sum(path.stat().st_size for path in base.glob("*model*"))
    check_disk(output, needed)
    if plan and plan.config.get("tie_word_embeddings") != base_config.get("tie_word_embeddings"):
        logger.info("The adapter changes the head or the embedding alone: they are no longer tied")
    tokenizer = find_tokenizer(adapter, base)
    compare_vocabularies(tokenizer, plan.vocabulary if plan else None)
    merges = record_merge(base_name, base, args.adapter_model_name, adapter)

    # Write
    try:
        with replace_folder(output, "--output_name") as folder:
            if plan:
                write_weights(plan, folder, opened, args.num_workers, args.verify)
            else:
                merge_through_peft(base, loadable, adapter, adapter_config, folder, dtype)
                if args.verify:
                    check_finite(open_checkpoint(folder))
            write_companions(folder, base, tokenizer, plan.config if plan else None, merges)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise InputError(f"--output_name: {output} cannot be written ({error.strerror}); nothing is left") from None
    # getrusage counts the parent's too
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 976.6
    seconds = time.monotonic() - start
    logger.info("Wrote %s: %.2f GB in %.1f s, peak memory %d MB", output, needed / 1e9, seconds, peak)
    if args.push_to_hub:
        push(output, args.push_to_hub)


if __name__ == "__main__":
    run_script(main)
