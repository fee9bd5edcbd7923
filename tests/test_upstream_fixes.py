"""Each fault that align/upstream_fixes.py works around is still there: a test that fails names what can go.

Run: pytest tests/test_upstream_fixes.py
"""

import ast
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

from align import upstream_fixes
from align.errors import InputError

TRAINER = "optimum.habana.transformers.trainer"


def find(module, name):
    """The syntax tree of a function or class, as it is written: decorators hide it at run time."""
    tree = ast.parse(importlib.util.find_spec(module).loader.get_source(module))
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def statements(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def starts_pip_for_the_plugins_version():
    asks = (
        find("optimum.habana.utils.misc", "get_habana_frameworks_version"),
        find("optimum.habana.utils.environment", "get_build"),
    )
    return all("pip " in ast.unparse(ask) and "subprocess.run" in ast.unparse(ask) for ask in asks)


def divides_only_when_pipelining():
    """All divisions of the loss by the accumulation steps stand inside the branch for pipelining."""
    divisions, inside = set(), set()
    step = find(TRAINER, "GaudiTrainer.training_step")
    for branch in statements(step, ast.If):
        if "pipelining_fwd_bwd" in ast.unparse(branch.test):
            inside |= {ast.unparse(each) for each in statements(branch, ast.BinOp) if isinstance(each.op, ast.Div)}
    divisions = {ast.unparse(each) for each in statements(step, ast.BinOp) if isinstance(each.op, ast.Div)}
    return inside and divisions == inside


def knows_causal_models_by_names_that_optimum_habana_changes():
    from optimum.habana.transformers.models import GaudiLlamaForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    loss = ast.unparse(find("transformers.trainer", "Trainer.compute_loss"))
    asks = "model_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()" in loss
    return asks and GaudiLlamaForCausalLM.__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def wraps_training_graphs_for_steps_of_one_batch():
    return "ModuleCacher()(model=model, inplace=True)" in ast.unparse(find(TRAINER, "GaudiTrainer._wrap_model"))


def counts_a_resumed_epoch_from_its_start():
    loop = ast.unparse(find(TRAINER, "GaudiTrainer._inner_training_loop"))
    return "do_sync_step = (step + 1) % args.gradient_accumulation_steps == 0 or step + 1 == steps_in_epoch" in loop


def concatenates_labels_of_a_step():
    return "torch.cat([batch['labels']" in ast.unparse(find(TRAINER, "GaudiTrainer.get_batch_samples_transformers"))


def steps_one_part_with_the_others_empty():
    step = ast.unparse(find("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3._optimizer_step"))
    return "self.optimizer.param_groups[param_group_id]['params'] = []" in step


def loads_pickles():
    name = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine"
    upstream = importlib.import_module(name)
    return "weights_only=False" in inspect.getsource(upstream)


def steps_inside_backward_and_looks_for_nan_under_fp16_alone():
    backward = ast.unparse(find("accelerate.utils.deepspeed", "DeepSpeedEngineWrapper.backward"))
    zero3 = "DeepSpeedZeroOptimizer_Stage3._overflow_check_and_loss_scale_update"
    branch = statements(find("deepspeed.runtime.zero.stage3", zero3), ast.If)[0]
    looks = ast.unparse(branch.test) == "self.dtype == torch.float16" and "check_overflow" in ast.unparse(branch)
    return "self.engine.step()" in backward and looks


def keeps_inputs_of_frozen_weights():
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    kept = []
    hidden = torch.ones(2, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        LinearFunctionForZeroStage3.apply(hidden, torch.ones(4, 3))
    return hidden.shape in kept


def adds_up_experts_of_all_ranks():
    name = "optimum.habana.transformers.models.mixtral.modeling_mixtral"
    forward = find(name, "GaudiMixtralSparseMoeBlock.forward")
    branches = [branch for branch in statements(forward, ast.If) if ast.unparse(branch.test) == "not self.training"]
    return any("comm.all_reduce(final_hidden_states)" in ast.unparse(branch) for branch in branches)


def flattens_every_mask():
    name = "optimum.habana.transformers.models.gpt2.modeling_gpt2"
    return "attention_mask.view(batch_size, -1)" in ast.unparse(find(name, "gaudi_gpt2_forward"))


def fills_masks_with_what_bfloat16_lacks():
    name = "optimum.habana.transformers.modeling_attn_mask_utils"
    prepare = ast.unparse(find(name, "_gaudi_prepare_4d_causal_attention_mask"))
    return "torch.finfo(inputs_embeds.dtype).min" in prepare


def imports_its_trainers_with_any_module():
    """Read as text: the package may be deferred by then, which is the cure."""
    for name in ("optimum.habana", "optimum.habana.transformers"):
        source = importlib.util.find_spec(name).loader.get_source(name)
        if not any(
            "rainer" in ast.unparse(each) for each in ast.parse(source).body if isinstance(each, ast.ImportFrom)
        ):
            return False
    return True


def passes_a_number_of_logits_that_is_none():
    prepare = importlib.import_module("transformers.models.phi3.modeling_phi3").Phi3ForCausalLM
    takes = inspect.signature(prepare.prepare_inputs_for_generation).parameters["logits_to_keep"].default is None
    passes = find("optimum.habana.transformers.generation.utils", "GaudiGenerationMixin._prepare_inputs_for_generation")
    return takes and "in kwargs.items()" in ast.unparse(passes)


def leaves_the_fused_optimizer_off():
    from optimum.habana import GaudiConfig

    return not GaudiConfig().use_fused_adam


def passes_flash_attention_to_some_families_alone():
    passes = ast.unparse(find(TRAINER, "_get_input_update_settings"))
    first = passes.partition("use_flash_attention'] = True")[0].rpartition("model_type in ")[2]
    return "'llama'" in first and "'mistral'" not in first and "'qwen3'" not in first


def puts_its_classes_into_transformers():
    adapt = ast.unparse(find("optimum.habana.transformers.modeling_utils", "adapt_transformers_to_gaudi"))
    return "transformers.models.gemma.modeling_gemma.GemmaForCausalLM = GaudiGemmaForCausalLM" in adapt


def puts_a_shorter_configuration_into_transformers():
    adapt = ast.unparse(find("optimum.habana.transformers.modeling_utils", "adapt_transformers_to_gaudi"))
    name = "optimum.habana.transformers.models.deepseek_v3.configuration_deepseek_v3"
    takes = [arg.arg for arg in find(name, "DeepseekV3Config.__init__").args.args]
    puts = "transformers.models.deepseek_v3.configuration_deepseek_v3.DeepseekV3Config = DeepseekV3Config" in adapt
    return puts and "rope_interleave" not in takes


def registers_a_kernel_without_a_mask():
    adapt = ast.unparse(find("optimum.habana.transformers.modeling_utils", "adapt_transformers_to_gaudi"))
    return "ALL_ATTENTION_FUNCTIONS.register('gaudi_fused_sdpa'" in adapt and "ALL_MASK_ATTENTION" not in adapt


def scatters_without_a_cast():
    router = find("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssTopKRouter.forward")
    return "scatter_(1, router_indices, router_top_value)" in ast.unparse(router)


def switches_autocast_off_under_deepspeed():
    made = statements(find(TRAINER, "GaudiTrainer.__init__"), ast.If)
    branches = [branch for branch in made if ast.unparse(branch.test) == "self.args.deepspeed"]
    return any("self.gaudi_config.use_torch_autocast = False" in ast.unparse(branch) for branch in branches)


def takes_cudas_autocast_for_all():
    cast = find("transformers.models.nemotron.modeling_nemotron", "_cast_if_autocast_enabled")
    return "if not torch.is_autocast_enabled()" in ast.unparse(cast)


def casts_frequencies_with_the_weights():
    engines = "DeepSpeedEngine._configure_distributed_model", "InferenceEngine._convert_to_dtype"
    modules = "deepspeed.runtime.engine", "deepspeed.inference.engine"
    return all(
        "self.module.bfloat16()" in ast.unparse(find(module, name))
        for module, name in zip(modules, engines, strict=True)
    )


FAULTS = {
    "known_plugin": [starts_pip_for_the_plugins_version],
    "RightScaleMixin": [divides_only_when_pipelining],
    "smoothed_loss": [knows_causal_models_by_names_that_optimum_habana_changes],
    "GraphedAccumulationMixin": [wraps_training_graphs_for_steps_of_one_batch],
    "WholeStepsMixin": [counts_a_resumed_epoch_from_its_start, concatenates_labels_of_a_step],
    "StepsInPartsMixin": [steps_one_part_with_the_others_empty],
    "load_deepspeed_safely": [loads_pickles],
    "inspect_deepspeed_files": [loads_pickles],
    "check_deepspeed_steps": [steps_inside_backward_and_looks_for_nan_under_fp16_alone],
    "keep_frequencies": [casts_frequencies_with_the_weights],
    "keep_no_input_of_frozen_layers": [keeps_inputs_of_frozen_weights],
    "keep_ranks_apart": [adds_up_experts_of_all_ranks],
    "keep_out_of_autocast": [scatters_without_a_cast, takes_cudas_autocast_for_all],
    "unflatten_masks": [flattens_every_mask],
    "bound_masks": [fills_masks_with_what_bfloat16_lacks],
    "adapt_transformers": [imports_its_trainers_with_any_module],
    "gaudi_config": [leaves_the_fused_optimizer_off],
    "computes_in_autocast": [switches_autocast_off_under_deepspeed],
    "gaudi_class": [puts_its_classes_into_transformers],
    "is_gaudi_class": [puts_its_classes_into_transformers],
    "transformers_config_class": [puts_a_shorter_configuration_into_transformers],
    "transformers_class": [puts_its_classes_into_transformers],
    "mend_transformers": [registers_a_kernel_without_a_mask, passes_a_number_of_logits_that_is_none],
    "attention_inputs": [passes_flash_attention_to_some_families_alone],
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_the_fault_is_still_there(name, fault):
    assert fault(), f"upstream no longer needs align.upstream_fixes.{name}: it can go"


def test_every_workaround_has_its_fault():
    public = {
        name
        for name, value in vars(upstream_fixes).items()
        if getattr(value, "__module__", None) == upstream_fixes.__name__ and not name.startswith("_")
    }
    assert public == FAULTS.keys()


class AsOlderPythonsWrite:
    """A member of an enum as Python 3.11.0 to 3.11.3 pickle it; Debian 12 has 3.11.2."""

    def __init__(self, kind, name):
        self.member = kind, name

    def __reduce__(self):
        return getattr, self.member


def test_deepspeeds_files_of_other_pythons_are_loaded_and_nothing_else_is_looked_up_for_them(tmp_path):
    path = tmp_path / "zero_pp_rank_0_optim_states.pt"
    torch.save({"stage": AsOlderPythonsWrite(ZeroStageEnum, "weights"), "sum": torch.ones(2)}, path)

    upstream_fixes.load_deepspeed_safely()
    loaded = TorchCheckpointEngine().load(str(path), map_location="cpu")

    assert loaded["stage"] is ZeroStageEnum.weights
    for planted in (AsOlderPythonsWrite(dict, "fromkeys"), AsOlderPythonsWrite(ZeroStageEnum, "__reduce__")):
        torch.save({"stage": planted}, path)
        with pytest.raises(InputError, match="holds more than tensors and is not loaded"):
            upstream_fixes.inspect_deepspeed_files(tmp_path)


def test_no_pip_is_started_and_none_is_needed(tmp_path):
    code = """if True:
        import os, subprocess
        class Popen(subprocess.Popen):
            def __init__(self, command, *args, **kwargs):
                os.write(1, f"{command}\\n".encode())
                super().__init__(command, *args, **kwargs)
        subprocess.Popen = Popen
        import sft, dpo
    """
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'emulator'}"}

    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    assert "hl-smi" in ended.stdout
    assert "pip" not in ended.stdout


def test_positions_are_as_exact_where_a_whole_model_is_cast_as_where_it_is_loaded_so():
    from tiny import make_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(make_config("olmo")).eval()
    positions, rotary = torch.arange(3000)[None], whole.model.rotary_emb
    exact = rotary.inv_freq.clone()
    upstream_fixes.keep_frequencies(whole)

    whole.bfloat16()  # as DeepSpeed does

    assert whole.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(rotary.inv_freq, exact)
    turned = rotary(torch.zeros(1), positions)[0]
    rotary.inv_freq = exact.bfloat16()
    assert (turned - rotary(torch.zeros(1), positions)[0]).abs().max() > 0.1  # what it would be without


def test_weights_within_a_module_that_holds_frequencies_are_cast():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(2, 2)
            self.register_buffer("inv_freq", torch.tensor([1 / 3]))
            self.register_buffer("scale", torch.ones(1))

    attention = Attention()
    upstream_fixes.keep_frequencies(attention)

    attention.to(torch.bfloat16)

    assert attention.project.weight.dtype == attention.scale.dtype == torch.bfloat16
    assert attention.inv_freq.equal(torch.tensor([1 / 3]))
    assert attention.to("meta").inv_freq.is_meta


class SixMixin:
    def compute_loss(self, *args, **kwargs):
        return 6.0


def test_the_loss_of_an_evaluation_alone_is_divided_by_no_steps_though_deepspeeds_engine_says_it_trains():
    engine = SimpleNamespace(training=True, module=SimpleNamespace(training=False))
    trainer = type("Trainer", (upstream_fixes.RightScaleMixin, SixMixin), {})()

    assert trainer.compute_loss(engine, {}) == 6.0
