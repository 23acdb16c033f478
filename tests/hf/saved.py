"""A checkpoint folder as megatron-core writes it."""

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from metro_megatron.checkpoint.files import write_integrity
from metro_megatron.parallel import cpu
from tests.hf.pair import trainer_tensors

NUM_PARTS = 2


def save_on_this_rank(folder: Path) -> None:
    """Save the model in NUM_PARTS parts per tensor, as tensor-parallel ranks would, and an optimizer's state."""
    cpu.install()
    state: dict[str, object] = {"step": 7}
    for name, tensor in trainer_tensors().items():
        tensor = tensor.bfloat16() if name.startswith("aux.head") else tensor
        if tensor.size(0) % NUM_PARTS:
            state[name] = ShardedTensor.from_rank_offsets(name, tensor)
            continue
        for part, rows in enumerate(tensor.chunk(NUM_PARTS)):
            sharded = ShardedTensor.from_rank_offsets(name, rows.clone(), (0, part, NUM_PARTS))
            state[f"{name}, part {part}"] = sharded
    state["moment"] = ShardedTensor.from_rank_offsets(
        "optimizer.state.exp_avg.x", trainer_tensors()["tied.word.weight"]
    )
    state["extra"] = ShardedObject("main.x._extra_state", None, (1,), (0,))
    folder.mkdir(parents=True)
    dist_checkpointing.save(state, str(folder))
    write_integrity(folder)
