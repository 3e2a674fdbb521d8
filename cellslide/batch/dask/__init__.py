"""Many slides on many machines through Dask: one task a stage of a slide, results through disk.

`connect` finds a scheduler or starts processes on this machine, `drive` hands out the stages and hears how they end,
`stages` is what a worker does, `guard` counts the workers that a slide has killed. Nothing is imported here: Dask loads
`local_worker` into processes that should start fast.
"""
