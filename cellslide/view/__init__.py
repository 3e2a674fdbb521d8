"""A finished slide in the browser: deep zoom, nuclei by class, another rule tried out; on this machine only.

Nothing is written and no network runs. `server.Viewer` answers requests, `server.open_server` binds it to the loopback.
"""
