"""The same chunks as tasks on a Ray cluster whose nodes share the file system of inputs and output."""

from collections.abc import Sequence
from typing import Any

from metro_megatron.errors import UserError
from metro_megatron.preprocess.encoding import EncodingOptions, Progress, encoder_of_process
from metro_megatron.preprocess.workers import OnEntry, OnProgress
from metro_megatron.text.inputs import Chunk

_RETRIES = 3
"""Of a task whose node or process died; a part has its own temporary name each time."""


def encode_on_ray(
    chunks: Sequence[Chunk], options: EncodingOptions, on_entry: OnEntry, on_progress: OnProgress
) -> None:
    """Encode all chunks on the cluster that RAY_ADDRESS names, or on one that is started here.

    Raises UserError if ray is not installed, the cluster cannot be reached, or a task failed for good; finished
    chunks stay finished.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine_cluster ray needs ray; pip install 'metro_megatron[ray]'") from error
    try:
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS ({error}); start it with ray start --head") from error
    try:
        encode = ray.remote(num_cpus=1, max_retries=_RETRIES)(_encode)
        waiting = {encode.remote(chunk, options): chunk for chunk in chunks}
        total = Progress()
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            entry = ray.get(done)
            on_entry(waiting.pop(done), entry)
            total += Progress.of_entry(entry)
            on_progress(total)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(f"the Ray cluster lost a task ({error}); finished chunks are kept, run again") from error
    finally:
        ray.shutdown()


def _encode(chunk: Chunk, options: EncodingOptions) -> dict[str, Any]:
    return encoder_of_process(options).encode(chunk, lambda progress: None)
