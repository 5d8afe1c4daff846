"""What is read of a streamed answer, on its way from the worker to the answer's chunks.

A pass's rows travel with its sampled tokens. The model runner's output carries them to the
scheduler, which puts them on the ``EngineCoreOutput`` of their request. The front end's output
processor takes them off before vLLM looks at it. Whoever passes the answer's tokens on then asks
for what is known by that time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final
from weakref import WeakValueDictionary

from steering.report import FeaturesAt, features_read
from steering.worker.streamed_read import StreamedRead

#: Key in an ``EngineCoreOutput``'s ``kv_transfer_params``, the only field that may hold any value
#: and that vLLM does not interpret.
ROWS: Final = "steering_streamed_reads"
_MARK: Final = "_takes_streamed_reads"


class StreamedReads:
    """The rows of one engine request that have arrived and have not been taken yet.

    A row may be replaced by a later one of its position, for example after a rejected speculation.
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, FeaturesAt]] = {}

    def put(self, part: StreamedRead) -> None:
        """Take in rows that have arrived."""
        rows = self._rows.setdefault(part.child, {})
        for position in part.positions[~part.covered].tolist():
            rows.pop(position, None)
        columns = (column[part.covered] for column in (part.positions, part.latents, part.values))
        for found in features_read([column.tobytes() for column in columns]):
            rows[found[0]] = found

    def take(self, child: int, limit: int) -> list[FeaturesAt]:
        """Take the rows of positions below ``limit``, which have entered the model for good."""
        rows = self._rows.get(child, {})
        return [rows.pop(position) for position in sorted(rows) if position < limit]


class Told:
    """The positions of one choice that were told already, so that none is told twice."""

    def __init__(self) -> None:
        self._positions: set[int] = set()

    def untold(self, read: Iterable[FeaturesAt]) -> list[FeaturesAt]:
        """Those rows of ``read`` that were not told before; from now on they count as told."""
        found = [at for at in read if at[0] not in self._positions]
        self._positions.update(position for position, _ in found)
        return found


# By the plan's key. Each is dropped when the call that passes its answer on ends.
_streams: WeakValueDictionary[str, StreamedReads] = WeakValueDictionary()


def open_stream(key: str) -> StreamedReads:
    """Where rows of the request with this key go from now on, for as long as it is referred to."""
    stream = _streams[key] = StreamedReads()
    return stream


def put_rows(output: Any, part: StreamedRead) -> None:
    """Put rows on their request's ``EngineCoreOutput``."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), ROWS: part.to_wire()}


def receive_rows() -> None:
    """Have vLLM's output processor take rows off; a second call changes nothing."""
    from vllm.v1.engine.output_processor import OutputProcessor

    if not hasattr(OutputProcessor.process_outputs, _MARK):
        OutputProcessor.process_outputs = _receiving(OutputProcessor.process_outputs)


def _receiving(process_outputs: Any) -> Any:
    @functools.wraps(process_outputs)
    def wrapper(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for part in _taken(engine_core_outputs):
            if (stream := _streams.get(part.key)) is not None:
                stream.put(part)
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def _taken(engine_core_outputs: Iterable[Any]) -> Iterator[StreamedRead]:
    for output in engine_core_outputs:
        params = output.kv_transfer_params
        if params and ROWS in params:
            yield StreamedRead.from_wire(params[ROWS])
            output.kv_transfer_params = {k: v for k, v in params.items() if k != ROWS} or None
