"""``python -m spider_worker.runner``: started by a supervisor, never by hand."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys

import uvloop

from spider_sdk.settings import load
from spider_worker.fleet import Fleet
from spider_worker.runner.runner import Runner
from spider_worker.runner.watchdog import Watchdog
from spider_worker.settings import FleetSettings, WorkerSettings


def main() -> int:
    parser = argparse.ArgumentParser(description="A runner of the Spider fleet.")
    parser.add_argument("--control", type=int, required=True, help="descriptor to read from")
    parser.add_argument("--report", type=int, required=True, help="descriptor to write to")
    arguments = parser.parse_args()
    for descriptor in (arguments.control, arguments.report):
        os.set_inheritable(descriptor, False)
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    settings = load(FleetSettings)
    watchdog = Watchdog(arguments.control, settings.lease)
    runner = Runner(Fleet.connect(settings), load(WorkerSettings), arguments.report)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(runner.main(watchdog))
    return 0


if __name__ == "__main__":
    sys.exit(main())
