"""Many slides on many machines through Dask: one task a stage of a slide, results through disk.

`connect` finds a scheduler or starts processes on this machine, `scheduler` hands out the stages and collects their
ends, `stages` is what a worker does, `retries` counts the workers that a slide has killed. Nothing is imported here:
Dask loads `local_worker` into processes that should start fast.
"""
