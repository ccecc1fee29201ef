# SPDX-License-Identifier: Apache-2.0
"""Sweeps: one recipe, some of its settings varied, every combination run in a live model and judged.

`reading` turns the file into a `Sweep`, `grid` into cells, `running` evaluates them, `store` keeps what is finished,
`summaries` says what it means.
"""
