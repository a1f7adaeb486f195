"""Sharded parameters, and optimizer state that moves from one sharding to another.

A process steps its shard of a DTensor (FSDP2) as a tensor in its own right: blocks and buckets are
counted from the shard's first element, so no step needs communication. In a state dict the state of
a DTensor is stored under the name of its shard, such as ``[0:128, 0:64]``. No two shards share a
name, so torch.distributed.checkpoint stores each one once, and none can be mistaken for another.

`assemble` builds the state of any shard from the saved shards that cover it. Blocks that are the
same in both shardings are copied bit for bit. For the others, the error feedback is dequantized and
requantized, and each slot of the window keeps the k largest entries of every new block. An entry
beyond k returns to the error feedback, scaled by the share of its weight in the first moment that
has not been spent yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from microadam import reference
from microadam.layout import BlockLayout, layout_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.tensor import DTensor

State = dict[str, Tensor]  # as specified by `BlockLayout.state_spec`


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that one process holds."""

    param_shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]  # a half-open range [first, end) per dimension

    @classmethod
    def of(cls, p: Tensor) -> Shard:
        """This process's shard of a DTensor; for any other tensor, the whole."""
        shape = tuple(p.shape)
        if not is_sharded(p):
            return cls(shape, tuple((0, size) for size in shape))
        (chunk,) = p.__create_chunk_list__()  # type: ignore[no-untyped-call]
        ends = zip(chunk.offsets, chunk.sizes, strict=True)
        return cls(shape, tuple((offset, offset + size) for offset, size in ends))

    @classmethod
    def named(cls, name: str, param_shape: tuple[int, ...]) -> Shard:
        """The shard that ``name`` names.

        Raises:
            ValueError: it is not the name of a shard, or not of a parameter of this shape.
        """
        parts = [part.split(":") for part in name.strip("[]").split(", ") if part]
        if all(len(part) == 2 and part[0].isdigit() and part[1].isdigit() for part in parts):
            shard = cls(param_shape, tuple((int(first), int(end)) for first, end in parts))
            fits = all(
                first <= end <= size
                for (first, end), size in zip(shard.bounds, param_shape, strict=False)
            )
            if shard.name == name and len(parts) == len(param_shape) and fits:
                return shard
        raise ValueError(
            f"the saved state has an entry {name!r}, which names no shard of a parameter of shape "
            f"{param_shape}: it was written by another optimizer, belongs to another model, or was "
            "flattened (flatten_optimizer_state_dict)"
        )

    @property
    def name(self) -> str:
        """The bounds in each dimension, such as ``[0:128, 0:64]``."""
        return "[" + ", ".join(f"{first}:{end}" for first, end in self.bounds) + "]"

    @property
    def numel(self) -> int:
        """Number of elements; 0 if the shard is empty."""
        return math.prod(end - first for first, end in self.bounds)

    @property
    def is_of_rows(self) -> bool:
        """Whether only dimension 0 is cut, so that the elements are contiguous in the parameter."""
        whole = zip(self.bounds[1:], self.param_shape[1:], strict=True)
        return all(bounds == (0, size) for bounds, size in whole)

    @property
    def first_element(self) -> int:
        """Index in the flattened parameter of the first element; for a shard of rows only."""
        return self.bounds[0][0] * math.prod(self.param_shape[1:]) if self.bounds else 0

    def needs(self, saved: Shard) -> bool:
        """Whether the saved shard's state is needed to build this one's.

        An empty shard needs any saved one, for the step count.
        """
        pairs = zip(self.bounds, saved.bounds, strict=True)
        overlaps = all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs)
        return overlaps or self.numel == 0


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, without importing that class, which takes a second."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t


def by_shard(saved: Mapping[str, Any], param_shape: tuple[int, ...]) -> dict[Shard, Any]:
    """The saved state of one parameter by shard, whether it was saved sharded or whole.

    Raises:
        ValueError: an entry is not a shard of a parameter of this shape.
    """
    if saved and all(isinstance(value, Mapping) for value in saved.values()):
        return {Shard.named(name, param_shape): value for name, value in saved.items()}
    return {Shard(param_shape, tuple((0, size) for size in param_shape)): saved}


def assemble(saved: dict[Shard, State], shard: Shard, group: Mapping[str, Any]) -> State:
    """The state of ``shard``, built from the saved shards.

    Args:
        saved: the saved shards, possibly more than are needed; the state of each fits its
            `microadam.BlockLayout`. If ``shard`` itself is among them, its state is returned
            unchanged.
        group: the parameter group that the state was saved with.

    Raises:
        ValueError: the shards do not cover ``shard``, have taken different numbers of steps, or
            are not all cut along dimension 0 alone.
    """
    if shard in saved:
        return saved[shard]
    saved = {s: state for s, state in saved.items() if shard.needs(s)}
    if not all(s.is_of_rows for s in (shard, *saved)):
        raise ValueError(
            f"the shard {shard.name} of a parameter of shape {shard.param_shape} was saved as "
            f"{_names(saved)}: only shards of whole rows, as FSDP2 makes them, can be recut; "
            "load on the mesh that saved them"
        )
    steps = {int(state["step"]) for state in saved.values()}
    if len(steps) > 1:
        raise ValueError(
            f"the saved shards {_names(saved)} of a parameter have taken {sorted(steps)} steps: "
            "they are of different checkpoints"
        )
    cut = _Cut(shard.first_element, layout_of(shard.numel, group))
    cuts = [_Cut(s.first_element, layout_of(s.numel, group)) for s in saved]
    pieces = sorted(zip(cuts, saved.values(), strict=True), key=lambda piece: piece[0].first)
    covered = sum(max(0, min(cut.end, c.end) - max(cut.first, c.first)) for c, _ in pieces)
    overlap = any(a.end > b.first for (a, _), (b, _) in pairwise(pieces))
    if not pieces or covered != cut.layout.numel or overlap:
        raise ValueError(
            f"the saved shards {_names(saved)} do not cover {shard.name} of a parameter of shape "
            f"{shard.param_shape} exactly once: load them as microadam.distributed.template shows"
        )
    state = cut.layout.new_state(pieces[0][1]["step"].device)
    state["step"].copy_(pieces[0][1]["step"])
    common = [cut.common_blocks(other) for other, _ in pieces]
    if sum(count for _, _, count in common) < cut.layout.num_blocks:
        _convert(state, cut, pieces, group["betas"][0])
    for (own_block, other_block, count), (other, other_state) in zip(common, pieces, strict=True):
        _copy_blocks(state, cut, own_block, other_state, other, other_block, count)
    return state


def template(
    parameters: Mapping[str, Tensor], metadata: Metadata, path: tuple[str, ...] = ("optimizer",)
) -> dict[str, dict[str, Any]]:
    """What torch.distributed.checkpoint.load fills: the saved shards that this process needs.

    Example:
        >>> reader = FileSystemReader(folder)
        >>> wanted = get_optimizer_state_dict(model, optimizer)
        >>> wanted["state"] = template(dict(model.named_parameters()), reader.read_metadata())
        >>> dcp.load({"optimizer": wanted}, storage_reader=reader)
        >>> set_optimizer_state_dict(model, optimizer, optim_state_dict=wanted)

    Args:
        parameters: the optimizer's parameters by the name they were saved under.
        metadata: of a checkpoint that contains what ``get_optimizer_state_dict`` returned.
        path: the keys under which the checkpoint stores it.

    Returns:
        The entry ``state`` of the optimizer's state dict; its tensors are on the CPU, not filled.
    """
    wanted: dict[str, dict[str, Any]] = {}
    parents = (*path, "state")
    for key, saved_path in metadata.planner_data.items():
        if saved_path[: len(parents)] != parents or saved_path[len(parents)] not in parameters:
            continue
        name, *shard_names, entry = saved_path[len(parents) :]
        p = parameters[name]
        saved_shards = [Shard.named(shard_name, tuple(p.shape)) for shard_name in shard_names]
        if all(Shard.of(p).needs(shard) for shard in saved_shards):
            entries = wanted.setdefault(name, {})
            for shard in saved_shards:
                entries = entries.setdefault(shard.name, {})
            saved: Any = metadata.state_dict_metadata[key]
            # storage_order, a list, is stored as bytes, which replace whatever value is given here.
            entries[entry] = (
                torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")
                if hasattr(saved, "size")
                else None
            )
    return wanted


@dataclass(frozen=True)
class _Cut:
    """A run of the flattened parameter's elements, and how it is split into blocks."""

    first: int
    layout: BlockLayout

    @property
    def end(self) -> int:
        return self.first + self.layout.numel

    def length_of(self, block: int) -> int:
        return min(self.layout.block_size, self.layout.numel - block * self.layout.block_size)

    def common_blocks(self, other: _Cut) -> tuple[int, int, int]:
        """The blocks that both have in common: the first one's index in each, and their number."""
        distance, rest = divmod(other.first - self.first, self.layout.block_size)
        own, theirs = max(0, distance), max(0, -distance)
        count = max(0, min(self.layout.num_blocks - own, other.layout.num_blocks - theirs))
        if rest:
            return own, theirs, 0
        if count and self.length_of(own + count - 1) != other.length_of(theirs + count - 1):
            count -= 1  # the last one ends in one cut and continues in the other
        return own, theirs, count


def _names(shards: Mapping[Shard, Any]) -> str:
    return " and ".join(shard.name for shard in shards) or "nothing"


def _copy_blocks(
    to: State, to_cut: _Cut, to_block: int, source: State, cut: _Cut, block: int, count: int
) -> None:
    layout = to_cut.layout
    k = min(layout.k, cut.layout.k)
    for name in ("window_indices", "window_values"):
        to[name][to_block : to_block + count, :, :k] = source[name][block : block + count, :, :k]
    buckets_a_block = layout.block_size // layout.bucket_size
    for name, size in (("error", layout.bucket_size // 2), ("error_min", 1), ("error_max", 1)):
        entries = buckets_a_block * size  # slicing stops early at a shorter last block
        to[name][to_block * entries : (to_block + count) * entries] = source[name][
            block * entries : (block + count) * entries
        ]


def _convert(state: State, cut: _Cut, pieces: list[tuple[_Cut, State]], beta1: float) -> None:
    """Fills the window and error feedback by value, in float32, from those of the pieces."""
    layout, step = cut.layout, int(state["step"])
    error = _gather(cut, [(piece, _dense_error(s, piece.layout)) for piece, s in pieces])
    for slot in range(min(step, layout.window_size)):
        dense = _gather(cut, [(piece, _dense_slot(s, piece.layout, slot)) for piece, s in pieces])
        age = (step - 1 - slot) % layout.window_size
        unspent = beta1 ** (age + 1) - beta1**layout.window_size
        unspent /= 1 - beta1**layout.window_size
        for blocks, values, k in _segments(dense, layout):
            top = reference.select_top_k(values, k)
            state["window_indices"][blocks, slot, :k] = top.short()
            state["window_values"][blocks, slot, :k] = values.gather(1, top).bfloat16()
            values.scatter_(1, top, 0.0)
        error += unspent * dense
    padding = error[-1:].expand(-layout.numel % layout.bucket_size)
    codes, minimum, maximum = reference.quantize(
        torch.cat((error, padding)).view(-1, layout.bucket_size)
    )
    state["error"].copy_(codes.flatten())
    state["error_min"].copy_(minimum)
    state["error_max"].copy_(maximum)


def _gather(cut: _Cut, pieces: list[tuple[_Cut, Tensor]]) -> Tensor:
    """The elements of ``cut``, from the flat tensors of the pieces that cover it, in order."""
    return torch.cat(
        [dense[max(0, cut.first - c.first) : max(0, cut.end - c.first)] for c, dense in pieces]
    )


def _dense_error(state: State, layout: BlockLayout) -> Tensor:
    codes = state["error"].view(layout.num_buckets, layout.bucket_size // 2)
    dense = reference.dequantize(codes, state["error_min"], state["error_max"])
    return dense.flatten()[: layout.numel]


def _dense_slot(state: State, layout: BlockLayout, slot: int) -> Tensor:
    dense = torch.zeros(layout.numel, dtype=torch.float32, device=state["error"].device)
    for blocks, values, k in _segments(dense, layout):
        index = state["window_indices"][blocks, slot, :k].long()
        # Added: a block that skipped its first steps holds index 0 k times, each with value 0.
        values.scatter_add_(1, index, state["window_values"][blocks, slot, :k].float())
    return dense


def _segments(dense: Tensor, layout: BlockLayout) -> Iterator[tuple[slice, Tensor, int]]:
    """Blocks of equal length: which ones, a view ``(B, L)`` of their elements, and their k."""
    for segment in layout.segments:
        elements = dense[segment.elements(layout.block_size)]
        yield segment.blocks, elements.view(segment.num_blocks, segment.length), segment.k
