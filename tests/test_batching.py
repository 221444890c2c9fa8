"""The service's queue: batches keep their order and their bounds, who has gone is left out, errors stay their item's."""

import asyncio
import threading

import pytest

from serving.batching import Batcher


def run_batcher(work, scenario, **settings):
    async def whole():
        batcher = Batcher(work, **settings)
        batcher.start()
        try:
            return await scenario(batcher)
        finally:
            await batcher.stop()

    return asyncio.run(whole())


def test_the_batcher_keeps_order_and_bounds():
    sizes = []

    def work(items):
        sizes.append(len(items))
        return [ValueError(item) if item % 10 == 3 else -item for item in items]

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(item) for item in range(50)), return_exceptions=True)

    results = run_batcher(work, scenario, max_batch=8)
    assert max(sizes) == 8 and sum(sizes) == 50
    sizes.clear()
    run_batcher(work, scenario, max_batch=8, weight=lambda item: 3)
    assert max(sizes) == 3 and sum(sizes) == 50
    for item, result in enumerate(results):
        assert isinstance(result, ValueError) and result.args == (item,) if item % 10 == 3 else result == -item


def test_the_batcher_leaves_out_who_has_gone_and_outlives_errors():
    seen, main_thread = [], threading.get_ident()

    def work(items):
        assert threading.get_ident() != main_thread
        seen.append(items)
        if "break" in items:
            raise RuntimeError("broken")
        return items

    async def scenario(batcher):
        gone = asyncio.create_task(batcher.submit("gone"))
        stays = asyncio.create_task(batcher.submit("stays"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == "stays" and batcher.running and len(batcher) == 0
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.submit("break")
        return await batcher.submit("after")

    assert run_batcher(work, scenario) == "after"
    assert seen == [["stays"], ["break"], ["after"]]
