"""What goes wrong in the runs of tests/forks.py, as it would in the world."""

import importlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import transformers.trainer
from transformers import TrainerCallback


def signal_rank_1_in_step_3() -> None:
    """As Slurm does shortly before the time is over."""
    _call_in_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def signal_rank_1_in_the_final_save() -> None:
    from align.training.supervised import SupervisedTrainer

    save = SupervisedTrainer._save_final

    def signal_and_save(self, output):
        if self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, output)

    SupervisedTrainer._save_final = signal_and_save


def interrupt_twice_in_step_3() -> None:
    """As somebody does who does not want to wait."""
    _call_in_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])


def signal_rank_1_in_the_evaluation_after_step_4() -> None:
    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 4 and args.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    transformers.trainer.DEFAULT_CALLBACKS.append(InEvaluation())


def poison_rank_1_in_step_2() -> None:
    """A loss that is not finite, as a bad row makes it."""
    from optimum.habana import GaudiTrainer

    training_step = GaudiTrainer.training_step
    poison = []
    _call_in_step(2, lambda: poison.append(True))

    def poisoned(self, *args, **kwargs):
        hook = None
        if poison:
            poison.clear()
            head = self.model.get_output_embeddings()
            hook = head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
        loss = training_step(self, *args, **kwargs)
        if hook is not None:
            hook.remove()
        return loss

    GaudiTrainer.training_step = poisoned


def stretch_gradients_of_rank_1_in_step_2() -> None:
    """Loss and gradients are finite, the gradients' norm is not."""
    from optimum.habana import GaudiTrainer

    training_step = GaudiTrainer.training_step
    begun = []
    _call_in_step(2, lambda: begun.append(True))

    def stretched(self, *args, **kwargs):
        hook = None
        if begun and self.state.global_step == 1:

            def stretch(module, inputs, output):
                output.register_hook(lambda gradient: gradient * 1e30)

            hook = self.model.get_output_embeddings().register_forward_hook(stretch)
        loss = training_step(self, *args, **kwargs)
        if hook is not None:
            hook.remove()
        return loss

    GaudiTrainer.training_step = stretched


def fill_the_disk_in_the_second_checkpoint() -> None:
    """While it is written no file may grow beyond 100 bytes, for any rank: they share the disk."""
    from align.training.supervised import SupervisedTrainer

    save, calls = SupervisedTrainer._save_optimizer_and_scheduler, []

    def save_on_a_full_disk(self, folder):
        calls.append(folder)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if len(calls) == 2 else before[0], before[1]))
        try:
            return save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)  # what is said goes to a file as well

    SupervisedTrainer._save_optimizer_and_scheduler = save_on_a_full_disk


def flush_slowly() -> None:
    """A disk that takes a second for each checkpoint, which is longer than a step."""
    from align.training import checkpoints

    seal = checkpoints.seal

    def seal_slowly(folder):
        time.sleep(1)
        return seal(folder)

    checkpoints.seal = seal_slowly


def rank_1_has_another_reference() -> None:
    """As stored log-probs of another model would give it."""
    from align.training.preference import PreferenceTrainer

    score = PreferenceTrainer._score_reference
    if os.environ["RANK"] == "1":
        PreferenceTrainer._score_reference = lambda self, inputs: score(self, inputs) + 10


def spoil_what_is_saved() -> None:
    """A disk that does not keep what it was given."""
    from safetensors.torch import load_file, save_file

    from align.training.gate import Gate

    check = Gate.check

    def spoil_and_check(self, folder, state):
        path = next(Path(folder).glob("*model.safetensors"))
        tensors = load_file(path)
        name = next(name for name in tensors if "q_proj" in name)
        save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})
        return check(self, folder, state)

    Gate.check = spoil_and_check


def prepare_slowly_on_rank_0() -> None:
    """Whoever meets the others in a collective meanwhile would end with --ddp_timeout: here, at once."""
    rank, begun, done = os.environ["RANK"], Path(f"{sys.argv[0]} prepares"), Path(f"{sys.argv[0]} has prepared")
    script = importlib.import_module(sys.argv[0].removesuffix(".py"))
    prepare = script.prepare_data

    def prepare_slowly(*args, **kwargs):
        if rank == "0":
            begun.touch()
            time.sleep(2)
        elif not done.exists():
            sys.exit("rank 1 does not wait for rank 0's cache")
        prepared = prepare(*args, **kwargs)
        done.touch()
        return prepared

    def watch(collective):
        def watched(*args, **kwargs):
            if rank == "1" and begun.exists() and not done.exists():
                sys.exit("rank 1 waits for rank 0 in a collective")
            return collective(*args, **kwargs)

        return watched

    script.prepare_data = prepare_slowly
    for name in ("barrier", "all_reduce", "all_gather", "all_gather_object", "broadcast"):
        setattr(torch.distributed, name, watch(getattr(torch.distributed, name)))


def _call_in_step(step: int, what) -> None:
    class InStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step and args.process_index == args.world_size - 1:
                what()

    transformers.trainer.DEFAULT_CALLBACKS.append(InStep())
