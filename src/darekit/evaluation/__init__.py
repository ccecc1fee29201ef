# SPDX-License-Identifier: Apache-2.0
"""How good models are: a judge gives a live model scores, and several models make one table.

`judges` reads what a judge is; `examples` judges by rows of data, `outside` by a command or a Python function,
`harness` by tasks of lm-eval; `scores` are numbers and their standard errors. `comparison` runs a judge over
models, and `generations` writes their answers.
"""
