"""One thread a process: workers that share cores would otherwise wait for one another's threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
