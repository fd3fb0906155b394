"""Processes that read rows: they end with the one that started them."""

import multiprocessing
import os
import threading


def exit_with_parent(*_: int) -> None:
    """In a worker process: end as soon as the parent is gone, however it ended.

    Without it a killed trainer leaves its workers behind. (PR_SET_PDEATHSIG would do the same on Linux only, and fires
    already when the parent's thread that started the worker ends.)
    """

    def wait_for_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="exit-with-parent", daemon=True).start()
