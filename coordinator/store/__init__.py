"""What the coordinator keeps: runs, comparisons, cases, jobs and artifacts, in one folder that outlives the process.

`Store` is the way in. See docs/storage.md for what is kept where and what a crash leaves.
"""

from coordinator.store.folder import default_data_folder
from coordinator.store.ids import new_comparison_id, new_job_id, new_run_id
from coordinator.store.jobs import JobEnd
from coordinator.store.store import Store

__all__ = ["JobEnd", "Store", "default_data_folder", "new_comparison_id", "new_job_id", "new_run_id"]
