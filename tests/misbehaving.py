"""Tasks that go wrong in each way a worker process can meet. Imports little, as every such process imports it."""

from __future__ import annotations

import os
import time


def serve(task: str) -> str:
    if task == "crash":
        os.abort()
    if task == "hang":
        time.sleep(600)
    if task == "raise":
        raise ValueError("as asked")
    return task.upper()
