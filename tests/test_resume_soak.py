"""Runs on one and two ranks that are killed wherever they are, stopped, or damaged, and go on with the same command.

Run: pytest tests/test_resume_soak.py, or pytest -m soak tests/test_resume_soak.py (200 kills; SOAK_KILLS and SOAK_SEED
choose others).
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from forks import Nursery, Run, write_configs
from safetensors.torch import load_file
from test_dpo import make_rows
from tiny import save_model

from align.training.checkpoints import find_damage

COMMON = "--logging_steps 3 --disable_tqdm True --bf16 False --save_steps 2 --warmup_steps 0 --eval_strategy no".split()
COMMON += "--learning_rate 1e-2 --max_steps 8 --save_total_limit 2 --num_workers 1 --resume auto".split()
SFT = "--do_train --max_seq_length 64 --per_device_train_batch_size 2".split()
DPO = "--max_prompt_length 48 --max_length 96 --gradient_accumulation_steps 2".split()
FULL = "--use_peft False --learning_rate 1e-3".split()
WAYS = {
    "sft packed": ("sft.py", SFT, "one"),
    "sft buckets": ("sft.py", [*SFT, "--packing", "False"], "one"),
    "sft stream": ("sft.py", [*SFT, "--streaming", "True", "--size_valid_set", "5"], "one"),
    "sft full": ("sft.py", SFT + FULL, "one"),
    "dpo": ("dpo.py", DPO, "one"),
    "dpo full": ("dpo.py", DPO + FULL, "one"),
    "sft ddp": ("sft.py", SFT, "ddp"),
    "dpo ddp": ("dpo.py", DPO, "ddp"),
    "sft zero2": ("sft.py", SFT, "zero2"),
    "sft full zero3": ("sft.py", SFT + FULL, "zero3"),
    "dpo zero3": ("dpo.py", DPO, "zero3"),
}


class Bench:
    """One folder, one model, one data set, and runs by name."""

    def __init__(self, folder: Path):
        self.folder, self.nursery = folder, Nursery()
        save_model(folder / "model")
        write_rows(folder / "pairs.jsonl", make_rows(80))
        self.configs = write_configs(folder)
        self.took: dict[str, float] = {}

    def start(self, way: str, output: str, *flags, before: str = "", ranks: int | None = None) -> Run:
        script, own, sharing = WAYS[way]
        paths = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--output_dir", output]
        deepspeed = ["--deepspeed", self.configs[sharing]] if sharing in self.configs else []
        ranks = ranks or (1 if sharing == "one" else 2)
        command = [*COMMON, *own, *paths, *deepspeed, *flags]
        return Run(self.nursery, self.folder, script, command, ranks, before)

    def finish(self, way: str, output: str, *flags, ranks: int | None = None) -> str:
        """Runs to the end; returns what was said."""
        run = self.start(way, output, *flags, ranks=ranks)
        codes = run.wait()
        assert not any(codes), f"{way} ended with {codes}:\n{run.said()[-5000:]}"
        return run.said()

    def whole(self, way: str) -> str:
        """The run that nobody interrupts, made once."""
        output = f"whole {way}"
        if way not in self.took:
            began = time.monotonic()
            self.finish(way, output)
            self.took[way] = time.monotonic() - began
        return output

    def kill(self, way: str, output: str, in_save: bool, rng: random.Random) -> str:
        """Returns where the run was when it died."""
        run = self.start(way, output)
        if in_save:
            return "in a save" if run.kill_in_save(self.folder / output, rng.randint(1, 4), rng) else "beside a save"
        time.sleep(rng.uniform(0.1, 1) * self.took[way])
        ended = not run.runs()
        run.signal(signal.SIGKILL)
        run.wait()
        return "after its end" if ended else "anywhere"

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        folder = self.folder / output
        adapter = folder / "adapter_model.safetensors"
        return load_file(adapter if adapter.exists() else folder / "model.safetensors")

    def assert_same(self, output: str, whole: str) -> None:
        left, right = self.weights(output), self.weights(whole)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{output}: {name} differs"
        results = [json.loads((self.folder / each / "train_results.json").read_text()) for each in (output, whole)]
        assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], abs=1e-5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("soak"))
    yield bench
    bench.nursery.close()


def kill_and_resume(bench: Bench, ways: list[str], kills: int, seed: int) -> dict[str, int]:
    """A third of the runs die inside a save, a fifth die twice. Returns how often one died where."""
    rng, where, number = random.Random(seed), {}, 0
    while sum(where.values()) < kills:
        way = ways[number % len(ways)]
        whole, output = bench.whole(way), f"{seed} {number} {way}"
        places = [bench.kill(way, output, number % 3 == 0, rng) for _ in range(1 + (number % 5 == 4))]
        for place in places:
            where[place] = where.get(place, 0) + 1
        bench.finish(way, output)
        bench.assert_same(output, whole)
        print(f"{sum(where.values())} of {kills}: {way}, killed {', '.join(places)}: the same weights", flush=True)
        number += 1
    return where


def test_runs_killed_anywhere_resume_to_the_weights_of_those_that_were_not(bench):
    kill_and_resume(bench, ["sft packed", "dpo full", "sft full zero3"], kills=3, seed=0)


@pytest.mark.parametrize("way", ["sft ddp", "sft full zero3"])
def test_ranks_go_on_while_the_first_one_waits_for_the_disk_and_end_with_it(bench, way):
    run = bench.start(way, f"slow {way}", before="flush_slowly")

    assert run.wait() == [0, 0], run.said()
    bench.assert_same(f"slow {way}", bench.whole(way))
    kept = [bench.folder / f"slow {way}" / f"checkpoint-{step}" for step in (6, 8)]
    assert sorted((bench.folder / f"slow {way}").glob("*checkpoint-*")) == kept
    assert [find_damage(folder) for folder in kept] == [None, None]


@pytest.mark.parametrize("way", ["sft ddp", "sft full zero3"])
def test_a_signal_to_one_rank_stops_all_after_a_step_with_a_checkpoint(bench, way):
    run = bench.start(way, f"signal {way}", before="signal_rank_1_in_step_3")

    assert run.wait() == [128 + signal.SIGUSR1] * 2, run.said()
    assert run.said().count("SIGUSR1: stopped after step 3") == 1
    assert [path.name for path in (bench.folder / f"signal {way}").glob("*checkpoint-3")] == ["checkpoint-3"]
    bench.finish(way, f"signal {way}")
    bench.assert_same(f"signal {way}", bench.whole(way))


def test_a_signal_to_one_rank_while_the_model_is_saved_stops_all_when_it_is_there(bench):
    way = "sft ddp"
    run = bench.start(way, "saved", before="signal_rank_1_in_the_final_save")

    assert run.wait() == [128 + signal.SIGTERM] * 2, run.said()
    assert (
        "SIGTERM: stopped; the model is saved in saved; the same command with --resume auto does the rest" in run.said()
    )
    assert bench.weights("saved").keys() == bench.weights(bench.whole(way)).keys()
    bench.finish(way, "saved")
    bench.assert_same("saved", bench.whole(way))


def test_a_second_interrupt_does_not_wait_for_the_step(bench):
    run = bench.start("sft packed", "interrupted", before="interrupt_twice_in_step_3")

    assert run.wait() == [-signal.SIGINT], run.said()
    assert [path.name for path in (bench.folder / "interrupted").glob("*checkpoint-*")] == ["checkpoint-2"]
    bench.finish("sft packed", "interrupted")
    bench.assert_same("interrupted", bench.whole("sft packed"))


def test_the_loss_of_a_run_is_the_mean_over_its_ranks_however_often_it_is_logged(bench):
    whole = bench.whole("sft ddp")

    bench.finish("sft ddp", "each step is logged", "--logging_steps", 1)

    bench.assert_same("each step is logged", whole)


def test_a_signal_to_one_rank_in_an_evaluation_stops_all_and_both_load_the_best_model_in_the_end(bench):
    flags = "--packing False --do_eval --validation_split_percentage 50 --per_device_eval_batch_size 1 --eval_steps 2"
    flags += " --eval_strategy steps --load_best_model_at_end --greater_is_better True --max_steps 6"
    flags = [*flags.split(), "--save_total_limit", "1"]
    run = bench.start("sft ddp", "best", *flags, before="signal_rank_1_in_the_evaluation_after_step_4")

    assert run.wait() == [128 + signal.SIGTERM] * 2, run.said()
    assert "SIGTERM: stopped after step 4; best/checkpoint-4 is saved" in run.said()
    bench.finish("sft ddp", "best", *flags)
    history = json.loads((bench.folder / "best" / "trainer_state.json").read_text())["log_history"]
    told = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert 4 not in told
    assert max(told, key=told.get) == 2, "the loss falls, so that the first one counts as the best"
    best = load_file(bench.folder / "best" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in bench.weights("best").items())
    found = json.loads((bench.folder / "best" / "eval_results.json").read_text())["eval_loss"]
    assert found == pytest.approx(told[2], abs=1e-5), "a rank evaluates other weights"


@pytest.mark.parametrize("way", ["sft ddp", "sft full zero3"])
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none_and_its_rows_are_kept(bench, way):
    flags = ["--max_steps", 4, "--gradient_accumulation_steps", 2]
    run = bench.start(way, f"poison {way}", *flags, before="poison_rank_1_in_step_2")

    assert run.wait() == [0, 0], run.said()
    assert "step 2: a loss is not finite; the step is not taken" in run.said()
    rows = [json.loads(line) for line in (bench.folder / f"poison {way}" / "bad_batch.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in rows} == {1}
    questions = [json.loads(line)["question"] for line in (bench.folder / "pairs.jsonl").read_text().splitlines()]
    assert all(questions[row["row"]] in row["text"] for row in rows)
    assert len(rows) < 4 * 5, "one micro-batch of the step's four, of two packed rows"
    for name, tensor in bench.weights(f"poison {way}").items():
        assert tensor.isfinite().all(), name
    results = json.loads((bench.folder / f"poison {way}" / "train_results.json").read_text())
    assert 5 < results["train_loss"] < 6.3, "a mean over the steps that were taken"


@pytest.mark.parametrize("way", ["sft zero2", "sft full zero3"])
def test_gradients_whose_norm_is_not_finite_are_no_step_of_deepspeeds_either(bench, way):
    flags = ["--max_steps", 4, "--logging_steps", 1]
    run = bench.start(way, f"stretch {way}", *flags, before="stretch_gradients_of_rank_1_in_step_2")

    assert run.wait() == [0, 0], run.said()
    assert "step 2: the gradient is not finite; the step is not taken" in run.said()
    folder = bench.folder / f"stretch {way}"
    rows = [json.loads(line) for line in (folder / "bad_batch.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in rows} == {0, 1}, "no loss tells whose rows it were"
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "grad_norm" in entry] == [1, 3, 4], "that of another step"


def test_a_shard_that_is_damaged_sends_the_run_back_to_the_checkpoint_before(bench):
    whole = bench.whole("sft full zero3")
    bench.finish("sft full zero3", "damaged")
    shard = next((bench.folder / "damaged" / "checkpoint-8").rglob("*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    said = bench.finish("sft full zero3", "damaged")

    assert said.count("checkpoint-8 cannot be resumed") == 1
    assert f"{shard.name} is not what was written" in said
    bench.assert_same("damaged", whole)


def test_ddp_goes_on_with_another_number_of_ranks_and_as_many_rows_a_step(bench):
    way, steady = "sft ddp", ["--max_steps", 4, "--lora_dropout", 0]  # ranks drop other weights than one process
    bench.finish(way, "two ranks", *steady)
    shutil.copytree(bench.folder / "two ranks", bench.folder / "one rank")
    shutil.rmtree(bench.folder / "one rank" / "checkpoint-4")

    said = bench.finish(way, "one rank", *steady, "--per_device_train_batch_size", 4, ranks=1)

    assert "ranks 2 -> 1 (dropout is drawn anew)" in said
    for name, tensor in bench.weights("two ranks").items():
        torch.testing.assert_close(bench.weights("one rank")[name], tensor, atol=2e-5, rtol=0)


def test_another_learning_rate_holds_under_deepspeed_too_and_another_file_is_told(bench):
    way = "sft full zero3"
    shutil.copytree(bench.folder / bench.whole(way), bench.folder / "rate")
    shutil.rmtree(bench.folder / "rate" / "checkpoint-8")
    config = json.loads(bench.configs["zero3"].read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 100_000
    (bench.folder / "buckets.json").write_text(json.dumps(config))

    flags = ["--learning_rate", "2e-4", "--lr_scheduler_type", "constant", "--logging_steps", 1]
    said = bench.finish(way, "rate", *flags, "--deepspeed", "buckets.json")

    assert "--learning_rate 0.001 -> 0.0002" in said
    assert "--deepspeed zero_optimization.reduce_bucket_size" in said
    history = json.loads((bench.folder / "rate" / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if entry["step"] > 6 and "loss" in entry] == [2e-4, 2e-4]
    before = load_file(bench.folder / "rate" / "checkpoint-6" / "model.safetensors")
    moved = max((tensor - before[name]).abs().max() for name, tensor in bench.weights("rate").items())
    assert 2e-4 < moved < 5e-4, "two steps of AdamW, each of at most about the learning rate"


def test_a_disk_that_fills_up_under_deepspeed_ends_the_run_with_its_last_checkpoint_whole(bench):
    run = bench.start("sft full zero3", "full", before="fill_the_disk_in_the_second_checkpoint")

    assert run.wait() == [3, 3], run.said()
    assert "checkpoint-4 is not saved into full: " in run.said()
    assert "make room, then add --resume auto" in run.said()
    assert "Traceback" not in run.said()
    bench.finish("sft full zero3", "full")
    bench.assert_same("full", bench.whole("sft full zero3"))


@pytest.mark.parametrize("way", ["sft ddp", "dpo ddp"])
def test_ranks_wait_outside_of_collectives_while_the_first_one_prepares_the_data(bench, way):
    run = bench.start(way, f"slow {way}", "--max_steps", 1, before="prepare_slowly_on_rank_0")

    assert run.wait() == [0, 0], run.said()
    assert (bench.folder / f"{WAYS[way][0]} has prepared").exists()


def test_a_first_loss_that_is_wrong_on_one_rank_ends_both_with_the_same_line(bench):
    run = bench.start("dpo ddp", "apart", before="rank_1_has_another_reference")

    assert run.wait() == [3, 3], run.said()
    assert run.said().count("the first loss would not be that of a model equal to its reference (ln 2)") == 2
    assert not list((bench.folder / "apart").glob("*checkpoint-*"))


def test_a_model_of_shards_that_is_saved_wrongly_never_gets_its_name(bench):
    run = bench.start("sft full zero3", "spoilt", before="spoil_what_is_saved")

    assert run.wait() == [3, 3], run.said()
    assert "was saved with other values than it has in memory; kept as spoilt/failed-checkpoint-2" in run.said()
    assert not list((bench.folder / "spoilt").glob("checkpoint-*"))


def test_code_planted_in_a_shard_is_not_run(bench):
    bench.finish("sft zero2", "planted", "--max_steps", 4)
    folder = bench.folder / "planted" / "checkpoint-4"
    shard = next(folder.rglob("*zero_pp_rank_1_*optim_states.pt"))  # which rank 0 would never load
    plant(shard, bench.folder / "it ran")

    run = bench.start("sft zero2", "planted")

    assert run.wait()[0] == 2, run.said()
    assert f"{shard.name} holds more than tensors and is not loaded" in run.said()
    assert not (bench.folder / "it ran").exists()


def plant(shard: Path, proof: Path) -> None:
    """Replaces a shard by a pickle that runs code, and its manifest by one that fits: as an attacker would."""
    from align.training.checkpoints import hash_file, write_manifest

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"optimizer_state_dict": Code()}, shard)
    folder = next(parent for parent in shard.parents if (parent / "manifest.json").exists())
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["xxh3_128"]
    files = manifest.pop("files")
    files[str(shard.relative_to(folder))] = {"size": shard.stat().st_size, "xxh3_128": hash_file(shard)}
    write_manifest(folder, files, manifest)


@pytest.mark.soak
@pytest.mark.timeout(8 * 3600)
def test_every_killed_run_resumes_to_the_weights_of_one_that_was_not(bench):
    kills = int(os.environ.get("SOAK_KILLS", "200"))
    where = kill_and_resume(bench, list(WAYS), kills, seed=int(os.environ.get("SOAK_SEED", "1")))

    print(where)
    assert where["in a save"] >= kills // 8
