"""`MicroAdam`, a `torch.optim.Optimizer` whose state takes about 0.96 bytes per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from microadam import distributed, ops
from microadam.distributed import Shard
from microadam.layout import BlockLayout, Geometry, geometry_of, layout_of
from microadam.reference import StepArguments
from microadam.self_test import check_kernel
from microadam.validation import (
    check_dtype,
    check_gradient,
    check_hyperparameters,
    check_parameters,
    check_state,
)

# The scalar hyperparameters, and the Python type that each is converted to.
_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "eps": float,
    "weight_decay": float,
    "alpha": float,
    "density": float,
    "window_size": int,
    "bucket_size": int,
    "block_size": int,
    "seed": int,
}


class MicroAdam(Optimizer):
    """Adam on a sliding window of sparse gradients with 4-bit error feedback.

    Each step adds the error feedback to the gradient, keeps the largest 1% of every block in a
    window of the last 10 such sparse gradients, and stores the rest in 4 bits per element as the
    next error feedback. Adam's two moments are computed from the window alone (Algorithm 1 of
    arXiv:2405.15593). Only coordinates in the window move, unless ``alpha`` or
    ``weight_decay`` makes all of them move.

    Args:
        params: parameters or parameter groups; float32, bfloat16 or float16, any memory format and
            device, sharded (DTensors, as FSDP2 makes them) or not. A group may override any of the
            arguments below.
        lr: learning rate; a float, or a float32 or float64 tensor of one element.
        betas: decay rates of the first and second moment.
        eps: added to the denominator; a normal float32 number, so greater than 0.
        weight_decay: decoupled weight decay, ``p *= 1 - lr * weight_decay``; none by default,
            whereas AdamW has 0.01.
        alpha: share of the error feedback ``e`` that is applied instead of being kept for the next
            step, ``p -= lr * alpha * e`` and then ``e *= 1 - alpha``; at least 0 and less than 1.
            Unless it is 0, every element moves, which takes longer: an option of the
            authors' code, not of the paper.
        window_size: sparse gradients kept (paper: m).
        density: share of every block that each step keeps (paper: k/d).
        bucket_size: elements that share one range of the 4-bit error feedback; even.
        block_size: elements among which the largest are chosen; a multiple of ``bucket_size``, at
            most 32,768.
        stochastic_rounding: round 16-bit parameters stochastically instead of to nearest.
        seed: seed of the stochastic rounding.
        unscales: ``GradScaler`` leaves dividing by its scale and skipping on infinities to the
            step, which saves a pass over the gradients and a wait for the GPU; as with
            ``AdamW(fused=True)``, Lightning then refuses to clip.

    If a block's gradient plus error feedback contains a NaN, an Inf or a magnitude of about 1.3e36
    (2^120 - 2^111) or more, that step leaves the block's parameters, window and error feedback as
    they were. `num_skipped_blocks` counts such blocks.

    Raises:
        ValueError: a hyperparameter is out of range, a parameter's dtype is not supported, or a
            parameter appears twice; from `step`, a parameter no longer matches its state: it was
            moved to another device, has another memory format or is in a group of another layout.
        RuntimeError: from `step`, a gradient is sparse or complex, or a CUDA graph captures a
            parameter's first step.

    Example:
        >>> optimizer = MicroAdam(model.parameters(), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        alpha: float = 0.0,
        window_size: int = 10,
        density: float = 0.01,
        bucket_size: int = 64,
        block_size: int = 4096,
        stochastic_rounding: bool = False,
        seed: int = 0,
        unscales: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "window_size": window_size,
            "density": density,
            "bucket_size": bucket_size,
            "block_size": block_size,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._num_skipped_blocks: dict[torch.device, Tensor] = {}
        self._caches: dict[Tensor, _Cache] = {}  # not saved
        self._held_states: list[ops.HeldState | None] = []  # one per call of a step; not saved
        super().__init__(params, defaults)
        if unscales:  # GradScaler passes its scale and found_inf to `step` as attributes
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # load_state_dict also comes here; the attributes then exist already.
        self.__dict__.setdefault("_num_skipped_blocks", {})
        self.__dict__.setdefault("_caches", {})
        self._held_states = []  # so that the state being replaced is freed now

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, checked as in the constructor."""
        if isinstance(param_group, dict):  # the base class refuses anything else
            check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, kind in _NUMBERS.items():  # NumPy's scalars would promote differently
            group[name] = kind(group[name])
        group["betas"] = tuple(map(float, group["betas"]))
        if not isinstance(group["lr"], Tensor):
            group["lr"] = float(group["lr"])
        try:
            check_parameters(group["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient; ``p.grad`` is only read.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # One call of the fused step takes all parameters of a group that share device and dtypes.
        # All calls are prepared first: if one gradient or state does not fit, nothing moves.
        calls: list[tuple[dict[str, Any], list[_Item]]] = []
        num_params = num_cached = 0
        for group in self.param_groups:
            geometry = geometry_of(group)
            batches: dict[tuple[Any, ...], list[_Item]] = {}
            for ordinal, p in enumerate(group["params"], num_params):
                grad = p.grad
                if grad is None:
                    num_cached += p in self._caches
                    continue
                device = p.device
                kind = (device, p.dtype, grad.dtype, grad.layout)
                batch = batches.get(kind)
                if batch is None:  # checked once: the rest of the batch is of the same kind
                    check_dtype(p, f"parameter {ordinal}")
                    check_gradient(grad, ordinal)
                    batch = batches[kind] = []
                batch.append(self._item_of(p, grad, device, geometry, ordinal))
            calls += [(group, batch) for batch in batches.values()]
            num_params += len(group["params"])
        num_cached += sum(len(batch) for _, batch in calls)
        if len(self._caches) > num_cached:  # some are for parameters removed from their group
            present = self._parameters()
            self._caches = {p: self._caches[p] for p in present if p in self._caches}
        # Each call passes what it holds to the corresponding call of the next step, which drops it
        # if the tensors differ.
        held_states, self._held_states = iter(self._held_states), []
        for group, batch in calls:
            self._held_states.append(self._step_batch(group, batch, next(held_states, None)))
        return loss

    @torch.no_grad()
    def _step_parameter(self, p: Tensor, grad: Tensor, group: dict[str, Any], ordinal: int) -> None:
        """What `step` does for one parameter; gradient release calls it in the backward pass."""
        check_dtype(p, f"parameter {ordinal}")
        check_gradient(grad, ordinal)
        batch = [self._item_of(p, grad, p.device, geometry_of(group), ordinal)]
        self._step_batch(group, batch)

    def _item_of(
        self, p: Tensor, grad: Tensor, device: torch.device, geometry: Geometry, ordinal: int
    ) -> _Item:
        shard, gradient = p, grad
        if distributed.is_sharded(p):
            # Under sequence parallelism the gradient of a norm's weight is a partial sum.
            if distributed.is_sharded(grad) and grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
            shard, gradient = distributed.local(p), distributed.local(grad)
        dims, values = None, shard
        if not shard.is_contiguous():
            dims = _storage_order(shard)
            if dims is not None:
                shard, gradient = shard.permute(dims), gradient.permute(dims)
            values = shard.contiguous()  # a copy only if it has gaps
        state = self.state[p]
        cache = self._caches.get(p)
        made_for = (shard.numel(), geometry, device)
        if cache is None or cache.made_for != made_for or "step" not in state:
            cache = self._prepare(p, grad.dtype, made_for, state, dims)
        if state.get("storage_order") != dims:
            raise ValueError(
                f"parameter {ordinal} has another memory format than when its state was created: "
                "set the format before the first step, load state that was saved in this format, "
                "or create a new optimizer"
            )
        return ordinal, p, shard, values, gradient.contiguous(), state, cache.thresholds

    def _step_batch(
        self, group: dict[str, Any], batch: list[_Item], held: ops.HeldState | None = None
    ) -> ops.HeldState | None:
        """One call of the fused step; returns what to pass as ``held`` to the next such call."""
        ordinals, params, shards, values, grads, states, thresholds = zip(*batch, strict=True)
        held = ops.hold_state(states, thresholds, held)
        device = params[0].device
        lr = group["lr"]
        if torch.compiler.is_compiling():
            if not isinstance(lr, Tensor):  # a float would mean a new graph for each value
                lr = torch.full((), lr, dtype=torch.float64, device=device)
        elif isinstance(lr, Tensor) and lr.is_cpu and device.type != "cpu":
            lr = lr.item()  # a copy to the device would have to be waited for
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        args = StepArguments(
            params=values,
            grads=grads,
            **ops.state_arguments(states, thresholds, held),
            num_skipped_blocks=self._skipped_blocks_on(device),
            lr_tensor=lr.to(device) if isinstance(lr, Tensor) else None,
            grad_scale=None if grad_scale is None else grad_scale.to(device),
            found_inf=None if found_inf is None else found_inf.to(device),
            lr=0.0 if isinstance(lr, Tensor) else lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            alpha=group["alpha"],
            density=group["density"],
            block_size=group["block_size"],
            bucket_size=group["bucket_size"],
            stochastic_rounding=group["stochastic_rounding"],
            seed=group["seed"],
            ordinals=self._rounding_ordinals(params, ordinals)
            if group["stochastic_rounding"]
            else ordinals,
        )
        ops.step_(args)
        for shard, stepped in zip(shards, values, strict=True):
            if stepped is not shard:
                shard.copy_(stepped)
        return held

    def _rounding_ordinals(self, params: Sequence[Tensor], ordinals: Sequence[int]) -> list[int]:
        """The numbers that select each parameter's random bits.

        Shards of a parameter get different ones, barring hash collisions; replicas share one.
        """
        num_params = sum(len(group["params"]) for group in self.param_groups)
        names = []
        for p, ordinal in zip(params, ordinals, strict=True):
            place = 0  # the shard's first index in each dimension, hashed to 32 bits
            for first, _ in Shard.of(p).bounds:
                place = (place * 0x9E3779B1 + first) % 2**32
            names.append(ordinal + num_params * place)
        return names

    def _prepare(
        self,
        p: Tensor,
        grad_dtype: torch.dtype,
        made_for: tuple[int, Geometry, torch.device],
        state: dict[str, Any],
        dims: list[int] | None,
    ) -> _Cache:
        """Creates the state, or checks that it fits; once per layout of the parameter."""
        numel, geometry, _ = made_for
        layout = BlockLayout.of(numel, *geometry)
        is_compiling = torch.compiler.is_compiling()
        if p.is_cuda and not is_compiling and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a parameter's first step creates tensors that a CUDA graph would set to zero at "
                "every replay: take a step before capturing one"
            )
        if "step" not in state:
            state.update(layout.new_state(p.device))
            if dims is not None:
                state["storage_order"] = dims
        for name, (shape, _) in layout.state_spec.items():
            if state[name].device != p.device:
                raise ValueError(
                    f"{name} of a parameter with {p.numel()} elements is on {state[name].device}, "
                    f"the parameter on {p.device}: after moving the model, call "
                    "optimizer.load_state_dict(optimizer.state_dict()), which moves the state"
                )
            if state[name].shape != shape:
                raise ValueError(
                    f"{name} of a parameter with {p.numel()} elements has shape "
                    f"{tuple(state[name].shape)}, but its group's window_size, density, block_size "
                    f"and bucket_size ask for {shape}: they cannot change once a parameter has "
                    "taken a step; create a new optimizer"
                )
        thresholds = torch.zeros(layout.num_blocks, dtype=torch.float32, device=p.device)
        is_real = type(thresholds) is Tensor and not is_compiling
        if p.is_cuda and is_real and ops.native_kernel("cuda"):
            # torch.compile leaves this method out of its graphs, but would compile the functions it
            # calls: plain torch for the comparison, at which it fails or takes a minute.
            check = torch.compiler.disable(check_kernel)  # type: ignore[no-untyped-call]
            check(p.device, p.dtype, grad_dtype, geometry)
        self._caches[p] = _Cache(made_for, thresholds)
        return self._caches[p]

    def _skipped_blocks_on(self, device: torch.device) -> Tensor:
        if device not in self._num_skipped_blocks:
            self._num_skipped_blocks[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._num_skipped_blocks[device]

    def num_skipped_blocks(self) -> int:
        """Number of blocks that steps skipped because of a NaN or Inf, since construction.

        Waits for the device.
        """
        return sum(int(count) for count in self._num_skipped_blocks.values())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_bytes(self) -> int:
        """Bytes that the state of the parameters in ``param_groups`` takes on their devices."""
        params = self._parameters()
        values = [value for p in params for value in self.state.get(p, {}).values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        tensors += [self._caches[p].thresholds for p in params if p in self._caches]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups; the state of a sharded parameter is under its shard's name."""
        # A hook, the first to run after the base class's work, so that user hooks see the result.
        hook = self.register_state_dict_post_hook(
            lambda _, state_dict: self._name_shards(state_dict), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _name_shards(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        parameters = self._parameters()
        state = {
            index: {Shard.of(parameters[index]).name: state}
            if distributed.is_sharded(parameters[index])
            else state
            for index, state in state_dict["state"].items()
            if state  # looking up a parameter that has none creates an empty one
        }
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, every tensor in the dtype it was saved with.

        The base class would cast the state to the parameters' dtype, which destroys indices and
        codes. If the state does not fit, nothing is changed. State that was saved for other
        shards of a parameter, or for the whole, is converted: see `microadam.distributed`.

        Raises:
            ValueError: the groups differ in number or size, a state tensor is missing or has
                another shape or dtype than the parameter needs, or the saved shards do not cover
                this process's.
        """
        new_state: dict[Tensor, dict[str, Any]] = {}

        def take_state(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            new_state.update(self._checked_state(state_dict))
            return {**state_dict, "state": {}}

        # Hooks, the last to run before and the first after the base class's work, so that user
        # hooks see, and may change, the whole state.
        hooks = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(
                lambda _: self.state.update(new_state), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked_state(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"the saved state has the entries {sorted(map(str, state_dict))[:5]}, not state "
                "and param_groups: pass what MicroAdam.state_dict() returned"
            )
        saved_groups = state_dict["param_groups"]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise ValueError(
                f"the saved state has parameter groups of {saved_sizes} parameters, this optimizer "
                f"of {own_sizes}: build it with the same groups"
            )
        new_state = {}
        for saved_group, own_group in zip(saved_groups, self.param_groups, strict=True):
            # The base class adds "differentiable" to the defaults of a copy.
            missing = sorted(self.defaults.keys() - saved_group.keys() - {"differentiable"})
            if missing:
                raise ValueError(
                    f"a parameter group of the saved state has no {', '.join(missing)}: it was "
                    "written by another optimizer"
                )
            lr = saved_group["lr"]
            rounding = 1e-6 * saved_group.get("initial_lr", 0.0)  # every schedule sets it
            if isinstance(lr, float) and -rounding <= lr < 0:
                lr = 0.0  # the schedule ends at 0, and overshot it by a rounding error
            check_hyperparameters({**saved_group, "lr": lr})
            for index, p in zip(saved_group["params"], own_group["params"], strict=True):
                if state_dict["state"].get(index):
                    saved = distributed.by_shard(state_dict["state"][index], tuple(p.shape))
                    for shard, state in saved.items():
                        check_state(state, layout_of(shard.numel, saved_group), index)
                    state = distributed.assemble(saved, Shard.of(p), saved_group)
                    new_state[p] = {
                        name: value.detach().to(
                            p.device, copy=True, memory_format=torch.contiguous_format
                        )
                        if isinstance(value, Tensor)
                        else list(value)
                        for name, value in state.items()
                    }
        return new_state


class _Cache(NamedTuple):
    """What a parameter needs besides its state, and can be recreated."""

    made_for: tuple[int, Geometry, torch.device]  # elements, geometry and device of its state
    thresholds: Tensor  # of the native kernels: see StepArguments


# A parameter that takes part in a step: its position in the optimizer; itself; this process's shard
# of it, its dimensions in memory order; that and the gradient as contiguous tensors; state;
# thresholds. A plain tuple: a NamedTuple would add a third to the cost of preparing an item.
_Item = tuple[int, Tensor, Tensor, Tensor, Tensor, dict[str, Any], Tensor]


def _storage_order(t: Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost, those of size 1 first.

    None if that order is 0, 1, 2, ..., as it nearly always is.
    """
    sizes, strides = t.shape, t.stride()
    dims = sorted(range(t.dim()), key=lambda d: (sizes[d] > 1, -strides[d]))
    return None if dims == sorted(dims) else dims
