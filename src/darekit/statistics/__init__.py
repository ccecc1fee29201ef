# SPDX-License-Identifier: Apache-2.0
"""What merge methods must know of a model beside its weights: diagonal Fishers and Gram matrices.

`files.py` is the format, which a merge reads without torch; `running.py` makes them in one pass over data, with a model
that runs.
"""
