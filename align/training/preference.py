"""Preference tuning (DPO and its relatives) on rows that pairs share, with one model as policy and reference."""

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from optimum.habana import GaudiConfig, GaudiTrainer
from optimum.habana.trl import GaudiDPOConfig, GaudiDPOTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_model, save_model
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.dpo_config import FDivergenceConstants, FDivergenceType
from trl.trainer.utils import SyncRefModelCallback, disable_dropout_in_model

from align.data.packing import NONE
from align.errors import InputError, ResultError
from align.models.head import find_head, look_up_as_stored, records_graphs
from align.models.loading import find_padding
from align.training.pairs import Layout, PairCollator, PairDataset, PairSampler, no_slot
from align.training.reference import Stored, store
from align.training.rows import RowsMixin

logger = logging.getLogger(__name__)

SMOOTHED = ("sigmoid", "robust", "exo_pair")  # the losses that --label_smoothing has an effect on
DIVERGING = (*SMOOTHED, "hinge", "ipo")  # the losses that --f_divergence_type has an effect on
LOSSES = (*DIVERGING, "sppo_hard", "nca_pair")
MIXING = ("aot", "aot_pair", "bco_pair")
MEASURED: tuple[str, ...] = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
MEASURED += ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected")
NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")  # of routers
SYNCED_REFERENCE = "reference.safetensors"
# Times sqrt(n): how far two computations of the log-prob of an answer of n tokens may be apart, as they round
ALIKE = {"float32": 0.02, "bfloat16": 0.25}
SLACK = 1.125  # a micro-batch may be this much larger than the padded pairs that it replaces


def check_same_vocabulary(config: PretrainedConfig, ref_config: PretrainedConfig, flag: str) -> None:
    sizes = [each.get_text_config().vocab_size for each in (config, ref_config)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{flag}: its vocabulary has {sizes[1]} tokens, the model's has {sizes[0]}")


def leave_out_dropout(model: torch.nn.Module) -> list[tuple[PretrainedConfig, str, float]]:
    """Of modules, and of functions: their probability is kept in a module or, of a few families, in its config.

    So is what else is drawn in training alone: routers' noise, and Phi-3.5-MoE's experts (models/phimoe, sparsemixer).
    Returns what the configs said, for `saying_their_dropout`: one that is saved must say it still.
    """
    disable_dropout_in_model(model)
    configs = {id(module.config): module.config for module in model.modules() if _has_config(module)}
    said = []
    for holder in (*model.modules(), *configs.values()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or name in NOISE):
                said += [(holder, name, value)] if isinstance(holder, PretrainedConfig) else []
                setattr(holder, name, 0.0)
    for module in model.modules():
        if type(module).__name__ == "PhimoeSparseMoeBlock":
            module.register_forward_pre_hook(_choose_as_evaluated)
    return said


def _has_config(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "config", None), PretrainedConfig)


def _choose_as_evaluated(experts: torch.nn.Module, _) -> None:
    experts.training = False


@contextlib.contextmanager
def saying_their_dropout(said: list[tuple[PretrainedConfig, str, float]]) -> Iterator[None]:
    """Gives configs what `leave_out_dropout` took from them, while the block saves them."""
    for config, name, value in said:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in said:
            setattr(config, name, 0.0)


def needs_copy(
    args: GaudiDPOConfig, trains_adapter: bool, ref_model: str | None, stored: Mapping[str, Stored], resumes: bool
) -> bool:
    """Whether the reference is a second model: named, or a copy, as training changes the model first."""
    if args.reference_free or (stored and all(split.values is not None for split in stored.values())):
        return False
    trains_all = args.do_train and not trains_adapter
    return ref_model is not None or (trains_all and (resumes or not args.precompute_ref_log_probs))


def token_budget(args: GaudiDPOConfig, batch_size: int) -> int:
    """Tokens that a micro-batch may have: those of `batch_size` pairs padded to --max_length, and an eighth more."""
    return int(SLACK * batch_size * 2 * args.max_length)


def fit_batches(args: GaudiDPOConfig, layout: Layout) -> GaudiDPOConfig:
    """A copy of `args` that cuts a step's pairs into micro-batches of whole rows, each of about the size asked for."""
    if not layout.shared:
        return args
    number, longest = layout.pairs_per_row, layout.buckets[-1].columns
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps // number
    fitting = token_budget(args, args.per_device_train_batch_size) // longest
    rows_at_once = max(count for count in range(1, rows + 1) if rows % count == 0 and count <= max(1, fitting))
    eval_rows_at_once = max(1, token_budget(args, args.per_device_eval_batch_size) // longest)
    fitted = dataclasses.replace(
        args,
        per_device_train_batch_size=rows_at_once * number,
        gradient_accumulation_steps=rows // rows_at_once,
        per_device_eval_batch_size=eval_rows_at_once * number,
    )
    if args.deepspeed is not None and fitted.hf_deepspeed_config.mismatches:
        raise InputError(
            f"--deepspeed {args.deepspeed}: set train_micro_batch_size_per_gpu and gradient_accumulation_steps to "
            f'"auto" there: rows hold {number} pairs each'
        )
    return fitted


class ScoreTokens(torch.autograd.Function):
    """Log-probs of `targets` and means of the logits, `[rows, columns]`, from logits `[rows, columns, vocabulary]`.

    Computed in float32, a block of columns at a time. Only the logits as they are stay for the gradient, where
    log_softmax keeps a float32 copy of them all.
    """

    BLOCK = 128  # columns

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normalizers, means = [], []
        for block in logits.split(ScoreTokens.BLOCK, dim=1):
            block = block.float()
            normalizers.append(block.logsumexp(-1))
            means.append(block.mean(-1))
        normalizers, means = torch.cat(normalizers, 1), torch.cat(means, 1)
        ctx.save_for_backward(logits, targets, normalizers)
        ctx.mark_non_differentiable(means)
        return logits.gather(-1, targets[..., None])[..., 0].float() - normalizers, means

    @staticmethod
    def backward(ctx, slopes: torch.Tensor, _) -> tuple[torch.Tensor, None]:
        logits, *columns = ctx.saved_tensors
        changes = torch.empty_like(logits)
        tensors = (tensor.split(ScoreTokens.BLOCK, dim=1) for tensor in (changes, logits, *columns, slopes))
        for into, block, targets, normalizers, slope in zip(*tensors, strict=True):
            change = (block.float() - normalizers[..., None]).exp_().mul_(-slope[..., None])
            into.copy_(change.scatter_add_(-1, targets[..., None], slope[..., None]))
        return changes, None


def sum_by_slot(values: torch.Tensor, slots: torch.Tensor, pairs: int) -> torch.Tensor:
    """Adds up the values `[rows, columns]` of each answer, `[pairs, 2]`; what has `no_slot` is left out."""
    sums = values.new_zeros(no_slot(pairs) + 1)
    return sums.index_add(0, slots.flatten(), values.flatten())[: no_slot(pairs)].view(pairs, 2)


class PreferenceTrainer(RowsMixin, GaudiDPOTrainer):
    """GaudiDPOTrainer's losses on `PairDataset`s; the base under a LoRA adapter is the reference.

    Loss, gradient and metrics are means over the pairs of a whole step (rpo_alpha's: over its chosen tokens), however
    it was cut into micro-batches and ranks.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        args: GaudiDPOConfig,
        gaudi_config: GaudiConfig,
        layout: Layout,
        pairs: Mapping[str, PairDataset],
        tokenizer: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
    ):
        # optimum-habana 1.21.2's own __init__ tokenizes the data, copies every model that has no adapter, and refuses
        # stored log-probs under ZeRO-3. What its methods read is set here instead.
        if peft_config is not None:
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
            model = get_peft_model(model, peft_config)
        self.dropout = leave_out_dropout(model) if args.disable_dropout else []
        if args.disable_dropout and ref_model is not None:
            leave_out_dropout(ref_model)
        self.beta, self.label_smoothing, self.loss_type = args.beta, args.label_smoothing, args.loss_type
        self.reference_free, self.rpo_alpha = args.reference_free, args.rpo_alpha
        self.f_divergence_type = FDivergenceType(args.f_divergence_type).value
        self.f_divergence_params = {FDivergenceConstants.ALPHA_DIVERGENCE_COEF_KEY: args.f_alpha_divergence_coef}
        self.precompute_ref_log_probs = self.generate_during_eval = False  # in its ways
        self.is_peft_model = isinstance(model, PeftModel)
        self.pairs_per_row = layout.pairs_per_row
        self.totals: dict[str, torch.Tensor] = {}
        self.totals_before: dict[str, torch.Tensor] = {}  # the step
        GaudiTrainer.__init__(
            self,
            model=model,
            args=args,
            gaudi_config=gaudi_config,
            data_collator=PairCollator(layout, find_padding(tokenizer)),
            train_dataset=pairs.get("train"),
            eval_dataset=pairs.get("validation"),
            processing_class=tokenizer,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by what get_batch_samples_transformers counts
        forward = inspect.signature(model.get_base_model().forward if self.is_peft_model else model.forward)
        self.keeps_logits = "logits_to_keep" in forward.parameters
        graphs = records_graphs(args)
        for each in filter(None, (self.model, ref_model)):
            look_up_as_stored(each)
        with self.compute_loss_context_manager():
            self.heads = {"policy": find_head(self.model, args.device, graphs)}
            if ref_model is not None:
                self.heads["reference"] = find_head(ref_model, args.device, graphs)
        self.ref_model = ref_model and self._prepare_reference(ref_model)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    @property
    def longest(self) -> int:
        return self.args.max_length

    def _prepare_reference(self, ref_model: PreTrainedModel) -> torch.nn.Module:
        if self.is_deepspeed_enabled:
            with self.own_stdout():
                return self._prepare_deepspeed(ref_model)
        ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True).eval()
        if self.args.use_lazy_mode and self.args.use_hpu_graphs_for_inference:
            from habana_frameworks.torch.hpu import wrap_in_hpu_graph

            ref_model = wrap_in_hpu_graph(ref_model)
        return ref_model

    # Batches

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> PairSampler:
        rows_per_batch = self._train_batch_size // self.pairs_per_row * self.args.world_size
        return PairSampler((train_dataset or self.train_dataset).rows, rows_per_batch, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: PairDataset) -> PairSampler:
        rows_per_batch = self.args.eval_batch_size // self.pairs_per_row * self.args.world_size
        return PairSampler(eval_dataset.rows, rows_per_batch, shuffle=False)

    def get_batch_samples_transformers(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and the divisors of its loss: its pairs and chosen tokens, averaged over ranks."""
        batches, _ = super().get_batch_samples_transformers(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        chosen = torch.cat([batch["answer_lengths"][:, 0] for batch in batches]).to(device)
        counts = torch.stack([(chosen > 0).sum(), chosen.sum()]).float()
        return batches, self.accelerator.reduce(counts, "mean")

    def without_loss(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "answer_lengths": torch.zeros_like(batch["answer_lengths"])}

    def _prepare_inputs(self, batch: Mapping) -> dict:
        """On the device: what the model takes apart from what its logits are scored with."""
        inputs = dict(batch)
        reference = inputs.pop("reference", None)  # super would round it to the half precision of DeepSpeed's weights
        inputs = super()._prepare_inputs(inputs)
        prepared = {name: inputs.pop(name) for name in ("targets", "slots", "answer_lengths", "indices")}
        if reference is not None:
            prepared["reference"] = reference.to(self.args.device)
        if self.keeps_logits and None in self.heads.values():
            inputs["logits_to_keep"] = prepared["targets"].shape[1]
        return {**prepared, "model_inputs": inputs}

    # Log-probs

    def _score(self, model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob of each answer and the sum of its tokens' mean logits, `[pairs, 2]` each (chosen, rejected)."""
        targets, slots, pairs = inputs["targets"], inputs["slots"], len(inputs["answer_lengths"])
        head = self.heads["reference" if model is self.ref_model else "policy"]
        if head is None:
            logits = model(**inputs["model_inputs"]).logits[:, -targets.shape[1] :]
            with self._in_float32():
                scores = ScoreTokens.apply(logits, targets)
        else:
            with head.scoring(targets):
                scores = model(**inputs["model_inputs"]).logits.unbind(-1)
        return tuple(sum_by_slot(values, slots, pairs) for values in scores)

    @torch.no_grad()
    def _score_reference(self, inputs: dict) -> torch.Tensor:
        if self.reference_free:
            return torch.zeros_like(inputs["answer_lengths"], dtype=torch.float32)
        if "reference" in inputs:
            return inputs["reference"]
        if self.ref_model is not None:
            return self._score(self.ref_model, inputs)[0]
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_peft_model:
            with self._without_noise(model):
                return self._score(model, inputs)[0]
        # An HPU graph of the PEFT model would be replayed with its adapter: the base's own forward is in none. Only
        # DeepSpeed, which knows no such graphs in training, must see a pass enter by its module.
        with model.disable_adapter(), self._without_noise(model):
            return self._score(model if self.is_deepspeed_enabled else model.get_base_model(), inputs)[0]

    @contextlib.contextmanager
    def _without_noise(self, model: torch.nn.Module) -> Iterator[None]:
        """The policy's dropout and noise on its embeddings, where it has any, are not the reference's."""
        is_noisy = model.training and (not self.args.disable_dropout or self.args.neftune_noise_alpha)
        if is_noisy:
            model.eval()
        try:
            yield
        finally:
            if is_noisy:
                model.train()

    def describe_rows(self, batch: Mapping[str, torch.Tensor]) -> list[dict]:
        pairs = [int(index) for index in batch["indices"] if index != NONE]
        columns = {"prompt": "prompt_input_ids", "chosen": "chosen_input_ids", "rejected": "rejected_input_ids"}
        decode = self.processing_class.decode
        return [
            {"row": index, **{name: decode(self.train_dataset.pairs[index][key]) for name, key in columns.items()}}
            for index in pairs
        ]

    # Loss and metrics

    def _in_float32(self) -> torch.autocast:
        """Leaves autocast, which multiplies in bfloat16: there ln 2, the first loss, is 0.6914."""
        return torch.autocast(self.args.device.type, enabled=False)

    def _total(self, model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
        """Sums, over the pairs of a micro-batch, what is averaged later; counts pairs and tokens."""
        reference = self._score_reference(inputs)  # first: the policy's activations need not be there yet
        policy, logits = self._score(model, inputs)
        if model.training and self.state.global_step == 0 and self.problem is None and self.starts_as_reference():
            self.problem = self._check_start(policy, reference, inputs)
        with self._in_float32():
            return self._add_up(policy, logits, reference, inputs["answer_lengths"])

    def starts_as_reference(self) -> bool:
        """Whether policy and reference say the same before the first step, so that its loss is ln 2 (of sigmoid)."""
        facts = self.run.facts if self.run else {}
        is_random = not self.args.disable_dropout or self.args.neftune_noise_alpha
        is_same = facts.get("--ref_model") == facts.get("--model_name_or_path", self)
        return is_same and not self.args.reference_free and not is_random

    def _check_start(self, policy: torch.Tensor, reference: torch.Tensor, inputs: Mapping) -> str | None:
        """Returns in what policy and reference differ before any step, as with stored log-probs that are stale."""
        lengths = inputs["answer_lengths"]
        is_exact = not self.args.bf16 and all(weight.dtype == torch.float32 for weight in self.model.parameters())
        allowed = ALIKE["float32" if is_exact else "bfloat16"] * lengths.clamp(min=1).sqrt()
        far = ((policy - reference).abs().nan_to_num(0) > allowed) & (lengths > 0)  # what is not finite is told later
        if not far.any():
            return None
        pair, answer = far.nonzero()[0].tolist()
        said, asked = policy[pair, answer].item(), reference[pair, answer].item()
        stored = self.train_dataset.stored
        cause = "the two are not computed alike; try --use_flash_attention False or --share_prompts False"
        if stored is not None:
            cause = f"{stored.path} is of another model; delete it to compute it anew"
        return (
            "the first loss would not be that of a model equal to its reference (ln 2): of pair "
            f"{int(inputs['indices'][pair])} the {('chosen', 'rejected')[answer]} answer has the log-prob {said:.4f}, "
            f"in the reference {asked:.4f}: {cause}"
        )

    def _add_up(
        self, policy: torch.Tensor, logits: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        nll, present, tokens = -policy[:, 0], lengths[:, 0] > 0, lengths.clamp(min=1)
        if self.loss_type == "ipo":
            policy, reference = policy / tokens, reference / tokens
        losses, chosen, rejected = self.dpo_loss(*policy.T, *reference.T)
        losses = losses + 0 * reference.sum(-1)  # of a reference of -inf the loss would be 0
        logps, logits = policy.detach().T, (logits / tokens).T
        values = {
            "loss": losses,
            "nll_loss": nll,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "logits/chosen": logits[0],
            "logits/rejected": logits[1],
        }
        totals = {name: torch.where(present, value, 0).sum() for name, value in values.items()}
        return {**totals, "pairs": present.sum(), "tokens": lengths[:, 0].sum()}

    def _loss(self, totals: Mapping, pairs, tokens):
        """Adds rpo_alpha times the chosen answers' negative log-likelihood to the preference loss (arXiv:2404.19733).

        trl 0.9.6 multiplies the preference loss instead.
        """
        loss = totals["loss"] / pairs
        return loss if self.rpo_alpha is None else loss + self.rpo_alpha * totals["nll_loss"] / tokens

    def _remember(self, kind: str, totals: dict[str, torch.Tensor]) -> None:
        """Adds up on the device: nothing is read back before it is logged."""
        self.totals.setdefault(kind, dict.fromkeys(totals, 0))
        self.totals[kind] = {name: self.totals[kind][name] + total.detach() for name, total in totals.items()}

    def average(self, kind: str) -> dict[str, float]:
        """Means over all pairs that any rank has computed since the last call."""
        totals = self.totals.pop(kind)
        sums = self.accelerator.reduce(torch.stack([total.float() for total in totals.values()]), "sum").tolist()
        totals = dict(zip(totals, sums, strict=True))
        pairs, tokens = totals.pop("pairs"), totals.pop("tokens")
        means = {name: total / (tokens if name == "nll_loss" else pairs) for name, total in totals.items()}
        return {**means, "loss": self._loss(totals, pairs, tokens)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        totals = self._total(model, inputs)
        self._remember("train", totals)
        with self._in_float32():
            loss = self._loss(totals, *num_items_in_batch)
        return (loss, totals) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            totals = self._total(model, inputs)
        self._remember("eval", totals)
        return self._loss(totals, totals["pairs"], totals["tokens"]), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.average("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "train" in self.totals:
            logs = {**self.average("train"), **logs}
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.totals_before = dict(self.totals)

    def forget_step(self) -> None:
        self.totals = dict(self.totals_before)

    def complete(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """With the training metrics that were logged last, as `train_rewards/margins` and so on."""
        entry = next((entry for entry in reversed(self.state.log_history) if "rewards/margins" in entry), {})
        logged = {f"train_{name}": value for name, value in entry.items() if "/" in name}
        return {**metrics, **(logged if "train_loss" in metrics else {})}

    def watch(self, *args, **kwargs) -> None:
        super().watch(*args, **kwargs)
        self.add_callback(StoreReference(self))

    # In a checkpoint

    def progress(self) -> dict:
        """Saves the sums that were not logged yet, of all ranks."""
        totals = self.totals.get("train", {})
        stacked = torch.stack([total.float() for total in totals.values()]) if totals else torch.zeros(0)
        sums = self.accelerator.reduce(stacked.to(self.args.device), "sum").tolist() if totals else []
        return {**super().progress(), "totals": dict(zip(totals, sums, strict=True))}

    def restore_progress(self, progress: Mapping) -> None:
        super().restore_progress(progress)
        share = float(self.args.process_index == 0)  # they are added up over ranks again
        totals = {
            name: torch.tensor(total * share, device=self.args.device) for name, total in progress["totals"].items()
        }
        self.totals = {"train": totals} if totals else {}
        self.totals_before = dict(self.totals)

    def _save(self, *args, **kwargs) -> None:
        with saying_their_dropout(self.dropout):
            super()._save(*args, **kwargs)

    def save_more(self, folder: Path) -> None:
        """Saves the reference that --sync_ref_model has moved."""
        if self.args.sync_ref_model and self.args.should_save:
            reference = self.accelerator.unwrap_model(self.ref_model)
            save_model(reference, str(folder / SYNCED_REFERENCE))

    def load_more(self, folder: Path) -> None:
        if self.args.sync_ref_model:
            reference = self.accelerator.unwrap_model(self.ref_model)
            load_model(reference, folder / SYNCED_REFERENCE, device="cpu")

    # Before and after training

    def store_reference(self) -> None:
        """Computes the log-probs that --precompute_ref_log_probs asks for and are not stored yet."""
        for pairs in filter(None, (self.train_dataset, self.eval_dataset)):
            if pairs.stored is not None and pairs.stored.values is None:
                values = self._compute_reference(pairs)
                if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
                    raise ResultError(
                        f"--precompute_ref_log_probs: the reference's log-probs of pair {bad[0]} are not finite (of "
                        f"{len(bad)} pairs in all); nothing is stored"
                    )
                store(pairs.stored, values, write=self.args.local_process_index == 0)

    @torch.no_grad()
    def _compute_reference(self, pairs: PairDataset) -> np.ndarray:
        """The reference's log-probs of all answers, `[pairs, 2]`; the ranks share the work and each gets the result."""
        loader = self._get_dataloader(pairs, "Reference", self.args.eval_batch_size, self._get_eval_sampler)
        scores = torch.zeros(len(pairs), 2)
        was_training = self.model.training
        self.model.eval()
        for batch in tqdm(loader, desc="Reference log-probs", disable=not self.is_world_process_zero()):
            self.give_way()
            inputs, indices = self._prepare_inputs(batch), batch["indices"].cpu()
            with self.compute_loss_context_manager():
                scored = self._score_reference(inputs).float().cpu()
            scores[indices[indices != NONE]] = scored[indices != NONE]
        self.model.train(was_training)
        return self.accelerator.reduce(scores.to(self.args.device), "sum").cpu().numpy()


class StoreReference(TrainerCallback):
    """Stores the reference's log-probs before the first step, with the model that training has prepared.

    Under DeepSpeed that is its engine.
    """

    def __init__(self, trainer: PreferenceTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args, **kwargs) -> None:
        self.trainer.store_reference()
