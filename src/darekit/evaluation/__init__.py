# SPDX-License-Identifier: Apache-2.0
"""How good models are: a judge gives a live model scores.

`judges` reads what a judge is, `examples` judges by rows of data, `outside` by a command or a Python function;
`scores` are numbers and their standard errors.
"""
