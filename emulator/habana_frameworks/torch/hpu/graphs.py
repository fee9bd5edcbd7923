"""HPU graphs: what a card recorded, replayed from and into the memory of the recorded run (hpu/graphs.py).

A replay copies its inputs into the first call's tensors and returns the first call's outputs, overwritten.
"""

import copy
import functools
import inspect
import os
import warnings
from collections import Counter, UserDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from habana_frameworks.emulator import dry, graph_counter, placement
from habana_frameworks.emulator.recording import Recorder, Recording
from habana_frameworks.torch.hpu.random import get_rng_state, set_rng_state
from habana_frameworks.torch.hpu.streams import Stream, current_stream, default_stream
from habana_frameworks.torch.utils.internal import is_lazy

__all__ = [
    "HPUGraph",
    "ModuleCacher",
    "graph",
    "is_current_stream_capturing",
    "make_graphed_callables",
    "wrap_in_hpu_graph",
    "wrap_in_hpu_graph_func",
]


class HPUGraph:
    """A recorded sequence of operations; `replay` runs it again from and into the same tensors."""

    def __init__(self):
        self.recording = Recording(keep_all=True)
        self._recorder: Recorder | None = None
        self._inputs: list[torch.Tensor] = []
        self._random_state: torch.Tensor | None = None

    def capture_begin(self, dry_run: bool = False) -> None:
        """`dry_run`: a card computes nothing meanwhile, so that none of its random numbers is used up."""
        if self._recorder:
            raise RuntimeError("GRAPH:: graph Capture already in progress")
        self._random_state = get_rng_state() if dry_run else None
        self._recorder = Recorder(self.recording)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        if self._recorder:
            self._recorder.__exit__(None, None, None)
            self._recorder = None
        if self._random_state is not None:
            set_rng_state(self._random_state)
            self._random_state = None

    def replay(self, asynchronous: bool = False) -> None:
        self._replay()

    def replayV2(self, static_tlist: list[torch.Tensor], tlist: list[torch.Tensor], asynchronous: bool = False) -> None:
        """Reads `tlist` where it read `static_tlist`."""
        self._replay(zip(self.recording.slots_of(static_tlist), tlist, strict=True))

    def replayV3(self, tlistI: list[torch.Tensor], asynchronous: bool = False) -> None:
        """Reads these tensors where it read those of `mark_user_inputs`."""
        self._replay(zip(self.recording.slots_of(self._inputs), tlistI, strict=True))

    def _replay(self, given=()) -> None:
        if self._recorder:
            raise RuntimeError("GRAPH:: Capture in progress")
        self.recording.replay({slot: tensor for slot, tensor in given if slot is not None})

    def mark_user_inputs(self, static_tlist: list[torch.Tensor]) -> None:
        self._inputs = list(static_tlist)

    def mark_user_outputs(self, static_tlist: list[torch.Tensor]) -> None:
        """All that somebody holds is written."""

    def get_user_input_match_indices(self) -> set[int]:
        """Which of the marked inputs the graph reads."""
        return {place for place, slot in enumerate(self.recording.slots_of(self._inputs)) if slot is not None}

    def clear_inputs(self) -> None:
        """Frees memory on a card."""

    def reset(self) -> None:
        self.recording = Recording(keep_all=True)


class graph:
    """Records what runs in the context, on a stream of its own unless one is given."""

    default_capture_stream: Stream | None = None

    def __init__(self, hpu_graph: HPUGraph, stream: Stream | None = None, dry_run: bool = False):
        self.hpu_graph, self.dry_run = hpu_graph, dry_run
        if graph.default_capture_stream is None:
            graph.default_capture_stream = Stream()
        self.capture_stream = graph.default_capture_stream if stream is None else stream

    def __enter__(self) -> None:
        self.capture_stream.__enter__()
        self.capture_stream.is_capture = True
        self.hpu_graph.capture_begin(self.dry_run)

    def __exit__(self, *exception) -> None:
        self.hpu_graph.capture_end()
        self.capture_stream.is_capture = False
        self.capture_stream.__exit__(*exception)


def is_current_stream_capturing() -> bool:
    return getattr(current_stream(), "is_capture", False)


def input_hash(value: Any) -> Hashable:
    """What decides which graph a call replays: shapes, all that is no tensor, and whether autocast is on; not dtypes,
    training or grad mode.

    As on a card it is a hash, so that Python's own collisions count too: -1 and -2 are one key. A UserDict, such as a
    tokenizer's BatchEncoding, has a new one in every call: its tensors are taken by their rows, which are objects.
    """
    if isinstance(value, dict):
        return input_hash(tuple(value.items()))
    if isinstance(value, torch.Tensor):
        value = tuple(value.shape)
    elif isinstance(value, (list, tuple)):
        value = tuple(map(input_hash, value))
    elif isinstance(value, UserDict):
        value = tuple((name, tuple(item)) for name, item in value.items())
    return hash((value, torch.is_autocast_enabled("hpu")))


def copy_to(static: Any, given: Any) -> None:
    """Into the tensors of a recorded call, in dicts, lists and tuples that are of the same types."""
    if type(static) is not type(given):
        raise AssertionError(f"an HPU graph was recorded with {type(static).__name__}, not {type(given).__name__}")
    if isinstance(static, torch.Tensor):
        if static is not given:
            static.copy_(given)
    elif isinstance(static, (dict, list, tuple)):
        if isinstance(static, dict):
            static, given = static.items(), given.items()
        for old, new in zip(static, given, strict=False):
            copy_to(old, new)


def _warn_of_host_inputs(inputs: tuple) -> None:
    for leaf in tree_leaves(inputs):
        if placement.strict and isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.device.type == "cpu":
            warnings.warn(
                f"{placement.caller()} gives an HPU graph a tensor of the host, of shape {list(leaf.shape)}: replays "
                "go on with what it holds now",
                stacklevel=2,
            )


def _from_environment(name: str, given: bool) -> bool:
    return os.environ[name] == "1" if name in os.environ else given


class _Replayed:
    """A call of a function that was recorded."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        self.recording = Recording()
        with Recorder(self.recording):
            self.outputs = function(*args, **kwargs)
        self.inputs = args, kwargs

    def replay(self, args: tuple, kwargs: dict, reads_in_place: bool) -> Any:
        """`reads_in_place`: from the caller's tensors, not from the first call's."""
        if reads_in_place:
            static, given = tree_leaves(self.inputs), tree_leaves((args, kwargs))
            slots = self.recording.slots_of(static)
            self.recording.replay({slot: new for slot, new in zip(slots, given, strict=True) if slot is not None})
        else:
            copy_to(self.inputs, (args, kwargs))
            self.recording.replay()
        return self.outputs


class _Held:
    """A call of a function on a dry card: the memory that its graph keeps. There is nothing to compute again."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict, reads_in_place: bool):
        self.outputs = function(*args, **kwargs)
        self.inputs = None if reads_in_place else (args, kwargs)

    def replay(self, *_: Any) -> Any:
        return self.outputs


def _wrap(function: Callable, cache: dict[Hashable, Any], disable_tensor_cache: bool, max_graphs: int | None):
    @functools.wraps(function)
    def forward(*args, **kwargs):
        warmup_mode = kwargs.pop("warmup_mode", False)
        if kwargs.pop("bypass_hpu_graphs", False):
            return function(*args, **kwargs)
        key = input_hash((args, kwargs))
        kwargs.pop("cache_tensors_list", None)
        if key not in cache and max_graphs is not None and len(cache) == max_graphs:
            return function(*args, **kwargs)
        with graph_counter.hpu_graph(id(cache), key):
            reads_in_place = _from_environment("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", disable_tensor_cache)
            if key not in cache:
                _warn_of_host_inputs((args, kwargs))
                if dry.is_wanted:
                    cache[key] = _Held(function, args, kwargs, reads_in_place)
                else:
                    cache[key] = _Replayed(function, args, kwargs)
                return cache[key].outputs
            if warmup_mode:
                return cache[key].outputs
            return cache[key].replay(args, kwargs, reads_in_place)

    return forward


def wrap_in_hpu_graph_func(
    func: Callable,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> Callable:
    """Makes `func` run as one HPU graph for each key of its inputs, at most `max_graphs` of them."""
    return _wrap(func, {}, disable_tensor_cache, max_graphs)


def wrap_in_hpu_graph(
    module: torch.nn.Module,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> torch.nn.Module:
    """Makes `module.forward` run as one HPU graph for each key of its inputs, at most `max_graphs` of them.

    `disable_tensor_cache`: replays read the caller's tensors, and no copies of them are kept. `asynchronous` and
    `dry_run` change times and memory on a card, and nothing here.
    """
    cache: dict[Hashable, Any] = {}
    module.forward = _wrap(module.forward, cache, disable_tensor_cache, max_graphs)
    module.clear_cache = cache.clear
    module.clear_inputs = lambda: None
    return module


class _TrainingGraph:
    """A forward pass and its backward pass, each an HPU graph."""

    def __init__(
        self,
        run: Callable,
        inputs: tuple[torch.Tensor, ...],
        parameters: tuple,
        allow_unused_input: bool,
        reads_in_place: bool,
        dry_run: bool,
    ):
        """`run` maps the inputs to a tuple of tensors. `reads_in_place`: replays read the caller's tensors."""
        self.forward, self.backward = HPUGraph(), HPUGraph()
        self.inputs, self.parameters, self.reads_in_place = inputs, parameters, reads_in_place
        dry_run = dry_run or reads_in_place
        with graph(self.forward, default_stream(), dry_run):
            self.outputs = run(*inputs)
        self.gradients = [torch.empty_like(each) if each.requires_grad else None for each in self.outputs]
        surface = [*inputs, *parameters]
        with graph(self.backward, default_stream(), dry_run):
            made = torch.autograd.grad(
                [each for each in self.outputs if each.requires_grad],
                [each for each in surface if each.requires_grad],
                [each for each in self.gradients if each is not None],
                allow_unused=allow_unused_input,
                materialize_grads=allow_unused_input,
            )
        made = iter(made)
        self.made = [next(made) if each.requires_grad else None for each in surface]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _ReplayTraining.apply(self, *inputs, *self.parameters)


class _ReplayTraining(torch.autograd.Function):
    @staticmethod
    def forward(ctx, training_graph: _TrainingGraph, *inputs: torch.Tensor):
        ctx.graph = training_graph
        inputs = inputs[: len(training_graph.inputs)]
        if training_graph.reads_in_place:
            ctx.save_for_backward(*inputs)
            training_graph.forward.replayV2(training_graph.inputs, inputs)
        else:
            for static, given in zip(training_graph.inputs, inputs, strict=True):
                static.copy_(given)
            training_graph.forward.replay()
        return tuple(output.detach() for output in training_graph.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: torch.Tensor):
        pairs = zip(ctx.graph.gradients, gradients, strict=True)
        pairs = [(static, given) for static, given in pairs if static is not None]
        if ctx.graph.reads_in_place:
            static, given = zip(*pairs, *zip(ctx.graph.inputs, ctx.saved_tensors, strict=True), strict=True)
            ctx.graph.backward.replayV2(static, given)
        else:
            for static, given in pairs:
                static.copy_(given)
            ctx.graph.backward.replay()
        return None, *(None if made is None else made.detach() for made in ctx.graph.made)


def make_graphed_callables(
    callables,
    sample_args,
    warmups: int = 0,
    allow_unused_input: bool = False,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
):
    """The callable, or each of a tuple of them, as a training graph for inputs like `sample_args`, tensors alone."""
    if not isinstance(callables, tuple):
        options = allow_unused_input, asynchronous, disable_tensor_cache, dry_run
        return make_graphed_callables((callables,), (sample_args,), warmups, *options)[0]
    graphed = []
    for function, args in zip(callables, sample_args, strict=True):
        is_module = isinstance(function, torch.nn.Module)
        if is_module and (function._backward_hooks or function._forward_hooks or function._forward_pre_hooks):
            raise AssertionError("Modules must not have hooks registered at the time they are passed.")
        if is_module and any(buffer.requires_grad for buffer in function.buffers()):
            raise AssertionError("only parameters may be trainable; all buffers must have requires_grad=False")
        if not all(isinstance(value, torch.Tensor) for value in args):
            raise AssertionError("sample_args for each callable must be a tuple of Tensors")
        for _ in range(warmups):
            _warm_up(function, args, allow_unused_input)
        graphed.append(_graph_callable(function, args, allow_unused_input, disable_tensor_cache, dry_run))
    return tuple(graphed)


def _warm_up(function: Callable, args: tuple, allow_unused_input: bool) -> None:
    """A forward and a backward pass, whose gradients nobody keeps."""
    outputs = tree_leaves(function(*args))
    surface = [*args, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
    torch.autograd.grad(
        outputs,
        [each for each in surface if each.requires_grad],
        [torch.empty_like(each) for each in outputs],
        allow_unused=allow_unused_input,
    )


def _graph_callable(function: Callable, args: tuple, *options: bool) -> Callable:
    run = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = tuple(function.parameters()) if isinstance(function, torch.nn.Module) else ()
    returns_tensor = False

    def as_tuple(*inputs):
        nonlocal returns_tensor
        outputs = run(*inputs)
        returns_tensor = isinstance(outputs, torch.Tensor)
        return (outputs,) if returns_tensor else outputs

    recorded = _TrainingGraph(as_tuple, args, parameters, *options)

    def graphed(*inputs):
        outputs = recorded(*inputs)
        return outputs[0] if returns_tensor else outputs

    if not isinstance(function, torch.nn.Module):
        return graphed
    mode = function.training
    function.forward = lambda *inputs: graphed(*inputs) if function.training is mode else run(*inputs)
    return function


class _TrainedCall:
    """A training graph of a module's call, whose arguments and results may be nested."""

    def __init__(self, module: torch.nn.Module, arguments: dict, *options: bool):
        leaves, structure = tree_flatten(arguments)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def run(*inputs):
            filled = list(leaves)
            for place, given in zip(places, inputs, strict=True):
                filled[place] = given
            results, self.structure = tree_flatten(module(**tree_unflatten(filled, structure)))
            self.results = [None if isinstance(result, torch.Tensor) else (result,) for result in results]
            return tuple(result for result in results if isinstance(result, torch.Tensor))

        inputs = tuple(leaves[place] for place in places)
        self.graph = _TrainingGraph(run, inputs, tuple(module.parameters()), *options)

    def __call__(self, arguments: dict) -> Any:
        tensors = iter(self.graph(*(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor))))
        results = [next(tensors) if constant is None else constant[0] for constant in self.results]
        return tree_unflatten(results, self.structure)


class ModuleCacher:
    """Training graphs: `ModuleCacher()(model)` makes the forward and backward pass of each key of inputs HPU graphs.

    They are recorded in training, with gradients, in lazy mode; else the module runs as it did. `use_lfu`: the most
    frequent keys between `capture_start` and `capture_end` are. `have_grad_accumulation`: the first pass of an
    accumulation, which `set_iteration_count` tells, has a graph of its own, as it makes the memory of the gradients.
    """

    def __init__(self, max_graphs: int = 10):
        self.max_graphs = max_graphs
        self.graphs: dict[Hashable, _TrainedCall] = {}
        self.seen: Counter[Hashable] = Counter()
        self.frequent: set[Hashable] = set()
        self.replayed: Counter[Hashable] = Counter()
        self.not_recorded = 0
        self.is_tracing = self.is_counting = False
        self.forward_count = 0

    def __call__(
        self,
        model: torch.nn.Module,
        use_lfu: bool = False,
        inplace: bool = True,
        allow_unused_input: bool = False,
        asynchronous: bool = False,
        have_grad_accumulation: bool = False,
        log_frequency: int = 100,
        verbose: bool = False,
        disable_tensor_cache: bool = False,
        dry_run: bool = False,
    ) -> torch.nn.Module:
        """The module, with its forward replaced; a shallow copy of it if not `inplace`."""
        model.is_hpugraph_tracing = lambda: self.is_tracing
        model = model if inplace else copy.copy(model)
        self.model, self.original = model, copy.copy(model)
        if isinstance(model, (torch.nn.parallel.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            raise AssertionError("Use DataParallel/DistributedDataParallel only after wrapping with ModuleCacher")
        self.defaults = _defaults_of(self.original.forward)
        self.use_lfu, self.have_grad_accumulation = use_lfu, have_grad_accumulation
        reads_in_place = _from_environment("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", disable_tensor_cache)
        self.options = allow_unused_input, reads_in_place, _from_environment("PT_HPUGRAPH_ENABLE_DRY_RUN", dry_run)
        self.verbose, self.log_frequency = verbose, log_frequency
        model.orig_forward = model.forward
        model.forward = self.forward
        model.set_iteration_count = self.set_iteration_count
        model.capture_start, model.capture_end = self.capture_start, self.capture_end
        return model

    def set_iteration_count(self, iter_num: int) -> None:
        self.forward_count = iter_num

    def capture_start(self) -> None:
        self.is_counting = True

    def capture_end(self) -> None:
        self.is_counting = False
        self.frequent = {key for key, _ in self.seen.most_common(self.max_graphs)}
        self.seen.clear()

    def forward(self, *args, **kwargs) -> Any:
        if self.verbose and (self.replayed.total() + self.not_recorded) % self.log_frequency == 0:
            self.log_stats()
        arguments = self.defaults | dict(zip(self.defaults, args, strict=False)) | kwargs
        first = self.have_grad_accumulation and self.forward_count == 0
        key = input_hash(arguments), first
        if self.is_counting:
            self.seen[key] += 1
        may_record = key in self.frequent if self.use_lfu else len(self.graphs) < self.max_graphs
        learns = self.model.training and torch.is_grad_enabled() and is_lazy() and not self.is_counting
        if not learns or not (key in self.graphs or may_record):
            self.not_recorded += 1
            return self.model.orig_forward(*args, **kwargs)
        self.replayed[key] += 1
        with graph_counter.hpu_graph(id(self), key):
            if dry.is_wanted:
                self.graphs[key] = None
                return self.model.orig_forward(*args, **kwargs)
            if key not in self.graphs:
                self.is_tracing = True
                self.graphs[key] = _TrainedCall(self.original, arguments, *self.options)
                self.is_tracing = False
            return self.graphs[key](arguments)

    def log_stats(self) -> None:
        print(
            f"HPU Graph Statistics: {len(self.graphs)} of at most {self.max_graphs} graphs recorded, "
            f"{self.replayed.total()} forward passes by graph, {self.not_recorded} without"
        )


def _defaults_of(forward: Callable) -> dict[str, Any]:
    """Names and defaults of what a recorded forward may be given."""
    defaults = {}
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise AssertionError(f"Unsupported argument type : {parameter.kind}")
        if parameter.kind == parameter.VAR_KEYWORD:
            print("[WARNING] Variable keyword arguments will not be supported.")
        else:
            defaults[name] = parameter.default
    return defaults
