# SPDX-License-Identifier: Apache-2.0
"""One recipe after another in one live model, judged: what sweeps and searches have in common.

`judging` reads and makes the judges of a file, `models` holds the live model whose weights are replaced, `identities`
says what decides about a score, `files` writes what must not be lost.
"""
