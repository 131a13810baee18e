"""A worker thread that owns the pipeline, for a program that must not wait (a window, a bot, a web server).

The queue is bounded: beyond it, `submit` raises queue.Full at once, and the caller tells its user to come back.

python examples/worker.py bundles/onnx-fp16 "a red flower" "a blue fish"
"""

from __future__ import annotations

import queue
import sys
import threading
from concurrent.futures import Future

from PIL import Image

import kdc_edge

Job = tuple[str, int, Future[Image.Image]]


class Worker:
    """Images in the order in which they were asked for."""

    def __init__(self, bundle: str, waiting: int = 8) -> None:
        self._pipeline = kdc_edge.Pipeline.open(bundle)
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, prompt: str, seed: int) -> Future[Image.Image]:
        """Ask for an image. Raises queue.Full where too many wait; `cancel()` works until the image is begun."""
        image: Future[Image.Image] = Future()
        self._jobs.put_nowait((prompt, seed, image))
        return image

    def close(self) -> None:
        """Finish what waits, then end."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            prompt, seed, image = job
            if not image.set_running_or_notify_cancel():
                continue
            try:
                image.set_result(self._pipeline(prompt, seed=seed).images[0])
            except Exception as error:
                image.set_exception(error)  # raised by image.result()


def main(bundle: str, *prompts: str) -> None:
    worker = Worker(bundle)
    images = [worker.submit(prompt, seed) for seed, prompt in enumerate(prompts)]
    for i, image in enumerate(images):
        image.result().save(f"worker-{i}.png")
        print(f"worker-{i}.png")
    worker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
