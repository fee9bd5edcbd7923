"""Workarounds for optimum-habana 1.21.2, DeepSpeed 0.16.9 and accelerate 1.10.1, each with its line and its end.

Heavy packages are imported where they are used: run_generation.py needs few of them.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from optimum.habana import GaudiConfig
    from optimum.habana import GaudiTrainer as Trainer
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
else:
    Trainer = object  # what the mixins stand in front of

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- the imports


@contextlib.contextmanager
def known_plugin() -> Iterator[None]:
    """Reads from the metadata which plugin there is, for which optimum-habana starts pip when it is imported.

    It asks the first `pip` of the PATH (utils/misc.py:241), which may be another Python's, and stops with an IndexError
    where that knows no plugin; each time takes a second (utils/environment.py:37). Can go when it reads the metadata.
    """
    module: Any = subprocess
    start = subprocess.run

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(command, str) and "pip " in command and "habana-torch-plugin" in command:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version("habana-torch-plugin")
                return subprocess.CompletedProcess(command, 0, f"Version: {version}\n", "")
        return start(command, *args, **kwargs)

    module.run = run
    try:
        yield
    finally:
        module.run = start


# ---------------------------------------------------------------- the trainers


def attention_inputs(model: "PreTrainedModel") -> dict[str, Any]:
    """Arguments for Gaudi's fused attention that the forward of a loaded model gets, in training, evaluation and probe.

    optimum-habana 1.21.2 passes the flags to seven families alone (transformers/trainer.py:163). Mistral, Qwen3 and
    others silently compute as if they were not given. Can go when it asks the model's forward.
    """
    return getattr(model, "attention_inputs", {})


def computes_in_autocast(args) -> bool:
    """Whether the trainer computes in bfloat16 whatever the weights are (transformers/trainer.py:239 and :279)."""
    return args.bf16 and not args.deepspeed


def gaudi_config(args) -> "GaudiConfig":
    """--gaudi_config_name, else the fused optimizer for every flavour of AdamW, and fused clipping.

    Paged and 8-bit AdamW are CUDA implementations of the same update, which Gaudi's FusedAdamW computes.
    optimum-habana 1.21.2 takes FusedAdamW for whatever --optim names (transformers/trainer.py:422).
    """
    from optimum.habana import GaudiConfig

    name, optim = args.gaudi_config_name, args.optim.value
    if name is None:
        config = GaudiConfig(use_fused_adam=args.use_habana, use_fused_clip_norm=args.use_habana)
    else:
        try:
            config = GaudiConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise InputError(f"--gaudi_config_name: no gaudi_config.json at {name}: {reason}") from error
        settings = {key for key in GaudiConfig.get_config_dict(name)[0] if not key.endswith("_version")}
        if unknown := sorted(settings - vars(GaudiConfig()).keys()):
            raise InputError(f"--gaudi_config_name: {name} sets {unknown[0]}, which has no effect; remove it there")
        for key, value in vars(config).items():
            if key.startswith("use_") and not isinstance(value, bool):
                raise InputError(f"--gaudi_config_name: {name} sets {key} to {value!r}; write true or false there")
        if config.use_torch_autocast and not args.bf16:
            raise InputError(
                f"--gaudi_config_name: {name} sets use_torch_autocast, which is --bf16 here; add that flag"
            )
        if config.autocast_bf16_ops or config.autocast_fp32_ops:
            # optimum-habana sets them too late for the plugin (gaudi_configuration.py:92).
            raise InputError(
                f"--gaudi_config_name: {name} sets lists of operations for autocast; name files of them in "
                "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST and PT_HPU_AUTOCAST_FP32_OPS_LIST instead"
            )
    if "adamw" not in optim:
        config.use_fused_adam = False
    elif not config.use_fused_adam and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(
            f"--gaudi_config_name: {name} switches FusedAdamW off, and --optim {optim} has no other kernel here"
        )
    return config


class RightScaleMixin(Trainer):
    """Divides the loss by the accumulation steps where optimum-habana forgets to.

    optimum-habana 1.21.2 does it inside `if use_lazy_mode and pipelining_fwd_bwd` (transformers/trainer.py:1752), so
    that elsewhere loss and gradient are too large by that factor unless the model divides by the batch's tokens itself.
    Can go when that division stands outside.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        trains = getattr(model, "module", model).training  # DeepSpeed's engine says True of itself while it evaluates
        if not trains or self._loss_is_scaled(num_items_in_batch):
            return result
        steps = self.current_gradient_accumulation_steps
        return (result[0] / steps, *result[1:]) if return_outputs else result / steps

    def _loss_is_scaled(self, num_items_in_batch) -> bool:
        takes_count = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        divided_later = self.args.use_lazy_mode and self.args.pipelining_fwd_bwd
        return (takes_count and num_items_in_batch is not None) or divided_later


def smoothed_loss(
    logits: "torch.Tensor", labels: "torch.Tensor", tokens: "torch.Tensor | int | None", share: float
) -> "torch.Tensor":
    """Cross entropy of the next tokens, of which `share` goes to all of the vocabulary alike, divided by `tokens`.

    `logits` `[rows, columns, vocabulary]`, `labels` `[rows, columns]`; None counts the labels of this batch.
    transformers 4.55's own smoother (trainer.py:3899) knows a causal model by the name of its class, which
    optimum-habana changes: it compares each token with itself. Nor does it divide by the tokens of a whole step. Can go
    when it shifts by what the model is.
    """
    from torch.nn.functional import cross_entropy

    targets = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, reduction="sum", label_smoothing=share)
    return total / ((targets != -100).sum() if tokens is None else tokens)


class GraphedAccumulationMixin:
    """Gives the first batch of a step a training graph of its own.

    Its gradients are the graph's memory, where the next batch's would replace them before they are added up. Gaudi's
    ModuleCacher has an option for that (hpu/graphs.py, have_grad_accumulation), which optimum-habana 1.21.2 leaves out
    (transformers/trainer.py:512). Can go when it is given there.
    """

    def training_step(self, model, inputs, num_items_in_batch=None):
        if set_iteration_count := getattr(self.model, "set_iteration_count", None):
            set_iteration_count.__self__.have_grad_accumulation = True
            trained = next(weight for weight in self.model.parameters() if weight.requires_grad)
            set_iteration_count(int(trained.grad is not None))
        return super().training_step(model, inputs, num_items_in_batch)


class WholeStepsMixin:
    """Takes the last step of an epoch also where a run was resumed within it.

    optimum-habana 1.21.2 counts the batches of a resumed epoch from 0 and compares with those of a whole one
    (transformers/trainer.py:1005): of a last step with fewer batches the gradient would stay and join the next one's.
    It is filled up with batches that are `without_loss`. Behind it there are no more batches.
    """

    def get_batch_samples_transformers(self, epoch_iterator, num_batches, device):
        """Counts labels batch by batch; optimum-habana 1.21.2 (:2813) concatenates them, which fails on two widths."""
        from transformers import Trainer

        batches, count = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        if batches:
            batches += [self.without_loss(batches[-1])] * (num_batches - len(batches))
        return batches, count

    def without_loss(self, batch: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        """A batch of the same shape that has neither loss nor gradient."""
        raise NotImplementedError


class StepsInPartsMixin(Trainer):
    """Makes FusedAdamW right under ZeRO-3, which steps one part of the weights after the other.

    DeepSpeed 0.16.9 empties the groups of all other parts meanwhile (runtime/zero/stage3.py:986), but FusedAdamW counts
    the steps of its bias correction by group, empty or not: all parts but the first would be corrected for a later
    step.
    """

    def create_optimizer(self) -> "torch.optim.Optimizer":
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        is_new = self.optimizer is None
        optimizer = super().create_optimizer()
        if is_new and is_deepspeed_zero3_enabled():
            optimizer.register_step_pre_hook(_show_one_part)
            optimizer.register_step_post_hook(_show_all_parts)
        return optimizer


def _show_one_part(optimizer: "torch.optim.Optimizer", *_) -> None:
    optimizer.groups_of_all_parts = optimizer.param_groups
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        group.pop("step", None)
        if "steps" in (state := optimizer.state[group["params"][0]]):
            group["step"] = state["steps"]


def _show_all_parts(optimizer: "torch.optim.Optimizer", *_) -> None:
    for group in optimizer.param_groups:
        if "step" in group:
            optimizer.state[group["params"][0]]["steps"] = group["step"]
    optimizer.param_groups = optimizer.groups_of_all_parts


def load_deepspeed_safely() -> None:
    """Makes DeepSpeed load its checkpoints without running what is pickled in them.

    DeepSpeed 0.16.9 loads with `weights_only=False` (runtime/checkpoint_engine/torch_checkpoint_engine.py:28). Can go
    when it does not.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    TorchCheckpointEngine.load = _load_tensors


def inspect_deepspeed_files(folder: Path) -> None:
    """Raises an InputError for a file of the checkpoint that holds more than tensors. Reads none of the tensors."""
    for path in sorted(folder.rglob("*_states.pt")):
        try:
            _load_tensors(None, str(path), "cpu", mmap=True)
        except RuntimeError as error:
            reason = one_line(error)
            raise InputError(f"{path} is damaged, or no file that DeepSpeed writes: {reason}") from error


def _load_tensors(_, path: str, map_location: Any = None, mmap: bool = False) -> Any:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def find_stage(kind: Any, name: str) -> Any:
        """Allows what Python 3.11.0 to 3.11.3 write for an enum's member; any other use of getattr stays refused."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"it asks for {name} of {kind}")
        return ZeroStageEnum[name]

    try:
        known = [LossScaler, ZeroStageEnum, fragment_address, (find_stage, "builtins.getattr")]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = one_line(error)
        raise InputError(f"{path} holds more than tensors and is not loaded: {reason}") from error


def check_deepspeed_steps(accelerator: Any, may_step: Callable[[bool], bool]) -> None:
    """Lets `may_step(the gradients' norm is finite)` decide over each of DeepSpeed's steps.

    accelerate 1.10.1 takes the step inside its `backward` (utils/deepspeed.py:278), and DeepSpeed 0.16.9 looks for
    values that are not finite under fp16 alone (zero/stage3.py:2043, stage_1_and_2.py:1844). A norm that is not finite,
    as large gradients have it too, is -1 there (runtime/utils.py:826) and clips nothing: Adam's moments would be
    infinite from then on, and its weights stay as they are. Both ZeRO optimizers leave a step out whose `overflow` is
    set.
    """
    from accelerate.utils import DeepSpeedEngineWrapper

    class CheckedEngine(DeepSpeedEngineWrapper):
        def backward(self, loss: "torch.Tensor", sync_gradients: bool = True, **kwargs) -> None:
            self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
            self.engine.backward(loss, **kwargs)
            if sync_gradients:
                optimizer = self.engine.optimizer
                optimizer.overflow = not may_step(all(float(norm) >= 0 for norm in find_norms(optimizer)))
                self.engine.step()
                optimizer.overflow = False  # so that the schedule goes on

    def find_norms(optimizer: Any) -> list:
        """By group of weights, of all ranks."""
        if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
            return optimizer._get_norm_groups()
        if optimizer.cpu_offload:
            return [
                optimizer.complete_grad_norm_calculation_for_cpu_offload(part) for part in optimizer.params_in_partition
            ]
        groups = enumerate(optimizer.params_in_partition)
        return [optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], part) for i, part in groups]

    if not isinstance(accelerator.deepspeed_engine_wrapped, CheckedEngine):
        accelerator.deepspeed_engine_wrapped = CheckedEngine(accelerator.deepspeed_engine_wrapped.engine)


# ---------------------------------------------------------------- the models


def keep_no_input_of_frozen_layers() -> None:
    """Lets a linear layer under ZeRO-3 keep its input for the gradient only where its weight is trained.

    DeepSpeed 0.16.9 (runtime/zero/linear.py:56) always keeps it: for a Llama-2-70B under LoRA, 4.4 GiB a row of 1,024
    tokens. Can go when that line asks `ctx.needs_input_grad`. Before the model is loaded.
    """
    import torch
    from deepspeed.runtime.zero import partition_parameters

    plain = partition_parameters.zero3_linear_wrap
    if plain.__module__ == __name__:
        return

    class FrozenLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias):
            ctx.save_for_backward(weight)  # the parameter, which DeepSpeed empties and fills again
            output = hidden.matmul(weight.t())
            return output if bias is None else output + bias

        @staticmethod
        def backward(ctx, change):
            (weight,) = ctx.saved_tensors
            return change.matmul(weight.to(change.dtype)), None, None

    def linear(hidden, weight, bias=None):
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return plain(hidden, weight, bias)
        return FrozenLinear.apply(hidden, weight, bias)

    partition_parameters.zero3_linear_wrap = linear


@functools.cache
def transformers_class(model_type: str) -> type["PreTrainedModel"]:
    """transformers' own causal language model of this type, as if optimum-habana had not been there.

    optimum-habana 1.21.2 puts its classes and methods into transformers' modules for good (modeling_utils.py:341), and
    some of them are wrong (align/models/families.py says which). So the module is executed once more, beside the
    changed one. Its generation loop is optimum-habana's all the same, as for every class that
    optimum-habana leaves alone. Can go when no family needs it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = CONFIG_MAPPING[model_type]  # where it is optimum-habana's, it has no docstring, which is searched
    config_class.__doc__ = inspect.getdoc(config_class) or ""
    return getattr(_execute_again("modeling", model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


@functools.cache
def transformers_config_class(model_type: str) -> type["PretrainedConfig"]:
    """transformers' own configuration of this type, as if optimum-habana had not been there.

    transformers' class of DeepSeek-V3 reads qk_head_dim and rope_interleave. Neither published folders nor the
    configuration that optimum-habana 1.21.2 puts there (modeling_utils.py:868) have them. Can go when that is left
    alone.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return getattr(_execute_again("configuration", model_type), CONFIG_MAPPING_NAMES[model_type])


def _execute_again(kind: str, model_type: str) -> Any:
    """A module of transformers for that type, beside the one that was changed."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    package = model_type_to_module_name(model_type)
    name = f"transformers.models.{package}.{kind}_{package}"
    importlib.import_module(name)  # dataclasses and docstrings look their module up by name
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gaudi_class(config: "PretrainedConfig") -> type["PreTrainedModel"] | None:
    """optimum-habana's class for this configuration, where it has one; call it once transformers has the classes."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if not is_gaudi_class(found) and found.__module__.startswith("transformers.models."):
        # transformers goes on giving out the class that it gave out before optimum-habana came
        found = getattr(sys.modules[found.__module__], found.__name__)
    return found if is_gaudi_class(found) else None


def is_gaudi_class(model_class: type) -> bool:
    return model_class.__module__.startswith("optimum.habana")


def keep_ranks_apart(model: "nn.Module") -> None:
    """Gives each of Mixtral's blocks of experts the hook below."""
    for module in model.modules():
        if type(module).__name__ == "GaudiMixtralSparseMoeBlock":
            module.register_forward_pre_hook(_show_as_training)


def _show_as_training(experts: "nn.Module", _) -> None:
    """Undoes modeling_mixtral.py:232-239 of optimum-habana 1.21.2, right for tensor parallelism alone.

    Once DeepSpeed communicates, Mixtral's experts add up the outputs of all ranks, unless they are in training mode
    (which else only router_jitter_noise heeds). Ranks that share the data would evaluate a sum of different samples.
    """
    experts.training = True


def keep_out_of_autocast(model: "nn.Module") -> None:
    """Lets modules that stop within Gaudi's autocast compute in their weights' type.

    transformers 4.55 scatters the largest logits among all of them (models/gpt_oss/modeling_gpt_oss.py:145), which
    autocast makes float32 (topk) and bfloat16 (linear), and normalises float32 by bfloat16 weights, as it takes CUDA's
    autocast for all there is (models/nemotron/modeling_nemotron.py:57). Can go when both lines cast.
    """
    kinds = {type(module) for module in model.modules()}
    for kind in kinds:
        if kind.__name__ in ("GptOssTopKRouter", "NemotronLayerNorm1P") and "__wrapped__" not in vars(kind.forward):
            kind.forward = _in_weights_type(kind.forward)


def _in_weights_type(forward: Callable) -> Callable:
    import torch

    @functools.wraps(forward)
    def compute(self, hidden_states: "torch.Tensor"):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return forward(self, hidden_states.to(self.weight.dtype))

    return compute


def keep_frequencies(model: "nn.Module") -> None:
    """Keeps the frequencies of rotary positions in float32 where a whole model is cast.

    Loading in bfloat16 leaves them alone; DeepSpeed 0.16.9 casts them with the weights (runtime/engine.py:1254,
    inference/engine.py:490), as `model.to` does: a frequency that is off by 0.2 % turns the 1000th token by up to two
    radians. optimum-habana's classes keep tables instead. Can go when transformers' classes do not hold buffers.
    """
    for kind in {type(module) for module in model.modules() if _frequencies(module)}:
        kind._apply = _move_frequencies


def _frequencies(module: "nn.Module") -> "dict[str, torch.Tensor]":
    return {
        name: buffer for name, buffer in module._buffers.items() if name.endswith("inv_freq") and buffer is not None
    }


def _move_frequencies(module: "nn.Module", change: Callable, recurse: bool = True) -> "nn.Module":
    """nn.Module._apply, but the frequencies of this very module go to another device alone."""
    from torch import nn

    before = _frequencies(module)
    nn.Module._apply(module, change, recurse)
    for name, buffer in before.items():
        if not buffer.is_meta:
            module._buffers[name] = buffer.to(module._buffers[name].device)
    return module


def unflatten_masks(model: "nn.Module") -> None:
    for module in model.modules():
        hooks = module._forward_pre_hooks.values()
        if type(module).__name__.endswith("Attention") and _unflatten_mask not in hooks:
            module.register_forward_pre_hook(_unflatten_mask, with_kwargs=True)


def bound_masks(model: "nn.Module") -> None:
    """Keeps masks finite in bfloat16.

    optimum-habana 1.21.2 fills them with the lowest number of the embeddings' type (modeling_attn_mask_utils.py:185;
    transformers 4.55 at :350). Within autocast that is float32's, which is -inf where fused attention computes in
    bfloat16. Can go when both take a number that bfloat16 has.
    """
    for module in model.modules():
        hooks = module._forward_pre_hooks.values()
        if type(module).__name__.endswith(("Layer", "Block")) and _bound_mask not in hooks:
            module.register_forward_pre_hook(_bound_mask, with_kwargs=True)


def _bound_mask(block: "nn.Module", args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    import torch

    def bound(value: Any) -> Any:
        is_mask = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1] == 1
        if not is_mask or value.dtype != torch.float32:
            return value
        if not hasattr(value, "bounded"):  # once for all blocks, which keep it for their gradients
            value.bounded = value.clamp(min=torch.finfo(torch.bfloat16).min)
        return value.bounded

    return tuple(map(bound, args)), {name: bound(value) for name, value in kwargs.items()}


def _unflatten_mask(attention: "nn.Module", args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Undoes modeling_gpt2.py:312 of optimum-habana 1.21.2 (and its like), which takes every mask for a 2-D one."""
    mask, length = kwargs.get("attention_mask"), (args[0] if args else kwargs["hidden_states"]).shape[1]
    if mask is not None and length > 1 and mask.shape[1:] == (1, 1, length * length):
        kwargs["attention_mask"] = mask.view(-1, 1, length, length)
    return args, kwargs


# ---------------------------------------------------------------- generation


def adapt_transformers() -> None:
    """Puts optimum-habana's models and generation loop into transformers, without the trainers' import time.

    optimum-habana 1.21.2 imports all its trainers, diffusers and sentence-transformers with any of its modules
    (habana/__init__.py:19, habana/transformers/__init__.py:19): about 10 s before the first word. So these two packages
    run only when something in them is asked for. Can go when a release imports them on demand.
    """
    for name in ("optimum.habana", "optimum.habana.transformers"):
        if name not in sys.modules:
            _defer_package(name)
    with known_plugin():
        from optimum.habana.utils import environment, feature_detection_utils

        # What its own look at the plugin's version finds, without starting pip for it (utils/environment.py:20).
        build = importlib.metadata.version("habana-torch-plugin")
        feature_detection_utils.environment = environment.get_environment(build=build)
        import transformers.generation
        from optimum.habana.transformers.generation import GaudiGenerationMixin
        from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

        mixin = transformers.generation.GenerationMixin
        if mixin.generate is not GaudiGenerationMixin.generate:
            adapt_transformers_to_gaudi()
        mend_transformers()


def mend_transformers() -> None:
    """Mends what transformers' own classes need beside optimum-habana 1.21.2's; may be called more than once."""
    from transformers.generation import GenerationMixin
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    # It registers the kernel without a mask (modeling_utils.py:348), and without one tokens see later ones.
    ALL_MASK_ATTENTION_FUNCTIONS.register("gaudi_fused_sdpa", eager_mask)
    prepare = GenerationMixin.prepare_inputs_for_generation  # optimum-habana puts it there each time that it adapts
    if "__wrapped__" in vars(prepare):
        return

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Without a number of logits that is None, by which Phi-3 cannot slice (generation/utils.py:348)."""
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name != "logits_to_keep" or value is not None}

    GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation


def _defer_package(name: str) -> None:
    """Makes a package importable whose `__init__` runs only when an attribute that is not a submodule is asked for."""
    spec: Any = importlib.util.find_spec(name)
    package: Any = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> Any:
        if attribute.startswith("__") or importlib.util.find_spec(f"{name}.{attribute}") is not None:
            raise AttributeError(attribute)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = load
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, package)
