"""Concurrent queries, answered together: single items in, their own results out; in between one call for many.

Comes in: items, one coroutine each. Goes out: each one's result, or its exception. The work runs in one thread of its own,
so the event loop stays free and nothing in the work is called twice at once.
"""

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable
from typing import Any


class Batcher:
    """
    Args:
        work: `list of items -> list of results` of the same length; an exception in place of a result is raised where
            that item was submitted.
        max_batch: items a call, or the sum of their weights where these differ.
        max_wait: seconds that an item waits for company where nothing else is to be done. While a call runs, the next
            items gather anyway.
        weight: `item -> how much of a batch it takes`.
    """

    def __init__(
        self,
        work: Callable[[list], list],
        max_batch: int = 32,
        max_wait: float = 0.002,
        weight: Callable[[Any], int] = lambda item: 1,
    ):
        self.work, self.max_batch, self.max_wait, self.weight = work, max_batch, max_wait, weight
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="altmoe-batch")
        self._task: asyncio.Task | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    @property
    def running(self) -> bool:
        """Whether items are being worked on."""
        return self._task is not None and not self._task.done()

    async def stop(self) -> None:
        """End; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, future in self._waiting:
            future.cancel()
        self._thread.shutdown(wait=True)

    async def submit(self, item) -> Any:
        """The item's result. Cancelling this coroutine takes the item out of the queue.

        Raises:
            Exception: what the work has put in place of a result.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._arrived.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            if len(self._waiting) < self.max_batch:
                await asyncio.sleep(self.max_wait)
            batch, room = [], self.max_batch
            while self._waiting and room > 0:
                item, future = self._waiting.popleft()
                if not future.done():  # else its client has gone, or its time was over
                    batch.append((item, future))
                    room -= self.weight(item)
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self.work, [item for item, _ in batch])
            except Exception as error:  # of the work as a whole: the batch learns it, the next one goes on
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
