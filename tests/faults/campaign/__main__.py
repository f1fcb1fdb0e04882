"""One case again: LAZYPROC_SEED=N python -m tests.faults.campaign (kill | cut) NUMBER."""

from __future__ import annotations

import os
import sys

from tests.faults.campaign.cases import a_cut, a_kill
from tests.faults.campaign.run import run

kind, number = sys.argv[1:]
case = {"kill": a_kill, "cut": a_cut}[kind](int(os.environ["LAZYPROC_SEED"]), int(number))
print(case)
print(run(case))
