"""A causal language model token by token: the texts of a batch, and the forward passes that continue them.

optimum-habana's own classes take the place of the next token as a tensor, so that all steps have one shape; the
others grow by a column a step.
"""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Where the keys and the values of a layer have their columns; everybody else has them in the last but one dimension.
COLUMNS = {"bloom": (-1, -2)}


class Texts:
    """Tokens `[rows, columns]` and what of them is text, on the device: prompts padded on the left, then answers.

    `place` is the column of the next token, as a tensor `[1]` that moves on in place, and `length` the same number on
    the host.
    """

    def __init__(self, ids: "torch.LongTensor", mask: "torch.LongTensor", columns: int):
        """`ids` and `mask` `[rows, width]` on the device; `columns` beyond the width are free."""
        import torch

        self.width = self.length = ids.shape[1]
        self.tokens, self.mask = ids, mask
        self.place = torch.tensor([self.length], device=ids.device)
        self.lengthen(columns - self.width)

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def columns(self) -> int:
        return self.tokens.shape[1]

    def lengthen(self, columns: int) -> None:
        from torch.nn.functional import pad

        self.tokens, self.mask = pad(self.tokens, (0, columns)), pad(self.mask, (0, columns))

    def append(self, tokens: "torch.LongTensor") -> None:
        """One token `[rows]` to each row."""
        self.tokens.index_copy_(1, self.place, tokens[:, None])
        self.mask.index_fill_(1, self.place, 1)
        self.place.add_(1)
        self.length += 1

    def select(self, rows: "torch.LongTensor") -> None:
        self.tokens, self.mask = self.tokens.index_select(0, rows), self.mask.index_select(0, rows)

    def masked(self) -> "torch.LongTensor":
        """Tokens `[rows, columns]`, -1 where there is no text."""
        return self.tokens.where(self.mask == 1, -1)

    def last(self, number: int) -> "torch.LongTensor":
        """The last tokens `[rows, number]`, -1 where the text is shorter."""
        import torch

        places = self.place - torch.arange(number, 0, -1, device=self.place.device)
        return self.masked().index_select(1, places.clamp(min=0)).where(places >= 0, -1)


@dataclass(frozen=True)
class ForwardOptions:
    """How the forward passes run; `inputs` are passed to optimum-habana's classes as they are."""

    use_cache: bool = True
    reuse_cache: bool = False
    bucket_size: int = -1
    use_hpu_graphs: bool = False
    limit_hpu_graphs: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)


class StaticShapes:
    """Forward passes of optimum-habana's classes, all but the first of one shape.

    The first pass sees the prompts alone; their keys and values are lengthened to hold the answers too. With
    `reuse_cache` they stay inside the attention layers instead, and one allocation of `columns` serves all batches.
    """

    def __init__(self, model: "PreTrainedModel", options: ForwardOptions):
        self.model = model
        self.options = options
        self.past: Any = None
        self.caches: dict[tuple[int, int], list[torch.Tensor]] = {}

    def start(self, texts: Texts, copies: int = 1) -> "torch.FloatTensor":
        """Logits `[rows * copies, vocabulary]` of the first new tokens; each row is repeated `copies` times."""
        import torch

        self.past = None
        repeated = torch.arange(texts.rows, device=texts.tokens.device).repeat_interleave(copies)
        if self.options.reuse_cache:
            texts.select(repeated)
            self._allocate(texts)
        ids, mask = texts.tokens[:, : texts.width], texts.mask[:, : texts.width]
        options = {"bypass_hpu_graphs": self.options.limit_hpu_graphs} if self.options.use_hpu_graphs else {}
        if not self.options.use_cache:
            ids, mask = texts.tokens, texts.mask
        logits, past = self._forward(ids, mask, texts, **options)
        if self.options.use_cache:
            self.past = past
        if self.options.reuse_cache:
            return logits
        self._lengthen(texts.columns - texts.width)
        if copies > 1:
            texts.select(repeated)
            self.select(repeated)
            logits = logits.index_select(0, repeated)
        return logits

    def step(self, texts: Texts) -> "torch.FloatTensor":
        """Logits `[rows, vocabulary]` after the last tokens of `texts`."""
        if texts.length > texts.columns:
            raise ValueError(f"{texts.length} tokens do not fit {texts.columns} columns")
        options: dict[str, Any] = {}
        if self.options.use_hpu_graphs and self.options.limit_hpu_graphs:
            options["bypass_hpu_graphs"] = False
        if self.options.reuse_cache and self.options.bucket_size > 0:
            bucket = self.options.bucket_size
            options["cache_idx"] = min(-(-texts.length // bucket) * bucket, texts.columns)
        logits, past = self._forward(texts.tokens, texts.mask, texts, **options)
        if self.options.use_cache and not self.options.reuse_cache:
            self.past = past
        return logits

    def select(self, rows: "torch.LongTensor") -> None:
        """Puts the cache into the order of `rows`, of which some may be there twice."""
        if self.options.reuse_cache:
            self.model.reorder_kv_cache(rows)
        elif self.past is not None:
            self.past = _map_cache(lambda states, _: states.index_select(0, rows), self.past)

    def lengthen(self, texts: Texts, columns: int) -> None:
        """Adds free columns to texts and cache."""
        texts.lengthen(columns)
        self._lengthen(columns)

    def _lengthen(self, columns: int) -> None:
        from torch.nn.functional import pad

        dimensions = COLUMNS.get(self.model.config.model_type, (-2, -2))

        def add_columns(states: "torch.Tensor", kind: int) -> "torch.Tensor":
            return pad(states, (0, columns) if dimensions[kind] == -1 else (0, 0, 0, columns))

        if columns and self.past is not None:
            self.past = _map_cache(add_columns, self.past)

    def _allocate(self, texts: Texts) -> None:
        """Gives the attention layers the cache for these rows and columns, the same one each time.

        A recorded graph writes to the memory that it was recorded with. The layers' own `allocate` would give it
        another one, or refuse prompts of another width.
        """
        layers = [module for module in self.model.modules() if type(module).__name__ == "KVCache"]
        shape = (texts.rows, texts.columns)
        if shape not in self.caches:
            for layer in layers:
                layer.cache = None
            self.model.allocate_kv_cache(texts.rows, texts.columns, texts.width)
            self.caches[shape] = [layer.cache for layer in layers]
        for layer, cache in zip(layers, self.caches[shape], strict=True):
            layer.cache, layer.inp_seq_len = cache, texts.width

    def _forward(self, ids, mask, texts: Texts, cache_idx: int | None = None, **graphs: bool) -> tuple:
        import torch

        inputs = self.model.prepare_inputs_for_generation(
            ids,
            past_key_values=self.past,
            attention_mask=mask,
            token_idx=texts.place,
            use_cache=self.options.use_cache,
            reuse_cache=self.options.reuse_cache,
            trim_logits=self.options.use_cache,  # the head sees the last position of the prompts alone
            cache_position=torch.arange(ids.shape[1], device=ids.device) if self.past is None else texts.place - 1,
            cache_idx=cache_idx,
            lazy_mode=True,
            **self.options.inputs,
        )
        output = self.model(**inputs, return_dict=True, **graphs)
        logits = output.logits
        if logits.dim() == 3:
            logits = logits[:, -1] if logits.shape[1] == 1 else logits.index_select(1, texts.place - 1).squeeze(1)
        return logits.float(), output.get("past_key_values")


class GrowingShapes:
    """Forward passes of transformers' own classes, each a column longer than the one before."""

    def __init__(self, model: "PreTrainedModel", options: ForwardOptions):
        self.model = model
        known = inspect.signature(type(model).forward).parameters
        self.known = {name for name in ("position_ids", "cache_position", "logits_to_keep") if name in known}
        self.use_cache = options.use_cache and takes_cache(model)
        self.graphs = {"bypass_hpu_graphs": True} if options.use_hpu_graphs else {}  # none would be replayed
        self.past: Any = None

    def start(self, texts: Texts, copies: int = 1) -> "torch.FloatTensor":
        """Logits `[rows * copies, vocabulary]` of the first new tokens; each row is repeated `copies` times."""
        import torch

        self.past = self._make_cache(texts) if self.use_cache else None
        logits = self._forward(texts, 0)
        if copies > 1:
            repeated = torch.arange(texts.rows, device=texts.tokens.device).repeat_interleave(copies)
            texts.select(repeated)
            self.select(repeated)
            logits = logits.index_select(0, repeated)
        return logits

    def step(self, texts: Texts) -> "torch.FloatTensor":
        """Logits `[rows, vocabulary]` after the last tokens of `texts`."""
        return self._forward(texts, texts.length - 1 if self.use_cache else 0)

    def select(self, rows: "torch.LongTensor") -> None:
        if self.past is not None:
            self.past.reorder_cache(rows)

    def _make_cache(self, texts: Texts) -> Any:
        """An empty cache: transformers' usual one, or the model's own for keys, values and states."""
        import torch
        from transformers import DynamicCache

        if self.model._supports_default_dynamic_cache():
            return DynamicCache()
        ids, mask = texts.tokens[:, : texts.width], texts.mask[:, : texts.width]
        columns = torch.arange(texts.width, device=ids.device)
        made = self.model.prepare_inputs_for_generation(ids, attention_mask=mask, cache_position=columns)
        return made["past_key_values"]

    def _forward(self, texts: Texts, first: int) -> "torch.FloatTensor":
        """`first` is the first column that the cache does not know."""
        import torch

        mask = texts.mask[:, : texts.length]
        inputs = {
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, first:],
            "cache_position": torch.arange(first, texts.length, device=mask.device),
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.known}
        if self.past is not None:
            inputs["past_key_values"] = self.past
        output = self.model(
            input_ids=texts.tokens[:, first : texts.length],
            attention_mask=mask,
            use_cache=self.use_cache,
            return_dict=True,
            **inputs,
            **self.graphs,
        )
        return output.logits[:, -1].float()


def takes_cache(model: "PreTrainedModel") -> bool:
    """Whether the model keeps keys and values, and not only a state such as Mamba's, which it is not asked for here."""
    from align.models.families import WITHOUT_CACHE

    known = inspect.signature(type(model).forward).parameters
    return "past_key_values" in known and model.config.model_type not in WITHOUT_CACHE


def has_static_shapes(model: "PreTrainedModel") -> bool:
    """Whether the model takes the place of the next token as a tensor, in sequences padded to their final length."""
    return "token_idx" in inspect.signature(type(model).forward).parameters


def make_stepper(model: "PreTrainedModel", options: ForwardOptions) -> StaticShapes | GrowingShapes:
    return (StaticShapes if has_static_shapes(model) else GrowingShapes)(model, options)


def _map_cache(change, past: Any) -> Any:
    """Keys and values of every layer, changed: tuples, one tensor a layer, or transformers' cache.

    `change` gets each tensor, and whether it holds keys (0) or values (1).
    """
    from transformers import Cache, DynamicCache

    if isinstance(past, Cache):
        return DynamicCache.from_legacy_cache(_map_cache(change, past.to_legacy_cache()))
    return tuple(
        change(layer, 0)
        if hasattr(layer, "shape")
        else type(layer)(change(states, kind) for kind, states in enumerate(layer))  # Mistral tells tuples from lists
        for layer in past
    )
