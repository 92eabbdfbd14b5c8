"""What a device computes in a round, whatever carries its messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.memory import Levers, StepMemory
from lola_flwr.device.asked import PartResult
from lola_flwr.device.base_model import check_fingerprint
from lola_flwr.device.contract import LocalUpdate, nothing_report
from lola_flwr.device.encoding import encoded_gradients
from lola_flwr.device.keeping import Keeping
from lola_flwr.device.memory import measured_peak
from lola_flwr.device.out_of_memory import reports_out_of_memory
from lola_flwr.device.part import compute_part
from lola_flwr.device.prefix import ActivationCache, LoadedModel, StreamedModel
from lola_flwr.device.sensors import reports_energy
from lola_flwr.device.sent_model import sent_model
from lola_flwr.device.steps import StepResult, squares_fields, step_for
from lola_flwr.device.store import LostCopy
from lola_flwr.device.tokens import ALL_TOKENS, CountedSplit, Tokens, Trial, tokens_for
from lola_flwr.errors import UserError
from lola_flwr.machine.heap import keep_no_freed_memory
from lola_flwr.model.activations import IN_PART, Activations, kept_suffix
from lola_flwr.model.backprop import (
    Batch,
    BatchWeight,
    LossFunction,
    model_loss,
    num_examples_of,
    train_mode,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.precision import Accelerator, Precision, autocast, find_device
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.packing import GRADIENTS
from lola_flwr.wire.records import PROJECTION_TYPE, Assignment, PartTask, UpdateReport

# Gives a mini-batch: (number, batch_size) -> arguments of the model. The number is that
# of the round, or of a micro-batch where the model is spread over devices; there it has
# to give the same batch whenever it is asked for the same number.
BatchSource = Callable[[int, int], Batch]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockDevice:
    """Trains the block or blocks that the server assigns, on the device's own data.

    Parameters
    ----------
    profile
        What this device offers.
    load_model
        Gives the device's model and its blocks, or a model that stays on disk; called
        when there is something to train, and not to report the profile. Every round
        overwrites the model's trainable values, so the virtual clients of one
        simulation worker can share it.
    batch_source
        Draws a mini-batch from the device's data.
    loss_function
        Maps model and batch to a mean loss (default: the model's own).
    followed_loss
        The same loss, where something follows what steps find of it; only they call it.
    batch_weight
        What the loss of a mini-batch is a mean over, by which the server weighs its
        gradient (default: its examples). Where that is more than the examples, the
        coordinator is told how much one may weigh (``RoundSettings.example_weight``).
    micro_batch_size
        Examples that are computed at a time; 0: all of the mini-batch. Fewer take less
        memory, for the same gradient. A mini-batch of texts of different lengths is cut
        so that little padding is computed, where this changes neither loss nor gradient
        (`lola_flwr.device.tokens`).
    store
        Directory of this run (`lola_flwr.device.store.run_store` makes it) in which the
        device keeps its copy of the model and what its codecs leave out; devices on one
        host may share it. None: it keeps nothing, is sent all values in every round,
        and can use no codec that leaves something out; of a model that is spread over
        devices it keeps its part in memory alone, for as long as its process lives.
    costs
        Gives what the blocks cost. By them a device whose profile says that it splits
        its batches, streams the layers below the block, or runs the others twice, does
        so where the memory of its profile asks for it (default: it does not look at its
        memory, and streams a model that stays on disk).
    prefix_cache
        Where the outputs of the layers below the block are kept, for as long as these
        do not change; they run without dropout then. What it may hold in memory is
        taken off the memory that the profile offers.
    accelerator
        "cpu", "cuda" or "mps"; "auto" takes a GPU if there is one.
    precision
        "fp32", or "bf16" for matrix products in bfloat16.
    activations
        As for `model_costs`: ``costs`` are counted with the same.
    seed
        Seed of the run; dropout follows from it, the round and the device's name.
    simulated_compute_s
        For a simulated device: the seconds that it would need for an assignment. They
        are reported, as simulated, in place of the measured ones.
    sequence_length
        Tokens that ``simulated_compute_s`` has each example of: of shorter ones, whose
        padding is not computed, the device takes less in proportion (default: it takes
        no less).
    """

    profile: DeviceProfile
    load_model: Callable[[], tuple[nn.Module, BlockPartition] | StreamedModel]
    batch_source: BatchSource
    loss_function: LossFunction = model_loss
    followed_loss: LossFunction | None = None
    batch_weight: BatchWeight = num_examples_of
    micro_batch_size: int = 0
    store: Path | None = None
    costs: Callable[[], BlockCosts] | None = None
    prefix_cache: ActivationCache | None = None
    accelerator: Accelerator = "cpu"
    precision: Precision = "fp32"
    activations: Activations = "exact"
    seed: int = 0
    simulated_compute_s: Callable[[Assignment], float] | None = None
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        cache = self.prefix_cache
        if cache is not None and cache.in_memory:
            left = self.profile.memory_bytes - cache.max_bytes
            profile = replace(self.profile, memory_bytes=left)
            object.__setattr__(self, "profile", profile)

    @reports_energy
    @reports_out_of_memory
    def train(
        self,
        assignment: Assignment,
        values: Mapping[str, npt.NDArray[Any]],
    ) -> LocalUpdate:
        """Compute the mean gradient of the assigned blocks on one mini-batch.

        Parameters
        ----------
        assignment
            What the server asks for.
        values
            The model's trainable values, by name or packed: all, or those that the
            assignment's manifest says were sent.

        Raises
        ------
        UserError
            Server and device do not hold the same model, or the codec needs a store.
        MalformedManifest
            The values are not those that the server sent.
        OutOfMemory
            The memory does not suffice. A device that is not simulated first looks
            whether there is as much as the assignment says.
        """
        start = time.perf_counter()
        device = find_device(self.accelerator)
        loaded = self.load_model()
        local = LoadedModel(*loaded, device) if isinstance(loaded, tuple) else loaded
        check_fingerprint(local.fingerprint(), assignment)
        try:
            held = self._take_in(local, assignment, values)
        except LostCopy:
            return LocalUpdate({}, 0, nothing_report(assignment))
        batch = self.batch_source(assignment.server_round, assignment.batch_size)
        measures = self.simulated_compute_s is None
        if measures:
            keep_no_freed_memory()
        with (
            measured_peak(device) if measures else nullcontext() as peak,
            # The device's own random state is left as it was.
            torch.random.fork_rng(),
        ):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            result = self._step(local, assignment, on_device, device)
        arrays: dict[str, npt.NDArray[Any]] = {}
        if result.gradients is not None:
            arrays[GRADIENTS] = encoded_gradients(
                {
                    name: np.asarray(gradient.numpy(force=True), order="C")
                    for name, gradient in result.gradients.items()
                },
                local.partition,
                assignment,
                store=self.store,
                device=self.profile.name,
            )
        report = replace(
            self._report(assignment, result, start),
            held=held,
            peak_memory_bytes=(
                None if peak is None else float(local.held_bytes + peak.peak_bytes)
            ),
        )
        return LocalUpdate(arrays, result.num_examples, report)

    def _step(
        self,
        local: LoadedModel | StreamedModel,
        assignment: Assignment,
        batch: Batch,
        device: torch.device,
    ) -> StepResult:
        """Compute what is asked for on a mini-batch, with a random state of its own."""
        levers, cache = self._levers(assignment, streams=local.streams)
        tokens = self._tokens(local, assignment, batch, levers)
        block = min(assignment.blocks)

        def loss_function(model: nn.Module, batch: Batch) -> Tensor:
            with autocast(self.precision, device):
                return (self.followed_loss or self.loss_function)(model, batch)

        with (
            local.at_block(block, cache, stream=levers.stream_prefix) as model,
            tokens.first_alone(),
            kept_suffix(
                model, local.partition, block, self.activations, levers.recompute_suffix
            ),
        ):
            train_mode(model)
            rng = rng_for(
                self.seed, "dropout", assignment.server_round, self.profile.name
            )
            torch.manual_seed(int(rng.integers(2**63)))
            split = CountedSplit(tokens.split)
            tells_noise = self._fits(StepMemory.holds_groups, assignment, levers)
            result = step_for(assignment, tells_noise=tells_noise)(
                model,
                local.partition,
                assignment,
                batch,
                loss_function=loss_function,
                micro_batch_size=levers.micro_batch_size,
                batch_weight=self.batch_weight,
                split=split,
            )
        size = levers.micro_batch_size
        return replace(result, example_tokens=tokens.per_example(batch, size, split))

    def _tokens(
        self,
        local: LoadedModel | StreamedModel,
        assignment: Assignment,
        batch: Batch,
        levers: Levers,
    ) -> Tokens:
        """Return which tokens are computed: those that the gradient depends on."""
        if isinstance(local, StreamedModel):
            return ALL_TOKENS
        trial = Trial(
            model=local.model,
            partition=local.partition,
            loss_function=self.loss_function,
            batch_weight=self.batch_weight,
        )
        return tokens_for(
            trial,
            batch,
            cuts=self._fits(StepMemory.holds_parts, assignment, levers),
            # Which layers are computed, and for what, may be told.
            shortens=assignment.operations is None,
        )

    def _take_in(
        self,
        local: LoadedModel | StreamedModel,
        assignment: Assignment,
        values: Mapping[str, npt.NDArray[Any]],
    ) -> str | None:
        """Load what the server sent; return the version that is now held, if any."""
        names = local.partition.trainable
        received, held = sent_model(
            values, assignment.manifest, local.shapes(names), self.store
        )
        local.load(names, received)
        return held

    def _report(
        self, assignment: Assignment, result: StepResult, start: float
    ) -> UpdateReport:
        """Return what goes with an update whose computation began at ``start``."""
        simulated = self.simulated_compute_s
        projections, squares = result.projections, result.squares
        computed = 1.0
        if self.sequence_length is not None and result.example_tokens is not None:
            computed = min(result.example_tokens / self.sequence_length, 1.0)
        return UpdateReport(
            server_round=assignment.server_round,
            block_index=assignment.block_index,
            update_kind="gradient" if projections is None else "zeroth-order",
            loss=result.loss,
            compute_s=(
                time.perf_counter() - start
                if simulated is None
                else computed * simulated(assignment)
            ),
            compute_clock="measured" if simulated is None else "simulated",
            direction_seed=assignment.direction_seed,
            projections=(
                None
                if projections is None
                else projections.astype(PROJECTION_TYPE).tobytes()
            ),
            **({} if squares is None else squares_fields(squares)),
        )

    def compute_part(
        self, task: PartTask, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> PartResult:
        """Do a part of a step of a model that is spread over devices.

        Parameters
        ----------
        task
            What the server asks for.
        arrays
            What came with it.

        Returns
        -------
        What the arrays are that go back, and these arrays.

        Raises
        ------
        UserError
            Server and device do not hold the same model, or this one stays on disk.
        """
        device = find_device(self.accelerator)
        loaded = self.load_model()
        if not isinstance(loaded, tuple):
            raise UserError(
                "A model that stays on disk cannot be spread over devices; load it."
            )
        local = LoadedModel(*loaded, device)
        check_fingerprint(local.fingerprint(), task)
        # The device's own random state is left as it was.
        with torch.random.fork_rng(), autocast(self.precision, device):
            train_mode(local.model)
            result: PartResult = compute_part(
                local.model,
                local.partition,
                task,
                arrays,
                draw=self.batch_source,
                loss_function=self.loss_function,
                batch_weight=self.batch_weight,
                keeping=Keeping(
                    self.profile.name, self.store, self.profile.memory_bytes
                ),
            )
        return result

    def _levers(
        self, assignment: Assignment, *, streams: bool
    ) -> tuple[Levers, ActivationCache | None]:
        """Return how this device computes the step: what the server expects."""
        if assignment.operations is not None:
            if self.activations != "exact":
                raise UserError(IN_PART)
            # What a layer is told to do, it does itself; and it fits the memory so.
            own = self._own_levers(assignment, streams=streams)
            return replace(own, stream_prefix=streams, recompute_suffix=False), None
        return self._own_levers(assignment, streams=streams), self.prefix_cache

    def _own_levers(self, assignment: Assignment, *, streams: bool) -> Levers:
        step = self._step_memory(assignment)
        if step is None:
            return Levers(self.micro_batch_size, stream_prefix=streams)
        chosen = step.choose(self.profile)[min(assignment.blocks)]
        return replace(
            chosen,
            micro_batch_size=min(
                chosen.micro_batch_size, self.micro_batch_size or assignment.batch_size
            ),
        )

    def _fits(self, way: Callable[..., bool], task: Assignment, levers: Levers) -> bool:
        step, block = self._step_memory(task), min(task.blocks)
        return step is None or way(step, levers, self.profile, block)

    def _step_memory(self, assignment: Assignment) -> StepMemory | None:
        if self.costs is None:
            return None
        costs = self.costs()
        if costs.step is not None and assignment.batch_size < costs.step.batch_size:
            costs = costs.at(assignment.batch_size)
        return costs.joined([sorted(assignment.blocks)]).step
