"""Action scripts: what the user has run before and after the stages of a dump or restore."""

from __future__ import annotations

import os
import subprocess

from lazyproc.criu import places
from lazyproc.criu.log import DEBUG, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import LazyprocError


def run(given: Given, log: Log, action: str, root_pid: int = 0) -> None:
    """Run every script with the name of the stage, in the work folder. Raises LazyprocError when one fails."""
    environment = dict(os.environ, CRTOOLS_SCRIPT_ACTION=action)
    environment["CRTOOLS_IMAGE_DIR"] = str(places.images(given).absolute())
    if root_pid:
        environment["CRTOOLS_INIT_PID"] = str(root_pid)
    for script in given.every("action-script"):
        log.write(DEBUG, f"running {script} ({action})")
        # One path, whatever is in it. By a shell as by execvp(3): its first line need not name an interpreter.
        command = ["/bin/sh", "-c", 'exec "$0"', script]
        status = subprocess.run(command, env=environment, check=False).returncode
        if status:
            raise LazyprocError(
                f"the action script returned {status} for {action}",
                where=script,
                remedy="see what it printed",
            )
