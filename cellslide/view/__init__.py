"""A finished slide in the browser: deep zoom, nuclei by class, another rule tried out; on this machine only.

Nothing is written and no network runs. `answers.Viewer` answers requests, `session.Session` lets browsers in,
`server.open_server` binds them to the loopback.
"""
