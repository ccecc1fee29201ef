# SPDX-License-Identifier: Apache-2.0
"""Searching for the best recipe: candidates by Optuna, judged in rungs of items, reported honestly.

`reading` turns the file into a `Search`, `space` its settings into dimensions and candidates into recipes; `baselines`
are what must be beaten; `asking` judges one candidate, `racing` says when it is hopeless; `studies` keeps Optuna,
`folders` the results, `leases` who works on what; `running` begins, `working` is the loop, `verdicts` has the words at
its end.
"""
