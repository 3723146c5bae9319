"""A TCP proxy on the loopback address that makes links bad: cut after so many bytes, cut now, silent for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_CHUNK_BYTES = 1 << 14


class FaultyLink:
    """Forwards connections to one address until it is told not to. Use it as a context manager.

    Attributes:
        host: Always ``127.0.0.1``.
        port: Where it listens.
        sent_bytes: What it has passed from clients to the target.
    """

    host = "127.0.0.1"

    def __init__(self, target_host: str, target_port: int) -> None:
        self.port = 0
        self.sent_bytes = 0
        self._target = (target_host, target_port)
        self._cut_at: int | None = None
        self._silent_at: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty link", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> FaultyLink:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, self.host, 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def cut_after(self, count: int) -> None:
        """Reset all connections once `count` more bytes have gone from clients to the target; later ones work again."""
        self._cut_at = self.sent_bytes + count

    def cut(self) -> None:
        """Reset all connections now; later ones work again."""
        self._call(self._reset())

    def black_hole(self, after: int = 0) -> None:
        """Pass nothing on any more, once `after` more bytes have gone to the target; connections stay open."""
        self._silent_at = self.sent_bytes + after

    def mend(self) -> None:
        """Pass on again what comes from now on; a cut that has not come yet is called off."""
        self._silent_at = None
        self._cut_at = None

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    @property
    def _silent(self) -> bool:
        return self._silent_at is not None and self.sent_bytes >= self._silent_at

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for work in (self._forward(reader, far_writer, True), self._forward(far_reader, writer, False)):
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outward: bool) -> None:
        try:
            while block := await reader.read(_CHUNK_BYTES):
                if self._silent:
                    continue
                limits = [limit for limit in (self._cut_at, self._silent_at) if outward and limit is not None]
                passed = block[: max(0, min(limits) - self.sent_bytes)] if limits else block
                writer.write(passed)
                await writer.drain()
                if outward:
                    self.sent_bytes += len(passed)
                if outward and self._cut_at is not None and self.sent_bytes >= self._cut_at:
                    self._cut_at = None
                    await self._reset()
            if not self._silent:
                writer.close()
        except OSError:
            # One side is gone, so the other one goes.
            writer.transport.abort()
        self._writers.discard(writer)

    async def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
