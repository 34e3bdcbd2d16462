"""Verifies and times the backends on the machine at hand: `python -m iprm_kernels verify`.

The kernels run in a child process (`child`), started and watched by `run`; `checks` compares them with the float64 reference,
`timing` times them. `iprm_kernels.verdict` keeps what was found, and `backends` selects by it.
"""
