"""Keeps an engine that is told to stop until the results of its last requests are fetched.

vLLM lets requests finish, but not what is asked about them afterwards: once told to stop, an engine
refuses every utility call and ends with its last request. A front end would then wait for a report
forever, and its client with it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

#: The utility call, and the workers' method, that fetches a request's results.
TAKE: Final = "steering_take_results"
#: The utility call that asks any of the workers' methods.
ASK: Final = "steering_ask"
#: Seconds after a request's end within which its front end fetches, if it still lives.
PATIENCE: Final = 5.0
#: Seconds between two checks for incoming calls while an engine has nothing else to do.
PAUSE: Final = 0.001
#: Attribute of an engine core: futures of calls to workers that were made while a batch ran.
_CALLS: Final = "steering_calls"


class Unfetched:
    """The keys of finished requests whose results somebody is about to fetch; false if none."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, key: str) -> None:
        """Expect a fetch within `PATIENCE`; the choices of a request share a key."""
        self._forget_old()
        self._until[key] = time.monotonic() + PATIENCE
        self._until.move_to_end(key)

    def discard(self, key: str) -> None:
        """The results have been fetched."""
        self._until.pop(key, None)

    def __bool__(self) -> bool:
        self._forget_old()
        return bool(self._until)

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._until and next(iter(self._until.values())) < now:
            self._until.popitem(last=False)


def stay_for_results() -> None:
    """Extend vLLM's engine cores. It has no effect on those without a `SteeringScheduler`."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    if hasattr(EngineCore, TAKE):
        return
    setattr(EngineCore, TAKE, _take)
    setattr(EngineCore, ASK, _ask)
    EngineCoreProc.has_work = _staying(EngineCoreProc.has_work)
    EngineCoreProc._reject_utility_in_shutdown = _answering(
        EngineCoreProc._reject_utility_in_shutdown
    )


def _nothing(*_: Any) -> None:
    pass


def _take(core: Any, key: str, limits: dict[int, int]) -> Any:
    """What each worker's `steering_take_results` answers, or a future of it."""
    unfetched = _unfetched(core)

    def forget(_: object = None) -> None:
        if unfetched is not None:
            unfetched.discard(key)

    return _ask(core, TAKE, (key, limits), forget)


def _ask(core: Any, method: str, args: Sequence[Any], then: Callable[..., None] = _nothing) -> Any:
    """What each worker answers to a call, or a future of it.

    If workers are processes of their own and a batch is in flight, their answer comes after that
    batch's. Waiting for it would keep the engine from scheduling the next batch. So this returns a
    future, which whoever waits for a later batch completes on the way.

    Args:
        core: vLLM's ``EngineCore``.
        method: name of the workers' method.
        args: its arguments.
        then: called when the answer is there.
    """
    if not (core.batch_queue and _answers_in_order(core.model_executor)):
        found = core.collective_rpc(method, args=tuple(args))
        then()
        return found
    future = core.model_executor.collective_rpc(method, args=tuple(args), non_block=True)
    future.add_done_callback(then)
    calls: deque[Any] = core.__dict__.setdefault(_CALLS, deque())
    while calls and calls[0].done():
        calls.popleft()
    calls.append(future)
    return future


def _answers_in_order(executor: Any) -> bool:
    """Whether a future of this executor's is completed by waiting for any later one."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    return isinstance(executor, MultiprocExecutor)


def _finish_calls(core: Any) -> None:
    """Complete the futures that are left if no batch is in flight, since no later one may come."""
    calls = core.__dict__.get(_CALLS)
    while calls and not core.batch_queue:
        # The future's callback tells whoever asked what went wrong.
        with contextlib.suppress(Exception):
            calls.popleft().result()


def _staying(has_work: Any) -> Any:
    @functools.wraps(has_work)
    def wrapper(self: Any) -> bool:
        _finish_calls(self)
        if has_work(self):
            return True
        drains = not self.is_running() and self.vllm_config.shutdown_timeout > 0
        if not drains or not _unfetched(self):
            return False
        time.sleep(PAUSE)
        return True

    return wrapper


def _answering(reject: Any) -> Any:
    @functools.wraps(reject)
    def wrapper(self: Any, client_idx: int, call_id: int, method_name: str) -> bool:
        return method_name != TAKE and bool(reject(self, client_idx, call_id, method_name))

    return wrapper


def _unfetched(core: Any) -> Unfetched | None:
    return getattr(core.scheduler, "unfetched", None)
